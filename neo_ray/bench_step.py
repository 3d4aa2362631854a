"""What does one optimizer step cost? LoRA-SFT, Neo, and Neo as others step, on one pair and the same batches."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from neo_ray import adapters, bench_others, devices, filling, models, stores, train
from neo_ray.batches import StepPlan, plan_steps
from neo_ray.bench_others import WholeLogits, dense_terms, fused_terms, step_by
from neo_ray.bench_pairs import ADAM_MOMENTS_BYTES, RandomPair, even_split, make_parts
from neo_ray.bench_turns import BASELINE, Announce, Measured, num_calls, take_turns
from neo_ray.config import SweepConfig
from neo_ray.data import Split, TokenData
from neo_ray.memory import adapter_parameters
from neo_ray.parts import Parts, load_parts
from neo_ray.prepare import make_student, prepare
from neo_ray.settings import ConfigError, DeepSpeedConfig, LoraConfig, TrainingConfig, TrialConfig
from neo_ray.shapes import ModelShape, shape_from_config
from neo_ray.student import Student
from neo_ray.supply import row_bytes

LORA = LoraConfig(rank=16, alpha=32)


@dataclass(frozen=True)
class StepArm:
    about: str
    settings: dict[str, Any]
    """What sets the arm's trial apart from the others'."""
    step: Callable[..., tuple[float, ...]]
    """Called as the project's own step is; returns loss, CE and KD."""
    student: type[Student] = Student
    targets: stores.Mode | None = None
    """What speaks for the teacher; None: it is alive."""


def measure_steps(pair: SweepConfig | RandomPair, batch: int, length: int, rounds: int, announce: Announce) -> Measured:
    """One optimizer step of every arm on full sequences: no padding, and every position scored that has a next one.

    Args:
        pair: whose models and text, or random ones.

    Raises:
        ConfigError: models or text cannot be had, or do not fit into memory.
    """
    ready, arms = make_ready(pair, batch, length, num_calls(rounds), announce), installed()
    parts, device = ready.parts, ready.parts.device
    with process_group(device), tempfile.TemporaryDirectory() as folder:
        running = {name: Running(arm, ready, Path(folder)) for name, arm in arms.items()}
        known = {name: _known(arm, running[name], parts.teacher) for name, arm in arms.items()}
        samples = take_turns({name: run.step for name, run in running.items()}, rounds, device, announce)
        for run in running.values():
            run.engine.destroy()
    missing = bench_others.not_installed(ARMS)
    return Measured(ready.setting | ({"not_installed": " ".join(missing)} if missing else {}), known, samples)


@dataclass(frozen=True)
class Ready:
    """What all arms step on."""

    trial: TrialConfig
    parts: Parts
    split: Split
    plan: StepPlan
    setting: dict[str, Any]


def make_ready(pair: SweepConfig | RandomPair, batch: int, length: int, steps: int, announce: Announce) -> Ready:
    """Models and batches of that many steps. Raises ConfigError, as `measure_steps` does."""
    devices.prepare_deepspeed()  # first, so that its absence is known at once
    device, trial = devices.local_device(), make_trial(batch, steps)
    if isinstance(pair, RandomPair):
        parts = make_parts(pair, trial, device, length, batch * steps, len(installed()))
    else:
        parts = load_parts(make_student(pair, prepare(pair, announce), announce), trial, device)
    split = full_sequences(parts.data.split("train"), length, batch * steps)
    plan = plan_steps(split.num_tokens, split.num_labels, trial.training, points=1, seed=trial.seed)
    setting = {
        **_names(pair),
        "batch_size": batch,
        "length_tokens": length,
        "scored_positions": int(plan.labels[0]),
        "rank": trial.lora.rank,
        "kd_ratio": trial.distill.kd_ratio,
        "zero_stage": trial.deepspeed.zero_stage,
        "dtype": str(parts.dtype).removeprefix("torch."),
    }
    return Ready(trial, parts, split, plan, setting)


class Running:
    """An arm at work: a student, an adapter and an optimizer of its own; the teacher is shared.

    `folder`: for the stores of teachers that are not alive.
    """

    def __init__(self, arm: StepArm, ready: Ready, folder: Path) -> None:
        parts, split = ready.parts, ready.split
        self.trial = TrialConfig.model_validate({**dict(ready.trial), **arm.settings})
        shared = {id(weight): weight for weight in parts.student.parameters()}  # frozen: a copy of its modules is enough
        self.parts = replace(parts, student=copy.deepcopy(parts.student, shared))  # a model carries one adapter at a time
        if arm.targets is not None:
            store = fill_store(arm.targets, parts, split, folder / arm.targets)
            self.parts = replace(self.parts, teacher=None, targets=store)
        self.student = arm.student(adapters.attach(self.parts.student, self.trial), parts.device, parts.dtype)
        self.trained = adapters.trained_parameters(self.student.model)
        self.engine = train.build_engine(self.student, self.trained, self.trial, world_size=1)
        self._arm, self._split, self._plan = arm, split, ready.plan
        self.student.train()

    def step(self, number: int) -> tuple[float, ...]:
        """Loss, CE and KD of the step."""
        rate = self.trial.training.learning_rate
        return self._arm.step(self.engine, self.trial, self.parts, self._split, self._plan, number, rate)[:3]


def fill_store(mode: stores.Mode, parts: Parts, split: Split, folder: Path) -> stores.Store:
    """What the living teacher says of a split, stored."""
    data = TokenData(folder, "bench", {}, {"train": split})
    k = min(64, parts.vocabulary) if mode == "topk" else 0
    recipe = stores.Recipe(mode, data.fingerprint, "bench", str(parts.dtype), parts.vocabulary, top_k=k)
    head = models.output_head(parts.student) if mode == "projection" else None
    teacher = filling.Teacher(recipe, parts.teacher, data, parts.sources.pad_id, head)
    bytes_of_row = row_bytes(mode, k or (head or teacher.head).weight_VH.shape[1])
    for shard in stores.shards(data, bytes_of_row):
        stores.write_shard(folder, shard, teacher.fill(shard))
    if mode == "hidden":
        stores.write_head(folder, teacher.head)
    return stores.open_store(folder, recipe, bytes_of_row, data, parts.device)


def _other(about: str, terms: Callable[..., bench_others.Terms], loss: bench_others.Loss, student: type[Student]) -> StepArm:
    return StepArm(about, {"method": "neo"}, step_by(terms, loss), student)


ARMS = {
    BASELINE: StepArm("LoRA-SFT, no teacher", {"method": "lora"}, train.optimizer_step),
    "neo": StepArm("Neo, live teacher", {"method": "neo"}, train.optimizer_step),
    "neo_projection": StepArm("Neo, stored projections", {"method": "neo"}, train.optimizer_step, targets="projection"),
    "neo_hidden": StepArm("Neo, stored hidden states", {"method": "neo"}, train.optimizer_step, targets="hidden"),
    "neo_topk": StepArm("Neo, stored top 64 tokens", {"method": "neo"}, train.optimizer_step, targets="topk"),
    "reference": _other("Neo as the reference trainer steps", dense_terms, bench_others.reference_loss, WholeLogits),
    "trl": _other("Neo, dense, live teacher, TRL's GKD loss", dense_terms, bench_others.trl_loss, WholeLogits),
    "liger": _other("Neo, live teacher, Liger's chunked JSD loss", fused_terms, bench_others.liger_loss, Student),
}


def installed() -> dict[str, StepArm]:
    """The arms that can run here."""
    missing = bench_others.not_installed(ARMS)
    return {name: arm for name, arm in ARMS.items() if name not in missing}


def make_trial(batch: int, steps: int) -> TrialConfig:
    """The settings that all arms share."""
    training = TrainingConfig(batch_size=batch, micro_batch_size=batch, steps=steps)
    return TrialConfig(lora=LORA, training=training, deepspeed=DeepSpeedConfig(zero_stage=0))


def full_sequences(split: Split, length: int, count: int) -> Split:
    """Up to `count` examples of exactly `length` tokens, cut from the split's examples laid end to end.

    Raises:
        ConfigError: the text is shorter than one of them.
    """
    enough = int(np.searchsorted(np.cumsum(split.num_tokens), count * length)) + 1
    pairs = split.examples(range(min(enough, len(split))))
    ids, labels = (np.concatenate(side) for side in zip(*pairs, strict=True))
    count = min(count, len(ids) // length)
    if count == 0:
        raise ConfigError(f"--length: {length} tokens are more than the {len(ids)} of the training text")
    return even_split(*(side[: count * length].reshape(count, length) for side in (ids, labels)))


def counted_ratio(
    lora: LoraConfig, student: ModelShape, teacher: ModelShape | None = None, targets: stores.Mode | None = None
) -> float:
    """A step's operations over those of the LoRA-SFT step, counted from the parameters; 1 without a teacher.

    Per token 2 operations for each weight in a forward pass and 2 for the gradient of its input; a frozen weight needs no
    gradient of its own, the adapter's do (2 more). Attention's products, norms and the softmaxes are left out.

    Args:
        targets: the teacher's word comes from a store. Of its hidden states the head is taken again; the rest needs no product.
    """
    sft = 4 * _multiplied(student) + 6 * adapter_parameters(student, lora)
    if teacher is None or targets in ("projection", "topk"):
        return 1.0
    taught = _head_weights(teacher) if targets == "hidden" else _multiplied(teacher)
    return (sft + 2 * taught) / sft


def _multiplied(shape: ModelShape) -> int:
    """Weights that each token is multiplied by: the linear layers and the head."""
    layer = sum(n_in * n_out for n_in, n_out in shape.linear_layers.values())
    return shape.num_layers * layer + _head_weights(shape)


def _head_weights(shape: ModelShape) -> int:
    return shape.vocab_size * shape.hidden_size


def _known(arm: StepArm, running: Running, teacher: Any) -> dict[str, Any]:
    """What the arm alone would hold between steps (weights of its models, AdamW's moments), and its counted operations.

    Args:
        teacher: the model, whether it is alive for the arm or not.
    """
    student: Any = running.parts.student
    has_teacher = running.trial.has_teacher
    held: list[Any] = [student, *([teacher] if has_teacher and arm.targets is None else [])]
    weights = sum(p.numel() * p.element_size() for model in held for p in model.parameters())
    moments = ADAM_MOMENTS_BYTES * sum(p.numel() for p in running.trained.values())
    of_student, of_teacher = (shape_from_config(model.config.to_dict()) for model in (student, teacher))
    counted = None
    if of_student is not None and (of_teacher is not None or not has_teacher):
        counted = counted_ratio(running.trial.lora, of_student, of_teacher if has_teacher else None, arm.targets)
    return {"about": arm.about, "held_bytes": weights + moments, "counted_ratio": counted}


def _names(pair: SweepConfig | RandomPair) -> dict[str, str]:
    if isinstance(pair, RandomPair):
        return {"teacher": pair.teacher_name, "student": pair.student_name}
    prune = pair.student.prune
    student = str(pair.student.model) if prune is None else f"the teacher cut to {prune.num_layers} layers"
    assert pair.teacher is not None
    return {"teacher": pair.teacher.model, "student": student}


@contextmanager
def process_group(device: torch.device, rank: int = 0, world_size: int = 1, meeting: Path | None = None) -> Iterator[None]:
    """DeepSpeed wants one, of one process too. It keeps groups of its own, and forgets them only if asked itself.

    Args:
        meeting: a new file by which several processes find each other.
    """
    import deepspeed.comm

    store = dist.HashStore() if meeting is None else dist.FileStore(str(meeting), world_size)
    dist.init_process_group(dist.get_default_backend_for_device(device), store=store, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        (deepspeed.comm if deepspeed.comm.is_initialized() else dist).destroy_process_group()

"""Does a head give and get the dense gradient where ZeRO-3 has cut it, without logits of all positions ever being made?

Kinds of heads: trained with all else, tied or not, with a bias; as peft's trained copy; with a branch of its own; frozen.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from test_invariance import CPU, IN_PARTS, chunks_of, examples, gradient_of, make_split, scored_positions
from tiny import VOCABULARY, make_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neo_ray import adapters, models, train
from neo_ray.batches import plan_steps
from neo_ray.bench_step import process_group
from neo_ray.data import TokenData
from neo_ray.heldout import evaluate
from neo_ray.parts import ModelSource, Parts, Sources
from neo_ray.settings import DeepSpeedConfig, DistillConfig, EvaluationConfig, LoraConfig, TrainingConfig, TrialConfig
from neo_ray.student import Student

ROWS, STEPS, WIDTH = 7, 3, 64
"""Positions of a chunk; steps: ZeRO-3 records the order of modules in the first ones, and fetches ahead by it after that."""


@dataclass(frozen=True)
class Kind:
    method: str = "neo"
    lora: LoraConfig = LoraConfig()  # noqa: RUF009  (frozen)
    tied: bool = False
    bias: bool = False


def on_head(**settings: Any) -> LoraConfig:
    return LoraConfig(rank=4, alpha=8, **{"target_modules": ("q_proj", "lm_head"), **settings})


KINDS = {
    "all parameters": Kind("kd"),
    "all parameters, tied": Kind("kd", tied=True),
    "all parameters, bias": Kind("kd", bias=True),
    "copy": Kind(lora=on_head(target_modules=("q_proj",), modules_to_save=("lm_head",))),
    "copy of a tied one": Kind(lora=on_head(target_modules=("q_proj",), modules_to_save=("lm_head",)), tied=True),
    "LoRA": Kind(lora=on_head()),
    "LoRA, tied, bias": Kind(lora=on_head(), tied=True, bias=True),
    "DoRA": Kind(lora=on_head(variant="dora")),
    "MoSLoRA": Kind(lora=on_head(variant="moslora")),
    "PiSSA": Kind(lora=on_head(variant="pissa")),
}
FROZEN = {"frozen": Kind(), "frozen, tied, bias": Kind(tied=True, bias=True)}
"""Heads that the loss reads and nothing trains."""
ALL = KINDS | FROZEN


@dataclass(frozen=True)
class Found:
    gradients: list[dict[str, torch.Tensor]]
    """Of each step."""
    most_rows: int
    """Of any tensor as wide as the vocabulary."""
    fetches: int
    """Of the head as a module that is called, in all steps."""
    gathers: int
    """Of the head by name, in all steps."""
    left_whole: int
    """Numbers of a cut head that were there after a step."""
    scores: tuple[float, float]
    """CE and KL."""


def trial_of(kind: Kind, stage: int, workers: int) -> TrialConfig:
    return TrialConfig(
        method=kind.method,  # type: ignore[arg-type]
        lora=kind.lora,
        distill=DistillConfig(kd_ratio=0.5, temperature=2.0),
        training=TrainingConfig(batch_size=8, micro_batch_size=4 // workers, epochs=1, max_grad_norm=0, dtype="fp32"),
        deepspeed=DeepSpeedConfig(zero_stage=stage, extra=IN_PARTS),  # type: ignore[arg-type]
    )


def make_student(kind: Kind) -> Any:
    """All that is trained is random: as an adapter starts, half of its gradient is zero."""
    model = make_llama(2, seed=0, tied=kind.tied)
    generator = torch.Generator().manual_seed(5)
    if kind.bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY, generator=generator))
    model.config.use_cache = False
    student = adapters.attach(model.requires_grad_(False), trial_of(kind, 0, 1))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_B." in name and "mixer" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 16)
    return student


class MostRows(TorchDispatchMode):
    """Of tensors as wide as the vocabulary, the weights of the head and of its branches, transposed, aside."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCABULARY:
                rows = tensor.numel() // VOCABULARY
                self.rows = max(self.rows, rows if tensor.shape[:-1] not in ((WIDTH,), (4,), (8,)) else 0)
        return result


@contextmanager
def counting_fetches(layer: Any) -> Iterator[list[int]]:
    """[fetches, gathers] of a layer, as they come."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    counts, fetch, enter = [0, 0], Coordinator.fetch_sub_module, GatheredParameters.__enter__

    def counted(self: Any, current_submodule: Any, forward: bool) -> None:
        inside = any(current_submodule is module for module in layer.modules())
        counts[0] += inside and any(True for _ in current_submodule.parameters())
        fetch(self, current_submodule, forward)

    def entered(self: Any) -> None:
        own = {id(parameter) for parameter in layer.parameters()}
        counts[1] += self.enabled and any(id(parameter) in own for parameter in self.params)
        enter(self)

    Coordinator.fetch_sub_module, GatheredParameters.__enter__ = counted, entered
    try:
        yield counts
    finally:
        Coordinator.fetch_sub_module, GatheredParameters.__enter__ = fetch, enter


def take(kind: Kind, stage: int, workers: int) -> Found:
    trial, split = trial_of(kind, stage, workers), make_split()
    student = Student(make_student(kind), CPU, torch.float32, stage).train()
    trained = adapters.trained_parameters(student.model)
    engine = train.build_engine(student, trained, trial, workers)
    sources = Sources(ModelSource("tiny"), "made", ModelSource("tiny"), VOCABULARY, pad_id=0)
    teacher = make_llama(4, seed=1).requires_grad_(False)
    parts = Parts(sources, (), student.model, teacher, TokenData(Path(), "made", {}, {"train": split}), CPU, torch.float32)
    plan = plan_steps(split.num_tokens, split.num_labels, trial.training, 1, 0)
    gradients, left = [], 0
    layer = models.head_layer(student.model)
    with chunks_of(ROWS), MostRows() as most, counting_fetches(layer) as fetches:
        for _ in range(STEPS):
            with gradient_of(engine, trained) as gradient:
                train.optimizer_step(engine, trial, parts, split, plan, step=0, rate=0.0)
            gradients.append(gradient)
            left += sum(parameter.numel() for parameter in layer.parameters() if hasattr(parameter, "ds_id"))
    with chunks_of(ROWS):
        scores = evaluate(student.predict, parts, "train", EvaluationConfig(batch_size=2))
    engine.destroy()
    assert scores.kl is not None
    return Found(gradients, most.rows, *fetches, left, (scores.ce, scores.kl))


@functools.cache
def dense(name: str) -> tuple[dict[str, torch.Tensor], tuple[float, float]]:
    """The gradient of whole logits in float64, one example after another, and the scores."""
    student, teacher = make_student(ALL[name]).double(), make_llama(4, seed=1).double()
    trained, count = adapters.trained_parameters(student), 0
    total, ce, kl = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for ids_L, labels_L in examples():
        rows = scored_positions(labels_L)
        next_N = torch.tensor([labels_L[row + 1] for row in rows])
        logits_NV = student(input_ids=torch.tensor(ids_L)[None]).logits[0, rows]
        teacher_NV = teacher(input_ids=torch.tensor(ids_L)[None]).logits[0, rows].detach()
        hard = torch.nn.functional.cross_entropy(logits_NV, next_N, reduction="sum")
        soft, at_one = (
            torch.nn.functional.kl_div((logits_NV / t).log_softmax(-1), (teacher_NV / t).softmax(-1), reduction="sum")
            for t in (2.0, 1.0)
        )
        total, ce, kl, count = total + hard / 2 + 4 * soft / 2, ce + hard, kl + at_one, count + len(rows)
    gradient = torch.autograd.grad(total / count, list(trained.values()))
    return dict(zip(trained, gradient, strict=True)), ((ce / count).item(), (kl / count).item())


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with process_group(CPU, rank, 2, folder / "meeting"):
        found = {name: take(kind, 3, 2) for name, kind in ALL.items()}
    if rank == 0:
        torch.save(found, folder / "found")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """Two workers under ZeRO-3, which accumulate two micro-batches a step."""
    folder = tmp_path_factory.mktemp("together")
    mp.spawn(work, args=(folder,), nprocs=2)
    return torch.load(folder / "found", weights_only=False)


@pytest.fixture(scope="module")
def alone() -> Iterator[dict[str, Found]]:
    with process_group(CPU):
        yield {name: take(kind, 0, 1) for name, kind in ALL.items()}


@pytest.mark.parametrize("name", ALL)
def test_two_workers_that_share_the_head_have_the_dense_gradient(
    together: dict[str, Found], alone: dict[str, Found], name: str
) -> None:
    found, (gradient, scores) = together[name], dense(name)
    assert any("head" in key or "embed" in key for key in gradient) == (name in KINDS)
    for (step, ours), theirs in itertools.product(enumerate(found.gradients), (gradient, alone[name].gradients[0])):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            error = (ours[key] - theirs[key]).norm() / theirs[key].norm()
            assert theirs[key].norm() > 0 and error <= (1e-4 if theirs is gradient else 1e-5), (step, key)
    assert found.scores == pytest.approx(scores, rel=1e-4) and found.scores == pytest.approx(alone[name].scores, abs=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_no_more_logits_than_a_chunk_s_are_made(together: dict[str, Found], alone: dict[str, Found], name: str) -> None:
    assert alone[name].most_rows == together[name].most_rows == ROWS


@pytest.mark.parametrize("name", KINDS)
def test_the_head_is_gathered_once_forward_and_once_backward(together: dict[str, Found], name: str) -> None:
    """Twice a micro-batch of each of two in a step, however many chunks there are."""
    assert (together[name].fetches, together[name].gathers) == (STEPS * 2 * 2, 0)


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_head_is_gathered_once_a_step(together: dict[str, Found], alone: dict[str, Found], name: str) -> None:
    """Whole for both micro-batches, however many chunks there are, and cut again when the step is done."""
    assert (together[name].fetches, together[name].gathers, together[name].left_whole) == (0, STEPS, 0)
    assert alone[name].gathers == 0, "whole as it is"

"""Does any way of cutting an optimizer step up change its gradient? One law over accumulation, workers, packing, padding,
vocabulary padding, ZeRO stage, kd_ratio, temperature and where the teacher's word comes from, held by the loop's own step with
a real DeepSpeed engine (fp32, CPU).

Reference: float64, one example after another, unpadded, with probabilities written out; all sums divided once, by the labelled
positions of the whole batch. Shape suffixes: L tokens of an example, N its scored positions, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from tiny import VOCABULARY, make_llama

from neo_ray import adapters, memory, models, train
from neo_ray.batches import plan_steps
from neo_ray.bench_step import process_group
from neo_ray.data import Split, TokenData
from neo_ray.filling import Teacher
from neo_ray.losses import LossSums, TopK
from neo_ray.parts import ModelSource, Parts, Sources, sum_over_ranks
from neo_ray.settings import DeepSpeedConfig, DistillConfig, LoraConfig, TrainingConfig, TrialConfig
from neo_ray.stores import Recipe, Store, open_store, shards, write_head, write_shard
from neo_ray.student import Student
from neo_ray.teaching import Taught

CPU = torch.device("cpu")
TOLERANCE = 1e-4
TOLERANCE_OF_FP16 = 2e-3
"""Of gradients, and of losses in nats, where a store has rounded what the teacher says."""
BATCH_SIZE = 8
# Six examples of a batch of eight, as at the end of an epoch: some micro-batch has fewer of them, or none.
LENGTHS = (61, 2, 17, 33, 5, 48)
UNLABELLED = (20, 0, 0, 31, 1, 40)
"""Tokens of a prompt at the beginning of each example: the labels counted are 41, 1, 16, 2, 4 and 8."""
PADDING_ROWS = 24
IN_PARTS = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}}
"""By its defaults ZeRO-3 leaves weights as small as these whole, once it has them."""


@dataclass(frozen=True)
class Case:
    micro_batches: int
    layout: str
    padded: str
    """Whose vocabulary has rows beyond the tokenizer's."""
    objective: tuple[float, float]
    """kd_ratio and temperature."""
    stage: int = 0
    method: str = "neo"
    rows: int = 10**6
    """Positions of a chunk of the loss."""
    targets: str = "live"
    """Where the teacher's word comes from."""
    workers: int = 1

    @property
    def is_possible(self) -> bool:
        """A trained head has no projection."""
        return not (self.targets == "projection" and self.method == "kd")

    def __str__(self) -> str:
        kd_ratio, temperature = self.objective
        parts = (f"micro{self.micro_batches}", self.layout, self.padded, f"kd{kd_ratio:g}", f"T{temperature:g}")
        return "-".join((*parts, f"zero{self.stage}", self.method, f"rows{self.rows}", self.targets))

    def trial(self) -> TrialConfig:
        training = TrainingConfig(
            batch_size=BATCH_SIZE,
            micro_batch_size=BATCH_SIZE // (self.micro_batches * self.workers),
            epochs=1,
            max_grad_norm=0,
            dtype="fp32",
            packing=self.layout == "packed",
            padding_side="left" if self.layout == "left" else "right",
        )
        kd_ratio, temperature = self.objective
        return TrialConfig(
            method=self.method,  # type: ignore[arg-type]
            lora=LoraConfig(rank=4, alpha=8),
            distill=DistillConfig(kd_ratio=kd_ratio, temperature=temperature),
            training=training,
            deepspeed=DeepSpeedConfig(zero_stage=self.stage, extra=IN_PARTS),  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class Found:
    """What a step gave, over all workers."""

    gradient: dict[str, torch.Tensor]
    sums: tuple[float, ...]
    """Loss, CE and KD."""
    counts: set[int]
    """Positions that CE scored and those that KD did."""


WAYS = {
    "micro_batches": [1, 2, 4],
    "layout": ["right", "left", "packed"],
    "padded": ["none", "teacher", "student"],
    "objective": [(0.0, 1.0), (0.5, 1.0), (0.5, 2.0), (1.0, 1.0), (1.0, 2.0)],
}
ENGINES = {
    "stage": [0, 1, 2, 3],
    "method": ["neo", "kd"],
    "rows": [10**6, 7, 1],
    "targets": ["live", "projection", "hidden", "topk"],
}


def all_of(ways: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(ways, values, strict=True)) for values in itertools.product(*ways.values())]


def covering(ways: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Combinations in which every pair of values of two ways occurs. Greedy: the one with the most new pairs comes next."""
    candidates, chosen = [row for row in all_of(ways) if Case(**row).is_possible], []
    left = {pair for row in candidates for pair in pairs(row)}
    while left:
        chosen.append(max(candidates, key=lambda row: len(left & pairs(row))))
        left -= pairs(chosen[-1])
    return chosen


def pairs(row: dict[str, Any]) -> set[Any]:
    return set(itertools.combinations(row.items(), 2))


ALONE = list(dict.fromkeys(Case(**row) for row in all_of(WAYS) + covering(WAYS | ENGINES)))
TOGETHER = [Case(**row, workers=2) for row in covering(WAYS | ENGINES)]


def test_a_covering_has_every_pair_of_values() -> None:
    for (one, ones), (other, others) in itertools.combinations((WAYS | ENGINES).items(), 2):
        found = {(getattr(case, one), getattr(case, other)) for case in TOGETHER}
        never = {("kd", "projection")} if (one, other) == ("method", "targets") else set()
        assert found == set(itertools.product(ones, others)) - never
    assert len(TOGETHER) < 35


# Models and data


def examples() -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and labels. The padding token stands in the text as well, and some first tokens are labelled."""
    made = []
    for number, (length, unlabelled) in enumerate(zip(LENGTHS, UNLABELLED, strict=True)):
        ids_L = np.random.default_rng(number).integers(VOCABULARY, size=length)
        ids_L[length // 2] = 0
        made.append((ids_L, np.where(np.arange(length) < unlabelled, -100, ids_L)))
    return made


def scored_positions(labels_L: np.ndarray) -> list[int]:
    """The positions whose next token has a label."""
    return [position for position in range(len(labels_L) - 1) if labels_L[position + 1] != -100]


def make_split() -> Split:
    ids, labels = zip(*examples(), strict=True)
    counts = np.array([len(scored_positions(labels_L)) for labels_L in labels])
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})
    return Split(rows, np.array(LENGTHS), counts, np.zeros(len(LENGTHS), np.int64))


def make_model(side: str, padded: str) -> Any:
    """A Llama whose padding rows, where it has some, would take most of the probability."""
    more = PADDING_ROWS if side == padded else 0
    model = make_llama(4 if side == "teacher" else 2, seed=side == "teacher", vocabulary=VOCABULARY + more)
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCABULARY:].mul_(4)
    model.config.use_cache = False
    return model.requires_grad_(False)


def make_student(padded: str, method: str) -> Any:
    """The model to train. The branch of LoRA is random on both sides: as it starts, half of its gradient is zero."""
    trial = Case(1, "right", padded, (0.5, 1.0), method=method).trial()
    model = adapters.attach(make_model("student", padded), trial)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 16)
    return model


# The reference


@functools.cache
def reference_parts(padded: str, method: str) -> dict[Any, tuple[float, dict[str, torch.Tensor]]]:
    """Sum over all labelled positions and its gradient: of the cross-entropy ("ce"), and of T²·KL for each T."""
    student, teacher = make_student(padded, method).double(), make_model("teacher", padded).double()
    sums: dict[Any, torch.Tensor] = {"ce": torch.zeros(()), 1.0: torch.zeros(()), 2.0: torch.zeros(())}
    for ids_L, labels_L in examples():
        rows, next_N = scored_positions(labels_L), [labels_L[n + 1] for n in scored_positions(labels_L)]
        student_NV, teacher_NV = (
            model(input_ids=torch.tensor(ids_L)[None]).logits[0, rows, :VOCABULARY] for model in (student, teacher)
        )
        sums["ce"] = sums["ce"] - probabilities(student_NV, 1.0)[range(len(rows)), next_N].log().sum()
        for temperature in (1.0, 2.0):
            p_NV, q_NV = (probabilities(logits_NV, temperature) for logits_NV in (teacher_NV.detach(), student_NV))
            sums[temperature] = sums[temperature] + temperature**2 * (p_NV * (p_NV / q_NV).log()).sum()
    trained = adapters.trained_parameters(student)
    gradients = {key: torch.autograd.grad(total, list(trained.values()), retain_graph=True) for key, total in sums.items()}
    return {key: (sums[key].item(), dict(zip(trained, gradients[key], strict=True))) for key in sums}


def probabilities(logits_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    weights_NV = (logits_NV / temperature).exp()
    return weights_NV / weights_NV.sum(dim=1, keepdim=True)


def reference(case: Case) -> Found:
    (kd_ratio, temperature), parts = case.objective, reference_parts(case.padded, case.method)
    (ce, ce_gradient), (kd, kd_gradient) = parts["ce"], parts[temperature]
    count = sum(len(scored_positions(labels_L)) for _, labels_L in examples())
    gradient = {name: ((1 - kd_ratio) * ce_gradient[name] + kd_ratio * kd_gradient[name]) / count for name in ce_gradient}
    sums = ((1 - kd_ratio) * ce + kd_ratio * kd, ce, kd if kd_ratio else 0.0)
    return Found(gradient, sums, {count})


# The step


class Steps:
    """Takes the project's own step for a case. Engines are kept where cases differ only in what a step is given."""

    def __init__(self) -> None:
        self.split = make_split()
        self.engines: dict[Any, Any] = {}
        self.stores: dict[Any, Store] = {}
        self.folder = tempfile.TemporaryDirectory()

    def take(self, case: Case) -> Found:
        trial = case.trial()
        engine, trained = self._engine(case, trial)
        teacher = make_model("teacher", case.padded)
        sources = Sources(ModelSource("tiny"), "made", ModelSource("tiny"), VOCABULARY, pad_id=0)
        data = TokenData(Path(), "made", {}, {"train": self.split})
        store = self._store(case, data)
        living = teacher if store is None else None
        parts = Parts(sources, (), engine.module.model, living, data, CPU, torch.float32, targets=store)
        plan = plan_steps(self.split.num_tokens, self.split.num_labels, trial.training, 1, 0)
        with gradient_of(engine, trained) as gradient, counting() as counts, chunks_of(case.rows):
            sums = train.optimizer_step(engine, trial, parts, self.split, plan, step=0, rate=0.0)
        everywhere = sum_over_ranks(torch.tensor([*sums[:3], *counts], dtype=torch.float64)).tolist()
        return Found(gradient, tuple(everywhere[:3]), {round(count) for count in everywhere[3:]})

    def _store(self, case: Case, data: TokenData) -> Store | None:
        """What the teacher says of the split, kept on disk: of the likeliest tokens all, which is then no bound."""
        temperature = case.objective[1] if case.targets in ("projection", "topk") else 1.0
        key = (case.targets, case.padded, temperature)
        if case.targets != "live" and key not in self.stores:
            mode: Any = case.targets
            head = models.output_head(make_model("student", case.padded)) if mode == "projection" else None
            recipe = Recipe(mode, "made", "tiny", "torch.float32", VOCABULARY, temperature, top_k=VOCABULARY)
            teacher = Teacher(recipe, make_model("teacher", case.padded), data, 0, head)
            folder = Path(self.folder.name) / "-".join(map(str, key))
            for shard in shards(data, 1000):
                write_shard(folder, shard, teacher.fill(shard))
            if mode == "hidden":
                write_head(folder, teacher.head)
            self.stores[key] = open_store(folder, recipe, 1000, data, CPU)
        return self.stores.get(key)

    def _engine(self, case: Case, trial: TrialConfig) -> tuple[Any, dict[str, Any]]:
        key = (case.micro_batches, case.padded == "student", case.stage, case.method)
        if key not in self.engines:
            student = Student(make_student(case.padded, case.method), CPU, torch.float32, case.stage).train()
            trained = adapters.trained_parameters(student.model)
            self.engines[key] = train.build_engine(student, trained, trial, case.workers), trained
        return self.engines[key]


@contextmanager
def gradient_of(engine: Any, trained: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
    """Whole gradients by name, taken in the instant before the optimizer uses them."""
    from deepspeed.utils import safe_get_full_grad

    gradient: dict[str, torch.Tensor] = {}
    step = engine.step

    def looked_at() -> None:
        if engine.is_gradient_accumulation_boundary():
            assert not gradient, "two updates in one step"
            gradient.update({name: safe_get_full_grad(parameter).double().clone() for name, parameter in trained.items()})
        step()

    engine.step = looked_at
    try:
        yield gradient
    finally:
        del engine.step


@contextmanager
def chunks_of(rows: int) -> Iterator[None]:
    before = memory.CHUNK_BYTES["cpu"]
    memory.CHUNK_BYTES["cpu"] = rows * 4 * VOCABULARY
    try:
        yield
    finally:
        memory.CHUNK_BYTES["cpu"] = before


@contextmanager
def counting() -> Iterator[list[int]]:
    """Positions that the cross-entropy scored and that the teacher was asked for, over the micro-batches of a step."""
    counts, loss = [0, 0], Student.loss

    def counted(student: Student, output: Any, labels_BL: Any, taught: Taught, *settings: Any) -> LossSums:
        def logits(rows: slice) -> torch.Tensor | TopK:
            assert taught.logits is not None
            teacher_CV = taught.logits(rows)
            counts[1] += len(teacher_CV.ids_NK if isinstance(teacher_CV, TopK) else teacher_CV)
            return teacher_CV

        found = loss(student, output, labels_BL, Taught(logits) if taught.logits else taught, *settings)
        counts[0] += found.count
        counts[1] += 0 if taught.logits else found.count
        return found

    Student.loss = counted  # type: ignore[method-assign,assignment]
    try:
        yield counts
    finally:
        Student.loss = loss  # type: ignore[method-assign]


def work(rank: int, folder: Path) -> None:
    """One of two workers: takes its part in every case, and the first writes down what was found."""
    torch.set_num_threads(1)
    with process_group(CPU, rank, 2, folder / "meeting"):
        steps = Steps()
        found = {str(case): steps.take(case) for case in TOGETHER}
    if rank == 0:
        torch.save(found, folder / "found")


@pytest.fixture(scope="module")
def alone() -> Iterator[Steps]:
    with process_group(CPU):
        yield Steps()
    torch.nn.functional.linear = train.LINEAR


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What two workers found in every case: they are started once, since that takes longer than their work."""
    folder = tmp_path_factory.mktemp("together")
    mp.spawn(work, args=(folder,), nprocs=2)
    return torch.load(folder / "found", weights_only=False)


def agree(found: Found, expected: Found, targets: str) -> None:
    assert found.counts == expected.counts, "CE and KD score the same positions, those of the batch"
    (count,) = found.counts
    stored = targets != "live"
    assert found.sums == pytest.approx(expected.sums, rel=1e-5, abs=TOLERANCE_OF_FP16 * count if stored else None)
    tolerance = TOLERANCE_OF_FP16 if stored else TOLERANCE
    assert found.gradient.keys() == expected.gradient.keys()
    ours, theirs = (torch.cat([side.gradient[name].flatten() for name in expected.gradient]) for side in (found, expected))
    assert ours.norm() / theirs.norm() == pytest.approx(1.0, abs=tolerance)
    assert (ours - theirs).norm() / theirs.norm() <= tolerance


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_one_worker_has_the_gradient_of_the_dense_reference(alone: Steps, case: Case) -> None:
    agree(alone.take(case), reference(case), case.targets)


@pytest.mark.parametrize("case", TOGETHER, ids=str)
def test_two_workers_have_the_gradient_of_the_dense_reference(together: dict[str, Found], case: Case) -> None:
    agree(together[str(case)], reference(case), case.targets)

"""The LLM-Neo loss and its divergences against independent formulas: dense, float64, in plain probabilities."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neo_ray.cautions import PARAMETER_OF
from neo_ray.loading import validate
from neo_ray.losses import IGNORED, divergence_sum, neo_loss, next_labels, scored
from neo_ray.memory import LOSS_TENSORS
from neo_ray.plan import make_plan
from neo_ray.settings import DistillConfig, Divergence

N, V = 7, 11
SOURCE = torch.Generator().manual_seed(0)
STUDENT, TEACHER = (torch.randn(N, V, generator=SOURCE) * 2 for _ in range(2))
LABELS = torch.randint(0, V, (N,), generator=SOURCE)
DIVERGENCES = get_args(Divergence)


def distillation(**values: Any) -> DistillConfig:
    return DistillConfig(**{"kd_ratio": 1.0, **values})


def dense_kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * (a / b).log()).sum(-1)


def dense_adaptive_kl(p: torch.Tensor, q: torch.Tensor, head_mass: float) -> torch.Tensor:
    """The weights are numbers: taken off the graph, one position at a time, by walking down the teacher's ranking."""
    rows = []
    for p_row, q_row in zip(p, q, strict=True):
        gaps, mass, head = (p_row - q_row).abs().tolist(), 0.0, 0.0
        for token in p_row.argsort(descending=True).tolist():
            if mass < head_mass:
                head += gaps[token]
            mass += p_row[token].item()
        weight = head / sum(gaps)
        rows.append(weight * dense_kl(p_row, q_row) + (1 - weight) * dense_kl(q_row, p_row))
    return torch.stack(rows)


def dense_divergence(student: torch.Tensor, distill: DistillConfig) -> torch.Tensor:
    temperature, beta, skew = distill.temperature, distill.jsd_beta, distill.skew
    p, q = torch.softmax(TEACHER.double() / temperature, -1), torch.softmax(student / temperature, -1)
    mixture = beta * p + (1 - beta) * q
    rows = {
        "forward_kl": lambda: dense_kl(p, q),
        "reverse_kl": lambda: dense_kl(q, p),
        "jsd": lambda: beta * dense_kl(p, mixture) + (1 - beta) * dense_kl(q, mixture),
        "skew_kl": lambda: dense_kl(p, skew * p + (1 - skew) * q),
        "skew_reverse_kl": lambda: dense_kl(q, (1 - skew) * p + skew * q),
        "adaptive_kl": lambda: dense_adaptive_kl(p, q, distill.head_mass),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }[distill.divergence]()
    return rows.sum() * (temperature if distill.divergence == "total_variation" else temperature**2)


def dense_loss(student: torch.Tensor, distill: DistillConfig) -> torch.Tensor:
    ce = -torch.softmax(student, -1)[torch.arange(N), LABELS].log().sum()
    return (1 - distill.kd_ratio) * ce + distill.kd_ratio * dense_divergence(student, distill)


def assert_equals_the_dense_reference(distill: DistillConfig) -> None:
    ours, theirs = STUDENT.clone().requires_grad_(), STUDENT.double().requires_grad_()
    sums, expected = neo_loss(ours, LABELS, TEACHER, distill), dense_loss(theirs, distill)
    sums.total.backward()
    expected.backward()
    assert sums.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert sums.kd.item() == pytest.approx(dense_divergence(theirs, distill).item(), rel=1e-5)
    assert sums.count == N
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
def test_value_and_gradient_equal_the_dense_reference(kd_ratio: float, temperature: float, divergence: str) -> None:
    assert_equals_the_dense_reference(distillation(kd_ratio=kd_ratio, temperature=temperature, divergence=divergence))


@pytest.mark.parametrize(
    ("divergence", "parameter", "value"),
    [
        ("jsd", "jsd_beta", 0.1),
        ("jsd", "jsd_beta", 0.9),
        ("skew_kl", "skew", 0.0),
        ("skew_kl", "skew", 0.7),
        ("skew_reverse_kl", "skew", 0.0),
        ("skew_reverse_kl", "skew", 0.7),
        ("adaptive_kl", "head_mass", 0.05),
        ("adaptive_kl", "head_mass", 0.95),
    ],
)
def test_every_parameter_gives_the_dense_references_value_and_gradient(divergence: str, parameter: str, value: float) -> None:
    assert_equals_the_dense_reference(distillation(divergence=divergence, temperature=2.0, **{parameter: value}))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_of_equal_distributions_is_zero_and_so_is_its_gradient(divergence: str) -> None:
    student = (TEACHER + 3).requires_grad_()  # another logit for each token, the same distribution
    value = divergence_sum(student, TEACHER, distillation(divergence=divergence, temperature=2.0))
    if divergence != "total_variation":  # whose gradient has a kink there
        value.backward()
        assert student.grad is not None and student.grad.abs().max() < 1e-6
    assert value.item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_of_different_distributions_is_positive_at_each_position(divergence: str) -> None:
    distill = distillation(divergence=divergence)
    for spread in (0.1, 1.0, 10.0):
        student, teacher = STUDENT * spread, TEACHER * spread
        assert min(divergence_sum(student[i : i + 1], teacher[i : i + 1], distill).item() for i in range(N)) > 0


CERTAIN, CERTAIN_OF_ANOTHER = (torch.full((N, V), -1e4).index_fill_(1, torch.tensor([token]), 1e4) for token in (3, 5))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("student", "teacher"), [(STUDENT, CERTAIN), (CERTAIN, TEACHER), (CERTAIN, CERTAIN), (CERTAIN, CERTAIN_OF_ANOTHER)]
)
def test_value_and_gradient_are_finite_where_one_is_certain(
    divergence: str, student: torch.Tensor, teacher: torch.Tensor
) -> None:
    student = student.clone().requires_grad_()
    sums = neo_loss(student, LABELS, teacher, distillation(kd_ratio=0.5, divergence=divergence))
    sums.total.backward()
    assert torch.isfinite(sums.total) and student.grad is not None and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_goes_to_the_student_only(divergence: str) -> None:
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    neo_loss(student, LABELS, teacher, distillation(divergence=divergence)).total.backward()
    assert teacher.grad is None and student.grad is not None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_keeps_its_size_as_the_temperature_grows(divergence: str) -> None:
    """What T² is for, and why total variation has T: with the other factor the size would change fourfold."""
    sizes = []
    for temperature in (100.0, 400.0):
        student = STUDENT.clone().requires_grad_()
        divergence_sum(student, TEACHER, distillation(divergence=divergence, temperature=temperature)).backward()
        assert student.grad is not None
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def between(student: torch.Tensor, teacher: torch.Tensor, divergence: str, **parameters: float) -> float:
    return divergence_sum(student, teacher, distillation(divergence=divergence, **parameters)).item()


def test_swapping_teacher_and_student() -> None:
    for one, swapped, parameters, theirs in (
        ("forward_kl", "reverse_kl", {}, {}),
        ("jsd", "jsd", {"jsd_beta": 0.5}, {"jsd_beta": 0.5}),
        ("jsd", "jsd", {"jsd_beta": 0.2}, {"jsd_beta": 0.8}),
        ("skew_kl", "skew_reverse_kl", {"skew": 0.3}, {"skew": 0.3}),
        ("total_variation", "total_variation", {}, {}),
    ):
        expected = between(TEACHER, STUDENT, swapped, **theirs)
        assert between(STUDENT, TEACHER, one, **parameters) == pytest.approx(expected, rel=1e-5)


def test_divergences_meet_at_the_limits_of_their_parameters() -> None:
    forward, reverse = between(STUDENT, TEACHER, "forward_kl"), between(STUDENT, TEACHER, "reverse_kl")
    assert between(STUDENT, TEACHER, "skew_kl", skew=0.0) == pytest.approx(forward, rel=1e-6)
    assert between(STUDENT, TEACHER, "skew_reverse_kl", skew=0.0) == pytest.approx(reverse, rel=1e-6)
    assert between(STUDENT, TEACHER, "skew_kl", skew=1e-5) == pytest.approx(forward, rel=1e-2)
    assert between(STUDENT, TEACHER, "jsd", jsd_beta=1e-3) / 1e-3 == pytest.approx(forward, rel=3e-2)
    assert between(STUDENT, TEACHER, "jsd", jsd_beta=1 - 1e-3) / 1e-3 == pytest.approx(reverse, rel=3e-2)
    assert between(STUDENT, TEACHER, "adaptive_kl", head_mass=1 - 1e-6) == pytest.approx(forward, rel=1e-5)


def test_bounded_divergences_reach_their_bounds() -> None:
    bounds = {"jsd": math.log(2), "skew_kl": -math.log(0.1), "skew_reverse_kl": -math.log(0.1), "total_variation": 1.0}
    for divergence, bound in bounds.items():
        assert between(CERTAIN, CERTAIN_OF_ANOTHER, divergence) / N == pytest.approx(bound, rel=1e-5)


def test_adaptive_kl_weighs_forward_kl_by_the_gap_in_the_head() -> None:
    """By hand: half of the mass is held by the first two tokens, and a third of the gap of 0.6 lies there."""
    p, q = torch.tensor([[0.4, 0.3, 0.2, 0.1]]), torch.tensor([[0.3, 0.2, 0.1, 0.4]])
    forward, reverse = between(q.log(), p.log(), "forward_kl"), between(q.log(), p.log(), "reverse_kl")
    assert between(q.log(), p.log(), "adaptive_kl") == pytest.approx(forward / 3 + reverse * 2 / 3, rel=1e-5)
    assert between(q.log(), p.log(), "adaptive_kl", head_mass=0.39) == pytest.approx(forward / 6 + reverse * 5 / 6, rel=1e-5)


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
def test_label_smoothing_is_torchs_own_and_leaves_the_reported_cross_entropy(kd_ratio: float) -> None:
    ours, theirs, distill = STUDENT.clone().requires_grad_(), STUDENT.clone().requires_grad_(), distillation(kd_ratio=kd_ratio)
    sums = neo_loss(ours, LABELS, TEACHER, distill, label_smoothing=0.1)
    ce = F.cross_entropy(theirs, LABELS, reduction="sum", label_smoothing=0.1)
    expected = (1 - kd_ratio) * ce + kd_ratio * divergence_sum(theirs, TEACHER, distill)
    sums.total.backward()
    expected.backward()
    assert sums.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums.ce.item() == pytest.approx(F.cross_entropy(STUDENT, LABELS, reduction="sum").item(), rel=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_without_a_teacher_the_loss_is_plain_cross_entropy() -> None:
    sums = neo_loss(STUDENT, LABELS, None, distillation(temperature=2.0))
    assert sums.total.item() == pytest.approx(F.cross_entropy(STUDENT, LABELS, reduction="sum").item(), rel=1e-6)
    assert sums.kd == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_half_precision_logits_are_computed_in_fp32(divergence: str) -> None:
    student, teacher, distill = STUDENT.bfloat16(), TEACHER.bfloat16(), distillation(divergence=divergence, temperature=3.0)
    sums = neo_loss(student, LABELS, teacher, distill)
    assert sums.total.dtype == torch.float32
    assert sums.total == neo_loss(student.float(), LABELS, teacher.float(), distill).total


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_scored_position_gives_a_loss_and_a_gradient_of_zero(divergence: str) -> None:
    student = STUDENT.clone().requires_grad_()
    sums = neo_loss(student[:0], LABELS[:0], TEACHER[:0], distillation(kd_ratio=0.5, divergence=divergence))
    sums.total.backward()
    assert sums.total == 0 and sums.count == 0 and student.grad is not None and not student.grad.any()


def test_both_terms_score_the_position_before_each_label() -> None:
    labels = torch.tensor([[IGNORED, 5, IGNORED, 7]])
    logits = torch.arange(4.0).view(1, 4, 1).expand(1, 4, 11)
    assert scored(logits, labels, 9)[:, 0].tolist() == [0.0, 2.0]
    assert scored(logits, labels, 9).shape == (2, 9)
    assert next_labels(labels).tolist() == [5, 7]


def test_cautions_know_which_divergence_reads_which_parameter() -> None:
    for name, users in PARAMETER_OF.items():
        readers = [
            d for d in DIVERGENCES if between(STUDENT, TEACHER, d, **{name: 0.3}) != between(STUDENT, TEACHER, d, **{name: 0.7})
        ]
        assert tuple(readers) == users


@pytest.mark.parametrize(
    ("sections", "caution"),
    [
        ({"distill": {"skew": 0.2}}, "distill.skew is ignored: divergence forward_kl does not read it"),
        (
            {"search": {"jsd_beta": {"uniform": [0.1, 0.9]}}},
            "distill.jsd_beta is ignored: divergence forward_kl does not read it",
        ),
        ({"distill": {"divergence": "skew_kl", "skew": 0.2}}, None),
        ({"distill": {"skew": 0.2}, "search": {"divergence": {"choice": ["skew_kl", "jsd"]}}}, None),
    ],
)
def test_a_parameter_that_no_divergence_of_the_sweep_reads_is_cautioned(sections: dict[str, Any], caution: str | None) -> None:
    base = {"name": "demo", "teacher": {"model": "a"}, "student": {"model": "b"}, "data": {"source": "c"}}
    found = [line for line in make_plan(validate({**base, **sections})).warnings if "does not read it" in line]
    assert found == ([caution] if caution else [])


class LiveTensors(TorchDispatchMode):
    """The most bytes of large storages that were alive after any operation, also within autograd's backward pass."""

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest, self.peak, self.alive = smallest, 0, dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self.smallest:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def live_tensors(teacher: bool, distill: DistillConfig, label_smoothing: float) -> float:
    """Peak of a training step's loss and backward pass, from head to head, in [N, V] fp32 tensors."""
    length, width, vocabulary = 401, 4, 256
    head = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    hidden = torch.randn(1, length, width, requires_grad=True)
    labels = torch.zeros(1, length, dtype=torch.long)
    size = (length - 1) * vocabulary * 4
    with LiveTensors(size // 8) as live:
        logits = head(hidden)
        student = scored(logits, labels, vocabulary)
        with torch.no_grad():
            targets = scored(head(hidden), labels, vocabulary) if teacher else None
        neo_loss(student, next_labels(labels), targets, distill, label_smoothing).total.backward()
    return live.peak / size


@pytest.mark.parametrize("divergence", ["none", *DIVERGENCES])
def test_the_memory_estimate_counts_the_tensors_that_are_alive(divergence: str) -> None:
    chosen, teacher = (divergence, True) if divergence in DIVERGENCES else ("forward_kl", False)
    counts = [
        live_tensors(teacher, distillation(kd_ratio=kd_ratio, temperature=temperature, divergence=chosen), smoothing)
        for kd_ratio in (0.5, 1.0)
        for temperature in (1.0, 2.0)
        for smoothing in (0.0, 0.1)
    ]
    assert round(max(counts)) == LOSS_TENSORS[divergence]


def test_the_memory_estimate_knows_every_divergence() -> None:
    assert set(LOSS_TENSORS) == {"none", *DIVERGENCES}

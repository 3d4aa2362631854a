"""Does a loss taken in chunks, or from a projection of the teacher, give the dense loss and its gradient?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neo_ray.chunked import chunked_loss, projected_loss, projection
from neo_ray.losses import LossSums, neo_loss
from neo_ray.models import Head
from neo_ray.settings import DistillConfig

N, V, H, TEACHER_H = 23, 61, 8, 12
PADDED = V + 3
"""Rows of the head beyond the real vocabulary."""
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl", "total_variation")
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.25},
    "bias and scale": {"bias": True, "logit_scale": 3.0},
    "soft cap": {"soft_cap": 2.0},
}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def a_head(trained: bool = False, bias: bool = False, **settings: Any) -> Head:
    weight_VH = normal(PADDED, H, seed=1).requires_grad_(trained)
    return Head(weight_VH, normal(PADDED, seed=2).requires_grad_(trained) if bias else None, **settings)


STATES, TEACHER, LABELS = normal(N, H, seed=3), 2 * normal(N, V, seed=4), torch.arange(N) * 7 % V


def a_loss(loss: Any, head: Head) -> tuple[LossSums, list[torch.Tensor]]:
    """The sums, and the gradients of a third of the mean on the states and on the head's trained tensors."""
    states_NH = STATES.clone().requires_grad_()
    sums = loss(states_NH, head)
    inputs = [states_NH, *(t for t in (head.weight_VH, head.bias_V) if t is not None and t.requires_grad)]
    return sums, list(torch.autograd.grad(sums.total / (3 * sums.count), inputs))


def dense(distill: DistillConfig, teacher_NV: torch.Tensor | None = TEACHER, smoothing: float = 0.0) -> Any:
    return lambda states_NH, head: neo_loss(head.logits(states_NH, V), LABELS, teacher_NV, distill, smoothing)


def compare(found: tuple[LossSums, list[torch.Tensor]], expected: tuple[LossSums, list[torch.Tensor]]) -> None:
    for name in ("total", "ce", "kd"):
        torch.testing.assert_close(getattr(found[0], name).detach(), getattr(expected[0], name).detach(), rtol=2e-5, atol=2e-5)
    assert found[0].count == expected[0].count and len(found[1]) == len(expected[1])
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert theirs.abs().max() > 1e-4, "a gradient of nothing proves nothing"


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_chunks_give_the_dense_loss(divergence: Any, rows: int) -> None:
    distill = DistillConfig(divergence=divergence, temperature=2.0, kd_ratio=0.3)
    ours = a_loss(lambda s, h: chunked_loss(s, h, LABELS, lambda where: TEACHER[where], distill, V, rows=rows), a_head())
    compare(ours, a_loss(dense(distill), a_head()))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_chunks_know_every_head_and_train_it_where_it_is_trained(kind: str, trained: bool) -> None:
    distill = DistillConfig(kd_ratio=0.5)
    found = a_loss(
        lambda s, h: chunked_loss(s, h, LABELS, lambda where: TEACHER[where], distill, V, 0.1, rows=7, factor=8.0),
        a_head(trained, **HEADS[kind]),
    )
    compare(found, a_loss(dense(distill, smoothing=0.1), a_head(trained, **HEADS[kind])))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kd_ratio", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", [kind for kind in HEADS if kind != "soft cap"])
def test_a_projection_gives_the_dense_forward_kl(kind: str, smoothing: float, kd_ratio: float, temperature: float) -> None:
    distill, head = DistillConfig(kd_ratio=kd_ratio, temperature=temperature), a_head(**HEADS[kind])
    known = projection(TEACHER, head, V, temperature)
    found = a_loss(lambda s, h: projected_loss(s, h, LABELS, known, distill, V, smoothing, rows=7, factor=8.0), head)
    compare(found, a_loss(dense(distill, smoothing=smoothing), head))


@pytest.mark.parametrize("loss", [chunked_loss, projected_loss])
def test_without_a_teacher_it_is_cross_entropy(loss: Any) -> None:
    head, distill = a_head(), DistillConfig(kd_ratio=0.5)
    found = a_loss(lambda s, h: loss(s, h, LABELS, None, distill, V, rows=7), head)
    compare(found, a_loss(dense(distill, None), head))
    assert found[0].kd == 0


def test_the_distillation_loss_of_a_student_that_is_the_teacher_is_zero() -> None:
    head, distill = a_head(), DistillConfig(kd_ratio=1.0, temperature=2.0)
    known = projection(head.logits(STATES, V), head, V, 2.0)
    sums, (gradient_NH,) = a_loss(lambda s, h: projected_loss(s, h, LABELS, known, distill, V), head)
    assert sums.kd.abs() < 1e-4 and gradient_NH.abs().max() < 1e-6


def test_half_precision_keeps_the_gradient_where_the_student_is_sure() -> None:
    """Softmax minus label is taken before it is rounded: else a probability of 0.999 leaves nothing of its gradient."""
    head = Head(torch.eye(V, H, dtype=torch.bfloat16) * 8)
    states_NH, labels_N = torch.eye(H, dtype=torch.bfloat16)[:4] * 1.5, torch.arange(4)
    exact = states_NH.double().requires_grad_()
    neo_loss(torch.nn.functional.linear(exact, head.weight_VH.double()), labels_N, None, DistillConfig()).total.backward()
    ours = states_NH.clone().requires_grad_()
    projected_loss(ours, head, labels_N, None, DistillConfig(), V).total.backward()
    assert exact.grad is not None and ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=2e-2, atol=1e-6)


def test_half_precision_has_no_bias_where_student_and_teacher_are_sure() -> None:
    """A rounded probability less an exact share would leave a push towards the label, however near the student is."""
    torch.manual_seed(0)
    head = Head((torch.randn(V, H) * 2).bfloat16())
    labels_N = torch.randint(V, (200,))
    teacher_NH = head.weight_VH[labels_N].float() / 2
    teacher_NV = teacher_NH @ head.weight_VH.float().T
    states_NH = (teacher_NH + 0.02 * torch.randn(200, H)).bfloat16()
    known = projection(teacher_NV, Head(head.weight_VH.float()), V, 1.0)
    distill = DistillConfig(kd_ratio=0.9)
    exact = states_NH.double().requires_grad_()
    neo_loss(exact @ head.weight_VH.double().T, labels_N, teacher_NV.double(), distill).total.backward()
    ours = states_NH.clone().requires_grad_()
    projected_loss(ours, head, labels_N, known, distill, V).total.backward()
    assert exact.grad is not None and ours.grad is not None
    labels_NH = torch.nn.functional.normalize(head.weight_VH[labels_N].double(), dim=-1)
    push = ((ours.grad.double() - exact.grad) * labels_NH).sum(-1).mean()
    assert push.abs() < 0.1 * exact.grad.norm(dim=-1).mean()
    assert (ours.grad.double() - exact.grad).norm() / exact.grad.norm() < 0.2


def test_a_soft_capped_head_has_no_projection() -> None:
    with pytest.raises(ValueError, match="soft-capped"):
        projection(TEACHER, a_head(soft_cap=2.0), V, 1.0)


def test_evaluation_takes_no_gradient() -> None:
    head, distill = a_head(), DistillConfig()
    with torch.no_grad():
        sums = chunked_loss(STATES, head, LABELS, lambda where: TEACHER[where], distill, V, rows=7)
    compare((sums, []), (neo_loss(head.logits(STATES, V), LABELS, TEACHER, distill), []))


@pytest.mark.parametrize("kind", ["projected", "chunked", "chunked, trained head"])
def test_tiny_gradients_survive_fp16_at_the_scale_at_which_they_are_used(kind: str) -> None:
    """A student sure of its label: probabilities of 4e-8 are less than fp16 has, and 4e-8 × 2^14 is not."""
    factor, labels_N, distill = 2.0**14, torch.arange(4), DistillConfig(kd_ratio=0.5)
    dtype = torch.float32 if "trained" in kind else torch.float16
    weight_VH = (torch.eye(V, H) * 8).to(dtype).requires_grad_("trained" in kind)
    states_NH = (torch.eye(H)[:4] * 2.125).half().requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (states_NH, weight_VH)]
    logits_NV = torch.nn.functional.linear(*exact)
    neo_loss(logits_NV, labels_N, None if kind == "projected" else logits_NV.detach(), distill).total.backward()
    with torch.autocast("cpu", dtype=torch.float16):
        if kind == "projected":
            sums = projected_loss(states_NH, Head(weight_VH), labels_N, None, distill, V, rows=3, factor=factor)
        else:
            teacher_NV = logits_NV.detach().float()
            head = Head(weight_VH)
            sums = chunked_loss(states_NH, head, labels_N, lambda where: teacher_NV[where], distill, V, rows=3, factor=factor)
    (sums.total * factor).backward()
    for ours, theirs in zip((states_NH, weight_VH), exact, strict=True):
        if ours.requires_grad:
            assert ours.grad is not None and theirs.grad is not None
            others = ~torch.eye(*ours.shape, dtype=torch.bool)  # than the label's, which is 1 less nearly 1 in fp32
            torch.testing.assert_close(ours.grad[others].double() / factor, theirs.grad[others], rtol=1e-2, atol=1e-10)
            assert theirs.grad[others].abs().max() > 1e-8

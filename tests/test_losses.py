"""The LLM-Neo loss against an independent dense float64 formula."""

from __future__ import annotations

import pytest
import torch

from neo_ray.losses import IGNORED, divergence_sum, neo_loss, next_labels, scored
from neo_ray.settings import DistillConfig

torch.manual_seed(0)
STUDENT, TEACHER = torch.randn(7, 11) * 2, torch.randn(7, 11) * 2
LABELS = torch.randint(0, 11, (7,))


def reference(student: torch.Tensor, kd_ratio: float, temperature: float) -> torch.Tensor:
    """(1 − λ)·CE + λ·T²·KL(teacher ‖ student), written out with probabilities."""
    q = torch.softmax(student, -1)
    p_soft, q_soft = torch.softmax(TEACHER.double() / temperature, -1), torch.softmax(student / temperature, -1)
    ce = -q[torch.arange(7), LABELS].log().sum()
    return (1 - kd_ratio) * ce + kd_ratio * temperature**2 * (p_soft * (p_soft / q_soft).log()).sum()


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradient_equal_the_dense_reference(kd_ratio: float, temperature: float) -> None:
    ours, theirs = STUDENT.clone().requires_grad_(), STUDENT.double().requires_grad_()
    sums = neo_loss(ours, LABELS, TEACHER, DistillConfig(kd_ratio=kd_ratio, temperature=temperature))
    expected = reference(theirs, kd_ratio, temperature)
    sums.total.backward()
    expected.backward()
    assert sums.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert ours.grad is not None and theirs.grad is not None
    assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_divergence_of_equal_distributions_is_zero(divergence: str) -> None:
    distill = DistillConfig(divergence=divergence, temperature=2.0)  # type: ignore[arg-type]
    assert divergence_sum(TEACHER, TEACHER, distill).item() == pytest.approx(0.0, abs=1e-5)
    assert divergence_sum(STUDENT, TEACHER, distill).item() > 0.1


def test_gradient_is_finite_where_the_teacher_is_certain() -> None:
    student = STUDENT.clone().requires_grad_()
    certain = torch.full((7, 11), -1e4)
    certain[:, 3] = 1e4
    neo_loss(student, LABELS, certain, DistillConfig(kd_ratio=1.0)).total.backward()
    assert student.grad is not None and torch.isfinite(student.grad).all()


def test_both_terms_score_the_position_before_each_label() -> None:
    labels = torch.tensor([[IGNORED, 5, IGNORED, 7]])
    logits = torch.arange(4.0).view(1, 4, 1).expand(1, 4, 11)
    assert scored(logits, labels, 9)[:, 0].tolist() == [0.0, 2.0]
    assert scored(logits, labels, 9).shape == (2, 9)
    assert next_labels(labels).tolist() == [5, 7]

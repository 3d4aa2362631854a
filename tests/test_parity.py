"""Do other libraries and the paper's trainer compute the same loss? Values and gradients, where they are right.

References: TRL's GKD trainer, Liger's chunked and Triton losses, and the trainer of LLM-Neo's reference code.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from neo_ray.losses import IGNORED, LossSums, divergence_sum, neo_loss, next_labels, scored
from neo_ray.settings import DistillConfig

B, L, V, WIDTH = 2, 9, 23, 6
SOURCE = torch.Generator().manual_seed(0)
STUDENT, TEACHER = (torch.randn(B, L, V, generator=SOURCE) * 2 for _ in range(2))
LABELS = torch.randint(0, V, (B, L), generator=SOURCE)
LABELS[0, :4] = LABELS[1, 6:] = IGNORED
# beta of the generalised JSD in TRL and Liger: its ends are the plain divergences there
ENDS: dict[float, dict[str, Any]] = {0.0: {"divergence": "forward_kl"}, 1.0: {"divergence": "reverse_kl"}}
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def generalised_jsd(beta: float, **values: Any) -> DistillConfig:
    return DistillConfig(**{"kd_ratio": 1.0, **ENDS.get(beta, {"divergence": "jsd", "jsd_beta": beta}), **values})


def our_loss(student_BLV: torch.Tensor, distill: DistillConfig) -> LossSums:
    student, teacher = scored(student_BLV, LABELS, V), scored(TEACHER, LABELS, V)
    return neo_loss(student, next_labels(LABELS), teacher, distill)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, ours_from: torch.Tensor, theirs_from: torch.Tensor) -> None:
    """The same value, and the same gradient with respect to the leaves that the two were computed from."""
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = torch.autograd.grad(ours, ours_from)[0], torch.autograd.grad(theirs, theirs_from)[0]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_generalised_jsd_is_that_of_trl_times_the_square_of_the_temperature(beta: float, temperature: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    ours, theirs = STUDENT.clone().requires_grad_(), STUDENT.clone().requires_grad_()
    sums = our_loss(ours, generalised_jsd(beta, temperature=temperature))
    shifted = theirs[:, :-1], TEACHER[:, :-1], LABELS[:, 1:]
    loss = GKDTrainer.generalized_jsd_loss(*shifted, beta=beta, temperature=temperature, reduction="sum")
    assert_same(sums.total, loss * temperature**2, ours, theirs)


@pytest.mark.parametrize("kd_ratio", [0.5, 1.0])
@pytest.mark.parametrize("beta", BETAS)
def test_the_mixed_loss_is_that_of_ligers_chunked_jsd(beta: float, kd_ratio: float) -> None:
    """At T = 1: Liger scales neither value nor gradient for the temperature."""
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel brings Triton, most of a gigabyte")
    hidden = torch.randn(B * L, WIDTH, generator=SOURCE), torch.randn(B * L, WIDTH, generator=SOURCE)
    heads = torch.randn(V, WIDTH, generator=SOURCE), torch.randn(V, WIDTH, generator=SOURCE)
    ours, theirs = hidden[0].clone().requires_grad_(), hidden[0].clone().requires_grad_()
    labels = torch.cat([LABELS[:, 1:], torch.full((B, 1), IGNORED)], dim=1).flatten()
    kept = labels != IGNORED
    distill = generalised_jsd(beta, kd_ratio=kd_ratio)
    sums = neo_loss((ours @ heads[0].T)[kept], labels[kept], (hidden[1] @ heads[1].T)[kept], distill)
    jsd = chunked_loss.LigerFusedLinearJSDLoss(1 - kd_ratio, kd_ratio, beta, IGNORED, compiled=False, chunk_size=5)
    loss = jsd(theirs, heads[0].clone().requires_grad_(), hidden[1], heads[1], labels)
    assert_same(sums.total / sums.count, loss, ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("beta", BETAS)
def test_generalised_jsd_is_that_of_ligers_kernel(beta: float) -> None:
    kernels = pytest.importorskip("liger_kernel.transformers.jsd", reason="liger-kernel is in the extra `parity`")
    ours, theirs = (STUDENT[0].cuda().requires_grad_() for _ in range(2))
    total = divergence_sum(ours, TEACHER[0].cuda(), generalised_jsd(beta))
    loss = kernels.LigerJSD(beta)(theirs.log_softmax(-1), TEACHER[0].cuda().log_softmax(-1))
    assert_same(total / L, loss, ours, theirs)


@pytest.mark.gpu
def test_total_variation_is_that_of_ligers_kernel() -> None:
    kernels = pytest.importorskip("liger_kernel.transformers.tvd", reason="liger-kernel is in the extra `parity`")
    ours, theirs = (STUDENT[0].cuda().requires_grad_() for _ in range(2))
    total = divergence_sum(ours, TEACHER[0].cuda(), DistillConfig(kd_ratio=1.0, divergence="total_variation"))
    loss = kernels.LigerTVDLoss(reduction="sum")(theirs.softmax(-1), TEACHER[0].cuda().softmax(-1))
    assert_same(total, loss, ours, theirs)


def reference_trainer(student_BLV: torch.Tensor, kd_ratio: float, labels_of_kd: torch.Tensor) -> torch.Tensor:
    """The loss of LLM-Neo's reference trainer. It masks its KD term with unshifted labels, one position late for the logits."""
    ce = F.cross_entropy(student_BLV[:, :-1].reshape(-1, V), LABELS[:, 1:].flatten(), ignore_index=IGNORED)
    student, teacher = (x[:, : labels_of_kd.shape[1]][labels_of_kd != IGNORED] for x in (student_BLV, TEACHER))
    kd = F.kl_div(F.log_softmax(student, dim=-1), F.softmax(teacher, dim=-1), reduction="batchmean")
    return (1 - kd_ratio) * ce + kd_ratio * kd


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
def test_the_loss_is_that_of_the_reference_trainer_with_its_mask_corrected(kd_ratio: float) -> None:
    ours, theirs = STUDENT.clone().requires_grad_(), STUDENT.clone().requires_grad_()
    sums = our_loss(ours, DistillConfig(kd_ratio=kd_ratio))
    assert_same(sums.total / sums.count, reference_trainer(theirs, kd_ratio, LABELS[:, 1:]), ours, theirs)


def test_the_reference_trainers_own_mask_gives_another_loss() -> None:
    mean = our_loss(STUDENT, DistillConfig(kd_ratio=0.5))
    theirs = reference_trainer(STUDENT, 0.5, LABELS).item()
    assert not math.isclose((mean.total / mean.count).item(), theirs, rel_tol=1e-2)

"""How far is the student from the teacher and from the labels? Sums and counts, in fp32, in log space.

Shapes: N scored positions, V real vocabulary (padded rows are sliced off before they come here).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from neo_ray.settings import DistillConfig

IGNORED = -100


@dataclass(frozen=True)
class LossSums:
    """Sums over the scored positions, in nats. Divide once, by the count over all micro-batches and ranks."""

    total: torch.Tensor
    ce: torch.Tensor
    """Detached."""
    kd: torch.Tensor
    """T² · divergence, detached; 0 without a teacher."""
    count: int


def scored(logits_BLV: torch.Tensor, labels_BL: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Logits of the positions whose *next* token has a label, [N, vocabulary]. The one mask of every term."""
    return logits_BLV[:, :-1][labels_BL[:, 1:] != IGNORED][:, :vocabulary]


def next_labels(labels_BL: torch.Tensor) -> torch.Tensor:
    """The labels that `scored` positions predict, [N], in the same order."""
    shifted = labels_BL[:, 1:]
    return shifted[shifted != IGNORED]


def neo_loss(
    student_NV: torch.Tensor, labels_N: torch.Tensor, teacher_NV: torch.Tensor | None, distill: DistillConfig
) -> LossSums:
    """Σ_n (1 − λ)·CE_n + λ·T²·D(p_T ‖ q_S)_n with λ = kd_ratio (LLM-Neo, arXiv 2411.06839; T² as in Hinton et al. 2015).

    Args:
        student_NV: logits with gradient, any float dtype.
        labels_N: token ids below V.
        teacher_NV: logits without gradient; None leaves plain cross-entropy (λ = 0).
    """
    kd_ratio = 0.0 if teacher_NV is None else distill.kd_ratio
    logits_NV = student_NV.float()
    ce = F.cross_entropy(logits_NV, labels_N, reduction="sum")
    kd, total = torch.zeros_like(ce), ce
    if teacher_NV is not None:
        kd = divergence_sum(logits_NV, teacher_NV, distill)
        total = kd if kd_ratio == 1 else ce if kd_ratio == 0 else (1 - kd_ratio) * ce + kd_ratio * kd
    return LossSums(total, ce.detach(), kd.detach(), labels_N.numel())


def divergence_sum(student_NV: torch.Tensor, teacher_NV: torch.Tensor, distill: DistillConfig) -> torch.Tensor:
    """T² · Σ_n D(p_T ‖ q_S)_n with both distributions softened by T; in nats, gradient to the student only."""
    temperature = distill.temperature
    log_q = F.log_softmax(student_NV.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher_NV.detach().float() / temperature, dim=-1)
    return temperature**2 * _DIVERGENCES[distill.divergence](log_p, log_q)


def _forward_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Σ p·(log p − log q): covers what the teacher says."""
    return (log_p.exp() * (log_p - log_q)).sum()


def _reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Σ q·(log q − log p): seeks the teacher's mode (MiniLLM, arXiv 2306.08543)."""
    return (log_q.exp() * (log_q - log_p)).sum()


def _jsd(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Jensen–Shannon: ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q)/2, formed in log space."""
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, device=log_p.device))
    return 0.5 * ((log_p.exp() * (log_p - log_m)).sum() + (log_q.exp() * (log_q - log_m)).sum())


_DIVERGENCES = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}

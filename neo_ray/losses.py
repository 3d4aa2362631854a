"""How far is the student from the teacher and from the labels? Sums and counts, in fp32, in log space.

Shapes: N scored positions, V real vocabulary (padded rows are sliced off before they come here).
p is the teacher's distribution, q the student's, both softened by the temperature T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from neo_ray.settings import DistillConfig, Divergence

IGNORED = -100


@dataclass(frozen=True)
class LossSums:
    """Sums over the scored positions, in nats. Divide once, by the count over all micro-batches and ranks."""

    total: torch.Tensor
    ce: torch.Tensor
    """Detached; never smoothed, so that it compares with the held-out cross-entropy."""
    kd: torch.Tensor
    """The divergence as it enters the loss, scaled for T (see `divergence_sum`), detached; 0 without a teacher."""
    count: int


@dataclass(frozen=True)
class TopK:
    """A teacher of whom k probabilities are known and the rest as one: p over k + 1 buckets, at the loss's temperature.

    A divergence over buckets is at most the one over tokens (data-processing inequality; `adaptive_kl`, which is no f-divergence,
    has no such law). With k = V there is no rest, and it is the same.
    """

    log_p_NK: torch.Tensor
    ids_NK: torch.Tensor
    log_tail_N: torch.Tensor
    """Log of the mass beyond the k tokens."""

    def rows(self, where: slice) -> TopK:
        return TopK(self.log_p_NK[where], self.ids_NK[where], self.log_tail_N[where])

    def buckets(self, log_q_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log p and log q over the buckets, [N, k + 1]. p is made to sum to 1 again, which fp16 may have ended."""
        ids_NK, log_p_NB = self.ids_NK.long(), self.log_p_NK.float()
        log_q_NB = log_q_NV.gather(-1, ids_NK)
        if ids_NK.shape[-1] < log_q_NV.shape[-1]:
            # the tail is summed up, not one less the head: that difference would be lost where the head has nearly all
            tail_N1 = log_q_NV.scatter(-1, ids_NK, -math.inf).logsumexp(dim=-1, keepdim=True)
            log_q_NB = torch.cat([log_q_NB, tail_N1], dim=-1)
            log_p_NB = torch.cat([log_p_NB, self.log_tail_N[:, None]], dim=-1)
        return F.log_softmax(log_p_NB, dim=-1), log_q_NB


def top_k(teacher_NV: torch.Tensor, k: int, temperature: float) -> TopK:
    """What a store keeps of a teacher's logits: fp16, int32 and fp32, 6 k + 4 bytes a position; k is V at most."""
    log_p_NV = _log_softmax(teacher_NV, temperature)
    log_p_NK, ids_NK = log_p_NV.topk(min(k, log_p_NV.shape[-1]), dim=-1)
    log_tail_N = log_p_NV.scatter(-1, ids_NK, -math.inf).logsumexp(dim=-1)
    return TopK(log_p_NK.half(), ids_NK.int(), log_tail_N.clamp_min(torch.finfo(torch.float32).min))


@dataclass(frozen=True)
class Law:
    """The settings that a loss reads.

    What a search changes from trial to trial can be a tensor of one number: one compiled loss then serves all its values.
    """

    divergence: Divergence
    kd_ratio: float | torch.Tensor
    temperature: float | torch.Tensor
    label_smoothing: float | torch.Tensor
    jsd_beta: float | torch.Tensor
    skew: float | torch.Tensor
    head_mass: float | torch.Tensor

    @staticmethod
    def of(distill: DistillConfig, label_smoothing: float = 0.0, tensors_on: torch.device | None = None) -> Law:
        """Numbers that leave a term out stay numbers."""

        def number(value: float, *plain: float) -> float | torch.Tensor:
            return value if tensors_on is None or value in plain else torch.full((), value, device=tensors_on)

        ratio, temperature = number(distill.kd_ratio, 0.0, 1.0), number(distill.temperature, 1.0)
        rest = number(distill.jsd_beta), number(distill.skew, 0.0), number(distill.head_mass)
        return Law(distill.divergence, ratio, temperature, number(label_smoothing, 0.0), *rest)


def scored(logits_BLV: torch.Tensor, labels_BL: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Logits of the positions whose *next* token has a label, [N, vocabulary]. The one mask of every term."""
    return logits_BLV[:, :-1][labels_BL[:, 1:] != IGNORED][:, :vocabulary]


def next_labels(labels_BL: torch.Tensor) -> torch.Tensor:
    """The labels that `scored` positions predict, [N], in the same order."""
    shifted = labels_BL[:, 1:]
    return shifted[shifted != IGNORED]


def neo_loss(
    student_NV: torch.Tensor,
    labels_N: torch.Tensor,
    teacher_NV: torch.Tensor | TopK | None,
    distill: DistillConfig,
    label_smoothing: float = 0.0,
) -> LossSums:
    """Σ_n (1 − λ)·CE_n + λ·T²·D(p, q)_n with λ = kd_ratio (LLM-Neo, arXiv 2411.06839; T² as in Hinton et al. 2015).

    Args:
        student_NV: logits with gradient, any float dtype.
        labels_N: token ids below V.
        teacher_NV: logits without gradient, or the likeliest of them; None leaves plain cross-entropy (λ = 0).
        label_smoothing: ε of CE against (1 − ε)·label + ε/V; the teacher's term has none.
    """
    return LossSums(*loss_terms(student_NV, labels_N, teacher_NV, Law.of(distill, label_smoothing)), labels_N.numel())


def loss_terms(
    student_NV: torch.Tensor, labels_N: torch.Tensor, teacher_NV: torch.Tensor | TopK | None, law: Law
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`neo_loss` as a function that can be compiled: its total, CE and KD."""
    kd_ratio: float | torch.Tensor = 0.0
    if teacher_NV is None:
        log_q_NV = _log_softmax(student_NV, 1.0)
        kd = log_q_NV.new_zeros(())
    else:  # the divergence first: at T = 1 the cross-entropy shares its log-softmax, else it makes its own when that is done
        log_q_NV, kd_ratio = _log_softmax(student_NV, law.temperature), law.kd_ratio
        kd = _divergence_sum(log_q_NV, teacher_NV, law)
        log_q_NV = log_q_NV if is_exactly(law.temperature, 1) else _log_softmax(student_NV, 1.0)
    ce = F.nll_loss(log_q_NV, labels_N, reduction="sum")
    hard = ce
    if not is_exactly(law.label_smoothing, 0):
        hard = (1 - law.label_smoothing) * ce - law.label_smoothing / log_q_NV.shape[-1] * log_q_NV.sum()
    total = kd if is_exactly(kd_ratio, 1) else hard if is_exactly(kd_ratio, 0) else (1 - kd_ratio) * hard + kd_ratio * kd
    return total, ce.detach(), kd.detach()


def divergence_sum(student_NV: torch.Tensor, teacher_NV: torch.Tensor | TopK, distill: DistillConfig) -> torch.Tensor:
    """T² · Σ_n D(p, q)_n, in nats; gradient to the student only. Both arguments are logits of any float dtype, or a `TopK`.

    T² keeps the size of the gradient as T grows, since that of a divergence with a quadratic minimum at p = q falls like 1/T².
    Total variation has a kink there, its gradient falls like 1/T, and so its factor is T.
    """
    return _divergence_sum(_log_softmax(student_NV, distill.temperature), teacher_NV, Law.of(distill))


def _divergence_sum(log_q_NV: torch.Tensor, teacher_NV: torch.Tensor | TopK, law: Law) -> torch.Tensor:
    if isinstance(teacher_NV, TopK):
        log_p_NV, log_q_NV = teacher_NV.buckets(log_q_NV)
    else:
        log_p_NV = _log_softmax(teacher_NV.detach(), law.temperature)
    rows_N = _DIVERGENCES[law.divergence](log_p_NV, log_q_NV, law)
    return law.temperature ** (1 if law.divergence == "total_variation" else 2) * rows_N.sum()


def is_exactly(value: float | torch.Tensor, number: float) -> bool:
    """Known without looking into a tensor, which nothing is known of."""
    return not isinstance(value, torch.Tensor) and value == number


def _log_softmax(logits_NV: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    logits_NV = logits_NV.float()
    return F.log_softmax(logits_NV if is_exactly(temperature, 1) else logits_NV / temperature, dim=-1)


def _kl(log_a_NV: torch.Tensor, log_b_NV: torch.Tensor) -> torch.Tensor:
    """KL(a ‖ b) = Σ a·(log a − log b), [N]."""
    return (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(dim=-1)


def _log_mixture(log_a_NV: torch.Tensor, log_b_NV: torch.Tensor, share: float | torch.Tensor) -> torch.Tensor:
    """log(share·a + (1 − share)·b) with 0 ≤ share < 1, formed in log space."""
    if isinstance(share, torch.Tensor):
        return torch.logaddexp(log_a_NV + torch.logit(share), log_b_NV) + torch.log1p(-share)
    log_odds = math.log(share / (1 - share)) if share else -math.inf
    return torch.logaddexp(log_a_NV + log_odds, log_b_NV) + math.log1p(-share)


def _forward_kl(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor, law: Law) -> torch.Tensor:
    """KL(p ‖ q): covers what the teacher says."""
    return _kl(log_p_NV, log_q_NV)


def _reverse_kl(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor, law: Law) -> torch.Tensor:
    """KL(q ‖ p): seeks the teacher's mode (MiniLLM, arXiv 2306.08543)."""
    return _kl(log_q_NV, log_p_NV)


def _jsd(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor, law: Law) -> torch.Tensor:
    """β·KL(p ‖ m) + (1 − β)·KL(q ‖ m) with m = β·p + (1 − β)·q: eq. 1 of GKD (arXiv 2306.13649), and TRL's convention.

    It vanishes at both ends: divided by β it tends to KL(p ‖ q) as β → 0, divided by 1 − β to KL(q ‖ p) as β → 1.
    """
    beta, log_m_NV = law.jsd_beta, _log_mixture(log_p_NV, log_q_NV, law.jsd_beta)
    return beta * _kl(log_p_NV, log_m_NV) + (1 - beta) * _kl(log_q_NV, log_m_NV)


def _skew_kl(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor, law: Law) -> torch.Tensor:
    """KL(p ‖ α·p + (1 − α)·q) with α = skew (DistiLLM, arXiv 2402.03898)."""
    return _kl(log_p_NV, _log_mixture(log_p_NV, log_q_NV, law.skew))


def _skew_reverse_kl(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor, law: Law) -> torch.Tensor:
    """KL(q ‖ α·q + (1 − α)·p) with α = skew (DistiLLM, arXiv 2402.03898)."""
    return _kl(log_q_NV, _log_mixture(log_q_NV, log_p_NV, law.skew))


def _adaptive_kl(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor, law: Law) -> torch.Tensor:
    """w·KL(p ‖ q) + (1 − w)·KL(q ‖ p), w = the head's share of Σ|p − q| at each position (AKL, arXiv 2404.02657)."""
    weight_N = _head_share(log_p_NV, log_q_NV.detach(), law.head_mass)
    return weight_N * _kl(log_p_NV, log_q_NV) + (1 - weight_N) * _kl(log_q_NV, log_p_NV)


def _head_share(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor, head_mass: float | torch.Tensor) -> torch.Tensor:
    """Share of Σ|p − q| in the teacher's head: the fewest tokens that hold at least `head_mass` of p. Without gradient.

    The authors' code differs in one token: it leaves the token that crosses `head_mass` to the tail unless it is the first.
    """
    p_NV, order_NV = log_p_NV.exp().sort(dim=-1, descending=True, stable=True)
    gap_NV = log_q_NV.gather(-1, order_NV).exp_().sub_(p_NV).abs_()
    del order_NV
    total_N = gap_NV.sum(dim=-1)
    tail_NV = p_NV.cumsum(dim=-1).sub_(p_NV) >= head_mass
    return gap_NV.masked_fill_(tail_NV, 0).sum(dim=-1) / total_N.clamp_min(torch.finfo(torch.float32).tiny)


def _total_variation(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor, law: Law) -> torch.Tensor:
    """½ Σ|p − q|: the most mass by which any event's probability differs, at most 1."""
    return (log_p_NV.exp() - log_q_NV.exp()).abs().sum(dim=-1) / 2


_DIVERGENCES = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "adaptive_kl": _adaptive_kl,
    "total_variation": _total_variation,
}

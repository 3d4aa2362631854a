"""How is the loss taken without ever holding logits of all positions? Chunk by chunk, with the gradient made in the forward pass.

Shapes: N scored positions, C positions of a chunk, V real vocabulary, H the student's hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neo_ray.devices import Compilable, has_compiler, rows_vary
from neo_ray.losses import Law, LossSums, TopK, is_exactly, loss_terms
from neo_ray.memory import chunk_rows
from neo_ray.models import AnyHead, Head
from neo_ray.settings import DistillConfig

TeacherLogits = Callable[[slice], Tensor | TopK]
"""Scored positions of a batch → the teacher's logits_CV there, of any float dtype, without gradient, or the likeliest of them."""


def chunked_loss(
    states_NH: Tensor,
    head: AnyHead,
    labels_N: Tensor,
    teacher: TeacherLogits | None,
    distill: DistillConfig,
    vocabulary: int,
    label_smoothing: float = 0.0,
    rows: int | None = None,
    factor: float = 1.0,
    compiles: bool = True,
) -> LossSums:
    """`neo_loss` of the logits that `head` makes of `states_NH`: the same sums and gradients, at the memory of one chunk.

    Args:
        states_NH: the student's last hidden states, with gradient.
        head: gradients flow into its tensors where they are trained; a frozen head costs no product for them.
        teacher: None leaves plain cross-entropy.
        rows: positions of a chunk; by default as many as `memory.CHUNK_BYTES` hold.
        factor: what the sum is multiplied with before backward. Gradients are made at this scale: those of the plain sum may be
            too small for fp16. Another factor than the one that comes costs precision and no correctness.
        compiles: what becomes of a chunk's logits is compiled, on devices that have a compiler.
    """
    device = states_NH.device
    rows = rows or chunk_rows(vocabulary, device.type)
    law = Law.of(distill, label_smoothing, device if compiles and has_compiler(device) else None)

    def chunk(states_CH: Tensor, where: slice, wanted: bool) -> tuple[Tensor, ...]:
        """Total, CE and KD as one tensor; where `wanted`, the gradients on the states and on what is trained of the head."""

        def take(terms: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(wanted):
                inputs_CH = states_CH.detach().requires_grad_(wanted)
                known = head.logits(inputs_CH, vocabulary), labels_N[where], teacher(where) if teacher else None
                total, ce, kd = terms(*rows_vary(device, *known), law)
                del known  # what the backward pass needs of it, it keeps
            sums = torch.stack([total.detach(), ce, kd])
            at_scale = torch.full_like(total, factor)
            return (sums, *torch.autograd.grad(total, (inputs_CH, *head.trained), at_scale)) if wanted else (sums,)

        return TERMS.attempt(device, compiles, take)

    total, ce, kd = _InChunks.apply(states_NH, chunk, rows, factor, *head.trained)
    return LossSums(total, ce, kd, labels_N.numel())


class _InChunks(torch.autograd.Function):
    """Sums over chunks. The graph of a chunk lives until its gradient is taken, at once; only gradients of inputs are kept."""

    @staticmethod
    def forward(
        ctx: Any, states_NH: Tensor, chunk: Callable[..., tuple[Tensor, ...]], rows: int, factor: float, *trained: Tensor
    ) -> Any:
        wanted = states_NH.requires_grad or bool(trained)
        sums = torch.zeros(3, dtype=torch.float32, device=states_NH.device)
        gradient_NH = torch.empty_like(states_NH)
        gradients = [torch.zeros_like(tensor) for tensor in trained]
        for start in range(0, len(states_NH), rows):
            where = slice(start, start + rows)
            found, *of_chunk = chunk(states_NH[where], where, wanted)
            sums += found
            if wanted:
                gradient_NH[where], *others = of_chunk
                for gradient, other in zip(gradients, others, strict=True):
                    gradient += other
        ctx.save_for_backward(gradient_NH, *gradients)
        ctx.factor = factor
        total, ce, kd = sums.unbind()
        ctx.mark_non_differentiable(ce, kd)
        return total, ce, kd

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> Any:
        gradient_NH, *gradients = ctx.saved_tensors
        left = grad_total / ctx.factor
        return (gradient_NH * left, None, None, None, *(gradient * left for gradient in gradients))


TERMS = Compilable(loss_terms)


def projection(teacher_CV: Tensor, head: Head, vocabulary: int, temperature: float) -> tuple[Tensor, Tensor]:
    """All that forward KL needs of the teacher through a frozen linear head: (c, constant) of each position.

    With z = W h + b and p = softmax(z_T / T), KL(p ‖ q) = LSE(z / T) − h·c / T − constant, where c = Wᵀ p is as wide as the
    student and constant = H(p) + p·b / T is a scalar (fp32, [C, H] and [C]).

    Args:
        teacher_CV: the teacher's logits over the real vocabulary.
    """
    scale, weight_VH, bias_V = linear(head, vocabulary)
    log_p_CV = torch.log_softmax(teacher_CV.float() / temperature, dim=-1)
    p_CV = log_p_CV.exp()
    constant_C = -(p_CV * log_p_CV).sum(dim=-1)
    if bias_V is not None:
        constant_C = constant_C + scale * (p_CV @ bias_V.float()) / temperature
    return scale * (p_CV.to(weight_VH.dtype) @ weight_VH).float(), constant_C


def projected_loss(
    states_NH: Tensor,
    head: Head,
    labels_N: Tensor,
    projected: tuple[Tensor, Tensor] | None,
    distill: DistillConfig,
    vocabulary: int,
    label_smoothing: float = 0.0,
    rows: int | None = None,
    factor: float = 1.0,
    compiles: bool = True,
) -> LossSums:
    """`neo_loss` with forward KL of a teacher of whom only `projection` is known, at the price of plain cross-entropy.

    The head is frozen and linear: its gradient is not taken.

    Args:
        projected: c_NH and constant_N at the temperature of `distill`; None leaves plain cross-entropy.
        factor, compiles: as for `chunked_loss`.
    """
    rows = rows or chunk_rows(vocabulary, states_NH.device.type)
    law = Law.of(distill, label_smoothing, states_NH.device if compiles and has_compiler(states_NH.device) else None)
    total, ce, kd = _Projected.apply(states_NH, head, labels_N, projected, law, vocabulary, rows, factor, compiles)
    return LossSums(total, ce, kd, labels_N.numel())


class _Projected(torch.autograd.Function):
    """Σ (1 − λ)·CE + λ·T²·KL; the gradient of LSE(z) is softmax(z), everything else is linear in h."""

    @staticmethod
    def forward(
        ctx: Any,
        states_NH: Tensor,
        head: Head,
        labels_N: Tensor,
        projected: tuple[Tensor, Tensor] | None,
        law: Law,
        vocabulary: int,
        rows: int,
        factor: float,
        compiles: bool,
    ) -> Any:
        device = states_NH.device
        scale, weight_VH, bias_V = linear(head, vocabulary)
        gradient_NH = torch.empty_like(states_NH)
        sums = torch.zeros(3, dtype=torch.float32, device=device)
        at_scale = torch.full((), factor, device=device) if compiles and has_compiler(device) else factor
        for start in range(0, len(states_NH), rows):
            where = slice(start, start + rows)
            of_rows = rows_vary(device, states_NH[where], labels_N[where], *(column[where] for column in projected or ()))
            given = weight_VH, bias_V, scale, law, at_scale, *of_rows
            found, gradient_NH[where] = PROJECTED.take(device, compiles, *given)
            sums += found
        ctx.save_for_backward(gradient_NH)
        ctx.factor = factor
        total, ce, kd = sums.unbind()
        ctx.mark_non_differentiable(ce, kd)
        return total, ce, kd

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> Any:
        (gradient_NH,) = ctx.saved_tensors
        return (gradient_NH * (grad_total / ctx.factor), *([None] * 8))


def _projected_chunk(
    weight_VH: Tensor,
    bias_V: Tensor | None,
    scale: float,
    law: Law,
    factor: float | Tensor,
    states_CH: Tensor,
    labels_C: Tensor,
    c_CH: Tensor | None = None,
    constant_C: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Total, CE and KD as one tensor, and `factor` times the gradient on the states."""
    kd_ratio, temperature, smoothing = law.kd_ratio if c_CH is not None else 0.0, law.temperature, law.label_smoothing
    is_softened, is_smoothed = not is_exactly(temperature, 1), not is_exactly(smoothing, 0)
    labels_C1 = labels_C[:, None]
    logits_CV = Head(weight_VH, bias_V, logit_scale=scale).logits(states_CH, len(weight_VH))
    lse_C, label_C = torch.logsumexp(logits_CV, dim=-1), logits_CV.gather(-1, labels_C1).squeeze(-1)
    ce_C = lse_C - label_C
    hard_C, kd_C = ce_C, torch.zeros_like(ce_C)
    if is_smoothed:
        hard_C = lse_C - (1 - smoothing) * label_C - smoothing * logits_CV.mean(dim=-1)
    soft_CV: Tensor | float = 0.0
    if c_CH is not None and constant_C is not None:
        c_CH = c_CH.float()
        soft_lse_C = torch.logsumexp(logits_CV / temperature, dim=-1) if is_softened else lse_C
        kd_C = temperature**2 * (soft_lse_C - constant_C) - temperature * (states_CH.float() * c_CH).sum(dim=-1)
        if is_softened and not is_exactly(kd_ratio, 0):
            soft_CV = torch.exp_(logits_CV / temperature - soft_lse_C[:, None]).mul_(factor * kd_ratio * temperature)
    # The label's share of labels and teacher is taken off before the product is rounded, and what the teacher has too
    # little of it given back: where student and teacher are sure, probability and share nearly cancel.
    soft = factor * kd_ratio * temperature if c_CH is not None else 0.0
    gradient_CV = torch.exp_(logits_CV.sub_(lse_C[:, None]))
    gradient_CV.mul_(factor * (1 - kd_ratio) if is_softened else factor).add_(soft_CV)
    taken = factor * (1 - kd_ratio) * (1 - smoothing) + soft
    gradient_CV.scatter_add_(-1, labels_C1, (torch.zeros_like(label_C) - taken)[:, None])
    if is_smoothed:
        gradient_CV.sub_(factor * (1 - kd_ratio) * smoothing / len(weight_VH))
    gradient_CH = scale * (gradient_CV.to(weight_VH.dtype) @ weight_VH).float()
    if c_CH is not None:
        gradient_CH -= soft * (c_CH - scale * weight_VH[labels_C].float())
    total_C = hard_C if is_exactly(kd_ratio, 0) else (1 - kd_ratio) * hard_C + kd_ratio * kd_C
    return torch.stack([total_C.sum(), ce_C.sum(), kd_C.sum()]), gradient_CH.to(states_CH.dtype)


PROJECTED = Compilable(_projected_chunk)


def linear(head: Head, vocabulary: int) -> tuple[float, Tensor, Tensor | None]:
    """(scale, weight_VH, bias_V) of a head without soft-cap: z = scale·(W h + b)."""
    if head.soft_cap is not None:
        raise ValueError("a soft-capped head is not linear in the hidden state")
    bias_V = None if head.bias_V is None else head.bias_V[:vocabulary]
    return head.logit_scale, head.weight_VH[:vocabulary], bias_V

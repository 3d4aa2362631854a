"""What does the loss alone cost? From the decoders' last hidden states, through the heads, to the gradient on the student's.

The heads take part because a loss that never holds [N, V] logits can only be compared where the logits are made.
Shapes: N scored positions, V vocabulary, H hidden width (the teacher's may be another).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from neo_ray import devices
from neo_ray.bench_others import liger_loss, not_installed, trl_loss
from neo_ray.bench_pairs import DENSE_TENSORS, check_memory
from neo_ray.bench_turns import BASELINE, Announce, Measured, take_turns
from neo_ray.chunked import chunked_loss, projected_loss, projection
from neo_ray.losses import TopK, neo_loss, top_k
from neo_ray.memory import FP32
from neo_ray.models import Head
from neo_ray.settings import DistillConfig


@dataclass(frozen=True)
class Inputs:
    student_NH: Tensor
    """With gradient; all else is frozen."""
    student_head_VH: Tensor
    teacher_NH: Tensor
    teacher_head_VH: Tensor
    labels_N: Tensor
    projected: tuple[Tensor, Tensor]
    """The teacher's projection through the student's head, as a store of targets keeps it: fp16, and fp32 constants."""
    likeliest: TopK
    """The teacher's 64 likeliest tokens, as a store keeps them."""


@dataclass(frozen=True)
class LossArm:
    about: str
    loss: Callable[[Inputs], Tensor]
    """The mean loss in nats, to call backward on."""


def measure_losses(
    sizes: Sequence[tuple[int, int]], width: int, teacher_width: int, rounds: int, announce: Announce
) -> list[Measured]:
    """Forward and backward of every loss arm on the same random inputs, for each of some (N, V).

    Raises:
        ConfigError: the largest of them does not fit into memory.
    """
    device = devices.local_device()
    dtype = devices.resolve_dtype("auto", device)
    needed = max(loss_bytes(*size, width, teacher_width, dtype.itemsize) for size in sizes)
    check_memory("--preset", needed, device)
    return [_measure(*size, width, teacher_width, rounds, device, dtype, announce) for size in sizes]


def _measure(
    num_tokens: int,
    vocabulary: int,
    width: int,
    teacher_width: int,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    announce: Announce,
) -> Measured:
    inputs = make_inputs(num_tokens, vocabulary, width, teacher_width, device, dtype)

    def once(arm: LossArm) -> Callable[[int], None]:
        def call(_: int) -> None:
            inputs.student_NH.grad = None
            arm.loss(inputs).backward()

        return call

    widths = {"tokens": num_tokens, "vocabulary": vocabulary, "width": width, "teacher_width": teacher_width}
    missing = not_installed(ARMS)
    setting = {**widths, "dtype": str(dtype).removeprefix("torch.")}
    if missing:
        setting["not_installed"] = " ".join(missing)
    arms = {name: arm for name, arm in ARMS.items() if name not in missing}
    announce(f"{num_tokens} positions, {vocabulary} tokens in the vocabulary")
    samples = take_turns({name: once(arm) for name, arm in arms.items()}, rounds, device, announce)
    return Measured(setting, {name: {"about": arm.about} for name, arm in arms.items()}, samples)


def loss_bytes(num_tokens: int, vocabulary: int, width: int, teacher_width: int, size: int) -> int:
    """What a device holds at the peak of `bench loss`: both heads, the student's in fp32 too, and the dense loss."""
    return vocabulary * (width * (size + FP32) + teacher_width * size) + DENSE_TENSORS * FP32 * num_tokens * vocabulary


def make_inputs(
    num_tokens: int, vocabulary: int, width: int, teacher_width: int, device: torch.device, dtype: torch.dtype
) -> Inputs:
    """Random states and heads. Assumption: logits have a standard deviation of 2, as a trained model's do roughly."""
    torch.manual_seed(0)

    def states_and_head(width: int) -> tuple[Tensor, Tensor]:
        states_NH = torch.randn(num_tokens, width, device=device)
        return states_NH.to(dtype), (torch.randn(vocabulary, width, device=device) * 2 / width**0.5).to(dtype)

    student_NH, student_head_VH = states_and_head(width)
    labels_N = torch.randint(vocabulary, (num_tokens,), device=device)
    teacher_NH, teacher_head_VH = states_and_head(teacher_width)
    teacher, student = Head(teacher_head_VH), Head(student_head_VH.float())
    known = [projection(teacher.logits(rows_CH, vocabulary), student, vocabulary, 1.0) for rows_CH in teacher_NH.split(64)]
    c_NH, constant_N = (torch.cat(parts) for parts in zip(*known, strict=True))
    projected = c_NH.half(), constant_N
    bucketed = [top_k(teacher.logits(rows_CH, vocabulary), 64, 1.0) for rows_CH in teacher_NH.split(64)]
    likeliest = TopK(*(torch.cat([getattr(one, name) for one in bucketed]) for name in TopK.__dataclass_fields__))
    return Inputs(student_NH.requires_grad_(), student_head_VH, teacher_NH, teacher_head_VH, labels_N, projected, likeliest)


def cross_entropy(inputs: Inputs) -> Tensor:
    """What a trial without a teacher computes."""
    sums = neo_loss(F.linear(inputs.student_NH, inputs.student_head_VH), inputs.labels_N, None, DistillConfig())
    return sums.total / sums.count


def dense(inputs: Inputs) -> Tensor:
    """Whole logits of student and teacher, then `neo_loss`, as the project's step has it."""
    student_NV = F.linear(inputs.student_NH, inputs.student_head_VH)
    teacher_NV = F.linear(inputs.teacher_NH, inputs.teacher_head_VH)
    sums = neo_loss(student_NV, inputs.labels_N, teacher_NV, DistillConfig())
    return sums.total / sums.count


def chunked(inputs: Inputs) -> Tensor:
    """The same in chunks: no logits beyond a chunk's are held, of student or teacher."""
    teacher, vocabulary = Head(inputs.teacher_head_VH), len(inputs.teacher_head_VH)
    sums = chunked_loss(
        inputs.student_NH,
        Head(inputs.student_head_VH),
        inputs.labels_N,
        lambda rows: teacher.logits(inputs.teacher_NH[rows], vocabulary),
        DistillConfig(),
        vocabulary,
    )
    return sums.total / sums.count


def bucketed(inputs: Inputs) -> Tensor:
    """From the likeliest tokens alone: no head but the student's takes part. A lower bound of the whole loss."""
    known, vocabulary = inputs.likeliest, len(inputs.student_head_VH)
    sums = chunked_loss(inputs.student_NH, Head(inputs.student_head_VH), inputs.labels_N, known.rows, DistillConfig(), vocabulary)
    return sums.total / sums.count


def projected(inputs: Inputs) -> Tensor:
    """From what `projection` keeps of the teacher: no head but the student's takes part."""
    return _projected(inputs, inputs.projected)


def chunked_cross_entropy(inputs: Inputs) -> Tensor:
    """What a trial without a teacher could compute."""
    return _projected(inputs, None)


def _projected(inputs: Inputs, known: tuple[Tensor, Tensor] | None) -> Tensor:
    head, vocabulary = Head(inputs.student_head_VH), len(inputs.student_head_VH)
    sums = projected_loss(inputs.student_NH, head, inputs.labels_N, known, DistillConfig(), vocabulary)
    return sums.total / sums.count


def of_trl(inputs: Inputs) -> Tensor:
    """As `dense`, with TRL's divergence. Its logits are fp32, as ours are."""
    student_NV = F.linear(inputs.student_NH, inputs.student_head_VH).float()
    teacher_NV = F.linear(inputs.teacher_NH, inputs.teacher_head_VH).float()
    return trl_loss(student_NV[None], teacher_NV[None], inputs.labels_N[None], DistillConfig().kd_ratio)[0]


def of_liger(inputs: Inputs) -> Tensor:
    states = inputs.student_NH, inputs.student_head_VH, inputs.teacher_NH, inputs.teacher_head_VH
    return liger_loss(*states, inputs.labels_N, DistillConfig().kd_ratio)[0]


ARMS = {
    BASELINE: LossArm("head and cross-entropy, no teacher", cross_entropy),
    "neo": LossArm("both heads and the dense Neo loss", dense),
    "lora_chunked": LossArm("head and cross-entropy in chunks, no teacher", chunked_cross_entropy),
    "neo_chunked": LossArm("both heads and the Neo loss in chunks", chunked),
    "neo_projected": LossArm("head and the Neo loss in chunks, from the teacher's projection", projected),
    "neo_topk": LossArm("head and the Neo loss in chunks, from the teacher's top 64 tokens", bucketed),
    "trl": LossArm("both heads, cross-entropy and TRL's GKD loss, dense", of_trl),
    "liger": LossArm("both heads and Liger's chunked JSD loss", of_liger),
}

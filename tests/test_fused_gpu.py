"""Is what the teacher says from a store, chunk by chunk, what the living teacher says densely? Half precision, here and on a GPU.

On a GPU (`pytest -m gpu`) the chunks are compiled, and this is where that is seen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from neo_ray import bench_loss, chunked, devices, memory
from neo_ray.chunked import chunked_loss, projected_loss
from neo_ray.losses import LossSums, neo_loss
from neo_ray.models import Head
from neo_ray.settings import DistillConfig

NEO = DistillConfig(kd_ratio=0.5)
SMALL, QUICKSTART = (300, 2000, 64, 96), (2048, 49_152, 576, 576)
"""N, V and both widths."""


def inputs_on(device: str) -> bench_loss.Inputs:
    sizes = QUICKSTART if device == "cuda" else SMALL
    return bench_loss.make_inputs(*sizes, torch.device(device), torch.bfloat16)


def dense(inputs: bench_loss.Inputs) -> LossSums:
    student_NV, teacher_NV = (
        F.linear(states, head)
        for states, head in (
            (inputs.student_NH, inputs.student_head_VH),
            (inputs.teacher_NH, inputs.teacher_head_VH),
        )
    )
    return neo_loss(student_NV, inputs.labels_N, teacher_NV, NEO)


def stored(mode: str, inputs: bench_loss.Inputs, rows: int | None = None, compiles: bool = True) -> LossSums:
    """From what a store has of the teacher: its fp16 projection, or its hidden states in fp16."""
    head, vocabulary = Head(inputs.student_head_VH), len(inputs.student_head_VH)
    how: dict[str, Any] = {"rows": rows, "compiles": compiles}
    if mode == "projection":
        return projected_loss(inputs.student_NH, head, inputs.labels_N, inputs.projected, NEO, vocabulary, **how)
    teacher, states_NG = Head(inputs.teacher_head_VH), inputs.teacher_NH.half()
    given = (inputs.student_NH, head, inputs.labels_N, lambda where: teacher.logits(states_NG[where], vocabulary))
    return chunked_loss(*given, NEO, vocabulary, **how)


def gradient(sums: LossSums, inputs: bench_loss.Inputs) -> torch.Tensor:
    (gradient_NH,) = torch.autograd.grad(sums.total / sums.count, inputs.student_NH)
    return gradient_NH.double().flatten()


@pytest.mark.parametrize("mode", ["projection", "hidden"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_store_teaches_what_the_living_teacher_does(device: str, mode: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    inputs = inputs_on(device)
    expected = dense(inputs)
    theirs = gradient(expected, inputs)
    for compiles in (True, False):
        found = stored(mode, inputs, None if device == "cuda" else 128, compiles)
        assert abs(found.kd - expected.kd) / expected.count <= 2e-3, "nats a token"
        assert torch.nn.functional.cosine_similarity(gradient(found, inputs), theirs, dim=0) >= 0.9999


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["projection", "hidden"])
def test_a_gpu_s_chunks_are_compiled_and_any_number_of_rows_is_the_same(mode: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    inputs = inputs_on("cuda")
    plain = stored(mode, inputs, compiles=False)
    expected = gradient(plain, inputs)
    for rows in (2048, 1000, 333, 7):
        found = stored(mode, inputs, rows)
        assert found.total.item() == pytest.approx(plain.total.item(), rel=1e-4)
        assert torch.nn.functional.cosine_similarity(gradient(found, inputs), expected, dim=0) >= 0.9999
    compiled = chunked.PROJECTED if mode == "projection" else chunked.TERMS
    assert compiled._compiled["inductor"] is not compiled.function, "it fell back: see the log"


@pytest.mark.gpu
def test_a_gpu_holds_an_eighth_of_the_dense_loss() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    inputs, device = inputs_on("cuda"), torch.device("cuda")
    assert memory.chunk_rows(QUICKSTART[1], "cuda") < QUICKSTART[0]
    peaks = []
    for loss in (dense, lambda given: stored("projection", given)):
        for _ in range(2):  # the first compiles
            devices.free_memory(device)
            devices.reset_peak_memory(device)
            held = devices.peak_memory_bytes(device)
            gradient(loss(inputs), inputs)
            peak = devices.peak_memory_bytes(device) - held
        peaks.append(peak)
    assert peaks[0] >= 8 * peaks[1]

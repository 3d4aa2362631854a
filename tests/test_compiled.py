"""Does a compiled loss give the plain one's value and gradient, for every chunk and setting, and does a failure stay small?

A compiler is given to the CPU here, which has none otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_chunked import DIVERGENCES, HEADS, LABELS, TEACHER, V, a_head, a_loss, compare
from torch._dynamo.backends.debugging import aot_eager

from neo_ray import chunked, devices
from neo_ray.chunked import chunked_loss, projected_loss, projection
from neo_ray.losses import loss_terms, top_k
from neo_ray.settings import DistillConfig


class Counting:
    """A backend that counts its graphs."""

    def __init__(self, error: Exception | None = None) -> None:
        self.graphs, self.error = 0, error

    def __call__(self, graph: Any, examples: Any) -> Any:
        self.graphs += 1
        if self.error is not None:
            raise self.error
        return aot_eager(graph, examples)


def with_backend(monkeypatch: pytest.MonkeyPatch, backend: Any) -> Any:
    torch._dynamo.reset()
    monkeypatch.setattr(devices, "COMPILERS", {"cpu": backend})
    monkeypatch.setattr(chunked, "TERMS", devices.Compilable(loss_terms))
    monkeypatch.setattr(chunked, "PROJECTED", devices.Compilable(chunked._projected_chunk))
    return backend


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    yield with_backend(monkeypatch, Counting())
    torch._dynamo.reset()


def both(loss: Any, head: Any) -> None:
    """Compiled and plain."""
    found, expected = (a_loss(lambda s, h, compiles=compiles: loss(s, h, compiles), head) for compiles in (True, False))
    compare(found, expected)


def in_chunks(distill: DistillConfig, teacher: Any = lambda where: TEACHER[where], rows: int = 7, smoothing: float = 0.0) -> Any:
    return lambda s, h, compiles: chunked_loss(s, h, LABELS, teacher, distill, V, smoothing, rows, 8.0, compiles)


def projected(distill: DistillConfig, head: Any, rows: int = 7, smoothing: float = 0.0) -> Any:
    known = projection(TEACHER, head, V, distill.temperature)
    return lambda s, h, compiles: projected_loss(s, h, LABELS, known, distill, V, smoothing, rows, 8.0, compiles)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_function_serves_all_chunks_and_settings(counting: Counting, divergence: Any) -> None:
    """23 positions in chunks of 7 and of 9: the last ones have 2 and 5."""
    for rows, kd_ratio, temperature in ((7, 0.3, 2.0), (9, 0.7, 3.0), (7, 0.1, 1.5)):
        both(in_chunks(DistillConfig(divergence=divergence, kd_ratio=kd_ratio, temperature=temperature), rows=rows), a_head())
    assert counting.graphs == 1


def test_one_function_serves_all_chunks_and_settings_of_a_projection(counting: Counting) -> None:
    for rows, kd_ratio, temperature in ((7, 0.3, 2.0), (9, 0.7, 3.0), (7, 0.1, 1.5)):
        both(projected(DistillConfig(kd_ratio=kd_ratio, temperature=temperature), a_head(), rows), a_head())
    assert counting.graphs == 1


@pytest.mark.parametrize(("kd_ratio", "temperature", "smoothing"), [(0.0, 2.0, 0.2), (1.0, 2.0, 0.0), (0.4, 1.0, 0.2)])
def test_settings_that_leave_terms_out(counting: Counting, kd_ratio: float, temperature: float, smoothing: float) -> None:
    distill = DistillConfig(kd_ratio=kd_ratio, temperature=temperature)
    both(in_chunks(distill, smoothing=smoothing), a_head())
    both(projected(distill, a_head(), smoothing=smoothing), a_head())
    assert counting.graphs == 2


@pytest.mark.parametrize("kind", HEADS)
def test_every_head(counting: Counting, kind: str) -> None:
    distill = DistillConfig(kd_ratio=0.4)
    both(in_chunks(distill), a_head(True, **HEADS[kind]))
    if kind != "soft cap":
        both(projected(distill, a_head(**HEADS[kind])), a_head(**HEADS[kind]))
    assert counting.graphs == (1 if kind == "soft cap" else 2)


def test_without_a_teacher_and_from_the_likeliest_tokens(counting: Counting) -> None:
    distill = DistillConfig(kd_ratio=0.4)
    both(in_chunks(distill, teacher=None), a_head())
    both(in_chunks(distill, teacher=top_k(TEACHER, 5, 1.0).rows), a_head())
    both(lambda s, h, compiles: projected_loss(s, h, LABELS, None, distill, V, rows=7, compiles=compiles), a_head())
    assert counting.graphs == 3


@pytest.mark.parametrize("name", ["jsd_beta", "skew", "head_mass"])
def test_settings_of_a_divergence_may_be_searched(counting: Counting, name: str) -> None:
    divergence: Any = {"jsd_beta": "jsd", "skew": "skew_kl", "head_mass": "adaptive_kl"}[name]
    for value in (0.2, 0.3, 0.4, 0.6):
        both(in_chunks(DistillConfig(divergence=divergence, kd_ratio=0.4, **{name: value})), a_head())
    assert counting.graphs == 1


@pytest.mark.parametrize("take", ["chunked", "projected"])
def test_where_compiling_fails_the_plain_loss_is_taken_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, take: str
) -> None:
    backend = with_backend(monkeypatch, Counting(RuntimeError("no such compiler")))
    distill = DistillConfig(kd_ratio=0.4)
    with caplog.at_level(logging.WARNING, "neo_ray"):
        for _ in range(2):
            both(in_chunks(distill) if take == "chunked" else projected(distill, a_head()), a_head())
    said = [record.getMessage() for record in caplog.records if record.name == "neo_ray"]
    assert len(said) == 1 and "is not compiled" in said[0] and "no such compiler" in said[0] and backend.graphs == 1


def test_want_of_memory_is_no_failure_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    with_backend(monkeypatch, Counting(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")))
    with pytest.raises(Exception, match="out of memory") as raised:
        both(in_chunks(DistillConfig()), a_head())
    assert devices.is_out_of_memory(raised.value)


def test_it_can_be_switched_off_and_a_cpu_has_no_compiler(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    a_loss(lambda s, h: in_chunks(DistillConfig())(s, h, False), a_head())
    monkeypatch.setattr(devices, "COMPILERS", {"cuda": counting})
    a_loss(lambda s, h: in_chunks(DistillConfig())(s, h, True), a_head())
    assert counting.graphs == 0


@pytest.mark.slow
def test_pytorch_s_own_compiler_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that a GPU has."""
    with_backend(monkeypatch, "inductor")
    distill, head = DistillConfig(kd_ratio=0.4, temperature=2.0), a_head()
    both(projected(distill, head), head)
    assert chunked.PROJECTED._compiled["inductor"] is not chunked._projected_chunk, "it fell back"

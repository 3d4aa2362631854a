"""Does the loss scale of fp16 change nothing but what overflows? On a CPU, where fp32 shows it to the bit.

A scale is a power of two: gradients in fp32 are the same with and without it. Overflows are put into the gradient on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import test_train
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_train import a_trial, curve, interrupted_and_resumed, run

from neo_ray import train as training
from neo_ray.parts import Sources
from neo_ray.scaling import GROWTH_STEPS, LossScale
from neo_ray.settings import LoraConfig, TrainingConfig, TrialConfig

sources = test_train.sources
process_group = test_train.process_group
STAGES = (0, pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow))


def clipped(stage: int, **changes: Any) -> TrialConfig:
    """Two micro-batches a step, gradients well beyond the norm that they are clipped to, no dropout."""
    settings = {"learning_rate": 1e-2, "steps": 6, "batch_size": 4, "micro_batch_size": 2, "max_grad_norm": 0.05, "dtype": "fp32"}
    return a_trial(stage, training=TrainingConfig(**settings | changes), lora=LoraConfig(rank=4, alpha=8))  # type: ignore[arg-type]


@contextmanager
def scaled(value: float, overflow_in: tuple[int, ...] = (), on_rank: int = 0) -> Iterator[list[float]]:
    """Every engine has this loss scale, and in these steps (from 0) one rank's gradient is infinite, whatever the loss.

    Gives the gradients that reach the loss, as they come.
    """
    build, step, loss = training.build_engine, training.optimizer_step, training.Student.loss
    now, reached, told = [0], list[float](), list[tuple[float, float]]()

    def building(*arguments: Any) -> Any:
        engine = build(*arguments)
        engine.fp16_scale = LossScale(value)
        return engine

    def stepping(*arguments: Any, **named: Any) -> Any:
        now[0] = arguments[5]
        return step(*arguments, **named)

    def infinite(*arguments: Any) -> Any:
        sums = loss(*arguments)
        sums.total.register_hook(lambda gradient: reached.append(gradient.item()))
        sums.total.register_hook(lambda gradient: told.append((arguments[6], gradient.item())))
        if now[0] in overflow_in and dist.get_rank() == on_rank:
            sums.total.register_hook(lambda gradient: gradient * math.inf)
        return sums

    training.build_engine, training.optimizer_step, training.Student.loss = building, stepping, infinite  # type: ignore[assignment,method-assign]
    try:
        yield reached
        assert all(math.isclose(*pair, rel_tol=1e-6) for pair in told), "gradients are made at the scale at which they are used"
    finally:
        training.build_engine, training.optimizer_step, training.Student.loss = build, step, loss  # type: ignore[method-assign]


def test_the_scale_halves_after_an_overflow_and_doubles_after_a_long_time_without() -> None:
    scale = LossScale(8.0)
    scale.update(overflow=True)
    assert (scale.value, scale.skipped_steps) == (4.0, 1)
    for _ in range(GROWTH_STEPS - 1):
        scale.update(overflow=False)
    assert scale.value == 4.0
    scale.update(overflow=False)
    assert scale.value == 8.0 and LossScale(**scale.state()) == scale
    for _ in range(4):
        assert not scale.hopeless
        scale.update(overflow=True)
    assert scale.value == 1.0 and scale.hopeless


@pytest.mark.parametrize("stage", STAGES)
def test_a_scale_changes_no_bit_of_a_clipped_and_accumulated_step(sources: Sources, stage: int) -> None:
    with scaled(1.0) as plain:
        expected = curve(run(sources, clipped(stage))[0])
    with scaled(2.0**10) as larger:
        rows, outcome = run(sources, clipped(stage))
    assert curve(rows) == expected == curve(run(sources, clipped(stage))[0])
    assert larger == [2.0**10 * gradient for gradient in plain] and len(plain) == 12
    assert (outcome.details["skipped_steps"], outcome.details["loss_scale"]) == (0, 2.0**10)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_overflows_is_skipped_and_counted_and_no_divergence(sources: Sources, tmp_path: Path, stage: int) -> None:
    """Both steps before the first checkpoint, which holds moments of no update, and the second those of fewer than steps."""
    overflows = (0, 1)
    with scaled(2.0**10, overflows):
        rows, outcome = run(sources, clipped(stage))
    assert outcome.state == "COMPLETE" and outcome.totals["steps"] == 6
    assert (outcome.details["skipped_steps"], outcome.details["loss_scale"]) == (2, 2.0**8)
    assert rows[0]["step"] == 2 and all(math.isfinite(x) for row in curve(rows) for x in row)

    with scaled(2.0**10, overflows):
        resumed, again = interrupted_and_resumed(sources, clipped(stage), tmp_path)
    assert again.details["resumed_from_step"] == 3
    assert curve(resumed) == curve(rows) and again.metrics == outcome.metrics
    assert (again.details["skipped_steps"], again.details["loss_scale"]) == (2, 2.0**8)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_skipped_step_leaves_weights_and_moments_alone(sources: Sources, tmp_path: Path, stage: int) -> None:
    with scaled(2.0**10, overflow_in=(0, 1, 2)):
        rows, outcome = run(sources, clipped(stage, steps=3))
    assert [row["select_ce"] for row in rows] == [outcome.details["baseline"]["select_ce"]] * len(rows)
    assert outcome.state == "COMPLETE" and outcome.details["skipped_steps"] == 3


def test_gradients_that_are_infinite_at_every_scale_are_a_divergence(sources: Sources) -> None:
    with scaled(2.0, overflow_in=tuple(range(6))):
        _, outcome = run(sources, clipped(2))
    assert (outcome.state, outcome.cause, outcome.totals["steps"]) == ("FAILED", "diverged", 2)
    assert "gradients overflow at every loss scale at step 2 of 6" in str(outcome.error)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_trial_in_fp16_follows_the_one_in_fp32(sources: Sources, stage: int) -> None:
    """PyTorch computes fp16 on a CPU too, slowly; for a sweep it is refused there."""
    rows, outcome = run(sources, clipped(stage, dtype="fp16"))
    assert outcome.state == "COMPLETE" and outcome.details["dtype"] == "float16"
    expected = curve(run(sources, clipped(stage))[0])
    for ours, theirs in zip(curve(rows), expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-2)


def _worker(rank: int, meeting: str, sources: Sources, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for stage in (0, 2, 3):
        with scaled(2.0**10, overflow_in=(0, 3), on_rank=1):
            rows, outcome = run(sources, clipped(stage))
        if rank == 0:
            results.put((curve(rows), outcome.details["skipped_steps"]))
    dist.destroy_process_group()


def test_an_overflow_on_one_of_two_workers_is_one_of_both(sources: Sources, tmp_path: Path) -> None:
    with scaled(2.0**10, overflow_in=(0, 3)):
        expected = curve(run(sources, clipped(0))[0])
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_worker, args=(str(tmp_path / "meeting"), sources, results), nprocs=2)
    for _ in (0, 2, 3):
        found, skipped = results.get()
        assert skipped == 2
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)

"""Does a trial go on with another number of workers? Interrupted on one or two and resumed on the other, sharded or not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import test_train
import torch
import torch.multiprocessing as mp
from test_train import CPU, a_trial, curve

from neo_ray import bench_step
from neo_ray.faults import of_storage
from neo_ray.parts import Sources, load_parts
from neo_ray.settings import LoraConfig, TrialConfig
from neo_ray.train import Outcome, train

sources = test_train.sources
process_group = test_train.process_group
STAGES = (0, 2, 3)
Curve = list[tuple[float, float, float]]


def at(stage: int) -> TrialConfig:
    """Without dropout, which is drawn on each worker anew: only then is the curve the same on any number of them."""
    return a_trial(stage, lora=LoraConfig(rank=4, alpha=8))


def go(sources: Sources, stage: int, folder: Path, stop: int | None = None) -> tuple[Curve, Outcome]:
    """Train in this process, or to the first look after optimizer step `stop` (one step beyond the checkpoint of step 3)."""
    trial, rows, asked = at(stage), [], []

    def stopped() -> bool:
        asked.append(None)
        return stop is not None and len(asked) >= stop

    outcome = train(trial, load_parts(sources, trial, CPU), rows.append, stopped, folder)
    return curve(rows), outcome


def folder_of(root: Path, workers: int, stage: int) -> Path:
    return root / f"{workers}-workers-{stage}"


def _two_workers(rank: int, root: Path, sources: Sources) -> None:
    """Go on with what one worker left, and leave the same for one worker."""
    torch.set_num_threads(1)
    found = {}
    if rank == 0:
        shutil.copytree(folder_of(root, 1, 0), root / "apart-0")
    with bench_step.process_group(CPU, rank, 2, root / "meeting"):
        for stage in STAGES:
            go(sources, stage, folder_of(root, 2, stage), stop=4)
            found[stage] = go(sources, stage, folder_of(root, 1, stage))
        with pytest.raises(OSError, match="another worker of this trial has another checkpoint") as raised:
            go(sources, 0, root / f"apart-{rank}")  # as where a file system shows the newest to one of them alone
        assert of_storage(raised.value)
    if rank == 0:
        torch.save(found, root / "found")


@pytest.fixture(scope="module")
def root(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    for stage in STAGES:
        assert go(sources, stage, folder_of(root, 1, stage), stop=4)[1].state == "PRUNED"
    mp.spawn(_two_workers, args=(root, sources), nprocs=2)
    return root


@pytest.fixture(scope="module")
def whole(sources: Sources, root: Path) -> tuple[Curve, Outcome]:
    """Uninterrupted, on one worker, without sharding."""
    return go(sources, 0, root / "whole")


def agree(found: tuple[Curve, Outcome], whole: tuple[Curve, Outcome], workers: int) -> None:
    (rows, outcome), (expected, uninterrupted) = found, whole
    assert outcome.details["resumed_from_step"] == 3 and outcome.details["workers"] == workers
    assert len(rows) == len(expected) == 4
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert outcome.metrics == pytest.approx(uninterrupted.metrics, abs=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_two_workers_go_on_with_what_one_left(root: Path, whole: Any, stage: int) -> None:
    agree(torch.load(root / "found", weights_only=False)[stage], whole, workers=2)


@pytest.mark.parametrize("stage", STAGES)
def test_one_worker_goes_on_with_what_two_left(sources: Sources, root: Path, whole: Any, stage: int) -> None:
    agree(go(sources, stage, folder_of(root, 2, stage)), whole, workers=1)

"""What does a store save a sweep? The same trials by the sweep's door, with a living teacher and with a store to fill first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neo_ray.account import Account, account
from neo_ray.bench_turns import Announce, Measured, Samples
from neo_ray.records import Journal, fold
from neo_ray.settings import ConfigError

LIVE, STORED = "live", "stored"
ABOUT = {LIVE: "the teacher runs in every trial", STORED: "the teacher runs once, to fill a new store, which is in the time"}
MODES = {LIVE: "live", STORED: "projection"}
FIXED = ("scheduler.name=none", "sampler.name=random", 'search.kd_ratio={"choice": [0.5, 0.9]}')
"""Every trial runs to its end and is taught, and both arms draw the same ones."""


@dataclass(frozen=True)
class Run:
    """What one sweep took."""

    seconds: float
    """From the command to its end: Ray, models and reports included."""
    trial_seconds: float
    found: Account


def measure_sweeps(file: Path, given: Sequence[str], trials: int, rounds: int, announce: Announce) -> Measured:
    """Run the sweep `file` with `trials` trials in turns, each time in a results folder and with a store of its own.

    Args:
        given: `key=value` that all runs share.

    Raises:
        ConfigError: a sweep fails, or a trial of it is not COMPLETE; says where its output is.
    """
    arms: dict[str, list[Run]] = {LIVE: [], STORED: []}
    with tempfile.TemporaryDirectory(prefix="neo_ray-bench-") as folder:

        def once(arm: str, count: int, name: str) -> Run:
            return _run(file, given, arm, count, Path(folder) / name)

        announce("one trial that is thrown away, so that data and student are there")
        once(LIVE, 1, "warm-up")
        for turn in range(rounds):
            for name in (LIVE, STORED) if turn % 2 == 0 else (STORED, LIVE):
                arms[name].append(once(name, trials, f"{name}-{turn}"))
                announce(f"{name}: {arms[name][-1].seconds:.0f} s")
    samples = {name: Samples([run.seconds for run in runs]) for name, runs in arms.items()}
    known = {name: {"about": ABOUT[name], **_known(runs[0])} for name, runs in arms.items()}
    return Measured({"trials": trials, "sweep": file.name, "given": " ".join(given)}, known, samples, baseline=LIVE)


def _known(run: Run) -> dict[str, Any]:
    """Of the first run; tokens are the same in each."""
    found = run.found
    return {
        "trial_seconds": run.trial_seconds,
        "filling_seconds": found.builder_seconds,
        "teacher_tokens": found.builder_tokens + found.teacher_tokens,
    }


def _run(file: Path, given: Sequence[str], arm: str, trials: int, folder: Path) -> Run:
    own = [
        f"name={arm}",
        f"sampler.num_trials={trials}",
        f"storage.path={json.dumps(str(folder / 'results'))}",
        f"targets.path={json.dumps(str(folder / 'targets'))}",
        f"targets.mode={MODES[arm]}",
    ]
    command = [sys.executable, "-m", "neo_ray.sweep", str(file), *FIXED, *own, *given]
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH")) if path)
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False)
    seconds = time.perf_counter() - started
    events = list(Journal(folder / "results" / arm).events())
    records = fold(events)
    if done.returncode or [record.state for record in records] != ["COMPLETE"] * trials:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise ConfigError(f"bench sweep: the sweep with {MODES[arm]} targets did not come to its end:\n{tail}")
    return Run(seconds, sum(record.seconds for record in records), account(events, records))

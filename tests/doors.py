"""How do tests run a whole sweep? A sweep file over the tiny world, and the door in a process of its own with its own Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml
from tiny import World

ROOT = Path(__file__).resolve().parent.parent


def sweep_file(world: World, folder: Path, **changes: object) -> Path:
    sweep = {
        "name": "tiny",
        "teacher": {"model": str(world.teacher)},
        "student": {"model": str(world.student)},
        "data": {"source": str(world.data), "max_length": 48, "select_fraction": 0.2, "report_fraction": 0.2},
        "training": {"steps": 8, "batch_size": 4, "micro_batch_size": 2, "dtype": "fp32", "learning_rate": "1e-2"},
        "deepspeed": {"zero_stage": 0},
        "search": {"rank": {"choice": [2, 4]}, "alpha": {"of": "rank", "times": 2}, "kd_ratio": {"choice": [0.0, 0.5]}},
        "sampler": {"name": "tpe", "num_trials": 2},
        "resources": {"concurrency": 2},
        "storage": {"path": str(folder / "results"), "cache": str(folder / "cache")},
        **changes,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def start(
    path: Path, *overrides: str, home: Path | None = None, also_import: Path | None = None, door: str = "neo_ray.sweep"
) -> subprocess.Popen[str]:
    home = home or path.parent
    modules = os.pathsep.join(str(folder) for folder in (also_import, ROOT) if folder)
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": modules, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", *door.split(), str(path), *overrides]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=home,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )


def finish(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=240)
    return text

"""How do tests run a whole sweep? A sweep file over the tiny world, and the door in a process of its own with its own Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
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
    text, _ = process.communicate(timeout=480)
    return text


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 400) -> None:
    """Until something holds of a sweep that runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.1)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL of a door and of all that it started, as where a machine goes down."""
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    _end(children)
    process.wait()


def kill_driver(process: subprocess.Popen[str]) -> None:
    """SIGKILL of the driver alone: its Ray notices, and is given a minute to."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    _end(psutil.wait_procs(children, timeout=60)[1])


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=20)

"""What goes wrong in a sweep stays where it belongs: trials that fail, workers that die, a person who presses Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from doors import ROOT, finish, start, sweep_file
from tiny import World

from neo_ray.records import TrialRecord, load_records

LONG = {
    "training": {"steps": 120, "batch_size": 4, "micro_batch_size": 2, "dtype": "fp32"},
    "scheduler": {"name": "none"},
}


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.1)


def reported(journal: Path, rung: int = 1) -> bool:
    return journal.exists() and f'"rung": {rung}' in journal.read_text()


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train: Ray renames them after the class of Ray Train's worker actor."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


def test_a_trial_that_fails_is_recorded_with_its_cause_and_the_sweep_goes_on(tiny_world: World, tmp_path: Path) -> None:
    search = {
        "learning_rate": {"grid": ["1e30", "1e-2"]},
        "target_modules": {"grid": [["nowhere"], "all-linear"], "when": {"learning_rate": "1e-2"}},
        "rank": {"grid": [10**9, 2], "when": {"target_modules": "all-linear"}},
    }
    changes = {"search": search, "sampler": {"name": "grid"}, "scheduler": {"name": "none"}}
    path = sweep_file(tiny_world, tmp_path, **changes, resources={"concurrency": 1, "memory_check": False})
    process = start(path)
    text = finish(process)
    assert process.returncode == 0, text
    found: dict[str | None, TrialRecord] = {r.cause: r for r in load_records(tmp_path / "results" / "tiny")}
    assert set(found) == {"diverged", "error", "out_of_memory", None}
    assert "loss is" in str(found["diverged"].error) and "step" in str(found["diverged"].error)
    assert "lora.target_modules: no linear layer is called 'nowhere'" in str(found["error"].error)
    assert "memory" in str(found["out_of_memory"].error)
    assert all(record.state == "FAILED" for cause, record in found.items() if cause)
    assert found[None].state == "COMPLETE" and found[None].id == "0003"
    assert "FAILED (out_of_memory)" in text and "Traceback" not in text


@pytest.mark.slow
def test_a_trial_whose_worker_dies_goes_on_from_its_checkpoint(tiny_world: World, tmp_path: Path) -> None:
    process = start(sweep_file(tiny_world, tmp_path, **LONG, sampler={"name": "tpe", "num_trials": 1}))
    journal = tmp_path / "results" / "tiny" / "journal.jsonl"
    wait_for(lambda: reported(journal), process)
    workers = workers_of(process)
    assert len(workers) == 1, "one slot, one worker"
    workers[0].kill()
    text = finish(process)
    assert process.returncode == 0, text
    assert "lost its workers in trial 0000" in text
    (record,) = load_records(journal.parent)
    assert record.state == "COMPLETE" and record.attempts == 2
    assert record.details["resumed_from_step"] >= 30
    assert [row["rung"] for row in record.curve] == [1, 2, 3, 4]


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(tiny_world: World, tmp_path: Path) -> None:
    path = sweep_file(tiny_world, tmp_path, **LONG)
    process = start(path)
    journal = tmp_path / "results" / "tiny" / "journal.jsonl"
    wait_for(lambda: reported(journal), process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    text = finish(process)
    assert process.returncode == 130, text
    assert "interrupted; the same command goes on from here" in text and "Traceback" not in text
    assert not (journal.parent / "lease.json").exists()
    assert not psutil.wait_procs(children, timeout=20)[1], "nothing is left running"
    before = journal.read_text()

    process = start(path)
    text = finish(process)
    assert process.returncode == 0, text
    assert journal.read_text().startswith(before)
    records = load_records(journal.parent)
    assert [r.state for r in records] == ["COMPLETE", "COMPLETE"]
    assert max(r.details["resumed_from_step"] for r in records) >= 30


def test_a_ray_without_its_state_api_is_refused(tmp_path: Path) -> None:
    code = """
import ray
from neo_ray.cluster import connect
from neo_ray.config import ResourcesConfig
ray.init(include_dashboard=False, num_cpus=1, log_to_driver=False)
connect(ResourcesConfig())
"""
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert "ConfigError: resources.address: this Ray has no State API; start it with its dashboard" in done.stderr

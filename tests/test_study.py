"""Does a whole study run through its phases, and go on where it was killed? One tiny study, through the door, on a real Ray."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from doors import finish, start, sweep_file
from tiny import World

from neo_ray.records import TrialRecord, load_records
from neo_ray.status import lines, status

PHASES: dict[str, Any] = {
    "noise": {"points": [{"rank": 2, "kd_ratio": 0.5}], "seeds": [1, 2]},
    "map": {},
    "exploit": {"sampler": {"name": "tpe", "num_trials": 2}, "scheduler": {"name": "asha", "grace": 0.5}},
    "confirm": {"top": 1, "seeds": [11, 12]},
}
COUNTS = {"noise": 2, "map": 4, "exploit": 2, "confirm": 4}


def started(journal: Path, phase: str) -> int:
    text = journal.read_text() if journal.exists() else ""
    events = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return sum(event["event"] == "start" and event["phase"] == phase for event in events)


def kill(process: Any) -> None:
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        if child.is_running():
            child.kill()
    process.wait()
    psutil.wait_procs(children, timeout=20)


@pytest.mark.slow
def test_a_killed_study_goes_on_in_its_phase_and_ends_with_confirmed_settings(tiny_world: World, tmp_path: Path) -> None:
    path = sweep_file(tiny_world, tmp_path, phases=PHASES, sampler={}, lora={"rank": 8, "alpha": 16})
    folder = tmp_path / "results" / "tiny"
    process = start(path)
    deadline = time.monotonic() + 300
    while started(folder / "journal.jsonl", "map") < 3:
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.05)
    kill(process)
    before = {r.id: r for r in load_records(folder) if r.finished}
    found = status(folder)
    assert found["phase"] == "map" and found["phases"]["noise"] == (2, 2) and found["phases"]["confirm"] == (0, 4)
    assert any(line.startswith("  map: ") and line.endswith("/4 (now)") for line in lines(found))

    process = start(path)
    text = finish(process)
    assert process.returncode == 0, text
    records = load_records(folder)
    assert {name: sum(r.phase == name for r in records) for name in COUNTS} == COUNTS
    assert all(r.finished for r in records) and {r.state for r in records if r.phase != "exploit"} == {"COMPLETE"}
    assert [r for r in records if r.id in before] == list(before.values()), "what had ended is not run again"
    order = [r.phase for r in sorted(records, key=lambda r: r.started or 0.0)]
    assert order == [name for name, count in COUNTS.items() for _ in range(count)], "one phase after another"
    assert_fresh_and_paired(records)
    assert sum("cold_start_seconds" in r.details for r in records) <= 4, "two workers a driver, and they stay warm between phases"
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{folder / 'study.db'}")
    assert {t.user_attrs["trial"]: t.user_attrs["phase"] for t in study.trials} == {r.id: r.phase for r in records}
    assert "phase confirm: 4 trials" in text and "Traceback" not in text


def assert_fresh_and_paired(records: list[TrialRecord]) -> None:
    confirmed = [r for r in records if r.phase == "confirm"]
    seeds = {json.dumps(r.params): sorted(c.seed for c in confirmed if c.params == r.params) for r in confirmed}
    assert list(seeds.values()) == [[11, 12]] * 2 and {r.seed for r in records if r.phase != "confirm"} == {0, 1, 2}
    assert {r.params["rank"] for r in confirmed} > {8}, "the file's own rank, which is not in the space"

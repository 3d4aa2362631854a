"""Does a whole study run through its phases, and go on where it was killed? One tiny study, through the door, on a real Ray."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest
from doors import finish, kill, start, sweep_file, wait_for
from intact import begun, watched_steps
from test_faults import FAULT
from tiny import World

from neo_ray.account import account
from neo_ray.records import Journal, TrialRecord, load_records
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


@pytest.mark.slow
def test_a_killed_study_goes_on_in_its_phase_and_ends_with_confirmed_settings(tiny_world: World, tmp_path: Path) -> None:
    own = {"phases": PHASES, "sampler": {}, "lora": {"rank": 8, "alpha": 16}, "targets": {"mode": "projection"}}
    path = sweep_file(tiny_world, tmp_path, **own)
    folder = tmp_path / "results" / "tiny"
    process = start(path)
    wait_for(lambda: started(folder / "journal.jsonl", "map") >= 3, process, 500)
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
    assert_taught_by_one_store(folder, records)
    assert len(list((tmp_path / "cache" / "targets").glob("*/"))) == 1


def assert_taught_by_one_store(folder: Path, records: list[TrialRecord]) -> None:
    """The teacher read each token once for all phases, those after the kill included, and lived in no trial."""
    events = list(Journal(folder).events())
    found = account(events, records)
    assert found.builder_tokens == found.store_tokens > 0 and found.store_rows == found.labels > 0
    assert found.teacher_tokens == 0 and found.num_trials == sum(COUNTS.values())
    filled = [event["filled"] for event in events if event["event"] == "targets"]
    assert len(filled) == 2 and filled[0] > 0 == filled[1], "the second driver finds it whole"
    asked = {phase: sum(r.details["target_rows"] for r in records if r.phase == phase) for phase in COUNTS}
    assert all(asked.values()), "every phase reads the store"


def assert_fresh_and_paired(records: list[TrialRecord]) -> None:
    confirmed = [r for r in records if r.phase == "confirm"]
    seeds = {json.dumps(r.params): sorted(c.seed for c in confirmed if c.params == r.params) for r in confirmed}
    assert list(seeds.values()) == [[11, 12]] * 2 and {r.seed for r in records if r.phase != "confirm"} == {0, 1, 2}
    assert {r.params["rank"] for r in confirmed} > {8}, "the file's own rank, which is not in the space"


@pytest.mark.slow
def test_budgets_end_a_phase_and_a_sweep_whose_database_is_locked_and_which_another_driver_wants(
    tiny_world: World, tmp_path: Path
) -> None:
    """An exclusive lock of SQLite's, from the first trial to the second phase; the other driver comes meanwhile."""
    (tmp_path / "sitecustomize.py").write_text(FAULT + watched_steps())
    exploit = {"sampler": {"name": "random", "num_trials": 9}, "scheduler": {"name": "none"}}
    phases = {"map": {"budget": {"tokens": 1}}, "exploit": exploit}
    path = sweep_file(tiny_world, tmp_path, phases=phases, sampler={}, budget={"trials": 3}, resources={"concurrency": 1})
    folder, hold = tmp_path / "results" / "tiny", tmp_path / "hold"
    journal, database = folder / "journal.jsonl", folder / "study.db"
    hold.touch()
    process = start(path, also_import=tmp_path)
    wait_for(lambda: begun(tmp_path) and database.exists(), process)
    lock = sqlite3.connect(database, isolation_level=None, timeout=60)
    lock.execute("BEGIN EXCLUSIVE")
    before, lease = journal.read_text(), json.loads((folder / "lease.json").read_text())["nonce"]
    other = start(path)
    text = finish(other)
    assert other.returncode == 2 and "Traceback" not in text, text
    assert f"error: storage.path: another driver runs this sweep (process {process.pid} on" in text
    assert journal.read_text() == before and json.loads((folder / "lease.json").read_text())["nonce"] == lease
    hold.unlink()
    wait_for(lambda: started(journal, "exploit"), process)
    lock.execute("ROLLBACK")
    text = finish(process)
    assert process.returncode == 0 and "Traceback" not in text, text
    records = load_records(folder)
    assert [(r.phase, r.state) for r in records] == [("map", "COMPLETE"), ("exploit", "COMPLETE"), ("exploit", "COMPLETE")]
    assert "the budget of phase map is spent (tokens: " in text and "the budget is spent (trials: 3 of 3)" in text
    assert "the study's database cannot be written" in text and "database is locked" in text
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{database}")
    assert [(t.user_attrs["trial"], t.state.name) for t in study.trials] == [(r.id, "COMPLETE") for r in records], "it caught up"
    assert "3 trials: 3 COMPLETE" in (folder / "report.md").read_text()

"""Is a suite asked when the sweep says, and are trials stopped by it? Through the door, on a real Ray and the tiny world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from doors import finish, start, sweep_file
from test_asking import make_asked
from tiny import World

from neo_ray.records import TrialRecord, load_records

RATES = [1e-3, 1e-2, 1e-5, 3e-3]
"""Whichever way benchmarks go with the rate, one of them is worse than one before it."""


def swept(world: World, folder: Path, **changes: Any) -> list[TrialRecord]:
    make_asked(folder / "asked")
    changes["evaluation"] = {"suite": str(folder / "asked"), "max_tokens": 900, **changes["evaluation"]}
    process = start(sweep_file(world, folder, lora={"rank": 4, "alpha": 8}, resources={"concurrency": 1}, **changes))
    text = finish(process)
    assert process.returncode == 0, text
    return sorted(load_records(folder / "results" / "tiny"), key=lambda record: record.id)


@pytest.mark.slow
def test_benchmarks_of_confirm_are_asked_there_alone(tiny_world: World, tmp_path: Path) -> None:
    records = swept(
        tiny_world,
        tmp_path,
        search={"learning_rate": {"grid": RATES[:2]}},
        sampler={},
        phases={"map": {}, "confirm": {"top": 1, "seeds": [11, 12]}},
        evaluation={"suite_at": "confirm", "suite_limit": 3},
    )
    asked = {r.id for r in records if "suite_shown" in r.metrics}
    assert asked == {r.id for r in records if r.phase == "confirm"} and len(records) > len(asked) >= 2
    folder = tmp_path / "results" / "tiny"
    assert asked == {path.parent.name for path in folder.glob("trials/*/suite.json")}
    (student,) = folder.glob("benchmarks/*/first-3/student/suite.json")
    assert student.is_file() and not any("suite" in row for r in records for row in r.curve)
    assert all(("suite" in r.details["baseline"]) == (r.id in asked) for r in records)


@pytest.mark.slow
def test_asha_stops_trials_by_benchmarks_at_rungs(tiny_world: World, tmp_path: Path) -> None:
    records = swept(
        tiny_world,
        tmp_path,
        search={"learning_rate": {"grid": RATES}},
        sampler={"name": "grid"},
        scheduler={"name": "asha", "grace": 0.25, "reduction_factor": 2},
        objective={"metric": "suite_shown", "mode": "max"},
        training={"steps": 16, "batch_size": 4, "micro_batch_size": 2, "dtype": "fp32"},
        evaluation={"suite_at": "rungs", "points": 4},
    )
    complete = [r for r in records if r.state == "COMPLETE"]
    stopped = [r for r in records if r.state == "PRUNED"]
    assert len(records) == len(RATES) == len(complete) + len(stopped) and complete and stopped
    assert all(["suite_shown" in row for row in r.curve] == [True, True, True, False] for r in complete)
    assert all(r.curve and all("suite_shown" in row for row in r.curve) for r in stopped), "no row without its benchmarks"
    for r in stopped:
        row = r.curve[-1]
        before = [one for other in records if other.id < r.id for one in other.curve if one["rung"] == row["rung"]]
        assert any(one["suite_shown"] > row["suite_shown"] for one in before)
    assert all(r.details["suite_limit"] is None and len(r.details["suite_standard_errors"]) == 3 for r in complete)


@pytest.mark.slow
def test_benchmarks_are_looked_for_together_with_what_a_trial_costs(tiny_world: World, tmp_path: Path) -> None:
    records = swept(
        tiny_world,
        tmp_path,
        search={"learning_rate": {"log_uniform": [1e-5, 1e-2]}},
        sampler={"name": "tpe", "num_trials": 3},
        scheduler={"name": "none"},
        objective=[{"metric": "suite"}, {"metric": "accelerator_seconds"}],
        evaluation={"suite_limit": 3},
    )
    assert [r.state for r in records] == ["COMPLETE"] * 3
    of = {r.id: ((r.metrics["suite"] or 0.0), r.accelerator_seconds) for r in records}
    assert all(seconds > 0 for _, seconds in of.values()) and len(set(of.values())) == 3
    unbeaten = {
        id for id, (high, low) in of.items() if not any(h >= high and s <= low and (h, s) != (high, low) for h, s in of.values())
    }
    folder = tmp_path / "results" / "tiny"
    front = json.loads((folder / "guidelines.json").read_text())["front"]
    assert {trial for member in front for trial in member["trials"]} == unbeaten
    for member in front:
        (trial,) = member["trials"]
        assert tuple(member["values"].values()) == of[trial] and list(member["values"]) == ["suite", "accelerator_seconds"]
    best = max(of, key=lambda id: of[id][0])
    assert front[0]["trials"] == [best], "the first objective ranks, and a higher one is better"
    report = (folder / "report.md").read_text()
    assert "beaten by no other in asked v1 (first 3 items of a task), accelerator_seconds:" in report
    directions = optuna.load_study(study_name="tiny", storage=f"sqlite:///{folder / 'study.db'}").directions
    assert [direction.name for direction in directions] == ["MAXIMIZE", "MINIMIZE"]

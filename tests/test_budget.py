"""Does a sweep stop where its budget ends, and go on counting after a resume? The sums on made-up records and journals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from planted import sweep

from neo_ray.budget import exhausted, hours_of, share_text
from neo_ray.config import BudgetConfig
from neo_ray.plan import make_plan
from neo_ray.plan_text import render
from neo_ray.records import Journal, TrialRecord, fold
from neo_ray.searcher import StudySearch, open_study
from neo_ray.space import build_space
from neo_ray.tuner import _Recorder

RECORDS = [
    TrialRecord(id="0000", state="COMPLETE", tokens=600, accelerator_seconds=5400),
    TrialRecord(id="0001", tokens=400, accelerator_seconds=1800),
]


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({}, None),
        ({"trials": 3}, None),
        ({"trials": 2}, "trials: 2 of 2"),
        ({"tokens": 1001}, None),
        ({"tokens": 1000}, "tokens: 1,000 of 1,000"),
        ({"accelerator_hours": 1.5}, "accelerator_hours: 2 of 1.5"),
        ({"hours": 0.5, "trials": 9}, "hours: 0.75 of 0.5"),
        ({"hours": 1}, None),
    ],
)
def test_whichever_comes_first_ends_it(budget: dict[str, Any], words: str | None) -> None:
    assert exhausted(BudgetConfig(**budget), RECORDS, 0.75) == words


def test_a_trial_that_was_begun_counts_once() -> None:
    assert exhausted(BudgetConfig(trials=2), RECORDS, 0, resuming=True) is None
    assert exhausted(BudgetConfig(tokens=10), RECORDS, 0, resuming=True)


def test_the_share_is_that_of_what_ends_first() -> None:
    assert share_text(BudgetConfig(trials=8, tokens=2000), RECORDS, 0) == "50 % of the tokens"
    assert share_text(BudgetConfig(), RECORDS, 0) == ""


def test_hours_are_those_in_which_a_driver_ran() -> None:
    times = [("start", 50), ("session", 100), ("start", 400), ("report", 1000)]
    times += [("targets", 89_000), ("session", 90_000), ("end", 90_900)]  # between the two nobody ran trials
    events = [{"event": event, "trial": "0000" if event in ("start", "report", "end") else "", "time": t} for event, t in times]
    settled = {"event": "end", "trial": "0001", "time": 89_500, "settled": True}
    assert hours_of([*events[:5], settled, *events[5:]]) == pytest.approx((900 + 900) / 3600)
    assert hours_of([]) == 0


def test_no_trial_begins_once_the_budget_is_spent(tmp_path: Path) -> None:
    config = sweep(storage={"path": str(tmp_path)}, budget={"trials": 4, "tokens": 1000})
    space, said = build_space(config), list[str]()
    progress: Any = SimpleNamespace(say=said.append, update=lambda *_: None)
    begun = TrialRecord(id="0000", params={"rank": 4, "alpha": 8.0, "learning_rate": 1e-3, "kd_ratio": 0.5}, tokens=900)
    recorder = _Recorder(config, space, [begun], None, progress, None)  # type: ignore[arg-type]
    ids = iter(range(1, 9))
    given = [("0000", begun.params, 0)]
    study = open_study(config, space, [])
    search = StudySearch(config, space, study, given, lambda: f"{next(ids):04d}", recorder.started, recorder.may_begin)
    asked = [search.suggest(f"tune-{i}") for i in range(3)]
    assert [a["trial"] for a in asked if isinstance(a, dict)] == ["0000", "0001", "0002"] and not said
    recorder._record("report", "0001", row={"rung": 1, "tokens": 100})
    assert [search.suggest("tune-3"), search.suggest("tune-4")] == ["FINISHED", "FINISHED"]
    assert said == ["the budget is spent (tokens: 1,000 of 1,000): no trial begins any more, those that run go to their end"]
    search.room, search.may_begin = (lambda: 0), lambda trial: 1 / 0  # type: ignore[assignment]
    assert search.suggest("tune-5") is None, "without room nobody adds up what is spent"
    assert len(fold(Journal(config.folder).events())) == 2, "the beginning of a session is no trial"


def test_the_plan_prices_the_sweep() -> None:
    text = render(make_plan(sweep(training={"tokens": 5000}, budget={"tokens": 20_000, "hours": 2})))
    assert "at most 120,000 in all trials; their time is known once the first have finished" in text
    assert "budget     tokens 20,000, hours 2" in text

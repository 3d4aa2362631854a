"""Does the scheduler stop the right trials, and the same ones after an interruption? ASHA on made-up results."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from planted import sweep

from neo_ray.records import TrialRecord
from neo_ray.searcher import Asha

ASHA = {"name": "asha", "grace": 0.25, "reduction_factor": 2}


def scheduler(points: int = 8, **changes: Any) -> Asha:
    return Asha(sweep(evaluation={"points": points}, scheduler={**ASHA, **changes}))


def report(asha: Asha, trial: str, rung: int, value: float | None) -> str:
    stub = SimpleNamespace(trial_id=f"tune-{trial}", config={"trial": trial})
    if trial not in asha._trial_info:
        asha.on_trial_add(None, stub)
    return asha.on_trial_result(None, stub, {"rung": rung, "select_ce": value})


@pytest.mark.parametrize(
    ("points", "grace", "factor", "rungs"),
    [
        (4, 0.5, 2, (2,)),
        (4, 0.25, 2, (1, 2)),
        (8, 0.25, 2, (2, 4)),
        (8, 0.25, 3, (2, 6)),
        (4, 1.0, 2, ()),
        (4, 0.1, 1.5, (1, 2, 3)),
    ],
)
def test_rungs_are_those_that_the_config_names(points: int, grace: float, factor: float, rungs: tuple[int, ...]) -> None:
    asha = scheduler(points, grace=grace, reduction_factor=factor)
    assert asha.rungs == rungs
    assert [rung for rung, _ in reversed(asha._brackets[0]._rungs)] == list(rungs)


def test_the_worse_half_is_stopped_at_a_rung_and_nowhere_else() -> None:
    asha = scheduler()
    assert report(asha, "a", 2, 4.0) == "CONTINUE"
    assert report(asha, "b", 1, 9.0) == "CONTINUE", "no rung"
    assert report(asha, "b", 2, 4.5) == "STOP"
    assert report(asha, "c", 2, 3.5) == "CONTINUE"
    assert report(asha, "d", 2, None) == "CONTINUE", "no value is no bad value"
    assert report(asha, "c", 8, 9.0) == "CONTINUE", "the last evaluation stops nobody"


def test_a_value_from_beyond_a_rung_is_not_counted_at_it() -> None:
    asha = scheduler()
    report(asha, "a", 2, 5.0)
    report(asha, "late", 4, 3.0)  # its first report: a large batch stepped over rung 2
    report(asha, "late", 6, 2.0)
    recorded = dict(asha._brackets[0]._rungs)
    assert recorded[2] == {"a": -5.0} and recorded[4] == {"late": -3.0}


def test_replay_fills_the_rungs_and_a_resumed_trial_meets_its_own_value() -> None:
    rows = [{"rung": rung, "select_ce": 4.0 - rung / 10} for rung in (1, 2, 3, 4)]
    asha = scheduler()
    asha.replay([TrialRecord(id="a", curve=rows), TrialRecord(id="b", curve=[{"rung": 2, "select_ce": 5.0}])])
    recorded = dict(asha._brackets[0]._rungs)
    assert recorded[2] == {"a": -3.8, "b": -5.0} and recorded[4] == {"a": -3.6}
    assert report(asha, "a", 2, 3.8) == "CONTINUE", "reported again after it resumed"
    assert report(asha, "c", 2, 4.6) == "STOP"

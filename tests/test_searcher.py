"""Does the scheduler stop the right trials, and the same ones after an interruption? On made-up results."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from planted import sweep

from neo_ray.records import TrialRecord
from neo_ray.schedulers import Asha, Hyperband, Median, make_scheduler

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


CURVES = {f"{i:04d}": [5 - rung * (0.1 + (i * 7 % 12) / 40) for rung in range(8)] for i in range(12)}


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 6])
def test_a_resumed_scheduler_stops_what_an_uninterrupted_one_stops(name: str, at: int) -> None:
    config = sweep(evaluation={"points": 8}, scheduler={**ASHA, "name": name})
    whole = drive(make_scheduler(config, []), {}, 1, 8)
    first = drive(make_scheduler(config, []), {}, 1, at)
    running = {t: len(whole[t]) > at for t in first}  # the others were stopped before
    records = [TrialRecord(id=t, curve=rows(curve), state="RUNNING" if running[t] else "PRUNED") for t, curve in first.items()]
    again = drive(make_scheduler(config, records), {t: c for t, c in first.items() if not running[t]}, 1, 8)
    assert again == whole
    assert any(len(curve) < 8 for curve in whole.values()) and any(len(curve) == 8 for curve in whole.values())


def rows(values: list[float]) -> list[dict[str, Any]]:
    return [{"rung": rung, "select_ce": value} for rung, value in enumerate(values, 1)]


def drive(scheduler: Any, ended: dict[str, list[float]], first: int, last: int) -> dict[str, list[float]]:
    """What each trial has reported by evaluation `last`, all in lockstep; those that `ended` before do not run."""
    curves, stopped = {t: [] for t in CURVES} | dict(ended), set(ended)
    for trial in set(CURVES) - stopped:
        scheduler.on_trial_add(None, stub_of(trial))
    for rung in range(first, last + 1):
        for trial in [t for t in CURVES if t not in stopped]:
            value = CURVES[trial][rung - 1]
            curves[trial].append(value)
            if scheduler.on_trial_result(None, stub_of(trial), {"rung": rung, "select_ce": value}) == "STOP":
                stopped.add(trial)
    return curves


def stub_of(trial: str) -> Any:
    return SimpleNamespace(trial_id=f"tune-{trial}", config={"trial": trial})


def test_hyperband_spares_some_until_later_rungs_and_draws_a_bracket_by_id() -> None:
    config = sweep(evaluation={"points": 8}, scheduler={**ASHA, "name": "hyperband"})
    one, other = Hyperband(config), Hyperband(config)
    assert [[rung for rung, _ in reversed(b._rungs)] for b in one._brackets] == [[2, 4], [4], []]
    for scheduler, order in ((one, range(300)), (other, reversed(range(300)))):
        for number in order:
            scheduler.on_trial_add(None, stub_of(f"{number:04d}"))
    place = [[b._brackets.index(b._trial_info[f"{n:04d}"]) for n in range(300)] for b in (one, other)]
    assert place[0] == place[1], "not by the order in which they come"
    assert [round(place[0].count(i) / 300, 1) for i in range(3)] == [0.7, 0.2, 0.1]


def test_the_median_rule_never_pauses_and_leaves_the_last_evaluation_alone() -> None:
    median = Median(sweep(evaluation={"points": 4}, scheduler={"name": "median", "grace": 0.25}))
    waiting = SimpleNamespace(get_live_trials=lambda: [SimpleNamespace(status="PENDING")])
    assert median.rungs == (1, 2, 3)
    for trial, value in (("a", 3.0), ("b", 4.0), ("c", 5.0)):
        assert median.on_trial_result(waiting, stub_of(trial), {"rung": 1, "select_ce": value}) == "CONTINUE", "too few are known"
    assert median.on_trial_result(waiting, stub_of("d"), {"rung": 1, "select_ce": 9.0}) == "STOP"
    assert median.on_trial_result(waiting, stub_of("e"), {"rung": 1, "select_ce": 3.5}) == "CONTINUE"
    median.on_trial_complete(None, stub_of("a"), {"state": "COMPLETE", "done": True})
    assert median.on_trial_result(waiting, stub_of("e"), {"rung": 4, "select_ce": 99.0}) == "CONTINUE"
    assert median.on_trial_result(waiting, stub_of("f"), {"rung": 2, "select_ce": None}) == "CONTINUE"

"""What did starting cost? Figures from made-up records."""

from __future__ import annotations

from typing import Any

import pytest

from neo_ray.records import TrialRecord
from neo_ray.startup import lost_attempts_line, startup_line, startup_of


def a_record(number: int, slot: int, ended: float, seconds: float, **changes: Any) -> TrialRecord:
    details = {"slot": slot, "setup_seconds": 0.5, **changes.pop("details", {})}
    fields = {"id": f"{number:04d}", "state": "COMPLETE", "ended": ended, "seconds": seconds, "details": details, **changes}
    return TrialRecord(**fields)


def test_the_figures_are_those_of_the_slots() -> None:
    cold = {"cold_start_seconds": 31.0, "setup_seconds": 6.0}
    records = [
        a_record(0, 0, 100.0, 30.0, details=cold),
        a_record(1, 1, 101.0, 30.0, details=cold),
        a_record(2, 0, 131.0, 30.0),  # 31 s after the slot's last: 30 of the trial, half a second of them its set-up
        a_record(3, 1, 131.0, 29.5),
        a_record(4, 0, 500.0, 30.0, attempts=2),
        a_record(6, 0, 531.0, 30.0),
        a_record(5, 0, 900.0, 30.0, details=cold),  # other workers in the same place
    ]
    found = startup_of(records)
    assert found.cold_starts == (31.0, 31.0, 31.0) and found.setups == (0.5, 0.5, 0.5)
    assert (found.outside, found.between) == (pytest.approx(1.5 + 1.0 + 1.5), pytest.approx(92.0))
    assert startup_line(records) == (
        "Start-up: cold start 31 s once a slot (3 in all); 0.5 s a trial after that; 4.3 % of the warm workers' time outside "
        "training and evaluation (3 trials)."
    )
    assert startup_line(records[:2]) == "Start-up: cold start 31 s once a slot (2 in all); no slot ran a second trial."
    assert startup_line([TrialRecord(id="0000")]) is None


def test_what_was_lost_stands_beside_the_failures() -> None:
    lost = [{"cause": "preempted", "message": "its node is gone"}, {"cause": "out_of_memory", "message": "halved"}]
    text = lost_attempts_line([a_record(3, 0, 1.0, 1.0, lost_attempts=lost)])
    assert text == "Attempts that were lost and gone on with: 1 preempted (trials 0003); 1 out of memory (trials 0003)."
    assert lost_attempts_line([TrialRecord(id="0000")]) is None

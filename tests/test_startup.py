"""What did starting cost? Figures from made-up records."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import pytest

from neo_ray.records import TrialRecord, load_records
from neo_ray.report import failure_rows
from neo_ray.startup import lost_attempts_line, startup_line, startup_of, stops_line


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
    log = {"log": "trials/0004/rank-0.log"}
    ended = a_record(
        4, 0, 1.0, 1.0, state="FAILED", cause="out_of_memory", error="no room\nleft", lost_attempts=lost[1:], details=log
    )
    assert failure_rows([a_record(3, 0, 1.0, 1.0, lost_attempts=lost), ended]) == [
        ("out_of_memory", "FAILED", "1", "0004", "no room left", "trials/0004/rank-0.log"),
        ("out_of_memory", "tried again", "2", "0003, 0004", "halved", ""),
        ("preempted", "tried again", "1", "0003", "its node is gone", ""),
    ]


def test_how_soon_a_stop_frees_its_slot() -> None:
    stopped = [a_record(i, 0, 1.0, 1.0, state="PRUNED", details={"stop_seconds": s}) for i, s in enumerate([0.4, 0.5, 3.0])]
    assert stops_line([*stopped, a_record(3, 0, 2.0, 1.0)]) == (
        "Early stopping: 3 trials left their slots 0.5 s after they were stopped (median; at most 3 s), the step that they were "
        "in included."
    )
    assert stops_line([a_record(3, 0, 2.0, 1.0)]) is None


def test_what_lay_between_the_trials_of_the_study_is_little() -> None:
    """16 trials; what a slot's first one took stands apart. Of trials of 30 s the same time is at most a twentieth, too."""
    records = load_records(Path(__file__).parent.parent / "docs" / "studies" / "warm")
    found = startup_of(records)
    assert [r.state for r in records] == 16 * ["COMPLETE"] and len(found.cold_starts) == 2 and len(found.setups) == 14
    assert median(r.seconds for r in records) > 30 and max(found.setups) < 2
    assert found.outside <= 0.05 * 30 * len(found.setups) <= 0.05 * found.between

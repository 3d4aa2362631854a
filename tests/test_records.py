"""The journal: append-only, torn lines, and the records it folds to."""

from __future__ import annotations

from pathlib import Path

import pytest

from neo_ray.records import Journal, TrialRecord, apply, fold, load_records, settle, write_records
from neo_ray.trials import retried


@pytest.mark.parametrize("kind", ["local", "object store"])
def test_events_fold_to_records(kind: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path if kind == "local" else f"memory://{tmp_path.name}")
    journal.write("start", "0001", params={"rank": 4}, seed=3)
    journal.write("report", "0001", row={"rung": 1, "step": 5, "tokens": 100, "select_ce": 4.0})
    journal.write("report", "0001", row={"rung": 1, "step": 5, "tokens": 100, "select_ce": 9.0})
    journal.write("attempt", "0001")
    journal.write("end", "0001", state="FAILED", cause="diverged", metrics={"report_ce": float("nan")})
    (record,) = fold(journal.events())
    assert (record.state, record.cause, record.attempts, record.seed, record.tokens) == ("FAILED", "diverged", 2, 3, 100)
    assert record.metrics == {"select_ce": 4.0, "report_ce": None}, "the first report of a rung counts; NaN is no number"


def test_a_torn_line_costs_nothing_but_itself(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("start", "0001", params={})
    with open(tmp_path / "journal.jsonl", "a") as file:
        file.write('{"event": "report", "trial": "0001", "row": {"ru')
    journal.write("report", "0001", row="of another kind")
    journal.write("start", "0002", params=7)
    journal.write("end", "0001", state="COMPLETE")
    (record,) = fold(journal.events())
    assert record.state == "COMPLETE"


def test_records_alone_can_be_read_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "whole")
    journal.write("start", "0001", params={"rank": 4})
    records = fold(journal.events())
    write_records(tmp_path, records)
    (tmp_path / "trials.jsonl").open("a").write("garbage\n")
    assert load_records(tmp_path) == records
    with pytest.raises(ValueError, match="no such file"):
        load_records(tmp_path / "nothing")


def test_events_applied_as_they_are_written_are_what_a_reader_folds(tmp_path: Path) -> None:
    journal, records = Journal(tmp_path), dict[str, TrialRecord]()
    apply(records, journal.write("start", "0001", params={"rank": 4}))
    apply(records, journal.write("report", "0001", row={"rung": 1, "select_ce": float("inf")}))
    apply(records, journal.write("end", "0001", state="COMPLETE", tokens=7))
    assert list(records.values()) == fold(journal.events())


def test_a_trial_that_was_stopped_before_its_slot_died_is_pruned_when_the_sweep_goes_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for name in ("0000", "0001"):
        journal.write("start", name)
    journal.write("stop", "0000")
    assert [r.finished for r in fold(journal.events())] == [False, False]
    assert [r.state for r in settle(journal, journal.events())] == ["PRUNED", "RUNNING"]
    assert [r.state for r in fold(journal.events())] == ["PRUNED", "RUNNING"], "it is in the journal"


def test_another_attempt_takes_a_failure_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("start", "0000")
    journal.write("end", "0000", state="FAILED", cause="error", error="no weights")
    (failed,) = fold(journal.events())
    (again,) = retried([failed], failed_too=True)
    assert failed.state == "FAILED" and not again.finished and retried([failed], failed_too=False) == [failed]
    diverged = failed.model_copy(update={"cause": "diverged"})
    assert retried([diverged], failed_too=True) == [diverged]
    journal.write("attempt", "0000")
    (record,) = fold(journal.events())
    assert (record.state, record.cause, record.error, record.attempts) == ("RUNNING", None, None, 2)
    journal.write("attempt", "0000", cause="preempted", message="its node is gone")
    journal.write("attempt", "0000")
    (record,) = fold(journal.events())
    assert [lost["cause"] for lost in record.lost_attempts] == ["error", "preempted", "interrupted"], "each has its cause"
    assert [lost["message"] for lost in record.lost_attempts] == ["no weights", "its node is gone", None]

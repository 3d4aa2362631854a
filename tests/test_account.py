"""Is what the teacher read counted once, whatever was resumed, extended or filled by another? Reference: sums by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neo_ray.account import NO_TRIAL, account, account_line
from neo_ray.records import Journal, TrialRecord, fold


def told(number: int, teacher: int = 0, rows: int = 0, spared: int = 0) -> TrialRecord:
    counts = {"teacher_tokens": teacher, "target_rows": rows, "spared_tokens": spared}
    return TrialRecord(id=f"{number:04d}", details=counts)


def filled(shard: str, tokens: int, fill: str = "a") -> dict[str, Any]:
    return {"event": "filled", "trial": NO_TRIAL, "fill": fill, "shard": shard, "tokens": tokens, "seconds": 0.5}


def whole(tokens: int, store: str = "s", restarts: int = 0) -> dict[str, Any]:
    sums = {"tokens": tokens, "rows": tokens - 10, "labels": tokens - 10, "restarts": restarts}
    return {"event": "targets", "trial": NO_TRIAL, "store": store, **sums}


STORED = [told(0, rows=50, spared=70), told(1, rows=50, spared=60)]


def test_a_store_filled_once_is_counted_once_however_often_the_sweep_went_on() -> None:
    events = [filled("train-0", 100), filled("train-1", 40), whole(140, restarts=1), whole(140)]
    found = account(events, STORED)
    assert (found.builder_tokens, found.store_tokens, found.store_rows, found.labels) == (140, 140, 130, 130)
    assert (found.builder_seconds, found.restarts, found.target_rows) == (1.0, 1, 100)
    assert account_line(found) == "The teacher read 140 tokens once for 2 trials; live it would have been 130."


def test_the_line_says_what_stood_there_before_and_what_was_read_again() -> None:
    def line(*events: dict[str, Any]) -> str:
        return str(account_line(account(events, STORED)))

    assert line(whole(140)).startswith("The teacher read none of the store's 140 tokens, which stood there before, for 2 trials;")
    assert "read 40 of the store's 140 tokens" in line(filled("train-1", 40), whole(140))
    again = [filled("train-0", 140), whole(140), filled("train-0", 140, fill="b"), whole(140)]
    assert "read 280 tokens, 140 of them again" in line(*again)


def test_records_without_their_journal_do_not_say_that_nothing_was_read() -> None:
    line = account_line(account([], STORED))
    assert line == "What the teacher read for stored targets is not told here; live it would have been 130 tokens."


def test_a_living_teacher_is_counted_by_its_trials() -> None:
    line = account_line(account([], [told(0, teacher=1_000), told(1, teacher=500), TrialRecord(id="0002")]))
    assert line == "The teacher read 1,500 tokens, alive in 2 trials."
    assert account_line(account([], [TrialRecord(id="0000")])) is None


def test_events_without_a_trial_are_no_records(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("filling", NO_TRIAL, fill="a", store="s")
    journal.write("start", "0000", params={})
    journal.write("filled", NO_TRIAL, fill="a", shard="train-0", tokens=1, seconds=0.0)
    assert [record.id for record in fold(journal.events())] == ["0000"]
    assert account(journal.events(), []).fills == {"a"} and account(journal.events(), []).filled == {("a", "train-0")}

"""Does a person see how far sweep and teacher are? Plain lines in a log; in a terminal a bar, and a table of running trials."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from planted import sweep
from rich.console import Console

from neo_ray import progress
from neo_ray.progress import Filling, Progress
from neo_ray.records import TrialRecord
from neo_ray.running import MOST_ROWS, Row, rows_of, table
from neo_ray.uploads import SOURCES_FILE


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, as a test sets them."""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def terminal(is_one: bool, width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_one, width=width)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("console", [None, terminal(False)])
def test_a_log_has_a_line_every_ten_seconds_with_the_speed_and_the_time_left(clock: list[float], console: Console | None) -> None:
    said: list[str] = []
    with Filling(6_000, said.append, console) as filling:
        clock[0] += 300  # a worker comes, and loads the teacher: no time of reading
        filling.add(0)
        clock[0] += 4
        filling.add(800)
        assert said == ["  800 of 6,000 tokens, 200 tokens/s, about 26 s left"], "five minutes were silent"
        clock[0] += 4
        filling.add(800)
        assert len(said) == 1
        clock[0] += 8
        filling.add(1_600)
        assert said[1:] == ["  3,200 of 6,000 tokens, 200 tokens/s, about 14 s left"]
    assert (filling.seen, filling.rate) == (3_200, 200.0)


def test_a_terminal_has_a_bar_and_no_lines(clock: list[float]) -> None:
    said: list[str] = []
    console = terminal(True)
    with Filling(6_000, said.append, console) as filling:
        assert filling.live is not None
        filling.live.refresh()
        assert "[························] 0 of 6,000 tokens, the teacher is loading" in shown(console)
        filling.add(0)
        clock[0] += 20
        filling.add(3_000)
        filling.live.refresh()
        assert "[████████████············] 3,000 of 6,000 tokens, 150 tokens/s, about 20 s left" in shown(console)
    assert not said


@pytest.mark.parametrize("is_one", [False, True])
def test_who_waits_for_a_worker_is_told_so_once_a_minute(clock: list[float], is_one: bool) -> None:
    said: list[str] = []
    console = terminal(is_one)
    with Filling(6_000, said.append, console) as filling:
        for _ in range(13):
            clock[0] += 10
            filling.silent(3)
        filling.add(100)
        clock[0] += 100
        filling.silent(3)
    lines = [line for line in [*said, *shown(console).splitlines()] if "waiting for room for the teacher (3 workers" in line]
    assert len(lines) == 1


def record(number: int, *values: float, **fields: Any) -> TrialRecord:
    """A trial with an evaluation for each value of the objective; its training loss is 1 more."""
    curve = [{"rung": k, "step": 10 * k, "select_ce": v, "train_loss": v + 1} for k, v in enumerate(values, 1)]
    params = {"rank": 8, "learning_rate": 0.00123456}
    metrics = {"select_ce": values[-1]} if values else {}
    return TrialRecord(
        id=f"{number:04d}", params=params, curve=curve, metrics=metrics, steps=10 * len(values), **{"phase": "map", **fields}
    )


def running(shown_of: Console, *records: TrialRecord, given: dict[str, Any] | None = None, **changes: Any) -> Progress:
    """`given`: of the section `evaluation`."""
    return Progress(sweep(evaluation={"points": 4, **(given or {})}, **changes), shown_of, 24, 2, list(records))


def last_view(console: Console) -> list[str]:
    """The lines that stand in the terminal, as words."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(console)).replace("\r", "\n")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    begins = [index for index, line in enumerate(lines) if line.startswith("trial ")]
    return lines[begins[-1] :] if begins else lines[-1:]


def test_a_row_says_where_a_trial_is_and_what_is_not_known_is_no_number() -> None:
    config = sweep(evaluation={"points": 4})
    diverging, begun, ended = record(2, 4.5, 4.75), record(1), record(0, 4.0, state="COMPLETE")
    assert rows_of([ended, begun, diverging], {"0002": 7}, config) == [
        Row("0002", "map", "slot 7", "20 (2/4)", "5.7500", "4.5000", "rank 8, learning_rate 0.00123"),
        Row("0001", "map", "waits", "–", "–", "–", "rank 8, learning_rate 0.00123"),
    ]
    upward = sweep(objective={"metric": "suite"})
    scored = TrialRecord(id="0000", curve=[{"rung": 1, "suite": 0.25}, {"rung": 2, "suite": 0.5}, {"rung": 3, "suite": None}])
    assert rows_of([scored], {}, upward)[0].best == "0.5000"


def test_a_terminal_has_a_table_of_running_trials_above_the_bar_and_a_line_for_each_that_ends() -> None:
    console = terminal(True, 140)
    with running(console, record(0, 4.0, state="COMPLETE"), record(1)) as shown_to:
        assert shown_to.live is not None
        shown_to.taken("0001", 3)
        shown_to.update(record(1, 4.5), "report")
        shown_to.live.refresh()
        head, row, below = last_view(console)
        assert head == "trial worker step loss best select_ce setting"
        assert row == "0001 slot 3 10 (1/4) 5.5000 4.5000 rank 8, learning_rate 0.00123"
        assert below.startswith("[█·······················] 1/24 trials · 1 running · best select_ce 4.0000 (0000)")
        assert "0001 1/4" not in shown(console), "a report has no line of its own"
        shown_to.update(record(1, 4.5), "attempt")
        shown_to.live.refresh()
        assert last_view(console)[1].startswith("0001 waits"), "its worker died"
        shown_to.update(record(1, 4.5, 4.25, state="PRUNED"), "end")
        assert "  0001 PRUNED: select_ce 4.2500 · rank 8, learning_rate 0.00123 · 0 s" in shown(console)
        assert not shown_to.live.renderable.renderables[0:-1], "nobody runs: a bar alone"  # type: ignore[union-attr]


def test_a_log_has_plain_lines_and_no_table() -> None:
    console = terminal(False)
    with running(console, record(0, 4.0, state="COMPLETE"), record(1)) as shown_to:
        shown_to.taken("0001", 3)
        shown_to.update(record(1, 4.5), "report")
        shown_to.update(record(1, 4.5, 4.25, state="PRUNED"), "end")
    assert shown(console).splitlines() == [
        "  0001 1/4 select_ce 4.5000",
        "  0001 PRUNED: select_ce 4.2500 · rank 8, learning_rate 0.00123 · 0 s   "
        "[2/24 trials · 1 pruned · best select_ce 4.0000 (0000) · time left not known yet]",
    ]


@pytest.mark.parametrize(
    ("metric", "limit", "name"),
    [
        ("suite", None, "my-own v3"),
        ("suite", 50, "my-own v3 (first 50 items of a task)"),
        ("suite_a", None, "a of my-own v3"),
        ("suite_a", 50, "a of my-own v3 (first 50 items of a task)"),
    ],
)
@pytest.mark.parametrize("is_one", [False, True])
def test_the_suite_s_name_and_version_stand_beside_every_value_of_benchmarks(
    tmp_path: Path, is_one: bool, metric: str, limit: int | None, name: str
) -> None:
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / SOURCES_FILE).write_text('{"evaluation.suite": "my-own-3-0123456789abcdef"}', encoding="utf-8")
    asked = {"storage": {"path": str(tmp_path)}, "objective": {"metric": metric}, "scheduler": {"name": "none"}}
    console = terminal(is_one, 200)
    with running(console, record(1), **asked, given={"suite": "./own", "suite_limit": limit, "suite_at": "rungs"}) as shown_to:
        scored = record(1).model_copy(update={"curve": [{"rung": 1, "step": 10, metric: 0.25}], "metrics": {metric: 0.25}})
        shown_to.update(scored, "report")
        if shown_to.live is not None:
            shown_to.live.refresh()
            assert f"best {name}"[:29] in last_view(console)[0]
        shown_to.update(scored.model_copy(update={"state": "COMPLETE"}), "end")
        assert f"best {name} 0.2500 (0001)" in shown_to.summary()
    words = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(console))
    assert f"  0001 COMPLETE: {name} 0.2500" in words and (is_one or f"  0001 1/4 {name} 0.2500" in words)
    assert metric not in words


def test_a_study_of_phases_shows_them_and_a_narrow_terminal_cuts_the_setting() -> None:
    config = sweep(evaluation={"points": 4}, phases={"map": {"sampler": {"name": "random"}}}, sampler={}, scheduler={})
    console = Console(file=io.StringIO(), force_terminal=False, width=90)
    console.print(table(rows_of([record(1, 4.5)], {"0001": 0}, config), config, "own v3 (first 50 items of a task)"))
    head, row = shown(console).splitlines()
    assert " ".join(head.split()) == "trial phase worker step loss best own v3 (first 50 items o… setting"
    assert row.split()[:4] == ["0001", "map", "slot", "0"] and row.rstrip().endswith("…") and "5.5000" in row


def test_very_many_trials_leave_room_in_the_terminal() -> None:
    config = sweep()
    console = Console(file=io.StringIO(), width=100)
    console.print(table(rows_of([record(number) for number in range(MOST_ROWS + 5)], {}, config), config, "select_ce"))
    lines = shown(console).splitlines()
    assert len(lines) == MOST_ROWS + 2 and lines[-1].split() == ["…", "and", "5", "more"]

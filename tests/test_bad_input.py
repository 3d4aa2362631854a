"""Reference: the exit codes of `--help`. Whatever stands in the files, the door says what can be said, and ends with 0 or 2.

All in this process, so that a traceback is a test that fails.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from planted import draw, planted, sweep, trial, valley

from neo_ray import analyze
from neo_ray.analyze import analyse, main
from neo_ray.loading import dump
from neo_ray.records import Journal, load_records, write_records

COLUMNS = ["--metric", "loss", "--param", "rank", "--param", "lr"]
GOOD = b"rank,lr,loss\n" + b"".join(f"{r},{lr},{r * lr + 1}\n".encode() for r in (4, 8, 16) for lr in (1e-4, 1e-3, 1e-2))
START = b'{"event": "start", "trial": "a", "time": 1, "params": {"rank": 4}, "config": {}, "seed": 0}\n'
END = b'{"event": "end", "trial": "a", "time": 9, "state": "COMPLETE", "metrics": {"select_ce": 4.5}}\n'


@pytest.fixture(autouse=True)
def words_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page with its figures is drawn by the tests that look at it; here it would take most of the time."""
    monkeypatch.setattr("neo_ray.page.page", lambda analysis: "")


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that was said."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


TABLES: dict[str, tuple[bytes, list[str], str]] = {
    "empty": (b"", COLUMNS, "holds no row"),
    "a header alone": (b"rank,lr,loss\n", COLUMNS, "holds no row"),
    "no metric named": (GOOD, COLUMNS[2:], "say what is ranked by: --metric COLUMN (columns: rank, lr, loss)"),
    "no parameter named": (GOOD, COLUMNS[:2], "say which columns are parameters"),
    "without the metric": (GOOD.replace(b"loss", b"lost"), COLUMNS, "has no column loss (did you mean `lost`?)"),
    "without a parameter": (GOOD.replace(b"lr", b"alpha"), COLUMNS, "has no column lr"),
    "without the group": (GOOD, [*COLUMNS, "--group", "model"], "has no column model"),
    "the metric as a parameter": (GOOD, [*COLUMNS, "--param", "x=loss"], "is not loss, which is ranked by"),
    "a parameter without a name": (GOOD, [*COLUMNS, "--param", "=rank"], "a parameter has a name"),
    "binary": (bytes(range(256)) * 40, COLUMNS, "has no column loss"),
    "a metric that a torn quote swallows": (b'rank,"lr,loss\n4,1e-3,1\n', COLUMNS, "holds no row"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_tells_nothing_is_one_line_and_exit_code_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, words, said = TABLES[case]
    table = tmp_path / "t.csv"
    table.write_bytes(content)
    assert main([str(table), *words]) == 2
    assert said in refused(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


SAID: dict[str, tuple[bytes, str]] = {
    "one row": (b"rank,lr,loss\n4,1e-3,1\n", "rank is 4 in every trial: nothing can be said of it"),
    "one value on an axis": (GOOD.replace(b"8,", b"4,").replace(b"16,", b"4,"), "rank is 4 in every trial: nothing can be said"),
    "text for numbers": (b"rank,lr,loss\n" + b"a,b,c\n" * 6, "No COMPLETE trial has a value of loss"),
    "empty cells": (GOOD + b"8,,1.2\n,,\n8,1e-2,\n16\n4,1e-2,1.4,9,9\n", "1 line of it could not be read"),
    "NaN and infinity": (GOOD + b"4,nan,1\ninf,1e-3,2\n8,1e-3,nan\n8,1e-3,-inf\n", "2 trials diverged"),
    "NaN alone": (b"rank,lr,loss\n" + b"4,1e-3,nan\n8,1e-3,inf\n" * 3, "No COMPLETE trial has a value of loss"),
    "enormous numbers": (b"rank,lr,loss\n1e308,1e-320,1e308\n-1e308,1e300,-1e308\n" + GOOD[13:], "2 trials diverged"),
    "not positive": (b"rank,lr,loss\n-4,0,1\n-8,0,2\n0,0,3\n4,-1,2\n8,1,4\n4,2,2.5\n", "6 trials: 6 COMPLETE"),
    "mixed encodings": (GOOD + "4,1e-3,1.0,é\n".encode("latin-1") + "8,1e-3,1.0,é\n".encode(), "11 trials: 11 COMPLETE"),
    "a cell of a megabyte": (GOOD + b'"' + b"x" * 1_000_000 + b'",1e-3,2\n', "10 trials: 10 COMPLETE"),
    "zero bytes": (GOOD.replace(b"4,", b"4\0,"), "9 trials: 9 COMPLETE"),
}


@pytest.mark.parametrize("case", SAID)
def test_a_strange_table_ends_in_statements(case: str, tmp_path: Path) -> None:
    content, said = SAID[case]
    (tmp_path / "t.csv").write_bytes(content)
    assert main([str(tmp_path / "t.csv"), *COLUMNS]) == 0
    report = (tmp_path / "t-report" / "report.md").read_text(encoding="utf-8")
    assert said in report and " nan" not in report.replace("NaN", "")
    json.loads((tmp_path / "t-report" / "guidelines.json").read_text(), parse_constant=lambda name: pytest.fail(name))


ALIEN: dict[str, bytes] = {
    "zeros": b"\0" * 64 + b"\n",
    "no UTF-8": b"\xff\xfe garbage\n",
    "half a line": b'{"event": "report", "tri',
    "a list": b"[1, 2]\n",
    "brackets without end": b"[" * 100_000 + b"\n",
    "half of a surrogate pair": b'{"event": "end", "trial": "a", "time": 2, "state": "FAILED", "error": "\\ud800"}\n',
    "a report without a row": b'{"event": "report", "trial": "a", "time": 2}\n',
    "a row that is a number": b'{"event": "report", "trial": "a", "time": 2, "row": 5}\n',
    "a row without a rung": b'{"event": "report", "trial": "a", "time": 2, "row": {"select_ce": 1}}\n',
    "a rung that is null": b'{"event": "report", "trial": "a", "time": 2, "row": {"rung": null}}\n',
    "a metric that is text": b'{"event": "report", "trial": "a", "time": 2, "row": {"rung": 1, "select_ce": "low"}}\n',
    "tokens that are text": b'{"event": "report", "trial": "a", "time": 2, "row": {"rung": 1, "tokens": "many"}}\n',
    "an end without a state": b'{"event": "end", "trial": "a", "time": 3}\n',
    "a state that is none": b'{"event": "end", "trial": "a", "time": 3, "state": "BOGUS"}\n',
    "an error that is a number": b'{"event": "end", "trial": "a", "time": 3, "state": "FAILED", "error": 5}\n',
    "metrics that are a list": b'{"event": "end", "trial": "a", "time": 3, "state": "COMPLETE", "metrics": {"select_ce": [1]}}\n',
    "a trial that is a list": b'{"event": "start", "trial": [1], "time": 3}\n',
}


@pytest.mark.parametrize("case", ALIEN)
def test_a_line_that_is_no_event_hides_no_trial_and_is_counted(case: str, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(START + ALIEN[case].rstrip(b"\n") + b"\n" + END)
    assert main([str(tmp_path)]) == 0
    (record,) = load_records(tmp_path)
    assert (record.state, record.metrics, record.curve) == ("COMPLETE", {"select_ce": 4.5}, [])
    assert "1 line of the records could not be read" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_numbers_that_stand_as_text_are_numbers(tmp_path: Path) -> None:
    row = b'{"event": "report", "trial": "a", "time": 2, "row": {"rung": 1, "select_ce": "4.25", "tokens": 10}}\n'
    (tmp_path / "journal.jsonl").write_bytes(START + row + END.replace(b'"select_ce": 4.5', b'"report_ce": "4.5"'))
    (record,) = load_records(tmp_path)
    assert (
        record.metrics == {"select_ce": 4.25, "report_ce": 4.5} and record.curve[0]["select_ce"] == 4.25 and record.tokens == 10
    )


def test_a_sweep_that_still_runs_is_analysed_at_every_byte_of_its_last_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for i, params in enumerate(draw(8, 0)):
        journal.write("start", f"t{i}", params=params, config={}, seed=0)
        journal.write("report", f"t{i}", row={"rung": 1, "tokens": 10, "step": 1, "seconds": 1.0, "select_ce": valley(params)})
        journal.write("end", f"t{i}", state="COMPLETE", metrics={"report_ce": valley(params)})
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    *_, report, end = (len(line) for line in whole.splitlines(keepends=True))
    seen = set()
    for cut in range(len(whole) - end - report, len(whole) + 1):
        path.write_bytes(whole[:cut])
        unread: list[object] = []
        last = load_records(tmp_path, unread)[7]
        seen.add((last.state, len(last.curve), len(unread)))
    torn = {("RUNNING", 0, 1), ("RUNNING", 1, 1)}
    assert seen == {("RUNNING", 0, 0), ("RUNNING", 1, 0), ("COMPLETE", 1, 0)} | torn
    path.write_bytes(whole[: -end // 2])
    assert main([str(tmp_path)]) == 0
    report_text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "8 trials: 7 COMPLETE, 1 RUNNING" in report_text and "The sweep is not finished" in report_text
    assert "a line that is being written" in report_text and path.read_bytes() == whole[: -end // 2]
    path.write_bytes(whole)
    assert not any("could not be read" in note for note in analyse(tmp_path).notes)


PLACES = {
    "a folder without a file": lambda folder: folder.mkdir(),
    "an empty journal": lambda folder: (folder.mkdir(), (folder / "journal.jsonl").touch()),
    "a journal that is a folder": lambda folder: (folder / "journal.jsonl").mkdir(parents=True),
    "records that are a folder": lambda folder: (folder / "trials.jsonl").mkdir(parents=True),
    "a binary file": lambda folder: folder.write_bytes(bytes(range(256)) * 9),
    "nothing": lambda folder: None,
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_without_records_is_one_line_and_exit_code_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PLACES[case](tmp_path / "results")
    assert main([str(tmp_path / "results")]) == 2
    assert "results" in refused(capsys)


@pytest.mark.parametrize("url", ["sqlite:///{}/none.db", "sqlite:///{}/bad.db", "sqlite://", "s4://bucket/x"])
def test_a_database_or_url_that_is_none_is_one_line_and_exit_code_2(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.db").write_bytes(b"no database at all" * 100)
    assert main([url.format(tmp_path)]) == 2
    refused(capsys)


def test_a_report_that_cannot_be_written_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records(tmp_path / "in", planted(draw(6, 0), valley))
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "file")]) == 2
    assert "file" in refused(capsys)


def test_all_pruned_failed_or_unmeasured_says_that_there_is_no_best_setting(tmp_path: Path) -> None:
    settings = draw(6, 0)
    cases = {
        "pruned": [trial(str(i), p, 4.9, state="PRUNED") for i, p in enumerate(settings)],
        "failed": [trial(str(i), p, None, state="FAILED", cause="error", metrics={}) for i, p in enumerate(settings)],
        "unmeasured": [trial(str(i), p, None, metrics={}) for i, p in enumerate(settings)],
        "not finite": [trial(str(i), p, math.nan) for i, p in enumerate(settings)],
    }
    for name, records in cases.items():
        folder = tmp_path / name
        write_records(folder, records)
        (folder / "sweep.yaml").write_text(dump(sweep()), encoding="utf-8")
        assert main([str(folder)]) == 0
        report = (folder / "report.md").read_text(encoding="utf-8")
        assert "No COMPLETE trial has a value of select_ce: there is no best setting, and no guideline." in report
        assert not (folder / "best.yaml").exists() and "## Guidelines" not in report


def test_help_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        analyze.main(["--help"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "exit codes: 0 written" in said and "2 no trials to read" in said

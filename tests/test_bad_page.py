"""Does each kind of bad input end in a page that can be read? Through the whole door, `report.html` included, and in Chromium.

Reference: the exit codes of `--help`. All in this process, so that a traceback is a test that fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted import draw, planted, trial, valley
from test_page import VIEWS, Markup, browser, opened

from neo_ray.analyze import main
from neo_ray.records import Journal, TrialRecord, write_records

__all__ = ["browser"]  # a fixture
GARBAGE = b'{"half": \n\xff\xfe garbage\n[1, 2]\n\0\0\0\n{"event": "end", "trial": "t1", "time": 3, "state": "BOGUS"}\n'
SETTINGS = draw(12, 0)
HOLES = re.compile(r"\b(nan|NaN|undefined|None|null|inf|Infinity)\b")


def garbage_lines(folder: Path) -> None:
    journal = Journal(folder)
    for i, params in enumerate(SETTINGS):
        journal.write("start", f"t{i}", params=params, config={}, seed=0)
        with (folder / "journal.jsonl").open("ab") as file:
            file.write(GARBAGE)
        journal.write("report", f"t{i}", row={"rung": 1, "tokens": 10, "step": 1, "seconds": 1.0, "select_ce": valley(params)})
        journal.write("end", f"t{i}", state="COMPLETE", metrics={"report_ce": valley(params)})


def garbage_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "trials.jsonl").write_bytes(GARBAGE)


def of(records: list[TrialRecord]) -> Callable[[Path], None]:
    return lambda folder: write_records(folder, records)


FAILED: dict[str, Any] = {"state": "FAILED", "cause": "error", "error": "RuntimeError: nan", "metrics": {}, "curve": []}
MEASURED = planted(SETTINGS, valley)
CASES: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "garbage lines": (garbage_lines, 0, "lines of the records could not be read, and tell nothing"),
    "garbage alone": (garbage_alone, 2, "holds no trial records"),
    "missing metrics": (
        of([r.model_copy(update={"metrics": {}, "curve": []}) if i % 2 else r for i, r in enumerate(MEASURED)]),
        0,
        "12 trials: 12 COMPLETE",
    ),
    "metrics of none": (
        of([trial(str(i), p, None, metrics={}, curve=[]) for i, p in enumerate(SETTINGS)]),
        0,
        "No COMPLETE trial has a value of select_ce",
    ),
    "metrics that are no number": (
        of([trial(str(i), p, float("nan") if i % 2 else valley(p)) for i, p in enumerate(SETTINGS)]),
        0,
        "6 trials diverged",
    ),
    "one trial only": (of(MEASURED[:1]), 0, "1 trials: 1 COMPLETE"),
    "one value on an axis": (
        of(planted([{**p, "rank": 8} for p in SETTINGS], valley)),
        0,
        "rank is 8 in every trial: nothing can be said of it",
    ),
    "one setting": (of(planted([SETTINGS[0]] * 6, valley)), 0, "rank is 64 in every trial: nothing can be said of it"),
    "all failed": (of([trial(str(i), p, None, **FAILED) for i, p in enumerate(SETTINGS)]), 0, "there is no best setting"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bad")
    for name, (make, _, _) in CASES.items():
        make(root / name)
    return {name: root / name for name in CASES}


def is_empty(figure: dict[str, Any]) -> bool:
    """Nothing in it but entries of a legend."""
    layout = figure["layout"]
    return (
        not any(list(_values(trace)) for trace in figure["data"]) and not layout.get("shapes") and not layout.get("annotations")
    )


def _values(trace: dict[str, Any]) -> list[Any]:
    given = trace.get("z") or trace.get("x") or []
    values = given.get("bdata", "") if isinstance(given, dict) else given
    flat = [each for row in values for each in (row if isinstance(row, list) else [row])]
    return [each for each in flat if each is not None]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_in_a_page_without_holes(case: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, code, said = CASES[case]
    folder = folders[case]
    assert main([str(folder)]) == code
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    if code == 2:
        assert said in shown.err and not (folder / "report.html").exists()
        return
    content = (folder / "report.html").read_text(encoding="utf-8")
    page = Markup(content)
    assert said in page.text and "Best setting" in page.text
    words = page.text.replace("NaN, or worse", "").replace("RuntimeError: nan", "")
    assert HOLES.search(words) is None
    (figures,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', content, re.DOTALL)
    drawn = json.loads(figures, parse_constant=lambda name: pytest.fail(name))
    assert [name for name, figure in drawn.items() if is_empty(figure)] == []
    assert set(drawn) == {each for each in page.ids if each and each.startswith("figure-")}
    titled = [a for tag, a in page.elements if tag == "section"]
    assert titled and all(each.get("id") for each in titled)


def test_the_browser_draws_them_without_a_complaint(browser: Any, folders: dict[str, Path]) -> None:
    for case, (_, code, _) in CASES.items():
        if code:
            continue
        assert main([str(folders[case])]) == 0
        tab, complaints = opened(browser, folders[case] / "report.html", **VIEWS["desktop"])
        told = tab.evaluate(
            "document.body.innerText + [...document.querySelectorAll('svg text')].map(t => t.textContent).join(' ')"
        )
        words = told.replace("NaN, or worse", "").replace("RuntimeError: nan", "")
        assert HOLES.search(words) is None, case
        marks = ".scatterlayer path, .scatterlayer text, .barlayer path, .heatmaplayer image"
        empty = f"nodes => nodes.filter(n => !n.querySelector('{marks}')).map(n => n.id)"
        assert tab.eval_on_selector_all(".figure", empty) == [], case
        assert complaints == [], case
        tab.close()

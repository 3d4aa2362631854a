"""Reference: docs/scale.json and docs/scale_report.json, as tests/scale.py and tests/scale_report.py wrote them. What the
pages say of these runs is in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import scale_report

from neo_ray.records import fold

DOCS = Path(__file__).parent.parent / "docs"
FOUND = json.loads((DOCS / "scale.json").read_text(encoding="utf-8"))
PAGE = (DOCS / "scale.md").read_text(encoding="utf-8")
ROWS = FOUND["rows"][:9]
"""One at the start, and one every 250 trials."""


def test_every_trial_of_the_run_ended() -> None:
    assert (FOUND["trials"], FOUND["code"]) == (2000, 0)
    assert FOUND["states"] == {"COMPLETE": 1348, "PRUNED": 652, "FAILED": 0, "RUNNING": 0}
    assert "1,348 COMPLETE and 652 PRUNED, none FAILED" in PAGE


def per_trial(begin: int, end: int, *kinds: str) -> float:
    first, last = ROWS[begin], ROWS[end]
    spent = sum(last["cpu_seconds"].get(kind, 0.0) - first["cpu_seconds"].get(kind, 0.0) for kind in kinds)
    return spent / (last["ended"] - first["ended"])


@pytest.mark.parametrize(
    ("row", "kinds"),
    [("driver (Tune, Optuna, journal, study)", ["driver"]), ("board", ["board"]), ("Ray: GCS and raylet", ["gcs", "raylet"])],
)
def test_cpu_seconds_a_trial_are_those_of_the_run(row: str, kinds: list[str]) -> None:
    cells = [f"{per_trial(begin, end, *kinds):.2f}" for begin, end in ((0, 1), (4, 5), (7, 8))]
    assert f"| {row} | {' | '.join(cells)} |" in PAGE


@pytest.mark.parametrize("name", ["journal.jsonl", "trials.jsonl", "study.db"])
def test_sizes_are_those_of_the_run(name: str) -> None:
    cells = [f"{ROWS[at]['file_bytes'][name] / 1e6:.2f} MB" for at in (1, 4, 8)]
    assert f"| `{name}` | {' | '.join(cells)} |" in PAGE


def test_memory_is_that_of_the_run() -> None:
    for name, key in (("driver", "driver_bytes"), ("board", "board_bytes")):
        cells = [f"{ROWS[at][key] / 1e6:,.0f} MB" for at in (1, 4, 8)]
        assert f"| the {name}'s memory | {' | '.join(cells)} |" in PAGE


def test_the_report_of_ten_thousand_trials_is_that_of_its_run_and_within_its_bounds() -> None:
    found = json.loads((DOCS / "scale_report.json").read_text(encoding="utf-8"))
    assert (found["trials"], sum(found["states"].values()), found["code"]) == (10_000, 10_000, 0)
    assert found["cpu_seconds"] < 60 and found["peak_bytes"] < 2e9 and found["cross_check_settings"] <= 500
    assert {"guidelines.json", "report.md", "report.html", "best.yaml", "trials.jsonl"} <= set(found["file_bytes"])
    page = " ".join((DOCS / "statistics.md").read_text(encoding="utf-8").split())
    assert scale_report.sentence(found) in page, (
        "run: PYTHONPATH=.:tests python tests/scale_report.py --out docs/scale_report.json"
    )


def test_the_made_up_journal_is_one() -> None:
    unread: list[object] = []
    records = fold(scale_report.events(40), unread)
    assert unread == [] and len(records) == 40
    assert {state: sum(r.state == state for r in records) for state in ("COMPLETE", "PRUNED", "FAILED")} == {
        "COMPLETE": 30,
        "PRUNED": 8,
        "FAILED": 2,
    }
    assert len({r.params["learning_rate"] for r in records}) == 40 and all(len(r.params) == 4 for r in records)
    assert {len(r.curve) for r in records if r.state == "COMPLETE"} == {5}

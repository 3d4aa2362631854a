"""Reference: docs/scale.json, docs/worker_groups.json and docs/scale_report.json, as tests/scale.py, tests/worker_groups.py and
tests/scale_report.py wrote them. What the pages say of these runs is in them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import scale_report
import worker_groups

from neo_ray.cluster import HEAD_BYTES, HEAD_BYTES_OF_SLOT
from neo_ray.config import HEAD_SLOTS
from neo_ray.memory import RUNTIME_BYTES
from neo_ray.records import fold

DOCS = Path(__file__).parent.parent / "docs"
FOUND = json.loads((DOCS / "scale.json").read_text(encoding="utf-8"))
PAGE = (DOCS / "scale.md").read_text(encoding="utf-8")
ROWS = FOUND["rows"][:9]
"""One at the start, and one every 250 trials."""


def test_every_trial_of_the_run_ended() -> None:
    assert (FOUND["trials"], FOUND["code"]) == (2000, 0)
    states = FOUND["states"]
    assert (states["FAILED"], states["RUNNING"], sum(states.values())) == (0, 0, 2000)
    assert f"{states['COMPLETE']:,} COMPLETE and {states['PRUNED']:,} PRUNED, none FAILED" in PAGE
    assert f"after {ROWS[8]['seconds']:.0f} s" in PAGE


def test_a_start_with_one_trial_more_took_what_the_page_says() -> None:
    anew, taken_over = FOUND["one_more"]
    words = " ".join(PAGE.split())
    assert f"one trial more took {anew['cpu_seconds']:.0f} CPU seconds" in words
    assert f"and the next one {taken_over['cpu_seconds']:.0f}. A stop" in words
    assert f"completion of {FOUND['crossed']} of these 2,000 trials" in words


def per_trial(begin: int, end: int, *kinds: str) -> float:
    first, last = ROWS[begin], ROWS[end]
    spent = sum(last["cpu_seconds"].get(kind, 0.0) - first["cpu_seconds"].get(kind, 0.0) for kind in kinds)
    return spent / (last["ended"] - first["ended"])


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        ("driver (Tune, Optuna, journal, study)", ["driver"]),
        ("board", ["board"]),
        ("Ray: GCS and raylet", ["gcs", "raylet"]),
        ("relays, and what else Ray runs (a dashboard, agents)", ["relays", "other of Ray", "other"]),
    ],
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


def test_slots_hold_what_the_page_says_and_what_the_sweep_counts_on() -> None:
    found = json.loads((DOCS / "worker_groups.json").read_text(encoding="utf-8"))
    assert worker_groups.table(found) in PAGE
    assert all(row["complete"] == row["began"] == row["slots"] and not row["lost"] for row in found["rows"])
    slot, worker = worker_groups.per_slot(found)
    assert f"| all of these | {slot / 1e6:.0f} |" in PAGE and f"a model of some kB) | {worker / 1e6:.0f} |" in PAGE
    assert slot <= HEAD_BYTES_OF_SLOT < 1.05 * slot and worker < RUNTIME_BYTES["cpu"]
    last = found["rows"][-1]
    once = last["driver_bytes"] + sum(last["bytes"][kind]["bytes"] for kind in ("once a machine", "idle", "board"))
    assert once <= HEAD_BYTES < 1.05 * once
    for slots in (200, 800, HEAD_SLOTS):
        assert re.search(rf"\b{slots}\b[^.]*? {(slots * slot + once) / 1e9:.0f} GB", PAGE), slots
    auto = (0.7 * 64e9 - HEAD_BYTES) // HEAD_BYTES_OF_SLOT
    assert f"64 GB holds {(64e9 - once) / slot:.0f} trials" in PAGE and f"({auto:.0f} on 64 GB" in PAGE


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

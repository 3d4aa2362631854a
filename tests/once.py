"""What did the teacher read in docs/studies/once, and what did the trials read of it? The page's table, from data and records.

`python tests/once.py results/once CACHE` takes over what a sweep left, and writes the page again; without arguments
it writes the page from what is there. test_once.py compares.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neo_ray.account import Account, account
from neo_ray.data import open_data
from neo_ray.losses import IGNORED
from neo_ray.records import Journal, TrialRecord, load_records

FOLDER = Path(__file__).parent.parent / "docs" / "studies" / "once"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
OF_THE_STORE = ("filling", "filled", "targets")
"""Events of the journal that tell what filling the store took."""
Counted = dict[str, dict[str, int]]
"""Split → examples, tokens, labelled positions."""


def counted(data: Path) -> Counted:
    """Of tokenised data, looked at token by token: each example once."""
    found = {}
    for name, split in open_data(data).splits.items():
        examples = split.examples(range(len(split)))
        labels = sum(int((labels_L[1:] != IGNORED).sum()) for _, labels_L in examples)
        found[name] = {"examples": len(split), "tokens": sum(len(ids_L) for ids_L, _ in examples), "labels": labels}
    return found


def take_over(results: Path, cache: Path) -> None:
    """What the page rests on, from a sweep's results and the cache with its data."""
    for name in ("trials.jsonl", "environment.json"):
        shutil.copyfile(results / name, FOLDER / name)
    events = [event for event in Journal(results).events() if event["event"] in OF_THE_STORE]
    (FOLDER / "journal.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events), encoding="utf-8")
    (data,) = cache.glob(f"*/{json.loads((results / 'sources.json').read_text())['data.source']}")
    (FOLDER / "data.json").write_text(f"{json.dumps(counted(data), indent=2)}\n", encoding="utf-8")


def loaded(folder: Path) -> tuple[Counted, Account, list[TrialRecord]]:
    records = load_records(folder / "trials.jsonl")
    return json.loads((folder / "data.json").read_text()), account(Journal(folder).events(), records), records


def rows_of_a_trial(data: Counted, points: int, epochs: int) -> tuple[int, int]:
    """Labelled positions that a trial asks for, on a worker that knows the untrained student's scores and on one that does not.

    Each epoch's, the select split's at each evaluation (and once of the untrained student), the report split's at the end.
    """
    warm = epochs * data["train"]["labels"] + points * data["select"]["labels"] + data["report"]["labels"]
    return warm, warm + data["select"]["labels"]


def rendered(folder: Path) -> str:
    data, found, records = loaded(folder)
    every = {name: sum(split[name] for split in data.values()) for name in ("examples", "tokens", "labels")}
    lines = ["| of the data | examples | tokens | labelled positions |", "| --- " * 4 + "|"]
    lines += [f"| {name} | {_cells(split)} |" for name, split in data.items()]
    lines += [f"| all, each once | {_cells(every)} |", "", "| counter | where | value |", "| --- | --- | --- |"]
    counters: Sequence[tuple[str, str, Any]] = (
        ("tokens that the teacher read to fill the store", "`filled`, over all shards", found.builder_tokens),
        ("tokens that a teacher read in trials", f"`teacher_tokens` of {len(records)} records, summed", found.teacher_tokens),
        ("tokens of the store", "`targets`", found.store_tokens),
        ("rows of the store", "`targets`", found.store_rows),
        ("labelled positions of its examples", "`targets`", found.labels),
        ("rows that trials read", f"`target_rows` of {len(records)} records, summed", found.target_rows),
        (
            "tokens that a living one would have read",
            f"`spared_tokens` of {len(records)} records, summed",
            found.spared_tokens,
        ),
    )
    lines += [f"| {what} | {where} | {value:,} |" for what, where, value in counters]
    heading = ("phase", "trials", "batch sizes", "seeds", "rows that a trial read")
    lines += ["", "| " + " | ".join(heading) + " |", "| --- " * len(heading) + "|"]
    for phase in dict.fromkeys(record.phase for record in records):
        own = [record for record in records if record.phase == phase]
        sizes, seeds = {record.params["batch_size"] for record in own}, {record.seed for record in own}
        read = {record.details["target_rows"] for record in own}
        lines.append(f"| {phase} | {len(own)} | {_listed(sizes)} | {_listed(seeds)} | {_listed(read)} |")
    return "\n".join(lines)


def _cells(counts: dict[str, int]) -> str:
    return " | ".join(f"{counts[name]:,}" for name in ("examples", "tokens", "labels"))


def _listed(values: set[int]) -> str:
    return ", ".join(f"{value:,}" for value in sorted(values))


def page(folder: Path) -> str:
    """README.md with the tables that data and records give."""
    before, _, rest = (folder / "README.md").read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{rendered(folder)}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if sys.argv[1:]:
        take_over(*map(Path, sys.argv[1:]))
    (FOLDER / "README.md").write_text(page(FOLDER), encoding="utf-8")

"""Do trials with a stored teacher end where those with a living one do? The tables of docs/studies/targets, from records.

`python tests/fidelity.py` writes it again; test_fidelity.py compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from neo_ray.records import load_records

FOLDER = Path(__file__).parent.parent / "docs" / "studies" / "targets"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
METRIC = "select_ce"
LIVE, AGAIN = "live", "live, another seed"
Setting = tuple[int, float]
"""Rank, learning rate."""


def scores(folder: Path) -> dict[str, dict[Setting, float]]:
    """Arm → setting → held-out CE at the end of the trial."""
    found: dict[str, dict[Setting, float]] = {}
    for name in ("live", "projection", "hidden"):
        for record in load_records(folder / f"{name}.jsonl"):
            arm = AGAIN if name == "live" and record.seed else name
            value = record.metrics[METRIC]
            assert record.state == "COMPLETE" and value is not None
            found.setdefault(arm, {})[record.params["rank"], record.params["learning_rate"]] = value
    return {arm: found[arm] for arm in (LIVE, AGAIN, "projection", "hidden")}


def swapped(one: dict[Setting, float], other: dict[Setting, float]) -> list[tuple[Setting, Setting]]:
    """Pairs of settings that two arms put in another order."""
    return [(a, b) for a, b in combinations(one, 2) if (one[a] - one[b]) * (other[a] - other[b]) < 0]


def root_mean_square(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def rendered(folder: Path) -> str:
    """Two tables: all scores, and each arm against the living teacher of the first seed."""
    found = scores(folder)
    live = found[LIVE]
    lines = ["| rank | learning rate | " + " | ".join(found) + " |", "| --- " * (2 + len(found)) + "|"]
    for rank, rate in sorted(live):
        cells = [f"{found[arm][rank, rate]:.4f}" for arm in found]
        lines.append(f"| {rank} | {rate:g} | " + " | ".join(cells) + " |")
    heading = ("against live", "median difference", "root mean square", "largest", "Spearman", "pairs of 28 in another order")
    lines += ["", "| " + " | ".join(heading) + " |", "| --- " * len(heading) + "|"]
    for arm in list(found)[1:]:
        distances = [abs(found[arm][setting] - live[setting]) for setting in live]
        order = spearmanr([live[setting] for setting in live], [found[arm][setting] for setting in live]).statistic
        numbers = [f"{value:.4f}" for value in (float(np.median(distances)), root_mean_square(distances), max(distances))]
        lines.append(f"| {arm} | {' | '.join(numbers)} | {order:.3f} | {len(swapped(live, found[arm]))} |")
    return "\n".join(lines)


def page(folder: Path) -> str:
    """README.md with the tables that its records give."""
    before, _, rest = (folder / "README.md").read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{rendered(folder)}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(page(FOLDER), encoding="utf-8")

"""Do trials with a stored teacher end where those with a living one do? The tables of docs/studies/targets, from records.

`python tests/fidelity.py` writes it again; test_fidelity.py compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from neo_ray.records import load_records

FOLDER = Path(__file__).parent.parent / "docs" / "studies" / "targets"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
METRIC = "select_ce"
FILES = {"live": ("live", "live-2"), "projection": ("projection", "projection-2"), "hidden": ("hidden",)}
"""Arm → the sweeps of it."""
SEEDS = "live, another seed"
Setting = tuple[int, float]
"""Rank, learning rate."""
Run = tuple[str, int]
"""Arm, seed."""


def scores(folder: Path) -> dict[Run, dict[Setting, float]]:
    """Held-out CE at the end of each trial."""
    found: dict[Run, dict[Setting, float]] = {}
    for arm, names in FILES.items():
        for record in (record for name in names for record in load_records(folder / f"{name}.jsonl")):
            value = record.metrics[METRIC]
            assert record.state == "COMPLETE" and value is not None and record.details["targets"] == arm
            found.setdefault((arm, record.seed), {})[record.params["rank"], record.params["learning_rate"]] = value
    return found


def differences(found: Mapping[Run, Mapping[Setting, float]]) -> dict[str, list[float]]:
    """Comparison → what lies between two trials of a setting: of the same seed, or of another seed of a living one."""
    live = {seed: found["live", seed] for arm, seed in found if arm == "live"}
    between: dict[str, list[float]] = {
        SEEDS: [live[other][setting] - live[one][setting] for one, other in combinations(live, 2) for setting in live[one]]
    }
    for (arm, seed), values in found.items():
        if arm != "live":
            between.setdefault(arm, []).extend(values[setting] - live[seed][setting] for setting in values)
    return between


def root_mean_square(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def means(found: Mapping[Run, Mapping[Setting, float]], arm: str, seeds: Sequence[int]) -> dict[Setting, float]:
    """Of an arm's settings over seeds."""
    return {setting: float(np.mean([found[arm, seed][setting] for seed in seeds])) for setting in found[arm, seeds[0]]}


def swapped(one: Mapping[Setting, float], other: Mapping[Setting, float]) -> list[tuple[Setting, Setting]]:
    """Pairs of settings that two arms put in another order."""
    return [(a, b) for a, b in combinations(one, 2) if (one[a] - one[b]) * (other[a] - other[b]) < 0]


def seeds_of(found: Mapping[Run, Mapping[Setting, float]], arm: str) -> list[int]:
    return sorted(seed for name, seed in found if name == arm)


def rendered(folder: Path) -> str:
    """Two tables: all scores, and each comparison."""
    found = scores(folder)
    lines = ["| rank | learning rate | " + " | ".join(f"{arm}, seed {seed}" for arm, seed in found) + " |"]
    lines += ["| --- " * (2 + len(found)) + "|"]
    for rank, rate in sorted(found["live", 0]):
        cells = [f"{values[rank, rate]:.4f}" for values in found.values()]
        lines.append(f"| {rank} | {rate:g} | " + " | ".join(cells) + " |")
    heading = ("against live", "pairs", "mean difference", "median distance", "root mean square", "largest")
    lines += ["", "| " + " | ".join(heading) + " | Spearman | pairs of 28 in another order |", "| --- " * 8 + "|"]
    for name, between in differences(found).items():
        distances, seeds = np.abs(between), seeds_of(found, "live" if name == SEEDS else name)
        one = means(found, "live", seeds[:1] if name == SEEDS else seeds)
        other = means(found, *(("live", seeds[1:]) if name == SEEDS else (name, seeds)))
        order = spearmanr(list(one.values()), [other[setting] for setting in one]).statistic
        error = float(np.std(between, ddof=1)) / len(between) ** 0.5
        mean = "" if name == SEEDS else f"{np.mean(between):+.4f} ± {error:.4f}"  # between seeds the sign means nothing
        numbers = [f"{value:.4f}" for value in (np.median(distances), root_mean_square(between), distances.max())]
        row = [name, str(len(between)), mean, *numbers, f"{order:.3f}"]
        lines.append(f"| {' | '.join(row)} | {len(swapped(one, other))} |")
    return "\n".join(lines)


def page(folder: Path) -> str:
    """README.md with the tables that its records give."""
    before, _, rest = (folder / "README.md").read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{rendered(folder)}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(page(FOLDER), encoding="utf-8")

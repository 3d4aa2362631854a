"""What of the benchmarks does a reader of the front page want to know? A few ratios, each with the command that made it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- costs: begin -->", "<!-- costs: end -->"
SHOWN = {
    "step": {
        "neo_projection": "a Neo step, teacher from the store",
        "neo": "live teacher",
        "reference": "reference trainer's step",
    },
    "loss": {"neo_projected": "the Neo loss in chunks, from the store", "neo": "dense, both heads", "trl": "TRL's GKD loss"},
    "sweep": {"stored": "a sweep with the store, filling it included"},
}
"""Benchmark → arm → its words."""


def summary(folder: Path) -> str:
    """A table of the results in a folder, one line an arm."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    results.sort(key=lambda result: list(SHOWN).index(result["benchmark"]))
    lines = ["| on | what | against | time | peak memory | measured by |", "|---|---|---|---|---|---|"]
    lines += ["| " + " | ".join(_cells(result, arm)) + " |" for result in results for arm in _shown(result)]
    return "\n".join(lines) + "\n"


def update(readme: Path, folder: Path) -> None:
    """Bring a page's table up to date. Raises ConfigError: the page has no marks for it."""
    put_between(readme, BEGIN, END, summary(folder))


def put_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a page.

    Raises:
        ConfigError: the page has no such marks.
    """
    from neo_ray.records import write_atomically
    from neo_ray.settings import ConfigError

    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    if begin not in old or end not in old:
        raise ConfigError(f"{page}: is no file with the lines {begin} and {end}")
    write_atomically(page, f"{old.partition(begin)[0]}{begin}\n{text}{end}{old.partition(end)[2]}")


def ratio_text(arm: dict[str, Any]) -> str:
    """An arm's time ratio with its interval, where there is one."""
    value, low, high = (arm["time_ratio"][key] for key in ("value", "low", "high"))
    return f"{value:.2f}" if low == high else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _shown(result: dict[str, Any]) -> list[str]:
    return [arm for arm in SHOWN[result["benchmark"]] if arm in result["arms"]]


def _cells(result: dict[str, Any], arm: str) -> list[str]:
    found, base = result["arms"][arm], result["arms"][result["baseline"]]["about"]
    memory = found.get("memory_ratio")
    peak = "" if memory is None else f"{memory:.2f}"
    words = SHOWN[result["benchmark"]][arm]
    command = result["command"].partition(" --out")[0]
    return [result["device"].split(" ")[0], words, base, ratio_text(found), peak, f"`{command}`"]

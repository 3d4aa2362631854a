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
    """Put the table between the two marks of a page.

    Raises:
        ConfigError: the page has no such marks.
    """
    from neo_ray.records import write_atomically
    from neo_ray.settings import ConfigError

    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if BEGIN not in text or END not in text:
        raise ConfigError(f"{readme}: is no file with the lines {BEGIN} and {END}")
    write_atomically(readme, f"{text.partition(BEGIN)[0]}{BEGIN}\n{summary(folder)}{END}{text.partition(END)[2]}")


def _shown(result: dict[str, Any]) -> list[str]:
    return [arm for arm in SHOWN[result["benchmark"]] if arm in result["arms"]]


def _cells(result: dict[str, Any], arm: str) -> list[str]:
    found, base = result["arms"][arm], result["arms"][result["baseline"]]["about"]
    ratio = found["time_ratio"]
    interval = "" if ratio["low"] == ratio["high"] else f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    memory = found.get("memory_ratio")
    peak = "" if memory is None else f"{memory:.2f}"
    words = SHOWN[result["benchmark"]][arm]
    command = result["command"].partition(" --out")[0]
    return [result["device"].split(" ")[0], words, base, f"{ratio['value']:.2f}{interval}", peak, f"`{command}`"]

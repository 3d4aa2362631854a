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
    "reader": {"step": "a Neo step, teacher from the store"},
}
"""Benchmark → arm → its words."""


def summary(folder: Path) -> str:
    """A table of the results in a folder, one line an arm; of a result with several cases the first."""
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
    of = ",.0f" if value >= 100 else ".2f"
    return f"{value:{of}}" if low == high else f"{value:{of}} [{low:{of}}, {high:{of}}]"


def ceiling_of_a_large_pair() -> float:
    """A step with a live teacher over one without, for 8B → 1B: counted from the parameters, as for a pair that is measured."""
    from neo_ray import bench_pairs, bench_step

    return bench_step.counted_ratio(bench_step.LORA, bench_pairs.LLAMA.student, bench_pairs.LLAMA.teacher)


def _shown(result: dict[str, Any]) -> list[str]:
    return [arm for arm in SHOWN[result["benchmark"]] if arm in result["cases"][0]["arms"]]


def _cells(result: dict[str, Any], arm: str) -> list[str]:
    arms, setting = result["cases"][0]["arms"], result["cases"][0]["setting"]
    found, base = arms[arm], arms[result["baseline"]]["about"]
    memory = found.get("memory_ratio")
    peak = "" if memory is None or result["benchmark"] == "reader" else f"{memory:.2f}"  # what a step holds is not the reader's
    size = f" ({setting['tokens']:,} × {setting['vocabulary']:,})" if "vocabulary" in setting else ""
    words = SHOWN[result["benchmark"]][arm] + size
    if arm == "neo" and found.get("counted_ratio") is not None:
        words += f" (counted {found['counted_ratio']:.2f}; for 8B → 1B {ceiling_of_a_large_pair():.2f})"
    command = result["command"].partition(" --out")[0]
    return [result["device"].split(" ")[0], words, base, ratio_text(found), peak, f"`{command}`"]

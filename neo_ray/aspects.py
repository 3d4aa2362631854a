"""What else do the trials say, beside the verdicts? Sections of a report, each computed, and absent where its data are.

What is added to ASPECTS stands in report.md, in report.html, in guidelines.json, in a notebook, and with its brief lines on the
screen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from neo_ray.choosing import region_lines, region_of
from neo_ray.evidence import Evidence
from neo_ray.importances import importance_lines, importances_of
from neo_ray.knee import knee_lines, knee_of
from neo_ray.luck import luck_lines, luck_of
from neo_ray.rungs import rung_lines, rungs_of
from neo_ray.stability import stability_lines, stability_of


@dataclass(frozen=True)
class Aspect:
    name: str
    """Its key in `guidelines.json`."""
    title: str
    lines: tuple[str, ...]
    found: Any
    """What the lines were written from: a frozen dataclass."""
    num_brief: int
    """How many of the lines stand on the screen."""

    @property
    def brief(self) -> tuple[str, ...]:
        return self.lines[: self.num_brief]


ASPECTS: tuple[tuple[str, str, Callable[[Evidence], Any], Callable[[Any], list[str]], int], ...] = (
    ("luck", "Luck of the best", luck_of, luck_lines, 2),
    ("region", "As good as the best", region_of, region_lines, 2),
    ("knee", "Knee of quality and cost", knee_of, knee_lines, 1),
    ("importances", "Importances", importances_of, importance_lines, 3),
    ("stability", "Where training diverges", stability_of, stability_lines, 3),
    ("rungs", "Was it safe to stop early?", rungs_of, rung_lines, 1),
)
"""Name, title, what computes it, what writes it, and how many lines stand on the screen."""


def aspects_of(evidence: Evidence) -> dict[str, Aspect]:
    """By name, those whose data are there, in the order of the report."""
    aspects = {}
    for name, title, compute, write, num_brief in ASPECTS:
        found = compute(evidence)
        lines = tuple(write(found))
        if lines:
            aspects[name] = Aspect(name, title, lines, found, num_brief)
    return aspects

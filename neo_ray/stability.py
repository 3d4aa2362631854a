"""Where does training diverge? Per rank the smallest learning rate that did, and the largest that did not.

A trial has diverged where its loss was not a number, or worse than that of the untrained student. It is data: a bound on the
region in which one can train at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from neo_ray.evidence import Evidence, number
from neo_ray.statistics import is_numeric


@dataclass(frozen=True)
class Bound:
    """The learning rates of one rank (None: ranks are not told apart)."""

    rank: float | None
    largest_stable: float | None
    """Of the COMPLETE trials; None where all diverged."""
    smallest_diverged: float | None
    """None where none diverged."""
    num_diverged: int
    num_trials: int
    """COMPLETE or diverged."""
    trials: tuple[str, ...]
    """Those that diverged."""

    @property
    def overlap(self) -> bool:
        """Some trial diverged at a learning rate at or below one that others stood."""
        return bool(self.largest_stable and self.smallest_diverged and self.smallest_diverged <= self.largest_stable)


@dataclass(frozen=True)
class Stability:
    num_diverged: int
    num_trials: int
    bounds: tuple[Bound, ...]
    """In the order of rank; empty where the trials have no learning rate."""


def stability_of(evidence: Evidence) -> Stability | None:
    """None where no trial diverged."""
    frame = evidence.frame
    judged = frame[(frame["state"] == "COMPLETE") | frame["diverged"].astype(bool)]
    if not judged["diverged"].any():
        return None
    known = "learning_rate" in judged and is_numeric(judged, "learning_rate")
    rated = judged[judged["learning_rate"].notna()] if known else judged.iloc[:0]
    by_rank = len(rated) > 0 and "rank" in rated and is_numeric(rated, "rank") and rated["rank"].nunique() > 1
    groups = [(float(rank), rows) for rank, rows in rated.groupby("rank")] if by_rank else [(None, rated)]  # type: ignore[arg-type]
    bounds = tuple(_bound(rank, rows) for rank, rows in groups if len(rows))
    return Stability(int(judged["diverged"].sum()), len(judged), bounds)


def stability_lines(found: Stability | None) -> list[str]:
    """The bounds in sentences; nothing where none diverged."""
    if found is None:
        return []
    lines = [f"{found.num_diverged} of {found.num_trials} trials diverged (NaN, or worse than the untrained student)"]
    lines += [_line(bound) for bound in found.bounds if bound.num_diverged]
    fine = [bound for bound in found.bounds if not bound.num_diverged and bound.largest_stable is not None]
    if fine and len(fine) < len(found.bounds):
        lines.append(
            "No trial diverged at " + ", ".join(f"rank {number(b.rank)} (up to {number(b.largest_stable, 3)})" for b in fine)
        )
    return lines


def _line(bound: Bound) -> str:
    where = f"Rank {number(bound.rank)}" if bound.rank is not None else "All ranks together"
    counts = f"{bound.num_diverged} of {bound.num_trials} trials"
    diverged = f"the smallest learning rate that diverged is {number(bound.smallest_diverged, 3)}"
    if bound.largest_stable is None:
        return f"{where}: {diverged}, and none of its trials was completed without that ({counts})"
    stable = f"the largest that did not is {number(bound.largest_stable, 3)}"
    both = "; between the two, other settings decide" if bound.overlap else ""
    return f"{where}: {diverged}, {stable}{both} ({counts})"


def _bound(rank: float | None, rows: pd.DataFrame) -> Bound:
    bad = rows["diverged"].astype(bool)
    stable, diverged = rows["learning_rate"][~bad], rows["learning_rate"][bad]
    return Bound(
        rank=rank,
        largest_stable=float(stable.max()) if len(stable) else None,
        smallest_diverged=float(diverged.min()) if len(diverged) else None,
        num_diverged=int(bad.sum()),
        num_trials=len(rows),
        trials=tuple(rows["id"][bad]),
    )

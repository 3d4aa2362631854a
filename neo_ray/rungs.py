"""Was it safe to stop trials early? How the order of trials at each rung agrees with the order at the end.

Only trials that ran to the end tell. Where others were stopped at a rung, those that ran past it are alike in what they had
reached there, and their correlation is smaller than that of all trials would be: what is told is a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from neo_ray.evidence import Evidence, number
from neo_ray.phases import phases_of
from neo_ray.records import TrialRecord
from neo_ray.settings import ConfigError
from neo_ray.statistics import complete, sign_of

MIN_TRIALS = 8
"""Fewer have no order to speak of: the interval of ρ at 7 is wider than 1."""
SOME = 0.5
"""A place within this share at a rung is one that the mildest usual rule, the median, would have let go on."""


@dataclass(frozen=True)
class Rung:
    """One evaluation before the last, over the COMPLETE trials that tell it and the end."""

    rung: int
    tokens: int | None
    rho: float
    """Spearman's."""
    interval: tuple[float, float]
    """95 % (Bonett & Wright, Psychometrika 65, 2000)."""
    num_trials: int
    place: int
    """At this rung, of the trial that ended best; 1 is the best."""


@dataclass(frozen=True)
class Rungs:
    metric: str
    label: str
    """The metric as a sentence names it."""
    num_pruned: int
    keeps: float | None
    """Share of trials that the sweep's scheduler lets go on at a rung; None where it has none."""
    rungs: tuple[Rung, ...]
    num_complete: int
    """COMPLETE trials with a curve."""


def rungs_of(evidence: Evidence) -> Rungs | None:
    """None where no trial was stopped and none tells more than its end."""
    done = complete(evidence.frame, evidence.metric)
    ends = dict(zip(done["id"], done[evidence.metric].astype(float), strict=True))
    curves = {r.id: values for r in evidence.records if r.id in ends and (values := _values(r, evidence.metric))}
    pruned = sum(record.state == "PRUNED" for record in evidence.records)
    last = max((max(values) for values in curves.values()), default=0)
    rungs = sorted({rung for values in curves.values() for rung in values if rung < last})
    found = [_rung(evidence, rung, [(values[rung], ends[i]) for i, values in curves.items() if rung in values]) for rung in rungs]
    told = tuple(rung for rung in found if rung is not None)
    return Rungs(evidence.metric, evidence.label, pruned, _keeps(evidence), told, len(curves)) if told or pruned else None


def rung_lines(found: Rungs | None) -> list[str]:
    """The correlations in sentences, and what they say of pruning; nothing where there is nothing to tell."""
    if found is None:
        return []
    if not found.rungs:
        return [
            f"Whether it was safe to stop {found.num_pruned} trials early cannot be said: {found.num_complete} COMPLETE trials "
            f"have a curve of {found.label}, and {MIN_TRIALS} are the least"
        ]
    lines = [_line(rung) for rung in found.rungs]
    lines.append(_statement(found))
    if found.num_pruned:
        lines.append(f"{found.num_pruned} PRUNED trials tell no end: among all trials the correlations may well be larger")
    return lines


def _line(rung: Rung) -> str:
    low, high = (number(end, 2) for end in rung.interval)
    tokens = f" ({rung.tokens:,} tokens)" if rung.tokens else ""
    return (
        f"Rung {rung.rung}{tokens}: Spearman's ρ with the end {number(rung.rho, 2)} (95 % {low} to {high}) over "
        f"{rung.num_trials} trials; the trial that ended best was number {rung.place} there"
    )


def _statement(found: Rungs) -> str:
    share = found.keeps or SOME
    lost = [rung.rung for rung in found.rungs if rung.place > math.ceil(share * rung.num_trials)]
    rule = f"the best {number(100 * share, 2)} % at each rung, as the scheduler does," if found.keeps else "the better half"
    where = ", ".join(map(str, lost))
    return f"Keeping {rule} would have " + (f"lost the best trial at rung {where}" if lost else "kept the best of these trials")


def _values(record: TrialRecord, metric: str) -> dict[int, float]:
    """Rung → the metric."""
    rows = [(row.get("rung"), row.get(metric)) for row in record.curve]
    return {k: float(v) for k, v in rows if isinstance(k, int) and isinstance(v, int | float) and math.isfinite(v)}


def _rung(evidence: Evidence, rung: int, pairs: list[tuple[float, float]]) -> Rung | None:
    """pairs: the metric at the rung and at the end of each trial that tells both."""
    gains, ends = sign_of(evidence.mode) * np.array(pairs).reshape(-1, 2).T
    if len(pairs) < MIN_TRIALS or len(set(gains)) < 2 or len(set(ends)) < 2:
        return None
    rho = float(stats.spearmanr(gains, ends)[0])
    place = int((gains > gains[ends.argmax()]).sum()) + 1
    return Rung(rung, _tokens(evidence.records, rung), rho, _interval(rho, len(pairs)), len(pairs), place)


def _interval(rho: float, num: int) -> tuple[float, float]:
    half = 1.96 * math.sqrt((1 + rho**2 / 2) / (num - 3))
    inside = float(np.clip(rho, -1 + 1e-9, 1 - 1e-9))
    return math.tanh(math.atanh(inside) - half), math.tanh(math.atanh(inside) + half)


def _tokens(records: Sequence[TrialRecord], rung: int) -> int | None:
    counts = [row["tokens"] for r in records for row in r.curve if row.get("rung") == rung and isinstance(row.get("tokens"), int)]
    return int(np.median(counts)) if counts else None


def _keeps(evidence: Evidence) -> float | None:
    """Of the first phase that stops trials."""
    try:
        phases = phases_of(evidence.sweep) if evidence.sweep else ()
    except ConfigError:
        return None
    schedulers = [phase.config.scheduler for phase in phases if phase.config.scheduler.name != "none" and not phase.seeds]
    if not schedulers:
        return None
    return 0.5 if schedulers[0].name == "median" else 1 / schedulers[0].reduction_factor

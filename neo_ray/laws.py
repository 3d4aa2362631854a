"""How does the best learning rate move with rank? lr*(r) = c·r^γ, from the response surface, with bootstrap intervals.

An optimum at the end of the learning rates that its rank was tried with is *censored*: the best may lie beyond, so the fit goes
without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from neo_ray.evidence import Evidence, for_laws, number, with_leaves
from neo_ray.intervals import error_of, percentiles
from neo_ray.statistics import CONFIDENCE, MAX_LEVELS, complete, is_numeric
from neo_ray.surface import MIN_R2, RANK, RATE, Surface, fit

ADAPTIVE = ("tpe", "gp", "cmaes", "nsga2")
MIN_RATES = 3
"""Fewer learning rates have no optimum between them."""
MIN_RANKS = 2
NUM_RANKS = 7
"""Of a range of ranks that is continuous."""


@dataclass(frozen=True)
class Law:
    """lr*(r) = c·r^γ. Without a γ where the trials allow none: `note` says why."""

    gamma: float | None
    gamma_interval: tuple[float, float] | None
    """95 %, of 2,000 draws of the settings with replacement, each with all its seeds."""
    c: float | None
    c_interval: tuple[float, float] | None
    p: float | None
    """Of γ = 0, from t with the surface's degrees of freedom."""
    optima: dict[float, tuple[float, bool]]
    """Rank → its best learning rate, and whether that is censored."""
    left_out: tuple[float, ...]
    """Ranks whose optimum is censored."""
    sides: dict[float, str]
    """Rank that is left out → `lowest` or `highest`: the end of its learning rates that the optimum is at."""
    stable: tuple[float, ...]
    """Of those, the ones that diverged at higher learning rates, or above a rank that did: there is nothing to extend."""
    curve: tuple[tuple[float, float, float, float], ...]
    """Rank, learning rate of the law, and its 95 % band."""
    r2: float
    """The surface's, leave-one-setting-out."""
    alpha_rule: str | None
    num_settings: int
    num_seeds: int
    ids: tuple[str, ...]
    note: str


def surface_of(evidence: Evidence) -> Surface | None:
    """The surface of the trials that laws are fitted on; None where they are too few."""
    frame, leaves = with_leaves(for_laws(evidence))
    return fit(frame, evidence.metric, evidence.mode, leaves)


def learning_rate_law(evidence: Evidence, surface: Surface | None = None) -> Law | None:
    """The law of the trials that no sampler chose; None where learning rate or rank does not vary enough to ask for one.

    Args:
        surface: `surface_of(evidence)`, where it is known already.
    """
    surface = surface or surface_of(evidence)
    if surface is None or not {RATE, RANK} <= set(surface.coordinates) or not surface.has((RATE, 2)):
        return None
    frame, _ = with_leaves(for_laws(evidence))
    windows = _windows(frame, evidence.metric, surface)
    if len(windows) < MIN_RANKS:
        return None
    rate, rank = surface.coordinates[RATE], surface.coordinates[RANK]
    found = {r: surface.optimum(surface.at(RANK, r), *_window(surface, window)) for r, window in windows.items()}
    kept = [r for r, (_, side) in found.items() if not side]
    optima = {r: (float(rate.back(at)), bool(side)) for r, (at, side) in found.items()}
    law = Law(
        gamma=None,
        gamma_interval=None,
        c=None,
        c_interval=None,
        p=None,
        optima=optima,
        left_out=tuple(r for r in found if r not in kept),
        sides={r: side for r, (_, side) in found.items() if side},
        stable=tuple(r for r, (_, side) in found.items() if side == "highest" and windows[r][2]),
        curve=(),
        r2=surface.r2,
        alpha_rule=evidence.scope.alpha_rule,
        num_settings=len(surface.gains),
        num_seeds=surface.num_seeds,
        ids=surface.ids,
        note="; ".join(filter(None, (_refusal(surface, kept), _censored(found), _gathered(evidence), *surface.dropped))),
    )
    if _refusal(surface, kept):
        return law
    at = np.array([found[r][0] for r in kept])
    drawn = np.stack([surface.optima(surface.at(RANK, r), *_window(surface, windows[r])) for r in kept], axis=1)
    return _with_line(law, np.log(kept), at * rate.width + rate.middle, drawn * rate.width + rate.middle, rank.width, surface.df)


def _refusal(surface: Surface, kept: list[float]) -> str:
    if not surface.trusted:
        return f"leave-one-setting-out R² is {number(surface.r2, 2)}, and below {MIN_R2} the surface carries no law"
    if len(kept) < MIN_RANKS:
        return f"ranks with a best learning rate inside the tested range: {len(kept)}, and {MIN_RANKS} are the least"
    return ""


def _censored(found: dict[float, tuple[float, str]]) -> str:
    ranks = [number(r) for r, (_, side) in found.items() if side]
    if not ranks:
        return ""
    return f"left out, as the best learning rate is at the end of those tried: rank {', '.join(ranks)}"


def _gathered(evidence: Evidence) -> str:
    """Of trials without a map: a law of settings that a sampler chose covers less than its interval says."""
    laws, sampler = for_laws(evidence), evidence.scope.sampler
    if len(laws.records) < len(evidence.records) or sampler not in ADAPTIVE:
        return ""
    return f"{sampler} gathered these trials where the metric is good, so the interval may be too narrow; a map would tell"


def _with_line(law: Law, z: np.ndarray, best: np.ndarray, drawn: np.ndarray, width: float, df: int) -> Law:
    """The straight line through the optima (k: ln rank, ln learning rate; draws × k), and its intervals."""
    weights = (z - z.mean()) / float(((z - z.mean()) ** 2).sum())
    slope, slopes = float(best @ weights), drawn @ weights
    start, starts = float(best.mean() - slope * z.mean()), drawn.mean(axis=1) - slopes * z.mean()
    interval = percentiles(slopes)
    error = error_of(interval)
    ranks = np.geomspace(math.exp(z.min()), math.exp(z.max()), 41)
    lines = starts[:, None] + slopes[:, None] * np.log(ranks)
    ends = np.exp(np.quantile(lines, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2), axis=0))
    middle = np.exp(start + slope * np.log(ranks))
    low, high = percentiles(starts)
    return replace(
        law,
        gamma=slope,
        gamma_interval=interval,
        c=math.exp(start),
        c_interval=(math.exp(low), math.exp(high)),
        p=float(2 * stats.t.sf(abs(slope) / error, df)) if error > 0 else 0.0,
        curve=tuple(zip(ranks.tolist(), middle.tolist(), ends[0].tolist(), ends[1].tolist(), strict=True)),
    )


def _windows(frame: pd.DataFrame, metric: str, surface: Surface) -> dict[float, tuple[float, float, bool]]:
    """Rank → the ends of the learning rates that were fitted there, and whether higher ones diverged at it or a lower rank."""
    runs = complete(frame, metric)
    runs = runs[runs["id"].isin(surface.ids)]
    if not is_numeric(runs, RANK) or not is_numeric(runs, RATE):
        return {}
    rates = runs[RATE].astype(float)
    ranks = sorted(float(r) for r in runs[RANK].dropna().unique())
    outside = frame["id"].isin(complete(frame, metric)["id"]) & ~frame["id"].isin(surface.ids)
    lost = frame[frame["diverged"].astype(bool) | outside]
    unstable = pd.to_numeric(lost[RATE], errors="coerce")
    if len(ranks) > MAX_LEVELS:
        some = np.unique(np.geomspace(ranks[0], ranks[-1], NUM_RANKS).round())
        beyond = bool((unstable > rates.max()).any())
        return {float(r): (float(rates.min()), float(rates.max()), beyond) for r in some}
    found = {}
    for rank in ranks:
        own = rates[runs[RANK] == rank]
        if own.nunique() >= MIN_RATES:
            beyond = bool((unstable[lost[RANK] <= rank] > own.max()).any())
            found[rank] = (float(own.min()), float(own.max()), beyond)
    return found


def _window(surface: Surface, window: tuple[float, float, bool]) -> tuple[float, float]:
    """Its ends without a unit."""
    low, high = (float(surface.coordinates[RATE].of(end)) for end in window[:2])
    return low, high

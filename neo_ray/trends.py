"""Does a larger rank pay, each rank at its own best learning rate? And which values of an axis are as good as its best?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize, stats

from neo_ray.evidence import Evidence
from neo_ray.intervals import percentiles
from neo_ray.statistics import MAX_LEVELS
from neo_ray.surface import RANK, RATE, Surface

MIN_RANKS = 3


@dataclass(frozen=True)
class Shortfall:
    """Something that is 0 at the least: how much is lost, in units of the metric. Its draws make interval and p."""

    loss: float
    interval: tuple[float, float]
    draws: np.ndarray

    def p(self, margin: float) -> float:
        """Of its being below the margin, where it looks so; else of its being above."""
        size = len(self.draws)
        within = self.loss < margin
        share = (float((self.draws >= margin if within else self.draws <= margin).sum()) + 1) / (size + 1)
        return min(1.0, share if within else 2 * share)


@dataclass(frozen=True)
class Trend:
    """Rank against the metric, each rank at its own best learning rate."""

    ranks: tuple[float, ...]
    gains: tuple[float, ...]
    """What the surface expects at each rank, all else in the middle, and what it leaves over there."""
    isotonic: tuple[float, ...]
    """The nearest curve that never falls."""
    saturation: float
    """The smallest rank within one standard error of the best."""
    saturation_interval: tuple[float, float]
    """Where 95 % of the draws have theirs."""
    fall: Shortfall
    """The largest loss from a rank to a higher one, up to the saturation rank; none where that is the lowest."""
    spearman: tuple[float, float]
    """ρ of rank and the best mean over the learning rates, within equal other axes; its p."""
    kendall: tuple[float, float]
    """τ and its p."""
    num_cells: int
    """Means that ρ and τ come from."""


def rank_trend(evidence: Evidence, surface: Surface | None) -> Trend | None:
    """None without a surface over three ranks."""
    if surface is None or not surface.trusted or not {RANK, RATE} <= set(surface.coordinates) or not surface.has((RATE, 2)):
        return None
    ranks = levels(surface, RANK)
    if len(ranks) < MIN_RANKS:
        return None
    off, off_drawn = _left_over(surface, ranks)
    gains, drawn = surface.profile(RANK, ranks) + off, surface.profile(RANK, ranks, surface.draws) + off_drawn
    best = int(gains.argmax())
    errors = (drawn[:, [best]] - drawn).std(axis=0)
    saturation = int(_first_within(gains[None], errors)[0])
    low, high = percentiles(_first_within(drawn, errors))
    upto = slice(0, saturation + 1)
    cells = _cells(surface)
    rho, tau = (test(cells[RANK], cells["gain"]) for test in (stats.spearmanr, stats.kendalltau))
    return Trend(
        ranks=tuple(ranks),
        gains=tuple(gains.tolist()),
        isotonic=tuple(optimize.isotonic_regression(gains).x.tolist()),
        saturation=ranks[saturation],
        saturation_interval=(ranks[math.floor(low)], ranks[math.ceil(high)]),
        fall=shortfall(_fall(gains[None, upto])[0], _fall(drawn[:, upto])),
        spearman=(_known(rho[0], 0.0), _known(rho[1], 1.0)),
        kendall=(_known(tau[0], 0.0), _known(tau[1], 1.0)),
        num_cells=len(cells),
    )


def levels(surface: Surface, axis: str) -> list[float]:
    """The values of a numeric axis in the fit, or seven over its range where they are many."""
    coordinate = surface.coordinates[axis]
    values = sorted(float(v) for v in surface.points[coordinate.column].dropna().unique())
    return values if len(values) <= MAX_LEVELS else coordinate.back(np.linspace(*surface.ends(axis), 7)).tolist()


def regret(surface: Surface, axis: str, value: float) -> Shortfall:
    """What a value of an axis loses against its best one, each at its own best learning rate."""
    values = [*levels(surface, axis), value]
    gains, drawn = surface.profile(axis, values), surface.profile(axis, values, surface.draws)
    return shortfall(gains.max() - gains[-1], drawn.max(axis=1) - drawn[:, -1])


def shortfall(loss: float, draws: np.ndarray) -> Shortfall:
    return Shortfall(float(loss), percentiles(draws), draws)


def _fall(gains: np.ndarray) -> np.ndarray:
    return (np.maximum.accumulate(gains, axis=-1) - gains).max(axis=-1)


def _left_over(surface: Surface, ranks: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """What the settings of each rank gain beyond the surface, on average, and draws of it: a square in ln rank has no kink.

    0 where the ranks are many and stand for a range.
    """
    residuals = surface.gains - surface.design @ surface.beta
    own = [residuals[surface.points[RANK].to_numpy(dtype=float) == rank] for rank in ranks]
    if any(len(found) == 0 for found in own):
        return np.zeros(len(ranks)), np.zeros((len(surface.draws), len(ranks)))
    off = np.array([found.mean() for found in own])
    spread = np.sqrt(residuals @ residuals / surface.df / np.array([len(found) for found in own]))
    return off, off + spread * np.random.default_rng(0).standard_normal((len(surface.draws), len(ranks)))


def _first_within(gains: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Of each row, the first place that is within one standard error of the row's best. gains: [n, ranks]; errors: [ranks]."""
    return (gains >= gains.max(axis=1, keepdims=True) - errors).argmax(axis=1)


def _cells(surface: Surface) -> pd.DataFrame:
    """Rank and best mean over the learning rates, of each combination of the other axes, from which its mean is taken."""
    others: Sequence[str] = [c.column for c in surface.coordinates.values() if c.column not in (RATE, RANK, "scaling")]
    points = surface.points[[RANK, "gain", *dict.fromkeys(others)]]
    points = points.assign(stratum=points.groupby(list(dict.fromkeys(others)), dropna=False).ngroup() if others else 0)
    best = points.groupby(["stratum", RANK])["gain"].max().reset_index()
    return best.assign(gain=best["gain"] - best.groupby("stratum")["gain"].transform("mean"))


def _known(value: float, otherwise: float) -> float:
    return float(value) if np.isfinite(value) else otherwise

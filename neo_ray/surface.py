"""How good is a setting that nobody ran? A response surface over the settings of a sweep, and what it predicts of those left out.

Least squares on the settings' means: a cubic in ln learning rate, quadratics in ln rank, kd_ratio and ln scaling, rank × learning
rate and learning rate × kd_ratio; what else varies enters with a line and a square, or a level each. Gains: higher is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from neo_ray.intervals import half_width
from neo_ray.statistics import CONFIDENCE, MAX_LEVELS, column, complete, is_log, is_numeric, setting_of, sign_of, unstable

RATE, RANK, RATIO, SCALING = "learning_rate", "rank", "kd_ratio", "scaling"
LOGARITHMIC = (RATE, RANK, SCALING, "temperature")
"""Axes that act by factors, however narrow their range."""
DRAWS = 2000
MIN_DF = 5
"""Fewer residual degrees of freedom say nothing of how good a fit is."""
MOST_TERMS = 40
"""Of a table with very many columns."""
MOVES_WITH = 0.98
"""A multiple correlation with the axes before it from which an axis cannot be told apart from them."""
NEW = 1e-4
"""Share of a power's or product's variance that must be its own."""
EDGE = 0.05
"""Share of the tried learning rates' range, on its logarithmic scale, that counts as its end."""
REACH = 0.5
"""Of that range: how far beyond its ends the optimum of a draw may lie."""
MIN_R2 = 0.5
"""A surface that predicts less of the variance between settings that it has not seen is no ground for a guideline."""

Term = tuple[tuple[str, int], ...]
"""Coordinate and power, of each factor of a product; the empty one is the intercept."""


@dataclass(frozen=True)
class Coordinate:
    """How an axis enters: by its logarithm or itself, centred and scaled; or the level of an axis without an order."""

    name: str
    column: str
    """Of the table of trials."""
    log: bool
    middle: float
    width: float
    level: Any = None

    def of(self, values: pd.Series | np.ndarray | float) -> np.ndarray:
        """Without a unit; a missing value (an axis that is inactive there) stands in the middle."""
        if self.level is not None:
            raw = (pd.Series(values) == self.level).to_numpy(dtype=float)
        else:
            raw = np.log(np.asarray(values, dtype=float)) if self.log else np.asarray(values, dtype=float)
        return np.nan_to_num((raw - self.middle) / self.width)

    def back(self, at: np.ndarray | float) -> np.ndarray:
        raw = np.asarray(at) * self.width + self.middle
        return np.exp(raw) if self.log else raw

    @property
    def label(self) -> str:
        return f"ln {self.name}" if self.log else self.name


@dataclass(frozen=True, eq=False)
class Surface:
    """A fitted surface; n settings, p terms."""

    metric: str
    mode: str
    coordinates: dict[str, Coordinate]
    terms: tuple[Term, ...]
    beta: np.ndarray
    """p: the gain's coefficients."""
    covariance: np.ndarray
    """p × p, HC3 (MacKinnon & White, 1985)."""
    design: np.ndarray
    """n × p"""
    gains: np.ndarray
    """n: mean gain of each setting over its seeds."""
    points: pd.DataFrame
    """A row a setting."""
    r2: float
    """Leave-one-setting-out: the share of the variance between settings that is predicted of one that was left out."""
    dropped: tuple[str, ...]
    """Which terms are not in it, and why."""
    num_outside: int
    """COMPLETE trials of settings that a seed diverged with: a bound of the stable region, and not in the fit."""
    ids: tuple[str, ...]
    num_seeds: int

    @property
    def df(self) -> int:
        return len(self.gains) - len(self.terms)

    @property
    def trusted(self) -> bool:
        return self.r2 >= MIN_R2

    @cached_property
    def draws(self) -> np.ndarray:
        """Coefficients under 2,000 draws of the settings with replacement, each with all its seeds: 2000 × p."""
        return bootstrap(self.design, self.gains)

    def has(self, *term: tuple[str, int]) -> bool:
        return tuple(term) in self.terms

    def along(self, axis: str, at: Mapping[str, Any], betas: np.ndarray | None = None) -> np.ndarray:
        """The polynomial in one coordinate, the others at `at` (without a unit; else in the middle): … × 4, powers 0 to 3."""
        betas = self.beta if betas is None else betas
        found = np.zeros((*betas.shape[:-1], 4))
        for index, term in enumerate(self.terms):
            factor: Any = 1.0
            for name, power in term:
                factor = factor * (1.0 if name == axis else np.asarray(at.get(name, 0.0)) ** power)
            found[..., dict(term).get(axis, 0)] += betas[..., index] * factor
        return found

    def at(self, axis: str, value: Any) -> dict[str, float]:
        """A value of an axis without a unit; a rank with the scaling that goes with it in these trials."""
        at = {name: float(c.of(pd.Series([value]))[0]) for name, c in self.coordinates.items() if axis in (name, c.column)}
        if axis == RANK and SCALING in self.coordinates:
            z, a = (c.of(self.points[c.column]) for c in (self.coordinates[RANK], self.coordinates[SCALING]))
            at[SCALING] = at[RANK] * float(z @ a) / float(z @ z)
        return at

    def optimum(self, at: Mapping[str, Any], low: float, high: float) -> tuple[float, str]:
        """The best learning rate of those between two ends, without a unit, and the end that it is at: `lowest`, `highest`."""
        best = float(peak(self.along(RATE, at), low, high))
        share = (best - low) / (high - low)
        return best, "lowest" if share <= EDGE else "highest" if share >= 1 - EDGE else ""

    def optima(self, at: Mapping[str, Any], low: float, high: float) -> np.ndarray:
        """The same in each draw, at most half the range beyond its ends: cut off at these, an interval would be too narrow."""
        return peak(self.along(RATE, at, self.draws), low, high, REACH * (high - low))

    def censored(self, at: Mapping[str, Any]) -> str:
        """The end of the tried learning rates that the best is at, or that 1 in 40 draws leave by as far as they may."""
        low, high = self.ends(RATE)
        drawn, reach = self.optima(at, low, high), REACH * (high - low)
        outer = {"lowest": (drawn <= low - reach).mean(), "highest": (drawn >= high + reach).mean()}
        side = max(outer, key=lambda name: outer[name])
        return self.optimum(at, low, high)[1] or (side if outer[side] > (1 - CONFIDENCE) / 2 else "")

    def ends(self, axis: str) -> tuple[float, float]:
        """Lowest and highest value of a coordinate in the fit, without a unit."""
        coordinate = self.coordinates[axis]
        u = coordinate.of(self.points[coordinate.column].dropna())
        return float(u.min()), float(u.max())

    def profile(self, axis: str, values: Sequence[Any], betas: np.ndarray | None = None) -> np.ndarray:
        """The gain at each value of an axis (… × m), with its own best learning rate of those tried; all else in the middle."""
        ends, found = self.ends(RATE) if RATE in self.coordinates else (0.0, 0.0), []
        for value in values:
            polynomial = self.along(RATE, self.at(axis, value), betas)
            best = peak(polynomial, *ends) if ends[0] < ends[1] else np.zeros(polynomial.shape[:-1])
            found.append(height(polynomial, best))
        return np.stack(found, axis=-1)

    def expected(self, settings: pd.DataFrame) -> pd.DataFrame:
        """What it expects of the metric: mean, low and high (95 %) of each row of settings, in the metric's own unit.

        Args:
            settings: a column for each of `coordinates` (their `column`); with alpha searched that is `scaling`, alpha / r.

        Raises:
            KeyError: a column is missing.
        """
        rows = self.rows(settings)
        half = half_width(self.df) * np.sqrt(np.einsum("mi,ij,mj->m", rows, self.covariance, rows))
        mean = sign_of(self.mode) * (rows @ self.beta)
        return pd.DataFrame({"mean": mean, "low": mean - half, "high": mean + half}, index=settings.index)

    def rows(self, points: pd.DataFrame) -> np.ndarray:
        """The design of settings given by the columns of their axes: m × p."""
        return _columns(self.terms, {name: c.of(points[c.column]) for name, c in self.coordinates.items()}, len(points))


def fit(frame: pd.DataFrame, metric: str, mode: str, axes: Sequence[str], by_run: bool = False) -> Surface | None:
    """The surface of the COMPLETE trials over the axes that vary; None where the settings are too few for one.

    Args:
        axes: all parameters by which settings differ; `alpha` enters by the scaling of the branch, where that is known.
        by_run: each run counts on its own, and not the mean of a setting.
    """
    runs, num_outside = inside(frame, metric, axes)
    runs = runs.assign(gain=sign_of(mode) * runs[metric], setting=setting_of(runs, [*axes, *(["seed"] if by_run else [])]))
    groups = runs.groupby("setting", sort=False)
    points = groups.first().assign(gain=groups["gain"].mean())
    coordinates, dropped = _coordinates(points, axes)
    u = {name: c.of(points[c.column]) for name, c in coordinates.items()}
    terms, more = _terms(points, coordinates, u)
    if len(terms) < 2 or len(points) - len(terms) < MIN_DF:
        return None
    design, gains = _columns(terms, u, len(points)), points["gain"].to_numpy(dtype=float)
    beta, covariance, leverage = _least_squares(design, gains)
    return Surface(
        metric=metric,
        mode=mode,
        coordinates={name: c for name, c in coordinates.items() if any(name in dict(term) for term in terms)},
        terms=terms,
        beta=beta,
        covariance=covariance,
        design=design,
        gains=gains,
        points=points,
        r2=_left_out(gains, gains - design @ beta, leverage),
        dropped=(*dropped, *more),
        num_outside=num_outside,
        ids=tuple(runs["id"]),
        num_seeds=int(runs["seed"].nunique()),
    )


def inside(frame: pd.DataFrame, metric: str, axes: Sequence[str]) -> tuple[pd.DataFrame, int]:
    """The COMPLETE trials of settings that no seed diverged with, and how many others there are."""
    done = complete(frame, metric)
    outside = unstable(frame, axes, metric)[done.index]
    return done[~outside], int(outside.sum())


def bootstrap(design: np.ndarray, gains: np.ndarray, num: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Least-squares coefficients (num × p) of settings (n × p, n) drawn with replacement."""
    size, width = design.shape
    rng = np.random.default_rng(seed)
    products = (design[:, :, None] * design[:, None, :]).reshape(size, -1)
    targets, ridge = design * gains[:, None], 1e-8 * size * np.eye(width)  # a draw may hold too few settings for all terms
    found = []
    for some in np.array_split(np.arange(num), max(1, num * size // 5_000_000)):  # memory: 40 MB of counts at a time
        counts = rng.multinomial(size, np.full(size, 1 / size), size=len(some)).astype(float)
        moments = (counts @ products).reshape(len(some), width, width) + ridge
        found.append(np.linalg.solve(moments, (counts @ targets)[:, :, None])[:, :, 0])
    return np.concatenate(found)


def peak(polynomial: np.ndarray, low: float, high: float, reach: float = 0.0) -> np.ndarray:
    """Where cubics (… × 4) are highest between two ends; where they rise towards one, `reach` beyond it at most."""
    _, b, c, d = np.moveaxis(polynomial, -1, 0)
    with np.errstate(all="ignore"):
        inner = b / (np.sqrt(c * c - 3 * b * d) - c)  # the root of the derivative with a negative second one, also where d is 0
    at_ends = height(polynomial[..., None, :], np.array([low, high]))
    rises = at_ends[..., 1] >= at_ends[..., 0]
    better = np.where(rises, high + reach, low - reach)
    value = height(polynomial, np.clip(np.nan_to_num(inner), low, high))
    within = (inner >= low) & (inner <= high) & (value >= at_ends.max(axis=-1))
    beyond = ((inner > high) & (inner < high + reach) & rises) | ((inner < low) & (inner > low - reach) & ~rises)
    return np.where(within | beyond, inner, better)


def height(polynomial: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The value of cubics (… × 4) at points (…)."""
    first, second, third, fourth = np.moveaxis(polynomial, -1, 0)
    return first + at * (second + at * (third + at * fourth))


def _coordinates(points: pd.DataFrame, axes: Sequence[str]) -> tuple[dict[str, Coordinate], list[str]]:
    """The axes that vary, those of the laws first; the scaling of the branch stands for alpha, where it is known."""
    scaled = bool({RANK, "alpha"} & set(axes)) and points[SCALING].notna().all()
    names = [name for name in axes if not (scaled and name in ("alpha", SCALING))] + ([SCALING] if scaled else [])
    order = [RATE, RANK, RATIO, SCALING]
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    found: dict[str, Coordinate] = {}
    dropped = []
    for name in names:
        where = SCALING if scaled and name == SCALING else column(name)
        values = points[where]
        if values.nunique() < 2:
            dropped += [f"ln scaling: {values.iloc[0]:.4g} at every rank"] if where == SCALING and len(values) else []
            continue
        if where == SCALING or is_numeric(points, name):
            found[name] = _numeric(name, where, values.dropna().to_numpy(dtype=float))
            continue
        levels = sorted(values.dropna().unique(), key=str)
        if len(levels) > MAX_LEVELS:
            dropped.append(f"{name}: {len(levels)} levels without an order")
            continue
        for level in levels[1:]:
            label = f"{name} {level}"
            found[label] = Coordinate(label, where, False, float((values == level).mean()), 1.0, level)
    return found, dropped


def _numeric(name: str, where: str, x: np.ndarray) -> Coordinate:
    log = (name in LOGARITHMIC and min(x) > 0) or is_log(x)
    t = np.log(x) if log else x
    return Coordinate(name, where, log, float(t.mean()), float(t.std()) or 1.0)


def _terms(
    points: pd.DataFrame, coordinates: dict[str, Coordinate], u: dict[str, np.ndarray]
) -> tuple[tuple[Term, ...], list[str]]:
    """The terms that the settings can carry, the most wanted first: twice as many settings as terms."""
    terms: list[Term] = [()]
    basis = np.ones((len(points), 1)) / np.sqrt(max(1, len(points)))
    dropped, lost, full = list[str](), set[str](), list[str]()
    for term in _wanted(coordinates):
        if lost & set(dict(term)):
            continue
        label = name_of(term, coordinates)
        if len(terms) + 1 > min(len(points) / 2, MOST_TERMS):
            full.append(label)
            continue
        values = _columns((term,), u, len(points))[:, 0]
        own = values - basis @ (basis.T @ values)
        own -= basis @ (basis.T @ own)
        total = float(((values - values.mean()) ** 2).sum())
        share = float(own @ own) / total if total > 0 else 0.0
        main = len(term) == 1 and term[0][1] == 1
        if share <= (1 - MOVES_WITH**2 if main else NEW):
            dropped.append(_why(term, label, coordinates, points, u, terms))
            lost |= {term[0][0]} if main else set()
            continue
        basis = np.column_stack([basis, own / np.sqrt(own @ own)])
        terms.append(term)
    if full:
        dropped.append(f"{', '.join(full)}: {len(points)} settings carry {len(terms)} terms")
    return tuple(terms), dropped


def _wanted(coordinates: dict[str, Coordinate]) -> list[Term]:
    lead = [
        ((RATE, 2),),
        ((RATE, 1), (RANK, 1)),
        ((RATE, 1), (RATIO, 1)),
        ((RANK, 2),),
        ((RATE, 3),),
        ((RATE, 2), (RANK, 1)),
        ((RATIO, 2),),
        ((RATE, 1), (SCALING, 1)),
        ((SCALING, 2),),
    ]
    mains = [((name, 1),) for name in coordinates]
    leading = (RATE, RANK, RATIO, SCALING)
    squares = [((name, 2),) for name, c in coordinates.items() if name not in leading and c.level is None]
    return [term for term in [*mains, *lead, *squares] if all(name in coordinates for name, _ in term)]


def _why(
    term: Term,
    label: str,
    coordinates: dict[str, Coordinate],
    points: pd.DataFrame,
    u: dict[str, np.ndarray],
    terms: Sequence[Term],
) -> str:
    """Why a term says nothing new."""
    (name, power), *others = term
    values = points[coordinates[name].column].nunique()
    if power > 1 and not others and values <= power:
        return f"{label}: {values} values of {name}"
    if power > 1 or others:
        return f"{label}: follows from the other terms at these settings"
    before = [other[0][0] for other in terms if len(other) == 1 and other[0][1] == 1]
    nearest = max(before, key=lambda other: abs(float(np.corrcoef(u[other], u[name])[0, 1])), default="")
    return f"{label}: moves with {coordinates[nearest].label if nearest else 'nothing'}, and the two cannot be told apart"


def name_of(term: Term, coordinates: Mapping[str, Coordinate]) -> str:
    """`(ln learning_rate)² × ln rank`"""
    powers = {1: "{}", 2: "({})²", 3: "({})³"}
    return " × ".join(powers[power].format(coordinates[name].label) for name, power in term)


def _columns(terms: Sequence[Term], u: Mapping[str, np.ndarray], size: int) -> np.ndarray:
    columns = [np.prod([u[name] ** power for name, power in term], axis=0) if term else np.ones(size) for term in terms]
    return np.column_stack(columns) if columns else np.ones((size, 0))


def _least_squares(design: np.ndarray, gains: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coefficients, their HC3 covariance (the classical one where a setting alone bears a term), and each setting's leverage."""
    from statsmodels.regression.linear_model import OLS

    model = OLS(gains, design)
    with np.errstate(all="ignore"):
        found = model.fit(cov_type="HC3")
        found = found if np.isfinite(found.cov_params()).all() else model.fit()
    q, _ = np.linalg.qr(design)
    leverage = np.minimum((q * q).sum(axis=1), 1 - 1e-6)
    return np.asarray(found.params), np.asarray(found.cov_params()), leverage


def _left_out(gains: np.ndarray, residuals: np.ndarray, leverage: np.ndarray) -> float:
    """1 − the squared errors of predicting each setting from all others, over those of their mean (PRESS; Allen, 1974)."""
    size = len(gains)
    total = float((((gains - gains.mean()) * size / (size - 1)) ** 2).sum())
    return 1 - float(((residuals / (1 - leverage)) ** 2).sum()) / total if total > 0 else 0.0

"""What does one axis do? Its effect on a metric with an interval, from COMPLETE trials and those that diverged.

The last value of a pruned trial is that of an early rung, so it tells no effect. Trials that differ in the seed alone are
one setting, and enter a fit as one point, their mean. Effects are *gains*: positive is better, in units of the metric,
whether it is minimised or maximised.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from neo_ray.statistics import (
    CONFIDENCE,
    MAX_LEVELS,
    MIN_PER_LEVEL,
    column,
    complete,
    is_log,
    is_numeric,
    judged,
    setting_of,
    sign_of,
    unvalued,
)

MIN_TRIALS = 5
"""Fewer COMPLETE trials tell nothing of an axis: a curve has three coefficients, and two points more to judge it by."""
DRAWS = 1000
"""Bootstrap draws: enough for the ends of a 95 % interval, which 25 draws lie beyond on either side."""


@dataclass(frozen=True)
class Level:
    """One value of an axis: what the fit expects of the metric there, at the mean of the other axes, and its 95 % interval."""

    value: Any
    mean: float
    low: float
    high: float
    num_trials: int


@dataclass(frozen=True)
class AxisEffect:
    """What an axis does to a metric."""

    axis: str
    method: str
    """`quadratic`, `linear` or `levels` (least squares), or `spearman` (then the gain is |ρ|, without a unit)."""
    gain: float
    """Expected gain of the best value over the worst."""
    interval: tuple[float, float]
    """95 %, simultaneous over all pairs of values (Scheffé), because this pair was chosen after looking."""
    p: float
    best: Level
    worst: Level
    best_interval: tuple[float, float] | None
    """95 % bootstrap interval (by setting) of the best value of a numeric axis."""
    edge: str | None
    """`lowest` or `highest`: the end of the tested values that the best one is; None within, or without an order."""
    edge_share: float
    """Share of the bootstrap draws whose best value is at that end."""
    levels: tuple[Level, ...]
    """All values of an axis that is not continuous."""
    curve: tuple[Level, ...]
    """The fit over the axis: at 61 points of a continuous one, else at its values; empty without a fit."""
    left_out: tuple[Any, ...]
    """Levels with too few trials to be compared."""
    adjusted_for: tuple[str, ...]
    num_capped: int
    """Trials worse than the untrained student, each of which counts as that, lest one run decide the fit."""
    num_lost: int
    """Trials that diverged without a value, each of which counts as that, too."""
    failed: dict[str, int]
    """Cause → trials that FAILED for it and have no value; those that diverged where no trial was COMPLETE."""
    never: tuple[Any, ...]
    """Values of an axis with few at which all trials FAILED."""
    by_run: bool
    """Too few settings for a fit of their means, so that each run counted on its own."""
    num_settings: int
    num_seeds: int
    ids: tuple[str, ...]


def effects_of(frame: pd.DataFrame, axes: Sequence[str], metric: str, mode: str) -> dict[str, AxisEffect | None]:
    """What each axis does to the metric, the others taken out; None where the trials do not tell."""
    return {axis: axis_effect(frame, axis, metric, mode, axes) for axis in axes}


def axis_effect(frame: pd.DataFrame, axis: str, metric: str, mode: str, others: Sequence[str] = ()) -> AxisEffect | None:
    """The effect of one axis on a metric; None where `shortage` says what is missing.

    Least squares on the settings' means: a quadratic for a numeric axis (in its logarithm where that is its scale), a mean
    for each level of another. The other axes' main effects are taken out where the number of settings allows: quadratic
    ones where at least 5 and as many residual degrees of freedom are left as there are coefficients, else linear ones
    where 5 are left, else none. Where the settings are too few for any of these, the runs are fitted.
    Variances are the larger of the classical and the HC3 estimate (MacKinnon & White, 1985): the first is too small where
    noise grows with the loss, the second where few degrees of freedom are left. With too few runs for a curve: Spearman's
    ρ, its exact permutation p, and a bootstrap interval.
    """
    if shortage(frame, axis, metric) is not None:
        return None
    known = judged(frame, metric, mode)
    told = known[column(axis)].isin(
        known[column(axis)][~known["lost"]]
    )  # elsewhere it bounds the stable region, and bends a curve
    runs, left_out = _comparable(known[told], axis)
    outside = int((~told & known[column(axis)].notna()).sum())
    runs = runs.assign(setting=setting_of(runs, [axis, *others]))
    groups = runs.groupby("setting", sort=False)
    points = groups.first().assign(gain=groups["gain"].mean())
    others = [other for other in others if other != axis]
    fit = _fit(points, axis, others)
    by_run = fit is None and len(points) < len(runs)
    fit = _fit(runs, axis, others) if by_run else fit
    counts = runs[column(axis)].value_counts().to_dict()
    found = _contrast(fit, points, axis, sign_of(mode), counts) if fit else _spearman(points, axis, sign_of(mode), counts)
    return AxisEffect(
        axis=axis,
        adjusted_for=fit.adjusted_for if fit else (),
        left_out=left_out,
        num_capped=int((runs["limited"] & ~runs["lost"]).sum()),
        num_lost=int(runs["lost"].sum()),
        failed=unvalued(frame[frame[column(axis)].notna()]) | ({"diverged": outside} if outside else {}),
        never=tuple(_lost_levels(frame, axis)),
        by_run=by_run,
        num_settings=len(points),
        num_seeds=int(runs["seed"].nunique()),
        ids=tuple(runs["id"]),
        **found,
    )


def shortage(frame: pd.DataFrame, axis: str, metric: str) -> str | None:
    """What keeps an effect of the axis from being told, in words; None where nothing does."""
    done = complete(frame, metric)
    values = done[column(axis)].dropna() if column(axis) in done else done["id"].iloc[:0]
    if values.nunique() < 2:
        only = f" ({values.iloc[0]})" if len(values) else ""
        return f"COMPLETE trials at {values.nunique()} value{only}, and 2 values are the least"
    if len(values) < MIN_TRIALS:
        return f"{len(values)} COMPLETE trials, and {MIN_TRIALS} are the least"
    if _comparable(done, axis)[0][column(axis)].nunique() < 2:
        counts = ", ".join(
            f"{count} at {value}" for value, count in values.value_counts().sort_index(key=lambda v: v.astype(str)).items()
        )
        return f"COMPLETE trials: {counts}; {MIN_PER_LEVEL} at each of two values are the least"
    return None


@dataclass(frozen=True)
class _Coding:
    """How an axis enters the regression: columns centred over the settings, so that the intercept is the mean setting.

    A missing value (an axis that is inactive there) stands at the centre.
    """

    levels: tuple[Any, ...]
    """Of an axis that is not numeric; empty for one that is."""
    log: bool
    middle: float
    width: float
    degree: int
    centre: np.ndarray

    def columns(self, values: pd.Series) -> np.ndarray:
        raw = self._raw(values)
        return np.where(np.isnan(raw), 0.0, raw - self.centre) if raw.size else raw

    def _raw(self, values: pd.Series) -> np.ndarray:
        if self.levels:
            found = np.array([[float(v == level) for level in self.levels[1:]] for v in values]).reshape(len(values), -1)
            found[values.isna().to_numpy()] = np.nan
            return found
        x = values.to_numpy(dtype=float)
        u = ((np.log(x) if self.log else x) - self.middle) / self.width
        return np.column_stack([u**power for power in range(1, self.degree + 1)])


def _coding(values: pd.Series, numeric: bool, degree: int) -> _Coding:
    present = values.dropna()
    if not numeric:
        coding = _Coding(tuple(sorted(present.unique(), key=str)), False, 0.0, 1.0, 1, np.zeros(1))
    else:
        x = present.to_numpy(dtype=float)
        log = is_log(x)
        t = np.log(x) if log else x
        degree = min(degree, len(np.unique(t)) - 1)
        coding = _Coding((), log, float(t.mean()), float(t.std()) or 1.0, degree, np.zeros(1))
    return _Coding(coding.levels, coding.log, coding.middle, coding.width, coding.degree, coding._raw(present).mean(axis=0))


@dataclass(frozen=True)
class _Fit:
    coding: _Coding
    design: np.ndarray
    """n × p: the intercept, the q columns of the axis, those of the others."""
    gains: np.ndarray
    num_own: int
    beta: np.ndarray
    covariances: tuple[np.ndarray, np.ndarray]
    df: int
    adjusted_for: tuple[str, ...]

    def variance(self, rows: np.ndarray) -> np.ndarray:
        """Variance of each row's combination of the intercept's and the axis's coefficients (m × (1 + q))."""
        size = rows.shape[1]
        return np.max([np.einsum("mi,ij,mj->m", rows, c[:size, :size], rows) for c in self.covariances], axis=0)

    def p_value(self) -> float:
        own = slice(1, 1 + self.num_own)
        b = self.beta[own]
        walds = [float(b @ np.linalg.pinv(c[own, own]) @ b) / self.num_own for c in self.covariances]
        return float(stats.f.sf(min(walds), self.num_own, self.df))


def _fit(points: pd.DataFrame, axis: str, others: Sequence[str]) -> _Fit | None:
    """The richest of three models that leaves enough residual degrees of freedom; None where not even the last does."""
    coding = _coding(points[column(axis)], is_numeric(points, axis), degree=2)
    own = np.column_stack([np.ones(len(points)), coding.columns(points[column(axis)])])
    for degree, least in ((2, 5), (1, 5), (0, 3)):
        design, used = _with_others(own, points, others if degree else (), degree)
        num_points, num_columns = design.shape
        if num_points - num_columns >= max(least, num_columns if degree == 2 else 0):
            return _solve(coding, design, points["gain"].to_numpy(dtype=float), own.shape[1] - 1, used)
    return None


def _with_others(
    design: np.ndarray, points: pd.DataFrame, others: Sequence[str], degree: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The design with the columns of the other axes that say something new: what is collinear is dropped."""
    used: list[str] = []
    for other in others:
        values = points[column(other)]
        if values.nunique() < 2:
            continue
        for extra in _coding(values, is_numeric(points, other), degree).columns(values).T:
            wider = np.column_stack([design, extra])
            if wider.shape[1] <= len(points) and np.linalg.matrix_rank(wider, tol=1e-6 * len(points)) == wider.shape[1]:
                design, used = wider, [*used, other]
    return design, tuple(dict.fromkeys(used))


def _solve(coding: _Coding, design: np.ndarray, gains: np.ndarray, num_own: int, used: tuple[str, ...]) -> _Fit:
    beta = np.linalg.lstsq(design, gains, rcond=None)[0]
    df = len(gains) - design.shape[1]
    bread = np.linalg.inv(design.T @ design)
    leverage = np.minimum(np.einsum("ni,ij,nj->n", design, bread, design), 1 - 1e-6)
    floor = (1e-9 * max(1.0, float(np.abs(gains).max()))) ** 2  # rounding is not evidence: no variance is below it
    squares = (gains - design @ beta) ** 2
    classical = bread * max(float(squares.sum()) / df, floor)
    hc3 = bread @ (design.T @ (design * (squares / (1 - leverage) ** 2 + floor)[:, None])) @ bread
    return _Fit(coding, design, gains, num_own, beta, (classical, hc3), df, used)


def _contrast(fit: _Fit, points: pd.DataFrame, axis: str, sign: int, counts: dict[Any, int]) -> dict[str, Any]:
    """Best against worst value of the fitted axis, as fields of AxisEffect."""
    numeric, size = not fit.coding.levels, 1 + fit.num_own
    values, continuous = _candidates(points[column(axis)], numeric)
    rows = np.column_stack([np.ones(len(values)), fit.coding.columns(values)])
    gains = rows @ fit.beta[:size]
    at, bottom = int(gains.argmax()), int(gains.argmin())
    reach = math.sqrt(fit.num_own * stats.f.ppf(CONFIDENCE, fit.num_own, fit.df))
    half = reach * math.sqrt(fit.variance((rows[at] - rows[bottom])[None])[0])
    spans = stats.t.ppf((1 + CONFIDENCE) / 2, fit.df) * np.sqrt(fit.variance(rows))
    levels = tuple(
        Level(v, sign * g, sign * g - s, sign * g + s, counts.get(v, 0))
        for v, g, s in zip(values.tolist(), gains.tolist(), spans.tolist(), strict=True)
    )
    gain = float(gains[at] - gains[bottom])
    drawn = _bootstrap_best(fit, rows) if numeric else np.array([at])
    return {
        "method": "levels" if not numeric else "quadratic" if fit.coding.degree == 2 else "linear",
        "gain": gain,
        "interval": (gain - half, gain + half),
        "p": fit.p_value(),
        "best": levels[at],
        "worst": levels[bottom],
        "best_interval": _ends(values.to_numpy(dtype=float)[drawn]) if numeric else None,
        "edge": {0: "lowest", len(values) - 1: "highest"}.get(at) if numeric else None,
        "edge_share": float((drawn == at).mean()) if numeric and at in (0, len(values) - 1) else 0.0,
        "levels": () if continuous else levels,
        "curve": levels,
    }


def _candidates(values: pd.Series, numeric: bool) -> tuple[pd.Series, bool]:
    """The values to choose between: the levels, or 61 points over the range of a continuous axis (whole where it is)."""
    levels = pd.Series(sorted(values.unique(), key=None if numeric else str))
    if not numeric or len(levels) <= MAX_LEVELS:
        return levels, False
    ends = (float(levels.iloc[0]), float(levels.iloc[-1]))
    points = np.geomspace(*ends, 61) if is_log(ends) else np.linspace(*ends, 61)
    points[[0, -1]] = ends
    whole = bool((levels == levels.round()).all())
    return pd.Series(np.unique(points.round()) if whole else points), True


def _bootstrap_best(fit: _Fit, rows: np.ndarray) -> np.ndarray:
    """Index of the best candidate in each draw of the settings with replacement."""
    num_points, num_columns = fit.design.shape
    counts = np.random.default_rng(0).multinomial(num_points, np.full(num_points, 1 / num_points), size=DRAWS)
    products = (fit.design[:, :, None] * fit.design[:, None, :]).reshape(num_points, -1)
    moments = (counts @ products).reshape(DRAWS, num_columns, num_columns)
    targets = counts @ (fit.design * fit.gains[:, None])
    ridge = 1e-8 * num_points * np.eye(num_columns)  # a draw may hold too few settings for the model
    beta = np.linalg.solve(moments + ridge, targets[:, :, None])[:, :, 0]
    return (beta[:, : rows.shape[1]] @ rows.T).argmax(axis=1)


def _spearman(points: pd.DataFrame, axis: str, sign: int, counts: dict[Any, int]) -> dict[str, Any]:
    """The trend over too few settings for a curve, as fields of AxisEffect."""
    x, gains = points[column(axis)].to_numpy(dtype=float), points["gain"].to_numpy(dtype=float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a draw of equal values has no ρ
        test = stats.permutation_test((x,), lambda v: stats.spearmanr(v, gains)[0], permutation_type="pairings")
        draws = np.random.default_rng(0).integers(len(x), size=(DRAWS, len(x)))
        rhos = np.array([stats.spearmanr(x[draw], gains[draw])[0] for draw in draws])
    rho = float(np.nan_to_num(test.statistic))
    direction = -1.0 if rho < 0 else 1.0
    low, high = _ends(direction * rhos[~np.isnan(rhos)])
    at = [(v, sign * float(gains[x == v].mean())) for v in (x.max(), x.min())][:: int(direction)]
    best, worst = (Level(float(v), mean, math.nan, math.nan, counts.get(v, 0)) for v, mean in at)
    return {
        "method": "spearman",
        "gain": abs(rho),
        "interval": (low, high),
        "p": float(test.pvalue) if math.isfinite(test.pvalue) else 1.0,
        "best": best,
        "worst": worst,
        "best_interval": None,
        "edge": "highest" if direction > 0 else "lowest",
        "edge_share": float((direction * rhos > 0).mean()),
        "levels": (),
        "curve": (),
    }


def _lost_levels(frame: pd.DataFrame, axis: str) -> list[Any]:
    """Values whose trials have all FAILED, of an axis that is not continuous."""
    groups = frame[frame[column(axis)].notna()].groupby(column(axis))["state"]
    return [value for value, states in groups if (states == "FAILED").all()] if len(groups) <= MAX_LEVELS else []


def _ends(draws: np.ndarray) -> tuple[float, float]:
    if not len(draws):
        return (math.nan, math.nan)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, (tail, 1 - tail), method="nearest")
    return float(low), float(high)


def _comparable(done: pd.DataFrame, axis: str) -> tuple[pd.DataFrame, tuple[Any, ...]]:
    """The trials whose level can be compared, and the levels that have too few: of an axis without an order, or of two values."""
    values = done[column(axis)]
    if is_numeric(done, axis) and values.nunique() > 2:
        return done[values.notna()], ()
    counts = values.value_counts()
    few = counts[counts < MIN_PER_LEVEL].index
    return done[values.notna() & ~values.isin(few)], tuple(few)

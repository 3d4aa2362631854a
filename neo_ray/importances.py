"""Which axis matters? The share of the metric's variance over the tested ranges that each explains alone: a functional ANOVA.

The surface is that of extremely randomised trees (Hutter, Hoos & Leyton-Brown, ICML 2014, with random forests) over settings'
means; an axis that spans more than a factor of 5 is measured in its logarithm, levels count alike. What the axes do not explain
alone is interaction and noise. Trees that are fitted to noise share it out among all axes: therefore each share stands beside
those that shuffled copies of the axis get.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from neo_ray.evidence import Evidence, for_laws, number
from neo_ray.records import TrialRecord
from neo_ray.statistics import MAX_LEVELS, column, complete, gains_of, is_log, is_numeric, setting_of, sign_of

MIN_SETTINGS = 16
MAX_SETTINGS = 1000
"""More are a random sample: the time of a tree grows with them, and shares of 1,000 are known to a few hundredths."""
TREES = 64
DRAWS, TREES_PER_DRAW = 40, 6
"""Their spread has that of few trees in it, too: intervals are wider rather than narrower than they should be."""
BASE_POINTS, BASE_POINTS_PER_DRAW = 512, 64
"""Points of the other axes that are averaged over."""
POINTS = 12
"""Of a continuous axis."""


@dataclass(frozen=True)
class Share:
    axis: str
    share: float
    """Of the variance, between 0 and 1."""
    interval: tuple[float, float]
    """95 %, from the spread over random halves of the settings (all seeds of a setting together)."""
    inert: float
    """Nineteen in twenty shuffled copies of the axis get no more."""

    @property
    def tells(self) -> bool:
        return self.share > self.inert


@dataclass(frozen=True)
class Importances:
    metric: str
    label: str
    """The metric as a sentence names it."""
    shares: tuple[Share, ...]
    """The largest first."""
    interaction: float
    """What no axis explains alone: interactions and noise."""
    interaction_interval: tuple[float, float]
    num_settings: int
    num_sampled: int
    """Settings that were used; fewer than `num_settings` where these are more than MAX_SETTINGS."""
    num_pruned: int
    """Trials that were stopped early and stand with a pessimistic value."""
    num_diverged: int
    """Trials that stand with the worst value."""
    num_left_out: int
    """Other trials without a value."""
    logs: tuple[str, ...]
    """Axes that are measured in their logarithm."""


def importances_of(evidence: Evidence) -> Importances | None:
    """None where `lacking` says why."""
    if lacking(evidence) is not None:
        return None
    laws = for_laws(evidence)
    runs = _valued(laws)
    points = _settings(runs, laws.varied)
    axes = _axes(laws, points)
    sample = points.sample(min(len(points), MAX_SETTINGS), random_state=0)
    coded = [_coordinate(sample[column(axis)], is_numeric(sample, axis)) for axis in axes]
    x, sizes = np.column_stack([at for at, _ in coded]), [size for _, size in coded]
    y = sample["gain"].to_numpy(dtype=float)
    shares = _shares(x, y, sizes, TREES, BASE_POINTS, seed=0)
    halves, shuffled = _draws(x, y, sizes)
    spread = halves.std(axis=0, ddof=1)
    nulls = np.quantile(shuffled, 0.95, axis=0, method="higher")
    rest, rest_spread = 1 - float(shares.sum()), float(halves.sum(axis=1).std(ddof=1))
    told = [Share(axis, float(s), _interval(s, d), float(n)) for axis, s, d, n in zip(axes, shares, spread, nulls, strict=True)]
    return Importances(
        metric=laws.metric,
        label=laws.label,
        shares=tuple(sorted(told, key=lambda share: -share.share)),
        interaction=max(0.0, rest),
        interaction_interval=_interval(rest, rest_spread),
        num_settings=len(points),
        num_sampled=len(sample),
        num_pruned=int((runs["how"] == "pruned").sum()),
        num_diverged=int((runs["how"] == "diverged").sum()),
        num_left_out=len(laws.frame) - len(runs),
        logs=tuple(axis for axis in axes if _continuous(sample, axis) and is_log(sample[column(axis)].dropna())),
    )


def lacking(evidence: Evidence) -> str | None:
    """Why there are no importances, as a sentence; None where there are."""
    laws = for_laws(evidence)
    points = _settings(_valued(laws), laws.varied)
    if len(points) < MIN_SETTINGS:
        return f"Importances are not drawn: {len(points)} settings have a value of {laws.label}; {MIN_SETTINGS} are the least."
    if len(_axes(laws, points)) < 2:
        return "Importances are not drawn: that takes two axes that vary."
    if points["gain"].nunique() < 2:
        return f"Importances are not drawn: {laws.label} is the same in all settings."
    return None


def importance_lines(found: Importances | None) -> list[str]:
    """The shares in sentences; nothing without them."""
    if found is None:
        return []
    telling = [share for share in found.shares if share.tells]
    inert = [share for share in found.shares if not share.tells]
    over = f"the variance of {found.label} over the tested ranges"
    lines = [f"{share.axis} alone explains {_percent(share.share)} of {over} (95 % {_span(share.interval)})" for share in telling]
    if inert:
        named = ", ".join(f"{s.axis} ({_percent(s.share)}; shuffled up to {_percent(s.inert)})" for s in inert)
        lines.append(f"No larger than the share of a shuffled axis: {named}")
    lines.append(f"Interactions and noise: {_percent(found.interaction)} (95 % {_span(found.interaction_interval)})")
    return [*lines, _how(found)]


def _how(found: Importances) -> str:
    """What the shares were computed from."""
    sampled = f"a random {found.num_sampled} of {found.num_settings}" if found.num_sampled < found.num_settings else None
    parts = [f"From randomised trees over {sampled or found.num_settings} settings"]
    parts += [f"{' and '.join(found.logs)} in the logarithm"] if found.logs else []
    if found.num_pruned:
        parts.append(
            f"{found.num_pruned} PRUNED trials stand with their last value and what COMPLETE ones gained after it, and no better "
            "than the median of these"
        )
    parts += [f"{found.num_diverged} that diverged stand with the worst value"] if found.num_diverged else []
    parts += [f"{found.num_left_out} without a value are left out"] if found.num_left_out else []
    return "; ".join(parts)


def _percent(share: float) -> str:
    return f"{number(100 * share, 2)} %"


def _span(interval: tuple[float, float]) -> str:
    return " to ".join(_percent(end) for end in interval)


def _interval(share: float, spread: float) -> tuple[float, float]:
    """The spread over halves of a sample is about the standard error of the whole (Shao & Tu, The Jackknife, 1995, ch. 2)."""
    return (max(0.0, float(share - 1.96 * spread)), min(1.0, float(share + 1.96 * spread)))


def _valued(laws: Evidence) -> pd.DataFrame:
    """The trials with a gain: what they reached, or for PRUNED and diverged ones what is assumed; `how` says which.

    The last value of a pruned trial lacks what training would have gained still; COMPLETE trials tell how much that is.
    """
    done = complete(laws.frame, laws.metric)
    if done.empty:
        return done.assign(gain=pd.Series(dtype=float), how=pd.Series(dtype=str))
    sign, middle, later = sign_of(laws.mode), float(done[laws.metric].median()), _later(laws)
    values: dict[str, float] = dict(zip(done["id"], done[laws.metric], strict=True))
    how = dict.fromkeys(values, "reached")
    for record in laws.records:
        last = record.measured(laws.metric)
        if record.state == "PRUNED" and last is not None:
            values[record.id] = sign * min(sign * (last + later.get(_last_rung(record), 0.0)), sign * middle)
            how[record.id] = "pruned"
    frame = laws.frame[laws.frame["id"].isin(list(values))]
    gains, _ = gains_of(frame.assign(**{laws.metric: frame["id"].map(values)}), laws.metric, laws.mode)
    diverged = laws.frame[laws.frame["diverged"].astype(bool) & ~laws.frame["id"].isin(list(values))]
    diverged = diverged[diverged["state"] != "RUNNING"].assign(gain=gains.min(), how="diverged")
    return pd.concat([frame.assign(gain=gains, how=frame["id"].map(how)), diverged])


def _later(laws: Evidence) -> dict[int, float]:
    """Rung → the median of how the metric of COMPLETE trials changed after it."""
    found: dict[int, list[float]] = {}
    for record in laws.records:
        end = record.measured(laws.metric) if record.state == "COMPLETE" else None
        for row in record.curve if end is not None else ():
            value, rung = row.get(laws.metric), row.get("rung")
            if isinstance(value, int | float) and isinstance(rung, int) and math.isfinite(value):
                found.setdefault(rung, []).append((end or 0.0) - value)
    return {rung: float(np.median(changes)) for rung, changes in found.items()}


def _last_rung(record: TrialRecord) -> int:
    return max((row["rung"] for row in record.curve if isinstance(row.get("rung"), int)), default=0)


def _settings(runs: pd.DataFrame, varied: Sequence[str]) -> pd.DataFrame:
    """A row a setting, with the mean gain of its trials."""
    groups = runs.assign(setting=setting_of(runs, varied)).groupby("setting", sort=False)
    return groups.first().assign(gain=groups["gain"].mean())


def _axes(laws: Evidence, points: pd.DataFrame) -> list[str]:
    return [axis for axis in laws.axes if column(axis) in points and points[column(axis)].nunique() > 1]


def _continuous(points: pd.DataFrame, axis: str) -> bool:
    return is_numeric(points, axis) and points[column(axis)].nunique() > MAX_LEVELS


def _coordinate(values: pd.Series, numeric: bool) -> tuple[np.ndarray, int]:
    """Between 0 and 1, and of how many levels, which share the range alike (a continuous axis: POINTS).

    A number that is missing, as its axis is inactive there, stands in the middle; other missing values are a level.
    """
    if numeric and values.nunique() > MAX_LEVELS:
        x = values.to_numpy(dtype=float)
        t = np.log(x) if is_log(values.dropna()) else x
        low, high = np.nanmin(t), np.nanmax(t)
        return np.nan_to_num((t - low) / (high - low), nan=0.5), POINTS
    levels = sorted(values.dropna().unique(), key=None if numeric else str)
    places = {value: (i + 0.5) for i, value in enumerate(levels)}
    size = len(levels) + int(values.isna().any() and not numeric)
    missing = len(levels) / 2 if numeric else len(levels) + 0.5
    return np.array([places.get(value, missing) for value in values]) / size, size


def _shares(x: np.ndarray, y: np.ndarray, sizes: Sequence[int], trees: int, num_base: int, seed: int) -> np.ndarray:
    """The share of each axis's main effect in the variance of the fitted surface. x: n × d in [0, 1]; y: n → d."""
    from scipy.stats import qmc
    from sklearn import config_context
    from sklearn.tree import ExtraTreeRegressor

    base = (np.floor(qmc.Sobol(len(sizes), rng=0).random(num_base) * sizes) + 0.5) / sizes
    grids = [_grid(base, axis, size) for axis, size in enumerate(sizes)]
    points = np.concatenate([base, *grids]).astype(np.float32)
    x, surface = x.astype(np.float32), np.zeros(len(points))
    with config_context(skip_parameter_validation=True):  # a third of the time of a small tree
        for tree in range(trees):
            grown = ExtraTreeRegressor(max_features=None, random_state=1000 * seed + tree).fit(x, y, check_input=False)
            surface += grown.tree_.predict(points).ravel()
    ends = np.cumsum([len(base), *map(len, grids)])
    curves = [surface[a:b].reshape(size, -1).mean(axis=1) for a, b, size in zip(ends, ends[1:], sizes, strict=False)]
    return np.array([curve.var() for curve in curves]) / max(float(surface.var()), 1e-30)


def _grid(base: np.ndarray, axis: int, size: int) -> np.ndarray:
    """The base points with the axis at the middle of each of its `size` cells."""
    points = np.tile(base, (size, 1))
    points[:, axis] = np.repeat((np.arange(size) + 0.5) / size, len(base))
    return points


def _draws(x: np.ndarray, y: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Shares in random halves of the settings, and those of a shuffled copy of each axis beside the axes. Each DRAWS × d."""
    rng = np.random.default_rng(0)
    num, size = x.shape
    halves, shuffled = [], []
    for draw in range(1, DRAWS + 1):
        half = rng.permutation(num)[: num // 2]
        halves.append(_shares(x[half], y[half], sizes, TREES_PER_DRAW, BASE_POINTS_PER_DRAW, draw))
        beside = np.column_stack([x, *(rng.permutation(x[:, axis]) for axis in range(size))])
        shuffled.append(_shares(beside, y, [*sizes, *sizes], TREES_PER_DRAW, BASE_POINTS_PER_DRAW, draw)[size:])
    return np.array(halves), np.array(shuffled)

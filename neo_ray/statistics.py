"""What do the trials say? A tidy table of them, the noise of a run, group against group, the best setting.

Only COMPLETE trials are compared: the last value of a pruned trial is that of an early rung. A *setting* is one value on
every axis; trials that differ in the seed alone are one setting.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from neo_ray.records import TrialRecord

CONFIDENCE = 0.95
MAX_LEVELS = 12
"""An axis with more distinct values is read as continuous."""
MIN_PER_LEVEL = 3
"""Fewer trials have no mean to speak of."""
MEASURED = ("id", "state", "cause", "phase", "seed", "tokens", "steps", "seconds", "accelerator_seconds", "peak_memory_bytes")
COLUMNS = (*MEASURED, "scaling", "diverged")


@dataclass(frozen=True)
class Noise:
    """How far apart runs of one setting are, by the seed alone: a pooled standard deviation and its χ² interval."""

    sd: float
    df: int
    low: float
    high: float
    num_settings: int
    num_trials: int


@dataclass(frozen=True)
class Difference:
    """The gain of one group of trials over another."""

    gain: float
    interval: tuple[float, float]
    p: float
    first: float
    second: float
    """Means of the two groups that the gain is the difference of, in units of the metric: of settings, and limited."""
    num_pairs: int
    """Settings that match in everything else; 0: the groups were compared unpaired."""
    num_limited: int
    """Trials worse than the untrained student, each of which counts as that."""
    num_lost: int
    """Trials that diverged without a value, each of which counts as that, too."""
    failed: tuple[dict[str, int], dict[str, int]]
    """Of either group, `unvalued`."""
    num_seeds: int
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Edge:
    axis: str
    value: float
    side: str
    """`lowest` or `highest`."""


@dataclass(frozen=True)
class Best:
    """The best setting (mean over its seeds) and the best trial of it."""

    id: str
    value: float
    num_seeds: int
    num_settings: int
    second: str | None
    margin: float | None
    margin_in_sds: float | None
    """The margin over the second setting, in standard deviations of a single run."""
    edges: tuple[Edge, ...]


def column(axis: str) -> str:
    """The column of an axis: its name, or `param.<name>` where a measured column has that name (tokens, steps)."""
    return f"param.{axis}" if axis in COLUMNS and axis != "seed" else axis


def table(records: Sequence[TrialRecord]) -> pd.DataFrame:
    """One row a trial: what was tried (a column an axis), what came out, what it cost.

    `diverged`: it FAILED so, a rank metric is NaN, or worse than that of the untrained student (`untrained_<metric>`).
    A metric that is not defined is NaN, never 0. Lists stand as their JSON text.
    """
    rows = [_row(record) for record in records]
    frame = pd.DataFrame(rows, columns=list(dict.fromkeys([*COLUMNS, *(key for row in rows for key in row)])))
    metrics = {name for record in records for name in record.metrics}
    measured = [name for name in frame.columns.astype(str) if name in metrics or name.startswith("untrained_")]
    for name in ("scaling", *measured):
        frame[name] = pd.to_numeric(frame[name], errors="coerce")
    return frame.replace([math.inf, -math.inf], math.nan) if len(frame) else frame


def axes_of(frame: pd.DataFrame, records: Sequence[TrialRecord]) -> tuple[str, ...]:
    """Axes that take more than one value in the trials, in the order of the records; the seed is not one."""
    names = dict.fromkeys(name for record in records for name in record.params if name != "seed")
    return tuple(name for name in names if frame[column(name)].nunique() > 1)


def is_numeric(frame: pd.DataFrame, axis: str) -> bool:
    values = frame[column(axis)].dropna()
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def is_log(values: Sequence[float] | np.ndarray | pd.Series) -> bool:
    """Is an axis read on a logarithmic scale: all positive, and spanning more than a factor of 5?"""
    return min(values) > 0 and max(values) > 5 * min(values)


def complete(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The COMPLETE trials with a value of the metric."""
    if metric not in frame:
        return frame.iloc[:0].assign(**{metric: pd.Series(dtype=float)})
    return frame[(frame["state"] == "COMPLETE") & frame[metric].notna()]


def setting_of(frame: pd.DataFrame, axes: Sequence[str]) -> pd.Series:
    """A number for each row: the same where all axes agree (two missing values agree)."""
    columns = [column(axis) for axis in axes]
    if not columns or frame.empty:
        return pd.Series(0, index=frame.index, dtype=int)
    return frame.groupby(columns, dropna=False, sort=False).ngroup()


def sign_of(mode: str) -> int:
    """Metric × sign is the gain: higher is better."""
    return 1 if mode == "max" else -1


def gains_of(runs: pd.DataFrame, metric: str, mode: str) -> tuple[pd.Series, int]:
    """Metric × sign, where a trial worse than the untrained student counts as that, and how many are.

    How far beyond it a diverged run went is chance: one that ends at 400 would decide every mean that it is in.
    """
    sign = sign_of(mode)
    gains = sign * runs[metric]
    start = f"untrained_{metric}"
    if start not in runs or runs[start].isna().all() or gains.empty:
        return gains, 0
    untrained = sign * float(runs[start].median())
    if gains.max() <= untrained:
        return gains, 0
    return gains.clip(lower=untrained), int((gains < untrained).sum())


def judged(frame: pd.DataFrame, metric: str, mode: str) -> pd.DataFrame:
    """The COMPLETE trials, and those that diverged without a value (`lost`), with their `gain`, and whether it is a bound
    (`limited`).

    A run that diverged says of its setting that it is no better than the untrained student (where none is known: than the worst
    COMPLETE trial). Left out, the seeds that did not diverge would speak for the setting. A run that FAILED for another cause
    tells nothing of quality, and is not in it.
    """
    frame = frame if metric in frame else frame.assign(**{metric: math.nan})
    done, sign = complete(frame, metric), sign_of(mode)
    gains, _ = gains_of(done, metric, mode)
    ended = frame["state"].isin(("COMPLETE", "FAILED")) & (len(done) > 0)
    lost = frame["diverged"].astype(bool) & ended & ~frame.index.isin(done.index)
    start = f"untrained_{metric}"
    known = start in frame and frame[start].notna().any()
    bound = gains.min() if not known else min(gains.min(), sign * float(frame[start].median()))
    rows = frame[lost | frame.index.isin(done.index)]
    gain = gains.reindex(rows.index).fillna(bound)
    return rows.assign(gain=gain, lost=lost[rows.index], limited=lost[rows.index] | (gain > sign * rows[metric]))


def unvalued(rows: pd.DataFrame) -> dict[str, int]:
    """Cause → how many of the trials FAILED for it, of causes that tell nothing of quality."""
    failed = rows[(rows["state"] == "FAILED") & ~rows["diverged"].astype(bool)]
    return {str(cause): int(count) for cause, count in failed["cause"].fillna("error").value_counts().items()}


def unstable(frame: pd.DataFrame, axes: Sequence[str], metric: str) -> pd.Series:
    """Which rows are of a setting that some seed diverged with: what its other seeds reached is their luck.

    How a trial that was stopped would have ended is not known. Where no setting has a value without it, those seeds alone
    that have none speak against theirs.
    """
    lost = frame["diverged"].astype(bool) & frame["state"].isin(("COMPLETE", "FAILED"))
    settings, valued = setting_of(frame, axes), frame.index.isin(complete(frame, metric).index)
    for bad in (lost, lost & ~valued):
        found = settings.isin(settings[bad])
        if (valued & ~found).any():
            return found
    return pd.Series(False, index=frame.index)


def aliases(frame: pd.DataFrame, axes: Sequence[str]) -> dict[str, str]:
    """Axis → the earlier axis that it moves with (|correlation| > 0.98): the two cannot be told apart."""
    order = sorted((a for a in axes if is_numeric(frame, a)), key=lambda a: a == "alpha")
    found: dict[str, str] = {}
    for i, axis in enumerate(order):
        for other in order[:i]:
            pair = frame[[column(other), column(axis)]].dropna().astype(float)
            if other in found or len(pair) < 3 or (pair.nunique() < 2).any():
                continue
            x, y = (np.log(pair[c]) if is_log(pair[c]) else pair[c] for c in pair)
            if abs(np.corrcoef(x, y)[0, 1]) > 0.98:
                found[axis] = other
                break
    return found


def noise(frame: pd.DataFrame, axes: Sequence[str], metric: str) -> Noise | None:
    """Pooled standard deviation of runs that differ in the seed alone; None where no stable setting has two seeds."""
    runs = complete(frame[~unstable(frame, axes, metric)], metric).assign(setting=lambda f: setting_of(f, axes))
    groups = runs.groupby(["setting", "seed"])[metric].mean().groupby("setting")
    counts = groups.count()
    repeated = counts[counts > 1].index
    df = int((counts[repeated] - 1).sum())
    if df == 0:
        return None
    squares = float((groups.var()[repeated] * (counts[repeated] - 1)).sum())
    tail = (1 - CONFIDENCE) / 2
    low, high = (math.sqrt(squares / stats.chi2.ppf(q, df)) for q in (1 - tail, tail))
    return Noise(math.sqrt(squares / df), df, low, high, len(repeated), int(counts[repeated].sum()))


def compare(
    frame: pd.DataFrame, first: pd.Series, second: pd.Series, match: Sequence[str], metric: str, mode: str
) -> Difference | None:
    """The gain of the trials in mask `first` over those in `second`, with a 95 % t interval.

    Positive is better. Settings that agree on the axes `match` are paired where there are 3 or more; otherwise Welch's test
    on the settings of each side, 3 or more of them; else None. A run that diverged counts as `judged` says.
    """
    sign, runs = sign_of(mode), judged(frame, metric, mode)
    runs = runs.assign(setting=setting_of(runs, match))
    sides = [runs[mask.reindex(runs.index)] for mask in (first, second)]
    pairs = pd.concat([side.groupby("setting")["gain"].mean() for side in sides], axis=1, join="inner")
    paired = len(pairs) >= MIN_PER_LEVEL
    if paired:
        sides = [side[side["setting"].isin(pairs.index)] for side in sides]
    means = [side.groupby("setting")["gain"].mean() for side in sides]
    if min(map(len, means)) < MIN_PER_LEVEL:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where all values are equal the p is NaN, and counts as none
        test = stats.ttest_rel(*means) if paired else stats.ttest_ind(*means, equal_var=False)
        low, high = test.confidence_interval(CONFIDENCE)
    known = math.isfinite(test.pvalue)
    gain = float(means[0].mean() - means[1].mean())
    return Difference(
        gain=gain,
        interval=(float(low), float(high)) if known else (gain, gain),
        p=float(test.pvalue) if known else 1.0,
        first=sign * float(means[0].mean()),
        second=sign * float(means[1].mean()),
        num_pairs=len(pairs) if paired else 0,
        num_limited=sum(int((side["limited"] & ~side["lost"]).sum()) for side in sides),
        num_lost=sum(int(side["lost"].sum()) for side in sides),
        failed=(unvalued(frame[first]), unvalued(frame[second])),
        num_seeds=int(pd.concat(sides)["seed"].nunique()),
        ids=tuple(i for side in sides for i in side["id"]),
    )


def best_setting(
    frame: pd.DataFrame,
    metric: str,
    mode: str,
    axes: Sequence[str],
    tested: dict[str, tuple[float, float]],
    spread: Noise | None = None,
) -> Best | None:
    """The best setting among COMPLETE trials, of those that no seed diverged with; None without any.

    Args:
        tested: lowest and highest value of each numeric axis; the best is on an edge within 5 % of the range (on the scale
            of the axis) from its end.
    """
    done = complete(frame[~unstable(frame, axes, metric)], metric)
    if done.empty:
        return None
    runs = done.assign(gain=done[metric] * sign_of(mode), setting=setting_of(done, axes))
    order = runs.groupby("setting")["gain"].mean().sort_values(ascending=False)
    leaders = [runs[runs["setting"] == setting].sort_values("gain").iloc[-1] for setting in order.index[:2]]
    margin = float(order.iloc[0] - order.iloc[1]) if len(order) > 1 else None
    return Best(
        id=leaders[0]["id"],
        value=float(order.iloc[0]) * sign_of(mode),
        num_seeds=int(runs[runs["setting"] == order.index[0]]["seed"].nunique()),
        num_settings=len(order),
        second=leaders[1]["id"] if len(leaders) > 1 else None,
        margin=margin,
        margin_in_sds=margin / spread.sd if margin is not None and spread is not None and spread.sd > 0 else None,
        edges=tuple(edge for axis, ends in tested.items() if (edge := edge_of(axis, leaders[0][column(axis)], ends))),
    )


def equivalent(
    frame: pd.DataFrame, metric: str, mode: str, axes: Sequence[str], spread: Noise | None, best: str | None = None
) -> pd.DataFrame:
    """The COMPLETE trials of all stable settings whose mean is within one standard error of the best's; none without a noise.

    `best`: a trial of the best setting, where it is not the one with the best mean over all trials.
    """
    done = complete(frame[~unstable(frame, axes, metric)], metric)
    if spread is None or done.empty:
        return done.iloc[:0]
    runs = done.assign(gain=done[metric] * sign_of(mode), setting=setting_of(done, axes))
    means = runs.groupby("setting")["gain"].agg(["mean", "count"])
    leader = means[means.index.isin(runs["setting"][runs["id"] == best])] if best is not None else means.nlargest(1, "mean")
    mean, count = leader.to_numpy()[0]
    return done[runs["setting"].isin(means[means["mean"] >= mean - spread.sd / math.sqrt(count)].index)]


def edge_of(axis: str, value: Any, ends: tuple[float, float]) -> Edge | None:
    """The end of the range that a value is at, or within 5 % of the range (on the axis's scale) from."""
    low, high = ends
    if not isinstance(value, int | float | np.number) or math.isnan(value) or not low < high:
        return None
    at, first, last = (math.log(x) if is_log(ends) and value > 0 else x for x in (value, low, high))
    share = (at - first) / (last - first)
    side = "lowest" if share <= 0.05 else "highest" if share >= 0.95 else None
    return Edge(axis, float(value), side) if side else None


def _row(record: TrialRecord) -> dict[str, Any]:
    untrained = record.details.get("baseline")
    untrained = untrained if isinstance(untrained, dict) else {}
    row: dict[str, Any] = {name: getattr(record, name) for name in MEASURED}
    row |= {"scaling": record.scaling, "diverged": _diverged(record, untrained)}
    row |= {column(name): _scalar(value) for name, value in record.params.items() if name != "seed"}
    row |= {name: value for name, value in record.metrics.items() if name not in row}
    return row | {f"untrained_{name}": value for name, value in untrained.items()}


def _diverged(record: TrialRecord, untrained: dict[str, Any]) -> bool:
    """A trial is judged where it ended; one that has reported nothing has not diverged."""
    if record.cause is not None:
        return record.cause == "diverged"  # how another failure would have ended, nobody knows
    for name in ("select_ce", "select_bits_per_byte"):
        if name in record.metrics:
            value, start = record.metrics[name], untrained.get(name)
            return value is None or not math.isfinite(value) or (isinstance(start, int | float) and value > start)
    return False


def _scalar(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)

"""What does each setting give for what it costs? Figures along each axis, of settings side by side, of quality against cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from neo_ray.charts import (
    Band,
    Chart,
    Layer,
    Lines,
    NotDrawn,
    Panel,
    Points,
    Role,
    Scale,
    Span,
    Texts,
    level_ticks,
    levels_or_log,
    log_ticks,
    paths,
)
from neo_ray.choosing import region_trials
from neo_ray.effects import AxisEffect
from neo_ray.evidence import CPU_MEMORY, Evidence, number
from neo_ray.pareto import undominated
from neo_ray.report import Analysis
from neo_ray.statistics import column, complete, is_log, is_numeric, setting_of, sign_of

MAX_POINTS = 1500
"""More make a page slow, and are one blot in any case."""
MAX_LINES = 600
FIFTHS = ("best fifth", "second fifth", "middle fifth", "fourth fifth", "worst fifth")


def slices(analysis: Analysis) -> Chart:
    """The metric along each axis, with the fit and the settings that are as good as the best."""
    evidence = analysis.evidence
    done = complete(evidence.frame, evidence.metric)
    varied = [axis for axis in evidence.axes if done[column(axis)].nunique() > 1] if len(done) else []
    if not varied:
        raise NotDrawn(f"Slices are not drawn: no axis has two values among COMPLETE trials with a value of {evidence.label}.")
    good = region_trials(evidence)
    seen, outside = _window(evidence, done)
    shown = _thinned(seen, MAX_POINTS)
    panels = tuple(_slice(evidence, axis, shown, good, analysis.effects.get(axis)) for axis in varied)
    caption = f"{evidence.label} of the COMPLETE trials along each axis, and what the fit expects there with its 95 % interval."
    if len(good):
        num = setting_of(good, evidence.varied).nunique()
        caption += f" Shaded: the {num} settings within one standard error of the best." if num > 1 else ""
        caption += " No second setting is within one standard error of the best." if num == 1 else ""
    else:
        caption += " No setting was completed with two seeds, so it is not known which are as good as the best."
    caption += _outside(outside)
    caption += f" {len(shown)} of {len(seen)} trials are shown." if len(shown) < len(seen) else ""
    return Chart("slices", "Along each axis", caption, panels)


def parallel(analysis: Analysis) -> Chart:
    """Parallel coordinates: a line a trial, by fifths of the metric."""
    evidence = analysis.evidence
    done = complete(evidence.frame, evidence.metric)
    axes = [axis for axis in evidence.varied if len(done) and done[column(axis)].nunique() > 1]
    if len(axes) < 2 or len(done) < 3:
        raise NotDrawn("Parallel coordinates are not drawn: that takes three COMPLETE trials and two axes that vary among them.")
    done, outside = _window(evidence, done.sort_values(evidence.metric, ascending=evidence.mode == "min", kind="stable"))
    shown = _thinned(done, MAX_LINES)
    tracks = [_track(shown, axis, at) for at, axis in enumerate([*axes, evidence.metric])]
    layers: list[Layer] = []
    fifth = np.minimum(np.arange(len(shown)) * 5 // len(shown), 4)
    for k in reversed(range(5)):
        rows = np.flatnonzero(fifth == k)
        if len(rows):
            lines = [
                [(float(at), track[0][row]) for at, track in enumerate(tracks) if not math.isnan(track[0][row])] for row in rows
            ]
            hover = tuple(text for row in rows for text in [_trial_hover(evidence, shown.iloc[row])] * len(lines[0]) + [""])
            regular = all(len(line) == len(tracks) for line in lines)
            role: Role = ("fifth0", "fifth1", "fifth2", "fifth3", "fifth4")[k]
            layers.append(Lines(FIFTHS[k], role, *paths(lines), hover if regular else (), wide=k == 0))
    labels = [(float(at), y, text) for at, track in enumerate(tracks) for y, text in track[1]]
    layers.append(Texts(*(tuple(part) for part in zip(*labels, strict=True))))  # type: ignore[arg-type]
    ticks = tuple((float(at), name) for at, name in enumerate([*axes, evidence.label]))
    panel = Panel(Scale("", ticks=ticks, ends=(-0.4, len(axes) + 0.4)), Scale("", ends=(-0.1, 1.1)), tuple(layers))
    caption = f"A line a COMPLETE trial through its settings to its {evidence.label}, in fifths from best to worst."
    caption += _outside(outside)
    caption += f" {len(shown)} of {len(done)} trials are shown." if len(shown) < len(done) else ""
    return Chart("parallel", "Settings side by side", caption, (panel,))


def costs(analysis: Analysis) -> Chart:
    """Quality against what it costs; the settings that no other beats in every respect."""
    evidence, metric = analysis.evidence, analysis.evidence.metric
    done, outside = _window(evidence, complete(evidence.frame, metric))
    runs = done.assign(setting=setting_of(done, evidence.varied), memory=done["peak_memory_bytes"] / 2**30)
    means = runs.groupby("setting")[["accelerator_seconds", "seconds", "memory", metric]].mean()
    time = "accelerator_seconds" if len(means) and means["accelerator_seconds"].max() > 0 else "seconds"
    words = {time: f"{time.replace('_', '-')} of a trial", "memory": "peak memory, GiB"}
    known = [name for name in words if len(means) > 1 and means[name].min() > 0]
    if not known:
        raise NotDrawn("Quality against cost is not drawn: no two COMPLETE settings say how much time or memory they took.")
    losses = np.column_stack([means[known].to_numpy(), -sign_of(evidence.mode) * means[metric].to_numpy()])
    front = means.index[undominated(losses)]
    first = runs.groupby("setting").first()
    panels = tuple(_cost_panel(evidence, means, first, front, name, words[name]) for name in known)
    beaten = "1 (diamond) is" if len(front) == 1 else f"{len(front)} (diamonds) are"
    measures = " and ".join({"memory": "memory"}.get(name, "time") for name in known)
    caption = f"Means of {len(means)} settings. {beaten} beaten by no other in {evidence.label}, {measures} at once."
    caption += _outside(outside)
    caption += f" {CPU_MEMORY[0].upper()}{CPU_MEMORY[1:]}." if evidence.on_cpu and "memory" in known else ""
    if (num_beaten := len(means) - len(front)) > MAX_POINTS:
        caption += f" {MAX_POINTS} of the {num_beaten} others are shown."
    return Chart("costs", "Quality against cost", caption, panels)


def _slice(evidence: Evidence, axis: str, done: pd.DataFrame, good: pd.DataFrame, effect: AxisEffect | None) -> Panel:
    metric, name = evidence.metric, column(axis)
    values = done[name].dropna()
    numeric = is_numeric(done, axis)
    levels = sorted(values.unique(), key=None if numeric else str)
    at = {v: float(v) if numeric else float(i) for i, v in enumerate(levels)}
    log = numeric and is_log(levels)
    own = done[done[name].notna()]
    layers: list[Layer] = []
    inside = [at[v] for v in good[name].dropna().unique() if v in at] if name in good else []
    if inside and setting_of(good, evidence.varied).nunique() > 1:
        layers += [_region(levels, at, inside, numeric, log)]
    if effect is not None and effect.curve and numeric:
        curve = [level for level in effect.curve if math.isfinite(level.low)]
        x = tuple(float(level.value) for level in curve)
        layers.append(Band("95 % interval", "fit", x, tuple(v.low for v in curve), tuple(v.high for v in curve)))
        layers.append(Lines("fit", "fit", x, tuple(level.mean for level in curve)))
    hover = tuple(_trial_hover(evidence, row) for _, row in own.iterrows())
    layers.append(Points("COMPLETE", "COMPLETE", tuple(at[v] for v in own[name]), tuple(own[metric].astype(float)), hover))
    if effect is not None and effect.curve and not numeric:
        curve = [level for level in effect.curve if level.value in at and math.isfinite(level.low)]
        layers.append(
            Points(
                "fit, 95 % interval",
                "fit",
                tuple(at[level.value] + 0.12 for level in curve),
                tuple(level.mean for level in curve),
                symbol="diamond",
                spread=tuple((level.low, level.high) for level in curve),
                along="y",
            )
        )
    best = own[own["id"] == evidence.best.id] if evidence.best else own.iloc[:0]
    if len(best):
        hover = tuple(_trial_hover(evidence, row) for _, row in best.iterrows())
        layers.append(Points("best", "best", tuple(at[v] for v in best[name]), tuple(best[metric].astype(float)), hover, "star"))
    if not numeric:
        scale = Scale(axis, ticks=tuple((float(i), number(v)) for i, v in enumerate(levels)), ends=(-0.5, len(levels) - 0.5))
    else:
        scale = Scale(axis, log, levels_or_log([float(v) for v in levels]) if log else level_ticks(levels))
    return Panel(scale, Scale(evidence.label), tuple(layers))


def _region(levels: Sequence[Any], at: dict[Any, float], inside: Sequence[float], numeric: bool, log: bool) -> Span:
    """The strip from the lowest to the highest value of an axis among the equivalent settings, wide enough to be seen."""
    low, high = min(inside), max(inside)
    if not numeric:
        return Span("as good as the best", "region", low - 0.3, high + 0.3)
    first, last = at[levels[0]], at[levels[-1]]
    if log:
        step = (last / first) ** 0.015
        return Span("as good as the best", "region", low / step, high * step)
    step = 0.015 * (last - first)
    return Span("as good as the best", "region", low - step, high + step)


def _track(shown: pd.DataFrame, axis: str, at: int) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights between 0 and 1 of the trials on one upright axis, and its labels."""
    raw = shown[column(axis)]
    if not is_numeric(shown, axis):
        levels = sorted(raw.dropna().unique(), key=str)
        place = {v: i / max(1, len(levels) - 1) for i, v in enumerate(levels)}
        return [place.get(v, math.nan) for v in raw], [(place[v], number(v)) for v in levels]
    x = raw.to_numpy(dtype=float)
    low, high = float(np.nanmin(x)), float(np.nanmax(x))
    log = is_log((low, high))
    first, last = (math.log(low), math.log(high)) if log else (low, high)

    def height(value: float) -> float:
        return ((math.log(value) if log else value) - first) / ((last - first) or 1.0)

    ticks = [v for v, _ in levels_or_log(list(x[~np.isnan(x)]))] if log else [v for v, _ in level_ticks(list(x[~np.isnan(x)]))]
    ticks = ticks or list(np.linspace(low, high, 4))
    digits = 3 if high - low > 0.01 * abs(high) else 5
    return [height(v) if not math.isnan(v) else math.nan for v in x], [(height(v), number(v, digits)) for v in ticks]


def _cost_panel(evidence: Evidence, means: pd.DataFrame, first: pd.DataFrame, front: pd.Index, name: str, words: str) -> Panel:
    layers: list[Layer] = []
    on_front = means.index.isin(front)
    for some, label, role, symbol in (
        (~on_front, "beaten by another setting", "quiet", "dot"),
        (on_front, "beaten by none", "best", "diamond"),
    ):
        rows = _thinned(means[some], MAX_POINTS)
        if len(rows):
            hover = tuple(_trial_hover(evidence, first.loc[setting]) for setting in rows.index)
            layers.append(Points(label, role, tuple(rows[name]), tuple(rows[evidence.metric]), hover, symbol))  # type: ignore[arg-type]
    low, high = float(means[name].min()), float(means[name].max())
    scale = Scale(words, True, log_ticks(low, high)) if high > 5 * low else Scale(words)
    return Panel(scale, Scale(evidence.label), tuple(layers))


def _window(evidence: Evidence, done: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The trials that are better than the untrained student, and how many are not: one of them may dwarf all others."""
    start = f"untrained_{evidence.metric}"
    if start not in done or done.empty or done[start].isna().all():
        return done, 0
    sign = sign_of(evidence.mode)
    inside = sign * done[evidence.metric] >= sign * float(done[start].median())
    return (done[inside], int((~inside).sum())) if inside.any() else (done, 0)


def _outside(num: int) -> str:
    which = "1 trial worse than the untrained student is" if num == 1 else f"{num} trials worse than the untrained student are"
    return f" {which} left out." if num else ""


def _thinned(frame: pd.DataFrame, most: int) -> pd.DataFrame:
    return frame if len(frame) <= most else frame.iloc[np.unique(np.linspace(0, len(frame) - 1, most).round().astype(int))]


def _trial_hover(evidence: Evidence, row: pd.Series) -> str:
    setting = ", ".join(f"{axis} {number(row[column(axis)], 3)}" for axis in evidence.varied if not pd.isna(row[column(axis)]))
    return f"trial {row['id']}: {setting}; {evidence.label} {number(row[evidence.metric])}"

"""How did the trials go? Figures of their learning curves, of seeds and noise, and of which worker ran what when."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from neo_ray.charts import Bars, Chart, Layer, Lines, NotDrawn, Panel, Points, Role, Scale, paths, row_scale
from neo_ray.evidence import number
from neo_ray.records import TrialRecord
from neo_ray.report import ORDER, Analysis, ranked
from neo_ray.statistics import column, complete, setting_of, sign_of

MAX_CURVES = 200
MAX_SETTINGS = 16
"""With several seeds, on one figure."""
DASHES = {"COMPLETE": "solid", "RUNNING": "solid", "PRUNED": "dash", "FAILED": "dot"}


def curves(analysis: Analysis) -> Chart:
    """The metric over training tokens (steps, where no tokens were counted), a line a trial."""
    evidence, metric = analysis.evidence, analysis.evidence.metric
    records = [r for r in ranked(evidence.records, metric, evidence.mode) if len(_points(r, metric, "tokens")) > 1]
    clock = "tokens" if records else "step"
    records = records or [r for r in ranked(evidence.records, metric, evidence.mode) if len(_points(r, metric, "step")) > 1]
    if not records:
        raise NotDrawn(f"Learning curves are not drawn: no trial has told its {evidence.label} twice.")
    shown = records[:MAX_CURVES]
    layers: list[Layer] = []
    for state in reversed(ORDER):
        those = [r for r in shown if r.state == state and r is not shown[0]]
        if those:
            layers.append(_curves(those, metric, clock, state, state))  # type: ignore[arg-type]
    name = "best" if shown[0].state == "COMPLETE" else shown[0].state
    layers.append(_curves(shown[:1], metric, clock, f"{name}: trial {shown[0].id}", "best", wide=True))
    start = f"untrained_{metric}"
    untrained = evidence.frame[start].median() if start in evidence.frame else math.nan
    ends = _ends([y for r in shown for _, y in _points(r, metric, clock)], untrained, evidence.mode)
    if not math.isnan(untrained):
        last = max(x for r in shown for x, _ in _points(r, metric, clock))
        layers.append(Lines("untrained student", "quiet", (0.0, float(last)), (float(untrained),) * 2, dash="dash"))
    caption = f"{evidence.label} at each evaluation of {len(shown)} trials."
    caption += f" The other {len(records) - len(shown)} are worse." if len(records) > len(shown) else ""
    outside = sum(not ends[0] <= y <= ends[1] for r in shown for _, y in _points(r, metric, clock)) if ends else 0
    caption += f" {outside} values far above the untrained student lie outside." if outside and evidence.mode == "min" else ""
    words = "training tokens" if clock == "tokens" else "optimizer steps"
    return Chart("curves", "Learning curves", caption, (Panel(Scale(words), Scale(evidence.label, ends=ends), tuple(layers)),))


def seeds(analysis: Analysis) -> Chart:
    """Runs of one setting that differ in the seed alone."""
    evidence, metric = analysis.evidence, analysis.evidence.metric
    if evidence.noise is None:
        raise NotDrawn("Seeds and noise are not drawn: no setting was completed with two seeds.")
    done = complete(evidence.frame, metric)
    runs = done.assign(setting=setting_of(done, evidence.varied), gain=done[metric] * sign_of(evidence.mode))
    groups = runs.groupby("setting")
    repeated = groups["seed"].nunique()
    order = groups["gain"].mean()[repeated[repeated > 1].index].sort_values(ascending=False)
    shown = [runs[runs["setting"] == setting] for setting in reversed(order.index[:MAX_SETTINGS])]
    first = pd.concat([those.iloc[:1] for those in shown])
    telling = [axis for axis in evidence.varied if first[column(axis)].nunique(dropna=False) > 1] or evidence.varied
    names = [_setting_text(telling, row) for _, row in first.iterrows()]
    at = [(float(i), row) for i, those in enumerate(shown) for _, row in those.iterrows()]
    means, sd = tuple(float(those[metric].mean()) for those in shown), evidence.noise.sd
    layers = (
        Points(
            "mean ± one standard deviation of a run",
            "fit",
            means,
            tuple(float(i) for i in range(len(shown))),
            symbol="diamond",
            spread=tuple((mean - sd, mean + sd) for mean in means),
        ),
        Points(
            "a run",
            "COMPLETE",
            tuple(float(row[metric]) for _, row in at),
            tuple(i for i, _ in at),
            tuple(f"trial {row['id']}, seed {row['seed']}: {evidence.label} {number(row[metric])}" for _, row in at),
        ),
    )
    caption = f"{evidence.named(metric)} of runs that differ in the seed alone: {len(shown)} settings, the best on top."
    caption += f" The other {len(order) - len(shown)} are worse." if len(order) > len(shown) else ""
    same = [axis for axis in evidence.varied if axis not in telling]
    caption += f" In all of them: {_setting_text(same, first.iloc[0])}." if same else ""
    panel = Panel(Scale(evidence.label), row_scale(names), layers, rows=len(shown))
    return Chart("seeds", "Seeds and noise", caption, (panel,))


def timeline(analysis: Analysis) -> Chart:
    """From start to end of each trial, by the slot whose workers ran it."""
    records = [r for r in analysis.evidence.records if r.started is not None and r.ended is not None]
    if not records:
        raise NotDrawn("The timeline is not drawn: no trial says when it began and ended.")
    begin = min(r.started or 0.0 for r in records)
    longest = max(r.ended or 0.0 for r in records) - begin
    unit, seconds = ("hours", 3600) if longest > 3 * 3600 else ("minutes", 60) if longest > 180 else ("seconds", 1)
    lanes = sorted({_lane(r) for r in records}, reverse=True)
    layers = []
    for state in ORDER:
        those = [r for r in records if r.state == state]
        if those:
            starts = tuple(((r.started or 0.0) - begin) / seconds for r in those)
            lengths = tuple(max(0.0, (r.ended or 0.0) - (r.started or 0.0)) / seconds for r in those)
            hover = tuple(_bar_hover(r) for r in those)
            role: Role = state  # type: ignore[assignment]
            layers.append(Bars(state, role, tuple(float(lanes.index(_lane(r))) for r in those), starts, lengths, hover))
    panel = Panel(
        Scale(f"{unit} since the first trial began"), row_scale([name for _, name in lanes]), tuple(layers), rows=len(lanes)
    )
    unknown = sum("slot" not in r.details for r in records)
    caption = f"{len(records)} trials by the slot that ran them last, from when each was begun."
    caption += f" {unknown} do not say in which slot they ran." if unknown else ""
    return Chart("timeline", "Who ran what when", caption, (panel,))


def _points(record: TrialRecord, metric: str, clock: str) -> list[tuple[float, float]]:
    rows = [(row.get(clock), row.get(metric)) for row in record.curve]
    return [(float(x), float(y)) for x, y in rows if _finite(x) and _finite(y)]  # type: ignore[arg-type]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curves(records: list[TrialRecord], metric: str, clock: str, name: str, role: Role, wide: bool = False) -> Lines:
    lines = [_points(record, metric, clock) for record in records]
    hover = tuple(
        text
        for record, line in zip(records, lines, strict=True)
        for text in [*(f"trial {record.id} ({record.state}): {number(y)} at {number(x)} {clock}" for x, y in line), ""]
    )
    return Lines(name, role, *paths(lines), hover, DASHES[records[0].state], wide)  # type: ignore[arg-type]


def _ends(values: list[float], untrained: float, mode: str) -> tuple[float, float] | None:
    """All values; where some are far worse than the untrained student, up to a quarter of the range beyond it."""
    low, high = min(values), max(values)
    if math.isnan(untrained) or mode != "min" or low >= untrained:
        return None
    limit = untrained + 0.25 * (untrained - low)
    margin = 0.05 * (min(high, limit) - low) or 0.01
    return (low - margin, max(min(high, limit), untrained) + margin)


def _setting_text(axes: Sequence[str], row: pd.Series) -> str:
    named = [f"{axis}\u00a0{number(row[column(axis)], 3)}" for axis in axes if not pd.isna(row[column(axis)])]
    return ", ".join(named) or "all trials"


def _lane(record: TrialRecord) -> tuple[float, str]:
    slot = record.details.get("slot")
    return (float(slot), f"slot {slot}") if isinstance(slot, int) else (math.inf, "slot unknown")


def _bar_hover(record: TrialRecord) -> str:
    cause = f" ({record.cause})" if record.cause else ""
    attempts = f", {record.attempts} attempts" if record.attempts > 1 else ""
    return f"trial {record.id}: {record.state}{cause}{attempts}, {record.seconds:.0f} s in training and evaluation"

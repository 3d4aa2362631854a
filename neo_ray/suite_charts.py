"""What do benchmarks say, as figures? Before and after, variant against variant, score against training tokens.

Figures 3, 4 and 5 of LLM-Neo (arXiv 2411.06839). A sweep that does not ask such a question has no such figure, and no word of it.
"""

from __future__ import annotations

import pandas as pd

from neo_ray.charts import Bars, Chart, Layer, Lines, NotDrawn, Panel, Points, Role, Scale, levels_or_log, row_scale
from neo_ray.evidence import Evidence, number
from neo_ray.records import TrialRecord
from neo_ray.report import Analysis
from neo_ray.scores import called
from neo_ray.searching import BENCHMARKS
from neo_ray.statistics import column, complete, setting_of

AVERAGE = "average"
LENGTHS = ("tokens", "steps", "epochs")
FIFTHS: tuple[Role, ...] = ("fifth0", "fifth1", "fifth2", "fifth3", "fifth4")
Values = dict[str, float]
"""Benchmark, and `AVERAGE` → per cent."""


def before_and_after(analysis: Analysis) -> Chart:
    """Figure 3 of the paper: each benchmark of the untrained student and of the best trial that was asked."""
    evidence = analysis.evidence
    asked = [r for r in evidence.records if r.state == "COMPLETE" and _after(r) and _before(r) and r.measured(evidence.metric)]
    if not asked:
        raise NotDrawn("Benchmarks before and after are not drawn: no COMPLETE trial has both.")
    sign = -1 if evidence.mode == "max" else 1
    best_id = evidence.best.id if evidence.best else None
    best = min(asked, key=lambda r: (r.id != best_id, sign * (r.measured(evidence.metric) or 0.0)))
    before, after, errors = _before(best), _after(best), best.details.get("suite_standard_errors", {})
    rows = list(reversed(after))
    spread = tuple((after[name] - 100 * errors[name], after[name] + 100 * errors[name]) for name in rows if name in errors)
    layers: list[Layer] = [
        _bars("untrained student", "quiet", before, rows, 0.19, 0.36),
        _bars(f"trial {best.id}", "best", after, rows, -0.19, 0.36),
    ]
    if len(spread) == len(rows):
        layers.append(Points("± one standard error over items", "fit", *_at(after, rows, -0.19), spread=spread))
    gain = after[AVERAGE] - before[AVERAGE]
    caption = (
        f"{best.details.get('suite', 'Benchmarks')} of trial {best.id} and of the student before any training, in per cent. The "
        f"average went from {number(before[AVERAGE], 3)} to {number(after[AVERAGE], 3)} ({gain:+.1f}); it rose on "
        f"{sum(after[name] > before[name] for name in _benchmarks(after))} of {len(_benchmarks(after))} benchmarks."
    )
    panel = Panel(Scale("per cent"), row_scale(rows), tuple(layers), rows=2 * len(rows))
    return Chart("before_and_after", "Benchmarks before and after", caption, (panel,))


def variants(analysis: Analysis) -> Chart:
    """Figure 4 of the paper: LoRA against MoSLoRA on each benchmark, and whatever other variants were tried."""
    evidence = analysis.evidence
    done = _asked(evidence)
    if "variant" not in evidence.varied or done.empty or done["variant"].nunique() < 2:
        raise NotDrawn("Variants on benchmarks are not drawn: fewer than two of them were asked.")
    found = {str(variant): _best_setting(evidence, runs) for variant, runs in done.groupby("variant")}
    first = next(iter(found.values()))[0]
    rows, width = list(reversed(first)), 0.76 / len(found)
    layers: list[Layer] = []
    for number_of_it, (variant, (values, ids)) in enumerate(found.items()):
        offset = 0.38 - width * (number_of_it + 0.5)
        layers.append(_bars(f"{variant} ({', '.join(ids)})", FIFTHS[(2 * number_of_it) % 5], values, rows, offset, width * 0.92))
    averages = "; ".join(f"{variant} {number(values[AVERAGE], 3)}" for variant, (values, _) in found.items())
    caption = (
        f"{called(BENCHMARKS, evidence.records)}: the best setting of each variant by {evidence.named(evidence.metric)}, mean "
        f"over its seeds, in per cent; in brackets its trials. Averages: {averages}."
    )
    errors = [r.details.get("suite_standard_errors", {}).get(AVERAGE) for r in evidence.records if r.id in set(done["id"])]
    known = [error for error in errors if error is not None]
    caption += f" An average has a standard error of {100 * max(known):.1f} over items." if known else ""
    panel = Panel(Scale("per cent"), row_scale(rows), tuple(layers), rows=len(rows) * len(found))
    return Chart("variants", "Variants on benchmarks", caption, (panel,))


def lengths(analysis: Analysis) -> Chart:
    """Figure 5 of the paper: score against training tokens, where the length of a trial is an axis."""
    evidence = analysis.evidence
    axis = next((name for name in LENGTHS if name in evidence.varied), None)
    done = complete(evidence.frame, evidence.metric)
    if axis is None or done[column(axis)].nunique() < 2:
        raise NotDrawn("Score against training tokens is not drawn: the trials do not differ in length.")
    metrics = [evidence.metric, *([BENCHMARKS] if evidence.metric != BENCHMARKS and not _asked(evidence).empty else [])]
    panels, words = [], []
    for metric in metrics:
        panel, word = _against_tokens(evidence, axis, metric)
        panels.append(panel)
        words.append(word)
    caption = (
        f"COMPLETE trials by the tokens that they were trained on; the line joins the best of each length. {' '.join(words)}"
    )
    return Chart("lengths", "Score against training tokens", caption, tuple(panels))


def _against_tokens(evidence: Evidence, axis: str, metric: str) -> tuple[Panel, str]:
    runs = complete(evidence.frame, metric)
    lowest = evidence.mode == "min" if metric == evidence.metric else False
    grouped = runs.groupby(column(axis))[metric]
    best = runs.loc[grouped.idxmin() if lowest else grouped.idxmax()].sort_values("tokens")
    hover = tuple(f"trial {r.id}: {number(r[metric])} after {r.tokens:,} tokens" for _, r in runs.iterrows())
    layers: list[Layer] = [
        Points("trials", "COMPLETE", tuple(runs["tokens"].astype(float)), tuple(runs[metric]), hover),
        Lines("best of each length", "best", tuple(best["tokens"].astype(float)), tuple(best[metric]), wide=True),
    ]
    start = runs[f"untrained_{metric}"].dropna() if f"untrained_{metric}" in runs else runs[metric].iloc[:0]
    if len(start):
        ends = (float(runs["tokens"].min()), float(runs["tokens"].max()))
        layers.append(Lines("untrained student", "quiet", ends, (float(start.median()),) * 2, dash="dot"))
    tokens = [float(value) for value in runs["tokens"]]
    word = (
        f"{called(metric, evidence.records)} at its best: "
        + ", ".join(f"{number(r[metric])} after {r.tokens:,}" for _, r in best.iterrows())
        + "."
    )
    return Panel(Scale("training tokens", True, levels_or_log(tokens)), Scale(evidence.named(metric)), tuple(layers)), word


def _asked(evidence: Evidence) -> pd.DataFrame:
    return complete(evidence.frame, BENCHMARKS) if BENCHMARKS in evidence.frame else evidence.frame.iloc[:0]


def _best_setting(evidence: Evidence, runs: pd.DataFrame) -> tuple[Values, tuple[str, ...]]:
    """Means over seeds of the setting that the objective puts first, and its trials."""
    known = complete(runs, evidence.metric)
    settings = setting_of(known, evidence.varied)
    means = known.groupby(settings)[evidence.metric].mean()
    chosen = known[settings == (means.idxmax() if evidence.mode == "max" else means.idxmin())]
    prefix = f"{BENCHMARKS}_"
    names = [name for name in map(str, chosen.columns) if name.startswith(prefix) and chosen[name].notna().any()]
    values = {name.removeprefix(prefix): 100 * float(chosen[name].mean()) for name in names}
    return {**values, AVERAGE: 100 * float(chosen[BENCHMARKS].mean())}, tuple(chosen["id"])


def _after(record: TrialRecord) -> Values:
    return _values(record.metrics)


def _before(record: TrialRecord) -> Values:
    return _values(record.details.get("baseline") or {})


def _values(metrics: dict[str, float | None]) -> Values:
    """Benchmarks and, last, their average; nothing where there was no suite."""
    prefix, average = f"{BENCHMARKS}_", metrics.get(BENCHMARKS)
    if average is None:
        return {}
    found = {
        name.removeprefix(prefix): 100 * value for name, value in metrics.items() if name.startswith(prefix) and value is not None
    }
    return {**found, AVERAGE: 100 * average}


def _benchmarks(values: Values) -> list[str]:
    return [name for name in values if name != AVERAGE]


def _bars(name: str, role: Role, values: Values, rows: list[str], offset: float, thick: float) -> Bars:
    x, y = _at(values, rows, offset)
    hover = tuple(f"{row}, {name}: {value:.1f} %" for row, value in zip(rows, x, strict=True))
    return Bars(name, role, y, (0.0,) * len(rows), x, hover, thick)


def _at(values: Values, rows: list[str], offset: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Lengths, and heights of the rows."""
    return tuple(values[row] for row in rows), tuple(place + offset for place in range(len(rows)))

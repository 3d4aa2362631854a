"""Which figures does a report have? Their list, and those of rank × learning rate and of effects.

Each is a function from an analysis to a chart, raises NotDrawn with a sentence where its data are missing, and is named in
CHARTS: what is added there is on the HTML page, among the printed figures and in the notebook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from neo_ray.charts import (
    Band,
    Cells,
    Chart,
    Layer,
    Lines,
    NotDrawn,
    Panel,
    Points,
    Scale,
    Span,
    level_ticks,
    levels_or_log,
    log_ticks,
    row_scale,
)
from neo_ray.evidence import number
from neo_ray.histories import curves, seeds, timeline
from neo_ray.importances import Importances, lacking
from neo_ray.laws import Law
from neo_ray.matrix import Cell
from neo_ray.report import Analysis
from neo_ray.slices import costs, parallel, slices
from neo_ray.statistics import complete, edge_of, is_log, is_numeric, setting_of, sign_of
from neo_ray.suite_charts import before_and_after, lengths, variants


def matrix(analysis: Analysis) -> Chart:
    """The paper's Figure 2: the best COMPLETE value at each rank and learning rate."""
    found, evidence = analysis.matrix, analysis.evidence
    if found is None:
        raise NotDrawn("The matrix of rank and learning rate is not drawn: the trials do not have both of them as parameters.")
    if found.best is None:
        raise NotDrawn(f"The matrix of rank and learning rate is not drawn: no COMPLETE trial has a value of {evidence.label}.")
    for name, values in (("rank", found.ranks), ("learning_rate", found.learning_rates)):
        if len(values) < 2:
            raise NotDrawn(f"The matrix of rank and learning rate is not drawn: the trials have one value of {name}.")
    rates = [number(a, 3) if a == b else f"{number(a, 2)} … {number(b, 2)}" for a, b in found.learning_rates]
    i, j = found.best
    texts = tuple(tuple(_cell_text(cell, (i, j) == (r, c)) for c, cell in enumerate(row)) for r, row in enumerate(found.cells))
    cells = Cells(
        values=tuple(tuple(cell.best for cell in row) for row in found.cells),
        texts=texts,
        hover=tuple(
            tuple(_cell_hover(evidence.label, cell, rank, rate) for rate, cell in zip(rates, row, strict=True))
            for rank, row in zip(found.ranks, found.cells, strict=True)
        ),
        darker="low" if evidence.mode == "min" else "high",
        best=found.best,
    )
    panel = Panel(
        Scale("learning rate", ticks=tuple((float(k), text) for k, text in enumerate(rates))),
        Scale("rank", ticks=tuple((float(k), number(rank)) for k, rank in enumerate(found.ranks))),
        (cells,),
        rows=len(found.ranks),
    )
    caption = (
        f"The best {evidence.named(found.metric)} of the COMPLETE trials in each cell; darker is better. ★ is the best "
        f"of all: {number(found.cells[i][j].best)} in trial {found.cells[i][j].best_id}, rank {number(found.ranks[i])}, "
        f"learning rate {rates[j]}."
    )
    return Chart("matrix", "Rank × learning rate", caption + _cell_legend(texts), (panel,))


def rates(analysis: Analysis) -> Chart:
    """The best learning rate of each rank, with the law and its band where there is one."""
    evidence = analysis.evidence
    done = complete(evidence.frame, evidence.metric)
    wanted = ("rank", "learning_rate")
    if not set(wanted) <= set(done) or not all(is_numeric(done, name) for name in wanted):
        raise NotDrawn("The best learning rate of each rank is not drawn: the trials do not have both of them as parameters.")
    runs = done[(done["rank"] > 0) & (done["learning_rate"] > 0)]
    runs = runs.assign(gain=runs[evidence.metric] * sign_of(evidence.mode), setting=setting_of(runs, evidence.varied))
    tried = runs.groupby("rank")["learning_rate"].nunique()
    tried = tried[tried > 1]
    if len(tried) < 2:
        raise NotDrawn(
            "The best learning rate of each rank is not drawn: COMPLETE trials at two ranks, with two each, are the least."
        )
    best = [_best_rate(runs[runs["rank"] == rank]) for rank in tried.index]
    layers = _law_layers(analysis.found.law)
    for censored, name in ((False, "best learning rate"), (True, "best at the end of the tested range")):
        some = [(rank, *row) for rank, row in zip(tried.index, best, strict=True) if row[1] == censored]
        if some:
            hover = tuple(f"rank {number(rank)}: {number(rate, 3)} (trial {trial})" for rank, rate, _, trial in some)
            x, y = tuple(float(row[0]) for row in some), tuple(row[1] for row in some)
            layers.append(Points(name, "best" if not censored else "quiet", x, y, hover, "ring" if censored else "dot"))
    ranks, all_rates = [float(rank) for rank in tried.index], [float(rate) for rate in runs["learning_rate"]]
    at_end = sum(row[1] for row in best)
    caption = f"The learning rate of the best setting at each of {len(best)} ranks, over {len(runs)} COMPLETE trials."
    caption += f" At {at_end} of them it is at the end of those tried (ring), so the best may lie beyond." if at_end else ""
    caption += _law_caption(analysis.found.law)
    low, high = min(all_rates), max(all_rates)
    across = Scale("rank", is_log(ranks), levels_or_log(ranks) if is_log(ranks) else level_ticks(ranks))
    up = Scale("learning rate", True, log_ticks(low, high), (low / 1.15, high * 1.15))
    panel = Panel(across, up, tuple(layers))
    return Chart("rates", "Best learning rate of each rank", caption, (panel,))


def _law_layers(law: Law | None) -> list[Layer]:
    if law is None or not law.curve:
        return []
    rank, rate, low, high = (tuple(column) for column in zip(*law.curve, strict=True))
    return [Band("95 % band", "fit", rank, low, high), Lines("lr* = c × rank^γ", "fit", rank, rate)]


def _law_caption(law: Law | None) -> str:
    if law is None or law.gamma is None or law.gamma_interval is None:
        return ""
    low, high = law.gamma_interval
    rule = f" under the alpha rule {law.alpha_rule}" if law.alpha_rule else ""
    return f" Line and band: the law, with γ {number(law.gamma, 2)} (95 % {number(low, 2)} to {number(high, 2)}){rule}."


def gains(analysis: Analysis) -> Chart:
    """What the best value of each axis gains over its worst one."""
    evidence, metric = analysis.evidence, analysis.evidence.metric
    found = [effect for effect in analysis.effects.values() if effect is not None]
    fitted = sorted((e for e in found if e.method != "spearman"), key=lambda e: e.gain)
    if not fitted:
        raise NotDrawn("What each axis is worth is not drawn: no axis has enough COMPLETE trials for a fit.")
    names = [effect.axis for effect in fitted]
    points = Points(
        "gain of the best value over the worst",
        "COMPLETE",
        tuple(effect.gain for effect in fitted),
        tuple(float(i) for i in range(len(fitted))),
        tuple(
            f"{e.axis}: {number(e.best.value, 3)} against {number(e.worst.value, 3)}, gain {number(e.gain, 3)} "
            f"(95 % {number(e.interval[0], 3)} to {number(e.interval[1], 3)})"
            for e in fitted
        ),
        spread=tuple(effect.interval for effect in fitted),
    )
    layers: list[Layer] = [Lines("none", "quiet", (0.0, 0.0), (-0.6, len(fitted) - 0.4), dash="dot"), points]
    if evidence.noise:
        layers.insert(0, Span("less than one run's noise", "region", -evidence.noise.sd, evidence.noise.sd))
    panel = Panel(Scale(f"gain in {evidence.label}"), row_scale(names), tuple(layers), rows=len(fitted))
    untold = [axis for axis in evidence.axes if axis not in {effect.axis for effect in fitted}]
    caption = (
        f"What the fit expects of each axis: its best value over its worst, in {evidence.named(metric)}, with 95 % intervals."
    )
    caption += f" The strip is one standard deviation of a run, {number(evidence.noise.sd, 3)}." if evidence.noise else ""
    caption += f" Not told by the trials: {', '.join(untold)}." if untold else ""
    return Chart("gains", "What each axis is worth", caption, (panel,))


def importances(analysis: Analysis) -> Chart:
    """How much of the metric's variance each axis explains alone."""
    aspect = analysis.aspects.get("importances")
    if aspect is None:
        raise NotDrawn(lacking(analysis.evidence) or "Importances are not drawn: there are none.")
    found: Importances = aspect.found
    rows = [("interactions and noise", found.interaction, found.interaction_interval)]
    rows += [(share.axis, share.share, share.interval) for share in reversed(found.shares)]
    at = tuple(float(i) for i in range(len(rows)))
    hover = tuple(f"{name}: {share:.1%} (95 % {low:.1%} to {high:.1%})" for name, share, (low, high) in rows)
    points = Points("share", "COMPLETE", tuple(row[1] for row in rows), at, hover, spread=tuple(row[2] for row in rows))
    shuffled = Points(
        "shuffled: 19 in 20 get no more",
        "quiet",
        tuple(share.inert for share in reversed(found.shares)),
        at[1:],
        tuple(f"{share.axis} shuffled: up to {share.inert:.1%}" for share in reversed(found.shares)),
        "triangle",
    )
    panel = Panel(
        Scale(f"share of the variance of {found.label}"), row_scale([row[0] for row in rows]), (shuffled, points), rows=len(rows)
    )
    caption = (
        "The share of the variance over the tested ranges that each axis explains alone, with 95 % intervals. One that is left "
        "of its triangle is no larger than that of a shuffled axis."
    )
    return Chart("importances", "Importances", caption, (panel,))


CHARTS: dict[str, Callable[[Analysis], Chart]] = {
    "matrix": matrix,
    "rates": rates,
    "slices": slices,
    "gains": gains,
    "importances": importances,
    "parallel": parallel,
    "curves": curves,
    "costs": costs,
    "seeds": seeds,
    "timeline": timeline,
}
"""In the order of the report."""
WHERE_ASKED: dict[str, Callable[[Analysis], Chart]] = {
    "before_and_after": before_and_after,
    "variants": variants,
    "lengths": lengths,
}
"""After them, of sweeps that ask their question; others have no word of them."""


def _cell_text(cell: Cell, best: bool) -> str:
    lost = [f"{sign}{count}" for sign, count in (("∞", cell.num_diverged), ("✕", cell.num_failed)) if count]
    if cell.best is not None:
        return " ".join([f"{'★ ' if best else ''}{number(cell.best)}", *lost])
    signs = {"PRUNED": "▽", "RUNNING": "…", "COMPLETE": "?"}
    return " ".join([*lost, *(f"{sign}{cell.states[state]}" for state, sign in signs.items() if cell.states.get(state))])


def _cell_legend(texts: Sequence[Sequence[str]]) -> str:
    words = {"∞": "diverged", "✕": "failed otherwise", "▽": "pruned, so its end is not known", "…": "running"}
    words |= {"?": "complete without a value"}
    written = "".join(text for row in texts for text in row)
    used = [f"{sign} {meaning}" for sign, meaning in words.items() if sign in written]
    return f" With numbers of trials: {'; '.join(used)}." if used else ""


def _cell_hover(label: str, cell: Cell, rank: float, rate: str) -> str:
    states = ", ".join(f"{count} {state}" for state, count in sorted(cell.states.items()))
    value = f"{label} {number(cell.best)} (trial {cell.best_id})" if cell.best is not None else "no value"
    return f"rank {number(rank)}, learning rate {rate}: {value}; {states or 'no trial'}"


def _best_rate(runs: pd.DataFrame) -> tuple[float, bool, str]:
    """The learning rate of the best setting's mean, whether it is at an end of those tried at this rank, and a trial of it."""
    means = runs.groupby("setting")["gain"].mean()
    of_best = runs[runs["setting"] == means.idxmax()].iloc[0]
    tried = runs["learning_rate"]
    edge = edge_of("learning_rate", float(of_best["learning_rate"]), (float(tried.min()), float(tried.max())))
    return float(of_best["learning_rate"]), edge is not None, str(of_best["id"])

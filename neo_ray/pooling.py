"""What holds over several studies? Effects fitted in each alone, then pooled as draws from a distribution (random effects).

Studies of different models differ by more than their noise; a pooled interval that allows for that is about the mean over models
like these. Between-study variance by Paule & Mandel; the interval is that of t with studies − 1 degrees of freedom and the larger
of the usual and the Hartung-Knapp standard error (Röver, Knapp & Friede, BMC Medical Research Methodology 15, 2015).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from neo_ray.drafts import Guideline
from neo_ray.evidence import Evidence, for_laws, number, unit_of
from neo_ray.guidelines import COMPARED
from neo_ray.intervals import error_of, half_width
from neo_ray.laws import learning_rate_law
from neo_ray.questions import QUESTIONS, key_of
from neo_ray.report import Analysis, bullets
from neo_ray.statistics import column, is_log, is_numeric, judged, setting_of

SIGNED = ("full", "exchange", "ratio", "lora", "kd", "sft", "moslora", "defaults", "memory", "time")
"""The hypotheses whose effect may have either sign. A loss against the best of several values is never negative, so that its
mean over studies would be above 0 where there is none."""
SPARE = 5
"""Residual degrees of freedom that a trend needs."""


@dataclass(frozen=True)
class Estimate:
    question: str
    unit: str
    study: str
    value: float
    error: float
    """Standard error."""


@dataclass(frozen=True)
class Pooled:
    question: str
    unit: str
    effect: float
    interval: tuple[float, float]
    """95 %, of the mean over studies like these."""
    tau: float
    """Standard deviation of the effect from study to study."""
    i2: float
    """Share of the variance between the estimates that their own errors do not explain, between 0 and 1."""
    estimates: tuple[Estimate, ...]


def pool(estimates: Sequence[Estimate]) -> Pooled:
    """Of two or more estimates of one question, each with an error above 0."""
    from statsmodels.stats.meta_analysis import combine_effects

    values, errors = (np.array([getattr(e, name) for e in estimates], dtype=float) for name in ("value", "error"))
    with np.errstate(divide="ignore"):  # I² of equal estimates
        found = combine_effects(values, errors**2, method_re="iterated", use_t=True)
    mean, error = float(found.mean_effect_re), max(float(found.sd_eff_w_re), float(found.sd_eff_w_re_hksj))
    half = error * half_width(len(values) - 1)
    tau, i2 = math.sqrt(max(0.0, float(found.tau2))), max(0.0, float(found.i2)) if found.q > 0 else 0.0
    return Pooled(estimates[0].question, estimates[0].unit, mean, (mean - half, mean + half), tau, i2, tuple(estimates))


def pooled(analyses: Sequence[Analysis]) -> list[Pooled]:
    """Every question that two or more of the studies answer in the same unit."""
    groups: dict[tuple[str, str], list[Estimate]] = {}
    for analysis in analyses:
        for estimate in estimates_of(analysis):
            groups.setdefault((estimate.question, estimate.unit), []).append(estimate)
    return [pool(group) for group in groups.values() if len(group) > 1]


def pooled_lines(analyses: Sequence[Analysis], found: Sequence[Pooled] | None = None) -> list[str]:
    """The pooled effects in sentences, and over how many model pairs; nothing for a single study.

    Args:
        found: `pooled(analyses)`, where it is known already.
    """
    if len(analyses) < 2:
        return []
    known = {(a.evidence.scope.teacher, a.evidence.scope.student) for a in analyses}
    pairs = "pairs of models that are not known" if (None, None) in known else f"{len(known)} pairs of models"
    about = f"{len(analyses)} studies of {pairs}"
    if len(known) == 1 and (None, None) not in known:
        about = f"{len(analyses)} studies of one pair of models: what follows holds for this pair only"
    found = pooled(analyses) if found is None else found
    return [about, *map(_line, found)] if found else [f"{about}; no question is answered by two of them in the same unit"]


def pooled_markdown(lines: Sequence[str], verdicts: Sequence[str]) -> str:
    """`pooled.md`.

    Args:
        lines: `pooled_lines`.
        verdicts: a line a question, with the verdict of each study.
    """
    below = f"\n## Verdicts side by side\n\n{bullets(verdicts)}\n" if verdicts else ""
    return f"# Pooled over studies\n\n{bullets(lines)}\n{below}"


def estimates_of(analysis: Analysis) -> list[Estimate]:
    """What one study says that another may say, too: trends, γ of the learning-rate law, groups compared, and hypotheses."""
    name, evidence = analysis.name or analysis.folder.name, analysis.evidence
    found = [
        Estimate(f"gain in {evidence.label} with {axis}", unit, name, value, error)
        for axis, (unit, value, error) in trends(evidence).items()
    ]
    law = learning_rate_law(evidence)
    if law is not None and law.gamma is not None and law.gamma_interval is not None:
        question = f"γ of the best learning rate, c·rank^γ, {_rule(law.alpha_rule)}"
        found.append(Estimate(question, "", name, law.gamma, error_of(law.gamma_interval)))
    found += [
        Estimate(question, g.unit, name, g.effect, error_of(g.interval))
        for g in analysis.guidelines
        if g.effect is not None and g.interval is not None and (question := _question(evidence, g))
    ]
    return [estimate for estimate in found if math.isfinite(estimate.value) and estimate.error > 0]


def _question(evidence: Evidence, guideline: Guideline) -> str:
    """What the effect answers in every study: the hypothesis of its place, and in which metric; empty where none pools."""
    if COMPARED in guideline.hypothesis:
        return guideline.hypothesis
    key = key_of(guideline.place, guideline.hypothesis)
    metric = evidence.label if guideline.metric == evidence.metric else guideline.metric
    return f"{QUESTIONS[key].text} ({metric})" if key in SIGNED else ""


def _rule(rule: str | None) -> str:
    """What the sign of γ depends on (arXiv 2602.06204), without the number: studies with alpha = rank and 2 × rank are of one."""
    kind = re.sub(r"^(scaling|alpha) \S+ at", r"one \1 at", (rule or "").partition(",")[0])
    return kind or "alpha rule unknown"


def trends(evidence: Evidence) -> dict[str, tuple[str, float, float]]:
    """Numeric axis → unit, slope of the gain at the middle of the settings, and its HC3 standard error.

    Least squares on settings' means, with a square of each numeric axis that has three values; empty where these are too few.
    """
    import statsmodels.api as sm

    laws = for_laws(evidence)
    runs = judged(laws.frame, laws.metric, laws.mode)
    runs = runs.assign(setting=setting_of(runs, laws.varied))
    runs = runs[runs["setting"].isin(runs["setting"][~runs["lost"]])]  # a setting that always diverges bounds the stable region
    groups = runs.groupby("setting", sort=False)
    points = groups.first().assign(gain=groups["gain"].mean())
    axes = [axis for axis in laws.axes if len(points) and points[column(axis)].nunique() > 1]
    if not axes or points[[column(axis) for axis in axes]].isna().any(axis=None):
        return {}
    units = {axis: _unit(points[column(axis)], axis) for axis in axes if is_numeric(points, axis)}
    design = pd.concat([_columns(points, axis) for axis in axes], axis=1)
    num_points, num_columns = len(points), design.shape[1] + 1
    if num_points - num_columns < SPARE or np.linalg.matrix_rank(sm.add_constant(design).to_numpy()) < num_columns:
        return {}
    fit = sm.OLS(points["gain"].to_numpy(dtype=float), sm.add_constant(design).to_numpy(dtype=float)).fit(cov_type="HC3")
    places = {axis: 1 + design.columns.to_list().index(axis) for axis in units}
    unit = unit_of(laws.metric)
    return {
        axis: (f"{unit} {per}".strip(), float(fit.params[places[axis]]), float(fit.bse[places[axis]]))
        for axis, per in units.items()
    }


def _unit(values: pd.Series, axis: str) -> str:
    return f"per doubling of {axis}" if is_log(values) else f"per 1 of {axis}"


def _columns(points: pd.DataFrame, axis: str) -> pd.DataFrame:
    """A numeric axis, centred (in doublings where it spans more than a factor of 5), and its square; levels of another."""
    values = points[column(axis)]
    if not is_numeric(points, axis):
        return pd.get_dummies(values.astype(str), prefix=axis, drop_first=True, dtype=float)
    x = values.astype(float)
    x = pd.Series(np.log2(x), index=x.index) if is_log(values) else x
    x = x - x.mean()
    square = {f"{axis}²": x**2 - (x**2).mean()} if x.nunique() > 2 else {}
    return pd.DataFrame({axis: x, **square})


def _line(found: Pooled) -> str:
    low, high = (number(end, 3) for end in found.interval)
    each = ", ".join(f"{e.study} {number(e.value, 3)}" for e in found.estimates)
    effect = f"{number(found.effect, 3)} {found.unit}".strip()
    return (
        f"{found.question}: {effect} (95 % {low} to {high}) over {len(found.estimates)} studies ({each}); from study to study "
        f"± {number(found.tau, 2)}, I² {found.i2:.0%}"
    )

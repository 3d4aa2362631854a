"""Which way of training is better, each at its own learning rate? Methods and adapters against each other, and their costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from neo_ray.drafts import Draft, Unit, Verdict, equivalence_p
from neo_ray.evidence import CPU_MEMORY, Evidence, number
from neo_ray.extensions import at_end
from neo_ray.intervals import error_of, half_width, percentiles
from neo_ray.statistics import (
    MAX_LEVELS,
    MIN_PER_LEVEL,
    Difference,
    column,
    compare,
    complete,
    is_numeric,
    setting_of,
    sign_of,
    unstable,
    unvalued,
)
from neo_ray.surface import RANK, RATE, Surface, fit, inside

TEACHER_AXES = ("kd_ratio", "temperature", "divergence", "jsd_beta", "skew", "head_mass")
"""Without effect where there is no teacher."""
ADAPTER_AXES = ("rank", "alpha", "variant", "dropout", "plus_ratio", "target_modules")
"""Without effect where all parameters are trained."""
FULL = ("kd", "sft")
TAUGHT = ("neo", "kd")
NEAR = 1.5
"""Learning rates within this factor of an arm's best one are its own tuned ones: a grid's level, or a neighbourhood."""
BY_SEED = "too few settings are equal otherwise, so each seed counts by itself: it holds for these settings alone"
TIME_MARGIN = 0.1
"""Of ln seconds a token: what counts as no more time."""


def tuned(
    evidence: Evidence,
    frame: pd.DataFrame,
    leaves: Sequence[str],
    axis: str,
    arms: tuple[str, str],
    place: int,
    percent: float = 0,
) -> Draft | None:
    """The first arm against the second, each at its own best learning rate; None where one was not run at three.

    Args:
        percent: the margin of an equivalence, in percent of the second arm's metric; 0: is the first better?
    """
    metric = evidence.metric
    if column(axis) not in frame or RATE not in frame:
        return None
    done, _ = inside(frame, metric, leaves)
    own = [of_arm(done, axis, arm) for arm in arms]
    if any(done[RATE][mask].nunique() < MIN_PER_LEVEL for mask in own):
        return None
    rates = [_best_rate(done[mask], metric, evidence.mode) for mask in own]
    first, second = (mask & _near(done[RATE], rate) for mask, rate in zip(own, rates, strict=True))
    free = {axis, RATE, *(TEACHER_AXES if axis == "method" else ()), *(ADAPTER_AXES if set(arms) & set(FULL) else ())}
    found, notes = matched(done, first, second, [leaf for leaf in leaves if leaf not in free], metric, evidence.mode)
    if found is None:
        return None
    tried = [int(frame[RATE][of_arm(frame, axis, arm)].nunique()) for arm in arms]
    if len(set(tried)) > 1:
        notes.append(f"{arms[0]} was tried at {tried[0]} learning rates, {arms[1]} at {tried[1]}: the best of more looks better")
    for arm, rate in zip(arms, rates, strict=True):
        notes += _left_out(frame, leaves, metric, arm, of_arm(frame, axis, arm) & _near(frame[RATE], rate))
    return _tuned(evidence, axis, arms, (rates[0], rates[1]), found, place, percent, notes)


def _left_out(frame: pd.DataFrame, leaves: Sequence[str], metric: str, arm: str, own: pd.Series) -> list[str]:
    """What an arm's trials at its best learning rate do not tell: those of settings that diverge, and those without a value."""
    lost = int((own & unstable(frame, leaves, metric)).sum())
    text = f"{lost} trials with {arm} at its learning rate are of settings that diverged with a seed, and left out"
    notes = [text] if lost else []
    causes = unvalued(frame[own])
    return [*notes, failed(causes, arm)] if causes else notes


def failed(causes: Mapping[str, int], where: str = "") -> str:
    """What has no value and is in no mean; nothing where there is none."""
    told = ", ".join(f"{count} {cause}" for cause, count in causes.items())
    side = f" with {where}" if where else ""
    return f"{sum(causes.values())} trials{side} FAILED without a value and are not in it ({told})" if told else ""


def of_arm(frame: pd.DataFrame, axis: str, arm: str) -> pd.Series:
    """The trials of an arm. Where the teacher has no weight, neo is lora and kd is sft, and theirs are none of it."""
    own = frame[column(axis)] == arm
    return own & (frame["kd_ratio"] != 0) if axis == "method" and arm in TAUGHT and "kd_ratio" in frame else own


def matched(
    frame: pd.DataFrame, first: pd.Series, second: pd.Series, match: Sequence[str], metric: str, mode: str
) -> tuple[Difference | None, list[str]]:
    """The first side against the second over the settings that are equal otherwise, each the mean of its seeds.

    Where these are fewer than three, over the seeds that both sides ran with at them; and what is to be said of that.
    """
    found = compare(frame, first, second, match, metric, mode)
    if found is not None and found.num_pairs:
        return found, []
    cells = setting_of(frame, [*match, "seed"])
    both = cells.isin(cells[first]) & cells.isin(cells[second])
    by_seed = compare(frame, first & both, second & both, ["seed"], metric, mode)
    if by_seed is None or not by_seed.num_pairs:
        return found, []
    return by_seed, [BY_SEED]


def _counted(notes: Sequence[str]) -> Unit:
    return "seeds" if BY_SEED in notes else "settings"


def _tuned(
    evidence: Evidence,
    axis: str,
    arms: tuple[str, str],
    rates: tuple[float, float],
    found: Difference,
    place: int,
    percent: float,
    notes: Sequence[str],
) -> Draft:
    a, b = arms
    margin = percent / 100 * abs(found.second) if percent else None
    values = f"{number(found.first)} (learning_rate {number(rates[0], 2)}) against {number(found.second)} ({number(rates[1], 2)})"
    question = f"{a} is as good as {b} within {percent:g} %" if percent else f"{a} beats {b}"
    right, wrong = (f"{a} and {b} differ by less than {percent:g} %", f"{a} and {b} differ by more than {percent:g} %")
    if not percent:
        right, wrong = f"{a} beats {b}", f"{b} beats {a}"
    claims: dict[Verdict, str] = {
        "supported": f"{right}, each at its own best learning rate: {evidence.label} {values}",
        "refuted": f"{wrong}, each at its own best learning rate: {evidence.label} {values}",
        "undecided": f"Whether {question} is open, each at its own best learning rate: {evidence.label} {values}",
    }
    df = found.num_pairs - 1 if found.num_pairs else len(found.ids) - 2
    error = error_of(found.interval, df)
    return Draft(
        axis=axis,
        hypothesis=f"{question}, each at its own best learning rate",
        claims=claims,
        metric=evidence.metric,
        effect=found.gain,
        interval=found.interval,
        p=equivalence_p(found.gain, error, margin, df) if margin else found.p,
        trials=found.ids,
        num_units=found.num_pairs or len(found.ids),
        num_seeds=found.num_seeds,
        notes=["the best learning rates were chosen by the same trials, so both sides look a little too good", *notes],
        place=place,
        margin=margin,
        counted=_counted(notes),
    )


def rate_ratio(evidence: Evidence, frame: pd.DataFrame, leaves: Sequence[str], place: int, question: str) -> Draft | None:
    """lr* of an adapter over lr* of full training, under the same loss; 5 to 20 is the claim."""
    if "method" not in frame or RATE not in leaves:
        return None
    for adapter, full in (("neo", "kd"), ("lora", "sft")):
        sides = [_surface(frame[of_arm(frame, "method", method)], evidence, leaves) for method in (adapter, full)]
        if sides[0] is not None and sides[1] is not None:
            return _rate_ratio(evidence, (adapter, full), (sides[0], sides[1]), place, question)
    return None


def _rate_ratio(evidence: Evidence, arms: tuple[str, str], sides: tuple[Surface, Surface], place: int, question: str) -> Draft:
    scope: dict[str, Any] = {
        "trials": (*sides[0].ids, *sides[1].ids),
        "num_units": sum(len(side.gains) for side in sides),
        "num_seeds": max(side.num_seeds for side in sides),
        "place": place,
    }
    ends = {arm: end for arm, side in zip(arms, sides, strict=True) if (end := side.censored({}))}
    if ends:
        why = "; ".join(at_end(arm, sides[arms.index(arm)].points[RATE].unique(), end) for arm, end in ends.items())
        return Draft("method", question, {"undecided": f"Open whether within 5 to 20 times: {why}"}, evidence.metric, **scope)
    best = [_log_rate(side, side.optimum({}, *side.ends(RATE))[0]) for side in sides]
    drawn = [_log_rate(side, side.optima({}, *side.ends(RATE))) for side in sides]
    draws = drawn[0] - drawn[1]
    effect = float(best[0] - best[1]) - math.log(10)
    interval, df = percentiles(draws - math.log(10)), min(side.df for side in sides)
    rates = f"{number(math.exp(best[0]), 2)} against {number(math.exp(best[1]), 2)}"
    found = f"the best learning rate of {arms[0]} is {number(math.exp(effect) * 10, 2)} times that of {arms[1]} ({rates})"
    return Draft(
        axis="method",
        hypothesis=question,
        claims={
            "supported": f"Within 5 to 20 times: {found}",
            "refuted": f"Not within 5 to 20 times: {found}",
            "undecided": f"Open whether within 5 to 20 times: {found}",
        },
        metric=evidence.metric,
        effect=effect,
        interval=interval,
        p=equivalence_p(effect, error_of(interval), math.log(2), df),
        unit="ln(ratio / 10)",
        margin=math.log(2),
        **scope,
    )


def memory(evidence: Evidence, frame: pd.DataFrame, leaves: Sequence[str], place: int, question: str) -> Draft | None:
    """How much less memory Neo takes than full KD; on a CPU the trials do not tell."""
    if "method" not in frame or not {"neo", "kd"} <= set(frame["method"].dropna()):
        return None
    known = complete(frame[frame["peak_memory_bytes"] > 0], evidence.metric)  # one that diverged takes no more memory for that
    known = known.assign(memory=np.log(known["peak_memory_bytes"].astype(float)))
    match = [leaf for leaf in leaves if leaf not in ("method", *TEACHER_AXES, *ADAPTER_AXES)]
    found, notes = matched(known, of_arm(known, "method", "neo"), of_arm(known, "method", "kd"), match, "memory", "min")
    if found is None:
        return None
    if evidence.on_cpu:
        claim = f"Open whether {question}: {CPU_MEMORY}; trials on a GPU would tell"
        return Draft("method", question, {"undecided": claim}, "peak_memory_bytes", trials=found.ids, place=place)
    saving, low, high = (1 - math.exp(-gain) for gain in (found.gain, *found.interval))
    df = found.num_pairs - 1 if found.num_pairs else len(found.ids) - 2
    error = error_of(found.interval, df)
    distance = abs(found.gain - math.log(4 / 3))
    text = f"neo takes {saving:.0%} less memory than kd (95 % {low:.0%} to {high:.0%})"
    return Draft(
        axis="method",
        hypothesis=question,
        claims={"supported": text, "refuted": text, "undecided": f"Open whether it is a quarter: {text}"},
        metric="peak_memory_bytes",
        effect=saving - 0.25,
        interval=(low - 0.25, high - 0.25),
        p=float(2 * stats.t.sf(distance / error, df)) if error > 0 else 0.0,
        unit="share saved beyond 0.25",
        trials=found.ids,
        num_units=found.num_pairs or len(found.ids),
        num_seeds=found.num_seeds,
        notes=notes,
        place=place,
        counted=_counted(notes),
    )


def time_of_rank(evidence: Evidence, frame: pd.DataFrame, place: int, question: str) -> Draft | None:
    """Seconds of a token at the largest rank against the smallest."""
    done = complete(frame, evidence.metric)
    done = done[(done["seconds"] > 0) & (done["tokens"] > 0)] if RANK in done and is_numeric(done, RANK) else done.iloc[:0]
    if len(done) < 5 or done[RANK].nunique() < 2:
        return None
    from statsmodels.regression.linear_model import OLS

    z = np.log(done[RANK].astype(float))
    with np.errstate(all="ignore"):
        slope = OLS(np.log(done["seconds"] / done["tokens"]), np.column_stack([np.ones(len(z)), z])).fit(cov_type="HC3")
    if not np.isfinite(slope.bse).all():  # a single trial at one of two ranks
        return None
    span, df = float(z.max() - z.min()), len(z) - 2
    effect, error = float(slope.params.iloc[1]) * span, float(slope.bse.iloc[1]) * span
    half = error * half_width(df)
    ranks = (number(math.exp(end)) for end in (z.max(), z.min()))
    ends = "a token takes {:+.0%} time at rank {} against rank {}".format(round(math.exp(effect) - 1, 3) + 0.0, *ranks)
    return Draft(
        axis=RANK,
        hypothesis=question,
        claims={
            "supported": f"Rank barely moves the time: {ends}",
            "refuted": f"Rank moves the time: {ends}",
            "undecided": f"Open whether rank moves the time: {ends}",
        },
        metric="seconds",
        effect=effect,
        interval=(effect - half, effect + half),
        p=equivalence_p(effect, error, TIME_MARGIN, df),
        unit="ln seconds a token",
        trials=tuple(done["id"]),
        num_units=len(done),
        num_seeds=int(done["seed"].nunique()),
        place=place,
        margin=TIME_MARGIN,
        counted="trials",
    )


def _surface(frame: pd.DataFrame, evidence: Evidence, leaves: Sequence[str]) -> Surface | None:
    """Of one arm; by run where its settings are too few. None where its optimum cannot be told."""
    for by_run in (False, True):
        found = fit(frame, evidence.metric, evidence.mode, [leaf for leaf in leaves if leaf != "method"], by_run)
        if found is not None and found.has((RATE, 2)) and found.trusted:
            return found
    return None


def _log_rate(surface: Surface, at: Any) -> Any:
    return at * surface.coordinates[RATE].width + surface.coordinates[RATE].middle


def _best_rate(runs: pd.DataFrame, metric: str, mode: str) -> float:
    """The learning rate of the best mean; where they are many, of the best of them in twelve classes."""
    gains = sign_of(mode) * runs[metric]
    if runs[RATE].nunique() <= MAX_LEVELS:
        means = gains.groupby(runs[RATE]).mean()
        return float(means.index[int(means.to_numpy().argmax())])
    classes = pd.cut(np.log(runs[RATE].astype(float)), MAX_LEVELS, labels=False)
    best = gains.groupby(classes).mean().idxmax()
    return float(np.exp(np.log(runs[RATE][classes == best].astype(float)).mean()))


def _near(rates: pd.Series, best: float) -> pd.Series:
    return (rates <= best * NEAR) & (rates >= best / NEAR)

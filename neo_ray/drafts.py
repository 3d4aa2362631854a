"""What is a claim, and which verdict do its numbers allow? One correction over all claims of a sweep.

A claim is supported where its 95 % interval lies on its side *and* its p, Holm-corrected over all claims of the sweep, is
below 0.025; refuted where both speak for the opposite; else undecided, with how many more trials would likely decide it. A claim
that a difference is small is supported where the interval lies within the margin that it states (and p is below 0.05), refuted
where it lies without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from scipy import stats

from neo_ray.evidence import Evidence, Scope, number, unit_of
from neo_ray.statistics import CONFIDENCE

Verdict = Literal["supported", "refuted", "undecided"]
Unit = Literal["settings", "seeds", "trials"]
FAMILY = 0.025
"""How often a sweep of noise alone may say something of a direction, by Holm over all claims. Half of what an interval leaves
out: a p of few settings is rough, and at 0.05 it was 12 of 200 synthetic sweeps (docs/statistics.md)."""


@dataclass(frozen=True)
class Guideline:
    axis: str
    hypothesis: str
    """What was asked."""
    claim: str
    """What the trials say to it: a computed sentence."""
    verdict: Verdict
    """On the hypothesis."""
    metric: str
    effect: float | None
    """The gain, positive where the hypothesis is right (with a margin: the difference); None where the trials are too few."""
    interval: tuple[float, float] | None
    """95 % interval of the effect."""
    unit: str
    p_value: float | None
    """Holm-corrected over the claims of the sweep."""
    trials: tuple[str, ...]
    num_trials: int
    num_seeds: int
    scope: Scope
    note: str
    place: int | None = None
    """Number of the hypothesis of docs/statistics.md that it speaks to."""
    margin: float | None = None
    """Of an equivalence: how far from 0 the effect may be and count as none, in its unit."""


@dataclass(frozen=True)
class Draft:
    """A claim before the correction over all of them. `claims` has the sentence for each verdict that can fall."""

    axis: str
    hypothesis: str
    claims: dict[Verdict, str]
    metric: str
    effect: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    unit: str | None = None
    trials: tuple[str, ...] = ()
    num_units: int = 0
    """What the interval's width comes from: settings (or pairs of them), seeds (of each side), or single trials."""
    num_seeds: int = 0
    notes: list[str] = field(default_factory=list)
    place: int | None = None
    margin: float | None = None
    """Of an equivalence (its p is that of `equivalence_p`); None for a direction."""
    counted: Unit = "settings"
    """What `num_units` is a number of."""


def decide(evidence: Evidence, drafts: Sequence[Draft]) -> list[Guideline]:
    """The verdicts, by Holm's step-down correction over all drafts that have a p."""
    from statsmodels.stats.multitest import multipletests

    asked = [draft.p for draft in drafts if draft.p is not None]
    corrected = iter(multipletests(asked, method="holm")[1] if asked else ())
    decided = []
    for draft in drafts:
        p = None if draft.p is None else float(next(corrected))
        verdict = _verdict(draft.interval or (0.0, 0.0), draft.margin)
        small = draft.margin is not None and verdict == "supported"
        if draft.interval is None or p is None or p >= (1 - CONFIDENCE if small else FAMILY):
            verdict = "undecided"
        notes = draft.notes + ([_missing(draft, len(asked))] if verdict == "undecided" and draft.interval else [])
        decided.append(_guideline(evidence, draft, verdict, p, notes))
    return decided


def equivalence_p(effect: float, error: float, margin: float, df: float) -> float:
    """Of two one-sided tests (TOST; Schuirmann, 1987) where the effect is within the margin, else of its being beyond it."""
    if not error > 0:
        return 0.0
    within, beyond = (margin - abs(effect)) / error, (abs(effect) - margin) / error
    return float(stats.t.sf(within, df)) if within >= 0 else min(1.0, 2 * float(stats.t.sf(beyond, df)))


def _verdict(interval: tuple[float, float], margin: float | None) -> Verdict:
    low, high = interval
    if margin is None:
        return "supported" if low > 0 else "refuted" if high < 0 else "undecided"
    return "supported" if -margin < low and high < margin else "refuted" if low > margin or high < -margin else "undecided"


def _guideline(evidence: Evidence, draft: Draft, verdict: Verdict, p: float | None, notes: list[str]) -> Guideline:
    return Guideline(
        axis=draft.axis,
        hypothesis=draft.hypothesis,
        claim=draft.claims[verdict],
        verdict=verdict,
        metric=draft.metric,
        effect=draft.effect,
        interval=draft.interval,
        unit=draft.unit or unit_of(draft.metric),
        p_value=p,
        trials=draft.trials,
        num_trials=len(draft.trials),
        num_seeds=draft.num_seeds,
        scope=evidence.scope,
        note="; ".join(note for note in notes if note),
        place=draft.place,
        margin=draft.margin,
    )


def _missing(draft: Draft, num_claims: int) -> str:
    """How many more trials would likely decide it: an interval narrows with the root of their number."""
    low, high = draft.interval or (0.0, 0.0)
    effect, num = abs(abs(draft.effect or 0.0) - (draft.margin or 0.0)), draft.num_units
    if not num:
        return ""
    tail = (1 - CONFIDENCE if draft.margin is not None else FAMILY) / 2
    half = (high - low) / 2 * stats.norm.isf(tail / num_claims) / stats.norm.isf((1 - CONFIDENCE) / 2)
    what = "effect" if draft.margin is None else "distance to the margin"
    if not math.isfinite(half) or effect * 5 <= half:
        article = "an" if draft.margin is None else "a"
        return f"{article} {what} as small as {number(effect, 2)} takes more than {25 * num} {draft.counted} to decide"
    more = max(math.ceil(num * ((half / effect) ** 2 - 1)), math.ceil(num / 4))
    plural = "s" if more > 1 else ""
    needed = {
        "settings": f"COMPLETE trial{plural} in other settings",
        "seeds": f"seed{plural} of each side",
        "trials": f"COMPLETE trial{plural}",
    }[draft.counted]
    return f"if the {what} is {number(effect, 2)}, about {more} more {needed} would decide it"

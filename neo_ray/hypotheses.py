"""What do the trials say to each hypothesis of docs/statistics.md? Drafts in their places, and what was not tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neo_ray.arms import memory, rate_ratio, time_of_rank, tuned
from neo_ray.confirmed import CONFIRM, confirmed, reference_key
from neo_ray.drafts import Draft, Verdict, equivalence_p
from neo_ray.evidence import Evidence, for_laws, number, with_leaves, with_unit
from neo_ray.interplay import exchange, interactions, one_rate_for_all
from neo_ray.intervals import error_of, percentiles
from neo_ray.laws import Law, learning_rate_law, surface_of
from neo_ray.questions import QUESTIONS, is_reference
from neo_ray.scores import called
from neo_ray.statistics import Noise
from neo_ray.surface import MIN_R2, RANK, RATE, RATIO, SCALING, Surface
from neo_ray.trends import Shortfall, Trend, levels, rank_trend, regret
from neo_ray.trials import setting_key

MIN_NOISE_DF = 6
"""Three seeds at three settings: with fewer degrees of freedom the χ² interval of a run's noise is wider than from 0.64 to 2.2
times it, and a margin of that size is none."""


@dataclass(frozen=True)
class Fitted:
    """What hypotheses and figures are made from."""

    surface: Surface | None = None
    law: Law | None = None
    trend: Trend | None = None


def fitted(evidence: Evidence) -> Fitted:
    surface = surface_of(evidence)
    law = learning_rate_law(evidence, surface) if surface else None
    return Fitted(surface, law, rank_trend(evidence, surface))


def hypotheses(evidence: Evidence, found: Fitted, others: Sequence[Draft] = ()) -> list[Draft]:
    """A draft or more for each place, the interactions, and for what `others` and the trials leave out, what would test it.

    None at all for a table that has not one axis of these.
    """
    laws = for_laws(evidence)
    frame, leaves = with_leaves(laws)
    if not {RANK, RATE, RATIO, "alpha", "temperature", "method", "variant"} & set(leaves):
        return []
    drafts: dict[str, Draft | None] = {
        **_of_surface(laws, found),
        "full": rate_ratio(laws, frame, leaves, 3, QUESTIONS["full"].text),
        **{arm: tuned(laws, frame, leaves, "method", ("neo", arm), 8) for arm in ("lora", "kd", "sft")},
        "moslora": tuned(laws, frame, leaves, "variant", ("moslora", "lora"), 9, percent=1),
        "defaults": _defaults(evidence),
        "memory": memory(laws, frame, leaves, 11, QUESTIONS["memory"].text),
        "time": time_of_rank(laws, frame, 11, QUESTIONS["time"].text),
    }
    answered = _answered(others)
    told = [draft for draft in drafts.values() if draft is not None]
    missing = [key for key in QUESTIONS if drafts.get(key) is None and key not in answered]
    return [*told, *interactions(laws, found.surface), *(_not_tested(laws, key, leaves) for key in missing)]


def _answered(others: Sequence[Draft]) -> set[str]:
    """What the drafts of guidelines.py speak to already."""
    keys = {5: "no teacher", 8: "lora", 10: "defaults"}
    return {keys[draft.place] for draft in others if draft.place in keys}


def _of_surface(evidence: Evidence, found: Fitted) -> dict[str, Draft | None]:
    """The hypotheses that the response surface speaks to, of those whose axes are in it."""
    surface = found.surface
    if surface is None:
        return {}
    axes, has_rate = surface.coordinates, surface.has((RATE, 2))
    ratios = levels(surface, RATIO) if RATIO in axes else []
    temperatures = levels(surface, "temperature") if "temperature" in axes else []
    asked = {
        "trend": has_rate and RANK in axes and len(levels(surface, RANK)) > 2,
        "law": found.law is not None,
        "exchange": has_rate and surface.has((RATE, 1), (SCALING, 1)),
        "ratio": len(ratios) > 2 and surface.has((RATIO, 2)),
        "only teacher": len(ratios) > 1 and max(ratios) == 1,
        "temperature": len(temperatures) > 1 and 1.0 in temperatures,
        "one rate": has_rate and surface.has((RATE, 1), (RATIO, 1)),
    }
    keys = [key for key, told in asked.items() if told]
    if not surface.trusted:
        return {key: _refused(evidence, surface, key) for key in keys}
    makers = {
        "trend": lambda: _trend(evidence, surface, found.trend),
        "law": lambda: _law(evidence, found.law),
        "exchange": lambda: exchange(evidence, surface, 4, QUESTIONS["exchange"].text),
        "ratio": lambda: _ratio(evidence, surface),
        "only teacher": lambda: _regret(evidence, surface, "only teacher", RATIO, 1.0),
        "temperature": lambda: _regret(evidence, surface, "temperature", "temperature", 1.0),
        "one rate": lambda: _one_rate(evidence, surface),
    }
    return {key: makers[key]() for key in keys}


def _refused(evidence: Evidence, surface: Surface, key: str) -> Draft:
    asked = QUESTIONS[key]
    claim = (
        f"Nothing can be said of whether {asked.text}: the leave-one-setting-out R² of the surface is "
        f"{number(surface.r2, 2)}, and {MIN_R2} is the least"
    )
    return Draft(
        asked.axis,
        asked.text,
        {"undecided": claim},
        evidence.metric,
        trials=surface.ids,
        num_seeds=surface.num_seeds,
        place=asked.place,
    )


def _not_tested(evidence: Evidence, key: str, leaves: Sequence[str]) -> Draft:
    asked = QUESTIONS[key]
    wanted = [name for name in asked.axis.split(" × ") if name not in leaves and name != "defaults"]
    why = f"the trials do not vary {' and '.join(wanted)}" if wanted else "the trials are too few for it, or lack an arm"
    why = "no confirmed trial has them" if key == "defaults" else why
    return Draft(
        asked.axis,
        asked.text,
        {"undecided": f"Not tested, as {why}: {asked.text}"},
        evidence.metric,
        notes=[f"would test it: {asked.needed}"],
        place=asked.place,
    )


def _draft(evidence: Evidence, surface: Surface, key: str, claims: dict[Verdict, str], **given: Any) -> Draft:
    asked = QUESTIONS[key]
    notes = [*given.pop("notes", []), *surface.dropped]
    return Draft(
        asked.axis,
        asked.text,
        claims,
        evidence.metric,
        trials=surface.ids,
        num_units=len(surface.gains),
        num_seeds=surface.num_seeds,
        notes=notes,
        place=asked.place,
        **given,
    )


def _within_noise(
    evidence: Evidence, surface: Surface, key: str, lost: Shortfall, sentence: str, notes: Sequence[str] = ()
) -> Draft:
    """Is a loss below one run's noise? Where that is not known well enough there is no margin, and no verdict."""
    question, noise = QUESTIONS[key].text, evidence.noise
    if noise is None or noise.df < MIN_NOISE_DF:
        claim = f"Open, as the noise of a run is unknown, whether {question}: {sentence}"
        return _draft(evidence, surface, key, {"undecided": claim}, effect=lost.loss, notes=[*notes, _no_margin(noise)])
    margin = f"the margin is one run's noise, {number(noise.sd, 3)}"
    claims: dict[Verdict, str] = {
        "supported": f"{question[0].upper()}{question[1:]}: {sentence}; {margin}",
        "refuted": f"It does not hold that {question}: {sentence}; {margin}",
        "undecided": f"Open whether {question}: {sentence}; {margin}",
    }
    told: dict[str, Any] = {"interval": lost.interval, "p": lost.p(noise.sd), "margin": noise.sd}
    return _draft(evidence, surface, key, claims, effect=lost.loss, notes=[*notes, _of_margin(noise)], **told)


def _no_margin(noise: Noise | None) -> str:
    if noise is None:
        return "settings repeated with other seeds would give the margin"
    degrees = "1 degree" if noise.df == 1 else f"{noise.df} degrees"
    return (
        f"the noise of a run has {degrees} of freedom, and {MIN_NOISE_DF} are the least for a margin: three seeds at three "
        "settings would give it"
    )


def _of_margin(noise: Noise) -> str:
    ends = f"{number(noise.low, 3)} to {number(noise.high, 3)}"
    return f"the margin is itself an estimate from {noise.num_settings} settings: its 95 % interval is {ends}"


def _trend(evidence: Evidence, surface: Surface, trend: Trend | None) -> Draft | None:
    if trend is None:
        return None
    rho, tau = (
        f"{name} {number(value, 2)} (p {number(p, 2)})" for name, (value, p) in (("ρ", trend.spearman), ("τ", trend.kendall))
    )
    note = f"rank against {evidence.label} at the best learning rate, {trend.num_cells} means: Spearman's {rho}, Kendall's {tau}"
    if trend.saturation == trend.ranks[0]:
        claim = (
            f"Open whether {QUESTIONS['trend'].text}: rank {number(trend.saturation)}, the lowest tried, is within one standard "
            "error of the best, and beyond the smallest such rank nothing is claimed; lower ranks would tell"
        )
        return _draft(evidence, surface, "trend", {"undecided": claim}, notes=[note, _rule(evidence)])
    sentence = (
        f"the largest loss from one rank to a higher one, up to rank {number(trend.saturation)}, is "
        f"{with_unit(number(trend.fall.loss, 2), evidence.metric)}; rank {number(trend.saturation)} is the smallest within one "
        f"standard error of the best"
    )
    return _within_noise(evidence, surface, "trend", trend.fall, sentence, [note, _rule(evidence)])


def _law(evidence: Evidence, law: Law | None) -> Draft | None:
    if law is None:
        return None
    asked = QUESTIONS["law"]
    notes = [note for note in (_rule(evidence), law.note) if note]
    common: dict[str, Any] = {
        "trials": law.ids,
        "num_units": law.num_settings,
        "num_seeds": law.num_seeds,
        "notes": notes,
        "place": asked.place,
    }
    if law.gamma is None or law.gamma_interval is None:
        claim = "The best learning rate of each rank gives no law: " + law.note.partition(";")[0]
        return Draft(asked.axis, asked.text, {"undecided": claim}, evidence.metric, **common)
    low, high = law.gamma_interval
    found = (
        f"lr* = {number(law.c, 2)} × rank^{number(law.gamma, 2)} (95 % of the exponent: {number(low, 2)} to {number(high, 2)})"
    )
    claims: dict[Verdict, str] = {
        "supported": f"The best learning rate falls with rank: {found}",
        "refuted": f"The best learning rate rises with rank: {found}",
        "undecided": f"Whether the best learning rate moves with rank is open: {found}",
    }
    return Draft(
        asked.axis, asked.text, claims, evidence.metric, effect=-law.gamma, interval=(-high, -low), p=law.p, unit="−γ", **common
    )


def best_ratio(surface: Surface) -> tuple[float, np.ndarray]:
    """The kd_ratio at which the surface is best within those that were tried, and where its draws are."""
    low, high = (float(end) for end in surface.coordinates[RATIO].back(np.array(surface.ends(RATIO))))
    values = np.linspace(low, high, 41)
    drawn = surface.profile(RATIO, values.tolist(), surface.draws)
    return float(values[surface.profile(RATIO, values.tolist()).argmax()]), values[drawn.argmax(axis=1)]


def _ratio(evidence: Evidence, surface: Surface) -> Draft:
    best, draws = best_ratio(surface)
    ends = percentiles(draws)
    tail = min((draws <= 0.5).mean(), (draws >= 0.5).mean())
    found = f"{evidence.label} is best at kd_ratio {number(best, 2)} (95 % {number(ends[0], 2)} to {number(ends[1], 2)})"
    return _draft(
        evidence,
        surface,
        "ratio",
        {
            "supported": f"{found}, above 0.5",
            "refuted": f"{found}, below 0.5",
            "undecided": f"{found}: open whether above 0.5",
        },
        effect=best - 0.5,
        interval=(ends[0] - 0.5, ends[1] - 0.5),
        p=min(1.0, 2 * (float(tail) * len(draws) + 1) / (len(draws) + 1)),
        unit="kd_ratio − 0.5",
    )


def _regret(evidence: Evidence, surface: Surface, key: str, axis: str, value: float) -> Draft:
    lost = regret(surface, axis, value)
    sentence = f"{axis} {number(value)} loses {with_unit(number(lost.loss, 2), evidence.metric)} against the best"
    return _within_noise(evidence, surface, key, lost, sentence)


def _one_rate(evidence: Evidence, surface: Surface) -> Draft | None:
    lost = one_rate_for_all(surface, RATIO)
    if lost is None:
        return None
    text = with_unit(number(lost.loss, 2), evidence.metric)
    return _within_noise(evidence, surface, "one rate", lost, f"it loses at most {text} at any of them")


def _rule(evidence: Evidence) -> str:
    return f"under the alpha rule: {evidence.scope.alpha_rule}" if evidence.scope.alpha_rule else ""


def _defaults(evidence: Evidence) -> Draft | None:
    """The regret of the defaults, from fresh seeds alone."""
    fresh = confirmed(evidence.records, evidence.sweep, evidence.metric, evidence.mode)
    key, noise = reference_key(evidence.sweep), evidence.noise
    runs = [r for r in evidence.records if r.phase == CONFIRM and setting_key(r.params) == key]
    if fresh is None or noise is None or not any(map(is_reference, runs)):
        return None
    asked = QUESTIONS["defaults"]
    if fresh.is_reference:
        value = f"{called(fresh.metric, evidence.records)} {number(fresh.value)}"
        claim = f"The defaults are themselves the best of {fresh.num_settings} confirmed settings: {value}"
        own: dict[str, Any] = {"trials": fresh.trials, "num_seeds": len(fresh.seeds), "place": asked.place}
        return Draft(asked.axis, asked.text, {"undecided": claim}, fresh.metric, **own)
    if fresh.gain is None or fresh.interval is None:
        return None
    if noise.df < MIN_NOISE_DF:
        value = with_unit(number(fresh.gain, 2), fresh.metric)
        claim = f"Open, as the noise of a run is unknown, whether {asked.text}: against the best confirmed setting it is {value}"
        few: dict[str, Any] = {"effect": fresh.gain, "trials": fresh.trials, "num_seeds": len(fresh.seeds), "place": asked.place}
        return Draft(asked.axis, asked.text, {"undecided": claim}, fresh.metric, notes=[_no_margin(noise)], **few)
    df, choices = len(fresh.seeds) - 1, fresh.num_settings - 1
    error = error_of(fresh.interval, df, max(1, choices))
    found = (
        f"they lose {with_unit(number(fresh.gain, 2), fresh.metric)} against the best confirmed setting; the margin is "
        f"one run's noise, {number(noise.sd, 3)}"
    )
    return Draft(
        axis=asked.axis,
        hypothesis=asked.text,
        claims={
            "supported": f"The defaults are good enough: {found}",
            "refuted": f"The defaults are not good enough: {found}",
            "undecided": f"Open whether the defaults are good enough: {found}",
        },
        metric=fresh.metric,
        effect=fresh.gain,
        interval=fresh.interval,
        p=equivalence_p(fresh.gain, error, noise.sd, df),
        trials=(*fresh.trials, *(r.id for r in runs if r.seed in fresh.seeds)),
        num_units=len(fresh.seeds),
        num_seeds=len(fresh.seeds),
        notes=[_of_margin(noise)],
        place=asked.place,
        margin=noise.sd,
        counted="seeds",
    )

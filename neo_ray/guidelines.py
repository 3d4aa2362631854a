"""Which claims stand? Hypotheses about a sweep's axes, each with a verdict, an effect and the trials behind it.

Every sentence is computed from the trials it names; without them it is not written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
from scipy import stats

from neo_ray.arms import TEACHER_AXES, failed, of_arm
from neo_ray.config import SweepConfig
from neo_ray.drafts import Draft, Guideline, Verdict, decide
from neo_ray.effects import AxisEffect, effects_of, shortage
from neo_ray.evidence import Evidence, for_laws, gather, number, with_leaves
from neo_ray.extensions import censored, extensions
from neo_ray.hypotheses import Fitted, fitted, hypotheses
from neo_ray.interplay import INTERACTS
from neo_ray.law_text import optima_text
from neo_ray.laws import Law
from neo_ray.questions import is_reference
from neo_ray.records import TrialRecord
from neo_ray.statistics import CONFIDENCE, column, compare, complete, gains_of, is_numeric, setting_of
from neo_ray.suite_claims import item_claims
from neo_ray.surface import RANK, RATE

COMPARED = " is lower with "
"""In the hypotheses of one group of trials against another."""


def derive(records: Sequence[TrialRecord], sweep: SweepConfig | None) -> list[Guideline]:
    """The guidelines of a sweep: what stands first, then what is undecided, larger effects first."""
    return guidelines_of(gather(records, sweep))


def guidelines_of(
    evidence: Evidence, effects: dict[str, AxisEffect | None] | None = None, found: Fitted | None = None
) -> list[Guideline]:
    if evidence.best is None:
        return []
    laws = for_laws(evidence)
    effects = effects or effects_of(laws.frame, laws.axes, laws.metric, laws.mode)
    drafts = [_axis_draft(laws, axis, effect) for axis, effect in effects.items()]
    drafts += [replace(draft, place=_place(draft)) for draft in (*_comparisons(laws), *_references(evidence))]
    drafts += item_claims(evidence, evidence.scores)
    found = found or fitted(evidence)
    decided = decide(evidence, [*drafts, *hypotheses(evidence, found, drafts)])
    decided = [_averaged(laws.label, guideline, decided, found.law) for guideline in decided]
    by_axis = {axis: (effect, guideline) for (axis, effect), guideline in zip(effects.items(), decided, strict=False)}
    decided += [edge for axis in evidence.tested for edge in extensions(evidence, axis, *by_axis[axis])]
    decided += decide(evidence, censored(evidence, found.law, decided))
    order = {"supported": 0, "refuted": 1, "undecided": 2}
    return sorted(decided, key=lambda g: (order[g.verdict], g.effect is None, -abs(g.effect or 0.0)))


def _averaged(label: str, guideline: Guideline, decided: Sequence[Guideline], law: Law | None) -> Guideline:
    """A main effect says that it is an average, where what its axis does was found to depend on another one."""
    axis = guideline.axis
    if guideline.verdict != "supported" or guideline.hypothesis != depends_on(label, axis):
        return guideline
    pairs = [g.axis.split(" × ") for g in decided if g.verdict == "supported" and g.hypothesis.startswith(INTERACTS)]
    others = [name for pair in pairs if axis in pair for name in pair if name != axis]
    if not others:
        return guideline
    over, claim = " and ".join(others), guideline.claim
    note = f"what {axis} does depends on {over}, so no value of it is the best at each"
    if axis == RATE and RANK in others and law is not None:
        note += f"; its best at each rank, by the response surface: {optima_text(law)}"
    return replace(guideline, claim=f"On average over {over}, {claim}", note="; ".join(filter(None, (note, guideline.note))))


def _place(draft: Draft) -> int | None:
    """Which hypothesis of docs/statistics.md a comparison speaks to."""
    if draft.axis == "method":
        return 8 if "method neo" in draft.hypothesis else None
    return {"kd_ratio": 5, "defaults": 10}.get(draft.axis)


def depends_on(label: str, axis: str) -> str:
    return f"{label} depends on {axis}"


def _axis_draft(evidence: Evidence, axis: str, effect: AxisEffect | None) -> Draft:
    metric = evidence.metric
    hypothesis = depends_on(evidence.label, axis)
    if effect is None:
        done = complete(evidence.frame, metric)
        done = done[done[column(axis)].notna()]
        lacking = shortage(evidence.frame, axis, metric) or "the values cannot be told apart"
        claim = f"Nothing can be said of {axis}: {lacking}"
        return Draft(axis, hypothesis, {"undecided": claim}, metric, trials=tuple(done["id"]), num_seeds=done["seed"].nunique())
    undecided = (
        f"{len(effect.ids) - effect.num_lost} COMPLETE trials leave open whether {axis} matters to {evidence.label}: "
        f"{number(effect.best.value, 3)} looks better than {number(effect.worst.value, 3)} by {number(effect.gain, 3)}"
    )
    return Draft(
        axis,
        hypothesis,
        {"supported": _axis_claim(effect, evidence.label), "undecided": undecided},
        metric,
        effect.gain,
        effect.interval,
        effect.p,
        "Spearman's ρ" if effect.method == "spearman" else None,
        effect.ids,
        len(effect.ids) if effect.by_run else effect.num_settings,
        effect.num_seeds,
        _axis_notes(evidence, effect),
        counted="trials" if effect.by_run else "settings",
    )


def _axis_claim(effect: AxisEffect, label: str) -> str:
    best, worst = number(effect.best.value, 3), number(effect.worst.value, 3)
    against = f"{number(effect.best.mean)} there against {number(effect.worst.mean)} at {worst}"
    if effect.edge:
        return f"{label} is best at {effect.axis} {best}, the {effect.edge} value of the COMPLETE trials: {against}"
    if effect.best_interval is None:
        return f"{label} is best with {effect.axis} {best}: {against}"
    low, high = (number(end, 3) for end in effect.best_interval)
    return f"{label} is best near {effect.axis} {best} (95 % interval {low} to {high}): {against}"


def _axis_notes(evidence: Evidence, effect: AxisEffect) -> list[str]:
    moving = [alias for alias, of in evidence.aliases.items() if of == effect.axis]
    sampler = evidence.scope.sampler
    return [
        f"{', '.join(moving)} moves with {effect.axis}: the two cannot be told apart" if moving else "",
        f"under the alpha rule: {evidence.scope.alpha_rule}"
        if effect.axis in ("rank", "alpha") and evidence.scope.alpha_rule
        else "",
        f"adjusted for {', '.join(effect.adjusted_for)}" if effect.adjusted_for else "",
        f"too few trials at {', '.join(map(number, effect.left_out))} to compare" if effect.left_out else "",
        limited(effect.num_capped, effect.num_lost),
        failed(effect.failed),
        f"at {effect.axis} {', '.join(map(number, effect.never))} all trials FAILED" if effect.never else "",
        "few settings, so each run counts by itself" if effect.by_run else "",
        f"{sampler} gathers its trials where the metric is good; a grid would confirm it" if sampler == "tpe" else "",
        _survivors(evidence),
    ]


def limited(count: int, num_lost: int) -> str:
    """What the means behind an effect are of, where runs diverged."""
    bound = "the untrained student, or the worst trial where none is known or beats it"
    return "; ".join(
        filter(
            None,
            (
                f"{count} of its trials ended worse than the untrained student and count as that" if count else "",
                f"{num_lost} of its trials diverged without a value and count as {bound}" if num_lost else "",
            ),
        )
    )


def _survivors(evidence: Evidence) -> str:
    """COMPLETE trials of a sweep with early stopping are those that did well: what an effect is computed from was chosen."""
    pruned = sum(record.state == "PRUNED" for record in evidence.records)
    return f"{pruned} trials were stopped early by {evidence.label}: only those that did well count" if pruned else ""


def _comparisons(evidence: Evidence) -> list[Draft]:
    """With a teacher against without one: kd_ratio above 0 against 0, neo against lora, kd against sft."""
    frame, drafts = evidence.frame, []
    by_leaf, leaves = with_leaves(evidence)
    pairs: list[tuple[str, str, str, pd.Series, pd.Series, set[str]]] = []
    if "kd_ratio" in evidence.varied and is_numeric(frame, "kd_ratio"):
        ratio = frame["kd_ratio"]
        pairs.append(("kd_ratio", "kd_ratio above 0", "kd_ratio 0", ratio > 0, ratio == 0, set(TEACHER_AXES)))
    if "method" in evidence.varied:
        for first, second in (("neo", "lora"), ("kd", "sft")):
            masks = of_arm(frame, "method", first), of_arm(frame, "method", second)
            pairs.append(("method", f"method {first}", f"method {second}", *masks, {"method", *TEACHER_AXES}))
    for axis, a, b, first_mask, second_mask, free in pairs:
        match = [name for name in leaves if name not in free]
        for metric in ("select_kl", "select_ce"):
            draft = _comparison(evidence, by_leaf, axis, (a, b), (first_mask, second_mask), match, metric)
            drafts += [draft] if draft else []
    return drafts


def _comparison(
    evidence: Evidence,
    frame: pd.DataFrame,
    axis: str,
    names: tuple[str, str],
    masks: tuple[pd.Series, pd.Series],
    match: list[str],
    metric: str,
) -> Draft | None:
    found = compare(frame, *masks, match, metric, "min")
    if found is None:
        return None
    a, b = names
    how = f"over {found.num_pairs} settings that are equal otherwise" if found.num_pairs else "over unequal settings"
    means = f"{number(found.first)} against {number(found.second)} on average {how}"
    bounds = limited(found.num_limited, found.num_lost)
    means += f"; {bounds}" if bounds else ""
    claims: dict[Verdict, str] = {
        "supported": f"{metric} is lower with {a} than with {b}: {means}",
        "refuted": f"{metric} is higher with {a} than with {b}: {means}",
        "undecided": f"Whether {metric} is lower with {a} than with {b} is open: {means}",
    }
    notes = [] if found.num_pairs else ["the two sides differ in other parameters, too"]
    notes += [failed(causes, name) for name, causes in zip(names, found.failed, strict=True) if causes]
    survivors = _survivors(evidence)
    biased = bool(survivors) and metric != evidence.metric
    if biased:
        # Selected by one metric, a second one that shares its noise differs between groups where no group differs.
        claims = dict.fromkeys(claims, claims["undecided"])
        notes.append(f"{survivors}, which biases {metric}; a sweep without early stopping would decide it")
    units = found.num_pairs or len(found.ids)
    hypothesis = f"{metric}{COMPARED}{a} than with {b}"
    p = 1.0 if biased else found.p
    return Draft(axis, hypothesis, claims, metric, found.gain, found.interval, p, None, found.ids, units, found.num_seeds, notes)


def _references(evidence: Evidence) -> list[Draft]:
    """The best setting against the untrained student, and against the reference defaults where they were run."""
    best, metric = evidence.best, evidence.metric
    assert best is not None
    done = complete(evidence.frame, metric)
    drafts, start = [], f"untrained_{metric}"
    untrained = done[start].dropna() if start in done else done[metric].iloc[:0]
    if len(untrained):
        drafts.append(_reference(evidence, "training", "the untrained student", float(untrained.median()), 0, ()))
    defaults = done[done["id"].isin([r.id for r in evidence.records if is_reference(r)])]
    if len(defaults) and best.num_settings > 1:
        settings = setting_of(done, evidence.varied)
        name = "the reference defaults (rank 64, learning rate 2e-4, kd_ratio 0.5)"
        if settings[defaults.index].eq(settings[done["id"] == best.id].iloc[0]).any():
            claim = f"The best of {best.num_settings} settings is {name}: {evidence.label} {number(best.value)}"
            draft = Draft(
                "defaults", f"the best setting beats {name}", {"undecided": claim}, metric, trials=tuple(defaults["id"])
            )
            return [*drafts, replace(draft, num_seeds=int(defaults["seed"].nunique()))]
        value = float(defaults[metric].mean())
        drafts.append(_reference(evidence, "defaults", name, value, len(defaults), tuple(defaults["id"])))
    return drafts


def _reference(evidence: Evidence, axis: str, name: str, value: float, num_runs: int, ids: tuple[str, ...]) -> Draft:
    """The best of N settings against a value with `num_runs` runs (0: it has no noise).

    Bonferroni over the N settings: the best of them is the luckiest, too. Without repeated settings the spread over all
    settings stands for the noise of a run, which it bounds from above.
    """
    best, metric = evidence.best, evidence.metric
    assert best is not None
    done = complete(evidence.frame, metric)
    gain = (best.value - value) * (1 if evidence.mode == "max" else -1)
    known = evidence.noise
    sd, df = (known.sd, known.df) if known else (float(gains_of(done, metric, evidence.mode)[0].std()), len(done) - 1)
    hypothesis, claims = f"the best setting beats {name} in {evidence.label}", _reference_claims(evidence, name, value)
    used = (best.id, *ids)
    if df < 2 or not sd > 0:
        return Draft(axis, hypothesis, claims, metric, gain, trials=used, num_seeds=1, notes=["no estimate of a run's noise"])
    error = sd * math.sqrt(1 / best.num_seeds + (1 / num_runs if num_runs else 0))
    half = error * float(stats.t.isf((1 - CONFIDENCE) / 2 / best.num_settings, df))
    p = min(1.0, best.num_settings * 2 * float(stats.t.sf(abs(gain) / error, df)))
    notes = [] if known else ["noise of a run bounded by the spread over all settings: none was repeated with another seed"]
    trials = tuple(dict.fromkeys([*used, *done["id"]]))
    seeds, own = int(done["seed"].nunique()), best.num_seeds
    interval = (gain - half, gain + half)
    return Draft(axis, hypothesis, claims, metric, gain, interval, p, None, trials, own, seeds, notes, counted="seeds")


def _reference_claims(evidence: Evidence, name: str, value: float) -> dict[Verdict, str]:
    best = evidence.best
    assert best is not None
    setting = f"The best of {best.num_settings} settings (trial {best.id})"
    reached = f"{evidence.label} {number(best.value)} against {number(value)}"
    return {
        "supported": f"{setting} beats {name}: {reached}",
        "refuted": f"{setting} is worse than {name}: {reached}",
        "undecided": f"{setting} has {reached} of {name}, which does not settle it",
    }

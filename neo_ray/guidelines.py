"""Which claims stand? Hypotheses about a sweep's axes, each with a verdict, an effect and the trials behind it.

Every sentence is computed from the trials it names; without them it is not written. A claim is supported where its 95 %
interval lies on its side *and* its p, Holm-corrected over all claims of the sweep, is below 0.05; refuted where both speak
for the opposite; else undecided, with how many more trials would likely decide it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pandas as pd
from scipy import stats

from neo_ray.axes import number_type
from neo_ray.config import SweepConfig
from neo_ray.effects import AxisEffect, effects_of, shortage
from neo_ray.evidence import Evidence, Scope, for_laws, gather, number, unit_of, with_leaves
from neo_ray.records import TrialRecord
from neo_ray.settings import TrialConfig, trial_leaves
from neo_ray.statistics import CONFIDENCE, column, compare, complete, edge_of, gains_of, is_log, is_numeric, setting_of

Verdict = Literal["supported", "refuted", "undecided"]
REFERENCE = {"method": "neo", "rank": 64, "learning_rate": 2e-4, "kd_ratio": 0.5}
"""Defaults of the LLM-Neo reference code (yang3121099/LLM-Neo), with alpha = 2 × rank."""
TEACHER_AXES = ("kd_ratio", "temperature", "divergence", "jsd_beta", "skew", "head_mass")
"""Without effect where there is no teacher."""


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
    """The gain, positive where the hypothesis is right; None where the trials are too few for one."""
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


@dataclass(frozen=True)
class _Draft:
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
    """Settings or pairs that the interval's width comes from."""
    num_seeds: int = 0
    notes: list[str] = field(default_factory=list)


def derive(records: Sequence[TrialRecord], sweep: SweepConfig | None) -> list[Guideline]:
    """The guidelines of a sweep: what stands first, then what is undecided, larger effects first."""
    return guidelines_of(gather(records, sweep))


def guidelines_of(evidence: Evidence, effects: dict[str, AxisEffect | None] | None = None) -> list[Guideline]:
    if evidence.best is None:
        return []
    laws = for_laws(evidence)
    effects = effects or effects_of(laws.frame, laws.axes, laws.metric, laws.mode)
    drafts = [_axis_draft(laws, axis, effect) for axis, effect in effects.items()]
    decided = _decide(evidence, [*drafts, *_comparisons(laws), *_references(evidence)])
    by_axis = {axis: (effect, guideline) for (axis, effect), guideline in zip(effects.items(), decided, strict=False)}
    decided += [edge for axis in evidence.tested for edge in _extensions(evidence, axis, *by_axis[axis])]
    order = {"supported": 0, "refuted": 1, "undecided": 2}
    return sorted(decided, key=lambda g: (order[g.verdict], g.effect is None, -abs(g.effect or 0.0)))


def _decide(evidence: Evidence, drafts: list[_Draft]) -> list[Guideline]:
    """The verdicts, by Holm's step-down correction over all drafts that have a p."""
    from statsmodels.stats.multitest import multipletests

    asked = [draft.p for draft in drafts if draft.p is not None]
    corrected = iter(multipletests(asked, method="holm")[1] if asked else ())
    decided = []
    for draft in drafts:
        p = None if draft.p is None else float(next(corrected))
        sure = p is not None and p < 1 - CONFIDENCE and draft.interval is not None
        low, high = draft.interval or (0.0, 0.0)
        verdict: Verdict = "supported" if sure and low > 0 else "refuted" if sure and high < 0 else "undecided"
        notes = draft.notes + ([_missing(draft, len(asked))] if verdict == "undecided" and draft.interval else [])
        decided.append(_guideline(evidence, draft, verdict, p, notes))
    return decided


def _guideline(evidence: Evidence, draft: _Draft, verdict: Verdict, p: float | None, notes: list[str]) -> Guideline:
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
    )


def _missing(draft: _Draft, num_claims: int) -> str:
    """How many more trials would likely decide it: an interval narrows with the root of their number."""
    low, high = draft.interval or (0.0, 0.0)
    effect, num = abs(draft.effect or 0.0), draft.num_units
    tail = (1 - CONFIDENCE) / 2
    half = (high - low) / 2 * stats.norm.isf(tail / num_claims) / stats.norm.isf(tail)
    if not math.isfinite(half) or effect * 5 <= half:
        return f"an effect as small as {number(effect, 2)} takes more than {25 * num} settings to decide"
    more = max(math.ceil(num * ((half / effect) ** 2 - 1)), math.ceil(num / 4))
    return f"if the effect is {number(effect, 2)}, about {more} more COMPLETE trials in other settings would decide it"


def _axis_draft(evidence: Evidence, axis: str, effect: AxisEffect | None) -> _Draft:
    metric = evidence.metric
    hypothesis = f"{metric} depends on {axis}"
    if effect is None:
        done = complete(evidence.frame, metric)
        done = done[done[column(axis)].notna()]
        lacking = shortage(evidence.frame, axis, metric) or "the values cannot be told apart"
        claim = f"Nothing can be said of {axis}: {lacking}"
        return _Draft(axis, hypothesis, {"undecided": claim}, metric, trials=tuple(done["id"]), num_seeds=done["seed"].nunique())
    undecided = (
        f"{len(effect.ids)} COMPLETE trials leave open whether {axis} matters to {metric}: {number(effect.best.value, 3)} looks "
        f"better than {number(effect.worst.value, 3)} by {number(effect.gain, 3)}"
    )
    return _Draft(
        axis,
        hypothesis,
        {"supported": _axis_claim(effect, metric), "undecided": undecided},
        metric,
        effect.gain,
        effect.interval,
        effect.p,
        "Spearman's ρ" if effect.method == "spearman" else None,
        effect.ids,
        len(effect.ids) if effect.by_run else effect.num_settings,
        effect.num_seeds,
        _axis_notes(evidence, effect),
    )


def _axis_claim(effect: AxisEffect, metric: str) -> str:
    best, worst = number(effect.best.value, 3), number(effect.worst.value, 3)
    against = f"{number(effect.best.mean)} there against {number(effect.worst.mean)} at {worst}"
    if effect.edge:
        return f"{metric} is best at {effect.axis} {best}, the {effect.edge} value of the COMPLETE trials: {against}"
    if effect.best_interval is None:
        return f"{metric} is best with {effect.axis} {best}: {against}"
    low, high = (number(end, 3) for end in effect.best_interval)
    return f"{metric} is best near {effect.axis} {best} (95 % interval {low} to {high}): {against}"


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
        f"{effect.num_capped} trials far above the untrained student were limited" if effect.num_capped else "",
        "few settings, so each run counts by itself" if effect.by_run else "",
        f"{sampler} gathers its trials where the metric is good; a grid would confirm it" if sampler == "tpe" else "",
        _survivors(evidence),
    ]


def _survivors(evidence: Evidence) -> str:
    """COMPLETE trials of a sweep with early stopping are those that did well: what an effect is computed from was chosen."""
    pruned = sum(record.state == "PRUNED" for record in evidence.records)
    return f"{pruned} trials were stopped early by {evidence.metric}: only those that did well count" if pruned else ""


def _comparisons(evidence: Evidence) -> list[_Draft]:
    """With a teacher against without one: kd_ratio above 0 against 0, neo against lora, kd against sft."""
    frame, drafts = evidence.frame, []
    by_leaf, leaves = with_leaves(evidence)
    pairs: list[tuple[str, str, str, pd.Series, pd.Series, set[str]]] = []
    if "kd_ratio" in evidence.varied and is_numeric(frame, "kd_ratio"):
        ratio = frame["kd_ratio"]
        pairs.append(("kd_ratio", "kd_ratio above 0", "kd_ratio 0", ratio > 0, ratio == 0, set(TEACHER_AXES)))
    if "method" in evidence.varied:
        taught = frame["kd_ratio"] != 0 if "kd_ratio" in frame else frame["id"].notna()
        for first, second in (("neo", "lora"), ("kd", "sft")):
            masks = (frame["method"] == first) & taught, frame["method"] == second
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
) -> _Draft | None:
    found = compare(frame, *masks, match, metric, "min")
    if found is None:
        return None
    a, b = names
    how = f"over {found.num_pairs} settings that are equal otherwise" if found.num_pairs else "over unequal settings"
    means = f"{number(found.first)} against {number(found.second)} on average {how}"
    claims: dict[Verdict, str] = {
        "supported": f"{metric} is lower with {a} than with {b}: {means}",
        "refuted": f"{metric} is higher with {a} than with {b}: {means}",
        "undecided": f"Whether {metric} is lower with {a} than with {b} is open: {means}",
    }
    notes = [] if found.num_pairs else ["the two sides differ in other parameters, too"]
    survivors = _survivors(evidence)
    biased = bool(survivors) and metric != evidence.metric
    if biased:
        # Selected by one metric, a second one that shares its noise differs between groups where no group differs.
        claims = dict.fromkeys(claims, claims["undecided"])
        notes.append(f"{survivors}, which biases {metric}; a sweep without early stopping would decide it")
    units = found.num_pairs or len(found.ids)
    hypothesis = f"{metric} is lower with {a} than with {b}"
    p = 1.0 if biased else found.p
    return _Draft(axis, hypothesis, claims, metric, found.gain, found.interval, p, None, found.ids, units, found.num_seeds, notes)


def _references(evidence: Evidence) -> list[_Draft]:
    """The best setting against the untrained student, and against the reference defaults where they were run."""
    best, metric = evidence.best, evidence.metric
    assert best is not None
    done = complete(evidence.frame, metric)
    drafts, start = [], f"untrained_{metric}"
    untrained = done[start].dropna() if start in done else done[metric].iloc[:0]
    if len(untrained):
        drafts.append(_reference(evidence, "training", "the untrained student", float(untrained.median()), 0, ()))
    defaults = done[done["id"].isin([r.id for r in evidence.records if _is_reference(r)])]
    if len(defaults) and best.num_settings > 1:
        settings = setting_of(done, evidence.varied)
        name = "the reference defaults (rank 64, learning rate 2e-4, kd_ratio 0.5)"
        if settings[defaults.index].eq(settings[done["id"] == best.id].iloc[0]).any():
            claim = f"The best of {best.num_settings} settings is {name}: {metric} {number(best.value)}"
            draft = _Draft(
                "defaults", f"the best setting beats {name}", {"undecided": claim}, metric, trials=tuple(defaults["id"])
            )
            return [*drafts, replace(draft, num_seeds=int(defaults["seed"].nunique()))]
        value = float(defaults[metric].mean())
        drafts.append(_reference(evidence, "defaults", name, value, len(defaults), tuple(defaults["id"])))
    return drafts


def _reference(evidence: Evidence, axis: str, name: str, value: float, num_runs: int, ids: tuple[str, ...]) -> _Draft:
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
    hypothesis, claims = f"the best setting beats {name} in {metric}", _reference_claims(evidence, name, value)
    used = (best.id, *ids)
    if df < 2 or not sd > 0:
        return _Draft(axis, hypothesis, claims, metric, gain, trials=used, num_seeds=1, notes=["no estimate of a run's noise"])
    error = sd * math.sqrt(1 / best.num_seeds + (1 / num_runs if num_runs else 0))
    half = error * float(stats.t.isf((1 - CONFIDENCE) / 2 / best.num_settings, df))
    p = min(1.0, best.num_settings * 2 * float(stats.t.sf(abs(gain) / error, df)))
    notes = [] if known else ["noise of a run bounded by the spread over all settings: none was repeated with another seed"]
    trials = tuple(dict.fromkeys([*used, *done["id"]]))
    seeds = int(done["seed"].nunique())
    return _Draft(axis, hypothesis, claims, metric, gain, (gain - half, gain + half), p, None, trials, len(done), seeds, notes)


def _reference_claims(evidence: Evidence, name: str, value: float) -> dict[Verdict, str]:
    best, metric = evidence.best, evidence.metric
    assert best is not None
    setting = f"The best of {best.num_settings} settings (trial {best.id})"
    reached = f"{metric} {number(best.value)} against {number(value)}"
    return {
        "supported": f"{setting} beats {name}: {reached}",
        "refuted": f"{setting} is worse than {name}: {reached}",
        "undecided": f"{setting} has {reached} of {name}, which does not settle it",
    }


def _is_reference(record: TrialRecord) -> bool:
    for leaf, wanted in REFERENCE.items():
        value: Any = record.config
        for part in trial_leaves()[leaf].split("."):
            value = value.get(part) if isinstance(value, dict) else None
        value = record.params.get(leaf, value)
        if isinstance(wanted, str) or not isinstance(value, int | float):
            if value != wanted:
                return False
        elif not math.isclose(value, float(wanted), rel_tol=1e-3):  # type: ignore[arg-type]
            return False
    return True


def _extensions(evidence: Evidence, axis: str, effect: AxisEffect | None, guideline: Guideline) -> list[Guideline]:
    """The optimum at the end of the tested range: it may lie beyond, so the range is to be extended where the schema allows.

    Supported where the axis has an effect and its fit is best at that end in 95 % of the bootstrap draws.
    """
    best, values = evidence.best, evidence.tested[axis]
    assert best is not None
    sides = {edge.side for edge in best.edges if edge.axis == axis}
    sure = effect is not None and guideline.verdict == "supported" and effect.edge_share >= CONFIDENCE
    fitted = edge_of(axis, effect.best.value, (values[0], values[-1])) if sure and effect is not None else None
    sides |= {fitted.side} if fitted else set()
    found = []
    for side in sorted(sides):
        end, beyond = (values[0] if side == "lowest" else values[-1]), _beyond(axis, values, side)
        if beyond is None:
            continue
        on_edge = [edge.value for edge in best.edges if (edge.axis, edge.side) == (axis, side)]
        claim = f"{_at_edge(best.id, axis, side, on_edge, end)}: extend the range to {number(beyond, 3)}"
        share = f"the fit is best at that end in {effect.edge_share:.0%} of the draws" if effect and effect.edge == side else ""
        hypothesis = f"the best {axis} lies at or beyond {number(end, 3)}"
        found.append(replace(guideline, hypothesis=hypothesis, claim=claim, note=share))
        if not (fitted and fitted.side == side):
            found[-1] = replace(found[-1], verdict="undecided", effect=None, interval=None, p_value=None)
    return found


def _at_edge(best_id: str, axis: str, side: str, on_edge: list[float], end: float) -> str:
    if not on_edge:
        return f"The fit is best at the {side} {axis} tested, {number(end, 3)}"
    if on_edge[0] == end:
        return f"Trial {best_id}, the best, has the {side} {axis} tested, {number(end, 3)}"
    return f"Trial {best_id}, the best, has {axis} {number(on_edge[0], 3)}, close to the {side} tested, {number(end, 3)}"


def _beyond(axis: str, values: tuple[float, ...], side: str) -> float | None:
    """One step further than the end of the range, inside the schema's bounds; None where the end is a bound."""
    end, near = (values[0], values[1]) if side == "lowest" else (values[-1], values[-2])
    if is_log(values):
        # half a decade beyond a continuous range: the step of a usual learning-rate grid
        target = end * (end / near if len(values) > 2 else math.sqrt(10) ** (1 if side == "highest" else -1))
    else:
        target = end + (end - near) * (1.0 if len(values) > 2 else 0.5)
    path = trial_leaves().get(axis)
    for kind, bound in _bounds(path).items():
        outside = target < bound if kind in ("ge", "gt") else target > bound
        if outside or (kind in ("gt", "lt") and target == bound):
            target = float(bound) if kind in ("ge", "le") else (end + bound) / 2
    whole = path is not None and number_type(path) is int
    target = float(round(target)) if whole else float(f"{target:.3g}")
    return None if math.isclose(target, end) else target


def _bounds(path: str | None) -> dict[str, float]:
    """The schema's bounds of a leaf: ge, gt, le, lt → value."""
    if path is None:
        return {}
    model: Any = TrialConfig
    *sections, leaf = path.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    found = ((kind, getattr(rule, kind, None)) for rule in model.model_fields[leaf].metadata for kind in ("ge", "gt", "le", "lt"))
    return {kind: bound for kind, bound in found if bound is not None}

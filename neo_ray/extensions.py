"""Does the best lie at the end of a tested range? Then the range is to be extended, where the schema allows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from neo_ray.axes import number_type
from neo_ray.drafts import Draft, Guideline, Verdict
from neo_ray.effects import AxisEffect
from neo_ray.evidence import Evidence, number
from neo_ray.laws import Law
from neo_ray.settings import TrialConfig, trial_leaves
from neo_ray.statistics import CONFIDENCE, edge_of, is_log
from neo_ray.surface import RATE


def extensions(evidence: Evidence, axis: str, effect: AxisEffect | None, guideline: Guideline) -> list[Guideline]:
    """Guidelines to extend an axis's range, one for each end at which the best lies.

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
        end, further = (values[0] if side == "lowest" else values[-1]), beyond(axis, values, side)
        if further is None:
            continue
        on_edge = [edge.value for edge in best.edges if (edge.axis, edge.side) == (axis, side)]
        claim = f"{_at_edge(best.id, axis, side, on_edge, end)}: extend the range to {number(further, 3)}"
        share = f"the fit is best at that end in {effect.edge_share:.0%} of the draws" if effect and effect.edge == side else ""
        hypothesis = _hypothesis(axis, end)
        verdict: Verdict = "supported" if fitted and fitted.side == side else "undecided"
        # effect, interval and p of the guideline are of another question
        bare = replace(guideline, effect=None, interval=None, p_value=None)
        trials = tuple(sorted({*guideline.trials, best.id})) if on_edge else guideline.trials  # the claim is of that one, too
        found.append(
            replace(bare, hypothesis=hypothesis, claim=claim, note=share, verdict=verdict, trials=trials, num_trials=len(trials))
        )
    return found


def asks_to_extend(evidence: Evidence, guideline: Guideline) -> tuple[str, float, float] | None:
    """Axis, end and what lies beyond it, of a guideline to extend a range; None of any other."""
    axis = guideline.axis
    values = evidence.tested.get(axis, ())
    if len(values) < 2 or "extend the range to" not in guideline.claim:
        return None
    sides = {"lowest": values[0], "highest": values[-1]}
    side = next((s for s, end in sides.items() if guideline.hypothesis == _hypothesis(axis, end)), None)
    target = beyond(axis, values, side) if side else None
    return (axis, sides[side], target) if side and target is not None else None


def censored(evidence: Evidence, law: Law | None, known: Sequence[Guideline]) -> list[Draft]:
    """Where the best learning rate of a rank is at the end of those tried there: drafts to extend the range, with no p.

    Not where higher learning rates diverged, or a guideline of the whole axis says so already.
    """
    values = evidence.tested.get(RATE, ())
    if law is None or len(values) < 2:
        return []
    drafts = []
    for side, end in (("lowest", values[0]), ("highest", values[-1])):
        ranks = [rank for rank, where in law.sides.items() if where == side and rank not in law.stable]
        target, hypothesis = beyond(RATE, values, side), _hypothesis(RATE, end)
        if ranks and target is not None and all(g.hypothesis != hypothesis for g in known):
            where = ", ".join(number(rank) for rank in ranks)
            claim = f"The best learning_rate of rank {where} is the {side} tried there: extend the range to {number(target, 3)}"
            drafts.append(Draft(RATE, hypothesis, {"undecided": claim}, evidence.metric, trials=law.ids, num_seeds=law.num_seeds))
    return drafts


def at_end(label: str, values: Iterable[float], side: str) -> str:
    """Why nothing is said of the best learning rate of something, from those that it was tried at, and what would tell."""
    ordered = tuple(sorted(float(value) for value in values))
    end, further = (ordered[0] if side == "lowest" else ordered[-1]), beyond(RATE, ordered, side)
    more = f": extend its range to {number(further, 3)}" if further is not None else ""
    return f"the best learning_rate of {label} may lie beyond the {side} tried, {number(end, 3)}{more}"


def _hypothesis(axis: str, end: float) -> str:
    return f"the best {axis} lies at or beyond {number(end, 3)}"


def _at_edge(best_id: str, axis: str, side: str, on_edge: list[float], end: float) -> str:
    if not on_edge:
        return f"The fit is best at the {side} {axis} tested, {number(end, 3)}"
    if on_edge[0] == end:
        return f"Trial {best_id}, the best, has the {side} {axis} tested, {number(end, 3)}"
    return f"Trial {best_id}, the best, has {axis} {number(on_edge[0], 3)}, close to the {side} tested, {number(end, 3)}"


def beyond(axis: str, values: tuple[float, ...], side: str) -> float | None:
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

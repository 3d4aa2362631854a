"""Does the best value of one axis move with another? Learning rate against rank, kd_ratio and alpha, from the surface."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats

from neo_ray.drafts import Draft, equivalence_p
from neo_ray.evidence import Evidence, number, with_unit
from neo_ray.extensions import at_end
from neo_ray.intervals import error_of, half_width, percentiles
from neo_ray.surface import RANK, RATE, RATIO, SCALING, Surface, height, peak
from neo_ray.trends import Shortfall, levels, shortfall

EXCHANGE_MARGIN = 0.5
"""lr* ∝ scaling^s: s within −1 ± 0.5 counts as exchangeable; halfway to no relation at all."""

INTERACTS = f"what {RATE} does to "
"""How the hypothesis of an interaction begins."""


def interactions(evidence: Evidence, surface: Surface | None) -> list[Draft]:
    """rank × learning rate and learning rate × kd_ratio, where the surface has them and can be trusted."""
    if surface is None or not surface.trusted:
        return []
    return [draft for other in (RANK, RATIO) if (draft := _interaction(evidence, surface, other))]


def _interaction(evidence: Evidence, surface: Surface, other: str) -> Draft | None:
    """How much more a higher learning rate gains at a high value of the other axis than at a low one."""
    if not surface.has((RATE, 1), (other, 1)):
        return None
    at = surface.terms.index(((RATE, 1), (other, 1)))
    rate, axis = surface.coordinates[RATE], surface.coordinates[other]
    # Both one standard deviation off the middle: of the cubic, the difference of differences has only this term.
    effect, error = 4 * float(surface.beta[at]), 4 * math.sqrt(float(surface.covariance[at, at]))
    half = error * half_width(surface.df)
    (low, high), (small, large) = (tuple(number(v, 3) for v in c.back(np.array([-1.0, 1.0]))) for c in (rate, axis))
    size = with_unit(number(abs(effect), 3), evidence.metric)
    more = "more" if effect > 0 else "less"
    what = f"learning_rate {high} instead of {low} gains {size} {more} at {other} {large} than at {small}"
    sign = math.copysign(1, effect)
    interval = (sign * effect - half, sign * effect + half)
    return Draft(
        axis=f"{RATE} × {other}",
        hypothesis=f"{INTERACTS}{evidence.label} depends on {other}",
        claims={
            "supported": f"What learning_rate does depends on {other}: {what}",
            "undecided": f"Whether what learning_rate does depends on {other} is open: {what}",
        },
        metric=evidence.metric,
        effect=abs(effect),
        interval=interval,
        p=float(2 * stats.t.sf(abs(effect) / error, surface.df)) if error > 0 else 0.0,
        trials=surface.ids,
        num_units=len(surface.gains),
        num_seeds=surface.num_seeds,
    )


def one_rate_for_all(surface: Surface, other: str) -> Shortfall | None:
    """What one learning rate for all values of another axis loses at the worst of them; None where they cannot interact."""
    if not surface.has((RATE, 2)) or not surface.has((RATE, 1), (other, 1)):
        return None
    values, ends = levels(surface, other), surface.ends(RATE)

    def loss(betas: np.ndarray) -> np.ndarray:
        common = peak(surface.along(RATE, {}, betas), *ends)
        own = surface.profile(other, values, betas)
        lost = [own[..., i] - height(surface.along(RATE, surface.at(other, v), betas), common) for i, v in enumerate(values)]
        return np.max(lost, axis=0)

    return shortfall(float(loss(surface.beta)), loss(surface.draws))


def exchange(evidence: Evidence, surface: Surface, place: int, question: str) -> Draft | None:
    """s of lr* ∝ scaling^s at fixed rank: −1 where learning rate and alpha are exchangeable. None where alpha moves with rank."""
    if not surface.has((RATE, 2)) or not surface.has((RATE, 1), (SCALING, 1)):
        return None
    rate, scaling = surface.coordinates[RATE], surface.coordinates[SCALING]

    places = [{SCALING: at} for at in (-1.0, 1.0)]
    told: dict[str, Any] = {
        "trials": surface.ids,
        "num_units": len(surface.gains),
        "num_seeds": surface.num_seeds,
        "place": place,
    }
    ends = {number(scaling.back(at[SCALING]), 3): end for at in places if (end := surface.censored(at))}
    if ends:
        rates = surface.points[RATE].dropna().unique()
        why = "; ".join(at_end(f"scaling {where}", rates, end) for where, end in ends.items())
        claim = f"Whether learning rate and alpha are exchangeable is open: {why}"
        return Draft("alpha", question, {"undecided": claim}, evidence.metric, **told)

    def slope(below: Any, above: Any) -> Any:
        return (above - below) * rate.width / (2 * scaling.width)

    effect = float(slope(*(surface.optimum(at, *surface.ends(RATE))[0] for at in places))) + 1
    draws = slope(*(surface.optima(at, *surface.ends(RATE)) for at in places)) + 1
    interval = percentiles(draws)
    found = f"the best learning_rate goes with scaling^{number(effect - 1, 2)} at fixed rank, and −1 is an exchange"
    return Draft(
        axis="alpha",
        hypothesis=question,
        claims={
            "supported": f"Learning rate and alpha are exchangeable: {found}",
            "refuted": f"Learning rate and alpha are not exchangeable: {found}",
            "undecided": f"Whether learning rate and alpha are exchangeable is open: {found}",
        },
        metric=evidence.metric,
        effect=effect,
        interval=interval,
        p=equivalence_p(effect, error_of(interval), EXCHANGE_MARGIN, surface.df),
        unit="exponent + 1",
        margin=EXCHANGE_MARGIN,
        **told,
    )

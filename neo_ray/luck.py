"""How much better does the best look than it is? The winner's curse of the best of many settings, and what is left without it.

The best of N equal settings is the luckiest. Where the best ran again with fresh seeds, those tell; else its mean is drawn
towards those of the other settings as far as the noise of a run says: its posterior mean under the prior that makes the means
of all settings most likely (empirical Bayes: Kiefer & Wolfowitz, 1956; Koenker & Mizera, JASA 109, 2014).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import integrate, stats

from neo_ray.confirmed import CONFIRM
from neo_ray.evidence import Evidence, number, with_unit
from neo_ray.statistics import complete, gains_of, setting_of, sign_of, unstable

MIN_SETTINGS = 8
"""Fewer tell no prior."""
MAX_SETTINGS, TOO_FAR = 1000, 10
"""The best ones, and standard deviations of a run from the best: the others are too far away to have been the best by luck, and
one at 1e6 would leave the prior no point between those that are near."""
GRID, ROUNDS = 200, 300
"""Points of the prior, and steps of expectation and maximisation: the best one's mean moves by less than 1 % of an SD then."""


@dataclass(frozen=True)
class Luck:
    metric: str
    label: str
    """The metric as a sentence names it."""
    trial: str
    """Of the setting that looks best among those that were not confirmed yet."""
    value: float
    """As it looks: the mean over its seeds, without those of confirm."""
    num_settings: int
    num_seeds: int
    excess_sds: float
    """What the best of as many equal settings is expected to look too good by, in standard deviations of a run."""
    excess: float
    """The same in units of the metric."""
    shrunk: float | None
    """Its posterior mean; None where fresh seeds tell."""
    fresh: float | None
    """Its mean over the fresh seeds of confirm; None where it has none."""
    num_fresh: int


def expected_best(num: int) -> float:
    """Mean of the largest of so many independent standard normal values: 1.77 of 16, 2.75 of 200."""
    if num < 2:
        return 0.0
    return float(integrate.quad(lambda x: x * num * stats.norm.pdf(x) * stats.norm.cdf(x) ** (num - 1), -10, 10)[0])


def luck_of(evidence: Evidence) -> Luck | None:
    """None where the noise of a run is not known, or the settings are too few."""
    noise, sign = evidence.noise, sign_of(evidence.mode)
    done = complete(evidence.frame[~unstable(evidence.frame, evidence.varied, evidence.metric)], evidence.metric)
    if noise is None or not noise.sd > 0:
        return None
    done = done.assign(setting=setting_of(done, evidence.varied), gain=gains_of(done, evidence.metric, evidence.mode)[0])
    first, again = done[done["phase"] != CONFIRM], done[done["phase"] == CONFIRM]
    means = first.groupby("setting")["gain"].agg(["mean", "count"]).sort_values("mean", ascending=False)
    if len(means) < MIN_SETTINGS:
        return None
    best, count = means.index[0], int(means["count"].iloc[0])
    fresh = again[again["setting"] == best]["gain"]
    top = means[means["mean"] >= means["mean"].iloc[0] - TOO_FAR * noise.sd].iloc[:MAX_SETTINGS]
    errors = noise.sd / np.sqrt(top["count"].to_numpy(dtype=float))
    shrunk = _posterior_mean(top["mean"].to_numpy(dtype=float), errors) if fresh.empty else None
    factor = expected_best(len(means))
    return Luck(
        metric=evidence.metric,
        label=evidence.label,
        trial=str(first[first["setting"] == best].sort_values("gain")["id"].iloc[-1]),
        value=sign * float(means["mean"].iloc[0]),
        num_settings=len(means),
        num_seeds=count,
        excess_sds=factor / math.sqrt(count),
        excess=factor * noise.sd / math.sqrt(count),
        shrunk=None if shrunk is None else sign * shrunk,
        fresh=None if fresh.empty else sign * float(fresh.mean()),
        num_fresh=len(fresh),
    )


def luck_lines(found: Luck | None) -> list[str]:
    """The correction in sentences, to stand beside the best setting."""
    if found is None:
        return []
    seeds = f"{found.num_seeds} seed{'s' if found.num_seeds > 1 else ''}"
    lines = [
        f"The best of {found.num_settings} equal settings would look {number(found.excess, 2)} too good by luck, "
        f"{number(found.excess_sds, 2)} standard deviations of a run"
    ]
    looks = f"trial {found.trial} looks best by {found.label} {number(found.value)} ({seeds})"
    if found.fresh is not None:
        mean = "the mean of" if found.num_fresh > 1 else "with"
        value = with_unit(number(found.fresh), found.metric)
        fresh = f"{found.num_fresh} fresh seed{'s' if found.num_fresh > 1 else ''}"
        return [*lines, f"Outside of confirm {looks}; {mean} {fresh} is {value}"]
    value = with_unit(number(found.shrunk), found.metric)
    return [*lines, f"Among settings that differ as these do, {looks} and is expected at {value}; fresh seeds would tell"]


def _posterior_mean(means: np.ndarray, errors: np.ndarray) -> float:
    """Of the first of the settings. means, errors: n."""
    grid = np.linspace(means.min(), means.max(), GRID)
    likelihood = np.exp(-0.5 * ((means[:, None] - grid) / errors[:, None]) ** 2)
    prior = np.full(GRID, 1 / GRID)
    for _ in range(ROUNDS):
        weights = likelihood * prior
        prior = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
    weights = likelihood[0] * prior
    return float(weights @ grid / weights.sum())

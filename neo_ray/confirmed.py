"""What may be said from which phase? Laws from trials that no sampler chose, the recommendation from fresh seeds.

The best of many settings looks better than it is, by the luck that made it the best. Its gain over the reference is therefore
taken from the `confirm` phase alone, seed by seed, on the split that nothing was chosen by. Benchmarks have no such split: the
same items chose the settings, and only the seeds are fresh.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import pandas as pd
from scipy import stats

from neo_ray.config import SweepConfig
from neo_ray.phases import phases_of
from neo_ray.records import TrialRecord
from neo_ray.settings import ConfigError
from neo_ray.trials import setting_key

CONFIRM = "confirm"
UNCHOSEN = ("map", "noise")
"""Phases whose settings follow from the file alone."""


@dataclass(frozen=True)
class Confirmed:
    """The best of the settings that ran again with fresh seeds, all with the same ones."""

    params: dict[str, Any]
    trials: tuple[str, ...]
    seeds: tuple[int, ...]
    metric: str
    """The objective, on the report split; benchmarks have none and are of the same items as before."""
    value: float
    """Mean over the seeds."""
    num_settings: int
    """How many ran again, the reference included."""
    is_reference: bool
    left_out: tuple[tuple[dict[str, Any], tuple[int, ...]], ...] = ()
    """Settings that ran again and are not among these, each with those of the seeds that it is COMPLETE with."""
    reference: float | None = None
    """The reference's mean over the same seeds; None where it did not run with them."""
    gain: float | None = None
    """Over the reference, mean of the differences seed by seed; positive is better: the reference's regret."""
    interval: tuple[float, float] | None = None
    """95 %, of the paired t, corrected (Bonferroni) for the choice among the settings."""


def unchosen(records: Sequence[TrialRecord], frame: pd.DataFrame) -> pd.DataFrame:
    """The trials that laws are fitted on: those of a map and of the noise floor, where a map is COMPLETE; else all."""
    mapped = any(r.phase == "map" and r.state == "COMPLETE" for r in records)
    return frame[frame["phase"].isin(UNCHOSEN)] if mapped else frame


def with_all_seeds(records: Sequence[TrialRecord], sweep: SweepConfig | None, metric: str) -> dict[str, list[TrialRecord]]:
    """Setting → its confirmed trials with the seeds that the most settings are COMPLETE with, the reference among them.

    Of seeds that as many share, the most; of as many seeds, those that ran last. None with a single seed, none of a setting that
    diverged with a fresh seed, and none while only one setting has two seeds and others are on their way.
    """
    ran = _by_setting(records)
    whole = {key: _complete(runs, metric) for key, runs in ran.items() if all(r.cause != "diverged" for r in runs)}
    reference, found = reference_key(sweep), dict[tuple[Any, ...], dict[str, list[TrialRecord]]]()
    for seeds in _shared(whole.values()):
        group = {key: [runs[seed] for seed in sorted(seeds)] for key, runs in whole.items() if set(runs) >= seeds}
        last = max(run.id for runs in group.values() for run in runs)
        found[reference in group, len(group), len(seeds), last, *sorted(seeds)] = group
    best = found[max(found)] if found else {}
    waiting = any(key not in best and (whole[key] or any(not r.finished for r in ran[key])) for key in whole)
    return {} if len(best) == 1 and waiting else best


def _by_setting(records: Sequence[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Setting → all trials that it has in the confirm phase."""
    found: dict[str, list[TrialRecord]] = {}
    for record in records:
        if record.phase == CONFIRM:
            found.setdefault(setting_key(record.params), []).append(record)
    return found


def _complete(runs: Sequence[TrialRecord], metric: str) -> dict[int, TrialRecord]:
    """Seed → the COMPLETE trial with it."""
    return {r.seed: r for r in runs if r.state == "COMPLETE" and _finite(r.metrics.get(metric))}


def _shared(groups: Iterable[Collection[int]]) -> set[frozenset[int]]:
    """Every set of two seeds or more that is all that some of the groups have in common."""
    found: set[frozenset[int]] = set()
    for group in map(frozenset, groups):
        found |= {group, *(group & other for other in found)}
    return {seeds for seeds in found if len(seeds) > 1}


def confirmed(records: Sequence[TrialRecord], sweep: SweepConfig | None, metric: str, mode: str) -> Confirmed | None:
    """The best of the confirmed settings by its mean on the select split, scored on the report split where the metric has one.

    None where nothing is confirmed.
    """
    groups, scored = with_all_seeds(records, sweep, metric), metric.replace("select_", "report_", 1)
    groups = {k: those for k, those in groups.items() if all(_finite(r.metrics.get(scored)) for r in those)}
    if not groups:
        return None
    sign = 1 if mode == "max" else -1
    best = max(groups, key=lambda key: sign * fmean(_values(groups[key], metric)))
    theirs = groups.get(reference_key(sweep) or "")
    ours = groups[best]
    seeds = tuple(r.seed for r in ours)
    others = [runs for key, runs in _by_setting(records).items() if key not in groups]
    found = Confirmed(
        params=ours[0].params,
        trials=tuple(r.id for r in ours),
        seeds=seeds,
        metric=scored,
        value=fmean(_values(ours, scored)),
        num_settings=len(groups),
        is_reference=theirs is ours,
        left_out=tuple((runs[0].params, tuple(s for s in seeds if s in _complete(runs, scored))) for runs in others),
    )
    if theirs is None or theirs is ours:
        return found
    pairs = zip(_values(ours, scored), _values(theirs, scored), strict=True)
    gain, interval = paired([sign * (a - b) for a, b in pairs], len(groups) - 1)
    mean = fmean(_values(theirs, scored))
    return Confirmed(**{**found.__dict__, "reference": mean, "gain": gain, "interval": interval})


def paired(differences: Sequence[float], choices: int = 1) -> tuple[float, tuple[float, float]]:
    """Mean of differences and its 95 % t interval, Bonferroni-corrected over so many choices."""
    mean, count = fmean(differences), len(differences)
    half = stdev(differences) / math.sqrt(count) * float(stats.t.isf(0.025 / max(1, choices), count - 1))
    return mean, (mean - half, mean + half)


def phase_counts(records: Sequence[TrialRecord]) -> dict[str, Counter[str]]:
    """Phase → its trials by state, in the order in which the phases began; empty where there is only one."""
    found: dict[str, Counter[str]] = {}
    for record in records:
        found.setdefault(record.phase, Counter())[record.state] += 1
    return found if len(found) > 1 else {}


def samplers_of(sweep: SweepConfig) -> dict[str, str]:
    """Phase → what proposes its settings, of those that have a sampler; one without a name is under `""`."""
    try:
        phases = phases_of(sweep)
    except ConfigError:
        return {}
    return {phase.name or "": phase.config.sampler.name for phase in phases if not phase.seeds}


def reference_key(sweep: SweepConfig | None) -> str | None:
    try:
        phases = phases_of(sweep) if sweep is not None else ()
    except ConfigError:
        return None
    return next((setting_key(phase.reference) for phase in phases if phase.reference is not None), None)


def _values(records: Sequence[TrialRecord], metric: str) -> list[float]:
    return [float(record.metrics[metric] or 0.0) for record in records]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)

"""Which settings does no other beat in everything that counts? The Pareto front of a sweep's objectives, over settings' means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from neo_ray.evidence import CPU_MEMORY, Evidence, number, with_unit
from neo_ray.records import TrialRecord
from neo_ray.scores import called
from neo_ray.searching import ObjectiveConfig
from neo_ray.statistics import axes_of, table, unstable
from neo_ray.trials import setting_key

UNITS = {"accelerator_seconds": "seconds × devices", "seconds": "seconds", "tokens": "tokens"}


@dataclass(frozen=True)
class Member:
    """A setting of the front."""

    params: dict[str, Any]
    trials: tuple[str, ...]
    values: dict[str, float]
    """Objective → its mean over the setting's COMPLETE trials."""


def front_of(records: Sequence[TrialRecord], objective: ObjectiveConfig) -> tuple[list[Member], int]:
    """The front, best in the first objective first, and of how many settings: those with every objective measured.

    Without those that a seed diverged with, where there are others.
    """
    frame = table(records)
    outside = unstable(frame, axes_of(frame, records), objective.metric)
    records = [record for record, out in zip(records, outside, strict=True) if not out]
    groups: dict[str, list[TrialRecord]] = {}
    for record in records:
        if record.state == "COMPLETE" and all(record.measured(o.metric) is not None for o in objective.all):
            groups.setdefault(setting_key(record.params), []).append(record)
    members = [_member(runs, objective) for runs in groups.values()]
    kept: list[tuple[tuple[float, ...], Member]] = []
    for member in sorted(members, key=lambda member: _losses(member, objective)):
        point = _losses(member, objective)  # what beats it stands before it, or is beaten itself by one that is kept
        if not any(_beats(other, point) for other, _ in kept):
            kept.append((point, member))
    return [member for _, member in kept], len(members)


def front_lines(evidence: Evidence) -> list[str]:
    """The front in sentences; nothing for a sweep with one objective."""
    objective = evidence.sweep.objective if evidence.sweep else None
    if objective is None or not objective.further:
        return []
    front, total = front_of(evidence.records, objective)
    if not front:
        return ["No setting has a COMPLETE trial with all objectives measured."]
    names = ", ".join(called(o.metric, evidence.records) for o in objective.all)
    lines = [f"{len(front)} of {total} settings are beaten by no other in {names}:"]
    for member in front:
        setting = ", ".join(f"{name} {number(value, 3)}" for name, value in member.params.items()) or "the sweep's own values"
        values = ", ".join(f"{called(name, evidence.records)} {amount(name, value)}" for name, value in member.values.items())
        lines.append(f"{values}: {setting} ({', '.join(member.trials)})")
    costly = evidence.on_cpu and any(o.metric == "peak_memory_bytes" for o in objective.all)
    return [*lines, CPU_MEMORY[0].upper() + CPU_MEMORY[1:]] if costly else lines


def front_trials(evidence: Evidence) -> frozenset[str]:
    """The trials of the front; none for a sweep with one objective."""
    objective = evidence.sweep.objective if evidence.sweep else None
    front = front_of(evidence.records, objective)[0] if objective and objective.further else []
    return frozenset(trial for member in front for trial in member.trials)


def undominated(losses: np.ndarray) -> np.ndarray:
    """Rows that no other row beats or equals in every column while beating it in one; lower is better. n × k → bool of n."""
    kept = np.ones(len(losses), dtype=bool)
    for i, row in enumerate(losses):
        kept[i] = not ((losses <= row).all(axis=1) & (losses < row).any(axis=1)).any()
    return kept


def amount(name: str, value: float) -> str:
    """A value of an objective with its unit."""
    if name == "peak_memory_bytes":
        return f"{number(value / 1e9)} GB"
    return f"{number(value)} {UNITS[name]}" if name in UNITS else with_unit(number(value), name)


def _member(runs: Sequence[TrialRecord], objective: ObjectiveConfig) -> Member:
    means: dict[str, float] = {o.metric: fmean(run.measured(o.metric) or 0.0 for run in runs) for o in objective.all}
    return Member(runs[0].params, tuple(run.id for run in runs), means)


def _losses(member: Member, objective: ObjectiveConfig) -> tuple[float, ...]:
    """Lower is better in each."""
    return tuple(member.values[o.metric] * (-1 if o.mode == "max" else 1) for o in objective.all)


def _beats(other: tuple[float, ...], point: tuple[float, ...]) -> bool:
    return other != point and all(theirs <= ours for theirs, ours in zip(other, point, strict=True))

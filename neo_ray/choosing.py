"""Which settings are as good as the best, and which of them costs least? A rule for choosing one, never a verdict.

As good is what lies within one standard error of the best. A 95 % interval is wider than that by construction, so settings that
lie within it are not shown to be equivalent, and those beyond it not shown to be worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from neo_ray.evidence import CPU_MEMORY, Evidence, number, with_unit
from neo_ray.statistics import column, complete, equivalent, is_numeric, setting_of

SAME_MEMORY = 1.02
"""Peaks that differ by less are of one size: an allocator's rounding, not a setting's."""


@dataclass(frozen=True)
class Choice:
    """A setting of the region, and what it costs."""

    params: dict[str, Any]
    trials: tuple[str, ...]
    value: float
    peak_memory_bytes: float
    seconds: float
    accelerator_seconds: float
    """Means over the setting's COMPLETE trials; 0 where it is not known."""


@dataclass(frozen=True)
class Region:
    """The settings whose mean is within one standard error of the best setting's."""

    metric: str
    label: str
    """The metric as a sentence names it."""
    standard_error: float
    num_settings: int
    num_of: int
    spans: dict[str, tuple[float, float] | tuple[str, ...]]
    """Axis → lowest and highest value over the region, or the values of an axis that is not numeric."""
    best: Choice
    cheapest: Choice
    by_memory: bool
    """By memory and then by seconds; else by accelerator-seconds, as memory on a CPU is not a trial's own."""

    @property
    def saves(self) -> bool:
        return self.cheapest.trials != self.best.trials


def region_trials(evidence: Evidence) -> pd.DataFrame:
    """The COMPLETE trials of the region; none without a noise."""
    best = evidence.best.id if evidence.best else None
    return equivalent(evidence.frame, evidence.metric, evidence.mode, evidence.varied, evidence.noise, best)


def region_of(evidence: Evidence) -> Region | None:
    """None where no setting was completed with two seeds: then a standard error is not known."""
    good, best, noise = region_trials(evidence), evidence.best, evidence.noise
    if good.empty or best is None or noise is None:
        return None
    done = complete(evidence.frame, evidence.metric)
    settings = setting_of(done, evidence.varied)
    inside = settings[good.index]
    of_best = settings[done["id"] == best.id].iloc[0]
    choices = {setting: _choice(evidence, rows) for setting, rows in good.groupby(inside)}
    by_memory = not evidence.on_cpu
    least = min(choice.peak_memory_bytes for choice in choices.values())
    small = [choice for choice in choices.values() if not by_memory or choice.peak_memory_bytes <= SAME_MEMORY * least]
    time = "seconds" if by_memory else "accelerator_seconds"
    return Region(
        metric=evidence.metric,
        label=evidence.label,
        standard_error=noise.sd / int((settings == of_best).sum()) ** 0.5,
        num_settings=len(choices),
        num_of=settings.nunique(),
        spans={axis: _span(good, axis) for axis in evidence.axes if good[column(axis)].notna().any()},
        best=choices[of_best],
        cheapest=min(small, key=lambda choice: (getattr(choice, time), choice is not choices[of_best])),
        by_memory=by_memory,
    )


def region_lines(found: Region | None) -> list[str]:
    """The region and its cheapest setting in sentences; nothing without one."""
    if found is None:
        return []
    error = with_unit(number(found.standard_error, 2), found.metric)
    if found.num_settings == 1:
        return [f"No other of {found.num_of} settings is within one standard error ({error}) of the best"]
    spans = "; ".join(f"{axis} {_span_text(span)}" for axis, span in found.spans.items())
    lines = [f"{found.num_settings} of {found.num_of} settings are within one standard error ({error}) of the best: {spans}"]
    lines.append(_cheapest_line(found))
    return [*lines, "That is a rule for choosing among them, and shows neither that they are equal nor that the others are worse"]


def _cheapest_line(found: Region) -> str:
    best, cheapest = found.best, found.cheapest
    by = "by memory and then by seconds" if found.by_memory else "by accelerator-seconds"
    why = "" if found.by_memory else f"; {CPU_MEMORY}"
    if not found.saves:
        return f"The best itself is the cheapest of them, {by}{why}"
    setting = ", ".join(f"{name} {number(value, 3)}" for name, value in cheapest.params.items())
    costs = [f"{found.label} {number(cheapest.value)} against {number(best.value)} of the best"]
    if found.by_memory and cheapest.peak_memory_bytes and best.peak_memory_bytes:
        costs.append(f"{number(cheapest.peak_memory_bytes / 1e9, 3)} GB against {number(best.peak_memory_bytes / 1e9, 3)}")
    if found.by_memory and cheapest.seconds and best.seconds:
        costs.append(f"{number(cheapest.seconds, 3)} s against {number(best.seconds, 3)}")
    if not found.by_memory and cheapest.accelerator_seconds and best.accelerator_seconds:
        costs.append(f"{number(cheapest.accelerator_seconds, 3)} s × devices against {number(best.accelerator_seconds, 3)}")
    return f"The cheapest of them, {by} (trial {cheapest.trials[0]}): {setting}; {', '.join(costs)}{why}"


def _choice(evidence: Evidence, rows: pd.DataFrame) -> Choice:
    params = next(record.params for record in evidence.records if record.id == rows["id"].iloc[0])
    means = rows[[evidence.metric, "peak_memory_bytes", "seconds", "accelerator_seconds"]].mean()
    return Choice(params, tuple(rows["id"]), *(float(value) for value in means))


def _span(good: pd.DataFrame, axis: str) -> tuple[float, float] | tuple[str, ...]:
    values = good[column(axis)].dropna()
    if is_numeric(good, axis):
        return (float(values.min()), float(values.max()))
    return tuple(sorted(map(str, values.unique())))


def _span_text(span: tuple[float, float] | tuple[str, ...]) -> str:
    if isinstance(span[0], str):
        return " or ".join(map(str, span))
    low, high = (number(end, 3) for end in span)
    return low if low == high else f"{low} to {high}"

"""Which setting is the best compromise of quality and cost? The knee of the Pareto front, and how sure it is.

Each objective runs from 0 (the best of the front) to 1 (its worst). The knee is the member that lies farthest from the line (with
three objectives the plane) through the ends of the front, on the side of the ideal (Das, Structural Optimization 18, 1999): the
one with the least sum. Its frequency is over draws of the settings' means with the noise of a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from neo_ray.evidence import CPU_MEMORY, Evidence, number
from neo_ray.pareto import amount, undominated
from neo_ray.scores import called
from neo_ray.statistics import complete, noise, setting_of, unstable

DRAWS = 500
MAX_CANDIDATES = 200
"""Settings that a draw chooses among: those nearest to the ideal."""
MIN_FRONT = 3
"""Two members are the ends."""


@dataclass(frozen=True)
class Knee:
    params: dict[str, Any]
    trials: tuple[str, ...]
    values: dict[str, float]
    """Objective → mean over the setting's COMPLETE trials."""
    labels: tuple[str, ...]
    """The objectives as a sentence names them, in the same order."""
    distance: float
    """From the line or plane through the ends, in units of the normalised objectives."""
    frequency: float | None
    """Share of the draws with the same knee; None where no setting was completed with two seeds."""
    num_front: int
    num_settings: int
    on_cpu: bool


def knee_of(evidence: Evidence) -> Knee | None:
    """None where the front has no third member, or no two objectives differ over it."""
    frame = evidence.frame[~unstable(evidence.frame, evidence.varied, evidence.metric)]
    modes, done = _modes(evidence), complete(frame, evidence.metric)
    if len(modes) < 2 or done.empty:
        return None
    done = done.assign(setting=setting_of(done, evidence.varied)).dropna(subset=list(modes))
    means = done.groupby("setting")[list(modes)].mean()
    losses = means.to_numpy() * [-1 if mode == "max" else 1 for mode in modes.values()]
    front = np.flatnonzero(undominated(losses))
    if len(front) < MIN_FRONT or (np.ptp(losses[front], axis=0) > 0).sum() < 2:
        return None
    sums = _sums(losses, losses[front])
    at = int(front[sums[front].argmin()])
    trials = tuple(done["id"][done["setting"] == means.index[at]])
    near = np.unique([at, *np.argsort(sums)[:MAX_CANDIDATES]])
    errors = _errors(evidence, done, list(modes))
    return Knee(
        params=next(record.params for record in evidence.records if record.id == trials[0]),
        trials=trials,
        values=dict(zip(modes, (float(value) for value in means.iloc[at]), strict=True)),
        labels=tuple(called(name, evidence.records) for name in modes),
        distance=(1 - float(sums[at])) / math.sqrt(len(modes)),
        frequency=None if errors is None else _frequency(losses[near], errors[near], int((near == at).argmax())),
        num_front=len(front),
        num_settings=len(means),
        on_cpu=evidence.on_cpu,
    )


def knee_lines(found: Knee | None) -> list[str]:
    """The knee in one sentence; nothing without one."""
    if found is None:
        return []
    setting = ", ".join(f"{name} {number(value, 3)}" for name, value in found.params.items()) or "the sweep's own values"
    named = zip(found.labels, found.values.items(), strict=True)
    values = ", ".join(f"{label} {amount(name, value)}" for label, (name, value) in named)
    sure = f"; with other luck it is the knee in {found.frequency:.0%} of the draws" if found.frequency is not None else ""
    sure += f"; {CPU_MEMORY}" if found.on_cpu else ""
    return [
        f"Of {found.num_front} of {found.num_settings} settings that no other beats in {', '.join(found.labels)} at once, the "
        f"knee is {setting} (trial {found.trials[0]}): {values}{sure}"
    ]


def _modes(evidence: Evidence) -> dict[str, str]:
    """Objective → which is better: the sweep's own, or, where it has one, quality, memory and time; a CPU's memory is no cost."""
    given = evidence.sweep.objective.all if evidence.sweep else ()
    if len(given) > 1:
        return {o.metric: o.mode for o in given if o.metric in evidence.frame}
    known = {name for name in ("peak_memory_bytes", "accelerator_seconds", "seconds") if (evidence.frame[name] > 0).any()}
    time = next((name for name in ("accelerator_seconds", "seconds") if name in known), None)
    memory = None if evidence.on_cpu else "peak_memory_bytes"
    costs = [name for name in (memory, time) if name in known]
    return {evidence.metric: evidence.mode, **{str(name): "min" for name in costs}}


def _sums(losses: np.ndarray, front: np.ndarray) -> np.ndarray:
    """Of the normalised objectives; an objective that is the same all over the front adds nothing."""
    low, high = front.min(axis=0), front.max(axis=0)
    return ((losses - low) / np.where(high > low, high - low, np.inf)).sum(axis=1)


def _errors(evidence: Evidence, done: pd.DataFrame, names: list[str]) -> np.ndarray | None:
    """Standard errors of the settings' means, settings × objectives; None where that of the quality is not known."""
    found = [noise(evidence.frame, evidence.varied, name) for name in names]
    if found[0] is None:
        return None
    counts = done.groupby("setting").size().to_numpy()
    return np.array([each.sd if each else 0.0 for each in found]) / np.sqrt(counts)[:, None]


def _frequency(losses: np.ndarray, errors: np.ndarray, at: int) -> float:
    """How often row `at` is the knee, where each mean is drawn anew."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(DRAWS):
        drawn = losses + errors * rng.standard_normal(losses.shape)
        front = np.flatnonzero(undominated(drawn))
        hits += int(front[_sums(drawn[front], drawn[front]).argmin()]) == at
    return hits / DRAWS

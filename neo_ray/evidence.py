"""What is there to judge by? The trials of a sweep with their axes, tested ranges, noise, best setting and scope."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from neo_ray.config import SweepConfig
from neo_ray.confirmed import samplers_of, unchosen, with_all_seeds
from neo_ray.records import TrialRecord
from neo_ray.scores import SuiteScores, called
from neo_ray.searching import of_suite
from neo_ray.settings import ConfigError
from neo_ray.space import Space, build_space
from neo_ray.statistics import (
    MAX_LEVELS,
    Best,
    Noise,
    aliases,
    axes_of,
    best_setting,
    column,
    complete,
    is_numeric,
    noise,
    table,
)

CPU_MEMORY = "on a CPU a worker's peak memory is that of its process, to which trials before have added"
UNITS = {"ce": "nats per token", "kl": "nats per token", "bits_per_byte": "bits per byte"}


@dataclass(frozen=True)
class Scope:
    """What a claim holds for, and no further."""

    teacher: str | None
    student: str | None
    data: str | None
    tokens: tuple[int, int] | None
    """Fewest and most training tokens of a COMPLETE trial."""
    alpha_rule: str | None
    """How alpha moves with rank in the trials; the effect of rank holds under this rule."""
    tested: dict[str, str]
    sampler: str | None


@dataclass(frozen=True)
class Evidence:
    """The trials of a sweep, and what every question to them needs."""

    records: tuple[TrialRecord, ...]
    sweep: SweepConfig | None
    frame: pd.DataFrame
    metric: str
    mode: str
    axes: tuple[str, ...]
    """Searched axes that the trials vary, without those that move with another."""
    aliases: dict[str, str]
    """Axis → the one that it moves with."""
    varied: tuple[str, ...]
    """All parameters that vary: the same in all of these means the same setting."""
    tested: dict[str, tuple[float, ...]]
    """Values of each numeric axis, ascending: its levels, or the two ends of a continuous range."""
    noise: Noise | None
    best: Best | None
    scope: Scope
    scores: Mapping[str, SuiteScores] = field(default_factory=dict)
    """Of a suite of benchmarks, item by item, where they are kept: trial → its own, `scores.STUDENT` → the untrained one's."""

    @property
    def on_cpu(self) -> bool:
        """Was a trial run on a CPU? Then its memory is not its own."""
        return any(str(record.details.get("device", "")).startswith("CPU") for record in self.records)

    @property
    def label(self) -> str:
        """The metric as a sentence names it."""
        return called(self.metric, self.records)

    def named(self, metric: str) -> str:
        """`select_ce (nats per token)`, `quickstart v2`."""
        return f"{metric} ({unit_of(metric)})" if unit_of(metric) else called(metric, self.records)


def gather(
    records: Sequence[TrialRecord], sweep: SweepConfig | None, objective: tuple[str, str] = ("select_ce", "min")
) -> Evidence:
    """Without a sweep file metric and mode are those of `objective`, and the axes are the parameters that vary."""
    frame, space = table(records), _space(sweep)
    metric, mode = (sweep.objective.metric, sweep.objective.mode) if sweep else objective
    varied = axes_of(frame, records)
    derived = {name: axis.of for name, axis in space.axes.items() if axis.of and name in varied} if space else {}
    moving = {**aliases(frame, [a for a in varied if a not in derived]), **derived}
    axes = tuple(a for a in varied if a not in moving)
    tested = {axis: _tested(frame, axis, space) for axis in axes if is_numeric(frame, axis)}
    spread = noise(frame, varied, metric)
    ends = {axis: (values[0], values[-1]) for axis, values in tested.items()}
    fresh = {record.id for runs in with_all_seeds(records, sweep, metric).values() for record in runs}
    best = best_setting(frame[frame["id"].isin(fresh)] if fresh else frame, metric, mode, varied, ends, spread)
    scope = _scope(records, sweep, frame, metric, axes, space)
    return Evidence(tuple(records), sweep, frame, metric, mode, axes, moving, varied, tested, spread, best, scope)


def for_laws(evidence: Evidence) -> Evidence:
    """The evidence without the trials that a sampler chose, where there is a map: they would bias a law."""
    frame = unchosen(evidence.records, evidence.frame)
    kept = set(frame["id"])
    return replace(evidence, frame=frame, records=tuple(r for r in evidence.records if r.id in kept))


def with_leaves(evidence: Evidence) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The trials with a column for each leaf that varies, and those leaves: axes that set one leaf are one column.

    Trials of two methods with a learning-rate axis each are equal otherwise where their learning rates are.
    """
    space, frame = _space(evidence.sweep), evidence.frame
    groups: dict[str, list[str]] = {}
    for axis in evidence.varied:
        leaf = space.axes[axis].leaf if space and axis in space.axes else axis
        groups.setdefault(leaf, []).append(column(axis))
    merged = {column(leaf): frame[names].bfill(axis=1).iloc[:, 0] for leaf, names in groups.items() if names != [column(leaf)]}
    return frame.assign(**merged), tuple(groups)


def constant_axes(evidence: Evidence) -> dict[str, Any]:
    """Searched axes with one value in all trials, and that value: nothing can be said of them."""
    space, frame = _space(evidence.sweep), evidence.frame
    names = space.searched if space else dict.fromkeys(name for r in evidence.records for name in r.params)
    seen = {name: frame[column(name)].dropna().unique() for name in names if name != "seed" and column(name) in frame}
    return {name: values[0] for name, values in seen.items() if len(values) == 1}


def number(value: Any, digits: int = 4) -> str:
    """A value as a person writes it: 0.0002 as 2e-4, 64.0 as 64; a missing one as a dash."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return "–" if value is None else str(value)
    value = float(value)
    if not math.isfinite(value):
        return "–"
    if value and not 1e-2 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def unit_of(metric: str) -> str:
    """Empty for benchmarks, whose values are means over items."""
    return "" if of_suite(metric) else UNITS.get(metric.partition("_")[2], metric)


def with_unit(text: str, metric: str) -> str:
    """`4.51 nats per token`."""
    return f"{text} {unit_of(metric)}".rstrip()


def _space(sweep: SweepConfig | None) -> Space | None:
    try:
        return build_space(sweep) if sweep else None
    except ConfigError:
        return None  # the records speak for themselves


def _tested(frame: pd.DataFrame, axis: str, space: Space | None) -> tuple[float, ...]:
    seen = {float(v) for v in frame[column(axis)].dropna()}
    known = space.axes.get(axis) if space else None
    if known is not None and known.sampled and (known.continuous or known.num_options > MAX_LEVELS):
        return (float(min(known.low, *seen)), float(max(known.high, *seen)))
    if known is not None and known.sampled:
        seen |= {float(v) for v in known.options()}
    ordered = tuple(sorted(seen))
    return ordered if len(ordered) <= MAX_LEVELS else (ordered[0], ordered[-1])


def _scope(
    records: Sequence[TrialRecord],
    sweep: SweepConfig | None,
    frame: pd.DataFrame,
    metric: str,
    axes: tuple[str, ...],
    space: Space | None,
) -> Scope:
    tokens, samplers = complete(frame, metric)["tokens"], samplers_of(sweep) if sweep else {}
    student = sweep.student.model if sweep else None
    if sweep and sweep.student.prune:
        student = f"the teacher pruned to {sweep.student.prune.num_layers} layers"
    return Scope(
        teacher=sweep.teacher.model if sweep and sweep.teacher else None,
        student=student,
        data=sweep.data.source if sweep else None,
        tokens=(int(tokens.min()), int(tokens.max())) if len(tokens) else None,
        alpha_rule=_alpha_rule(records),
        tested={axis: _range_text(frame, axis, space) for axis in axes},
        sampler=samplers.get("map") or samplers.get("exploit") or samplers.get(""),
    )


def _range_text(frame: pd.DataFrame, axis: str, space: Space | None) -> str:
    if space and axis in space.axes:
        return space.axes[axis].text
    values = sorted(frame[column(axis)].dropna().unique(), key=None if is_numeric(frame, axis) else str)
    if len(values) > MAX_LEVELS and is_numeric(frame, axis):
        return f"{number(values[0])} … {number(values[-1])}"
    return "one of " + ", ".join(map(number, values))


def _alpha_rule(records: Sequence[TrialRecord]) -> str | None:
    """How the scaling of the low-rank branch moves with rank: the sign of a rank effect may depend on it.

    One scaling at every rank is one rule, however it is divided; else rsLoRA, which divides by the rank's root, is another rule.
    """
    rows = []
    for record in records:
        lora = record.config.get("lora")
        lora = {**lora, **record.params} if isinstance(lora, dict) else record.params
        if (
            record.scaling is not None
            and isinstance(lora.get("rank"), int | float)
            and isinstance(lora.get("alpha"), int | float)
        ):
            rows.append((lora["rank"], lora["alpha"], record.scaling))
    if not rows:
        return None
    ranks, alphas, scalings = (sorted(set(values)) for values in zip(*rows, strict=True))
    if len(scalings) == 1:
        return f"scaling {number(scalings[0])} at every rank"
    span = f"{_divided(rows)}, scaling {number(scalings[0])} to {number(scalings[-1])}"
    if len(alphas) == 1:
        return f"alpha {number(alphas[0])} at every rank{span}"
    return f"alpha and rank vary separately{span}" if len(ranks) > 1 else f"rank {number(ranks[0])}{span}"


def _divided(rows: Sequence[tuple[float, float, float]]) -> str:
    """By what alpha is divided, where that is not the rank (rows of rank, alpha, scaling)."""
    told = [row for row in rows if row[0] > 1]
    over_rank = [math.isclose(scaling * rank, alpha, rel_tol=1e-6) for rank, alpha, scaling in told]
    over_root = [math.isclose(scaling * math.sqrt(rank), alpha, rel_tol=1e-6) for rank, alpha, scaling in told]
    if all(over_rank):
        return ""
    if all(over_root):
        return " over the root of the rank (rsLoRA)"
    return " over the rank or its root (rsLoRA)" if all(map(max, over_rank, over_root)) else " with a scaling of its own"

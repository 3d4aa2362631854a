"""Which trials would decide what is open? `next.yaml`: a sweep file of the settings that undecided guidelines wait for.

Its settings change the best one in the axes that a question is about, and all run with the same fresh seeds, so that the noise of
a run is known, too. The regret of the defaults asks for a `confirm` phase. What has no room in it is in `next-2.yaml`, and so on.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from neo_ray.arms import FULL
from neo_ray.axes import as_leaf, leaf_value
from neo_ray.config import SweepConfig
from neo_ray.drafts import Guideline
from neo_ray.evidence import Evidence, number
from neo_ray.extensions import asks_to_extend
from neo_ray.guidelines import COMPARED, depends_on
from neo_ray.hypotheses import Fitted
from neo_ray.interplay import INTERACTS
from neo_ray.loading import dump, plain, validate
from neo_ray.phases import phases_of
from neo_ray.questions import QUESTIONS, REFERENCE, key_of
from neo_ray.settings import ConfigError, TrialConfig, trial_leaves
from neo_ray.statistics import column, is_numeric
from neo_ray.surface import RATIO
from neo_ray.trials import setting_key

NUM_SEEDS = 3
"""Of each setting: the least that pairs of arms are compared with."""
CONFIRM_SEEDS = 8
"""Of the best setting and of the defaults: whether they are equal within one run's noise takes about so many pairs."""
MOST_SETTINGS = 40
"""In one file; what asks for more is in the next."""
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
FULL_RATE = 0.1
"""Of the adapter's learning rate, where all parameters are trained (LLM-Neo: a tenth)."""

Point = dict[str, Any]
"""Leaf → value that differs from the best setting's."""
Maker = Callable[[TrialConfig, Fitted], list[Point]]

UNKNOWN = "no setting is known that would decide it"
REFUSED = "the schema, the models or the space refuse its settings"
ON_CPU = "trials on a GPU would decide it"


@dataclass(frozen=True)
class Upcoming:
    file: str
    """Its name."""
    config: SweepConfig
    asked: tuple[str, ...]
    """What it would decide."""
    left: tuple[str, ...]
    """What is undecided and in no file, with the reason; told by the first."""
    num_settings: int
    num_trials: int
    hours: float | None
    """Of trials, at the median time of a COMPLETE one."""

    @property
    def lines(self) -> list[str]:
        """For the report: what it takes, what it would decide, and what none would."""
        time = f", about {number(self.hours, 2)} hours of trials" if self.hours is not None else ""
        count = f"{len(self.asked)} question{'s' if len(self.asked) > 1 else ''}"
        lines = [f"{self.file}: {self.num_settings} settings, {self.num_trials} trials{time}, to decide {count}"]
        lines.append(f"it would decide: {'; '.join(self.asked)}")
        return lines + ([f"in no file: {'; '.join(self.left)}"] if self.left else [])

    @property
    def text(self) -> str:
        """The file: the sweep's models, data and resources, under another name."""
        header = [line for part in self.lines for line in part.replace(": ", ":; ", 1).split("; ")]
        return "".join(f"# {line}\n" for line in header) + "\n" + dump(self.config)


def upcoming(evidence: Evidence, guidelines: Sequence[Guideline], found: Fitted) -> tuple[Upcoming, ...]:
    """The files, what is nearest to a verdict first; empty where no trial would decide anything, or there is no sweep file."""
    base = _base(evidence)
    if base is None:
        return ()
    order = sorted(guidelines, key=lambda g: (not g.trials, g.place or 0))  # what has trials already is nearest to a verdict
    wishes, left, defaults = dict[str, list[Point]](), dict[str, str](), list[str]()
    for guideline in order:
        question, wish = guideline.hypothesis, _wish(evidence, guideline, base, found)
        if wish:
            wishes[question] = _ruled(evidence, base, wish)
        elif guideline.verdict == "undecided" and guideline.place == QUESTIONS["defaults"].place:
            defaults.append(question)
        elif guideline.verdict == "undecided":
            left[question] = ON_CPU if _no_memory(evidence, guideline) else UNKNOWN
    files, refused = _packed(evidence, base, wishes)
    left |= dict.fromkeys(refused, REFUSED)
    if defaults:
        points, asked, _ = files[0] if files else ([{}], [], None)
        confirmed = _sweep(evidence, base, points, "", confirm=True)
        left |= dict.fromkeys([] if confirmed else defaults, REFUSED)
        files = [(points, [*asked, *defaults], confirmed), *files[1:]] if confirmed else files
    reasons = tuple(f"{question} ({why})" for question, why in left.items())
    return tuple(_file(evidence, i, *parts, () if i else reasons) for i, parts in enumerate(files))


Parts = tuple[list[Point], list[str], SweepConfig]
"""Of a file: its settings, what they would decide, and the sweep."""


def _base(evidence: Evidence) -> TrialConfig | None:
    """The config of the best trial; None where there is none, or no sweep file."""
    if evidence.sweep is None or evidence.best is None:
        return None
    record = next(r for r in evidence.records if r.id == evidence.best.id)
    try:
        return TrialConfig.model_validate(record.config or {})
    except ValueError:
        return None


def _packed(evidence: Evidence, base: TrialConfig, wishes: dict[str, list[Point]]) -> tuple[list[Parts], list[str]]:
    """The files, each with the first of the wishes that it has room for, and what none can have."""
    files: list[Parts] = []
    while wishes:
        points, asked, config, later = list[Point](), list[str](), None, dict[str, list[Point]]()
        for question, wish in wishes.items():
            more = _together(points, wish, base)
            trial = _sweep(evidence, base, more, _suffix(len(files))) if len(more) <= MOST_SETTINGS else None
            if trial is None:
                later[question] = wish
            else:
                points, config = more, trial
                asked.append(question)
        if config is None:
            break
        files.append((points, asked, config))
        wishes = later
    return files, list(wishes)


def _suffix(index: int) -> str:
    return f"-{index + 1}" if index else ""


def _file(
    evidence: Evidence, index: int, points: list[Point], asked: list[str], config: SweepConfig, left: tuple[str, ...]
) -> Upcoming:
    trials = sum(phase.most() for phase in phases_of(config))
    seconds = [r.seconds for r in evidence.records if r.state == "COMPLETE" and r.seconds > 0]
    hours = trials * statistics.median(seconds) / 3600 if seconds else None
    return Upcoming(f"next{_suffix(index)}.yaml", config, tuple(asked), left, len(points), trials, hours)


def _no_memory(evidence: Evidence, guideline: Guideline) -> bool:
    """Is it about memory, which trials on a CPU do not tell?"""
    return evidence.on_cpu and key_of(guideline.place, guideline.hypothesis) == "memory"


def _wish(evidence: Evidence, guideline: Guideline, base: TrialConfig, found: Fitted) -> list[Point]:
    """The settings that a guideline waits for; none where it waits for none."""
    extend = asks_to_extend(evidence, guideline)
    if extend is not None:
        axis, end, beyond = extend
        return [{axis: end}, {axis: beyond}] if axis in trial_leaves() else []
    if guideline.verdict != "undecided" or _no_memory(evidence, guideline):
        return []
    maker = MAKERS.get(key_of(guideline.place, guideline.hypothesis) or "") or _maker(guideline)
    return maker(base, found) if maker else _levels(evidence, guideline, base, found)


def _maker(guideline: Guideline) -> Maker | None:
    """Of a guideline that is none of the questions' own: an interaction, or with a teacher against without one."""
    if guideline.hypothesis.startswith(INTERACTS):
        return _ratio_by_rate if guideline.axis.endswith(RATIO) else _rank_by_rate
    if COMPARED in guideline.hypothesis and guideline.axis == "method":
        return _methods("neo", "lora") if "method neo" in guideline.hypothesis else _methods("kd", "sft")
    return _ratio_by_rate if COMPARED in guideline.hypothesis else None


def _levels(evidence: Evidence, guideline: Guideline, base: TrialConfig, found: Fitted) -> list[Point]:
    """Of a guideline on an axis by itself: its ends, or every value of one that is no number."""
    axis = guideline.axis
    if axis not in trial_leaves() or axis not in evidence.axes or guideline.hypothesis != depends_on(evidence.label, axis):
        return []
    if is_numeric(evidence.frame, axis):
        low, high = (float(end) for end in evidence.frame[column(axis)].agg(["min", "max"]))
        return [{axis: low}, {}, {axis: high}]
    values = list({repr(r.params[axis]): r.params[axis] for r in evidence.records if axis in r.params}.values())
    return _methods(*values)(base, found) if axis == "method" else [{axis: value} for value in values]


def _ruled(evidence: Evidence, base: TrialConfig, points: Sequence[Point]) -> list[Point]:
    """The points under the sweep's alpha rule: another rank has another alpha where the two moved together."""
    if evidence.aliases.get("alpha") != "rank":
        return list(points)
    scaling = base.lora.alpha / base.lora.rank
    return [{**p, "alpha": scaling * p["rank"]} if "rank" in p and "alpha" not in p else p for p in points]


def _rates(base: TrialConfig, *factors: float) -> list[Point]:
    rate = base.training.learning_rate
    return [{"learning_rate": rate if factor == 1 else float(f"{rate * factor:.3g}")} for factor in factors]


def _ranks(base: TrialConfig, found: Fitted) -> list[int]:
    """Those that were tried, or a quarter and four times the best."""
    tried = [int(rank) for rank in found.law.optima] if found.law else []
    rank = base.lora.rank
    return tried if 2 < len(tried) <= 6 else sorted({max(1, rank // 4), rank, 4 * rank})


def _rank_by_rate(base: TrialConfig, found: Fitted) -> list[Point]:
    factors = (1 / 3, 1, 3) if found.law else (1 / 9, 1 / 3, 1, 3, 9)
    return [{"rank": rank, **rate} for rank in _ranks(base, found) for rate in _rates(base, *factors)]


def _alphas(base: TrialConfig, found: Fitted) -> list[Point]:
    alphas = [base.lora.alpha * factor for factor in (0.25, 1, 4)]
    return [{"alpha": alpha, **rate} for alpha in alphas for rate in _rates(base, 1 / 4, 1, 4)]


def _ratios(base: TrialConfig, found: Fitted) -> list[Point]:
    return [{"kd_ratio": ratio} for ratio in RATIOS]


def _ratio_by_rate(base: TrialConfig, found: Fitted) -> list[Point]:
    return [{"kd_ratio": ratio, **rate} for ratio in RATIOS for rate in _rates(base, 1 / 3, 1, 3)]


def _temperatures(base: TrialConfig, found: Fitted) -> list[Point]:
    return [{"temperature": t, **rate} for t in (1.0, 2.0, 4.0) for rate in _rates(base, 1 / 3, 1, 3)]


def _methods(*methods: str, factors: Sequence[float] = (1 / 3, 1, 3)) -> Maker:
    def points(base: TrialConfig, found: Fitted) -> list[Point]:
        own = {method: FULL_RATE if method in FULL else 1.0 for method in (*methods, base.method)}
        return [
            {"method": m, **rate} for m in methods for rate in _rates(base, *(own[m] / own[base.method] * f for f in factors))
        ]

    return points


def _variants(base: TrialConfig, found: Fitted) -> list[Point]:
    return [{"variant": variant, **rate} for variant in ("lora", "moslora") for rate in _rates(base, 1 / 3, 1, 3)]


MAKERS: dict[str, Maker] = {
    "trend": _rank_by_rate,
    "law": _rank_by_rate,
    "full": _methods("neo", "kd", factors=(1 / 9, 1 / 3, 1, 3, 9)),
    "exchange": _alphas,
    "ratio": _ratios,
    "only teacher": _ratios,
    "no teacher": _ratio_by_rate,
    "temperature": _temperatures,
    "one rate": _ratio_by_rate,
    "lora": _methods("neo", "lora"),
    "kd": _methods("neo", "kd"),
    "sft": _methods("neo", "sft"),
    "moslora": _variants,
    "memory": _methods("neo", "kd"),
    "time": _rank_by_rate,
}
"""Key of a question → the settings that would decide it."""


def _together(points: Sequence[Point], more: Sequence[Point], base: TrialConfig) -> list[Point]:
    """Both, each setting once, all with a value on every axis that one of them has."""
    axes = dict.fromkeys(name for point in [*points, *more] for name in point)
    own = {name: leaf_value(base, trial_leaves()[name]) for name in axes}
    whole = [{**own, **point} for point in [*points, *more]]
    return list({setting_key(point): point for point in whole}.values())


def _sweep(
    evidence: Evidence, base: TrialConfig, points: Sequence[Point], suffix: str, confirm: bool = False
) -> SweepConfig | None:
    """The sweep of these settings; None where schema, models or space refuse it."""
    sweep = evidence.sweep
    assert sweep is not None
    used = {record.seed for record in evidence.records} | {sweep.seed, base.seed}
    fresh = [seed for seed in range(1, 10_000) if seed not in used][: NUM_SEEDS + CONFIRM_SEEDS]
    try:
        whole = [{name: as_leaf(trial_leaves()[name], v, name) for name, v in point.items()} for point in points]
        defaults = {**REFERENCE, "alpha": 128.0}
        reference = {k: v for k, v in defaults.items() if k != "method" or v != base.method} if confirm else {}
        listed = _together(whole, [reference], base) if confirm else whole
        search = {name: {"choice": list({repr(p[name]): p[name] for p in listed}.values())} for name in listed[0]}
        phases: dict[str, Any] = {"noise": {"points": listed[: len(whole)], "seeds": fresh[:NUM_SEEDS]}}
        if confirm:
            phases["confirm"] = {"top": 1, "seeds": fresh[NUM_SEEDS:], "reference": reference}
        own: dict[str, Any] = {"sampler": {}, "scheduler": {}, "budget": {}, "points": [], "phases": phases, "search": search}
        own |= {"name": f"{sweep.name}-next{suffix}", "targets": {**plain(sweep.targets), "mode": "auto"}}
        config = validate({**plain(sweep), **plain(base), **own})
        phases_of(config)
        return config
    except ConfigError:
        return None

"""How is a space searched? Samplers, schedulers, budgets, objectives, and the phases of a study, as a sweep file states them."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from neo_ray.mistakes import explain, guess
from neo_ray.records import COSTS
from neo_ray.settings import Section


class SamplerConfig(Section):
    name: Literal["tpe", "gp", "cmaes", "nsga2", "random", "qmc", "grid"] = "tpe"
    """How settings are proposed. `grid` runs every combination once and needs finite axes; `cmaes` searches ranges alone (the
    package cmaes), and draws the rest at random."""
    num_trials: int | None = Field(None, ge=1)
    """Number of trials; for `grid` at most this many of the combinations (null: all)."""
    startup_trials: int = Field(8, ge=1)
    """Random trials before `tpe`, `gp` or `cmaes` begin to model; the size of a generation of `nsga2`."""
    seeds: tuple[int, ...] = ()
    """Repeat every setting with each of these seeds (grid only)."""
    warm_start: tuple[str, ...] = ()
    """Results folders of earlier sweeps: what `tpe`, `gp`, `cmaes` and `nsga2` already know. They count as no trials of this one,
    and those that are outside its space or have other settings are left out."""
    warm_start_anyway: bool = False
    """Take them also of other models, data or settings."""


class SchedulerConfig(Section):
    name: Literal["asha", "hyperband", "median", "none"] = "asha"
    """`asha` stops the worse trials early; `hyperband` too, and spares a part of them until later rungs; `median` stops at any
    evaluation what is worse than the median of the others; `none` runs all to the end (what laws are fitted on)."""
    grace: float = Field(0.25, gt=0, le=1)
    """Share of a trial's tokens before which none is stopped."""
    reduction_factor: float = Field(3, gt=1)
    """At each rung about 1 / reduction_factor of the trials go on (not `median`)."""

    def rungs(self, points: int) -> tuple[int, ...]:
        """Evaluations (from 1) at which trials are stopped: the first after `grace`, then each `reduction_factor` times later;
        with `median` each from there on.

        The last evaluation is none: a trial that reached it is complete.
        """
        found, rung = [], max(1, math.ceil(self.grace * points - 1e-9))
        while self.name != "none" and rung < points:
            found.append(rung)
            rung = rung + 1 if self.name == "median" else math.ceil(rung * self.reduction_factor - 1e-9)
        return tuple(found)


class BudgetConfig(Section):
    """What a sweep may spend, over all its runs. Where one ends, no trial begins any more; those that run go to their end."""

    trials: int | None = Field(None, ge=1)
    """Trials begun, in all."""
    tokens: int | None = Field(None, ge=1)
    """Training tokens of all trials, counted at each evaluation."""
    accelerator_hours: float | None = Field(None, gt=0)
    """Hours of training and evaluation × devices of a trial, counted at each evaluation."""
    hours: float | None = Field(None, gt=0)
    """Wall-clock hours in which the sweep ran trials."""


SCORES = ("select_ce", "select_bits_per_byte", "select_kl")
BENCHMARKS = "suite"
"""The average of `evaluation.suite`; with `_<benchmark>` behind it the value of one."""


def of_suite(metric: str) -> bool:
    return metric == BENCHMARKS or metric.startswith(f"{BENCHMARKS}_")


class _Metric(Section):
    """Whatever an objective is: benchmarks are looked for at their highest, all else at its lowest."""

    metric: str
    mode: Literal["min", "max"] = "min"

    @model_validator(mode="before")
    @classmethod
    def _the_better_way(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and of_suite(str(raw.get("metric"))) and "mode" not in raw:
            return {**raw, "mode": "max"}
        return raw

    @staticmethod
    def known(metric: str, allowed: tuple[str, ...]) -> str:
        if metric not in allowed and not of_suite(metric):
            named = (*allowed, BENCHMARKS)
            raise ValueError(f"{metric!r} is no metric{guess(metric, named)}; allowed: {', '.join(named)}, suite_<benchmark>")
        return metric


class FurtherObjective(_Metric):
    metric: str
    """A score on the select split, benchmarks (`suite`, `suite_<benchmark>`), or what a trial costs: `peak_memory_bytes` of its
    largest worker, `accelerator_seconds`, `seconds`, `tokens`."""
    mode: Literal["min", "max"] = "min"
    """As of the first objective."""

    @field_validator("metric")
    @classmethod
    def _is_known(cls, metric: str) -> str:
        return cls.known(metric, (*SCORES, *COSTS))


class ObjectiveConfig(_Metric):
    metric: str = "select_ce"
    """What trials are ranked by: `select_ce`, `select_bits_per_byte` or `select_kl` on the select split, the average of
    `evaluation.suite` (`suite`) or one benchmark of it (`suite_<benchmark>`). Never the training loss: kd_ratio and temperature
    change that."""
    mode: Literal["min", "max"] = "min"
    """Left out, it is `max` for benchmarks and `min` for all else."""
    further: tuple[FurtherObjective, ...] = ()
    """What else counts. `objective` may be a list: the first of it ranks, the others are these; `nsga2`, `tpe`, `gp` look for the
    settings that no other beats in all of them."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, raw: Any) -> Any:
        if not isinstance(raw, list | tuple):
            return raw
        if not raw:
            raise ValueError("is an empty list")
        for index, item in enumerate(raw):
            try:
                (FurtherObjective if index else cls).model_validate(item)
            except ValidationError as error:
                raise ValueError(f"{index}: {explain(error, FurtherObjective)}{'' if index else RANKS}") from None
        return {**raw[0], "further": raw[1:]}

    @field_validator("metric")
    @classmethod
    def _is_known(cls, metric: str) -> str:
        return cls.known(metric, SCORES)

    @model_validator(mode="after")
    def _different(self) -> ObjectiveConfig:
        metrics = [objective.metric for objective in self.all]
        twice = next((metric for i, metric in enumerate(metrics) if metric in metrics[:i]), None)
        if twice:
            raise ValueError(f"{twice} stands twice")
        return self

    @property
    def all(self) -> tuple[ObjectiveConfig | FurtherObjective, ...]:
        """The one that ranks, and the others."""
        return (self, *self.further)


RANKS = "; trials are ranked by the first objective, which is a score"


class MapSampler(SamplerConfig):
    name: Literal["grid", "qmc", "random"] = "grid"
    """Those that do not go by what was found: a law that is fitted on trials of the others is biased."""


class WholePhase(Section):
    """A phase whose trials all run to their end."""

    scheduler: SchedulerConfig = SchedulerConfig(name="none")
    """`none` alone: every trial runs to its end."""
    budget: BudgetConfig = BudgetConfig()
    """What this phase may spend, within the sweep's own budget; where it ends, the next phase begins."""

    @field_validator("scheduler")
    @classmethod
    def _none(cls, scheduler: SchedulerConfig) -> SchedulerConfig:
        if scheduler.name != "none":
            raise ValueError(
                f"name: {scheduler.name} stops trials, and those of this phase must all run to their end; allowed: none"
            )
        return scheduler


class NoisePhase(WholePhase):
    points: tuple[dict[str, Any], ...] = ()
    """Settings to repeat, each axis → value as in the sweep's `points`. None: those, else the file's own values, where they are
    in the space, and the middle of the space."""
    seeds: tuple[int, ...] = Field((1, 2, 3), min_length=2)
    """Each setting runs once with each."""


class MapPhase(WholePhase):
    sampler: MapSampler = MapSampler()
    """A grid, with its `seeds`, or evenly spread points."""
    levels: dict[str, tuple[Any, ...]] = Field(default={})
    """Axis → the values that a grid has of it, where the axis is a range, or fewer than all of a list."""


class ExploitPhase(Section):
    sampler: SamplerConfig = SamplerConfig()
    """It begins with the trials of the phases before."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """It begins anew: trials of other phases stop none of these."""
    seed: int | None = Field(None, ge=0)
    """Of its trials; null: the sweep's `seed`."""
    budget: BudgetConfig = BudgetConfig()
    """As of any phase."""


class ConfirmPhase(WholePhase):
    top: int = Field(3, ge=1)
    """How many settings of the phases before run again: the best by their mean over seeds."""
    seeds: tuple[int, ...] = Field((101, 102, 103), min_length=2)
    """Each setting, and the reference, runs once with each: seeds that no trial before has had."""
    reference: dict[str, Any] = Field(default={})
    """The setting that the best are held against, axis → value; what it leaves out is the file's own value. It may lie outside of
    the space."""


class PhasesConfig(Section):
    """Parts of one study, in this order, on the same trials; one that is left out (or null) does not run."""

    noise: NoisePhase | None = None
    """A few settings with several seeds each: how far apart runs are by the seed alone."""
    map: MapPhase | None = None
    """The space evenly, to the end of each trial: what laws are fitted on."""
    exploit: ExploitPhase | None = None
    """A sampler looks for the best setting, with early stopping."""
    confirm: ConfirmPhase | None = None
    """The best settings and the reference, with fresh seeds: what the recommendation comes from."""

    @model_validator(mode="after")
    def _some(self) -> PhasesConfig:
        others = self.noise or self.map or self.exploit
        if self.confirm and not others:
            raise ValueError("confirm takes the best settings of earlier phases; add noise, map or exploit")
        if not others:
            raise ValueError("name at least one of noise, map, exploit (confirm follows them); null takes `phases` away")
        return self

"""Which phases does a study have, which trials has each, and what is left? `noise → map → exploit → confirm`, or only one.

A phase is a sweep of its own kind over the same space. Its trials follow from its part of the file, and those of `confirm` from
the records of the phases before. All phases mean the same by a trial, so that a phase that changes takes none away from another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from neo_ray.axes import SpaceAxis
from neo_ray.budget import exhausted
from neo_ray.config import Axis, SweepConfig
from neo_ray.points import completed, level_axes, reference_setting
from neo_ray.records import TrialRecord
from neo_ray.searching import ConfirmPhase, SamplerConfig, SchedulerConfig
from neo_ray.settings import ConfigError
from neo_ray.space import Space, build_space
from neo_ray.trials import Setting, grid_settings, setting_key, settings_left, settings_to_run, trials_planned

OWN = ("sampler", "scheduler", "budget", "points")
"""What a phase has of its own, at the same names as a sweep."""
NAMES = ("noise", "map", "exploit", "confirm")
RANDOM = SamplerConfig(name="random")
"""In the place of a sampler that is never asked."""
Trials = list[tuple[dict[str, Any], int]]
"""Params and seed."""


@dataclass(frozen=True)
class Phase:
    """One phase of a study, or the whole of a sweep that has none."""

    name: str | None
    config: SweepConfig
    """The sweep, with this phase's sampler, scheduler, points and budget."""
    space: Space
    before: tuple[str, ...] = ()
    """The phases that run before it."""
    repeated: tuple[tuple[dict[str, Any], int], ...] = ()
    """Params and seed of all its trials, where the file states them: noise, and a map of levels."""
    confirm: ConfirmPhase | None = None
    reference: dict[str, Any] | None = None

    @property
    def tag(self) -> str:
        """What its trials' records call it; a sweep without phases is told by what it does."""
        if self.name is not None:
            return self.name
        is_map = self.config.sampler.name in ("grid", "qmc", "random") and self.config.scheduler.name == "none"
        return "map" if is_map else "exploit"

    @property
    def seeds(self) -> tuple[int, ...]:
        """With which each of its settings runs, where it is a phase that repeats settings."""
        if self.confirm is not None:
            return self.confirm.seeds
        return tuple(dict.fromkeys(seed for _, seed in self.repeated)) if self.name == "noise" else ()

    @property
    def only_given(self) -> bool:
        """Does no sampler propose anything?"""
        return bool(self.repeated) or self.confirm is not None or self.config.sampler.name == "grid"

    def own(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Its own trials."""
        return [r for r in records if self.name in (None, r.phase)]

    def known(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        """What its sampler goes by: its own trials after those of the phases before."""
        return [r for r in records if r.phase in self.before] + self.own(records)

    def most(self) -> int:
        """How many trials it has, at most."""
        if self.confirm is not None:
            return (self.confirm.top + 1) * len(self.confirm.seeds)
        return len(self.repeated) or trials_planned(self.config, self.space)

    def to_run(self, records: Sequence[TrialRecord]) -> tuple[list[Setting], int]:
        """As `settings_to_run`, of this phase. What `confirm` runs is known once the phases before it are done."""
        own = self.own(records)
        if self.confirm is not None or self.repeated:
            wanted = list(self.repeated) if self.confirm is None else self._confirmed(records)
            given = settings_left(wanted, own, len(records))
            return given, len(given)
        return settings_to_run(self.config, self.space, own, len(records))

    def spent(self, records: Sequence[TrialRecord], hours: float, resuming: bool = False) -> str | None:
        """Why none of its trials may begin, by its own budget. `hours`: in which this phase ran."""
        return None if self.name is None else exhausted(self.config.budget, self.own(records), hours, resuming)

    def allowed(self, own: Sequence[TrialRecord]) -> int:
        """How many of its trials its own budget lets run to an end yet: the interrupted ones in any case."""
        most = None if self.name is None else self.config.budget.trials
        interrupted = sum(not r.finished for r in own)
        return 10**6 if most is None else interrupted + max(0, most - len(own))

    def _confirmed(self, records: Sequence[TrialRecord]) -> Trials:
        """The reference and the best, seed by seed, so that what a budget cuts off leaves pairs."""
        assert self.confirm is not None
        objective = self.config.objective
        best = best_settings([r for r in records if r.phase in self.before], objective.metric, objective.mode)
        settings = [self.reference or {}, *best[: self.confirm.top]] if best else []
        distinct = {setting_key(params): params for params in settings}.values()
        return [(params, seed) for seed in self.confirm.seeds for params in distinct]


def phases_of(config: SweepConfig) -> tuple[Phase, ...]:
    """The phases of a study in order; one without a name where the file has none.

    Raises:
        ConfigError: a phase that is not sound, by its path.
    """
    if config.phases is None:
        return (Phase(None, config, build_space(config)),)
    _check_top(config)
    whole, found = build_space(config), list[Phase]()
    for name in NAMES:
        if getattr(config.phases, name) is not None:
            found.append(_phase(config, whole, name, tuple(str(phase.name) for phase in found)))
    _check_seeds(config, found)
    return tuple(found)


def _phase(config: SweepConfig, whole: Space, name: str, before: tuple[str, ...]) -> Phase:
    given, section = config.phases, getattr(config.phases, name)
    assert given is not None
    own: dict[str, Any] = {"phases": None, "points": (), "budget": section.budget, "scheduler": section.scheduler}
    own["sampler"] = SamplerConfig.model_validate(section.sampler.model_dump()) if name in ("map", "exploit") else RANDOM
    if name == "exploit":
        own["points"] = config.points if given.noise is None or given.noise.points else ()
        own["seed"] = config.seed if section.seed is None else section.seed
    if name == "map":
        own["search"] = _axes_of_map(config, whole)
    if config.evaluation.suite_at == "confirm":
        none = {} if name == "confirm" else {"suite": None, "suite_limit": None}
        own["evaluation"] = config.evaluation.model_copy(update={"suite_at": "end", **none})
    mine = config.model_copy(update=own)
    with at_its_path(name):
        phase = Phase(name, mine, build_space(mine), before)
    if name == "noise":
        points = _noise_settings(config, phase.space)
        return replace(phase, repeated=tuple((params, seed) for seed in section.seeds for params in points))
    if name == "map" and section.levels:  # its settings are of the whole space, as those of the other phases
        return replace(phase, space=replace(whole, beyond=()), repeated=tuple(grid_settings(mine, phase.space)))
    if name == "confirm":
        return replace(phase, confirm=section, reference=reference_setting(config, whole))
    return phase


def _axes_of_map(config: SweepConfig, whole: Space) -> dict[str, Axis]:
    """The search section with the map's levels in place of whole axes."""
    assert config.phases is not None and config.phases.map is not None
    section, where = config.phases.map, "phases.map.levels"
    if section.levels and section.sampler.name != "grid":
        raise ConfigError(f"{where}: {section.sampler.name} draws from whole axes; levels are a grid's (phases.map.sampler)")
    axes = level_axes(config, whole, section.levels, where)
    for axis in whole.axes.values():
        if section.sampler.name == "grid" and axis.continuous and axes[axis.key].kind != "grid":
            raise ConfigError(f"{where}: a grid has no end of values of {axis.name}; give {axis.name}: […], or another sampler")
    return axes


def best_settings(records: Sequence[TrialRecord], metric: str, mode: str) -> list[dict[str, Any]]:
    """Params of the settings with COMPLETE trials, best mean over their trials first; never the best single run.

    A setting of which a trial diverged is none of them.
    """
    values: dict[str, list[float]] = {}
    params: dict[str, dict[str, Any]] = {}
    unstable = set()
    for record in records:
        key = setting_key(record.params)
        if record.cause == "diverged":
            unstable.add(key)
        value = record.metrics.get(metric) if record.state == "COMPLETE" else None
        if value is not None and math.isfinite(value):
            values.setdefault(key, []).append(value)
            params.setdefault(key, record.params)
    means = {key: sum(found) / len(found) for key, found in values.items() if key not in unstable}
    return [params[key] for key in sorted(means, key=lambda key: means[key], reverse=mode == "max")]


def trials_left(
    phases: Sequence[Phase], records: Sequence[TrialRecord], hours: Callable[[str], float] = lambda _: 0.0
) -> dict[str, int]:
    """Tag of a phase → trials that it has still to run, in order, without those for which nothing is left.

    Of `confirm` at most so many, while phases before it run.
    """
    found: dict[str, int] = {}
    for phase in phases:
        own = phase.own(records)
        if phase.spent(records, hours(phase.tag), resuming=any(not r.finished for r in own)):
            continue
        number = phase.to_run(records)[1]
        if phase.confirm is not None and found:
            number = phase.most() - sum(r.finished for r in own)
        number = min(number, phase.allowed(own))
        if number > 0:
            found[phase.tag] = number
    return found


def planned_trials(phases: Sequence[Phase], records: Sequence[TrialRecord]) -> int:
    """How many trials there are in the end, of `confirm` at most so many while phases before it run."""
    missing = trials_left(phases, records)
    return sum(missing.get(phase.tag, 0) + sum(r.finished for r in phase.own(records)) for phase in phases)


def drawn(phases: Sequence[Phase], records: Sequence[TrialRecord]) -> int:
    """How many trials samplers have proposed so far, in whichever phase: the next one must not begin where another began."""
    given = {phase.name for phase in phases if phase.only_given}
    return sum(r.phase not in given for r in records)


def orphans(phases: Sequence[Phase], records: Sequence[TrialRecord]) -> list[str]:
    """Interrupted trials that nobody goes on with: of phases that the file has no longer."""
    return [r.id for r in records if not r.finished and not any(phase.own([r]) for phase in phases)]


def check_seeds_are_fresh(phases: Sequence[Phase], records: Sequence[TrialRecord]) -> None:
    """Seeds that trials of another phase have had confirm nothing, whatever the file says now. Raises ConfigError."""
    for phase in phases:
        if phase.confirm is not None:
            for record in records:
                if record.phase != phase.name and record.seed in phase.confirm.seeds:
                    raise ConfigError(
                        f"phases.confirm.seeds: {record.seed} is that of trial {record.id} (phase {record.phase}); give others"
                    )


def _check_top(config: SweepConfig) -> None:
    """What a phase has of its own does not stand at the top, where no trial would heed it."""
    for name, default in (("sampler", SamplerConfig()), ("scheduler", SchedulerConfig())):
        if getattr(config, name) != default:
            raise ConfigError(f"{name}: each of the `phases` has its own (phases.exploit.{name}); phases=null takes them away")
    phases = config.phases
    if config.points and phases and not phases.exploit and (phases.noise is None or phases.noise.points):
        raise ConfigError("points: no phase begins with them; add phases.noise (without `points`) or phases.exploit")


def _check_seeds(config: SweepConfig, phases: Sequence[Phase]) -> None:
    """Seeds stand once, and those of `confirm` nowhere else."""
    given, earlier = config.phases, {config.seed}
    assert given is not None
    for phase in phases:
        where, section = f"phases.{phase.name}.seeds", getattr(given, str(phase.name))
        seeds = getattr(section, "seeds", ())
        if seeds and phase.space.setters("seed"):
            raise ConfigError(f"{where}: `seed` is an axis already, and this phase repeats settings with seeds of its own")
        if len(set(seeds)) < len(seeds):
            raise ConfigError(f"{where}: a seed stands twice (got {list(seeds)})")
        if phase.name == "confirm":
            used = sorted(earlier & set(seeds))
            if used:
                raise ConfigError(f"{where}: {used[0]} is a seed of an earlier phase or the sweep's own; take others")
        earlier |= {*seeds, *phase.config.sampler.seeds, phase.config.seed}


@contextmanager
def at_its_path(name: str | None) -> Iterator[None]:
    """Mistakes in a phase are told at the path where the file has them."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(at_phase(name, str(error))) from None


def at_phase(name: str | None, text: str) -> str:
    """A message about a sweep's own section, at the path where a phase has it."""
    return f"phases.{name}.{text}" if name is not None and text.startswith(OWN) else text


def _noise_settings(config: SweepConfig, space: Space) -> list[dict[str, Any]]:
    """Those that the file names, else its own values where they are in the space, and the middle of it."""
    assert config.phases is not None and config.phases.noise is not None
    named = config.phases.noise.points
    points, where = (named, "phases.noise.points") if named else (config.points, "points")
    found = [completed(space, point, f"{where}.{index}") for index, point in enumerate(points)]
    if not found:
        try:
            found = [completed(space, {}, where)]
        except ConfigError:
            pass  # not in the space
        found.append(space.setting(_middle))
    return list({setting_key(params): params for params in found}.values())


def _middle(axis: SpaceAxis) -> Any:
    if not axis.continuous:
        return axis.option(axis.num_options // 2)
    if axis.kind == "log_uniform":
        return float(f"{math.sqrt(axis.low * axis.high):.3g}")
    return (axis.low + axis.high) / 2

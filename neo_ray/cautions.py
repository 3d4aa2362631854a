"""Which settings will be ignored, or look like mistakes? One line each, for the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from neo_ray.assets import is_quickstart
from neo_ray.axes import show
from neo_ray.config import SweepConfig
from neo_ray.phases import at_phase, phases_of
from neo_ray.searching import of_suite
from neo_ray.settings import trial_leaves
from neo_ray.space import Space
from neo_ray.storage import is_url
from neo_ray.trials import MODELLING, chosen_settings, overruling
from neo_ray.warm import LEARNING

USED_BY = {
    "lora": ("lora", "neo"),
    "distill": ("kd", "neo"),
}
"""Section → the methods that read it."""
WHY = {"lora": "no adapter", "distill": "no teacher in the loss"}
PARAMETER_OF = {"jsd_beta": ("jsd",), "skew": ("skew_kl", "skew_reverse_kl"), "head_mass": ("adaptive_kl",)}
"""Parameter of a divergence → the divergences that read it."""


def cautions(config: SweepConfig, space: Space, overrides: Sequence[str] = ()) -> list[str]:
    """Everything about a sweep to hear before it starts. `overrides`: `key=value` of the command line."""
    checks = (
        _unused_axes,
        _unused_sections,
        _distances,
        _impossible_axes,
        _phases,
        _objective,
        _training,
        _targets,
        _data,
        _cluster,
    )
    pairs = [[part.strip() for part in override.split("=", 1)] for override in overrides]
    given = {key for key, value in pairs if value not in ("", "~", "null")}
    return [*_overruled(config, space, given), *(line for check in checks for line in check(config, space))]


def _overruled(config: SweepConfig, space: Space, given: set[str]) -> Iterator[str]:
    """Values that somebody chose, and that an axis takes the place of."""
    chosen = given | set(chosen_settings(config))
    for leaf, path in trial_leaves().items():
        axes, value = overruling(space, leaf), space.base[leaf]
        if path not in chosen or value is None or not axes:
            continue
        names = ", ".join(f"search.{axis.key}" for axis in axes)
        if all(axis.when for axis in axes):
            yield f"{path}: {show(value)} counts only in trials where {names} {'is' if len(axes) == 1 else 'are'} not active"
        else:
            yield f"{path}: {show(value)} is overruled by {names}; `{names.split(', ')[0]}=null` takes the axis away"


def _unused_axes(config: SweepConfig, space: Space) -> Iterator[str]:
    """Axes that a method does not read; without a condition they make trials that are the same but for a number."""
    for axis in space.axes.values():
        section = axis.path.split(".")[0]
        users = USED_BY.get(section)
        if users is None or axis.kind == "value":
            continue
        idle = [m for m in (axis.when.get("method") or space.reach("method")) if m not in users and m in space.reach("method")]
        if idle and not set(space.reach("method")) & set(users):
            yield f"search.{axis.key} is ignored: method {' and '.join(idle)} has {WHY[section]}"
        elif idle and axis.sampled:
            condition = f"when: {{method: [{', '.join(users)}]}}"
            yield f"search.{axis.key} is ignored where method is {' or '.join(idle)}; add `{condition}`"


def _unused_sections(config: SweepConfig, space: Space) -> Iterator[str]:
    methods = set(space.reach("method"))
    for section, users in USED_BY.items():
        if getattr(config, section).not_default and not methods & set(users):
            yield f"section `{section}` is ignored: method {' and '.join(sorted(methods))} has {WHY[section]}"
    if methods & set(USED_BY["distill"]) and space.reach("kd_ratio") == [0.0] and not any(space.reach("alignment_weight")):
        yield "distill.kd_ratio is 0: the teacher has no weight in the loss"


def _distances(config: SweepConfig, space: Space) -> Iterator[str]:
    divergences = space.reach("divergence")
    for name, users in PARAMETER_OF.items():
        given = space.setters(name) or name in config.distill.not_default
        if given and not set(divergences) & set(users):
            yield f"distill.{name} is ignored: divergence {' and '.join(divergences)} does not read it"
    for name in ("alignment_loss", "alignment_layers"):
        given = space.setters(name) or name in config.distill.not_default
        if given and not any(space.reach("alignment_weight")):
            yield f"distill.{name} is ignored: distill.alignment_weight is 0"


def _impossible_axes(config: SweepConfig, space: Space) -> Iterator[str]:
    for axis in space.axes.values():
        if not space.possible(axis):
            yield f"search.{axis.key} is ignored: its `when` never holds in this sweep"


def _phases(config: SweepConfig, space: Space) -> Iterator[str]:
    """Each phase's sampler and scheduler, at their paths."""
    begun = 0
    for phase in phases_of(config):
        lines = [*_scheduler(phase.config), *(() if phase.seeds else _sampler(phase.config, phase.space, begun))]
        yield from (at_phase(phase.name, line) for line in lines)
        if len(phase.seeds) == 2:
            yield f"phases.{phase.name}.seeds: two seeds leave an interval very wide; 3 or more"
        begun += phase.most()


def _sampler(config: SweepConfig, space: Space, begun: int) -> Iterator[str]:
    """`begun`: trials of phases before, which the sampler knows."""
    sampler, size = config.sampler, space.size()
    if sampler.name == "grid":
        total = (size or 0) * max(1, len(sampler.seeds))
        if sampler.num_trials and sampler.num_trials < total:
            yield f"sampler.num_trials: {sampler.num_trials} of the grid's {total} trials run"
        return
    if sampler.seeds:
        yield f"sampler.seeds is ignored: sampler.name is {sampler.name}, and only a grid repeats its settings"
    if sampler.num_trials and size is not None and size < sampler.num_trials:
        yield f"sampler.num_trials: {sampler.num_trials}, and the space holds {size} settings; some will be repeated"
    if sampler.name in MODELLING and sampler.num_trials and begun + sampler.num_trials <= sampler.startup_trials:
        yield f"sampler: all {sampler.num_trials} trials are random ({sampler.startup_trials} startup_trials)"
    if sampler.warm_start and sampler.name not in LEARNING:
        yield f"sampler.warm_start is ignored: {sampler.name} goes by no earlier trials"
    if sampler.name in ("gp", "nsga2", "cmaes", "qmc"):
        yield from _drawn_at_random(sampler.name, space)
    if sampler.name in ("gp", "nsga2") and config.scheduler.name != "none":
        yield f"sampler.name: {sampler.name} learns from complete trials alone, and scheduler {config.scheduler.name} stops many"
    if sampler.name not in (*MODELLING, "nsga2") and "startup_trials" in sampler.not_default:
        yield f"sampler.startup_trials is ignored: sampler.name is {sampler.name}"


def _drawn_at_random(sampler: str, space: Space) -> Iterator[str]:
    """What a sampler of one fixed space cannot search."""
    listed = [axis for axis in space.axes.values() if axis.sampled and not axis.when and axis.values and sampler == "cmaes"]
    for axis in listed:
        yield f"search.{axis.key} is drawn at random: {sampler} searches ranges, and `{axis.kind}` is a list"
    for axis in space.axes.values():
        if axis.sampled and axis.when:
            yield f"search.{axis.key} is drawn at random: {sampler} searches axes that every trial has, and this one has a `when`"


def _scheduler(config: SweepConfig) -> Iterator[str]:
    scheduler, points = config.scheduler, config.evaluation.points
    if scheduler.name == "none":
        given = sorted({"grace", "reduction_factor"} & scheduler.not_default)
        if given:
            yield f"scheduler.{' and '.join(given)} is ignored: scheduler.name is none"
    elif not scheduler.rungs(points):
        where = f"none of {points} evaluations is between grace {scheduler.grace:g} and the end"
        yield f"scheduler: {scheduler.name} can stop no trial: {where}"
    elif scheduler.name == "median" and "reduction_factor" in scheduler.not_default:
        yield "scheduler.reduction_factor is ignored: scheduler.name is median"


def _objective(config: SweepConfig, space: Space) -> Iterator[str]:
    for objective in config.objective.all:
        better = "max" if of_suite(objective.metric) else "min"
        if objective.mode != better:
            way = {"max": "higher", "min": "lower"}[better]
            yield f"objective.mode: {objective.mode} looks for the worst trial; a {way} {objective.metric} is better"
        if objective.metric == "peak_memory_bytes" and not config.resources.gpus_per_worker:
            yield "objective: peak_memory_bytes of a CPU worker is that of its process, to which trials before have added"


def _training(config: SweepConfig, space: Space) -> Iterator[str]:
    smallest, micro = min(space.reach("batch_size")), [size for size in space.reach("micro_batch_size") if size != "auto"]
    if micro and max(micro) > smallest:
        yield f"training.micro_batch_size: {max(micro)} is cut to the batch_size where that is smaller ({smallest})"
    workers = config.resources.workers_per_trial
    if smallest < workers:
        yield f"training.batch_size: {smallest} sequences leave some of the {workers} workers of a trial without work"
    if space.reach("packing") == [True] and ("padding_side" in config.training.not_default or space.setters("padding_side")):
        yield "training.padding_side is ignored: training.packing leaves no padding"
    if True in space.reach("packing") and space.reach("micro_batch_size") == [1]:
        yield "training.packing changes nothing: training.micro_batch_size is 1, and a single sequence is never padded"


def _targets(config: SweepConfig, space: Space) -> Iterator[str]:
    if config.targets.mode != "topk" and "top_k" in config.targets.not_default:
        yield f"targets.top_k is ignored: targets.mode is {config.targets.mode}"


def _data(config: SweepConfig, space: Space) -> Iterator[str]:
    data = config.data
    if _exists(data.source) or is_quickstart(data.source):
        for key in sorted({"subset", "split", "revision"} & data.not_default):
            yield f"data.{key} is ignored: {data.source} is not a hub data set"


def _cluster(config: SweepConfig, space: Space) -> Iterator[str]:
    if config.resources.address is not None:
        for key, path in (("path", config.storage.path), ("cache", config.storage.cache)):
            if not Path(path).is_absolute() and not is_url(path):
                yield f"storage.{key}: {path} is relative to each machine; on a cluster name a folder that all nodes see"


def _exists(name: str) -> bool:
    return Path(name).expanduser().exists()

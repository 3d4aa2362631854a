"""Is what a sweep file names on this machine, and does it go together? Without torch: a dry run asks, and so does the run."""

from __future__ import annotations

import difflib
from pathlib import Path

from neo_ray import sources, suites
from neo_ray.assets import is_quickstart
from neo_ray.config import HEAD_SLOTS, SweepConfig
from neo_ray.mistakes import guess
from neo_ray.plan import make_plan
from neo_ray.searching import BENCHMARKS, of_suite
from neo_ray.settings import ConfigError
from neo_ray.shapes import model_shapes


def check_data(config: SweepConfig) -> None:
    """Raises ConfigError where `data.source` is a path and nothing readable is there."""
    if not is_quickstart(config.data.source):
        sources.locate(config.data.source)


def check_models(config: SweepConfig) -> None:
    """Raises ConfigError where teacher or student is a path and no model's folder is there."""
    named = {"teacher.model": config.teacher.model if config.teacher else None, "student.model": config.student.model}
    for where, model in named.items():
        if model is not None and not is_quickstart(model):
            locate_model(model, where)


def check_pruning(config: SweepConfig) -> None:
    """Raises ConfigError where a teacher whose config is here has too few layers for `student.prune`."""
    teacher = model_shapes(config)[0]
    if teacher is not None and teacher.source == "config.json":
        check_layers(config, teacher.num_layers)


def check_room(config: SweepConfig) -> None:
    """Raises ConfigError where a store that was asked for will not fit the disk, as far as sizes can be told beforehand.

    For a dry run alone: the run itself knows the sizes exactly.
    """
    reading = make_plan(config).reading
    if reading is not None and config.targets.mode != "auto":
        reading.check_room(config)


def check_suite(config: SweepConfig) -> None:
    """Raises ConfigError where the suite of benchmarks, a file that it names or a benchmark that is an objective is not there.

    Tasks and their data are the harness's, which takes long to import: the run loads them before it begins.
    """
    if config.evaluation.suite is None:
        return
    suite = suites.check(config.evaluation.suite)[1]
    named = {BENCHMARKS, *(f"{BENCHMARKS}_{benchmark}" for benchmark in suite.benchmarks)}
    for metric in (objective.metric for objective in config.objective.all if of_suite(objective.metric)):
        if metric not in named:
            allowed = ", ".join(sorted(named))
            raise ConfigError(f"objective.metric: {suite.title} has no {metric}{guess(metric, named)}; allowed: {allowed}")


def check_slots(config: SweepConfig) -> None:
    """Raises ConfigError where more trials at a time are asked for than Ray has room for on any head."""
    if (asked := config.resources.concurrency) != "auto" and asked > HEAD_SLOTS:
        raise ConfigError(
            f"resources.concurrency: {asked} trials at a time, and Ray Train has room for {HEAD_SLOTS} on a cluster's head; "
            "more workers a trial (resources.workers_per_trial) use as many GPUs"
        )


CHECKS = (check_data, check_models, check_pruning, check_suite, check_slots)


def locate_model(model: str, where: str) -> str:
    """The folder of a local model, or the name as it is where it can only be one of the hub.

    Raises:
        ConfigError: at YAML path `where`: it is a path, and no model's folder is there.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{where}: the folder {model} holds no config.json, so it is not a model")
        return str(folder)
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, siblings, 1)
        raise ConfigError(f"{where}: there is no folder {model}" + (f"; did you mean {folder.parent / near[0]}?" if near else ""))
    return model


def check_layers(config: SweepConfig, num_layers: int) -> None:
    """Can so many layers be cut as asked? Raises ConfigError at `student.prune`."""
    prune = config.student.prune
    if prune is None:
        return
    wrong = [layer for layer in prune.layers or () if layer >= num_layers]
    if wrong:
        raise ConfigError(
            f"student.prune.layers: {wrong[0]} with a teacher of {num_layers} layers; allowed: 0 to {num_layers - 1}"
        )
    if prune.num_layers > num_layers:
        raise ConfigError(f"student.prune.keep: {prune.keep} layers of a teacher that has {num_layers}")

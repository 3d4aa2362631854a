"""Which trials does a sweep run, and which has it run? Their number, a grid's settings, what is left, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neo_ray.axes import SpaceAxis, show
from neo_ray.config import SweepConfig
from neo_ray.loading import plain
from neo_ray.mistakes import guess
from neo_ray.points import point_settings
from neo_ray.records import TrialRecord
from neo_ray.settings import ConfigError, TrialConfig
from neo_ray.space import LENGTHS, Space, build_space

DEFAULT_TRIALS = 16
MODELLING = ("tpe", "gp", "cmaes")
"""Samplers that begin with random trials and then go by what was found."""
OF_THE_SETTING = ("error", "out_of_memory", "hung")
"""Causes of a failure that the same setting would meet again."""
IDENTITY = (
    "teacher",
    "student",
    "data",
    "method",
    "lora",
    "distill",
    "training",
    "deepspeed",
    "evaluation",
    "seed",
    "search",
    "objective",
)


def trials_planned(config: SweepConfig, space: Space) -> int:
    """How many trials the sweep runs (without those that are put back after a failure)."""
    wanted = config.sampler.num_trials
    if config.sampler.name == "grid":
        total = (space.size() or 0) * max(1, len(config.sampler.seeds))
        return min(total, wanted) if wanted else total
    return wanted or (DEFAULT_TRIALS if space.searched else 1)


def grid_settings(config: SweepConfig, space: Space) -> list[tuple[dict[str, Any], int]]:
    """The (params, seed) of a grid sweep in order: all settings with the first seed, then with the next."""
    seeds = config.sampler.seeds or (config.seed,)
    settings = [(params, space.seed(params, seed)) for seed in seeds for params in space.grid()]
    return settings[: config.sampler.num_trials]


Setting = tuple[str, dict[str, Any], int]
"""Trial id, params, seed."""


def settings_to_run(
    config: SweepConfig, space: Space, records: list[TrialRecord], begun: int | None = None
) -> tuple[list[Setting], int]:
    """Settings that are given, not proposed (interrupted trials, then points or a grid's rest), and how many trials remain.

    Args:
        begun: how many trials there are in all, where `records` are those of one phase.
    """
    planned = trials_planned(config, space)
    if config.sampler.name == "grid":
        given = settings_left(grid_settings(config, space)[:planned], records, begun)
        return given, len(given)
    interrupted = sum(not r.finished for r in records)
    remaining = max(interrupted, planned - sum(r.finished for r in records))
    return settings_left(_first_settings(config, space), records, begun)[:remaining], remaining


def settings_left(
    wanted: list[tuple[dict[str, Any], int]], records: list[TrialRecord], begun: int | None = None
) -> list[Setting]:
    """The interrupted trials, then what of the wanted (params, seed) has not begun."""
    interrupted = [(r.id, r.params, r.seed) for r in records if not r.finished]
    known = {setting_key(r.params, r.seed) for r in records}
    fresh = [(p, s) for p, s in wanted if setting_key(p, s) not in known]
    first = len(records) if begun is None else begun
    return interrupted + [(trial_id(first + i), p, s) for i, (p, s) in enumerate(fresh)]


def _first_settings(config: SweepConfig, space: Space) -> list[tuple[dict[str, Any], int]]:
    """The (params, seed) of the sweep's points."""
    return [(params, space.seed(params, config.seed)) for params in point_settings(config, space)]


def retried(records: list[TrialRecord], failed_too: bool) -> list[TrialRecord]:
    """The records with FAILED trials taken for interrupted ones, where asked for. One that diverged would diverge again."""
    if not failed_too:
        return records
    return [r.model_copy(update={"state": "RUNNING"}) if r.state == "FAILED" and r.cause != "diverged" else r for r in records]


def trial_id(number: int) -> str:
    return f"{number:04d}"


def find_trial(folder: Path, records: Sequence[TrialRecord], wanted: str) -> TrialRecord:
    """The trial that a command's `--trial` names. Raises ConfigError where there is none."""
    known = {record.id: record for record in records}
    if wanted not in known:
        near = trial_id(int(wanted)) if wanted.isdecimal() else wanted
        raise ConfigError(f"--trial: {folder} has no trial {wanted}{guess(near, known)}")
    return known[wanted]


def setting_key(params: dict[str, Any], seed: int | None = None) -> str:
    """The same for the same setting, read from a file or made here; with a seed, for the same trial."""
    return repr((sorted(params.items(), key=lambda item: item[0]), seed))


def setting_text(params: dict[str, Any]) -> str:
    """`rank 8, learning_rate 0.001`, for a line."""
    return ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items())


def fail_everywhere(records: Sequence[TrialRecord]) -> set[str]:
    """The settings (as `setting_key` has them, without a seed) of which each trial FAILED, and by themselves: no node left, no
    storage was away, and none diverged, of which a sampler learns."""
    failed = {setting_key(r.params) for r in records if r.state == "FAILED" and r.cause in OF_THE_SETTING}
    if not failed:
        return failed  # a sampler's every proposal asks, and the keys of thousands of trials take their time
    return failed - {setting_key(r.params) for r in records if r.state in ("COMPLETE", "PRUNED")}


def chosen_settings(config: SweepConfig) -> dict[str, Any]:
    """Path → value of each setting of a trial that is not the default, whether or not an axis sets it, too."""
    default = _flat(plain(TrialConfig()))
    return {path: v for path, v in _flat(plain(config.trial)).items() if v is not None and v != default.get(path)}


def overruling(space: Space, leaf: str) -> list[SpaceAxis]:
    """The axes whose value takes the place of the file's, each where it is active. One length replaces every other."""
    names = LENGTHS if leaf in LENGTHS else (leaf,)
    return [axis for name in names for axis in space.setters(name) if space.possible(axis)]


def fixed_settings(config: SweepConfig, space: Space) -> list[str]:
    """What the file sets for all trials and is not the default, a line a section; `method` is told apart."""
    lines: dict[str, list[str]] = {}
    for path, value in chosen_settings(config).items():
        section, _, name = path.partition(".")
        if path != "method" and all(axis.when for axis in overruling(space, name or section)):
            lines.setdefault(section if name else "", []).append(f"{name or section} {show(value)}")
    return [f"{section}: {', '.join(texts)}" if section else ", ".join(texts) for section, texts in lines.items()]


def identity(config: SweepConfig) -> dict[str, Any]:
    """What determines the meaning of a sweep's trials. Name, sampler, scheduler, resources and storage may change."""
    data = {name: plain(config)[name] for name in IDENTITY}
    return {**data, "search": {name: axis.text for name, axis in build_space(config).axes.items()}}


def differences(old: SweepConfig, new: SweepConfig) -> list[str]:
    """What keeps `new` from continuing `old`: lines of `path: old → new`; none where their trials mean the same."""
    before, after = _flat(identity(old)), _flat(identity(new))
    return [
        f"{path}: {show(before.get(path, '(nothing)'))} → {show(after.get(path, '(nothing)'))}"
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path)
    ]


def _flat(data: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {path: data}
    rows: dict[str, Any] = {}
    for key, value in data.items():
        rows.update(_flat(value, f"{path}.{key}" if path else str(key)))
    return rows

"""Which trials of earlier sweeps does a sampler begin with? Those that mean the same as a trial of this one would."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from neo_ray import uploads
from neo_ray.config import SweepConfig
from neo_ray.loading import load
from neo_ray.records import TrialRecord, load_records
from neo_ray.settings import ConfigError, TrialConfig
from neo_ray.space import Space
from neo_ray.storage import at, is_url

LEARNING = ("tpe", "gp", "cmaes", "nsga2")
"""Samplers that go by earlier trials."""


@dataclass(frozen=True)
class Warm:
    """What one earlier results folder gives."""

    path: str
    records: tuple[TrialRecord, ...]
    skipped: int

    @property
    def text(self) -> str:
        words = f"the sampler begins with {len(self.records)} trials of {self.path}"
        return words + (f"; {self.skipped} are left out: not of this space, other settings or no score" if self.skipped else "")


def warm_trials(config: SweepConfig, space: Space) -> list[Warm]:
    """The trials of `sampler.warm_start` that fit. They are nobody's trials of this sweep.

    Raises:
        ConfigError: there are no records at a path.
    """
    found = []
    for index, path in enumerate(config.sampler.warm_start if config.sampler.name in LEARNING else ()):
        try:
            records = _records_at(path)
        except (ValueError, OSError) as error:
            raise ConfigError(f"sampler.warm_start.{index}: {error}") from None
        fitting = tuple(record for record in records if _fits(config, space, record))
        found.append(Warm(path, fitting, len(records) - len(fitting)))
    return found


def check_same_models(config: SweepConfig, now: dict[str, str]) -> None:
    """Refuses trials of other models or data, unless the sweep file says that they are welcome.

    Args:
        now: what today's data and weights are (`prepare.identities`).
    """
    for index, path in enumerate(() if config.sampler.warm_start_anyway else config.sampler.warm_start):
        where, folder = f"sampler.warm_start.{index}: {path}", _folder_of(path)
        try:
            before = json.loads((folder / uploads.SOURCES_FILE).read_text(encoding="utf-8"))
            student = load(folder / "sweep.yaml").student
        except (OSError, ValueError):
            raise ConfigError(
                f"{where} does not say of which models and data it is; warm_start_anyway: true takes it all the same"
            ) from None
        other = [name for name in now if before.get(name) != now[name]]
        other += ["student"] if student.prune != config.student.prune else []
        if other:
            raise ConfigError(f"{where} is of another {' and '.join(other)}; warm_start_anyway: true takes it all the same")


@functools.cache
def _records_at(path: str) -> tuple[TrialRecord, ...]:
    """Read once by a process: each phase of a study begins with the same. Raises ValueError, OSError."""
    folder = uploads.local_copy(path) if is_url(path) else path
    try:
        return tuple(load_records(folder))
    except ValueError:
        if is_url(path):
            raise ValueError(f"{path}: holds no sweep") from None
        raise


def _folder_of(path: str) -> Path:
    """Where the files of a results folder are on this machine, once its records were read."""
    return uploads.working_folder(at(path))


def _fits(config: SweepConfig, space: Space, record: TrialRecord) -> bool:
    if not record.finished or (record.state == "FAILED" and record.cause != "diverged"):
        return False
    metric = config.objective.metric
    if record.state != "FAILED" and all(row.get(metric) is None for row in [record.metrics, *record.curve]):
        return False
    try:
        space.optuna_params(record.params)
        trial = space.trial_config(space.setting(lambda axis: record.params[axis.name]), config.trial)
        if space.setting(lambda axis: record.params[axis.name]) != record.params:
            return False
        before = TrialConfig.model_validate(record.config)
    except (ConfigError, KeyError, ValueError):
        return False
    return config.sampler.warm_start_anyway or before.model_copy(update={"seed": trial.seed}) == trial

"""What did a model score on a suite of benchmarks, item by item, and where in a results folder is that kept? Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neo_ray.config import SweepConfig
from neo_ray.records import TrialRecord, write_atomically
from neo_ray.searching import BENCHMARKS, of_suite
from neo_ray.uploads import ASKED, ITEMS, SOURCES_FILE

TEACHER, STUDENT = "teacher", "student"
"""Names of the models that are no trials: the student is the untrained one."""


@dataclass(frozen=True)
class SuiteScores:
    """A suite's scores of one model."""

    suite: str
    """Name and version."""
    limit: int | None
    """So many items of each task were asked, the first ones; None: all."""
    items: dict[str, list[float]]
    """Benchmark → each item's value, always in the same order: what two models are compared by, item by item."""
    dtype: str = "torch.float32"
    """Of matrix products: models are compared in the same one."""
    seconds: float | None = field(default=None, compare=False)
    """That asking took, without loading the model; None where that was not kept."""

    @property
    def values(self) -> dict[str, float]:
        """Benchmark → mean over its items."""
        return {name: float(np.mean(items)) for name, items in self.items.items()}

    @property
    def errors(self) -> dict[str, float]:
        """Benchmark → standard error of its value, from the spread of its items; nan of a single one."""
        return {
            name: float(np.std(items, ddof=1) / math.sqrt(len(items))) if len(items) > 1 else math.nan
            for name, items in self.items.items()
        }

    @property
    def average(self) -> float:
        """Unweighted mean over the benchmarks."""
        return float(np.mean(list(self.values.values())))

    @property
    def error(self) -> float:
        """Standard error of the average."""
        return math.sqrt(sum(error**2 for error in self.errors.values())) / len(self.items)

    def named(self) -> dict[str, float | None]:
        """As a record's metrics: `suite` for the average, `suite_<benchmark>` for each value."""
        return {BENCHMARKS: self.average, **{f"{BENCHMARKS}_{name}": value for name, value in self.values.items()}}


def facts(scores: SuiteScores) -> dict[str, Any]:
    """What a record says beside the values: which suite, how many items, how sure."""
    errors = {"average": scores.error, **scores.errors}
    of = {"suite": scores.suite, "suite_limit": scores.limit, "suite_seconds": scores.seconds}
    return {**of, "suite_standard_errors": errors}


def called(metric: str, records: Sequence[TrialRecord]) -> str:
    """A metric as a sentence names it: benchmarks by the name and version of the suite that was asked."""
    asked = next((r.details for r in records if r.details.get("suite")), None) if of_suite(metric) else None
    return metric if asked is None else _called(metric, asked["suite"], asked.get("suite_limit"))


def objective_called(config: SweepConfig, records: Sequence[TrialRecord], results: Path) -> str:
    """What trials are ranked by, as `called`; while none has ended, of the suite that the sweep in `results` was begun with."""
    metric, path = config.objective.metric, results / SOURCES_FILE
    told = called(metric, records)
    if told != metric or not of_suite(metric) or not path.is_file():
        return told
    folder = json.loads(path.read_text(encoding="utf-8")).get("evaluation.suite")
    if folder is None:
        return told
    name, version, _ = folder.rsplit("-", 2)
    return _called(metric, f"{name} v{version}", config.evaluation.suite_limit)


def _called(metric: str, suite: str, limit: int | None) -> str:
    title = suite if limit is None else f"{suite} (first {limit} items of a task)"
    return title if metric == BENCHMARKS else f"{metric.removeprefix(f'{BENCHMARKS}_')} of {title}"


def save(scores: SuiteScores, folder: Path) -> None:
    """Into a trial's folder: suite, limit and each item's value, for comparisons item by item."""
    found = {"suite": scores.suite, "limit": scores.limit, "dtype": scores.dtype, "seconds": scores.seconds}
    write_atomically(folder / ITEMS, json.dumps({**found, "items": scores.items}) + "\n")


def read(path: Path) -> SuiteScores:
    """What `save` wrote."""
    return SuiteScores(**json.loads(path.read_text(encoding="utf-8")))


def place(results: Path, suite: str, limit: int | None, name: str) -> Path:
    """The folder of a model's scores that are of no trial's end; `suite`: the folder that the suite was made ready in."""
    return results / ASKED / Path(suite).name / ("all" if limit is None else f"first-{limit}") / name


def of_results(results: Path, records: Sequence[TrialRecord]) -> dict[str, SuiteScores]:
    """Trial id → its scores; under `STUDENT` those of the untrained one, of the same suite, limit and precision."""
    files = {record.id: results / "trials" / record.id / ITEMS for record in records if record.state == "COMPLETE"}
    found = {trial: read(path) for trial, path in files.items() if path.is_file()}
    asked = {(scores.suite, scores.limit, scores.dtype) for scores in found.values()}
    for path in sorted(results.glob(f"{ASKED}/*/*/{STUDENT}/{ITEMS}")):
        scores = read(path)
        if len(asked) == 1 and (scores.suite, scores.limit, scores.dtype) in asked:
            found[STUDENT] = scores
    return found

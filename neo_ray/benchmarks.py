"""What does the model under training score on the sweep's suite? Asked in place, each item's value kept beside the adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neo_ray import harness, models
from neo_ray.parts import Parts, rank_and_world_size
from neo_ray.records import write_atomically
from neo_ray.settings import TrialConfig
from neo_ray.student import Student
from neo_ray.uploads import ITEMS


def of_student(
    student: Student, parts: Parts, trial: TrialConfig, alive: Callable[[], object] = lambda: None
) -> harness.SuiteScores | None:
    """Scores of the student as it is now; None where the sweep has no suite. Every rank calls it; rank 0 gives signs of life."""
    if parts.sources.suite is None or trial.evaluation.suite is None:
        return None
    limit = trial.evaluation.suite_limit
    key = ("suite", parts.sources.suite, limit)
    if key not in parts.measured:
        source, size = parts.sources.student, rank_and_world_size()[1]
        tokenizer = models.load_tokenizer(source.path, source.revision, source.trust_remote_code, "student.model")
        parts.measured[key] = (harness.open_suite(Path(parts.sources.suite), limit, size), tokenizer)
    opened, tokenizer = parts.measured[key]
    how = (parts.vocabulary, parts.device, parts.dtype, trial.evaluation.batch_size, limit)
    return harness.ask(opened, student.model, tokenizer, *how, alive if rank_and_world_size()[0] == 0 else lambda: None)


def facts(scores: harness.SuiteScores) -> dict[str, Any]:
    """What a record says beside the values: which suite, how many items, how sure."""
    errors = {"average": scores.error, **scores.errors}
    return {"suite": scores.suite, "suite_limit": scores.limit, "suite_standard_errors": errors}


def save(scores: harness.SuiteScores, folder: Path) -> None:
    """Into a trial's folder: suite, limit and each item's value, for comparisons item by item."""
    found = {"suite": scores.suite, "limit": scores.limit, "dtype": scores.dtype, "items": scores.items}
    write_atomically(folder / ITEMS, json.dumps(found) + "\n")


def read(path: Path) -> harness.SuiteScores:
    """What `save` wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return harness.SuiteScores(found["suite"], found["limit"], found["items"], found["dtype"])

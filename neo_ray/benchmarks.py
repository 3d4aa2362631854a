"""What does the model under training score on the sweep's suite? Asked in place, each item's value kept beside the adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from neo_ray import harness, models
from neo_ray.parts import Parts, rank_and_world_size
from neo_ray.records import Stop
from neo_ray.scores import STUDENT, SuiteScores, place, read, save
from neo_ray.settings import TrialConfig
from neo_ray.student import Student
from neo_ray.uploads import ITEMS


def of_student(
    student: Student, parts: Parts, trial: TrialConfig, should_stop: Callable[[], Stop] = lambda: Stop.NO
) -> SuiteScores | None:
    """Scores of the student as it is now; None where the sweep has no suite. Every rank calls it, and rank 0 asks `should_stop`.

    Raises:
        harness.Stopped: on all ranks.
    """
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
    return harness.ask(opened, student.model, tokenizer, *how, should_stop)


def of_untrained(
    student: Student, parts: Parts, trial: TrialConfig, folder: Path | None, should_stop: Callable[[], Stop] = lambda: Stop.NO
) -> SuiteScores | None:
    """As `of_student`, of the student that no trial has touched: asked once a sweep, as far as one worker sees what others kept.

    Args:
        folder: the trial's, in a results folder; in others nothing is kept.
    """
    suite, limit = parts.sources.suite, trial.evaluation.suite_limit
    if suite is None or trial.evaluation.suite is None:
        return None
    key = ("untrained", suite, limit)
    if key not in parts.measured:
        kept = place(folder.parents[1], suite, limit, STUDENT) if folder and folder.parent.name == "trials" else None
        there: list[SuiteScores | None] = [read(kept / ITEMS) if kept and (kept / ITEMS).is_file() else None]
        if rank_and_world_size()[1] > 1:
            dist.broadcast_object_list(there, src=0)
        found = there[0]
        if found is None or found.dtype != str(parts.dtype):
            found = of_student(student, parts, trial, should_stop)
            if found is not None and kept is not None and rank_and_world_size()[0] == 0:
                save(found, kept)
        parts.measured[key] = found
    return parts.measured[key]

"""Did a sweep that faults struck lose nothing? Asked of its journal, records and report, and of the steps that workers began."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from neo_ray import loading, uploads
from neo_ray.phases import phases_of, trials_left
from neo_ray.records import Journal, TrialRecord, fold
from neo_ray.storage import Folder


def watched_steps(seconds: float = 0.0) -> str:
    """For a sitecustomize after `FAULT`: each optimizer step is written down as it begins (by the first worker of a trial), takes
    so long at least, and does not go on while there is a file `hold`."""
    return f"""
def inject(train):
    import os, pathlib, time
    here, plain = pathlib.Path(__file__).parent, train.optimizer_step

    def watched(engine, trial, parts, split, plan, step, rate):
        if train.rank_and_world_size()[0] == 0:
            with open(here / "steps", "a") as file:
                print(time.time(), trial.training.learning_rate, step, os.getpid(), file=file)
        time.sleep({seconds})
        while (here / "hold").exists():
            time.sleep(0.05)
        return plain(engine, trial, parts, split, plan, step, rate)

    train.optimizer_step = watched
"""


@dataclass(frozen=True)
class Step:
    """An optimizer step that a worker began. The trials of a sweep are told apart by their learning rates."""

    at: float
    rate: float
    number: int
    pid: int


def begun(folder: Path) -> list[Step]:
    """What `watched_steps` has written there so far."""
    path = folder / "steps"
    rows = [line.split() for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    return [Step(float(at), float(rate), int(number), int(pid)) for at, rate, number, pid in rows]


def intact(
    results: Folder, lost: dict[str, list[str]], failed: dict[str, str] | None = None, watched: Path | None = None
) -> list[TrialRecord]:
    """The records of a sweep that is over, once all that must hold of it has been looked at.

    No trial is lost and none that ended was begun again; of each attempt that was lost no more was done again than lay behind its
    last checkpoint; the records are whole, and the causes stand in them and in the report.

    Args:
        lost: trial → cause of each of its lost attempts, in order; the others lost none.
        failed: trial → cause; the others are COMPLETE.
        watched: where `watched_steps` wrote, if it did.
    """
    failed, events = failed or {}, list(Journal(results).events())
    records = fold(events)
    config = loading.load(uploads.bring(results) / "sweep.yaml")
    assert not trials_left(phases_of(config), records) and all(r.finished for r in records), "no trial is lost"
    assert [r.id for r in records] == [f"{number:04d}" for number in range(len(records))]
    table = [TrialRecord.model_validate_json(line) for line in (results / "trials.jsonl").read_text().splitlines()]
    assert table == records
    steps: defaultdict[float, list[Step]] = defaultdict(list)
    for step in begun(watched) if watched else ():
        steps[step.rate].append(step)
    for record in records:
        kinds = [event["event"] for event in events if event["trial"] == record.id]
        assert Counter(kinds)["start"] == Counter(kinds)["end"] == 1 and kinds[-1] == "end", f"{record.id} ended once, and last"
        assert [attempt["cause"] for attempt in record.lost_attempts] == lost.get(record.id, []), record
        assert record.attempts == 1 + len(record.lost_attempts) == 1 + kinds.count("attempt")
        assert (record.state, record.cause) == (("FAILED", failed[record.id]) if record.id in failed else ("COMPLETE", None))
        if record.state == "COMPLETE":
            _whole(record, config.evaluation.points)
        if watched:
            _no_more_than_an_interval(record, steps[record.config["training"]["learning_rate"]])
    report = (results / "report.md").read_text()
    for cause, count in Counter(failed.values()).items():
        assert f"| {cause} | FAILED | {count} |" in report, report
    for cause, count in Counter(cause for causes in lost.values() for cause in causes).items():
        assert f"| {cause} | tried again | {count} |" in report, report
    return records


def _whole(record: TrialRecord, points: int) -> None:
    last = record.curve[-1]
    assert [row["rung"] for row in record.curve] == list(range(1, points + 1))
    assert (record.steps, record.tokens) == (last["step"], last["tokens"]) and record.tokens > 0
    assert record.metrics["report_ce"] is not None and record.params and record.config
    assert record.started is not None and record.ended is not None and record.started < record.ended
    assert {"slot", "node", "waited_seconds"} <= set(record.details)


def _no_more_than_an_interval(record: TrialRecord, steps: list[Step]) -> None:
    """Runs of steps, one an attempt: each begins at a checkpoint, and no later one had been reached by the run before."""
    runs: list[list[int]] = []
    for number in (step.number for step in steps):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    checkpoints = [row["step"] for row in record.curve] if record.state == "COMPLETE" else [runs[-1][1] + 1]
    assert runs[0][0] == 0 and runs[-1][1] + 1 == checkpoints[-1], runs
    assert len(runs) <= record.attempts, f"{record.id} ran twice at a time: {runs}"
    for (_, last), (first, _) in pairwise(runs):
        passed = [checkpoint for checkpoint in checkpoints if first < checkpoint <= last]
        assert not passed, f"steps {first} to {last} of {record.id} were done again, and there was a checkpoint at {passed}"
        assert first == 0 or first in checkpoints, f"{record.id} goes on at step {first}, where there was no evaluation"
    assert record.ended is not None and all(step.at < record.ended for step in steps)

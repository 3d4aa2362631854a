"""What happened in a trial? `TrialRecord`, its states, and the append-only journal that is the only truth.

A results folder holds `journal.jsonl`, one line an event, written by the sweep's driver alone. `trials.jsonl` (one line a
trial) is folded from it and can be deleted at any time. Object stores have no append: there every event is one object
under `journal/`.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import fsspec
from pydantic import BaseModel, ConfigDict, ValidationError

from neo_ray.storage import Folder, Remote

State = Literal["RUNNING", "COMPLETE", "PRUNED", "FAILED"]
Cause = Literal["error", "out_of_memory", "diverged", "preempted", "hung", "storage"]
COUNTED = ("error", "hung")
"""Causes for which a trial that lost its worker comes back a bounded number of times."""


INTERRUPTED = "interrupted"
"""Cause of an attempt that was lost with its driver, or that Ctrl-C ended."""
REOPENED: dict[str, Any] = {"state": "RUNNING", "cause": None, "error": None, "ended": None}
"""What another attempt makes of a trial that had ended."""


COSTS = ("tokens", "seconds", "accelerator_seconds", "peak_memory_bytes")
"""What a trial took, of a record's own fields."""


def log_name(trial: str, rank: int = 0) -> str:
    """What a worker logged in a trial, below the results folder."""
    return f"trials/{trial}/rank-{rank}.log"


class Stop(IntEnum):
    """What a trial is asked to do between two steps."""

    NO = 0
    PRUNED = 1
    """The scheduler gave it up."""
    INTERRUPTED = 2
    """The sweep stops: it keeps a checkpoint, to go on from here."""


class TrialRecord(BaseModel):
    """One trial, finished or not. Failed and pruned trials are records like any other."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)

    id: str
    state: State = "RUNNING"
    cause: Cause | None = None
    """Why it FAILED."""
    error: str | None = None
    """The exception and where it was raised."""
    phase: str = "explore"
    params: dict[str, Any] = {}
    """Axis → value, as the sampler chose it."""
    config: dict[str, Any] = {}
    """The resolved trial config: what ran."""
    scaling: float | None = None
    """Effective factor of the low-rank branch: alpha / rank (rsLoRA: alpha / √rank)."""
    seed: int = 0
    metrics: dict[str, float | None] = {}
    """Last value of each metric; None where it is not defined (NaN, no teacher)."""
    curve: list[dict[str, Any]] = []
    """One row an evaluation, ascending in `rung`: rung, step, tokens, seconds, learning_rate, metrics."""
    tokens: int = 0
    """Training tokens, without padding."""
    steps: int = 0
    seconds: float = 0.0
    """Training and evaluation, without waiting for a slot; over all attempts."""
    accelerator_seconds: float = 0.0
    """Seconds × devices of the trial."""
    peak_memory_bytes: int = 0
    """Largest worker: allocated device memory on a GPU, resident memory on a CPU."""
    started: float | None = None
    """Unix time."""
    ended: float | None = None
    stopped: bool = False
    """The scheduler stopped it, whether or not its slot has seen it yet."""
    attempts: int = 1
    lost_attempts: list[dict[str, Any]] = []
    """Why each attempt but the last ended before its trial did: cause and message. Preempted or interrupted is not failed."""
    details: dict[str, Any] = {}
    """Device, dtype, number of workers, slot, trainable parameters, set-up seconds, log file."""

    @property
    def finished(self) -> bool:
        return self.state != "RUNNING"

    def measured(self, name: str) -> float | None:
        """A metric or a cost; None where it is not known or not a number."""
        value = (getattr(self, name) or None) if name in COSTS else self.metrics.get(name)
        return value if value is not None and math.isfinite(value) else None


class Journal:
    """Append-only events of a sweep at a path or fsspec URL. One writer (the lease sees to that), any number of readers."""

    def __init__(self, folder: str | Folder) -> None:
        self.remote = folder if isinstance(folder, Remote) else Remote(str(folder))
        self.fs, self.root = fsspec.core.url_to_fs(str(folder))
        self._append = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))
        self._count = 0

    def write(self, event: str, trial: str, **fields: Any) -> dict[str, Any]:
        """Append one event; on disk (fsync) when it returns. Returns the event as readers will find it."""
        written = {"event": event, "trial": trial, "time": time.time(), **_finite(fields)}
        line = json.dumps(written) + "\n"
        if self._append:
            _append_line(Path(self.root) / "journal.jsonl", line)
        else:
            self._count += 1
            name = f"{time.time_ns():020d}-{self._count:06d}-{uuid.uuid4().hex[:6]}.json"
            (self.remote / "journal" / name).write_text(line)
        return written

    def events(self, unread: list[Any] | None = None) -> Iterator[dict[str, Any]]:
        """All events in the order of writing. A line torn by a crash is passed over (into `unread`); the next append starts a
        new one."""
        if self._append:
            path = Path(self.root) / "journal.jsonl"
            lines: Iterable[bytes] = path.read_bytes().splitlines() if path.exists() else ()
        else:
            journal = self.remote / "journal"
            found = journal.read_many(journal.names())
            lines = (found[name] for name in sorted(found))
        for line in lines:
            event = _parse(line)
            if event is not None and "event" in event and "trial" in event:
                yield event
            elif unread is not None and line.strip():
                unread.append(line)


def fold(events: Iterable[dict[str, Any]], unread: list[Any] | None = None) -> list[TrialRecord]:
    """The records that a journal's events add up to, in the order the trials began.

    A resumed trial reports its earlier rungs again: the first report of a rung counts.
    """
    records: dict[str, TrialRecord] = {}
    for event in events:
        try:
            apply(records, event)
        except (KeyError, TypeError, ValueError):  # a line from elsewhere hides no trial
            if unread is not None:
                unread.append(event)
    return list(records.values())


def apply(records: dict[str, TrialRecord], event: dict[str, Any]) -> None:
    """Take one event into the records by id; raises where it is none of ours."""
    kind, trial = event["event"], event["trial"]
    if kind == "start":
        fields = {k: event[k] for k in ("params", "config", "phase", "seed", "scaling") if k in event}
        records[trial] = TrialRecord(id=trial, started=event["time"], **fields)
        return
    record = records.get(trial)
    if record is None:
        return
    if kind == "report":
        _add_row(record, dict(event["row"]))
    elif kind == "attempt":
        record.attempts += 1
        cause, message = event.get("cause") or record.cause or INTERRUPTED, event.get("message") or record.error
        record.lost_attempts = [*record.lost_attempts, {"cause": cause, "message": message}]
        for name, value in REOPENED.items():
            setattr(record, name, value)
    elif kind == "stop":
        record.stopped = True
    elif kind == "end":
        said = _said(
            event, event.get("metrics"), state=event["state"], **{k: event.get(k) for k in ("cause", "error", "details")}
        )
        record.state, record.cause, record.error = said.state, said.cause, said.error
        record.ended = event["time"]
        record.metrics.update(said.metrics)
        record.details.update(said.details)
        for name in ("steps", *COSTS):
            setattr(record, name, max(getattr(record, name), getattr(said, name)))


def failures(events: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Trial → how often it has failed so far, of trials that have not ended: under whichever driver."""
    counts: dict[str, int] = {}
    for event in events:
        if event["event"] == "end":
            counts.pop(event["trial"], None)
        elif event["event"] == "attempt" and event.get("cause") in COUNTED:
            counts[event["trial"]] = counts.get(event["trial"], 0) + 1
    return counts


def settle(journal: Journal, events: Iterable[dict[str, Any]]) -> list[TrialRecord]:
    """The records of a journal's events, with an end for each trial that the scheduler stopped and whose slot died before it
    saw that."""
    records = fold(events)
    for record in records:
        if record.stopped and not record.finished:
            apply({record.id: record}, journal.write("end", record.id, state="PRUNED", settled=True))
    return records


def load_records(path: str | Path, unread: list[Any] | None = None) -> list[TrialRecord]:
    """The records of a results folder (journal first, else `trials.jsonl`) or of one `trials.jsonl` file.

    What is no event, or no record, is passed over (into `unread`).

    Raises:
        ValueError: nothing at that path is a record.
    """
    path, unread = Path(path).expanduser(), [] if unread is None else unread
    if path.is_dir():
        records = fold(Journal(path).events(unread), unread)
        if records:
            return records
        path = path / "trials.jsonl"
    if not path.exists():
        raise ValueError(f"{path}: no such file; a results folder holds journal.jsonl or trials.jsonl")
    records = []
    unread.clear()
    for line in filter(bytes.strip, path.read_bytes().splitlines()):
        try:
            records.append(TrialRecord.model_validate(_parse(line)))
        except ValidationError:
            unread.append(line)
    if not records:
        raise ValueError(f"{path}: holds no trial records")
    return records


def write_records(folder: str | Path, records: list[TrialRecord]) -> None:
    """Replace `trials.jsonl`, one line a trial, atomically."""
    write_atomically(Path(folder) / "trials.jsonl", "".join(r.model_dump_json() + "\n" for r in records))


def write_atomically(path: str | Path, text: str) -> None:
    """The file is the old one or the new one, never a part. Creates the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:6]}")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _append_line(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = "\n" + line  # a crash tore the last line: leave it, begin a new one
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _said(numbers: dict[str, Any], metrics: dict[str, Any] | None, **fields: Any) -> TrialRecord:
    """What an event says of a trial, in a record's own types; raises ValueError where it is none of its fields."""
    given = {**{name: numbers.get(name) for name in ("steps", *COSTS)}, **fields, "metrics": metrics or {}}
    return TrialRecord.model_validate({"id": "", **{k: v for k, v in given.items() if v is not None}})


def _add_row(record: TrialRecord, row: dict[str, Any]) -> None:
    metrics = {k: v for k, v in row.items() if k.startswith(("select_", "report_", "train_", "suite"))}
    said = _said({**row, "steps": row.get("step")}, metrics)
    if not isinstance(row["rung"], int):
        raise ValueError(f"rung {row['rung']!r} is no number of an evaluation")
    if any(old["rung"] == row["rung"] for old in record.curve):
        return
    row = {**row, **said.metrics}
    record.curve = sorted([*record.curve, row], key=lambda r: r["rung"])
    if record.curve[-1] is row:
        record.metrics = said.metrics
    for name in ("steps", *COSTS):
        setattr(record, name, max(getattr(record, name), getattr(said, name)))


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes null (never zero)."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
        if b"\\ud" in line.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text that could be written
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None

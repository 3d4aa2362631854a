"""What did it cost to start? From the records: cold starts of slots, set-up of trials, and what lay between trainings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from neo_ray.evidence import number
from neo_ray.records import TrialRecord


@dataclass(frozen=True)
class Startup:
    """Seconds; of trials that ended in their first attempt and say in which slot."""

    cold_starts: tuple[float, ...]
    """From when a slot's workers were asked for to the first step of its first trial, without waiting for that trial. A node that
    had to come first is in it."""
    setups: tuple[float, ...]
    """From a trial's arrival on warm workers to its first step."""
    outside: float
    """Time of slots between the ends of two trials in a row, less training and evaluation."""
    between: float
    """All of that time."""


def startup_of(records: Sequence[TrialRecord]) -> Startup:
    by_slot: dict[int, list[TrialRecord]] = defaultdict(list)
    for record in records:
        if record.ended is not None and "slot" in record.details and "setup_seconds" in record.details:
            by_slot[record.details["slot"]].append(record)
    once = [r for those in by_slot.values() for r in those if r.attempts == 1]
    cold = [r.details["cold_start_seconds"] for r in once if "cold_start_seconds" in r.details]
    setups, outside, between = [], 0.0, 0.0
    for those in by_slot.values():
        those.sort(key=lambda record: record.ended or 0.0)
        for before, record in pairwise(those):
            if "cold_start_seconds" in record.details or record.attempts != 1:  # other workers; what an earlier attempt took
                continue
            cycle, setup = (record.ended or 0.0) - (before.ended or 0.0), record.details["setup_seconds"]
            setups.append(setup)
            between += cycle
            outside += max(0.0, cycle - record.seconds + setup)
    return Startup(tuple(cold), tuple(setups), outside, between)


def startup_line(records: Sequence[TrialRecord]) -> str | None:
    """The figures in a sentence; None where no slot has said when it started."""
    found = startup_of(records)
    if not found.cold_starts:
        return None
    text = f"Start-up: cold start {number(median(found.cold_starts), 2)} s once a slot ({len(found.cold_starts)} in all)"
    if not found.setups or not found.between:
        return f"{text}; no slot ran a second trial."
    share = 100 * found.outside / found.between
    return (
        f"{text}; {number(median(found.setups), 2)} s a trial after that; {number(share, 2)} % of the warm workers' time outside "
        f"training and evaluation ({len(found.setups)} trials)."
    )


def stops_line(records: Sequence[TrialRecord]) -> str | None:
    """How long trials went on once the scheduler had stopped them; None where it stopped none that ran."""
    seconds = [r.details["stop_seconds"] for r in records if "stop_seconds" in r.details]
    if not seconds:
        return None
    return (
        f"Early stopping: {len(seconds)} trials left their slots {number(median(seconds), 2)} s after they were stopped (median; "
        f"at most {number(max(seconds), 2)} s), the step that they were in included."
    )


def lost_attempts_line(records: Sequence[TrialRecord]) -> str | None:
    """Attempts that ended before their trials did, by cause: no failures, since the trials went on."""
    causes: dict[str, list[str]] = defaultdict(list)
    for record in records:
        for lost in record.lost_attempts:
            causes[lost["cause"]].append(record.id)
    if not causes:
        return None
    parts = [
        f"{len(ids)} {cause.replace('_', ' ')} (trials {', '.join(dict.fromkeys(ids[:12]))})" for cause, ids in causes.items()
    ]
    return f"Attempts that were lost and gone on with: {'; '.join(parts)}."

"""What did the teacher read for a sweep? What its journal says of the store and of the trials, and the line that says it.

Events of the journal that belong to no trial: `filling` (a driver begins), `filled` (a shard), `targets` (the store is whole).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from neo_ray.records import TrialRecord

NO_TRIAL = ""
"""In place of a trial's id in such an event."""


@dataclass(frozen=True)
class Account:
    """Of all runs of a sweep: what was resumed or extended adds to it."""

    fills: frozenset[str]
    """Names of the drivers' turns at filling."""
    filled: frozenset[tuple[str, str]]
    """(turn, shard)."""
    builder_tokens: int
    """That the teacher read to fill shards; what it read for one that a dead builder left behind is not known."""
    builder_seconds: float
    """Of all builders, in forward passes."""
    restarts: int
    """Builders that died and were replaced."""
    store_tokens: int
    """Of the shards that trials read, each once; 0 without a store."""
    store_rows: int
    labels: int
    """Labelled positions of the same examples."""
    num_trials: int
    """That have told what they asked of the teacher: all that ended in their own process."""
    teacher_tokens: int
    """Read by a teacher living in trials."""
    target_rows: int
    spared_tokens: int
    """What trials with a store would have had a living teacher read."""


def account(events: Iterable[dict[str, Any]], records: Sequence[TrialRecord]) -> Account:
    """Args:
    events: a journal's.
    records: of the same sweep.
    """
    found: dict[str, list[dict[str, Any]]] = {"filling": [], "filled": [], "targets": []}
    for event in events:
        found.get(event["event"], []).append(event)
    shards = {(event["fill"], event["shard"]): event for event in found["filled"]}
    stores = {event["store"]: event for event in found["targets"]}.values()
    told = [record.details for record in records if "teacher_tokens" in record.details]
    return Account(
        fills=frozenset(event["fill"] for event in found["filling"]),
        filled=frozenset(shards),
        builder_tokens=sum(event["tokens"] for event in shards.values()),
        builder_seconds=sum(event["seconds"] for event in shards.values()),
        restarts=sum(event["restarts"] for event in found["targets"]),
        store_tokens=sum(event["tokens"] for event in stores),
        store_rows=sum(event["rows"] for event in stores),
        labels=sum(event["labels"] for event in stores),
        num_trials=len(told),
        teacher_tokens=sum(details["teacher_tokens"] for details in told),
        target_rows=sum(details["target_rows"] for details in told),
        spared_tokens=sum(details["spared_tokens"] for details in told),
    )


def account_line(found: Account) -> str | None:
    """What the teacher read, in a sentence; None where it read nothing and nothing was read of it."""
    trials = f"{found.num_trials} trial{'s' if found.num_trials != 1 else ''}"
    if found.spared_tokens and not found.store_tokens:
        return (
            f"What the teacher read for stored targets is not told here; live it would have been {found.spared_tokens:,} tokens."
        )
    if found.spared_tokens:
        alive = f", and {found.teacher_tokens:,} in trials without it" if found.teacher_tokens else ""
        live = f"; live it would have been {found.spared_tokens + found.teacher_tokens:,}"
        return f"The teacher read {_for_the_store(found)} for {trials}{alive}{live}."
    if found.teacher_tokens:
        return f"The teacher read {found.teacher_tokens:,} tokens, alive in {trials}."
    return None


def _for_the_store(found: Account) -> str:
    read, whole = found.builder_tokens, found.store_tokens
    if not read:
        return f"none of the store's {whole:,} tokens, which stood there before,"
    if read == whole:
        return f"{read:,} tokens once"
    if read < whole:
        return f"{read:,} of the store's {whole:,} tokens, as the others stood there before,"
    return f"{read:,} tokens, {read - whole:,} of them again as shards were damaged or the store became another,"

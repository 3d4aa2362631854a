"""What has a sweep spent, and may another trial begin? Counted from the records, so that a resumed sweep goes on counting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from neo_ray.config import BudgetConfig
from neo_ray.records import TrialRecord

SESSION = "session"
"""The journal's event for a driver that begins to run trials, or those of the next phase."""


def hours_of(events: Iterable[dict[str, Any]], phase: str | None = None) -> float:
    """Hours in which drivers ran this sweep, or a phase of it: each from its first event to its last."""
    seconds, begun, last = 0.0, None, 0.0
    for event in events:
        if event["event"] == SESSION:
            seconds += last - begun if begun is not None else 0.0
            begun = event["time"] if phase in (None, event.get("phase")) else None
        elif not event["trial"] or event.get("settled"):
            continue  # told before a session begins, of the store or of an earlier session
        last = event["time"]
    return (seconds + (last - begun if begun is not None else 0.0)) / 3600


def spending(budget: BudgetConfig, records: Iterable[TrialRecord], hours: float) -> dict[str, tuple[float, float]]:
    """What is limited → (spent, limit)."""
    limits = {name: limit for name, limit in budget if limit is not None}
    records = list(records) if limits else []  # each proposal asks
    spent = {
        "trials": len(records),
        "tokens": sum(record.tokens for record in records),
        "accelerator_hours": sum(record.accelerator_seconds for record in records) / 3600,
        "hours": hours,
    }
    return {name: (spent[name], limit) for name, limit in limits.items()}


def exhausted(budget: BudgetConfig, records: Iterable[TrialRecord], hours: float, resuming: bool = False) -> str | None:
    """Why no other trial may begin, e.g. `tokens: 12,000 of 10,000`; None where one may.

    Args:
        hours: in which this sweep has run.
        resuming: the trial in question is counted already.
    """
    for name, (value, limit) in spending(budget, records, hours).items():
        if value >= limit and not (resuming and name == "trials"):
            return f"{name}: {amount(value)} of {amount(limit)}"
    return None


def share_text(budget: BudgetConfig, records: Iterable[TrialRecord], hours: float) -> str:
    """`42 % of the tokens`: of what is spent first, as it looks; empty where nothing is limited."""
    shares = {name: value / limit for name, (value, limit) in spending(budget, records, hours).items()}
    if not shares:
        return ""
    first = max(shares, key=lambda name: shares[name])
    return f"{100 * shares[first]:.0f} % of the {first.replace('_', ' ')}"


def amount(number: float) -> str:
    """`12,000`, `1.5`."""
    return f"{number:,.0f}" if number == int(number) else f"{number:,.3g}"

"""Which trials run at this moment, and how far are they? The rows of the table that stands above the bar in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from rich.table import Table
from rich.text import Text

from neo_ray.config import SweepConfig
from neo_ray.records import TrialRecord
from neo_ray.trials import setting_text

MOST_ROWS = 10
"""A terminal has 24 lines or more, and what is said scrolls above the table."""
MOST_OF_A_HEAD = 30
"""Characters: a name and version, and a setting still finds room."""


@dataclass(frozen=True)
class Row:
    """As a person reads it; `–` where nothing is known yet."""

    trial: str
    phase: str
    worker: str
    step: str
    """Of the last evaluation, and which of them that was."""
    loss: str
    """On the training data, up to that evaluation."""
    best: str
    """The objective, of all evaluations so far."""
    setting: str


def rows_of(records: Iterable[TrialRecord], slots: Mapping[str, int], config: SweepConfig) -> list[Row]:
    """The trials that have not ended, those in a slot first. `slots`: trial → slot that it is in."""
    running = sorted((r for r in records if not r.finished), key=lambda record: (record.id not in slots, record.id))
    return [_row(record, slots.get(record.id), config) for record in running]


def _row(record: TrialRecord, slot: int | None, config: SweepConfig) -> Row:
    metric, last = config.objective.metric, record.curve[-1] if record.curve else {}
    values = [row[metric] for row in record.curve if row.get(metric) is not None]
    best = (min if config.objective.mode == "min" else max)(values, default=None)
    return Row(
        trial=record.id,
        phase=record.phase,
        worker="waits" if slot is None else f"slot {slot}",
        step=f"{record.steps:,} ({last['rung']}/{config.evaluation.points})" if last else "–",
        loss=_number(last.get("train_loss")),
        best=_number(best),
        setting=setting_text(record.params),
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def table(rows: list[Row], config: SweepConfig, label: str) -> Table:
    """The rows under their heads; the phase where the sweep has several. A setting that finds no room is cut.

    Args:
        label: what the objective is called.
    """
    shown = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    heads = [field.name for field in fields(Row) if field.name != "phase" or config.phases is not None]
    for head in heads:
        words, most = (f"best {label}", MOST_OF_A_HEAD) if head == "best" else (head, None)
        shown.add_column(words, no_wrap=True, overflow="ellipsis", ratio=1 if head == "setting" else None, max_width=most)
    for row in rows[:MOST_ROWS]:
        shown.add_row(*(Text(getattr(row, head)) for head in heads))
    if len(rows) > MOST_ROWS:
        shown.add_row("…", *[""] * (len(heads) - 2), f"and {len(rows) - MOST_ROWS} more")
    return shown

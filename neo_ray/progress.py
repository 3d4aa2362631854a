"""What does a person see while a sweep runs? A table, a bar and an estimate in a terminal; one line an event in a plain log."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from neo_ray.budget import share_text
from neo_ray.config import SweepConfig
from neo_ray.records import TrialRecord
from neo_ray.running import rows_of, table
from neo_ray.scores import objective_called
from neo_ray.trials import setting_text

BAR = 24
SECONDS_BETWEEN_WORDS = 10.0


class SweepConsole(Console):
    """Where nobody reads any more (a closed pipe, a lost terminal), the sweep goes on in silence: its folder holds all."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Shown:
    """Stands in a terminal, while it is entered."""

    live: Live | None

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live is not None:
            self.live.stop()


class Progress(Shown):
    """Counts trials by state; safe to call from several threads."""

    def __init__(self, config: SweepConfig, console: Console, planned: int, slots: int, records: list[TrialRecord]) -> None:
        self.config, self.console, self.planned, self.slots = config, console, planned, slots
        self.records = {record.id: record for record in records}
        self.label = objective_called(config, records, config.folder)
        self.hours: Callable[[], float] = lambda: 0.0
        """In which the sweep has run, for its budget."""
        self.phase = ""
        """Of the study, where it has some."""
        self.lock = threading.RLock()
        self.in_slot: dict[str, int] = {}
        self.live = Live(self._view(), console=console, refresh_per_second=2, transient=True) if console.is_terminal else None

    def say(self, text: str) -> None:
        """An event worth a line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, record: TrialRecord, event: str) -> None:
        """A trial started, reported or ended."""
        with self.lock:
            self.records[record.id] = record
            if event in ("end", "attempt"):
                self.in_slot.pop(record.id, None)
            if self.live is not None:
                self.live.update(self._view())
            if event == "end" or (self.live is None and event == "report"):
                self.say(self._line(record, event))

    def taken(self, trial: str, slot: int) -> None:
        """A slot has a trial in hand now."""
        with self.lock:
            self.in_slot = {other: its for other, its in self.in_slot.items() if its != slot} | {trial: slot}
            if self.live is not None:
                self.live.update(self._view())

    def _line(self, record: TrialRecord, event: str) -> str:
        value = record.metrics.get(self.config.objective.metric)
        shown = f"{self.label} {value:.4f}" if value is not None else "no score"
        state = record.state + (f" ({record.cause})" if record.cause else "")
        if event == "report":
            rung = record.curve[-1]["rung"] if record.curve else 0
            return f"  {record.id} {rung}/{self.config.evaluation.points} {shown}"
        line = f"  {record.id} {state}: {shown} · {setting_text(record.params)} · {record.seconds:.0f} s"
        return line if self.live is not None else f"{line}   [{self.summary()}]"  # the bar stands right below in a terminal

    def summary(self) -> str:
        """`5/12 trials · 2 running · 3 pruned · best select_ce 4.51 (0003) · about 3 min left`."""
        states = [r.state for r in self.records.values()]
        done = sum(s != "RUNNING" for s in states)
        words = [self.phase] if self.phase else []
        words += [f"{done}/{self.planned} trials"]
        running = min(self.slots, states.count("RUNNING"))  # Tune starts the next before a stopped one has left its slot
        words += [f"{running} running"] if running else []
        words += [f"{states.count(s)} {s.lower()}" for s in ("PRUNED", "FAILED") if s in states]
        best = self._best()
        if best is not None:
            words.append(f"best {self.label} {best.metrics[self.config.objective.metric]:.4f} ({best.id})")
        share = share_text(self.config.budget, self.records.values(), self.hours())
        words += [f"budget: {share}"] if share else []
        words.append(self._left(done))
        return " · ".join(words)

    def _best(self) -> TrialRecord | None:
        metric = self.config.objective.metric
        scored = [r for r in self.records.values() if r.state == "COMPLETE" and r.metrics.get(metric) is not None]
        sign = 1 if self.config.objective.mode == "min" else -1
        return min(scored, key=lambda r: sign * (r.metrics[metric] or 0.0), default=None)

    def _left(self, done: int) -> str:
        """From the mean time of the trials that have run, also before an interruption, and what the running ones have done."""
        finished = [r.seconds for r in self.records.values() if r.finished and r.seconds]
        if not finished:
            return "time left not known yet"
        running = [r for r in self.records.values() if not r.finished]
        begun = sum(min(1.0, len(r.curve) / self.config.evaluation.points) for r in running)
        seconds = max(0.0, self.planned - done - begun) * sum(finished) / len(finished) / self.slots
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"

    def _view(self) -> Group:
        """Trials that run, above the bar of all."""
        done = sum(r.finished for r in self.records.values())
        rows = rows_of(self.records.values(), self.in_slot, self.config)
        above = [table(rows, self.config, self.label)] if rows else []
        return Group(*above, Text(f"{bar(done, self.planned)} {self.summary()}"))


def bar(done: float, of: float) -> str:
    full = round(BAR * done / max(1, of))
    return f"[{'█' * full}{'·' * (BAR - full)}]"


class Filling(Shown):
    """How far is the teacher with a store of targets? A bar in a terminal, else a line from time to time."""

    def __init__(self, total: int, announce: Callable[[str], None], console: Console | None) -> None:
        """`total`: tokens to read; `console`: where the bar stands, if it is a terminal that has no other."""
        self.total, self.announce, self.seen = total, announce, 0
        self.started = self.spoken = time.monotonic()
        terminal = console is not None and console.is_terminal
        self.live = Live(self._bar(), console=console, refresh_per_second=2, transient=True) if terminal else None

    def add(self, tokens: int) -> None:
        """A shard is filled; an actor that came up has read nothing."""
        if not self.seen and not tokens:
            self.started = time.monotonic()
        self.seen += tokens
        if self.live is not None:
            self.live.update(self._bar())
        elif self.seen and time.monotonic() - self.spoken > SECONDS_BETWEEN_WORDS:
            self.spoken = time.monotonic()
            self.announce(f"  {self.line()}")

    def say(self, text: str) -> None:
        """An event worth a line."""
        if self.live is None:
            self.announce(text)
        else:
            self.live.console.print(text, markup=False, highlight=False)

    def silent(self, num_actors: int) -> None:
        """Nothing has come for a while."""
        if not self.seen and time.monotonic() - self.spoken > 6 * SECONDS_BETWEEN_WORDS:
            self.spoken = time.monotonic()
            self.say(f"  waiting for room for the teacher ({num_actors} workers asked for)")

    def line(self) -> str:
        """`1,234 of 7,440 tokens, 120 tokens/s, about 52 s left`."""
        read = f"{self.seen:,} of {self.total:,} tokens"
        if not self.seen:
            return f"{read}, the teacher is loading"
        return f"{read}, {self.rate:,.0f} tokens/s, about {(self.total - self.seen) / self.rate:.0f} s left"

    @property
    def rate(self) -> float:
        """Tokens a second since the first actor was up."""
        return self.seen / (time.monotonic() - self.started)

    def _bar(self) -> Text:
        return Text(f"{bar(self.seen, self.total)} {self.line()}")

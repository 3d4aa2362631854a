"""What does a person see while a sweep runs? A line, a bar and an estimate in a terminal; one line an event in a plain log."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from neo_ray.budget import share_text
from neo_ray.config import SweepConfig
from neo_ray.records import TrialRecord

BAR = 24


class SweepConsole(Console):
    """Where nobody reads any more (a closed pipe, a lost terminal), the sweep goes on in silence: its folder holds all."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """Counts trials by state; safe to call from several threads."""

    def __init__(self, config: SweepConfig, console: Console, planned: int, slots: int, records: list[TrialRecord]) -> None:
        self.config, self.console, self.planned, self.slots = config, console, planned, slots
        self.records = {record.id: record for record in records}
        self.hours: Callable[[], float] = lambda: 0.0
        """In which the sweep has run, for its budget."""
        self.phase = ""
        """Of the study, where it has some."""
        self.lock = threading.RLock()
        self.live = Live(self._text(), console=console, refresh_per_second=2, transient=True) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """An event worth a line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, record: TrialRecord, event: str) -> None:
        """A trial started, reported or ended."""
        with self.lock:
            self.records[record.id] = record
            if self.live is not None:
                self.live.update(self._text())
            if event == "end" or (self.live is None and event == "report"):
                self.say(self._line(record, event))

    def _line(self, record: TrialRecord, event: str) -> str:
        value = record.metrics.get(self.config.objective.metric)
        shown = f"{self.config.objective.metric} {value:.4f}" if value is not None else "no score"
        setting = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.params.items())
        state = record.state + (f" ({record.cause})" if record.cause else "")
        if event == "report":
            rung = record.curve[-1]["rung"] if record.curve else 0
            return f"  {record.id} {rung}/{self.config.evaluation.points} {shown}"
        line = f"  {record.id} {state}: {shown} · {setting} · {record.seconds:.0f} s"
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
            words.append(f"best {self.config.objective.metric} {best.metrics[self.config.objective.metric]:.4f} ({best.id})")
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

    def _text(self) -> Text:
        done = sum(r.finished for r in self.records.values())
        full = round(BAR * done / max(1, self.planned))
        return Text(f"[{'█' * full}{'·' * (BAR - full)}] {self.summary()}")

"""Which trial runs in which slot? An async actor between Tune's trials, the slots that run them and the sweep's driver."""

from __future__ import annotations

import asyncio
import collections
import time
from typing import Any

Job = dict[str, Any]
Item = dict[str, Any]
PATIENCE_SECONDS = 20.0  # a question to the board is answered at least this often, so that nobody waits past a time-out


class Board:
    """Trials wait here for a slot, slots report here, Tune's trials and the driver listen here. Made an actor by the tuner."""

    def __init__(self, max_failures: int) -> None:
        self.max_failures = max_failures
        self.queue: collections.deque[str] = collections.deque()
        self.jobs: dict[str, Job] = {}
        self.items: dict[str, list[Item]] = {}
        self.log: list[Item] = []
        self.failures: dict[str, int] = {}
        self.in_slot: dict[int, str] = {}
        self.slots: set[int] = set()
        self.cancelled: set[str] = set()
        self.closed = False
        self.changed = asyncio.Condition()

    async def submit(self, trial: str, job: Job) -> None:
        """A Tune trial asks for a slot."""
        async with self.changed:
            self.jobs[trial], self.items[trial] = job, []
            self.queue.append(trial)
            self.changed.notify_all()

    async def take(self, slot: int) -> tuple[str, Job | None]:
        """The next trial for a slot: (id, job), ("", None) when there is none yet, ("closed", None) at the end."""
        async with self.changed:
            self.slots.add(slot)
            await self._wait(lambda: bool(self.queue) or self.closed)
            while self.queue:
                trial = self.queue.popleft()
                if trial in self.cancelled:
                    self._add(trial, {"kind": "end", "state": "PRUNED"})
                    continue
                self.in_slot[slot] = trial
                return trial, self.jobs[trial]
            return ("closed", None) if self.closed else ("", None)

    async def report(self, trial: str, row: dict[str, Any]) -> None:
        async with self.changed:
            self._add(trial, {"kind": "report", "row": row})
            self.changed.notify_all()

    async def when_cancelled(self, trial: str) -> bool:
        """True as soon as the scheduler stops a trial; False when it left its slot, or after a while, to be asked again."""
        async with self.changed:
            await self._wait(lambda: trial in self.cancelled or trial not in self.in_slot.values())
            return trial in self.cancelled

    async def finish(self, slot: int, trial: str, end: dict[str, Any]) -> None:
        """A slot is done with its trial, however it ended."""
        async with self.changed:
            self.in_slot.pop(slot, None)
            self._add(trial, {"kind": "end", **end})
            self.changed.notify_all()

    async def cancel(self, trial: str) -> None:
        """The scheduler stopped a trial: its slot sees it between two steps."""
        async with self.changed:
            self.cancelled.add(trial)
            self.changed.notify_all()

    async def slot_lost(self, slot: int, message: str, cause: str) -> str | None:
        """A slot's workers died: its trial goes to the front of the queue, to resume, a bounded number of times."""
        async with self.changed:
            trial = self.in_slot.pop(slot, None)
            if trial is None:
                return None
            self.failures[trial] = self.failures.get(trial, 0) + 1
            if self.failures[trial] > self.max_failures:
                error = f"its worker died {self.failures[trial]} times; the last time: {message}"
                self._add(trial, {"kind": "end", "state": "FAILED", "cause": cause, "error": error})
            else:
                self._add(trial, {"kind": "attempt", "message": message})
                self.queue.appendleft(trial)
            self.changed.notify_all()
            return trial

    async def items_after(self, trial: str, seen: int) -> list[Item]:
        """What happened to a trial beyond the `seen` first items; empty after a while, to be asked again."""
        async with self.changed:
            await self._wait(lambda: len(self.items.get(trial, ())) > seen)
            return self.items.get(trial, [])[seen:]

    async def log_after(self, seen: int, patience_seconds: float) -> list[Item]:
        """What happened to all trials beyond the `seen` first items: what the journal is written from."""
        async with self.changed:
            await self._wait(lambda: len(self.log) > seen, patience_seconds)
            return self.log[seen:]

    async def close(self) -> set[int]:
        """No trial will follow; slots end when they ask next. Returns those that ever asked: the others still wait for a node."""
        async with self.changed:
            self.closed = True
            self.changed.notify_all()
            return self.slots

    def _add(self, trial: str, item: Item) -> None:
        item = {"trial": trial, "at": time.time(), **item}
        self.items[trial].append(item)
        self.log.append(item)

    async def _wait(self, condition: Any, patience_seconds: float = PATIENCE_SECONDS) -> None:
        try:
            await asyncio.wait_for(self.changed.wait_for(condition), patience_seconds)
        except TimeoutError:
            pass

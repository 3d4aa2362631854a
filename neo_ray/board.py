"""Which trial runs in which slot? An async actor between Tune's trials, the slots that run them and the sweep's driver."""

from __future__ import annotations

import asyncio
import collections
import time
from typing import Any

from neo_ray.records import Stop

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
        self.ended: dict[int, int] = {}
        self.hung: set[int] = set()
        self.abandoned: dict[str, str] = {}
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
            if (stale := self.in_slot.pop(slot, None)) is not None:  # taken by a call that dead workers had left behind
                self.queue.appendleft(stale)
            await self._wait(lambda: bool(self.queue) or self.closed)
            while self.queue:
                trial = self.queue.popleft()
                if trial in self.cancelled:
                    self._end(slot, trial, {"state": "PRUNED"})
                    continue
                if not self.closed:
                    self.in_slot[slot] = trial
                    return trial, self.jobs[trial]
            return ("closed", None) if self.closed else ("", None)

    async def report(self, trial: str, row: dict[str, Any]) -> None:
        async with self.changed:
            self._add(trial, {"kind": "report", "row": row})
            self.changed.notify_all()

    async def when_stopped(self, trial: str) -> Stop:
        """How a trial is to stop, as soon as it is to; NO when it left its slot, or after a while, to be asked again."""
        async with self.changed:
            await self._wait(lambda: self.closed or trial in self.cancelled or trial not in self.in_slot.values())
            if trial in self.cancelled:
                return Stop.PRUNED
            return Stop.INTERRUPTED if self.closed and trial in self.in_slot.values() else Stop.NO

    async def leave(self, slot: int, trial: str) -> None:
        """The sweep is interrupted and the trial put away, in a checkpoint: it has not ended."""
        async with self.changed:
            self._leave(slot, trial)
            self.changed.notify_all()

    async def finish(self, slot: int, trial: str, end: dict[str, Any]) -> None:
        """A slot is done with its trial, however it ended."""
        async with self.changed:
            if self._leave(slot, trial):
                self._end(slot, trial, end)
                self.changed.notify_all()

    async def using(self, trial: str, micro_batch_size: int) -> None:
        """A slot says what it tries, so that a death for want of memory is known to have happened with it."""
        self.jobs[trial]["micro_batch_size"] = micro_batch_size

    async def retry_smaller(self, slot: int, trial: str, message: str) -> None:
        """A trial ran out of memory: back to the front of the queue with half the micro-batch, from its last checkpoint."""
        async with self.changed:
            if self._leave(slot, trial):
                self._halve(trial, message)

    async def cancel(self, trial: str, abandoned: str | None = None) -> None:
        """The scheduler stopped a trial: its slot sees it between two steps. `abandoned`: it was no decision but a fault."""
        async with self.changed:
            if abandoned is not None:
                self.abandoned[trial] = abandoned
            elif trial not in self.cancelled and not any(item["kind"] == "end" for item in self.items.get(trial, ())):
                self._add(trial, {"kind": "stop"})
            self.cancelled.add(trial)
            self.changed.notify_all()

    async def hang(self, slot: int) -> None:
        """A worker says that its trial made no progress for too long, before it ends itself."""
        self.hung.add(slot)

    async def give_back(self, slot: int, trial: str) -> None:
        """A slot cannot work at all (its models do not load): its trial is not to blame."""
        async with self.changed:
            if self._leave(slot, trial):
                self.queue.appendleft(trial)
                self.changed.notify_all()

    async def slot_lost(self, slot: int, message: str, cause: str) -> tuple[str | None, int]:
        """A slot's workers died: its trial goes to the front of the queue, to resume, a bounded number of times.

        Returns the trial, and how many trials ended in this slot so far.
        """
        async with self.changed:
            trial = self.in_slot.pop(slot, None)
            if slot in self.hung:
                self.hung.discard(slot)
                cause = "hung"
            if trial is not None:
                self._return(slot, trial, message, cause)
                self.changed.notify_all()
            return trial, self.ended.get(slot, 0)

    def _return(self, slot: int, trial: str, message: str, cause: str) -> None:
        if cause == "out_of_memory" and self.jobs[trial].get("micro_batch_size", 1) > 1:
            self._halve(trial, message)
            return
        self.failures[trial] = self.failures.get(trial, 0) + 1
        if self.failures[trial] > self.max_failures:
            error = f"its worker died {self.failures[trial]} times; the last time: {message}"
            self._end(slot, trial, {"state": "FAILED", "cause": cause, "error": error})
        else:
            self._add(trial, {"kind": "attempt", "message": message})
            self.queue.appendleft(trial)

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
        """No trial will follow, and those that run stop: slots end. Returns those that ever asked: the others wait for a node."""
        async with self.changed:
            self.closed = True
            self.changed.notify_all()
            return self.slots

    def _leave(self, slot: int, trial: str) -> bool:
        """The trial leaves its slot; False where it is not there any more, since several ranks may say the same."""
        held = self.in_slot.get(slot) == trial
        if held:
            del self.in_slot[slot]
        return held

    def _end(self, slot: int, trial: str, end: dict[str, Any]) -> None:
        if end["state"] == "PRUNED" and trial in self.abandoned:
            end = {**end, "state": "FAILED", "cause": "error", "error": self.abandoned[trial]}
        self.ended[slot] = self.ended.get(slot, 0) + 1
        self._add(trial, {"kind": "end", **end})

    def _halve(self, trial: str, message: str) -> None:
        size = self.jobs[trial]["micro_batch_size"]
        self.jobs[trial]["micro_batch_size"] = (size + 1) // 2
        self._add(trial, {"kind": "attempt", "message": f"micro-batch of {size} halved: {message}"})
        self.queue.appendleft(trial)
        self.changed.notify_all()

    def _add(self, trial: str, item: Item) -> None:
        item = {"trial": trial, "at": time.time(), **item}
        self.items[trial].append(item)
        self.log.append(item)

    async def _wait(self, condition: Any, patience_seconds: float = PATIENCE_SECONDS) -> None:
        try:
            await asyncio.wait_for(self.changed.wait_for(condition), patience_seconds)
        except TimeoutError:
            pass

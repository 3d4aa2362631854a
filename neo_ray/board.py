"""Which trial runs in which slot? An async actor between Tune's trials, the slots that run them and the sweep's driver."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable, Mapping
from typing import Any

from neo_ray.records import Stop, log_name
from neo_ray.settings import TrialConfig

Job = dict[str, Any]
Item = dict[str, Any]
NAMESPACE = "neo_ray"
MAX_PREEMPTIONS = 100  # of one trial: nodes that come and go are no fault of it, but something ends all of them
MAX_PASSED_OVER = 3  # a trial at the front of the queue waits for at most so many others
QUEUE, LOG = "the queue", "the log"
PATIENCE_SECONDS = 20.0  # a question to the board is answered at least this often, so that nobody waits past a time-out


def kind_of(trial: TrialConfig) -> str:
    """Trials of one kind can take the same models, whatever the worker: `parts.shape_of` before there is a device."""
    return f"{'adapter' if trial.has_adapter else 'full'} {trial.training.dtype} {trial.deepspeed.zero_stage >= 3}"


class Board:
    """Trials wait here for a slot, slots report here, Tune's trials and the driver listen here. Made an actor by the tuner."""

    def __init__(self, max_failures: int, failures: Mapping[str, int] | None = None) -> None:
        """`failures`: how often trials have failed under earlier drivers."""
        self.max_failures = max_failures
        self.queue: collections.deque[str] = collections.deque()
        self.jobs: dict[str, Job] = {}
        self.items: dict[str, list[Item]] = {}
        self.log: list[Item] = []
        """What happened to any trial, and which slot took it."""
        self.failures: collections.Counter[str] = collections.Counter(failures)
        self.preemptions: collections.Counter[str] = collections.Counter()
        self.num_well = 0
        self.well_before: dict[str, int] = {}
        """Trial that storage failed → how many others had come through by then."""
        self.passed_over: collections.Counter[str] = collections.Counter()
        self.queued: dict[str, float] = {}
        self.waited: collections.defaultdict[str, float] = collections.defaultdict(float)  # seconds
        self.nodes: dict[int, set[str]] = {}
        self.leaving: dict[int, str] = {}
        self.in_slot: dict[int, str] = {}
        self.slots: set[int] = set()
        self.ended: collections.Counter[int] = collections.Counter()
        """Slot → how many trials its workers have brought to their end."""
        self.hung: set[int] = set()
        self.told: collections.Counter[str] = collections.Counter()
        """Trial → how many of its items Tune has taken: where a relay goes on that follows one that died."""
        self.cancelled: dict[str, float] = {}
        """Trial → Unix time of the scheduler's word."""
        self.closed = False
        self.lock = asyncio.Lock()
        self.told_of: collections.defaultdict[str, asyncio.Condition] = collections.defaultdict(self._condition)
        """What somebody waits for (a trial, `QUEUE`, `LOG`) → where. One for all would wake each slot and relay at any event."""

    async def submit(self, trial: str, job: Job) -> list[Item]:
        """A Tune trial asks for a slot. Tune may move it to another of its actors, or begin one anew that died: asked once.

        Returns what Tune was told of it before.
        """
        async with self.lock:
            if trial not in self.jobs:
                self.jobs[trial], self.items[trial] = job, []
                self._enqueue(trial, first=False)
            return self.items[trial][: self.told[trial]]

    async def orphan(self, trial: str, why: str) -> None:
        """Tune has given a trial up whose relay died again and again. In its slot it goes on, and Tune does not hear of it.

        Where no relay came so far as to ask for a slot, the trial has failed.
        """
        async with self.lock:
            if trial not in self.jobs:
                self.jobs[trial], self.items[trial] = {}, []
                self._end(trial, {"state": "FAILED", "cause": "error", "error": why})

    async def begin(self, slot: int) -> None:
        """A slot's workers are about to be started."""
        self.nodes[slot] = set()
        self.leaving.pop(slot, None)

    async def joined(self, slot: int, node: str) -> None:
        """A worker of a slot is up, on this node."""
        self.nodes.setdefault(slot, set()).add(node)

    async def state(self) -> tuple[int, dict[int, set[str]]]:
        """How many trials wait or run, and on which nodes each slot's workers are."""
        return len(self.queue) + len(self.in_slot), self.nodes

    async def let_go(self, slot: int, why: str) -> None:
        """A slot is to end: `drained` as soon as its trial is in a checkpoint, `recycled` after its trial."""
        async with self.lock:
            self.leaving.setdefault(slot, why)
            self._tell(QUEUE, *([self.in_slot[slot]] if slot in self.in_slot else []))

    async def why_left(self, slot: int) -> str | None:
        """Why a slot ended without a fault; None at the end of the sweep."""
        return self.leaving.get(slot)

    async def take(self, slot: int, kind: str | None = None) -> tuple[str, Job | None]:
        """The next trial for a slot: (id, job), ("", None) when there is none yet, ("closed", None) at the end.

        `kind`: that of the trials that the slot's models serve; one of these comes first.
        """
        async with self.lock:
            self.slots.add(slot)
            if (stale := self.in_slot.pop(slot, None)) is not None:  # taken by a call that dead workers had left behind
                self._tell(stale)
                self._enqueue(stale)
            await self._wait(QUEUE, lambda: bool(self.queue) or self.closed or slot in self.leaving)
            while self.queue and slot not in self.leaving:
                trial = self._next(kind)
                if trial in self.cancelled:
                    self._end(trial, {"state": "PRUNED"})
                    continue
                if not self.closed:
                    self.in_slot[slot] = trial
                    self.waited[trial] += time.time() - self.queued[trial]
                    self.log.append({"trial": trial, "at": time.time(), "kind": "taken", "slot": slot})
                    self._tell(LOG)
                    return trial, self.jobs[trial]
            return ("closed", None) if self.closed or slot in self.leaving else ("", None)

    async def report(self, trial: str, row: dict[str, Any]) -> None:
        """An evaluation. A trial that goes on from its checkpoint reports those before again: the first time counts."""
        async with self.lock:
            known = (item["row"]["rung"] for item in self.items[trial] if item["kind"] == "report")
            if row["rung"] not in known:
                self._add(trial, {"kind": "report", "row": row})

    async def when_stopped(self, trial: str) -> Stop:
        """How a trial is to stop, as soon as it is to; NO when it left its slot, or after a while, to be asked again."""
        async with self.lock:
            await self._wait(trial, lambda: trial in self.cancelled or not self._may_stay(trial))
            if trial in self.cancelled:
                return Stop.PRUNED
            return Stop.INTERRUPTED if trial in self.in_slot.values() and not self._may_stay(trial) else Stop.NO

    async def leave(self, slot: int, trial: str) -> None:
        """The sweep is interrupted, or the slot's node leaves, and the trial put away, in a checkpoint: it has not ended."""
        async with self.lock:
            if self._leave(slot, trial) and not self.closed:
                self._put_back(trial, "its node leaves", "preempted")

    async def finish(self, slot: int, trial: str, end: dict[str, Any]) -> None:
        """A slot is done with its trial, however it ended."""
        async with self.lock:
            if self._leave(slot, trial):
                end["details"] = {**end.get("details", {}), "waited_seconds": self.waited[trial]}
                if end["state"] == "PRUNED" and trial in self.cancelled:
                    end["details"]["stop_seconds"] = time.time() - self.cancelled[trial]
                self.ended[slot] += 1
                self.num_well += end["state"] in ("COMPLETE", "PRUNED")
                self._end(trial, end)

    async def using(self, trial: str, micro_batch_size: int) -> None:
        """A slot says what it tries, so that a death for want of memory is known to have happened with it."""
        self.jobs[trial]["micro_batch_size"] = micro_batch_size

    async def retry_smaller(self, slot: int, trial: str, message: str) -> None:
        """A trial ran out of memory: back to the front of the queue with half the micro-batch, from its last checkpoint."""
        async with self.lock:
            if self._leave(slot, trial):
                self._halve(trial, message)

    async def cancel(self, trial: str) -> None:
        """The scheduler stopped a trial: its slot sees it between two steps."""
        async with self.lock:
            if trial not in self.cancelled and not any(item["kind"] == "end" for item in self.items.get(trial, ())):
                self._add(trial, {"kind": "stop"})
            self.cancelled.setdefault(trial, time.time())
            self._tell(trial)

    async def hang(self, slot: int) -> None:
        """A worker says that its trial made no progress for too long, before it ends itself."""
        self.hung.add(slot)

    async def give_back(self, slot: int, trial: str) -> None:
        """A slot cannot work at all (its models do not load): its trial is not to blame."""
        async with self.lock:
            if self._leave(slot, trial):
                self._enqueue(trial)

    async def set_back(self, slot: int, trial: str, message: str) -> None:
        """Storage failed under a trial: it goes on from its last checkpoint, once the others have been tried.

        That counts as its failure only where others came through since it last happened: else storage fails them all, and the
        slots end before any trial does.
        """
        async with self.lock:
            if self._leave(slot, trial):
                before = self.well_before.get(trial, self.num_well)
                self.well_before[trial] = self.num_well
                self.failures[trial] += before != self.num_well
                if self.failures[trial] > self.max_failures:
                    error = f"storage failed it again and again, and others not; the last time: {message}"
                    self._end(trial, {"state": "FAILED", "cause": "storage", "error": error, "details": {"log": log_name(trial)}})
                else:
                    self._put_back(trial, message, "storage", first=False)

    async def slot_lost(self, slot: int, message: str, cause: str) -> tuple[str | None, int]:
        """A slot's workers died: its trial goes to the front of the queue, to resume, a bounded number of times.

        Returns the trial, and how many trials this slot has brought to their end so far.
        """
        async with self.lock:
            trial = self.in_slot.pop(slot, None)
            if slot in self.hung:
                self.hung.discard(slot)
                cause = "hung"
            if trial is not None:
                self._tell(trial)
                self._return(slot, trial, message, cause)
            return trial, self.ended[slot]

    def _return(self, slot: int, trial: str, message: str, cause: str) -> None:
        if cause == "out_of_memory" and self.jobs[trial].get("micro_batch_size", 1) > 1:
            self._halve(trial, message)
            return
        counted, most = (self.preemptions, MAX_PREEMPTIONS) if cause == "preempted" else (self.failures, self.max_failures)
        counted[trial] += 1
        if counted[trial] > most:
            error = f"its worker died {counted[trial]} times; the last time: {message}"
            self._end(trial, {"state": "FAILED", "cause": cause, "error": error, "details": {"log": log_name(trial)}})
        else:
            self._put_back(trial, message, cause)

    async def items_after(self, trial: str, seen: int) -> list[Item]:
        """What happened to a trial beyond the `seen` items that Tune has taken; empty after a while, to be asked again."""
        async with self.lock:
            self.told[trial] = max(self.told[trial], seen)
            await self._wait(trial, lambda: len(self.items.get(trial, ())) > seen)
            return self.items.get(trial, [])[seen:]

    async def log_after(self, seen: int, patience_seconds: float) -> list[Item]:
        """What happened to all trials beyond the `seen` first items: what the journal is written from."""
        async with self.lock:
            await self._wait(LOG, lambda: len(self.log) > seen, patience_seconds)
            return self.log[seen:]

    async def close(self) -> set[int]:
        """No trial will follow, and those that run stop: slots end. Returns those that ever asked: the others wait for a node."""
        async with self.lock:
            self.closed = True
            self._tell(*self.told_of)
            return self.slots

    def _may_stay(self, trial: str) -> bool:
        """Does the trial run in a slot that goes on?"""
        slot = next((slot for slot, held in self.in_slot.items() if held == trial), None)
        return slot is not None and not self.closed and self.leaving.get(slot) != "drained"

    def _next(self, kind: str | None) -> str:
        """Out of the queue: the first trial, or the first of a kind, unless that has been done to the first too often."""
        first = self.queue[0]
        chosen = next((trial for trial in self.queue if self.jobs[trial].get("kind") == kind), first)
        if chosen != first:
            self.passed_over[first] += 1
            chosen = chosen if self.passed_over[first] <= MAX_PASSED_OVER else first
        self.queue.remove(chosen)
        return chosen

    def _enqueue(self, trial: str, first: bool = True) -> None:
        self.queued[trial] = time.time()
        (self.queue.appendleft if first else self.queue.append)(trial)
        self._tell(QUEUE)

    def _put_back(self, trial: str, message: str, cause: str, first: bool = True) -> None:
        self._add(trial, {"kind": "attempt", "message": message, "cause": cause})
        self._enqueue(trial, first)

    def _leave(self, slot: int, trial: str) -> bool:
        """The trial leaves its slot; False where it is not there any more, since several ranks may say the same."""
        held = self.in_slot.get(slot) == trial
        if held:
            del self.in_slot[slot]
            self._tell(trial)
        return held

    def _end(self, trial: str, end: dict[str, Any]) -> None:
        self._add(trial, {"kind": "end", **end})

    def _halve(self, trial: str, message: str) -> None:
        size = self.jobs[trial]["micro_batch_size"]
        self.jobs[trial]["micro_batch_size"] = (size + 1) // 2
        self._put_back(trial, f"micro-batch of {size} halved: {message}", "out_of_memory")

    def _add(self, trial: str, item: Item) -> None:
        item = {"trial": trial, "at": time.time(), **item}
        self.items[trial].append(item)
        self.log.append(item)
        self._tell(trial, LOG)

    def _condition(self) -> asyncio.Condition:
        return asyncio.Condition(self.lock)

    def _tell(self, *of: str) -> None:
        """Who waits for these looks again, once the lock is free."""
        for what in of:
            if what in self.told_of:
                self.told_of[what].notify_all()

    async def _wait(self, what: str, condition: Callable[[], bool], patience_seconds: float = PATIENCE_SECONDS) -> None:
        try:
            await asyncio.wait_for(self.told_of[what].wait_for(condition), patience_seconds)
        except TimeoutError:
            pass

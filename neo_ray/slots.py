"""How many slots are there, and where? The driver's keeper: as many as trials need and nodes hold, while they come and go."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from neo_ray.slot import SlotRunner

SECONDS_BETWEEN_LOOKS = 2.0
PAUSE_SECONDS, MAX_PAUSE_SECONDS = 300.0, 3600.0  # until the place of a slot that broke is tried again


class Keeper(threading.Thread):
    """Holds the slots of a sweep. The place of one that broke stays empty for a while; one whose node left is replaced."""

    def __init__(
        self,
        board: Any,
        make: Callable[[int], SlotRunner],
        places: int,
        look: Callable[[], tuple[int, set[str]]],
        announce: Callable[[str], None],
    ) -> None:
        """`look`: how many slots the cluster holds now, and the ids of the nodes that are about to leave it."""
        super().__init__(daemon=True, name="keeper")
        self.board, self.make, self.look, self.announce = board, make, look, announce
        self.places = places
        self.runners: list[SlotRunner] = []
        self.closing = threading.Event()
        self.drained: set[int] = set()
        self.pause_seconds = PAUSE_SECONDS
        self.due: dict[int, float] = {}
        """Slot that broke → when its place is tried again."""
        self.forgiven: set[int] = set()

    @property
    def alive(self) -> list[SlotRunner]:
        return [runner for runner in self.runners if runner.is_alive()]

    @property
    def staying(self) -> list[SlotRunner]:
        return [runner for runner in self.alive if runner.job.slot not in self.drained]

    @property
    def room(self) -> int:
        """How many trials may be under way: a sampler that proposes one for nobody knows less than it could."""
        return max(1, self.places - self.num_broken)

    @property
    def num_broken(self) -> int:
        return len(self._broken())

    @property
    def given_up(self) -> str | None:
        """Why no slot can be kept alive; None while one lives, or may once a node comes."""
        if self.alive or not self.num_broken or not self.places or self.num_broken < self.places:
            return None
        return next((runner.error for runner in reversed(self.runners) if runner.broken and runner.error), "all slots ended")

    def _broken(self) -> list[int]:
        """Slots that broke, and whose places have not been given to others since."""
        return [runner.job.slot for runner in self.runners if runner.broken and runner.job.slot not in self.forgiven]

    def _forgive(self) -> None:
        """What broke a slot may pass: its place is tried again, later each time, while another slot shows that trials run."""
        for slot in self._broken():
            if slot not in self.due:
                self.due[slot] = time.monotonic() + self.pause_seconds
                self.pause_seconds = min(2 * self.pause_seconds, MAX_PAUSE_SECONDS)
            if self.alive and time.monotonic() >= self.due[slot]:
                self.forgiven.add(slot)
                self.announce(f"slot {slot} broke a while ago: its place is tried again")
                return

    def begin(self, count: int) -> None:
        """Start so many slots more, up to the places there are."""
        for _ in range(min(count, self.places - self.num_broken - len(self.staying))):
            runner = self.make(len(self.runners))
            self.runners.append(runner)
            runner.start()

    def run(self) -> None:
        while True:
            try:
                self.keep()
            except Exception:  # a question that was not answered is asked again
                logging.getLogger("neo_ray").exception("the slots could not be looked after")
            if self.closing.wait(SECONDS_BETWEEN_LOOKS):
                return

    def keep(self) -> None:
        """One look: end the slots on nodes that leave, and begin those that are missing."""
        places, leaving = self.look()
        if places != self.places:
            self.announce(f"the cluster holds {places} trials at a time now ({self.places} before)")
            self.places = places
        trials, nodes = ray.get(self.board.state.remote(), timeout=30)
        for runner in self.alive:
            slot = runner.job.slot
            if nodes.get(slot, set()) & leaving and slot not in self.drained:
                self.drained.add(slot)
                self.announce(f"slot {slot} ends: its node is about to leave")
                self.board.let_go.remote(slot, "drained")
        self._forgive()
        if not self.closing.is_set():
            self.begin(trials - len(self.staying))

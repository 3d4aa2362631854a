"""How many slots are there, and where? The driver's keeper: as many as trials need and nodes hold, while they come and go."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import ray

from neo_ray.slot import SlotRunner

SECONDS_BETWEEN_LOOKS = 2.0


class Keeper(threading.Thread):
    """Holds the slots of a sweep. A slot that broke for good leaves its place empty; one whose node left is replaced."""

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
        return sum(runner.broken for runner in self.runners)

    @property
    def given_up(self) -> str | None:
        """Why no slot can be kept alive; None while one lives, or may once a node comes."""
        if self.alive or not self.num_broken or not self.places or self.num_broken < self.places:
            return None
        return next((runner.error for runner in self.runners if runner.broken and runner.error), "all slots ended")

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
        if not self.closing.is_set():
            self.begin(trials - len(self.staying))

"""What of a store of targets depends on where it is kept, for whoever fills it? On a disk, or in an object store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import filelock

from neo_ray import inventory, stores
from neo_ray.lease import Held, lease
from neo_ray.storage import Folder, Remote

Announce = Callable[[str], None]
WAITING = "waiting for another sweep, which fills the same store of targets"
SECONDS_BETWEEN_TRIES = 5.0


class OnDisk:
    """A folder that says in `recipe.json` what it is, with a lock beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def sole_builder(self, announce: Announce) -> Iterator[None]:
        """Of sweeps that need the same store at once, one fills it, and the others find it whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = inventory.lock_of(self.folder)
        while True:
            try:
                lock.acquire(timeout=SECONDS_BETWEEN_TRIES)
                break
            except filelock.Timeout:
                announce(WAITING)
        try:
            yield
        finally:
            lock.release()

    def make_room(self, num_bytes: int) -> None:
        """What a builder left that was killed goes. Raises ConfigError where the disk holds no so many bytes more."""
        for part in self.folder.glob(f"{stores.PART}*"):
            part.unlink(missing_ok=True)
        inventory.check_room(self.folder.parent, num_bytes)

    def describe(self, names: dict[str, Any], rows: dict[str, int]) -> None:
        """For people and for `neo_ray.targets`: recipe and names of the models, and name → rows of the shards."""
        inventory.describe(self.folder, names, rows)

    def add_filled(self, tokens: int, tokens_per_second: float) -> None:
        inventory.add_filled(self.folder, tokens, tokens_per_second)

    def mark_used(self) -> None:
        (self.folder / inventory.USED).touch()


class InObjects:
    """A place without a size, where nothing is left half written; who fills it holds a lease. It says nothing of itself."""

    def __init__(self, folder: Remote) -> None:
        self.folder = folder

    @contextmanager
    def sole_builder(self, announce: Announce) -> Iterator[None]:
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(lease(self.folder))
                    break
                except Held:
                    announce(WAITING)
                    time.sleep(SECONDS_BETWEEN_TRIES)
            yield

    def make_room(self, num_bytes: int) -> None:
        pass

    def describe(self, names: dict[str, Any], rows: dict[str, int]) -> None:
        pass

    def add_filled(self, tokens: int, tokens_per_second: float) -> None:
        pass

    def mark_used(self) -> None:
        pass


def storehouse(folder: Folder) -> OnDisk | InObjects:
    return InObjects(folder) if isinstance(folder, Remote) else OnDisk(folder)

"""What of a store of targets depends on where it is kept, for whoever fills or removes it? On a disk, or in an object store."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import filelock

from neo_ray import inventory
from neo_ray.lease import Held, lease
from neo_ray.storage import PART, Folder, Remote

Announce = Callable[[str], None]
WAITING = "waiting for another sweep, which fills the same store of targets"
SECONDS_BETWEEN_TRIES = 5.0


class OnDisk:
    """A folder with a lock beside it."""

    held = filelock.Timeout

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def hold(self) -> AbstractContextManager[Any]:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        return inventory.lock_of(self.folder).acquire(timeout=0)

    def make_room(self, num_bytes: int) -> None:
        """What a builder left that was killed goes. Raises ConfigError where the disk holds no so many bytes more."""
        for part in self.folder.glob(f"{PART}*"):
            part.unlink(missing_ok=True)
        inventory.check_room(self.folder.parent, num_bytes)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class InObjects:
    """A place without a size, where nothing is left half written; who fills it holds a lease."""

    held = Held

    def __init__(self, folder: Remote) -> None:
        self.folder = folder

    def hold(self) -> AbstractContextManager[Any]:
        return lease(self.folder)

    def make_room(self, num_bytes: int) -> None:
        """Whoever fills it looks at the disk of its own machine, which keeps a copy: the driver's may keep none."""

    def remove(self) -> None:
        self.folder.remove()


def storehouse(folder: Folder) -> OnDisk | InObjects:
    return InObjects(folder) if isinstance(folder, Remote) else OnDisk(folder)


@contextmanager
def unless_building(folder: Folder) -> Iterator[bool]:
    """Nobody else fills the store meanwhile; False, and nothing is held, where somebody does."""
    house = storehouse(folder)
    with ExitStack() as stack:
        try:
            stack.enter_context(house.hold())
        except house.held:
            yield False
            return
        yield True


@contextmanager
def sole_builder(folder: Folder, announce: Announce, waiting: str = WAITING) -> Iterator[None]:
    """Of sweeps that need the same store at once, one fills it, and the others find it whole."""
    with ExitStack() as stack:
        while not stack.enter_context(unless_building(folder)):
            announce(waiting)
            time.sleep(SECONDS_BETWEEN_TRIES)
        yield

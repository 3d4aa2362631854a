"""Which stores of targets does a cache hold, and what does each say of itself? From `recipe.json`, without opening a shard."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from neo_ray.config import SweepConfig
from neo_ray.records import write_atomically
from neo_ray.settings import ConfigError
from neo_ray.storage import Folder, Remote, free_bytes

RECIPE_FILE, USED, READING = "recipe.json", "used", "reading-"
"""In a store's folder: what it is; a file whose time (in an object store: whose text) says when a sweep last took it; and one
such file of each sweep that reads it."""
IN_USE_SECONDS = 600.0
"""So old a sign of a reading sweep is that of a dead one; a living one renews it ten times as often."""
SPARE = 1.1  # of a disk, beyond the store itself


@dataclass(frozen=True)
class Stored:
    """One store."""

    folder: Folder
    facts: dict[str, Any]
    """Of `recipe.json`: recipe; teacher, student, data by name; made; shards (name → rows); tokens_seen, tokens_per_second, bytes
    as of the last filling that came to its end. Empty where there is none."""

    @property
    def files(self) -> dict[str, int | None]:
        """File name without its ending → the rows it should have; the teacher's head has none to count."""
        return {**self.facts.get("shards", {}), **({"head": None} if self.facts["recipe"]["mode"] == "hidden" else {})}

    @property
    def absent(self) -> list[str]:
        """What is not there at all; only reading the checksums tells whether the rest is whole."""
        ends = (".json", ".safetensors")
        there = set(sizes_in(self.folder))
        return [name for name in self.files if not all(f"{name}{end}" in there for end in ends)]

    @property
    def num_bytes(self) -> int:
        return bytes_in(self.folder)

    @property
    def used(self) -> float:
        """Seconds since 1970: when a sweep last took it, else when its folder last changed (in an object store: now)."""
        taken = _stamped(self.folder, USED)
        if taken is not None:
            return taken
        return time.time() if isinstance(self.folder, Remote) else self.folder.stat().st_mtime


def stores_within(place: Folder) -> list[Stored]:
    """The stores of a folder of stores, by key."""
    here = isinstance(place, Path)
    folders: list[Any] = sorted(place.glob("*/")) if here else [place / name for name in place.names()]  # type: ignore[union-attr]
    return [Stored(folder, facts_of(folder)) for folder in folders]


def folder_of(cache: Folder) -> Folder:
    """Of a cache's stores, unless `targets.path` names another."""
    return cache / "targets"


def check_place(given: Folder, is_cache: bool) -> None:
    """Raises ConfigError where no store is found as `given` is no cache (`--cache`), or no folder of stores (`--path`)."""
    option, what = ("--cache", "holds stores itself: --path") if is_cache else ("--path", "is a cache: --cache")
    if facts_of(given):
        raise ConfigError(f"{option} {given}: is a store itself, of the key {given.name}: --path the folder that it lies in")
    if any(stored.facts for stored in stores_within(given if is_cache else folder_of(given))):
        raise ConfigError(f"{option} {given}: {what} {given}")


def facts_of(folder: Folder) -> dict[str, Any]:
    """What a store says of itself; nothing where its `recipe.json` is not there or cannot be read."""
    try:
        facts = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
        return facts if isinstance(facts, dict) and "recipe" in facts else {}
    except (OSError, ValueError):
        return {}


def names_of(config: SweepConfig) -> dict[str, str]:
    """What a sweep's store calls its models and data; others may go by the same names."""
    assert config.teacher is not None
    prune = config.student.prune
    student = str(config.student.model) if prune is None else f"the teacher with {prune.num_layers} layers"
    return {"teacher": config.teacher.model, "student": student, "data": config.data.source}


def describe(folder: Folder, names: dict[str, Any], shards: dict[str, int]) -> None:
    """Say in the store's folder what it is and which shards it should have by now, on top of those of earlier sweeps."""
    before = facts_of(folder)
    facts = {"made": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "tokens_seen": 0, **before, **names}
    facts["shards"] = dict(sorted({**before.get("shards", {}), **shards}.items()))
    if facts != before:
        _tell(folder, facts)


def add_filled(folder: Folder, tokens: int, tokens_per_second: float) -> None:
    """The teacher has read so many tokens more for the store."""
    facts = facts_of(folder)
    now = {"tokens_seen": facts["tokens_seen"] + tokens, "tokens_per_second": tokens_per_second, "bytes": bytes_in(folder)}
    _tell(folder, {**facts, **now})


def _tell(folder: Folder, facts: dict[str, Any]) -> None:
    text = json.dumps(facts, indent=2) + "\n"
    if isinstance(folder, Remote):
        (folder / RECIPE_FILE).write_text(text)
    else:
        write_atomically(folder / RECIPE_FILE, text)


def mark_used(folder: Folder) -> None:
    """A sweep takes the store now."""
    _stamp(folder, USED)


@contextmanager
def in_use(folder: Folder) -> Iterator[None]:
    """A sweep reads the store, and says so anew from time to time, until it ends or is killed."""
    name, ended = f"{READING}{uuid.uuid4().hex[:12]}", threading.Event()

    def renew() -> None:
        while not ended.wait(IN_USE_SECONDS / 10):
            with suppress(Exception):  # storage may be away for a while
                _stamp(folder, name)

    _stamp(folder, name)
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(Exception):  # it grows old by itself
            sign = folder / name
            sign.unlink() if isinstance(sign, Path) else sign.remove()


def is_read(folder: Folder) -> bool:
    """Does a running sweep read the store, or one that died minutes ago?"""
    signs = [_stamped(folder, name) for name in sizes_in(folder) if name.startswith(READING)]
    return any(time.time() - sign < IN_USE_SECONDS for sign in signs if sign is not None)


def _stamp(folder: Folder, name: str) -> None:
    if isinstance(folder, Remote):
        (folder / name).write_text(f"{time.time():.0f}")
    else:
        (folder / name).touch()


def _stamped(folder: Folder, name: str) -> float | None:
    """Seconds since 1970; None without such a file."""
    try:
        return float((folder / name).read_text()) if isinstance(folder, Remote) else (folder / name).stat().st_mtime
    except (FileNotFoundError, ValueError):
        return None


def bytes_in(folder: Folder) -> int:
    """Of the files that are there."""
    return sum(sizes_in(folder).values())


def sizes_in(folder: Folder) -> dict[str, int]:
    """Name → bytes of the files that are there; one may go meanwhile."""
    if isinstance(folder, Remote):
        return folder.sizes()
    sizes = {}
    for path in folder.iterdir() if folder.exists() else ():
        with suppress(FileNotFoundError):
            sizes[path.name] = path.stat().st_size
    return sizes


def check_room(stores: Path, needed: int, are: str = "") -> None:
    """Raises ConfigError where the disk has less free than a store takes.

    Args:
        stores: the folder of all stores, which need not be there yet.
        needed: bytes; `are` says how sure that is.
    """
    free = free_bytes(stores)
    if needed * SPARE > free:
        raise ConfigError(
            f"targets.path: the teacher's targets take {are}{needed / 1e9:,.1f} GB and {stores} has {free / 1e9:,.1f} GB; "
            "name a larger disk, or targets.mode=live"
        )


def lock_of(folder: Path) -> filelock.BaseFileLock:
    """Whoever fills or removes a store holds it."""
    return filelock.FileLock(folder.with_name(f"{folder.name}.lock"))

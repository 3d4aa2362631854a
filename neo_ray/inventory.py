"""Which stores of targets does a cache hold, and what does each say of itself? From `recipe.json`, without opening a shard."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from neo_ray.config import SweepConfig
from neo_ray.records import write_atomically
from neo_ray.settings import ConfigError

RECIPE_FILE, USED = "recipe.json", "used"
"""In a store's folder: what it is, and a file whose time says when a sweep last took it."""
SPARE = 1.1  # of a disk, beyond the store itself


@dataclass(frozen=True)
class Stored:
    """One store."""

    folder: Path
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
        return [name for name in self.files if not all((self.folder / f"{name}{end}").exists() for end in ends)]

    @property
    def num_bytes(self) -> int:
        return bytes_in(self.folder)

    @property
    def used(self) -> float:
        """Seconds since 1970: when a sweep last took it, else when its folder last changed."""
        stamp = self.folder / USED
        return (stamp if stamp.exists() else self.folder).stat().st_mtime


def stores_in(cache: Path) -> list[Stored]:
    """The stores of a cache, by key."""
    return stores_within(folder_of(cache))


def stores_within(place: Path) -> list[Stored]:
    return [Stored(folder, facts_of(folder)) for folder in sorted(place.glob("*/"))]


def folder_of(cache: Path) -> Path:
    """Of a cache's stores."""
    return cache / "targets"


def facts_of(folder: Path) -> dict[str, Any]:
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


def describe(folder: Path, names: dict[str, Any], shards: dict[str, int]) -> None:
    """Say in the store's folder what it is and which shards it should have by now, on top of those of earlier sweeps."""
    before = facts_of(folder)
    facts = {"made": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "tokens_seen": 0, **before, **names}
    facts["shards"] = dict(sorted({**before.get("shards", {}), **shards}.items()))
    if facts != before:
        write_atomically(folder / RECIPE_FILE, json.dumps(facts, indent=2) + "\n")


def add_filled(folder: Path, tokens: int, tokens_per_second: float) -> None:
    """The teacher has read so many tokens more for the store."""
    facts = facts_of(folder)
    now = {"tokens_seen": facts["tokens_seen"] + tokens, "tokens_per_second": tokens_per_second, "bytes": bytes_in(folder)}
    write_atomically(folder / RECIPE_FILE, json.dumps({**facts, **now}, indent=2) + "\n")


def bytes_in(folder: Path) -> int:
    """Of the files that are there; one may go meanwhile."""
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def check_room(stores: Path, needed: int, are: str = "") -> None:
    """Raises ConfigError where the disk has less free than a store takes.

    Args:
        stores: the folder of all stores, which need not be there yet.
        needed: bytes; `are` says how sure that is.
    """
    here = next(path for path in (stores.absolute(), *stores.absolute().parents) if path.exists())
    free = shutil.disk_usage(here).free
    if needed * SPARE > free:
        raise ConfigError(
            f"targets.path: the teacher's targets take {are}{needed / 1e9:,.1f} GB and {stores} has {free / 1e9:,.1f} GB; "
            "name a larger disk, or targets.mode=live"
        )


def lock_of(folder: Path) -> filelock.BaseFileLock:
    """Whoever fills or removes a store holds it."""
    return filelock.FileLock(folder.with_name(f"{folder.name}.lock"))


@contextmanager
def unless_building(folder: Path) -> Iterator[bool]:
    """Holds the store's lock; False, and not held, where somebody fills it."""
    lock = lock_of(folder)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def remove(folder: Path) -> bool:
    """Take a store away; False where somebody fills it, and it stays."""
    with unless_building(folder) as free:
        if free:
            shutil.rmtree(folder)
        return free

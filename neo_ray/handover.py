"""How do the driver's folders reach machines that share no disk with it? By an object store, and all take the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from neo_ray.parts import SharedCache, Sources, placed
from neo_ray.storage import RECORD, Damaged, Folder, Remote, bring_folder, record_of, recorded, upload_folder
from neo_ray.storehouse import Announce, sole_builder

WAITING = "waiting for another driver, which uploads {place}"


def hand_over(sources: Sources, cache: Folder, announce: Announce) -> Sources:
    """The sources as workers take them: where the cache is an object store, their folders are uploaded, each once.

    Raises:
        Damaged: what was handed over for these sources before cannot be had any more, as another driver's stands in its place.
    """
    if isinstance(cache, Path):
        return sources
    root, records = cache.here.resolve(), dict[str, str]()

    def offered(path: str | None) -> str | None:
        """The path as `SharedCache.bring` knows it: resolved, where it is a folder of the cache; that folder is uploaded."""
        folder = Path(path or "").resolve()
        if path is None or folder == root or not (folder.is_dir() and folder.is_relative_to(root)):
            return path
        name = str(folder.relative_to(root))
        records[name] = _agreed(folder, cache / name, announce)
        return str(folder)

    given = replace(placed(sources, offered), shared=SharedCache(cache.url, cache.scratch, str(root), records))
    for name, record in (sources.shared.records if sources.shared else {}).items():
        if records.get(name) != record:
            raise Damaged(f"{cache / name} is another one than this sweep began with; run it again")
    return given


def _agreed(folder: Path, place: Remote, announce: Announce) -> str:
    """The record of what stands in both. What is there and whole counts: two machines may choose other layers for a student."""
    there = recorded(place)
    if there is not None and there == recorded(folder):
        return there
    with sole_builder(place, announce, WAITING.format(place=place)):
        there, here = recorded(place), record_of(folder)
        if there is not None and there != here:
            announce(f"{folder.name}: another machine made it first; bringing that one from {place}")
            try:
                bring_folder(place, folder, there)
                return there
            except Damaged as error:
                announce(f"{error}; this machine's takes its place")
        if there != here:
            announce(f"uploading {folder.name} to {place}")
            upload_folder(folder, place)
        (folder / RECORD).write_text(here)  # this machine need not bring it
        return here

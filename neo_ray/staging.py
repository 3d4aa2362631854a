"""How does a store of targets in an object store reach the workers? Shard by shard, once a machine, ahead of their use.

A file is whole when its record, `<name>.json`, is there and the sizes agree; whoever brings it looks at its checksum. One that is
not what was written loses its record, so that the next sweep makes it anew.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from neo_ray.inventory import bytes_in
from neo_ray.storage import Damaged, Folder, Remote, alone, bring_file, check_room, checksum, part_of

THREADS = 4
"""Shards that are brought ahead at a time."""
SUFFIX = ".safetensors"


def recorded(place: Remote) -> dict[str, int]:
    """Name → rows of the files that are whole by their records and sizes. Checksums would cost a download."""
    sizes = place.sizes()
    records = place.read_many([name for name in sizes if name.endswith(".json")])
    found = {}
    for name, content in records.items():
        with suppress(ValueError, KeyError, TypeError):
            record, stem = json.loads(content), name.removesuffix(".json")
            if record["bytes"] == sizes.get(stem + SUFFIX):
                found[stem] = int(record["rows"])
    return found


@contextmanager
def written(folder: Folder, name: str) -> Iterator[Path]:
    """A folder to write a file and its record into; what is in it goes to its place at the end, the record last."""
    if isinstance(folder, Path):
        yield folder
        return
    with alone(folder.here / name), part_of(folder.here / f"{name}.new") as part:
        part.mkdir()
        yield part
        for file in sorted(part.iterdir(), key=lambda file: file.suffix == ".json"):
            (folder / file.name).upload(file)


class Staged:
    """The files of a store, brought to this machine by whichever of its processes comes first."""

    def __init__(self, place: Remote, ahead: Sequence[str] = ()) -> None:
        """`ahead`: names to bring in the background, in this order, while others are in use.

        Raises:
            NoRoom: this machine's disk takes no copy of all that stands there.
        """
        self.place, self.folder = place, place.here
        check_room(self.folder, bytes_in(place) - bytes_in(self.folder))
        self.sound: dict[str, Any] = {}
        self.waiting = deque(ahead)
        for _ in range(min(THREADS, len(ahead))):
            threading.Thread(target=self._bring_ahead, daemon=True, name="targets").start()

    def bring(self, name: str) -> dict[str, Any]:
        """The file is in `folder`, as it was written. Returns its record.

        Raises:
            Damaged: what is stored is not what was written.
            NoRoom: the disk took no copy.
        """
        if name not in self.sound:
            with alone(self.folder / name):
                self.sound[name] = self._brought(name)
        return self.sound[name]

    def _brought(self, name: str) -> dict[str, Any]:
        file, remote = self.folder / f"{name}{SUFFIX}", self.place / f"{name}.json"
        try:
            record = json.loads(remote.read_text())
        except (FileNotFoundError, ValueError):
            raise Damaged(f"targets: {self.place / name}{SUFFIX} is not what was written; run the sweep again") from None
        if not (file.exists() and checksum(file) == record["blake2b"]):  # one brought earlier may have been harmed since
            try:
                bring_file(self.place / file.name, file, record["blake2b"])
            except Damaged as error:
                remote.remove()
                raise Damaged(f"targets: {error}; run the sweep again") from None
        return record

    def _bring_ahead(self) -> None:
        """Whatever goes wrong is told to whoever needs the file."""
        with suppress(IndexError):
            while True:
                name = self.waiting.popleft()
                with suppress(Exception):
                    self.bring(name)

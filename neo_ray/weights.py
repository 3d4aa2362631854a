"""Which weights are these? A digest of every byte of a model, remembered so that 16 GB are not read at each start."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from neo_ray.records import write_atomically
from neo_ray.shapes import cached_snapshot

MADE_OF = ("config.json", "*.safetensors.index.json", "*.py", "*.safetensors")
"""A model's files; the code is what it is with `trust_remote_code`. Tokenizers belong to the data."""
SETTLED_SECONDS = 2.0
"""A file younger than this may change once more within one tick of its file system's clock: it is not remembered."""


def identity(model: str, revision: str | None, cache: Path) -> str:
    """What the weights are: a digest of a local folder, the commit of a hub model that is in the hub's cache, else its name.

    Args:
        cache: where digests of files are remembered.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return f"sha256:{digest(folder, [], cache)}"
    snapshot = cached_snapshot(model, revision)
    return f"{model}@{snapshot.name if snapshot else revision or 'main'}"


def digest(folder: Path, choice: list[Any], cache: Path) -> str:
    """Identifies all bytes of a model's folder and a choice, wherever the folder lies."""
    files = sorted({path for pattern in MADE_OF for path in folder.glob(pattern)})
    with ThreadPoolExecutor() as readers:  # hashing lets go of the interpreter: shards are read side by side
        found = list(readers.map(partial(_digest_of_file, cache=cache), files))
    content = [choice, *((path.name, one) for path, one in zip(files, found, strict=True))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _digest_of_file(path: Path, cache: Path) -> str:
    """SHA-256 of a file: as the hub's cache names it, else as remembered, else read."""
    named = _hub_name(path)
    if named:
        return named
    if path.suffix != ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    whole = path.resolve()
    note = cache / "digests" / f"{hashlib.sha256(os.fsencode(whole)).hexdigest()[:32]}.json"
    with open(whole, "rb") as file:  # opened first: NFS then asks its server how the file is by now
        before = _state(file.fileno())
        told = _read(note)
        if told.get("state") == before and "sha256" in told:
            return str(told["sha256"])
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if _state(file.fileno()) == before and _is_settled(before):
            with suppress(OSError):  # a cache that cannot be written remembers nothing
                write_atomically(note, json.dumps({"path": str(whole), "state": before, "sha256": found}))
    return found


def _hub_name(path: Path) -> str | None:
    """A snapshot in the hub's cache links to `blobs/<SHA-256>` where the file is a large one.

    assumption: nobody writes into such a blob. Who saves over the link puts a file in its place, which is read.
    """
    blob = path.resolve()
    is_blob = path.is_symlink() and blob.parent == path.parent.resolve().parents[1] / "blobs"
    return blob.name if is_blob and re.fullmatch("[0-9a-f]{64}", blob.name) else None


def _state(descriptor: int) -> list[int]:
    """What changes with a file's bytes. Unlike the time of change, that of modification can be set back."""
    found = os.fstat(descriptor)
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _is_settled(state: Iterable[int]) -> bool:
    _, _, modified, changed = state
    return time.time_ns() - max(modified, changed) > SETTLED_SECONDS * 1e9


def _read(note: Path) -> dict[str, Any]:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

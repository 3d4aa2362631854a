"""Where is a file kept? In a local folder, or in an object store, from where it is brought to this machine.

`at` gives a `Path` or a `Remote`: what of a path an object store can do, by fsspec. Objects appear whole or not at all. What
belongs together (a folder, a file and its checksum) is whole when its record is there, which is written last. A store that does
not answer is asked again for a bounded time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import filelock
import fsspec
import tenacity

PATIENCE_SECONDS = 600.0
"""For so long an object store may fail before what needs it fails."""
LASTING = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    NotImplementedError,
    ValueError,
    TypeError,
)
"""Errors that asking again does not mend."""
RECORD = "whole.json"
"""In a folder that was uploaded: names, sizes and checksums of its files."""
T = TypeVar("T")


class Damaged(RuntimeError):
    """What is stored is not what was written."""


@dataclass(frozen=True)
class Remote:
    """A place in an object store. Its methods are those of `Path`."""

    url: str
    scratch: str | None = None
    """The setting `storage.scratch`."""
    patience_seconds: float = PATIENCE_SECONDS

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Remote:
        return replace(self, url=f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]

    def with_name(self, name: str) -> Remote:
        return replace(self, url=f"{self.url.rsplit('/', 1)[0]}/{name}")

    @property
    def here(self) -> Path:
        """The folder on this machine where its files are brought to, and are written before they go there."""
        return scratch_folder(self.scratch) / f"{self.name}-{hashlib.blake2b(self.url.encode(), digest_size=6).hexdigest()}"

    def exists(self) -> bool:
        return self._ask("exists")

    def read_bytes(self) -> bytes:
        return self._ask("cat_file")

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_text(self, text: str) -> None:
        self._ask("pipe_file", text.encode())

    def create(self, text: str) -> bool:
        """Write an object that is not there yet; False where it is. Of several that try, one succeeds."""
        try:
            self._ask("pipe_file", text.encode(), mode="create")
        except FileExistsError:
            return False
        return True

    def sizes(self) -> dict[str, int]:
        """Name → bytes of the objects directly below; none where nothing is."""
        try:
            found = self._ask("ls", detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rsplit("/", 1)[1]: int(entry["size"]) for entry in found if entry["type"] == "file"}

    def names(self) -> list[str]:
        """Of objects and folders directly below."""
        try:
            found = self._ask("ls", detail=False)
        except FileNotFoundError:
            return []
        return sorted(filter(None, (name.rstrip("/").rsplit("/", 1)[1] for name in found)))

    def read_many(self, names: list[str]) -> dict[str, bytes]:
        """Name → content of objects directly below, many at a time; one that is gone is left out."""
        fs, root = self._open()
        if not names:
            return {}
        paths = {f"{root}/{name}": name for name in names}
        found = self._patiently(lambda: fs.cat(list(paths), on_error="return"))
        read = {}
        for path, content in found.items():
            if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                content = (self / paths[path]).read_bytes()
            if isinstance(content, bytes):
                read[paths[path]] = content
        return read

    def upload(self, file: Path) -> None:
        fs, path = self._open()
        self._patiently(lambda: fs.put_file(str(file), path))

    def download(self, file: Path) -> None:
        """Whole or not at all."""
        fs, path = self._open()
        file.parent.mkdir(parents=True, exist_ok=True)
        with _part_of(file) as part:
            self._patiently(lambda: fs.get_file(path, str(part)))
            os.replace(part, file)

    def remove(self) -> None:
        """The object, or everything below; nothing where there is nothing."""
        with suppress(FileNotFoundError):
            self._ask("rm", recursive=True)

    def move_to(self, other: Remote) -> None:
        """The object, or everything below: copied, and only then removed."""
        fs, path = self._open()
        for name in self._ask("find"):
            target = other._open()[1] + name[len(path) :]
            self._patiently(partial(fs.cp_file, name, target))
        self.remove()

    def impatient(self, seconds: float) -> Remote:
        return replace(self, patience_seconds=seconds)

    def _open(self) -> tuple[Any, str]:
        return fsspec.core.url_to_fs(self.url, use_listings_cache=False)

    def _ask(self, operation: str, *values: Any, **settings: Any) -> Any:
        fs, path = self._open()
        return self._patiently(lambda: getattr(fs, operation)(path, *values, **settings))

    def _patiently(self, call: Callable[[], T]) -> T:
        attempts = tenacity.Retrying(
            stop=tenacity.stop_after_delay(self.patience_seconds),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=20),
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, LASTING)),
            before_sleep=lambda state: logging.getLogger("neo_ray").warning("%s: %s", self.url, state.outcome),
            reraise=True,
        )
        return attempts(call)


Folder = Path | Remote


def is_url(place: str) -> bool:
    """Does a setting name a place outside this machine's disks?"""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", place) is not None


def at(place: str, scratch: str | None = None) -> Folder:
    """A local folder, or a place in an object store."""
    return Remote(place.rstrip("/"), scratch) if is_url(place) else Path(place).expanduser()


def address(folder: Folder) -> str:
    """The same place in any working folder."""
    return str(folder.resolve() if isinstance(folder, Path) else folder)


def scratch_folder(setting: str | None) -> Path:
    """Of this machine; variables in the setting (`$TMPDIR/…`) have the values that they have here."""
    if setting:
        return Path(os.path.expandvars(setting)).expanduser()
    return Path(tempfile.gettempdir()) / f"neo_ray-{os.getuid()}"


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Of the processes of this machine that would make or bring the same thing, one at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        yield


def upload_folder(folder: Path, place: Remote) -> None:
    """All files of a folder, and last the record that makes them whole; what was there before is none until then."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    (place / RECORD).remove()
    for path in files:
        (place / str(path.relative_to(folder))).upload(path)
    listed = {str(path.relative_to(folder)): [path.stat().st_size, checksum(path)] for path in files}
    (place / RECORD).write_text(json.dumps(listed))


def bring_folder(place: Remote, folder: Path) -> bool:
    """Make a local folder what was uploaded, once for all processes of this machine. False where nothing whole is there.

    Raises:
        Damaged: a file is not what was uploaded.
    """
    try:
        record = (place / RECORD).read_text()
    except FileNotFoundError:
        return False
    with alone(folder):
        if _is_record(folder / RECORD, record):
            return True
        with _part_of(folder) as part:
            for name, (_, expected) in json.loads(record).items():
                bring_file(place / name, part / name, expected)
            (part / RECORD).write_text(record)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(part, folder)
    return True


def bring_file(place: Remote, file: Path, expected: str) -> None:
    """Download a file of a known checksum; once more where what arrives is another.

    Raises:
        Damaged: it is another both times, or is not there.
    """
    for _ in range(2):
        try:
            place.download(file)
        except FileNotFoundError:
            break
        if checksum(file) == expected:
            return
        file.unlink()
    raise Damaged(f"{place} is not what was written")


def _is_record(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


@contextmanager
def _part_of(path: Path) -> Iterator[Path]:
    """A name beside it, for what is not whole yet; nothing is left there."""
    part = path.with_name(f".part-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)

"""Where is a file kept? In a local folder, or in an object store, from where it is brought to this machine.

`at` gives a `Path` or a `Remote`: what of a path an object store can do, by fsspec. Objects appear whole or not at all. What
belongs together (a folder, a file and its checksum) is whole when its record is there, which is written last. A store that does
not answer is asked again for a bounded time.
"""

from __future__ import annotations

import errno
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
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Numbers of a disk's errors that it does not mend either."""
RECORD = "whole.json"
"""In a folder that was uploaded: names, sizes and checksums of its files."""
PART = ".part-"
"""Beginning of the names of what is not whole yet."""
T = TypeVar("T")


class Damaged(RuntimeError):
    """What is stored is not what was written."""


class NoRoom(OSError):
    """A disk of this machine takes no copy of what an object store holds."""

    def __str__(self) -> str:
        return str(self.strerror)


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

    def copies(self) -> list[Path]:
        """`here` of each place directly below of which this machine has files. Asks nobody else."""
        found = scratch_folder(self.scratch).glob("*-*/")
        return sorted(path for path in found if (self / path.name.rpartition("-")[0]).here == path)

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
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with part_of(file) as part:
                self._patiently(lambda: fs.get_file(path, str(part)))
                os.replace(part, file)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise no_room(file.parent, int(self._ask("size"))) from error

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
            retry=tenacity.retry_if_exception(_passes),
            before_sleep=lambda state: logging.getLogger("neo_ray").warning("%s: %s", self.url, state.outcome),
            reraise=True,
        )
        return attempts(call)


def _passes(error: BaseException) -> bool:
    """May asking again mend it?"""
    return isinstance(error, Exception) and not isinstance(error, LASTING) and getattr(error, "errno", None) not in FULL


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


def free_bytes(folder: Path) -> int:
    """Of the disk of a folder, which need not be there yet."""
    here = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(here).free


def no_room(folder: Path, wanted_bytes: int) -> NoRoom:
    sizes = f"{wanted_bytes:,} bytes wanted, {free_bytes(folder):,} bytes free"
    return NoRoom(errno.ENOSPC, f"storage.scratch: {folder}: {sizes}; name a folder on a larger disk")


def check_room(folder: Path, wanted_bytes: int) -> None:
    """Raises NoRoom where its disk has less free."""
    if wanted_bytes > free_bytes(folder):
        raise no_room(folder, wanted_bytes)


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Of the processes of this machine that would make or bring the same thing, one at a time. Parts of a killed one's go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = re.compile(re.escape(f"{PART}{path.name}") + r"(\..+)?-[0-9a-f]{8}")
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        for left in filter(lambda one: part.fullmatch(one.name), path.parent.glob(f"{PART}*")):
            _remove(left)
        yield


def record_of(folder: Path) -> str:
    """What `RECORD` says of a folder, from its files as they are."""
    listed = {str(path.relative_to(folder)): [path.stat().st_size, checksum(path)] for path in _files_of(folder)}
    return json.dumps(listed)


def recorded(place: Folder) -> str | None:
    """The record that stands with a folder; None without one."""
    try:
        return (place / RECORD).read_text()
    except FileNotFoundError:
        return None


def upload_folder(folder: Path, place: Remote) -> None:
    """All files of a folder, and last the record that makes them whole; what was there before is none until then."""
    (place / RECORD).remove()
    for path in _files_of(folder):
        (place / str(path.relative_to(folder))).upload(path)
    (place / RECORD).write_text(record_of(folder))


def bring_folder(place: Remote, folder: Path, record: str | None = None) -> bool:
    """Make a local folder what was uploaded, once for all processes of this machine. False where nothing whole is there.

    Args:
        record: of the files to bring; without it the one that stands there.

    Raises:
        Damaged: a file is not what was uploaded.
    """
    record = recorded(place) if record is None else record
    if record is None:
        return False
    with alone(folder):
        if recorded(folder) == record:
            return True
        files = json.loads(record)
        check_room(folder, sum(size for size, _ in files.values()))
        with part_of(folder) as part:
            for name, (_, expected) in files.items():
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


def _files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)


@contextmanager
def part_of(path: Path) -> Iterator[Path]:
    """A name beside it, for what is not whole yet; nothing is left there."""
    part = path.with_name(f"{PART}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        yield part
    finally:
        _remove(part)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)

"""Who drives this sweep? A lease with a heartbeat keeps two drivers off one results folder."""

from __future__ import annotations

import _thread
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from neo_ray.settings import ConfigError
from neo_ray.storage import Folder, Remote

HEARTBEAT_SECONDS = 10.0
SILENCE_SECONDS = 60.0


class Held(ConfigError):
    """Another driver is at work."""


class LeaseLost(RuntimeError):
    """Another driver took this sweep over."""


@contextmanager
def lease(folder: Folder, silence_seconds: float = SILENCE_SECONDS) -> Iterator[threading.Event]:
    """Hold `<folder>/lease.json`. A dead process on this host or silence is taken over; a living driver is refused.

    Gives an event that is set when another driver took the lease (this one was thought dead): write nothing more. Where the
    main thread holds it, that is interrupted then.

    Raises:
        Held: another driver is at work.
        LeaseLost: in place of that interrupt, or at the end of another thread, which nothing interrupts.
    """
    held, nonce = _place(folder), uuid.uuid4().hex
    while not held.create(nonce):
        held.set_aside(refuse_if_held(folder, silence_seconds))
    ended, lost = threading.Event(), threading.Event()
    taken = LeaseLost(f"another driver took {folder} over, as this one was thought dead")
    in_main = threading.current_thread() is threading.main_thread()
    thread = threading.Thread(target=_beat, args=(held, nonce, ended, lost, in_main), daemon=True)
    thread.start()
    try:
        yield lost
        if lost.is_set() and not in_main:
            raise taken
    except KeyboardInterrupt:
        if lost.is_set():
            raise taken from None
        raise
    finally:
        ended.set()
        thread.join()
        with suppress(Exception):  # what is left is taken over
            if (held.read() or {}).get("nonce") == nonce:
                held.remove()


def refuse_if_held(folder: Folder, silence_seconds: float = SILENCE_SECONDS) -> dict[str, Any] | None:
    """Raises Held where a living driver holds the folder; else returns the abandoned lease, if there is one.

    A lease of another host is watched for as long as a driver may be silent: its clock may be another one than ours.
    """
    place = _place(folder)
    held = place.read()
    if held is None or _dead_here(held):
        return held
    deadline = time.monotonic() + silence_seconds
    while held.get("host") != socket.gethostname() and time.monotonic() < deadline:
        time.sleep(min(1.0, silence_seconds / 10))
        found = place.read()
        if found is None:
            return None
        if found != held:
            held = found
            break
    else:
        if held.get("host") != socket.gethostname() or time.time() - held.get("beat", 0) > silence_seconds:
            return held
    raise Held(
        f"storage.path: another driver runs this sweep (process {held.get('pid')} on {held.get('host')}); wait for it, or end it"
    )


def holder(folder: Folder, silence_seconds: float = SILENCE_SECONDS) -> dict[str, Any] | None:
    """Who drives a sweep, at a glance: host, pid, since (Unix time of the process's start), silent_seconds. None: nobody does.

    A driver of another host that was silent for too long counts as gone, by this host's clock.
    """
    held = _place(folder).read()
    if held is None or _dead_here(held):
        return None
    silent = max(0.0, time.time() - held.get("beat", 0))
    if silent > silence_seconds and held.get("host") != socket.gethostname():
        return None
    return {"host": held.get("host"), "pid": held.get("pid"), "since": held.get("born"), "silent_seconds": silent}


class _OnDisk:
    """The lease is a file: a hard link never replaces one, and of several that rename it one succeeds."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lease.json"

    def read(self) -> dict[str, Any] | None:
        return _read(self.path)

    def create(self, nonce: str) -> bool:
        """Whole or not at all, and only where there is none."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".lease-{nonce}")
        part.write_text(json.dumps(_content(nonce)))
        try:
            os.link(part, self.path)
            return True
        except FileExistsError:
            return False
        finally:
            part.unlink(missing_ok=True)

    def set_aside(self, held: dict[str, Any] | None) -> None:
        """Take an abandoned lease away. A new one taken by mistake is put back."""
        aside = self.path.with_name(f".lease-abandoned-{uuid.uuid4().hex}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        taken = _read(aside)
        if taken is not None and held is not None and taken.get("nonce") != held.get("nonce"):
            try:
                os.link(aside, self.path)
            except FileExistsError:
                pass
        aside.unlink(missing_ok=True)

    def renew(self, nonce: str) -> None:
        part = self.path.with_name(f".lease-{nonce}")
        part.write_text(json.dumps(_content(nonce)))
        os.replace(part, self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class _InObjects:
    """The lease is the object of the highest number. Nothing renames there: an abandoned one is taken over by the next number,
    which of several that try one creates."""

    def __init__(self, folder: Remote) -> None:
        self.folder = folder.impatient(HEARTBEAT_SECONDS)
        self.name, self.abandoned = "", ""

    def read(self) -> dict[str, Any] | None:
        name = self._highest()
        return self._content_of(name) if name else None

    def create(self, nonce: str) -> bool:
        """Only where there is none, or in the place of the one set aside."""
        before = self._highest()
        if before and (self._content_of(before) or {}).get("nonce") != self.abandoned:
            return False
        self.name = f"lease-{int(before[6:12]) + 1 if before else 1:06d}.json"
        if not (self.folder / self.name).create(json.dumps(_content(nonce))):
            return (self._content_of(self.name) or {}).get("nonce") == nonce  # an answer was lost, and it was asked again
        if self._highest() != self.name or (before and (self._content_of(before) or {}).get("nonce") != self.abandoned):
            self.remove()  # another was quicker
            return False
        if before:
            (self.folder / before).remove()
        return True

    def set_aside(self, held: dict[str, Any] | None) -> None:
        self.abandoned = (held or {}).get("nonce", "")

    def renew(self, nonce: str) -> None:
        (self.folder / self.name).write_text(json.dumps(_content(nonce)))

    def remove(self) -> None:
        (self.folder / self.name).remove()

    def _highest(self) -> str:
        return max((name for name in self.folder.sizes() if name.startswith("lease-")), default="")

    def _content_of(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return None


def _place(folder: Folder) -> _OnDisk | _InObjects:
    return _InObjects(folder) if isinstance(folder, Remote) else _OnDisk(folder)


def _content(nonce: str) -> dict[str, Any]:
    process = psutil.Process()
    return {"nonce": nonce, "host": socket.gethostname(), "pid": process.pid, "born": process.create_time(), "beat": time.time()}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _dead_here(held: dict[str, Any]) -> bool:
    """The driver was a process of this host, and is none any more."""
    if held.get("host") != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(held["pid"]).create_time() - held["born"]) > 1  # the number was given to another process
    except (psutil.NoSuchProcess, KeyError):
        return True


def _beat(place: _OnDisk | _InObjects, nonce: str, ended: threading.Event, lost: threading.Event, in_main: bool) -> None:
    """A sign of life every few seconds. Storage may fail for a while: the lease is lost only to another driver."""
    while not ended.wait(HEARTBEAT_SECONDS):
        try:
            held = place.read()
            if held is not None and held.get("nonce") != nonce:
                lost.set()
                if in_main:
                    _thread.interrupt_main()
                return
            place.renew(nonce)
        except Exception as error:
            logging.getLogger("neo_ray").warning("the lease could not be renewed: %s", error)

"""Who drives this sweep? A lease with a heartbeat keeps two drivers off one results folder."""

from __future__ import annotations

import _thread
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from neo_ray.settings import ConfigError

HEARTBEAT_SECONDS = 10.0
SILENCE_SECONDS = 60.0


class LeaseLost(RuntimeError):
    """Another driver took this sweep over."""


@contextmanager
def lease(folder: Path, silence_seconds: float = SILENCE_SECONDS) -> Iterator[threading.Event]:
    """Hold `<folder>/lease.json`. A dead process on this host or silence is taken over; a living driver is refused.

    Gives an event that is set when another driver took the lease (this one was thought dead): write nothing more. The main
    thread is interrupted then.

    Raises:
        ConfigError: another driver is at work.
        LeaseLost: in place of that interrupt.
    """
    path, nonce = folder / "lease.json", uuid.uuid4().hex
    folder.mkdir(parents=True, exist_ok=True)
    while not _create(path, nonce):
        _set_aside(path, refuse_if_held(folder, silence_seconds))
    ended, lost = threading.Event(), threading.Event()
    thread = threading.Thread(target=_beat, args=(path, nonce, ended, lost), daemon=True)
    thread.start()
    try:
        yield lost
    except KeyboardInterrupt:
        if lost.is_set():
            raise LeaseLost(f"another driver took {folder} over, as this one was thought dead") from None
        raise
    finally:
        ended.set()
        thread.join()
        held = _read(path)
        if held is not None and held.get("nonce") == nonce:
            path.unlink(missing_ok=True)


def refuse_if_held(folder: Path, silence_seconds: float = SILENCE_SECONDS) -> dict[str, Any] | None:
    """Raises ConfigError where a living driver holds the folder; else returns the abandoned lease, if there is one.

    A lease of another host is watched for as long as a driver may be silent: its clock may be another one than ours.
    """
    path = folder / "lease.json"
    held = _read(path)
    if held is None or _dead_here(held):
        return held
    deadline = time.monotonic() + silence_seconds
    while held.get("host") != socket.gethostname() and time.monotonic() < deadline:
        time.sleep(min(1.0, silence_seconds / 10))
        found = _read(path)
        if found is None:
            return None
        if found != held:
            held = found
            break
    else:
        if held.get("host") != socket.gethostname() or time.time() - held.get("beat", 0) > silence_seconds:
            return held
    raise ConfigError(
        f"storage.path: another driver runs this sweep (process {held.get('pid')} on {held.get('host')}); wait for it, or end it"
    )


def _create(path: Path, nonce: str) -> bool:
    """Whole or not at all, and only where there is none: a hard link never replaces."""
    part = path.with_name(f".lease-{nonce}")
    part.write_text(json.dumps(_content(nonce)))
    try:
        os.link(part, path)
        return True
    except FileExistsError:
        return False
    finally:
        part.unlink(missing_ok=True)


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


def _set_aside(path: Path, held: dict[str, Any] | None) -> None:
    """Take an abandoned lease away; of several that try, one succeeds. A new one taken by mistake is put back."""
    aside = path.with_name(f".lease-abandoned-{uuid.uuid4().hex}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    taken = _read(aside)
    if taken is not None and held is not None and taken.get("nonce") != held.get("nonce"):
        try:
            os.link(aside, path)
        except FileExistsError:
            pass
    aside.unlink(missing_ok=True)


def _beat(path: Path, nonce: str, ended: threading.Event, lost: threading.Event) -> None:
    """A sign of life every few seconds. Storage may fail for a while: the lease is lost only to another driver."""
    while not ended.wait(HEARTBEAT_SECONDS):
        held = _read(path)
        if held is not None and held.get("nonce") != nonce:
            lost.set()
            _thread.interrupt_main()
            return
        part = path.with_name(f".lease-{nonce}")
        try:
            part.write_text(json.dumps(_content(nonce)))
            os.replace(part, path)
        except OSError:
            continue

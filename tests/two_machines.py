"""Two machines with a network file system in common: does one drive a sweep, one fill a store, and each read the other's?

`python tests/two_machines.py WHERE WHERE`: the folder as each of them sees it, and in ONE and TWO a command line's beginning that
runs there. test_nfs.py has machines whose file system is NFS; on a disk of this machine the same must hold.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import neo_ray.lease
from neo_ray.lease import Held, LeaseLost, lease
from neo_ray.records import Journal, write_atomically
from neo_ray.storage import checksum
from neo_ray.storehouse import sole_builder
from neo_ray.stores import Shard, write_shard

SHARDS, ROUNDS, SILENCE_SECONDS = 12, 5, 8.0
neo_ray.lease.HEARTBEAT_SECONDS = 1.0  # ten times as fast, both
SECONDS = 240


def meet(folder: Path) -> None:
    """Until both are here: one may take longer to import than the other takes for all that it does."""
    (folder / f"here-{os.uname().nodename}-{os.getpid()}").touch()
    while len(list(folder.glob("here-*"))) < 2:
        time.sleep(0.05)


def drive(folder: Path) -> None:
    """Hold the lease so often, however often it is refused; what is in the journal was written by whoever held it."""
    meet(folder)
    held, until = 0, time.monotonic() + SECONDS
    while held < ROUNDS and time.monotonic() < until:
        try:
            with lease(folder, SILENCE_SECONDS):
                journal = Journal(folder)
                for what in ("start", "end"):
                    journal.write(what, "0000", by=[os.uname().nodename, os.getpid()])
                    time.sleep(0.05)
            held += 1
            time.sleep(0.5)  # the other's turn
        except Held:
            time.sleep(0.05)


def ask(folder: Path) -> None:
    try:
        with lease(folder, SILENCE_SECONDS):
            print("taken")
    except Held:
        print("refused")


def hold(folder: Path) -> None:
    """Hold it until it is lost, or a minute has gone."""
    try:
        with lease(folder, SILENCE_SECONDS):
            print("held", flush=True)
            time.sleep(60)
    except LeaseLost:
        print("lost", flush=True)


def hold_after(folder: Path) -> None:
    """Hold it, as soon as nobody is heard of."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        try:
            return hold(folder)
        except Held:
            time.sleep(0.2)


def fill_at_once(folder: Path) -> None:
    meet(folder.parent)
    fill(folder)


def fill(folder: Path) -> None:
    """Fill what is missing of a store, slowly, and read all of it."""
    with sole_builder(folder, lambda _: None):
        for number in range(SHARDS):
            shard = Shard("train", number, 8 * number, 8 * number + 8)
            if not (folder / f"{shard.name}.json").exists():
                write_shard(folder, shard, {"rows": torch.full((8, 64), number, dtype=torch.float16)}, {"by": os.getpid()})
                print(shard.name, flush=True)
                time.sleep(0.1)
    for number in range(SHARDS):
        record = json.loads((folder / f"train-{number:05d}.json").read_text())
        assert checksum(folder / f"train-{number:05d}.safetensors") == record["blake2b"]


def write(folder: Path) -> None:
    for number in range(200):
        write_atomically(folder / "state.json", json.dumps({"number": number, "filling": "x" * 5000}))
    print("written", flush=True)


def read(folder: Path) -> None:
    """Never a part, never an older one after a newer, and the last one at last."""
    last, until = -1, time.monotonic() + SECONDS
    while last < 199 and time.monotonic() < until:
        try:
            found = json.loads((folder / "state.json").read_text())["number"]
        except FileNotFoundError:
            continue
        assert found >= last, f"{found} after {last}"
        last = found
    assert last == 199, last
    print("read", flush=True)


ROLES = {role.__name__: role for role in (drive, ask, hold, hold_after, fill, fill_at_once, write, read)}


def begin(where: str, folder: Path, role: str) -> subprocess.Popen[str]:
    command = [*shlex.split(os.environ.get(where, "")), sys.executable, __file__, role, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def ended(*processes: subprocess.Popen[str]) -> list[list[str]]:
    """The words that each has said."""
    said = [process.communicate(timeout=SECONDS)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


def main(one: Path, two: Path) -> None:
    for name in ("race", "killed", "stopped", "store", "half", "words"):
        (one / name).mkdir()

    both = begin("ONE", one / "race", "drive"), begin("TWO", two / "race", "drive")
    ended(*both)
    events = [(event["event"], event["by"]) for event in Journal(two / "race").events()]
    pairs = list(zip(events[::2], events[1::2], strict=True))
    assert len(pairs) == 2 * ROUNDS and len({str(who) for _, who in events}) == 2, events
    assert all(begun == ("start", pid) and end == ("end", pid) for begun, end in pairs for pid in [begun[1]]), events

    holder = begin("ONE", one / "killed", "hold")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert ended(begin("TWO", two / "killed", "ask")) == [["refused"]], "while it lives"
    os.killpg(holder.pid, signal.SIGKILL)
    taker = begin("TWO", two / "killed", "hold_after")
    assert taker.stdout is not None and taker.stdout.readline() == "held\n"
    os.killpg(taker.pid, signal.SIGKILL)

    holder = begin("ONE", one / "stopped", "hold")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    os.killpg(holder.pid, signal.SIGSTOP)
    taker = begin("TWO", two / "stopped", "hold_after")
    assert taker.stdout is not None and taker.stdout.readline() == "held\n", "silence is taken for death"
    os.killpg(holder.pid, signal.SIGCONT)
    assert holder.communicate(timeout=SECONDS)[0] == "lost\n", "and the one that was thought dead writes nothing more"
    os.killpg(taker.pid, signal.SIGKILL)

    filled = ended(begin("ONE", one / "store" / "x", "fill_at_once"), begin("TWO", two / "store" / "x", "fill_at_once"))
    names = sorted(filled[0] + filled[1])
    assert names == [f"train-{number:05d}" for number in range(SHARDS)], "each once, by either"
    killed = begin("ONE", one / "half" / "x", "fill")
    assert killed.stdout is not None and killed.stdout.readline()
    os.killpg(killed.pid, signal.SIGKILL)
    (rest,) = ended(begin("TWO", two / "half" / "x", "fill"))
    assert 0 < len(rest) < SHARDS, "the lock of a killed builder is free, and what it has filled stays"

    assert ended(begin("ONE", one / "words", "write"), begin("TWO", two / "words", "read")) == [["written"], ["read"]]
    print("two machines: all held")


def run(arguments: Sequence[str]) -> None:
    if arguments[0] in ROLES:
        ROLES[arguments[0]](Path(arguments[1]))
    else:
        main(*map(Path, arguments))


if __name__ == "__main__":
    run(sys.argv[1:])

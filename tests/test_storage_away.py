"""What becomes of trials under which storage fails? None is lost, whether it is back in time or the same command is run again."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from doors import finish, start, sweep_file, wait_for
from moto.server import ThreadedMotoServer
from test_faults import FAULT, LONG
from tiny import World

from neo_ray.records import Journal, fold, load_records
from neo_ray.storage import Remote

FULL_DISK = """
target = "neo_ray.checkpoints"

def inject(checkpoints):
    import errno, pathlib
    save_file = checkpoints.save_file

    def full(tensors, path):
        if pathlib.Path(__file__).with_name("failing").exists():
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    checkpoints.save_file = full
"""
AWAY = """
target = "neo_ray.uploads"

def inject(uploads):
    import pathlib
    plain = uploads.publish_checkpoint

    def away(results, trial):
        if pathlib.Path(__file__).with_name("failing").exists():
            from botocore.exceptions import EndpointConnectionError
            raise EndpointConnectionError(endpoint_url="http://store")
        plain(results, trial)

    uploads.publish_checkpoint = away
"""


def a_port_that_stays() -> int:
    """A free one that no socket is given by chance while nobody listens there."""
    for port in range(21_000 + os.getpid() % 1000, 32_000):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "words"), [(FULL_DISK, "No space left on device"), (AWAY, "Could not connect")])
def test_where_no_slot_can_write_the_sweep_ends_and_the_same_command_completes_it(
    tiny_world: World, tmp_path: Path, fault: str, words: str
) -> None:
    """The store past its patience, or a full disk: each trial is set back, and none FAILED though `max_failures` is 0."""
    (tmp_path / "sitecustomize.py").write_text(FAULT + fault)
    resources: dict[str, Any] = {"concurrency": 1, "max_failures": 0}
    path = sweep_file(tiny_world, tmp_path, **LONG, resources=resources)
    results = tmp_path / "results" / "tiny"

    (tmp_path / "failing").touch()
    process = start(path, also_import=tmp_path)
    text = finish(process)
    assert process.returncode == 1 and "Traceback" not in text, text
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    assert "workers cannot be kept alive" in line and words in line
    records = load_records(results)
    assert {r.state for r in records} == {"RUNNING"} and {a["cause"] for r in records for a in r.lost_attempts} == {"storage"}
    assert not list(results.glob("trials/*/checkpoint/.part-*")), "half of a checkpoint takes no room"
    assert words in (results / "trials" / "0000" / "rank-0.log").read_text()

    (tmp_path / "failing").unlink()
    process = start(path, also_import=tmp_path)
    text = finish(process)
    assert process.returncode == 0, text
    records = load_records(results)
    assert [r.state for r in records] == ["COMPLETE", "COMPLETE"]
    assert [row["rung"] for row in records[0].curve] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_store_that_is_away_for_a_while_costs_no_attempt(
    tiny_world: World, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Journal, lease, checkpoints and adapters are in it. Another server comes to the same port, with what the first one held."""
    first = ThreadedMotoServer(ip_address="127.0.0.1", port=a_port_that_stays(), verbose=False)
    first.start()
    host, port = first.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    storage = {"path": f"{bucket}/results", "cache": str(tmp_path / "cache"), "scratch": str(tmp_path / "scratch")}
    process = start(sweep_file(tiny_world, tmp_path, **LONG, storage=storage, resources={"concurrency": 1}))
    results = Remote(f"{bucket}/results/tiny")
    wait_for(lambda: any(record.curve for record in fold(Journal(results).events())), process)
    first.stop()
    time.sleep(15)  # a quarter of what a lease may be silent for
    second = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    second.start()
    text = finish(process)
    assert process.returncode == 0, text
    records = fold(Journal(results).events())
    assert [(r.state, r.attempts, r.lost_attempts) for r in records] == [("COMPLETE", 1, []), ("COMPLETE", 1, [])]
    assert (results / records[0].details["log"]).exists()
    second.stop()

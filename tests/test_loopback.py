"""Does the literal sequence of README.md work: `ray up`, a sweep, Ctrl-C, its results, `ray down`? And a head that dies?

Reference: the commands of README.md on deploy/local.yaml, over ssh to three addresses of this machine: a head and two workers.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import shutil
import struct
import subprocess
import tempfile
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from doors import ROOT, sweep_file
from loopback import ADDRESSES, LACKING, Loopback, end, in_use, machines, marked, rays, wait_until
from tiny import World

from neo_ray.records import TrialRecord, load_records

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

README = (ROOT / "README.md").read_text(encoding="utf-8")
UP, DOWN = "ray up deploy/local.yaml", "ray down deploy/local.yaml"
SWEEP = "ray exec deploy/local.yaml --tmux 'cd ~/neo_ray && python -m neo_ray.sweep sweeps/rank.yaml'"
STATUS = "ray exec deploy/local.yaml 'cd ~/neo_ray && python -m neo_ray.status results/rank'"
JOB = (
    "ray job submit --address http://127.0.0.1:8265 --submission-id rank"
    " -- bash -c 'cd ~/neo_ray && python -m neo_ray.sweep sweeps/rank.yaml'"
)


@pytest.fixture
def cluster(tiny_world: World, tmp_path: Path) -> Iterator[Loopback]:
    if LACKING:
        pytest.skip(f"not here: {', '.join(LACKING)}")
    folder = Path(tempfile.mkdtemp(prefix="nr", dir="/tmp"))
    try:
        with machines(folder, ROOT / "deploy" / "local.yaml") as found:
            sweep = sweep_file(
                tiny_world,
                tmp_path,
                name="rank",
                training={"steps": 500, "batch_size": 4, "micro_batch_size": 2, "dtype": "fp32", "learning_rate": "1e-2"},
                scheduler={"name": "none"},
                resources={"address": "auto"},
                storage={"path": "results"},
            )
            found.write_project(sweep)
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def literal(command: str) -> str:
    """A command that stands in README.md, for that file of a cluster or for cluster.yaml."""
    assert command in README or command.replace("deploy/local.yaml", "cluster.yaml") in README, command
    return command


def records_of(results: Path) -> list[TrialRecord]:
    try:
        return load_records(results / "rank")
    except ValueError:
        return []


def press_ctrl_c(cluster: Loopback, command: str, when: Callable[[], bool]) -> None:
    """Attach to the sweep's terminal as a person does, and end the sweep there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    os.set_blocking(ours, False)
    shown = bytearray()

    def sees(text: bytes) -> bool:
        with contextlib.suppress(BlockingIOError):
            shown.extend(os.read(ours, 2**16))
        return text in shown

    place = {"env": cluster.environment, "cwd": cluster.launcher, "start_new_session": True}
    process = subprocess.Popen(["bash", "-c", f"exec {command}"], stdin=theirs, stdout=theirs, stderr=theirs, **place)
    try:
        wait_until(lambda: sees(b"rank") and when(), "the trials train", 150)
        os.write(ours, b"\x03")
        wait_until(lambda: sees(b"interrupted"), "the sweep ends", 90)
    finally:
        end([psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)])
        os.close(ours)
        os.close(theirs)


def test_the_sequence_of_the_readme(cluster: Loopback) -> None:
    results = cluster.shared / "results"
    cluster.run(literal("ray get-auth-token --generate > /dev/null"))
    cluster.run(f"{literal(UP)} --yes")
    listed = literal("ray exec deploy/local.yaml 'ray list nodes'")
    wait_until(lambda: cluster.run(listed, check=False).count("ALIVE") == 3, "all machines are listed", 120)

    cluster.run(literal(SWEEP))
    both_train = lambda: [len(record.curve) > 0 for record in records_of(results)] == [True, True]  # noqa: E731
    press_ctrl_c(cluster, literal("ray attach deploy/local.yaml --tmux"), both_train)
    assert "nobody drives it" in cluster.run(literal(STATUS), check=False)
    before = records_of(results)
    assert [record.state for record in before] == ["RUNNING", "RUNNING"]

    cluster.run(literal(SWEEP))
    longer = lambda: [len(r.curve) > len(b.curve) for r, b in zip(records_of(results), before, strict=False)]  # noqa: E731
    wait_until(lambda: longer() == [True, True], "the trials go on", 150)
    head = cluster.home(ADDRESSES[0])
    for process in marked(cluster.mark, head):  # the machine goes down, with Ray's head and the sweep's driver
        with contextlib.suppress(psutil.Error):
            process.kill()
    reached = {record.id: record.curve[-1]["step"] for record in records_of(results)}
    wait_until(lambda: not rays(cluster.mark), "the other machines notice", 90)
    cluster.run(f"{literal(UP)} --yes")
    wait_until(lambda: cluster.run(listed, check=False).count("ALIVE") == 3, "all machines are listed again", 120)

    tunnel = f"{literal('ray dashboard deploy/local.yaml')} --port {cluster.tunnel_port} --remote-port {cluster.dashboard_port}"
    door = subprocess.Popen(["bash", "-c", f"exec {tunnel}"], env=cluster.environment, cwd=cluster.launcher)
    try:
        wait_until(lambda: in_use(cluster.tunnel_port), "the tunnel stands", 40)
        text = cluster.run(literal(JOB).replace("8265", str(cluster.tunnel_port)), seconds=400)
        assert "succeeded" in text and "2 trials at a time" in text, text
    finally:
        door.terminate()
        door.wait(10)

    cluster.run(literal("ray rsync-down deploy/local.yaml '~/neo_ray/results/' results/"))
    records = records_of(cluster.launcher / "results")
    assert [record.state for record in records] == ["COMPLETE", "COMPLETE"]
    assert {record.details["node"] for record in records} == set(ADDRESSES[1:])
    assert all(record.details["resumed_from_step"] >= reached[record.id] > 0 for record in records)
    assert [[lost["cause"] for lost in record.lost_attempts] for record in records] == [["interrupted"] * 2] * 2
    assert (cluster.launcher / "results" / "rank" / "report.md").exists()

    cluster.run(f"{literal(DOWN)} --yes")
    assert not rays(cluster.mark, head)
    wait_until(lambda: not rays(cluster.mark), "no Ray is left on any machine", 60)

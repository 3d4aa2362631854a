"""Nodes come and go while a sweep runs: what is lost with one goes on elsewhere, and what comes is put to work."""

from __future__ import annotations

import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from doors import finish, start, sweep_file
from tiny import World

from neo_ray.records import TrialRecord, load_records

pytestmark = [pytest.mark.cluster]

STEPS = 400
LONG: dict[str, Any] = {
    "training": {"steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "dtype": "fp32"},
    "scheduler": {"name": "none"},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head that offers no CPU, on ports and in a folder of its own; each test brings its nodes."""
    import ray
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_MODE", "disabled")
    patch.setenv("RAY_health_check_period_ms", "500")
    patch.setenv("RAY_health_check_timeout_ms", "500")
    folder = tmp_path_factory.mktemp("r")
    patch.setenv("HOME", str(folder))
    short = tempfile.mkdtemp(prefix="nodes-", dir="/tmp")  # a socket's path has at most 107 characters
    patch.setenv("RAY_TMPDIR", short)  # else every Ray that is started on this machine meanwhile joins this cluster
    cluster = Cluster()
    with socket.socket() as probe:  # Ray takes a port that it is given, or none
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cluster.add_node(num_cpus=0, include_dashboard=True, dashboard_port=port)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(short, ignore_errors=True)
    patch.undo()


def wait_for(condition: Callable[[], object], process: Any, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.1)


def file_of(world: World, folder: Path, address: str, trials: int, **changes: Any) -> Path:
    resources = {"address": address, **changes.pop("resources", {})}
    changes = {**LONG, **changes, "sampler": {"name": "tpe", "num_trials": trials}, "resources": resources}
    return sweep_file(world, folder, **changes)


def records_of(folder: Path) -> list[TrialRecord]:
    try:
        return load_records(folder / "results" / "tiny")
    except ValueError:
        return []


def rungs(folder: Path) -> list[int]:
    return [len(record.curve) for record in records_of(folder)]


def test_a_node_that_dies_takes_no_trial_with_it_and_one_that_comes_gets_a_slot(
    cluster: Any, tiny_world: World, tmp_path: Path
) -> None:
    first = cluster.add_node(num_cpus=1)
    process = start(file_of(tiny_world, tmp_path, cluster.address, trials=2))
    wait_for(lambda: any(n >= 1 for n in rungs(tmp_path)), process)
    second = cluster.add_node(num_cpus=1)
    wait_for(lambda: sum(not r.finished for r in records_of(tmp_path)) == 2, process)
    cluster.remove_node(first, allow_graceful=False)
    text = finish(process)
    assert process.returncode == 0, text
    records = records_of(tmp_path)
    assert [r.state for r in records] == ["COMPLETE"] * 2, text
    lost = [r for r in records if r.lost_attempts]
    assert len(lost) == 1 and lost[0].lost_attempts[0]["cause"] == "preempted" and lost[0].attempts == 2, text
    assert lost[0].details["resumed_from_step"] >= STEPS // 4
    assert "holds 2 trials at a time now (1 before)" in text and "holds 1 trials at a time now (2 before)" in text
    assert "1 preempted (trials" in (tmp_path / "results" / "tiny" / "report.md").read_text()
    cluster.remove_node(second, allow_graceful=False)


def test_a_node_that_is_told_to_leave_loses_no_step_though_it_was_the_last(
    cluster: Any, tiny_world: World, tmp_path: Path
) -> None:
    import ray
    from ray.core.generated import autoscaler_pb2

    spot = cluster.add_node(num_cpus=1)
    longer = {"training": {**LONG["training"], "steps": 800}, "evaluation": {"points": 2}}
    process = start(file_of(tiny_world, tmp_path, cluster.address, trials=2, **longer))
    log = tmp_path / "results" / "tiny" / "logs" / "slot-0-rank-0.log"
    wait_for(lambda: log.exists() and "trial 0000 begins" in log.read_text() and rungs(tmp_path) == [1], process)
    notice = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int(1000 * (time.time() + 60))
    accepted, why = ray._raylet.GcsClient(address=cluster.address).drain_node(spot.node_id, notice, "spot", deadline_ms)
    assert accepted, why
    wait_for(lambda: any(r.lost_attempts for r in records_of(tmp_path)), process)
    second = cluster.add_node(num_cpus=1)
    text = finish(process)
    assert process.returncode == 0, text
    first, other = records_of(tmp_path)
    assert (first.state, other.state) == ("COMPLETE", "COMPLETE"), text
    assert [lost["cause"] for lost in first.lost_attempts] == ["preempted"] and not other.lost_attempts
    assert 400 < first.details["resumed_from_step"] < 800, "from the step it was in, and not from an evaluation"
    assert "slot 0 ends: its node is about to leave" in text and "slot 0 lost its workers" not in text
    cluster.remove_node(second, allow_graceful=False)

"""Where do tests have machines that come and go? In a Ray cluster of processes here, which share nothing but a bucket.

Each has a scratch folder of its own, which is deleted when it dies. The teacher's folder is one of the driver's cache, as a
downloaded model's is, so that it, too, reaches the nodes by the bucket; text is read by the driver alone. What is watched is
written beside the tests.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from doors import ROOT, sweep_file
from tiny import World

from neo_ray.records import Journal, TrialRecord, fold
from neo_ray.storage import Remote

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


@dataclass
class Site:
    """A cluster whose machines have a bucket in common, and no disk."""

    cluster: Any
    bucket: str
    folder: Path
    scratch: dict[Any, Path] = field(default_factory=dict)
    up: list[Any] = field(default_factory=list)

    @property
    def results(self) -> Remote:
        return Remote(f"{self.bucket}/results/tiny", str(self.folder / "here"))

    def come(self, resources: dict[str, float] | None = None, **environment: str) -> Any:
        own = self.folder / f"node-{len(self.scratch)}"
        modules = f"{self.folder}{os.pathsep}{ROOT}"  # a sitecustomize of the test's, if it has one
        environment |= {"NODE_SCRATCH": str(own), "PYTHONPATH": modules}
        node = self.cluster.add_node(num_cpus=1, resources=resources or {}, env_vars=environment)
        self.scratch[node] = own
        self.up.append(node)
        return node

    def go(self, node: Any) -> None:
        self.up.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        shutil.rmtree(self.scratch[node], ignore_errors=True)  # where it never worked there is none

    def file(self, world: World, **changes: Any) -> Path:
        cache = f"{self.bucket}/cache"
        teacher = Remote(cache, str(self.folder / "driver")).here / "teacher"
        shutil.copytree(world.teacher, teacher)
        own = {
            "teacher": {"model": str(teacher)},
            "student": {"prune": {"layers": [0, 1]}},
            "resources": {"address": self.cluster.address, **changes.pop("resources", {})},
            "storage": {"path": f"{self.bucket}/results", "cache": cache, "scratch": "$NODE_SCRATCH"},
        }
        return sweep_file(world, self.folder, **{**LONG, **own, **changes})

    def records(self) -> list[TrialRecord]:
        return fold(Journal(self.results).events())

    def rungs(self) -> list[int]:
        return [len(record.curve) for record in self.records()]


@pytest.fixture
def site(cluster: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("NODE_SCRATCH", str(tmp_path / "driver"))
    found = Site(cluster, bucket, tmp_path)
    yield found
    for node in list(found.up):
        found.go(node)


def names_in(folder: Path) -> set[str]:
    """Of the files anywhere below."""
    return {path.name for path in folder.rglob("*") if path.is_file()}

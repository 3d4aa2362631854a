"""What fits on a cluster, and what is refused before any worker starts? Arithmetic on nodes; Ray itself is met in test_sweep."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from planted import sweep
from ray.train.v2._internal.callbacks import placement_group_callback

from neo_ray import cluster, local
from neo_ray.cluster import Capacity, Node, concurrency, fit_head, fit_memory, nodes_on_demand, places
from neo_ray.config import HEAD_SLOTS, ResourcesConfig
from neo_ray.settings import ConfigError
from neo_ray.tuner import BOARD_CALLS

HEAD, GPU = Node(8, 0, 32e9), Node(8, 1, 64e9, "L40S")


def resources(**changes: Any) -> ResourcesConfig:
    return ResourcesConfig(**changes)


@pytest.mark.parametrize(
    ("asked", "nodes", "slots"),
    [
        ({}, (Node(2),), 2),
        ({"cpus_per_worker": 3}, (Node(4), Node(4)), 2),  # eight CPUs in all, and each node holds one worker of three
        ({"gpus_per_worker": 1, "cpus_per_worker": 4}, (HEAD, GPU, GPU), 2),
        ({"gpus_per_worker": 0.25, "cpus_per_worker": 2}, (GPU,), 4),
        ({"gpus_per_worker": 1, "cpus_per_worker": 4, "workers_per_trial": 2}, (HEAD, GPU, GPU, GPU), 1),
        ({"concurrency": 1}, (Node(4),), 1),
        ({"gpus_per_worker": 1, "accelerator_type": "L40S"}, (GPU, Node(8, 4, 0, "A100"), GPU), 2),
        ({"workers_per_trial": 2, "placement_strategy": "STRICT_PACK"}, (Node(3), Node(3)), 2),
        ({"workers_per_trial": 2, "placement_strategy": "SPREAD"}, (Node(3), Node(3)), 3),
    ],
)
def test_slots_are_counted_by_workers_that_fit_on_nodes(asked: dict[str, Any], nodes: tuple[Node, ...], slots: int) -> None:
    assert concurrency(resources(**asked), Capacity(nodes)) == slots


@pytest.mark.parametrize(
    ("asked", "nodes", "words"),
    [
        (
            {"gpus_per_worker": 1},
            (Node(8),),
            "resources.gpus_per_worker: a trial takes 1 GPUs and there are 0; to reach a cluster",
        ),
        ({"gpus_per_worker": 2}, (GPU,), "resources.gpus_per_worker: a trial takes 2 GPUs and there are 1"),
        ({"cpus_per_worker": 16}, (Node(8),), "resources.cpus_per_worker: a trial takes 16 CPUs and the cluster has 8"),
        ({"cpus_per_worker": 6}, (Node(4), Node(4)), "resources.workers_per_trial: a trial takes 1 workers, and 0 fit"),
        (
            {"gpus_per_worker": 1, "accelerator_type": "L40"},
            (GPU, Node(8, 1, 0, "A100")),
            "resources.accelerator_type: no node has L40 (did you mean `L40S`?); there are: A100, L40S",
        ),
        ({"accelerator_type": "L4"}, (Node(8),), "resources.accelerator_type: no node has L4; there are: none"),
        (
            {"workers_per_trial": 3, "placement_strategy": "STRICT_PACK"},
            (Node(2), Node(2)),
            "resources.placement_strategy: STRICT_PACK puts the 3 workers of a trial on one node, and 2 fit on one",
        ),
        ({"concurrency": 5}, (Node(4),), "resources.concurrency: 5 trials at a time were asked for and 4 fit"),
    ],
)
def test_what_does_not_fit_is_refused(asked: dict[str, Any], nodes: tuple[Node, ...], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        concurrency(resources(**asked), Capacity(nodes))
    assert words in str(caught.value)


CLUSTER = {
    "max_workers": 3,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 8}},
        "gpu": {"resources": {"CPU": 8, "GPU": 1, "memory": 64e9}, "min_workers": 0, "max_workers": 8},
        "spot": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 0},
    },
}


def bootstrap(folder: Path, cluster: Any = CLUSTER) -> Path:
    path = folder / "ray_bootstrap_config.yaml"
    path.write_text(yaml.safe_dump(cluster))
    return path


def test_nodes_on_demand_are_counted_before_they_are_up(tmp_path: Path) -> None:
    path = bootstrap(tmp_path)
    assert nodes_on_demand(1, path) == (Node(8, 1, 64e9),) * 3
    assert nodes_on_demand(3, path) == (Node(8, 1, 64e9),)
    assert nodes_on_demand(9, path) == ()
    alone = Capacity((HEAD,), nodes_on_demand(1, path))
    assert concurrency(resources(gpus_per_worker=1, cpus_per_worker=4), alone) == 3
    assert "on demand up to 3 more with 24 CPUs, 3 GPUs" in str(alone)


@pytest.mark.parametrize("cluster", ["no mapping", {"available_node_types": None}, {"head_node_type": "head"}, None])
def test_a_file_of_another_kind_promises_no_nodes(tmp_path: Path, cluster: Any) -> None:
    assert nodes_on_demand(1, bootstrap(tmp_path, cluster)) == ()
    assert nodes_on_demand(1, tmp_path / "nothing") == ()


def test_the_repository_s_cluster_offers_its_gpus(tmp_path: Path) -> None:
    path = Path(__file__).parent.parent / "cluster.yaml"
    assert sum(node.gpus for node in nodes_on_demand(1, path)) == 8


def test_where_only_the_cluster_knows_the_number_asked_for_is_taken() -> None:
    asked = resources(gpus_per_worker=1, nodes_on_demand=True, concurrency=4)
    assert concurrency(asked, Capacity((HEAD,))) == 4
    with pytest.raises(ValueError, match="nodes_on_demand: true needs a number"):
        resources(nodes_on_demand=True)


def test_memory_limits_the_slots_or_refuses_them() -> None:
    nodes = Capacity((Node(8, 0, 10e9), Node(8, 0, 5e9)))
    assert fit_memory(resources(), nodes, int(3e9), 16) == 4
    assert fit_memory(resources(), nodes, 0, 16) == 16
    assert fit_memory(resources(memory_check=False), nodes, int(99e9), 16) == 16
    with pytest.raises(ConfigError, match=r"resources.concurrency: .* takes about 3.0 GB, so that 4 of the 9 trials"):
        fit_memory(resources(concurrency=9), nodes, int(3e9), 9)
    with pytest.raises(
        ConfigError, match=r"takes about 20.0 GB, and the largest node has 10.0 GB to give; a smaller training.micro"
    ):
        fit_memory(resources(), nodes, int(20e9), 16)
    gpus = Capacity((HEAD, GPU))
    assert fit_memory(resources(gpus_per_worker=1), gpus, int(40e9), 1) == 1
    with pytest.raises(ConfigError, match=r"resources.gpus_per_worker: .* 40.0 GB, and its share of a GPU here is 24.0 GB"):
        fit_memory(resources(gpus_per_worker=0.5), gpus, int(40e9), 1)


def test_the_heads_memory_bounds_how_many_trials_run_at_a_time() -> None:
    many = Capacity((Node(cpus=8, memory_bytes=64e9, head=True), *(Node(cpus=8, gpus=8, memory_bytes=1e12) for _ in range(200))))
    asked = resources(gpus_per_worker=1, concurrency="auto")
    assert concurrency(asked, many) == 850 and fit_head(asked, many, 850, 0) == 65 == places(asked, many, 0)
    numbered = resources(gpus_per_worker=1, concurrency=500)
    assert fit_head(numbered, many, 500, 0) == 500 == places(numbered, many, 0), "as was asked"
    assert fit_head(asked.model_copy(update={"memory_check": False}), many, 1600, 0) == 1600
    assert fit_head(asked, Capacity(many.nodes[1:]), 1600, 0) == 1600, "where it is not known"


def test_no_more_slots_than_ray_train_places_on_a_head() -> None:
    """Once this fails, Ray Train asks the head for another share, and `HEAD_SLOTS` is another number."""
    (share,) = set(re.findall(r"HEAD_NODE_RESOURCE_NAME: ([\d.]+)", inspect.getsource(placement_group_callback)))
    relay = board = cluster.HEAD["node:__internal_head__"]
    assert HEAD_SLOTS * (float(share) + relay) + board < 0.95, "slots that end hold theirs for a while beside those that begin"
    assert BOARD_CALLS >= 2 * HEAD_SLOTS + 1000, "a relay and a worker wait at the board for each trial, and others ask it"
    local.check_slots(sweep(resources={"concurrency": 850}))
    with pytest.raises(ConfigError, match=r"resources.concurrency: 851 trials at a time, .* room for 850 .*workers_per_trial"):
        local.check_slots(sweep(resources={"concurrency": 851}))


def test_workers_and_the_processes_beside_them_share_the_memory_of_one_machine() -> None:
    asked = resources(concurrency="auto")
    one = Capacity((Node(cpus=64, memory_bytes=64e9, head=True),))
    assert fit_memory(asked, one, int(0.6e9), 64) == 64
    assert fit_head(asked, one, 64, int(0.6e9)) == 40 == places(asked, one, int(0.6e9)), "40 × (0.95 + 0.6) + 1.65 GB"
    assert fit_head(asked, one, 64, int(99e9)) == 1, "one is refused or not by `fit_memory`"
    numbered = resources(concurrency=50)
    assert fit_head(numbered, one, 50, int(0.6e9)) == 50 == places(numbered, one, int(0.6e9)), "as was asked"


def test_the_heads_own_workers_have_what_its_processes_leave() -> None:
    asked = resources(concurrency="auto")
    beside = Capacity((Node(cpus=4, memory_bytes=64e9, head=True), Node(cpus=64, memory_bytes=1e12)))
    assert fit_head(asked, beside, 68, int(2e9)) == 64, "all beside the head: it has no room for a worker"
    assert fit_head(asked, beside, 66, int(40e9)) == 25, "of 40 GB, all beside it"
    on_demand = Capacity((Node(cpus=4, memory_bytes=64e9, head=True),), coming=(Node(cpus=30), Node(cpus=30)))
    assert fit_head(asked, on_demand, 64, int(2e9)) == 61, "60 on nodes whose memory is not known, and one on the head"
    gpus = resources(gpus_per_worker=1, concurrency="auto")
    assert fit_head(gpus, Capacity((Node(4, 4, 64e9, head=True), Node(64, 96, 1e12))), 68, int(40e9)) == 65, "a GPU has its own"
    packed = resources(concurrency="auto", workers_per_trial=8, placement_strategy="STRICT_PACK")
    small = Capacity((Node(cpus=7, memory_bytes=30e9, head=True), *(Node(cpus=8, memory_bytes=64e9) for _ in range(10))))
    assert fit_head(packed, small, 10, int(5e9)) == 10, "none of these on the head"


@pytest.mark.parametrize("failures", [0, 2, 3])
def test_a_ray_that_a_busy_machine_did_not_start_in_time_is_begun_anew(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    begun: list[subprocess.Popen[bytes]] = []

    def init(**how: Any) -> None:
        if len(begun) < failures:
            begun.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
            said = ("The current node timed out during startup. This could happen because", "Failed to start the dashboard")
            raise Exception(said[len(begun) % 2])

    monkeypatch.setattr(ray, "init", init)
    if failures == cluster.STARTS:
        with pytest.raises(ConfigError, match="did not start here in its time, 3 times"):
            cluster._start_here()
    else:
        cluster._start_here()
    assert len(begun) == failures
    assert all(process.wait(10) < 0 for process in begun), "what was left of it is ended"


def test_another_failure_of_ray_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**how: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RuntimeError, match="no such thing"):
        cluster._start_here()

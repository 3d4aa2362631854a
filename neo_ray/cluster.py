"""What is there to run on? Connect to Ray, check what a sweep needs of it, and turn resources into concurrency."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from neo_ray.config import HEAD_SLOTS, ResourcesConfig
from neo_ray.mistakes import guess
from neo_ray.settings import ConfigError

HEAD = {"node:__internal_head__": 0.0001}
"""Every cluster has 1 of it, at its head: light processes take the least there is, and no worker's CPU."""
HEAD_BYTES = int(1.65e9)
"""Of the driver, the board and what Ray runs once, their own share of memory (docs/scale.md)."""
HEAD_BYTES_OF_SLOT = int(0.95e9)
"""Of the processes that Tune and Train keep for each slot beside its workers, their own share of memory (docs/scale.md)."""
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""`ray up` leaves the cluster's file on its head: which nodes there are, and how many may come."""
DEVICE_BYTES = {"T4": 16e9, "V100": 32e9, "L4": 24e9, "A10G": 24e9, "L40S": 48e9, "A100": 80e9, "H100": 80e9, "H200": 141e9}
"""Memory of an accelerator by Ray's name of its type; where it comes in several sizes, of the largest."""


@dataclass(frozen=True)
class Node:
    """What one node offers to workers."""

    cpus: float
    gpus: float = 0
    memory_bytes: float = 0
    """Host memory; 0 where it is not known."""
    accelerator: str | None = None
    """Ray's name of the accelerator's type."""
    head: bool = False

    def workers(self, resources: ResourcesConfig) -> int:
        """How many workers fit; none where another accelerator was asked for."""
        if resources.accelerator_type not in (None, self.accelerator):
            return 0
        fits = self.cpus / resources.cpus_per_worker
        if resources.gpus_per_worker:
            fits = min(fits, self.gpus / resources.gpus_per_worker)
        return math.floor(fits + 1e-9)


@dataclass(frozen=True)
class Capacity:
    """What the cluster holds at this moment, and what may come."""

    nodes: tuple[Node, ...]
    coming: tuple[Node, ...] = ()
    """Nodes beyond those that are up, as the cluster's file allows them."""
    started_here: bool = False

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    def __str__(self) -> str:
        text = f"{len(self.nodes)} node(s), {self.cpus:g} CPUs, {self.gpus:g} GPUs"
        if self.coming:
            cpus, gpus = (sum(getattr(node, name) for node in self.coming) for name in ("cpus", "gpus"))
            text += f", on demand up to {len(self.coming)} more with {cpus:g} CPUs, {gpus:g} GPUs"
        return text


STARTS = 3
TOO_SLOW = ("timed out during startup", "Failed to start the dashboard")
"""In Ray's words."""


def _start_here(**how: Any) -> None:
    """A Ray of this machine alone. It gives its own processes 30 to 60 s, which a busy one may exceed: it is begun anew."""
    import ray

    for left in reversed(range(STARTS)):
        before = set(psutil.Process().children(recursive=True))
        try:
            ray.init(**how)
            return
        except Exception as error:  # Ray raises no other kind there
            if not any(words in str(error) for words in TOO_SLOW):
                raise
            ray.shutdown()
            for process in set(psutil.Process().children(recursive=True)) - before:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if not left:
                raise ConfigError(f"Ray did not start here in its time, {STARTS} times: other processes keep it busy") from None


def connect(resources: ResourcesConfig) -> Capacity:
    """Start Ray on this machine, or connect to `resources.address`; an initialised Ray is used as it is.

    Raises:
        ConfigError: no cluster answers there, or it lacks the State API that Tune's clean-up of stopped trials depends on.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a report waits for this poll
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3600")  # a node on demand takes its time
    os.environ.setdefault("RAY_TRAIN_ENABLE_CONSOLE_PROGRESS", "0")
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a failed trial has no metric
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # the sweep door ends a sweep, from the records
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its box of words; progress is ours
    import ray

    started_here = not ray.is_initialized()
    ends = signal.getsignal(signal.SIGTERM)
    if started_here:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        try:
            if resources.address:
                ray.init(address=resources.address, namespace="neo_ray", **quiet)
            else:
                _start_here(include_dashboard=True, dashboard_host="127.0.0.1", namespace="neo_ray", **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"resources.address: no Ray cluster answers at {resources.address!r} ({reason})") from None
    if callable(ends) and signal.getsignal(signal.SIGTERM) != ends:  # Ray's own would end the process where it stands
        signal.signal(signal.SIGTERM, ends)
    _own_messages_to_log()
    for name in ("ray.train", "ray.tune", "ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _check_state_api()
    return present(started_here, alone=started_here and not resources.address)


def present(started_here: bool = False, alone: bool = False) -> Capacity:
    """What the cluster holds now, without the nodes that are about to leave. `alone`: it has no other machine."""
    import ray

    going = draining()
    nodes = tuple(_kind(node["Resources"]) for node in ray.nodes() if node["Alive"] and node["NodeID"] not in going)
    return Capacity(nodes, () if alone else nodes_on_demand(len(nodes)), started_here)


def draining() -> set[str]:
    """Ids of the nodes that are about to leave: told by the autoscaler, by `ray drain-node`, or by a SIGTERM to their Ray.

    Ray has no public call for this; Ray Train's own watcher asks the same one. Where it is gone, none is known to leave.
    """
    from ray._private.state import state

    return set(state.get_draining_nodes()) if hasattr(state, "get_draining_nodes") else set()


def was_preempted(error: BaseException, nodes: set[str], patience_seconds: float = 40.0, unclear: bool = False) -> bool:
    """Did a worker group die with a node of its own? A node that fell silent is known to be dead only after a while.

    Args:
        unclear: no worker has said what became of the one that is gone, so that its node is given that while.
    """
    import ray
    from ray.train.v2.api.exceptions import PreemptionError

    failures = [error, *(getattr(error, "worker_failures", None) or {}).values()]
    failures += [e.health_check_failure for e in failures if hasattr(e, "health_check_failure")]  # what Ray Train puts around it
    if any(isinstance(e, PreemptionError) or getattr(e, "preempted", False) for e in failures):
        return True
    unclear = unclear or any(isinstance(e, ray.exceptions.ActorUnavailableError) for e in failures)
    deadline = time.monotonic() + (patience_seconds if unclear else 0.0)
    while True:
        staying = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - draining()
        if nodes - staying:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(1)


def nodes_on_demand(num_up: int, bootstrap: Path = BOOTSTRAP) -> tuple[Node, ...]:
    """The nodes that the autoscaler may add to `num_up`, where `ray up` made this machine a cluster's head; else none.

    Nodes that are up already count against `max_workers`, the largest types first, so that the answer is never too large.
    """
    try:
        cluster = yaml.safe_load(bootstrap.expanduser().read_text(encoding="utf-8"))
        workers = [kind for name, kind in cluster["available_node_types"].items() if name != cluster["head_node_type"]]
        allowed = int(cluster.get("max_workers", 0))
        kinds = [(_kind(kind.get("resources") or {}), min(int(kind.get("max_workers", 0)), allowed)) for kind in workers]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        return ()
    possible = sorted(
        (node for node, count in kinds for _ in range(count)), key=lambda node: (node.gpus, node.cpus), reverse=True
    )
    return tuple(possible[:allowed][max(0, num_up - 1) :])


def concurrency(resources: ResourcesConfig, capacity: Capacity) -> int:
    """Slots: as asked, or as many as the cluster holds, nodes on demand included. Raises ConfigError where not one fits."""
    nodes = (*capacity.nodes, *capacity.coming)
    if resources.nodes_on_demand and resources.concurrency != "auto":
        return resources.concurrency
    fits = min(HEAD_SLOTS, _whole_trials(resources, (node.workers(resources) for node in nodes)))
    if fits < 1:
        raise ConfigError(_why_not_one(resources, nodes))
    if resources.concurrency == "auto":
        return fits
    if resources.concurrency > fits:
        raise ConfigError(f"resources.concurrency: {resources.concurrency} trials at a time were asked for and {fits} fit")
    return resources.concurrency


def places(resources: ResourcesConfig, capacity: Capacity, worker_bytes: int) -> int:
    """Slots that the cluster holds as it is now, of those asked for; 0 where there is no room for one."""
    if resources.nodes_on_demand and resources.concurrency != "auto":
        return resources.concurrency
    free = resources.model_copy(update={"concurrency": "auto"})
    try:
        fits = fit_memory(free, capacity, worker_bytes, concurrency(free, capacity))
    except ConfigError:
        return 0
    fits = fit_head(resources, capacity, fits, worker_bytes)
    return fits if resources.concurrency == "auto" else min(fits, resources.concurrency)


def fit_head(resources: ResourcesConfig, capacity: Capacity, slots: int, worker_bytes: int) -> int:
    """Slots whose processes the head has memory for: fewer than `slots` where their number was left to us.

    Args:
        worker_bytes: as of `fit_memory`; without GPUs the head's own workers have what these processes leave.
    """
    head = next((node for node in capacity.nodes if node.head and node.memory_bytes), None)
    if head is None or resources.concurrency != "auto" or not resources.memory_check:
        return slots
    others = [_workers(n, resources, worker_bytes) for n in (*capacity.nodes, *capacity.coming) if n is not head]

    def fit(slots: int) -> bool:
        left = head.memory_bytes - HEAD_BYTES - slots * HEAD_BYTES_OF_SLOT
        return left >= 0 and _whole_trials(resources, (_workers(head, resources, worker_bytes, left), *others)) >= slots

    return next((fewer for fewer in range(slots, 1, -1) if fit(fewer)), min(1, slots))


def _workers(node: Node, resources: ResourcesConfig, worker_bytes: int, memory_bytes: float | None = None) -> int:
    """Workers that a node takes, by its memory where they train in it and it is known. `memory_bytes`: what is left of it."""
    fits = node.workers(resources)
    if not worker_bytes or not node.memory_bytes or resources.gpus_per_worker:
        return fits
    return min(fits, int((node.memory_bytes if memory_bytes is None else memory_bytes) // worker_bytes))


def fit_memory(resources: ResourcesConfig, capacity: Capacity, worker_bytes: int, slots: int) -> int:
    """Slots that memory allows: fewer than `slots` where their number was left to us.

    Args:
        worker_bytes: estimate for one worker of the largest trial; 0 where it is not known.

    Raises:
        ConfigError: not even one fits, or fewer than were asked for. Says how much is needed and what to change.
    """
    if not worker_bytes or not resources.memory_check:
        return slots
    needed = f"a worker of the largest trial takes about {worker_bytes / 1e9:.1f} GB"
    change = (
        "a smaller training.micro_batch_size, training.gradient_checkpointing or a higher deepspeed.zero_stage take less; "
        "resources.memory_check: false starts it all the same"
    )
    if resources.gpus_per_worker:
        share = min(1.0, resources.gpus_per_worker)
        have = share * max(
            (DEVICE_BYTES.get(n.accelerator or "", math.inf) for n in capacity.nodes if n.workers(resources)), default=math.inf
        )
        if worker_bytes > have:
            raise ConfigError(
                f"resources.gpus_per_worker: {needed}, and its share of a GPU here is {have / 1e9:.1f} GB; {change}"
            )
        return slots
    nodes = [node for node in (*capacity.nodes, *capacity.coming) if node.workers(resources)]
    if not nodes or not all(node.memory_bytes for node in nodes):
        return slots
    fits = _whole_trials(resources, (_workers(node, resources, worker_bytes) for node in nodes))
    if fits < 1:
        have = max(node.memory_bytes for node in nodes)
        raise ConfigError(
            f"resources.workers_per_trial: {needed}, and the largest node has {have / 1e9:.1f} GB to give; {change}"
        )
    if fits < slots and resources.concurrency != "auto":
        raise ConfigError(f"resources.concurrency: {needed}, so that {fits} of the {slots} trials at a time fit; {change}")
    return min(slots, fits)


def builders(resources: ResourcesConfig, capacity: Capacity, builder_bytes: int, slots: int) -> int:
    """Workers that may fill a store of targets at once: as many as the slots have, or as memory allows for the teacher."""
    alone = resources.model_copy(update={"workers_per_trial": 1, "concurrency": "auto"})
    return fit_memory(alone, capacity, builder_bytes, slots * resources.workers_per_trial)


def takes_workers(node: dict[str, Any], resources: ResourcesConfig) -> bool:
    """`node`: as `ray.nodes` has it."""
    return _kind(node["Resources"]).workers(resources) > 0


def _kind(offered: dict[str, Any]) -> Node:
    """A node from Ray's names of what it offers."""
    types = [name.removeprefix("accelerator_type:") for name in offered if name.startswith("accelerator_type:")]
    cpus, gpus, memory_bytes = (float(offered.get(name, 0)) for name in ("CPU", "GPU", "memory"))
    return Node(cpus, gpus, memory_bytes, types[0] if types else None, next(iter(HEAD)) in offered)


def _whole_trials(resources: ResourcesConfig, workers_of_nodes: Iterable[int]) -> int:
    """Trials that so many places for workers, node by node, make."""
    if resources.placement_strategy == "STRICT_PACK":
        return sum(workers // resources.workers_per_trial for workers in workers_of_nodes)
    return sum(workers_of_nodes) // resources.workers_per_trial


def _why_not_one(resources: ResourcesConfig, nodes: tuple[Node, ...]) -> str:
    """No trial fits: what is asked for and not there."""
    gpus, cpus = (sum(getattr(node, name) for node in nodes) for name in ("gpus", "cpus"))
    types, asked = sorted({node.accelerator for node in nodes if node.accelerator}), resources.accelerator_type
    if asked is not None and asked not in types:
        return f"resources.accelerator_type: no node has {asked}{guess(asked, types)}; there are: {', '.join(types) or 'none'}"
    wanted_gpus = resources.gpus_per_worker * resources.workers_per_trial
    wanted_cpus = resources.cpus_per_worker * resources.workers_per_trial
    if gpus < wanted_gpus:
        hint = (
            "; to reach a cluster that has them: resources.address=auto on its head, or `ray exec cluster.yaml '…'`; "
            "for nodes that come on demand: resources.nodes_on_demand=true and resources.concurrency"
        )
        return f"resources.gpus_per_worker: a trial takes {wanted_gpus:g} GPUs and there are {gpus:g}{hint if gpus == 0 else ''}"
    if cpus < wanted_cpus:
        return f"resources.cpus_per_worker: a trial takes {wanted_cpus:g} CPUs and the cluster has {cpus:g}"
    places, wanted = sum(node.workers(resources) for node in nodes), resources.workers_per_trial
    if places >= wanted:  # on several nodes
        most = max(node.workers(resources) for node in nodes)
        strategy = resources.placement_strategy
        return f"resources.placement_strategy: {strategy} puts the {wanted} workers of a trial on one node, and {most} fit on one"
    worker = f"{resources.cpus_per_worker:g} CPUs and {resources.gpus_per_worker:g} GPUs"
    return f"resources.workers_per_trial: a trial takes {wanted} workers, and {places} fit on the nodes ({worker} each)"


def _own_messages_to_log() -> None:
    """Ray prints its raylets' warnings into the driver's output, whatever `log_to_driver` says: they belong in a log."""
    from ray._private import worker

    def to_log(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        logging.getLogger("neo_ray.ray").info("%s: %s", data.get("pid"), " ".join(data.get("lines", [])))

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = to_log


def _check_state_api() -> None:
    """Without it a worker group that dies with its controller is never freed, and the sweep hangs."""
    import ray
    from ray.util.state import list_nodes

    here = ray.get_runtime_context()
    try:
        this: list[Any] = [("node_id", "=", here.get_node_id())]
        # with several nodes, Ray takes those that the filter leaves out for missing output
        found = list_nodes(address=here.gcs_address, filters=this, timeout=30, raise_on_missing_output=False)
        if not found:  # where the dashboard is off, another cluster's on this machine may answer at its port
            raise RuntimeError("another cluster answers at the address of its dashboard")
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            "resources.address: this Ray has no State API; start it with its dashboard "
            f"(pip install 'ray[default]', ray start --include-dashboard=True) ({reason})"
        ) from None

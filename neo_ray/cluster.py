"""What is there to run on? Connect to Ray, check what a sweep needs of it, and turn resources into concurrency."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from typing import Any

from neo_ray.config import ResourcesConfig
from neo_ray.settings import ConfigError

HEAD = {"node:__internal_head__": 0.001}  # every cluster has it: light processes sit there and take no worker's CPU


@dataclass(frozen=True)
class Capacity:
    """What the cluster holds at this moment."""

    cpus: float
    gpus: float
    memory_bytes: float
    nodes: int
    started_here: bool


def connect(resources: ResourcesConfig) -> Capacity:
    """Start Ray on this machine, or connect to `resources.address`; an initialised Ray is used as it is.

    Raises:
        ConfigError: no cluster answers there, or it lacks the State API that Tune's clean-up of stopped trials depends on.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a report waits for this poll
    os.environ.setdefault("RAY_TRAIN_ENABLE_CONSOLE_PROGRESS", "0")
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a failed trial has no metric
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # the sweep door ends a sweep, from the records
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its box of words; progress is ours
    import ray

    started_here = not ray.is_initialized()
    if started_here:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        try:
            if resources.address:
                ray.init(address=resources.address, namespace="neo_ray", **quiet)
            else:
                ray.init(include_dashboard=True, dashboard_host="127.0.0.1", namespace="neo_ray", **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"resources.address: no Ray cluster answers at {resources.address!r} ({reason})") from None
    for name in ("ray.train", "ray.tune", "ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _check_state_api()
    total = ray.cluster_resources()
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    return Capacity(total.get("CPU", 0), total.get("GPU", 0), total.get("memory", 0), nodes, started_here)


def concurrency(resources: ResourcesConfig, capacity: Capacity) -> int:
    """Slots: as asked, or as many as the cluster holds. Raises ConfigError where not even one fits."""
    workers = resources.workers_per_trial
    fits = math.floor(capacity.cpus / (resources.cpus_per_worker * workers) + 1e-9)
    if resources.gpus_per_worker:
        wanted = resources.gpus_per_worker * workers
        if capacity.gpus < wanted:
            hint = ""
            if capacity.gpus == 0:
                hint = "; to reach a cluster that has them: resources.address=auto on its head, or `ray exec cluster.yaml '…'`"
            raise ConfigError(f"resources.gpus_per_worker: a trial takes {wanted:g} GPUs and there are {capacity.gpus:g}{hint}")
        fits = min(fits, math.floor(capacity.gpus / wanted + 1e-9))
    if fits < 1:
        asked = resources.cpus_per_worker * workers
        raise ConfigError(f"resources.cpus_per_worker: a trial takes {asked:g} CPUs and the cluster has {capacity.cpus:g}")
    if resources.concurrency == "auto":
        return fits
    if resources.concurrency > fits:
        raise ConfigError(f"resources.concurrency: {resources.concurrency} trials at a time were asked for and {fits} fit")
    return resources.concurrency


def _check_state_api() -> None:
    """Without it a worker group that dies with its controller is never freed, and the sweep hangs."""
    import ray
    from ray.util.state import list_actors

    try:
        # by address: other clusters may run on this machine
        list_actors(address=ray.get_runtime_context().gcs_address, limit=1, timeout=30)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            "resources.address: this Ray has no State API; start it with its dashboard "
            f"(pip install 'ray[default]', ray start --include-dashboard=True) ({reason})"
        ) from None

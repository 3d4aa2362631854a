"""May the machines that will train read the models? They are asked before a trial starts: the driver's leave is not theirs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from neo_ray import cluster, models
from neo_ray.config import ResourcesConfig
from neo_ray.parts import ModelSource
from neo_ray.settings import ConfigError
from neo_ray.shapes import cached_snapshot

Announce = Callable[[str], None]
SECONDS = 120.0
"""For the answer of a node that is up: a process starts there, and imports the libraries."""


@dataclass(frozen=True)
class Wanted:
    """A model of the hub that workers will load."""

    where: str
    """Its YAML path."""
    model: str
    revision: str | None = None


def wanted(**sources: ModelSource | None) -> list[Wanted]:
    """Those of the sources (`teacher=…, student=…`) that are on the hub: a folder needs nobody's leave."""
    return [
        Wanted(f"{side}.model", source.path, source.revision)
        for side, source in sources.items()
        if source is not None and not Path(source.path).expanduser().is_dir()
    ]


def check(models_wanted: Sequence[Wanted], resources: ResourcesConfig, announce: Announce) -> None:
    """Ask every node that is up and takes workers; where none is, the first that comes.

    Raises:
        ConfigError: one may not read a model. Names the model, the node, and what to do.
    """
    if not models_wanted:
        return
    ask: Any = ray.remote(may_read)
    up = [node for node in ray.nodes() if node["Alive"] and cluster.takes_workers(node, resources)]
    announce(f"may the workers read {' and '.join(one.model for one in models_wanted)}?{'' if up else ' waiting for a node'}")
    answers: dict[Any, str] = {}
    for node in up:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answers[ask.options(num_cpus=0, scheduling_strategy=there).remote(models_wanted)] = node["NodeManagerAddress"]
    if not up:
        cpus, gpus, accelerator = resources.cpus_per_worker, resources.gpus_per_worker, resources.accelerator_type
        answers[ask.options(num_cpus=cpus, num_gpus=gpus, accelerator_type=accelerator).remote(models_wanted)] = "that came"
    for answer, node in answers.items():
        try:
            refused = ray.get(answer, timeout=SECONDS if up else None)
        except ray.exceptions.RayError:  # a node that left or is overloaded says nothing about the models
            logging.getLogger("neo_ray").exception("node %s was asked for the models, and did not answer", node)
            continue
        if refused:
            raise ConfigError(f"{refused[0]} (so says node {node}, {refused[1]}; README, On a cluster, tells how nodes get one)")


def may_read(models_wanted: Sequence[Wanted]) -> tuple[str, str] | None:
    """Of this machine: the first of the models that it may not read and why, and whether it has a token; None where all is well.

    Weights that are in its cache are read whoever asks. The token itself never leaves this process.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    token = huggingface_hub.get_token()
    for one in models_wanted:
        if _is_cached(one):
            continue
        try:
            with models.loading(one.model, one.where):
                url = huggingface_hub.hf_hub_url(one.model, "config.json", revision=one.revision)
                huggingface_hub.get_hf_file_metadata(url, token=token)
            continue
        except ConfigError as error:
            why = str(error)
        except HTTPError as error:
            why = f"{one.where}: {one.model} cannot be fetched: the hub does not answer ({type(error).__name__})"
        return why, "which has a hub token" if token else "which has no hub token"
    return None


def _is_cached(one: Wanted) -> bool:
    """The weights too: the driver brings config and tokenizer alone into a cache that nodes share."""
    folder = cached_snapshot(one.model, one.revision)
    if folder is None:
        return False
    index = folder / "model.safetensors.index.json"
    shards = {"model.safetensors"}
    if index.exists():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / shard).exists() for shard in shards)

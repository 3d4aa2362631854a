"""Where do weights and optimizer states live? On the device, in host memory, or on a disk: DeepSpeed's settings for each."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from neo_ray import devices
from neo_ray.config import Placement
from neo_ray.settings import ConfigError, DeepSpeedConfig

HELD = "held"
"""In the place of the number of a module that is at work."""


def offload_sections(deepspeed: DeepSpeedConfig, model: nn.Module, swap: str | None) -> dict[str, Any]:
    """`offload_optimizer` and `offload_param` of DeepSpeed's section `zero_optimization`, with the user's own options in them.

    `swap`: this process's own folder for `nvme`.
    """
    options = deepspeed.extra.get("zero_optimization") or {}
    places = {"offload_optimizer": deepspeed.offload_optimizer, "offload_param": deepspeed.offload_parameters}
    sections: dict[str, Any] = {}
    for key, place in places.items():
        if place == "none":
            continue
        sections[key] = {**(options.get(key) or {}), "device": place}
        if place == "nvme":
            sections[key]["nvme_path"] = swap
            if key == "offload_param":  # a buffer holds a whole weight, and an embedding is larger than DeepSpeed's default
                sections[key].setdefault("buffer_size", max(parameter.numel() for parameter in model.parameters()))
    return sections


def swap_folder(deepspeed: DeepSpeedConfig) -> tempfile.TemporaryDirectory[str] | None:
    """A folder under `nvme_path` for this process alone: trials of one machine must not write into each other's files.

    It goes away with the object.

    Raises:
        ConfigError: the path cannot be written on this machine.
    """
    if "nvme" not in (deepspeed.offload_optimizer, deepspeed.offload_parameters):
        return None
    try:
        return tempfile.TemporaryDirectory(prefix="neo_ray-", dir=deepspeed.nvme_path, ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigError(f"deepspeed.nvme_path: {deepspeed.nvme_path} cannot be written: {error.strerror or error}") from None


def place(model: nn.Module, wanted: Placement, device: torch.device) -> None:
    """Share out a frozen model's weights, in place: ZeRO-3 for inference. It is still called as before, by all workers at once.

    Args:
        model: in host memory. A weight at a time is taken to the device and given out from there.
        wanted: `sharded` keeps each worker's share on its device, `offloaded` in its host memory; `replicated` does nothing.
    """
    if wanted == "replicated":
        return
    devices.prepare_deepspeed()
    import deepspeed

    linear = torch.nn.functional.linear
    offload = {"offload_param": {"device": "cpu"}} if wanted == "offloaded" else {}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **offload}, "steps_per_print": 10**9}
    remote = "cpu" if wanted == "offloaded" else None
    dtype = next(model.parameters()).dtype
    deepspeed.zero.Init(module=model, dtype=dtype, config_dict_or_path=config, remote_device=remote, pin_memory=True)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    engine = deepspeed.initialize(model=model, config=config)[0]
    vars(model)["engine"] = engine  # its hooks bring the weights in; as an attribute proper it would be a part of itself
    torch.nn.functional.linear = linear


def head_of(model: Any) -> list[Any]:
    """The parameters of a model's output head; none without a model."""
    return list(model.get_output_embeddings().parameters()) if model is not None else []


@contextmanager
def in_full(parameters: Iterable[Any]) -> Iterator[None]:
    """Frozen parameters that ZeRO-3 has cut, gathered once and whole until the end; every worker enters.

    They stay whole while modules that have them are called, too, as an embedding that is tied to the head is: ZeRO-3 releases
    what no module is at work with, and here one is said to be. The end has to come before the optimizer's step, which cuts all.
    Those that are held already are left to whoever holds them.
    """
    cut = [p for p in parameters if hasattr(p, "ds_id") and HELD not in p.ds_active_sub_modules]
    if not cut:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(cut):
        for parameter in cut:
            parameter.ds_active_sub_modules.add(HELD)
        try:
            yield
        finally:
            for parameter in cut:
                parameter.ds_active_sub_modules.discard(HELD)

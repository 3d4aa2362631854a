"""Where do weights and optimizer states live? On the device, in host memory, or on a disk: DeepSpeed's settings for each."""

from __future__ import annotations

import tempfile
from typing import Any

from torch import nn

from neo_ray.settings import ConfigError, DeepSpeedConfig


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

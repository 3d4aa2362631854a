"""Where does an interrupted trial go on? What is trained and its moments, independent of ZeRO stage and world size.

DeepSpeed's own checkpoints hold partitions and load at the world size that wrote them. Here every trained tensor is gathered
whole, in fp32, under its own name. Nothing random is stored: data order and dropout are functions of (seed, step).
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def gather(engine: Any, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Trained weights by name, whole and in fp32, on the CPU. Every rank calls it (stages 1–3 communicate)."""
    return {name: _full(engine, parameter, None).detach().cpu().clone() for name, parameter in parameters.items()}


def gather_moments(engine: Any, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """AdamW moments as `name//exp_avg`, `name//exp_avg_sq`. Every rank calls it, after at least one step."""
    _link_moments(engine)
    return {
        f"{name}//{moment}": _full(engine, parameter, moment).detach().cpu().clone()
        for name, parameter in parameters.items()
        for moment in MOMENTS
    }


def restore(engine: Any, parameters: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor], step: int) -> None:
    """Put weights and moments (as gathered) into a fresh engine that is to go on after `step` updates of the weights."""
    create_moments(engine, step)
    for name, parameter in parameters.items():
        _set_full(engine, parameter, tensors[name], None)
        for moment in MOMENTS:
            _set_full(engine, parameter, tensors[f"{name}//{moment}"], moment)


def save(folder: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Write `<folder>/step-N` whole or not at all, then drop older ones. Rank 0 alone calls it.

    Args:
        state: plain data; `state["step"]` names the checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".part-{uuid.uuid4().hex[:8]}"
    try:
        part.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / "trained.safetensors")
        (part / "state.json").write_text(json.dumps(state))
        for path in (part / "trained.safetensors", part / "state.json", part):
            _sync(path)
    except BaseException:  # on a full disk, half of a checkpoint is room that the next attempt has not
        shutil.rmtree(part, ignore_errors=True)
        raise
    target = folder / f"step-{state['step']:08d}"
    if target.exists():  # the same step again, after a crash between writing and reporting
        shutil.rmtree(target)
    os.rename(part, target)
    for old in folder.iterdir():
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a trial."""
    found = sorted(folder.glob("step-*/state.json"))
    return found[-1].parent if found else None


def load_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())


def load_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "trained.safetensors")


def remove(folder: Path) -> None:
    """A finished trial needs none."""
    shutil.rmtree(folder, ignore_errors=True)


def _stage(engine: Any) -> int:
    return engine.zero_optimization_stage()


def _full(engine: Any, parameter: nn.Parameter, moment: str | None) -> torch.Tensor:
    if _stage(engine) == 0:
        return parameter.data if moment is None else engine.basic_optimizer.state[parameter][moment]
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return safe_get_full_fp32_param(parameter) if moment is None else safe_get_full_optimizer_state(parameter, moment)


def _set_full(engine: Any, parameter: nn.Parameter, value: torch.Tensor, moment: str | None) -> None:
    value = value.to(engine.device)
    if _stage(engine) == 0:
        target = parameter.data if moment is None else engine.basic_optimizer.state[parameter][moment]
        target.copy_(value)
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if moment is not None:
        safe_set_full_optimizer_state(parameter, value, moment)
        return
    safe_set_full_fp32_param(parameter, value)  # the master copy; below, the one that computes
    if _stage(engine) < 3:
        parameter.data.copy_(value)
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)


def create_moments(engine: Any, step: int) -> None:
    """AdamW makes its state in its first step; a restored one must have it before."""
    if _stage(engine) == 0:
        masters = [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
    elif _stage(engine) == 3:
        masters = engine.optimizer.fp32_partitioned_groups_flat
    else:
        masters = engine.optimizer.single_partition_of_fp32_groups
    for number, master in enumerate(masters):
        with _on_hand(engine, number):
            engine.basic_optimizer.state[master] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
    _link_moments(engine)


@contextmanager
def _on_hand(engine: Any, number: int) -> Iterator[None]:
    """Where ZeRO-3 keeps a master copy on a disk, it has no elements until it is read; its moments are written with it."""
    zero = engine.optimizer
    on_disk = _stage(engine) == 3 and zero._swappable_optimizer_subgroup(number)
    if on_disk:
        zero._optimizer_states_and_gradient_swap_in(number)
    yield
    if on_disk:
        zero._optimizer_states_and_gradient_swap_out(number)


def _link_moments(engine: Any) -> None:
    """Stages 1 and 2 find a weight's moments by links, which DeepSpeed makes when only the first group's moments exist."""
    if _stage(engine) in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

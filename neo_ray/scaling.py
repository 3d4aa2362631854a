"""How do gradients fit into fp16? A loss scale that follows them; a step whose gradients overflow is left out and counted.

DeepSpeed's `torch_autocast` with fp16 is not used: under ZeRO its scale is updated once a parameter group, the norm is clipped
before the scale is taken out, and each rank decides by itself whether to skip. Under ZeRO this module hands DeepSpeed its scale,
which takes it out before it clips and skips by the norm over all ranks; without ZeRO it does the same itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

GROWTH_STEPS = 2000
"""Steps without an overflow after which the scale is doubled (PyTorch's default)."""
SMALLEST = 1.0


@dataclass
class LossScale:
    """Powers of two, so that scaling rounds nothing. Reference: mixed precision training (arXiv 1710.03740), section 3.2."""

    value: float = 2.0**16
    good_steps: int = 0
    """Since the last change."""
    skipped_steps: int = 0
    hopeless: bool = False
    """Gradients overflow at the smallest scale too: they are infinite, not large."""

    def update(self, overflow: bool) -> None:
        """After an optimizer step, or what should have been one."""
        self.good_steps += 1
        if overflow:
            self.skipped_steps += 1
            self.hopeless = self.value <= SMALLEST
            self.value, self.good_steps = max(SMALLEST, self.value / 2), 0
        elif self.good_steps == GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2, 0

    def state(self) -> dict[str, Any]:
        """Plain data, for a checkpoint: `LossScale(**state)` goes on from it."""
        return asdict(self)


def backward(engine: Any, loss: torch.Tensor, scale: LossScale | None) -> None:
    """The gradients of a micro-batch, scaled where there is a scale."""
    if scale is not None and engine.zero_optimization():
        engine.optimizer.override_loss_scale(scale.value)
    elif scale is not None:
        loss = loss * scale.value
    engine.backward(loss, scale_wrt_gas=False)


def step(engine: Any, scale: LossScale | None) -> None:
    """After each micro-batch; at the last one of a step the update follows, unless gradients overflowed."""
    last, zero = engine.is_gradient_accumulation_boundary(), engine.zero_optimization()
    if scale is None or zero or not last:
        engine.step()
        overflow = zero and engine.optimizer.overflow
    else:
        overflow = _unscale(engine, scale.value)
        with _nothing_to_update(engine.basic_optimizer) if overflow else nullcontext():
            engine.step()
    if scale is not None and last:
        scale.update(bool(overflow))


def _unscale(engine: Any, value: float) -> bool:
    """Take the scale out of the gradients, which are the same on every rank by now. Did they overflow?"""
    gradients = [p.grad for group in engine.basic_optimizer.param_groups for p in group["params"] if p.grad is not None]
    for gradient in gradients:
        gradient.div_(value)
    return not bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all())


@contextmanager
def _nothing_to_update(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """DeepSpeed counts its step, clips and clears the gradients; weights and moments stay."""
    kept = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = []
    try:
        yield
    finally:
        for group, parameters in zip(optimizer.param_groups, kept, strict=True):
            group["params"] = parameters

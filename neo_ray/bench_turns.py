"""How are ways of doing one thing compared on one machine? Arms taken in turns, and their ratios with intervals."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from neo_ray import devices

Announce = Callable[[str], None]
BASELINE = "lora"
"""The arm that ratios are taken to: LoRA-SFT."""
THROWN_AWAY = 2
"""Rounds before the timed ones: the first allocates the optimizer's moments and warms what can be warmed."""
MEMORY_ROUNDS = 3
"""Rounds after the timed ones, for memory: what makes its measure honest would slow the timed ones down."""
DRAWS = 2000  # of the bootstrap: the ends of a 95 % interval rest on 50 of them each


@dataclass
class Samples:
    """One arm's measurements, a value a round."""

    seconds: list[float] = field(default_factory=list)
    extra_bytes: list[int] = field(default_factory=list)
    """Peak during a call, above what the process held when it began."""


@dataclass(frozen=True)
class Measured:
    """What a benchmark hands to its door; plain data but for the samples."""

    setting: dict[str, Any]
    known: dict[str, dict[str, Any]]
    """Arm → what is known of it without running it: `about`, and perhaps `held_bytes` and `counted_ratio`."""
    samples: dict[str, Samples]
    baseline: str = BASELINE
    """The arm that ratios are taken to."""


def num_calls(rounds: int) -> int:
    """How often `take_turns` calls each arm."""
    return THROWN_AWAY + rounds + MEMORY_ROUNDS


def take_turns(
    arms: Mapping[str, Callable[[int], object]], rounds: int, device: torch.device, announce: Announce = lambda _: None
) -> dict[str, Samples]:
    """Call every arm once a round with the round's number, in an order drawn anew, so that a drifting machine hits all alike."""
    samples = {name: Samples() for name in arms}
    order, started = np.random.default_rng(0), time.monotonic()
    for turn in range(num_calls(rounds)):
        if turn == THROWN_AWAY:
            each = (time.monotonic() - started) / THROWN_AWAY
            announce(
                f"{rounds} rounds of {', '.join(arms)}, {MEMORY_ROUNDS} for memory: about {each * (rounds + MEMORY_ROUNDS):.0f} s"
            )
        for name in order.permutation(list(arms)):
            if turn < THROWN_AWAY:
                arms[name](turn)
            elif turn < THROWN_AWAY + rounds:
                samples[name].seconds.append(_seconds(arms[name], turn, device))
            else:
                samples[name].extra_bytes.append(_extra_bytes(arms[name], turn, device))
    return samples


def _seconds(call: Callable[[int], object], turn: int, device: torch.device) -> float:
    synchronize = torch.get_device_module(device).synchronize
    gc.collect()  # here and not inside the measured time
    synchronize()
    started = time.perf_counter()
    call(turn)
    synchronize()
    return time.perf_counter() - started


def _extra_bytes(call: Callable[[int], object], turn: int, device: torch.device) -> int:
    gc.collect()
    devices.free_memory(device)
    _trim_heap()
    devices.reset_peak_memory(device)
    held_bytes = devices.peak_memory_bytes(device)
    call(turn)
    return devices.peak_memory_bytes(device) - held_bytes


def _trim_heap() -> None:
    """glibc keeps freed blocks below 32 MB: on a CPU they would count as held, and a call that takes them as taking nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def summary(samples: Mapping[str, Samples], baseline: str = BASELINE) -> dict[str, dict[str, Any]]:
    """Arm → its samples, median and quartiles in seconds, median extra bytes, and ratios to the baseline (its own is 1).

    Bytes are None where they were not measured.
    """
    base, arms = samples[baseline], {}
    base_bytes = _median(base.extra_bytes)
    for name, arm in samples.items():
        low, middle, high = np.percentile(arm.seconds, [25, 50, 75]).tolist()
        extra_bytes = _median(arm.extra_bytes)
        arms[name] = {
            "seconds": arm.seconds,
            "median_seconds": middle,
            "quartiles_seconds": [low, high],
            "extra_bytes": arm.extra_bytes,
            "median_extra_bytes": extra_bytes,
            "time_ratio": time_ratio(arm.seconds, base.seconds),
            "memory_ratio": extra_bytes / base_bytes if base_bytes and extra_bytes is not None else None,
        }
    return arms


def _median(values: list[int]) -> float | None:
    return float(np.median(values)) if values else None


def time_ratio(seconds: list[float], base_seconds: list[float]) -> dict[str, float]:
    """Median over the rounds of one arm's time over the baseline's in the same round; 95 % bootstrap interval over rounds."""
    ratios = np.array(seconds) / np.array(base_seconds)
    drawn = np.random.default_rng(0).integers(len(ratios), size=(DRAWS, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5]).tolist()
    return {"value": float(np.median(ratios)), "low": low, "high": high}

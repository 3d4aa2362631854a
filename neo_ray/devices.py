"""Which device computes, in which precision, and how much memory did it take? The only file that tells a CPU from a GPU."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 1 << 20
ALLOCATION_FAILED = ("can't allocate memory", "not enough memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch's allocators and CUDA's libraries say in plain RuntimeErrors."""


COMPILERS = {"cuda": "inductor"}
"""Kind of device → the backend of torch.compile there; on a CPU it gains too little for the time that it takes."""
RECOMPILATIONS = 64
"""Of one function, over the trials of a worker; PyTorch's own limit is 8. Combinations of settings are fewer."""


def local_device() -> torch.device:
    """The device of this worker. A GPU worker sees its own GPUs only (Ray sets the visible ones), so it is the current one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the device multiplies it natively, otherwise fp32 (an emulated bf16 is slower than fp32)."""
    if name != "auto":
        return {"bf16": BF16, "fp16": FP16, "fp32": FP32}[name]
    if device.type == "cuda":
        return BF16 if torch.cuda.is_bf16_supported(including_emulation=False) else FP32
    return BF16 if torch.cpu._is_avx512_bf16_supported() else FP32


def named_dtype(name: str) -> torch.dtype:
    """`torch.bfloat16` → that."""
    return {str(dtype): dtype for dtype in (FP32, BF16, FP16)}[name]


def describe(device: torch.device) -> str:
    """The device's name for a record: what the timings were taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return f"CPU {found[1].strip()}"
    return "CPU"


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Matrix products in `dtype`, trained weights and sums in fp32. Nothing at all when `dtype` is fp32."""
    if dtype == FP32:
        yield
        return
    with torch.autocast(device.type, dtype=dtype):
        yield


class Compilable:
    """A function of tensors that is compiled where that pays, and where compiling fails is taken as it stands."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._compiled: dict[str, Callable[..., Any]] = {}

    def attempt(self, device: torch.device, wanted: bool, call: Callable[[Callable[..., Any]], Any]) -> Any:
        """`call` with the function, compiled where `wanted` and this kind of device has a compiler; its result.

        Where that fails in any way but for want of memory, `call` is made once more with the function as it stands, and from
        then on with nothing else. This is said once. So `call` must be one that can be made again.
        """
        backend = COMPILERS.get(device.type) if wanted else None
        if backend is None:
            return call(self.function)
        compiled = self._compiled[backend] = self._compiled.get(backend) or self._compile(backend)
        if compiled is self.function:
            return call(self.function)
        try:
            return call(compiled)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            result = call(self.function)  # first, so that an error of its own is no failure to compile
            self._compiled[backend] = self.function
            words = " ".join(
                [f"{type(error).__name__}:", *str(error).split("\n")[:2]]
            )  # the first line may name the backend alone
            logging.getLogger("neo_ray").warning("%s is not compiled: %s", self.function.__name__.strip("_"), words)
            return result

    def take(self, device: torch.device, wanted: bool, *given: Any) -> Any:
        """The function's result for `given`."""
        return self.attempt(device, wanted, lambda function: function(*given))

    def _compile(self, backend: str) -> Callable[..., Any]:
        import torch._dynamo

        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILATIONS)
        return torch.compile(self.function, backend=backend)


def has_compiler(device: torch.device) -> bool:
    return device.type in COMPILERS


def rows_vary(device: torch.device, *values: Any) -> tuple[Any, ...]:
    """The values as they are, but a compiler knows that the first dimension of tensors has another size in other calls.

    Args:
        values: tensors, dataclasses of tensors, or None.
    """
    if has_compiler(device):
        for value in values:
            for tensor in [value] if isinstance(value, torch.Tensor) else vars(value).values() if value is not None else []:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return values


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed what is random in one optimizer step (dropout).

    A counter instead of a state: a resumed trial, an evaluation in between or another number of workers needs nothing saved.
    """
    torch.manual_seed((seed * 1_000_003 + step * 8_191 + rank) % 2**63)


def map_large_blocks(device: torch.device) -> None:
    """On a CPU: whatever has a megabyte or more goes back to the system when it is freed, for the rest of the process.

    glibc lets its limit for this grow to 32 MB. What lies below comes from a heap in which a freed tensor leaves a hole that none
    of its size fits (an aligned block asks for more than it gets), so that a step of 1.4 GB took 2.7 GB, and one with gradient
    checkpointing 1.8 GB instead of 0.6 GB (glibc 2.36, 1 thread). The price is that the system
    hands the pages out anew: in the first of these steps half as much CPU time again (4.8 and 7.1 s) on a virtual machine where
    that is dear. Where tensors are smaller, nothing changes.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None) if device.type == "cpu" and sys.platform == "linux" else None
    if tune is not None:
        tune(M_MMAP_THRESHOLD, MAPPED_BYTES)


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new peak, so that a trial's memory is its own and not that of an earlier trial on the same worker."""
    _EARLIER.pop(device, None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM to the present resident size
    except OSError:
        pass


def peak_memory_bytes(device: torch.device) -> int:
    """Peak since the last reset: allocated device memory on a GPU, resident memory of the process on a CPU."""
    return max(_EARLIER.get(device, 0), _peak_now(device))


@contextmanager
def uncounted_memory(device: torch.device) -> Iterator[None]:
    """What is taken within it is no part of the peak."""
    earlier = peak_memory_bytes(device)
    try:
        yield
    finally:
        reset_peak_memory(device)
        _EARLIER[device] = earlier


_EARLIER: dict[torch.device, int] = {}
"""The peak before what was not counted."""


def _peak_now(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes(device: torch.device) -> int | None:
    """Memory that nothing has taken: the device's, or the machine's; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else None


def free_memory(device: torch.device) -> None:
    """Give cached blocks back after a trial."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """A device or host allocation failed."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATION_FAILED)


def prepare_deepspeed() -> None:
    """Import DeepSpeed for this device. On a CPU its shared-memory extension would compile for a minute: gloo serves too."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists; Ray Train sets the real one
    import deepspeed
    import deepspeed.ops

    deepspeed.logger.setLevel("WARNING")
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__ = {}

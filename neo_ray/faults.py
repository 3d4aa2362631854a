"""Whose fault is it that a trial broke off: the trial's, its memory's, storage's, or that of the workers it ran on?"""

from __future__ import annotations

import errno
import re

import ray
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from neo_ray import cluster
from neo_ray.storage import Damaged

OF_STORAGE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENXIO, errno.ENODEV, errno.EBUSY, errno.ESTALE, errno.EREMOTEIO),
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOTCONN),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
}
"""The system's errors: full, away or not ours to write. Expired credentials come as EACCES; a wrong name is none of these."""
CLIENTS = {"botocore", "aiobotocore", "aiohttp", "gcsfs", "azure", "google", "requests", "urllib3", "httpx"}
"""Packages by which an object store is reached: what they raise has come from there."""


class LoadError(RuntimeError):
    """What every trial of a slot needs cannot be loaded: no fault of a trial."""


class StorageFailed(RuntimeError):
    """A worker could not write or read under a trial, in words: not every client's exception comes whole to another process."""


class PeerLost(RuntimeError):
    """Another process is gone or out of reach: a worker of the same trial, or the board. What ended it is the cause; the trial
    is not."""


def of_peers(error: BaseException) -> bool:
    """Did a collective fail, by another worker or the way to it? Gloo says so in a RuntimeError, NCCL by a class of torch's."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error)):
        return True
    return error.__cause__ is not None and of_peers(error.__cause__)


def of_others(error: BaseException, world_size: int) -> bool:
    """Did another process break a trial off, of whom somebody else will know more?"""
    return isinstance(error, ray.exceptions.RayError) or (world_size > 1 and of_peers(error))


def of_storage(error: BaseException) -> bool:
    """Did a disk, an object store or the way there fail? Then the trial is as good as before, and goes on once it is back."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if isinstance(error, OSError) and error.errno in OF_STORAGE:
        return True
    if any(kind.__module__.split(".")[0] in CLIENTS for kind in type(error).__mro__):
        return True
    if type(error).__name__ == "SafetensorError" and (said := re.search(r"os error (\d+)", str(error))):
        return int(said[1]) in OF_STORAGE
    return error.__cause__ is not None and of_storage(error.__cause__)


def smaller_may_fit(error: BaseException) -> bool:
    """Did the training run out of memory, and not the benchmarks, which have batches of their own?"""
    from neo_ray import devices, harness

    return devices.is_out_of_memory(error) and not isinstance(error, harness.NoRoomForSuite)


def found_damage(error: BaseException) -> bool:
    """Did a worker find that its store of targets is not what was written?"""
    return any(isinstance(failure, Damaged) for failure in getattr(error, "worker_failures", {}).values())


def why_lost(error: BaseException, nodes: set[str]) -> tuple[str, str]:
    """One line and a cause for a worker group that died. `nodes`: where its workers were."""
    failures = getattr(error, "worker_failures", None) or {}
    own = [failure for failure in failures.values() if not isinstance(failure, PeerLost)]  # of those that did not only see it
    texts = [str(e) for e in own or failures.values() if str(e).strip()] or [str(error)]
    if any(words in "\n".join(texts) for words in ("OutOfMemoryError", "memory on the node", "out of memory")):
        return "Ray or the system ended a worker for want of memory", "out_of_memory"
    silent = all(isinstance(failure, (PeerLost, WorkerHealthCheckFailedError)) for failure in failures.values())
    if cluster.was_preempted(error, nodes, unclear=len(nodes) > 1 and silent):
        return "its node is gone", "preempted"
    lines = [line.strip() for line in texts[0].splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300], "error"

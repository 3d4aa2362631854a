"""What if Ray, short of memory, ends a process that steers the sweep? Tune begins a relay anew, as after any other death."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.exceptions import ActorDiedError, OutOfMemoryError

NO_MEMORY = (
    "the driver's machine ran out of memory, and Ray ended the board, through which all trials go; what ran is kept: "
    "give the machine fewer other processes (or resources.concurrency a smaller number), and run the same command"
)


def _actors(of_ray: Any) -> type[Any]:
    """Tune's manager of its relays. Ray's own knows dead actors, and ends the whole of Tune at one that its memory monitor ended:
    that comes as an `OutOfMemoryError`, which is no `RayActorError`."""

    class Actors(of_ray):  # type: ignore[misc]
        def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
            if isinstance(exception, OutOfMemoryError):
                died = ActorDiedError()
                died.error_msg = f"{died.error_msg} {exception}"
                exception = died
            super()._actor_task_failed(tracked_actor_task, exception)

    return Actors


@contextmanager
def steering() -> Iterator[None]:
    """Tune, while it is in here, outlives the end of a relay for want of memory. A Ray built otherwise is left as it is."""
    try:
        from ray.tune.execution import tune_controller

        of_ray = tune_controller.RayActorManager
        ours = _actors(of_ray)
    except (ImportError, AttributeError):
        logging.getLogger("neo_ray").warning("this Ray ends a sweep where it ends a relay for want of memory")
        yield
        return
    tune_controller.RayActorManager = ours  # type: ignore[misc]
    try:
        yield
    finally:
        tune_controller.RayActorManager = of_ray  # type: ignore[misc]

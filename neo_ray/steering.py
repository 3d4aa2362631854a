"""What does Tune do here that Ray's own does not? It outlives a relay's end for want of memory, and ends none that is just begun.

Two parts of Tune's controller are ours while a phase runs, and Ray's own again after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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


def _next_relay(of_ray: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """Which trial takes an idle relay? One that has none. Ray's own gives it to a trial whose relay is being begun, and ends that
    one half-way, so that the next trial begins another: where trials end faster than processes begin, no relay is ever kept
    again, and each trial costs a process of seconds of the head's CPU (docs/scale.md)."""

    def maybe_reuse(controller: Any, trial: Any) -> bool:
        return trial not in controller._trial_to_actor and of_ray(controller, trial)

    return maybe_reuse


def _theirs() -> dict[str, tuple[Any, str, Callable[[Any], Any]]]:
    """What it is called → where it is, its name there, and what makes ours of it."""
    from ray.tune.execution import tune_controller

    found = {"RayActorManager": (tune_controller, "RayActorManager", _actors)}
    controller = getattr(tune_controller, "TuneController", None)
    return {**found, "TuneController": (controller, "_maybe_reuse_cached_actor", _next_relay)}


@contextmanager
def steering() -> Iterator[None]:
    """Tune as above while it is in here. A Ray built otherwise is left as it is."""
    with ExitStack() as at_end:
        for what, (where, name, make) in _theirs().items():
            if (theirs := getattr(where, name, None)) is None:
                logging.getLogger("neo_ray").warning("Ray Tune's %s is built otherwise than it was: left as it is", what)
                continue
            setattr(where, name, make(theirs))
            at_end.callback(setattr, where, name, theirs)
        yield

"""What does Tune do here that Ray's own does not? It outlives any end of a relay, and ends none that is just begun.

Parts of Tune's controller are ours while a phase runs, and Ray's own again after it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError

NO_MEMORY = (
    "the driver's machine ran out of memory, and Ray ended the board, through which all trials go; what ran is kept: "
    "give the machine fewer other processes (or resources.concurrency a smaller number), and run the same command"
)
SECONDS_TO_BEGIN = 120.0
"""Of a relay: a crowded head takes long, and one that does not come up at all must not keep its trial."""


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


def _next_relay(of_ray: Callable[..., bool]) -> Callable[..., bool]:
    """Which trial takes an idle relay? One that has none. Ray's own gives it to a trial whose relay is being begun, and ends that
    one half-way, so that the next trial begins another: where trials end faster than processes begin, no relay is ever kept
    again, and each trial costs a process of seconds of the head's CPU (docs/scale.md). One that takes minutes gives way."""
    since: dict[str, float] = {}

    def maybe_reuse(controller: Any, trial: Any) -> bool:
        if trial in controller._trial_to_actor:
            now = time.monotonic()
            if now - since.setdefault(trial.trial_id, now) < SECONDS_TO_BEGIN:
                return False
        since.pop(trial.trial_id, None)
        return of_ray(controller, trial)

    return maybe_reuse


def _failed(of_ray: Callable[..., None]) -> Callable[..., None]:
    """What if an idle relay dies as it takes its next trial? Tune hears it twice, of the relay and of the call: by the first the
    trial is to begin anew, by the second Ray's own ends it; and it would wait for that call for ever."""

    def trial_task_failure(controller: Any, trial: Any, exception: Exception) -> None:
        if trial in controller._resetting_trials and trial.status == trial.PENDING and isinstance(exception, RayActorError):
            controller._resetting_trials.discard(trial)
            return
        of_ray(controller, trial, exception)

    return trial_task_failure


def _theirs() -> list[tuple[Any, str, Callable[[Any], Any]]]:
    """Where it is, its name there, and what makes ours of it."""
    try:
        from ray.tune.execution import tune_controller
    except ImportError:
        tune_controller = None  # type: ignore[assignment]
    controller = getattr(tune_controller, "TuneController", None)
    return [
        (tune_controller, "RayActorManager", _actors),
        (controller, "_maybe_reuse_cached_actor", _next_relay),
        (controller, "_trial_task_failure", _failed),
    ]


@contextmanager
def steering() -> Iterator[None]:
    """Tune as above while it is in here. A Ray built otherwise is left as it is."""
    with ExitStack() as at_end:
        for where, name, make in _theirs():
            if (theirs := getattr(where, name, None)) is None:
                logging.getLogger("neo_ray").warning("Ray Tune has no %s any more: its own way is left as it is", name)
                continue
            setattr(where, name, make(theirs))
            at_end.callback(setattr, where, name, theirs)
        yield

"""Does the sweep go on where Ray, short of memory, ended a process that steers it, and does the driver say it where it cannot?"""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from planted import sweep
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.tune.execution import tune_controller

from neo_ray import tuner
from neo_ray.progress import Progress, SweepConsole
from neo_ray.space import build_space
from neo_ray.steering import steering

KILLED = OutOfMemoryError("7 worker(s) were killed")


class FixedResources:
    def __getattr__(self, name: str) -> object:
        return lambda *args, **kwargs: None


def failing(error: Exception) -> tuple[list[Exception], list[Exception]]:
    """What Tune hears of an actor whose task ended so: of the actor, and of its task. By the manager that Tune makes just now."""
    manager = tune_controller.RayActorManager(resource_manager=FixedResources())  # type: ignore[arg-type]
    of_actor, of_task = list[Exception](), list[Exception]()
    actor = manager.add_actor(cls=object, kwargs={}, resource_request=None, on_error=lambda _, e: of_actor.append(e))  # type: ignore[arg-type]
    manager._live_actors_to_ray_actors_resources[actor] = (None, None)  # type: ignore[assignment]
    task: Any = SimpleNamespace(_tracked_actor=actor, _on_error=lambda _, e: of_task.append(e))
    manager._actor_task_failed(task, error)
    assert manager.is_actor_failed(actor) == bool(of_actor)
    return of_actor, of_task


def test_a_relay_that_was_ended_for_its_memory_is_a_dead_actor_to_tune() -> None:
    with steering():
        of_actor, of_task = failing(KILLED)
    assert of_actor == of_task and isinstance(of_actor[0], ActorDiedError) and "7 worker(s) were killed" in str(of_actor[0])


def test_ray_alone_would_end_the_sweep() -> None:
    """Once this fails, Ray knows better, and `steering` can go."""
    with pytest.raises(RuntimeError, match="unexpected exception"):
        failing(KILLED)


def test_what_is_not_of_memory_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="^a mistake$"), steering():
        raise RuntimeError("a mistake")
    assert tune_controller.RayActorManager is RayActorManager
    with steering(), pytest.raises(RuntimeError, match="unexpected exception"):
        failing(ValueError("a mistake"))


def test_a_board_that_was_ended_for_its_memory_ends_the_sweep_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, pressed = sweep(storage={"path": str(tmp_path)}), list[bool]()

    def killed(*_: Any) -> Any:
        raise KILLED

    monkeypatch.setattr(tuner.ray, "get", killed)
    monkeypatch.setattr(tuner._thread, "interrupt_main", lambda: pressed.append(True))
    progress = Progress(config, SweepConsole(quiet=True), 1, 1, [])
    board: Any = SimpleNamespace(log_after=SimpleNamespace(remote=lambda *_: None))
    recorder = tuner._Recorder(config, build_space(config), [], board, progress, threading.Event())
    recorder.run()
    assert pressed and "ran out of memory" in str(recorder.failed) and "same command" in str(recorder.failed)


def test_a_ray_that_is_built_otherwise_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tune_controller, "RayActorManager")
    with steering():
        assert not hasattr(tune_controller, "RayActorManager")

"""Does the sweep go on where Ray, short of memory, ended a process that steers it, does the driver say it where it cannot, and
are relays left alone that are being begun?"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from planted import sweep
from ray import tune
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


class Controller:
    """Of Tune's: a trial whose relay is being begun, one that has none, and an idle relay."""

    def __init__(self) -> None:
        self.begun, self.idle = object(), SimpleNamespace()
        self._trial_to_actor, self._actor_to_trial = {"waits": self.begun}, {self.begun: "waits"}
        self._resetting_trials, self.ended = set[str](), list[object]()
        self._actor_manager = SimpleNamespace(_live_actors_to_ray_actors_resources={id(self.idle): ("its actor", None)})
        self._actor_cache = tune_controller._ObjectCache(may_keep_one=True)
        self._actor_cache.cache_object("head", id(self.idle))

    def _remove_actor(self, tracked_actor: object) -> None:
        self.ended.append(tracked_actor)

    def _schedule_trial_reset(self, *_: object) -> None:
        pass


def takes_the_idle_relay(controller: Controller, name: str) -> bool:
    class Trial(str):
        placement_group_factory, config, experiment_tag, trial_id = "head", None, None, name

        def set_ray_actor(self, _: object) -> None:
            pass

    return tune_controller.TuneController._maybe_reuse_cached_actor(controller, Trial(name))  # type: ignore[arg-type]


def test_a_relay_that_is_being_begun_is_not_ended_for_an_idle_one() -> None:
    controller = Controller()
    with steering():
        assert not takes_the_idle_relay(controller, "waits") and controller._trial_to_actor["waits"] is controller.begun
        assert takes_the_idle_relay(controller, "next") and controller._trial_to_actor["next"] == id(controller.idle)
    assert not controller.ended


def test_a_relay_that_does_not_come_up_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller()
    with steering():
        assert not takes_the_idle_relay(controller, "waits")
        monkeypatch.setattr("neo_ray.steering.SECONDS_TO_BEGIN", 0.0)
        assert takes_the_idle_relay(controller, "waits") and controller.ended == [controller.begun]


def test_ray_alone_would_end_it() -> None:
    """Once this fails, Ray knows better, and that part of `steering` can go."""
    controller = Controller()
    assert takes_the_idle_relay(controller, "waits") and controller.ended == [controller.begun]


class DiesAtItsSecond(tune.Trainable):
    """A relay that dies, once in all, as it takes its next trial."""

    def setup(self, config: dict[str, Any]) -> None:
        self.trial = config["trial"]

    def step(self) -> dict[str, Any]:
        return {"trial": self.trial, "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.trial = new_config["trial"]
        mark = Path(new_config["mark"])
        if not mark.exists():
            mark.touch()
            os._exit(1)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None


@pytest.mark.slow
def test_a_relay_that_dies_as_it_takes_its_next_trial_costs_none(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray alone ends that trial with an error."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # Ray's workers import the relay from here
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=str(short_folder / "r"))
    try:
        tuner = tune.Tuner(
            tune.with_resources(DiesAtItsSecond, {"CPU": 0.001}),
            param_space={"trial": tune.grid_search(list(range(4))), "mark": str(short_folder / "died")},
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=1),
            run_config=tune.RunConfig(
                storage_path=str(short_folder / "out"), verbose=0, failure_config=tune.FailureConfig(max_failures=3)
            ),
        )
        with steering():
            found = tuner.fit()
    finally:
        ray.shutdown()
    assert (short_folder / "died").exists() and not found.errors
    assert sorted(result.metrics["trial"] for result in found if result.metrics) == [0, 1, 2, 3]


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


@pytest.mark.parametrize("missing", ["RayActorManager", "TuneController"])
def test_a_ray_that_is_built_otherwise_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    monkeypatch.delattr(tune_controller, missing)
    monkeypatch.setattr(logging.getLogger("neo_ray"), "propagate", True)
    with steering():
        assert not hasattr(tune_controller, missing)
    assert not hasattr(tune_controller, missing)
    assert ("RayActorManager" if missing == "RayActorManager" else "_maybe_reuse_cached_actor") in caplog.text

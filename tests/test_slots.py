"""Are there as many slots as trials need and the cluster holds? The keeper with slots that do nothing, on a board of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from neo_ray import cluster, slot, slots
from neo_ray.board import Board
from neo_ray.cluster import was_preempted
from neo_ray.faults import PeerLost, why_lost
from neo_ray.settings import ConfigError
from neo_ray.slot import SlotJob, SlotRunner
from neo_ray.slots import Keeper
from neo_ray.storage import Damaged


class Idle(threading.Thread):
    """A slot that lives until it is told to end."""

    def __init__(self, slot: int) -> None:
        super().__init__(daemon=True)
        self.job, self.error, self.broken = SimpleNamespace(slot=slot), "no weights", False
        self.over = threading.Event()

    def run(self) -> None:
        self.over.wait()

    def end(self, broken: bool = False) -> None:
        self.broken = broken
        self.over.set()
        self.join()


class Called:
    """A board whose methods are called as an actor's are."""

    def __init__(self, board: Board) -> None:
        self.board = board

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *given: asyncio.run(getattr(self.board, name)(*given)))


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(slots.ray, "get", lambda value, timeout=None: value)
    said: list[str] = []
    now = SimpleNamespace(places=2, leaving=set())
    keeper: Any = Keeper(Called(Board(1)), Idle, 2, lambda: (now.places, now.leaving), said.append)  # type: ignore[arg-type]
    keeper.now, keeper.said = now, said
    yield keeper
    for runner in keeper.runners:
        runner.end()


def submit(keeper: Any, count: int) -> None:
    for number in range(count):
        keeper.board.submit.remote(f"{number:04d}", {"config": {}})


def numbers(keeper: Any) -> list[int]:
    return [runner.job.slot for runner in keeper.alive]


def test_no_more_slots_than_trials_nor_than_the_cluster_holds(keeper: Any) -> None:
    keeper.keep()
    assert numbers(keeper) == [], "no model is loaded for nothing"
    submit(keeper, 1)
    keeper.keep()
    keeper.keep()
    assert numbers(keeper) == [0]
    submit(keeper, 5)
    keeper.keep()
    assert numbers(keeper) == [0, 1] and keeper.room == 2
    keeper.now.places = 4
    keeper.keep()
    assert numbers(keeper) == [0, 1, 2, 3] and keeper.room == 4
    assert keeper.said == ["the cluster holds 4 trials at a time now (2 before)"]


def test_a_slot_whose_node_left_is_replaced_when_there_is_room(keeper: Any) -> None:
    submit(keeper, 5)
    keeper.keep()
    keeper.now.places = 1
    keeper.runners[0].end()
    keeper.keep()
    assert numbers(keeper) == [1]
    keeper.now.places = 2
    keeper.keep()
    assert numbers(keeper) == [1, 2] and keeper.given_up is None


def test_a_slot_on_a_node_that_is_about_to_leave_is_drained_and_replaced_at_once(keeper: Any) -> None:
    submit(keeper, 2)
    keeper.keep()
    keeper.board.joined.remote(0, "spot")
    keeper.now.leaving = {"spot"}
    keeper.keep()
    keeper.keep()
    assert keeper.board.why_left.remote(0) == "drained" and keeper.board.why_left.remote(1) is None
    assert keeper.said == ["slot 0 ends: its node is about to leave"]
    assert numbers(keeper) == [0, 1, 2], "the first is still putting its trial away"


def test_the_sweep_ends_only_when_nothing_can_be_kept_alive(keeper: Any) -> None:
    submit(keeper, 5)
    keeper.keep()
    keeper.runners[0].end(broken=True)
    keeper.keep()
    assert numbers(keeper) == [1] and keeper.room == 1 and keeper.given_up is None, "its place stays empty"
    keeper.runners[1].end(broken=True)
    keeper.keep()
    assert numbers(keeper) == [] and keeper.given_up == "no weights"


def test_no_node_at_all_is_waited_for(keeper: Any) -> None:
    submit(keeper, 5)
    keeper.keep()
    keeper.now.places = 0
    for runner in list(keeper.runners):
        runner.end()
    keeper.keep()
    assert numbers(keeper) == [] and keeper.given_up is None and keeper.room == 1
    keeper.now.places = 2
    keeper.keep()
    assert numbers(keeper) == [2, 3]


def test_a_slot_is_replaced_when_its_memory_creeps(monkeypatch: pytest.MonkeyPatch, keeper: Any) -> None:
    resident = [2.0, 3.4, 9.0, 3.6]
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=int(1e9 * resident.pop(0))))
    monkeypatch.setattr(slot.psutil, "Process", lambda: process)
    worker = slot.Worker(keeper.board, SimpleNamespace(slot=7), 0, None)  # type: ignore[arg-type]
    for shape, why in (("lora", None), ("lora", None), ("full", None), ("lora", "recycled")):
        worker._watch_memory(shape)
        assert keeper.board.why_left.remote(7) == why, "1.5 × 2.0 GB and 0.5 GB are 3.5 GB"


def test_a_keeper_ends_as_soon_as_it_is_told(monkeypatch: pytest.MonkeyPatch, keeper: Any) -> None:
    monkeypatch.setattr(slots, "SECONDS_BETWEEN_LOOKS", 600)
    keeper.start()
    keeper.closing.set()
    keeper.join(60)
    assert not keeper.is_alive()


@pytest.mark.parametrize("mendable", [True, False])
def test_a_slot_whose_workers_find_targets_damaged_has_them_mended_before_it_begins_anew(
    monkeypatch: pytest.MonkeyPatch, keeper: Any, mendable: bool
) -> None:
    monkeypatch.setattr(cluster, "was_preempted", lambda error, nodes, **_: False)
    monkeypatch.setattr(slot, "PAUSES_SECONDS", ())
    happened: list[str] = []

    def mend() -> None:
        happened.append("mended")
        if not mendable:
            raise ConfigError("the disk is full")

    def fit() -> None:
        happened.append("begun")
        if happened.count("begun") == 1:
            raise WorkerGroupError("x", {1: Damaged("targets: train-00001.safetensors is not what was written")})

    runner = SlotRunner(SlotJob(0, "board", None, "folder", 60), None, keeper.board, keeper.said.append, mend)  # type: ignore[arg-type]
    runner._trainer = lambda: SimpleNamespace(fit=fit)  # type: ignore[method-assign]
    runner.run()
    assert happened == (["begun", "mended", "begun"] if mendable else ["begun", "mended"])
    assert (runner.broken, runner.error == "the disk is full") == (not mendable, not mendable)


def test_another_death_has_nothing_mended(monkeypatch: pytest.MonkeyPatch, keeper: Any) -> None:
    monkeypatch.setattr(cluster, "was_preempted", lambda error, nodes, **_: False)
    monkeypatch.setattr(slot, "PAUSES_SECONDS", ())

    def fit() -> None:
        raise WorkerGroupError("x", {0: RuntimeError("Damaged")})

    runner = SlotRunner(SlotJob(0, "board", None, "folder", 60), None, keeper.board, print, lambda: 1 / 0)  # type: ignore
    runner._trainer = lambda: SimpleNamespace(fit=fit)  # type: ignore[method-assign]
    runner.run()
    assert runner.broken and runner.error == "Damaged"


def deaths(monkeypatch: pytest.MonkeyPatch, keeper: Any, story: Callable[[int], None]) -> tuple[SlotRunner, list[str]]:
    """A slot whose workers die each time they begin; `story`: what they do before, given how often they have begun."""
    monkeypatch.setattr(cluster, "was_preempted", lambda error, nodes, **_: False)
    monkeypatch.setattr(slot, "PAUSES_SECONDS", ())
    begun: list[str] = []

    def fit() -> None:
        begun.append("begun")
        story(len(begun))
        raise WorkerGroupError("x", {0: RuntimeError("SIGSEGV")})

    runner = SlotRunner(SlotJob(0, "board", None, "folder", 60), None, keeper.board, keeper.said.append)  # type: ignore[arg-type]
    runner._trainer = lambda: SimpleNamespace(fit=fit)  # type: ignore[method-assign]
    runner.run()
    return runner, begun


def test_a_trial_that_kills_its_workers_is_given_up_before_its_place_is(monkeypatch: pytest.MonkeyPatch, keeper: Any) -> None:
    """`max_failures` is larger than what a place is given. After that trial its workers die without any."""
    board = Board(5)
    keeper.board = Called(board)
    submit(keeper, 1)
    runner, begun = deaths(monkeypatch, keeper, lambda time: asyncio.run(board.take(0)) if board.queue else None)
    (end,) = (item for item in board.items["0000"] if item["kind"] == "end")
    assert end["state"] == "FAILED" and "died 6 times" in end["error"]
    assert runner.broken and len(begun) == 6 + slot.MAX_RESTARTS_IN_A_ROW, "six of the trial count as one of the place"


def test_a_place_where_every_trial_dies_is_given_up_before_it_has_failed_them_all(
    monkeypatch: pytest.MonkeyPatch, keeper: Any
) -> None:
    board = Board(0)
    keeper.board = Called(board)
    submit(keeper, 20)
    runner, begun = deaths(monkeypatch, keeper, lambda time: asyncio.run(board.take(0)) and None)
    assert runner.broken and len(begun) == 1 + slot.MAX_RESTARTS_IN_A_ROW
    assert sum(item["kind"] == "end" for item in board.log) == len(begun)


def test_a_place_that_brings_trials_to_their_end_is_not_given_up(monkeypatch: pytest.MonkeyPatch, keeper: Any) -> None:
    board = Board(0)
    keeper.board = Called(board)
    submit(keeper, 20)

    def story(time: int) -> None:
        if time < 10:
            trial, _ = asyncio.run(board.take(0))
            asyncio.run(board.finish(0, trial, {"state": "COMPLETE"}))

    assert len(deaths(monkeypatch, keeper, story)[1]) == 9 + slot.MAX_RESTARTS_IN_A_ROW


def test_the_place_of_a_slot_that_broke_is_tried_again_later_and_later_while_another_lives(
    monkeypatch: pytest.MonkeyPatch, keeper: Any
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(slots.time, "monotonic", lambda: clock.now)
    submit(keeper, 5)
    keeper.keep()
    keeper.runners[0].end(broken=True)
    for replaced_by, pause in ((2, slots.PAUSE_SECONDS), (3, 2 * slots.PAUSE_SECONDS)):
        keeper.keep()
        clock.now += pause - 1
        keeper.keep()
        assert numbers(keeper) == [1] and keeper.room == 1
        clock.now += 1
        keeper.keep()
        assert numbers(keeper) == [1, replaced_by] and keeper.room == 2 and keeper.given_up is None
        keeper.runners[-1].end(broken=True)
    keeper.runners[1].end(broken=True)
    clock.now += 10**6
    keeper.keep()
    assert numbers(keeper) == [] and keeper.given_up == "no weights", "nobody lives who would show that it has passed"


def test_a_death_with_its_node_is_told_from_another(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = [{"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": False}]
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    monkeypatch.setattr("neo_ray.cluster.draining", lambda: {"c"})
    assert was_preempted(RuntimeError("x"), {"a", "b"}) and was_preempted(RuntimeError("x"), {"c"})
    assert not was_preempted(RuntimeError("x"), {"a"}) and not was_preempted(RuntimeError("x"), set())
    assert was_preempted(PreemptionError(PreemptionInfo(None, {"a": [0]})), {"a"})
    died, gone = ray.exceptions.ActorDiedError(), ray.exceptions.ActorDiedError()
    gone._preempted = True
    assert not was_preempted(WorkerGroupError("x", {0: died}), {"a"}) and was_preempted(WorkerGroupError("x", {0: gone}), {"a"})
    wrapped = WorkerHealthCheckFailedError("as Ray Train hands it over", gone)
    assert was_preempted(WorkerGroupError("x", {0: wrapped}), {"a"})
    silent = WorkerGroupError("x", {0: WorkerHealthCheckFailedError("x", ray.exceptions.ActorUnavailableError("x", None))})
    monkeypatch.setattr("neo_ray.cluster.time.sleep", lambda seconds: alive[0].update(Alive=False))
    assert was_preempted(silent, {"a"}), "known to be dead only at the second look"


def test_who_only_saw_a_worker_end_does_not_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another one says comes first; where nobody says anything, its node is given time to be known as dead."""
    waited: list[bool] = []
    monkeypatch.setattr(cluster, "was_preempted", lambda error, nodes, unclear: bool(waited.append(unclear)))
    saw, raised = PeerLost("Connection closed by peer"), RuntimeError("a fault of its own")
    died = WorkerHealthCheckFailedError("x", ray.exceptions.ActorDiedError())
    nodes = {"a", "b"}
    assert why_lost(WorkerGroupError("x", {0: saw, 1: raised}), nodes) == ("a fault of its own", "error")
    assert why_lost(WorkerGroupError("x", {0: saw}), nodes) == ("Connection closed by peer", "error")
    assert why_lost(WorkerGroupError("x", {0: saw, 1: died}), nodes)[0] != "Connection closed by peer"
    assert why_lost(WorkerGroupError("x", {0: saw}), {"a"}) == ("Connection closed by peer", "error"), "its node lives: it spoke"
    assert waited == [False, True, True, False]


def test_want_of_memory_is_a_workers_and_not_that_of_what_stands_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "was_preempted", lambda error, nodes, unclear: False)
    killed = ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory (OutOfMemoryError)")
    assert why_lost(WorkerGroupError("x", {0: WorkerHealthCheckFailedError("x", killed)}), {"a"})[1] == "out_of_memory"

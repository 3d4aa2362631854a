"""Does a store get filled whatever becomes of its builders? A crew of builders that do as each test says, on its own clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from neo_ray import cluster, crew
from neo_ray.crew import Crew, SourcesDamaged, TargetsFailed
from neo_ray.listening import LOADING
from neo_ray.settings import ConfigError
from neo_ray.storage import Damaged
from neo_ray.stores import Shard

SILENCE_SECONDS = 60.0
DIED = ray.exceptions.ActorDiedError()
NEVER = object()


class Actor:
    """A builder on a node of its own. Each of its answers is there at once, or never, or is an error."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number, self.tokens, self.killed = world, number, 0, False

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *given: SimpleNamespace(of=lambda: self._answer(name, *given)))

    def _answer(self, name: str, shard: Shard | None = None) -> Any:
        if self.killed:
            return DIED
        if name == "node":
            return f"node-{self.number}" if self.number < self.world.rooms else NEVER
        if name == "tokens_seen":
            return self.tokens
        return self.world.does(self, shard)


class World:
    """Of a crew: its builders, a clock that waiting moves, and what has been filled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, does: Callable[[Actor, Shard | None], Any], num_shards: int = 6) -> None:
        self.does, self.now, self.rooms = does, 0.0, 10**6
        self.places, self.leaving, self.gone = 2, set[str](), set[str]()
        self.actors: list[Actor] = []
        self.said: list[str] = []
        self.filled: list[str] = []
        self.landed = set[str]()
        stand_in = SimpleNamespace(wait=self._wait, get=self._get, kill=self._kill, exceptions=ray.exceptions)
        monkeypatch.setattr(crew, "ray", stand_in)
        monkeypatch.setattr(crew.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(cluster, "was_preempted", lambda error, nodes: bool(nodes & (self.gone | self.leaving)))
        shards = [Shard("train", number, number, number + 1) for number in range(num_shards)]
        self.crew = Crew(self._make, shards, self._look, 2, SILENCE_SECONDS, self._landed, self._filled, self.said.append)

    def run(self, turns: int = 300) -> Counter[str]:
        """Shard → how often it was filled, once all are."""
        while self.crew.left:
            self.crew.work(10)
            turns -= 1
            assert turns, f"it does not end: {self.filled}, {self.said}"
        return Counter(self.filled)

    def _make(self) -> Actor:
        self.actors.append(Actor(self, len(self.actors)))
        return self.actors[-1]

    def _look(self) -> tuple[int, set[str]]:
        return self.places, self.leaving

    def _landed(self, shard: Shard) -> dict[str, Any]:
        return {"tokens": 1} if shard.name in self.landed else {}

    def _filled(self, shard: Shard | None, told: dict[str, Any]) -> None:
        if shard is not None:
            self.filled.append(shard.name)

    def _wait(self, calls: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        assert calls, "a crew that waits for nothing waits for ever"
        self.now += timeout and 1.0
        done = next((call for call in calls if call.of() is not NEVER), None)
        if done is None:
            self.now += timeout
        return [done] if done is not None else [], []

    def _get(self, call: Any) -> Any:
        answer = call.of()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _kill(self, actor: Actor) -> None:
        actor.killed = True


def works(actor: Actor, shard: Shard | None) -> Any:
    actor.tokens += 1
    return {"tokens": 1 if shard else 0}


def of_ray(cause: Exception) -> Exception:
    return ray.exceptions.RayTaskError("fill", "Traceback\nits last line", cause)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    return lambda does=works, **more: World(monkeypatch, does, **more)


def once(world: World) -> dict[str, int]:
    return {f"train-{number:05d}": 1 for number in range(world.crew.left)}


def test_as_many_builders_as_the_cluster_holds_and_no_more_than_there_are_shards(world: Callable[..., World]) -> None:
    one = world()
    whole = once(one)
    assert one.run() == whole and len(one.actors) == 2 and one.crew.restarts == 0
    one.crew.end()
    assert all(actor.killed for actor in one.actors)
    few = world(num_shards=1)
    few.run()
    assert len(few.actors) == 1


def test_builders_come_as_the_cluster_grows_and_one_waits_where_it_holds_none(world: Callable[..., World]) -> None:
    one = world()
    one.places, one.rooms = 0, 0
    for _ in range(3):
        one.crew.work(10)
    assert len(one.actors) == 1, "so that the cluster knows that a node is wanted"
    one.places, one.rooms = 3, 3
    whole = once(one)
    assert one.run() == whole and len(one.actors) == 3
    assert "  the cluster holds 3 teachers at a time now (1 before)" in one.said


def test_builders_whose_nodes_went_are_no_failure_and_a_long_fill_ends(world: Callable[..., World]) -> None:
    """Every builder's node goes with its first shard, until nine have gone: max_failures is 2."""

    def lost(actor: Actor, shard: Shard | None) -> Any:
        if shard is not None and actor.number < 9:
            actor.world.gone.add(f"node-{actor.number}")
            return DIED
        return works(actor, shard)

    one = world(lost)
    whole = once(one)
    assert one.run() == whole
    assert one.crew.restarts == 9 and one.crew.failures == 0
    assert sum("node is gone" in line for line in one.said) == 9


def test_a_builder_on_a_node_that_is_about_to_leave_gets_no_further_shard_and_is_replaced(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "SECONDS_BETWEEN_LOOKS", 0.0)
    given = set[str]()

    def told_to_leave(actor: Actor, shard: Shard | None) -> Any:
        if shard is not None and actor.number == 0:
            actor.world.leaving = {"node-0"}
            given.add(shard.name)
        return works(actor, shard)

    one = world(told_to_leave)
    whole = once(one)
    assert one.run() == whole
    assert given == {"train-00000"} and one.actors[0].killed and len(one.actors) == 3 and one.crew.restarts == 0


def test_deaths_between_shards_that_are_filled_do_not_add_up(world: Callable[..., World]) -> None:
    """Each builder fills one shard and dies of the next, which another fills: five deaths, and max_failures is 2."""

    def short_lived(actor: Actor, shard: Shard | None) -> Any:
        if shard is not None and actor.__dict__.setdefault("first", shard.name) != shard.name:
            return DIED
        return works(actor, shard)

    one = world(short_lived)
    one.places = 1
    whole = once(one)
    assert one.run() == whole and one.crew.restarts == 5


def test_a_shard_that_ends_each_of_its_builders_ends_the_fill_by_name_though_others_are_filled(
    world: Callable[..., World],
) -> None:
    one = world(lambda actor, shard: DIED if shard is not None and shard.number == 1 else works(actor, shard), num_shards=40)
    with pytest.raises(TargetsFailed, match=r"train-00001 \(builders that it has ended: 3\): The actor died"):
        one.run()
    assert 0 < one.crew.left < 40 and one.crew.restarts == 3


def test_builders_that_never_come_up_end_the_fill(world: Callable[..., World]) -> None:
    one = world(lambda actor, shard: DIED)
    with pytest.raises(TargetsFailed, match=r"^the teacher's targets: The actor died"):
        one.run()
    assert one.crew.restarts == 3


def test_a_builder_that_falls_silent_is_replaced_and_that_is_a_failure(world: Callable[..., World]) -> None:
    one = world(lambda actor, shard: NEVER if shard is not None and actor.number == 0 else works(actor, shard))
    one.places = 1
    whole = once(one)
    assert one.run() == whole
    assert one.actors[0].killed and len(one.actors) == 2 and one.crew.restarts == 1
    assert one.said == ["  a teacher is lost (no token for 60 s): another goes on with train-00000"]
    always = world(lambda actor, shard: NEVER if shard is not None else works(actor, shard))
    with pytest.raises(TargetsFailed, match=r"train-0000\d \(.*\): no token for 60 s"):
        always.run()
    assert always.crew.restarts == 3 and always.filled == []


def test_loading_may_take_four_times_that_and_then_is_hung(world: Callable[..., World]) -> None:
    one = world(lambda actor, shard: NEVER if shard is None and actor.number == 0 else works(actor, shard))
    one.places = 1
    whole = once(one)
    assert one.run() == whole and LOADING * SILENCE_SECONDS < one.now < (LOADING + 1) * SILENCE_SECONDS
    assert one.said == ["  a teacher is lost (the models are not loaded after 240 s): another goes on"]


def test_a_builder_that_goes_on_or_waits_for_a_node_is_not_silent(world: Callable[..., World]) -> None:
    """A shard that takes ten times the silence, token by token; a node that comes after as long."""

    def slowly(actor: Actor, shard: Shard | None) -> Any:
        actor.tokens += 1
        begun = actor.__dict__.setdefault("begun", {}).setdefault(shard, actor.world.now)
        return {"tokens": 1} if shard is None or actor.world.now > begun + 10 * SILENCE_SECONDS else NEVER

    one = world(slowly, num_shards=1)
    assert one.run() == {"train-00000": 1} and one.crew.restarts == 0
    late = world()
    late.rooms = 0
    while late.now < 10 * LOADING * SILENCE_SECONDS:
        late.crew.work(10)
    late.rooms, whole = 2, once(late)
    assert late.run() == whole and late.crew.restarts == 0


def test_a_driver_that_could_not_listen_blames_no_builder(world: Callable[..., World]) -> None:
    """A builder that shows no token for two turns, between which the cluster takes three times the silence to answer."""
    polls: list[Shard] = []

    def shortly(actor: Actor, shard: Shard | None) -> Any:
        polls.extend([shard] if shard is not None else [])
        return {"tokens": 1} if shard is None or len(polls) > 3 else NEVER

    one = world(shortly, num_shards=1)

    def slow() -> tuple[int, set[str]]:
        one.now += 3 * SILENCE_SECONDS if len(polls) == 1 else 0
        return 1, set()

    one.crew.look = slow
    assert one.run() == {"train-00000": 1} and one.crew.restarts == 0 and one.now > 3 * SILENCE_SECONDS


def test_a_shard_that_a_dead_builder_had_filled_is_not_filled_again(world: Callable[..., World]) -> None:
    def written_and_dead(actor: Actor, shard: Shard | None) -> Any:
        if shard is not None and shard.number == 0:
            actor.world.landed.add(shard.name)
            return DIED
        return works(actor, shard)

    one = world(written_and_dead)
    whole = once(one)
    assert one.run() == whole and one.crew.restarts == 1 and one.crew.failures_of == {}


@pytest.mark.parametrize(
    ("cause", "kind", "words"),
    [
        (ConfigError("no such model"), ConfigError, "^no such model"),
        (Damaged("weights"), SourcesDamaged, "^weights"),
        (ValueError("x"), TargetsFailed, "^the teacher's targets: its last line"),
    ],
)
def test_what_a_builder_says_ends_the_fill(world: Callable[..., World], cause: Exception, kind: Any, words: str) -> None:
    one = world(lambda actor, shard: of_ray(cause))
    with pytest.raises(kind, match=words):
        one.run()
    assert one.crew.restarts == 0


def test_a_cluster_that_does_not_answer_is_asked_again(world: Callable[..., World]) -> None:
    one = world()
    one.crew.work(10)
    looks = iter([RuntimeError("no answer")])

    def look() -> tuple[int, set[str]]:
        for error in looks:
            raise error
        return 3, set()

    one.crew.look = look
    whole = once(one)
    assert one.run() == whole and len(one.actors) == 3

"""Who fills a store's shards? As many builders as the cluster holds, while its nodes come and go, until no shard is lacking."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray

from neo_ray import cluster
from neo_ray.listening import LOADING
from neo_ray.settings import ConfigError
from neo_ray.storage import Damaged
from neo_ray.stores import Shard

SECONDS_BETWEEN_LOOKS = 2.0
Look = Callable[[], tuple[int, set[str]]]
"""How many builders the cluster holds now, and the ids of the nodes that are about to leave it."""


class TargetsFailed(RuntimeError):
    """The teacher cannot fill the store."""


class SourcesDamaged(TargetsFailed):
    """A builder was brought something else than was handed over."""


@dataclass(eq=False)
class _Member:
    """A builder: an actor with `node`, `ready`, `fill` and `tokens_seen`."""

    actor: Any
    call: Any
    """The answer that it owes; None of one that is free."""
    nodes: set[str] = field(default_factory=set)
    """Its node's id; empty while it waits for one."""
    loaded: bool = False
    shard: Shard | None = None
    sign: Any = None
    """The answer to how far it is."""
    tokens: int = -1
    heard: float = 0.0
    """When it was last seen to go on, by `time.monotonic`."""

    def begins(self, call: Any, shard: Shard | None = None) -> None:
        self.call, self.shard, self.heard = call, shard, time.monotonic()


class Crew:
    """Gives shards to builders that are up: one that waits for a node keeps nobody waiting.

    A builder that dies or falls silent is replaced. That is a failure unless its node is gone or about to leave; so many in a
    row, or of one shard, end it.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        lacking: Sequence[Shard],
        look: Look,
        max_failures: int,
        silence_seconds: float,
        landed: Callable[[Shard], dict[str, Any]],
        filled: Callable[[Shard | None, dict[str, Any]], None],
        announce: Callable[[str], None],
    ) -> None:
        """
        Args:
            max_failures: in a row, without a shard that was filled, or of one shard.
            silence_seconds: without a token after which a builder hangs; four times that while it loads.
            landed: what this turn has filled it with, for a shard whose builder is gone; empty where it has not.
            filled: is told of each shard, and of None for each builder that is up, what was read for it.
        """
        self.make, self.look, self.landed, self.filled, self.announce = make, look, landed, filled, announce
        self.max_failures, self.silence_seconds = max_failures, silence_seconds
        self.todo, self.left = deque(lacking), len(lacking)
        self.members: list[_Member] = []
        self.places, self.leaving, self.looked = 0, set[str](), -SECONDS_BETWEEN_LOOKS
        self.watched = time.monotonic()
        self.failures, self.failures_of = 0, Counter[str]()
        self.restarts = 0

    def work(self, patience_seconds: float) -> bool:
        """One turn. Waits so long at most for an answer; returns whether one came.

        Raises:
            ConfigError, TargetsFailed: as a builder has it, or builders die again and again.
            SourcesDamaged: handed over again, the sources may serve.
        """
        self._look()
        self._employ()
        patience_seconds = min(patience_seconds, self.silence_seconds / 4)
        done, _ = ray.wait([member.call for member in self.members if member.call is not None], timeout=patience_seconds)
        for member in [member for member in self.members if member.call in done]:
            self._hear(member)
        self._watch()
        return bool(done)

    def end(self) -> None:
        for member in list(self.members):
            self._dismiss(member)

    def _look(self) -> None:
        if time.monotonic() - self.looked < SECONDS_BETWEEN_LOOKS:
            return
        try:
            places, self.leaving = self.look()
        except Exception:  # a question that was not answered is asked again
            logging.getLogger("neo_ray").exception("the builders could not be looked after")
            places = self.places
        self.looked = time.monotonic()
        places = max(1, places)  # one that waits for a node lets the cluster know that it is wanted
        if self.places and places != self.places:
            self.announce(f"  the cluster holds {places} teachers at a time now ({self.places} before)")
        self.places = places

    def _employ(self) -> None:
        """Part with whom the cluster parts, begin those that are missing, and give out shards."""
        for member in [member for member in self.members if member.call is None and member.nodes & self.leaving]:
            self._dismiss(member)
        staying = sum(not member.nodes & self.leaving for member in self.members)
        for _ in range(min(self.places, self.left) - staying):
            actor = self.make()
            self.members.append(_Member(actor, actor.node.remote()))
        for member in self.members:
            if member.call is None and self.todo:
                shard = self.todo.popleft()
                member.begins(member.actor.fill.remote(shard), shard)

    def _hear(self, member: _Member) -> None:
        try:
            told = ray.get(member.call)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Damaged):
                raise SourcesDamaged(str(error.cause)) from None
            own = isinstance(error.cause, (ConfigError, TargetsFailed))
            raise error.cause if own else TargetsFailed(_in_words(_last_line(error))) from None
        except ray.exceptions.RayError as error:  # its process is gone
            self._replace(member, _last_line(error, logging.INFO), blamed=not cluster.was_preempted(error, member.nodes))
            return
        if not member.nodes:
            member.nodes = {told}
            member.begins(member.actor.ready.remote())
            return
        member.loaded, member.call = True, None
        self._count(member.shard, told)

    def _count(self, shard: Shard | None, told: dict[str, Any]) -> None:
        if shard is not None:
            self.left -= 1
            self.failures = 0
        self.filled(shard, told)

    def _watch(self) -> None:
        """Replace those of whom nothing was heard for too long. A builder that waits for its node is not silent."""
        now, listened = time.monotonic(), self.watched
        self.watched = now
        if now - listened > self.silence_seconds / 2:  # a place or a journal that did not answer kept this process from listening
            for member in self.members:
                member.heard = now
        for member in [member for member in self.members if member.call is not None and member.nodes]:
            if member.loaded:
                _ask(member)
            limit = self.silence_seconds * (1 if member.loaded else LOADING)
            if time.monotonic() - member.heard > limit:
                missed = "no token for" if member.loaded else "the models are not loaded after"
                self._replace(member, f"{missed} {limit:g} s", blamed=True)

    def _replace(self, member: _Member, why: str, blamed: bool) -> None:
        """Another goes on, unless it is to blame for one too many. A shard that it has filled, unheard, stays filled."""
        self._dismiss(member)
        self.restarts += 1
        shard = member.shard
        told = self.landed(shard) if shard is not None else {}
        if told:
            self._count(shard, told)
            return
        if shard is not None:
            self.todo.appendleft(shard)
        if not blamed:
            self.announce(f"  a teacher's node is gone: another goes on{_with(shard)}")
            return
        self.failures += 1
        name = shard.name if shard is not None else ""
        self.failures_of[name] += 1
        if self.failures > self.max_failures or (name and self.failures_of[name] > self.max_failures):
            where = f"{name} (builders that it has ended: {self.failures_of[name]}): " if name else ""
            raise TargetsFailed(_in_words(where + why))
        self.announce(f"  a teacher is lost ({why}): another goes on{_with(shard)}")

    def _dismiss(self, member: _Member) -> None:
        ray.kill(member.actor)
        self.members.remove(member)


def _ask(member: _Member) -> None:
    """How many tokens has its teacher seen? Its answer comes when it can; another number is a sign of life."""
    if member.sign is None:
        member.sign = member.actor.tokens_seen.remote()
    elif ray.wait([member.sign], timeout=0)[0]:
        with suppress(ray.exceptions.RayError):  # the answer that it owes tells
            tokens = ray.get(member.sign)
            if tokens != member.tokens:
                member.tokens, member.heard = tokens, time.monotonic()
        member.sign = None


def _with(shard: Shard | None) -> str:
    return f" with {shard.name}" if shard is not None else ""


def _last_line(error: BaseException, level: int = logging.ERROR) -> str:
    logging.getLogger("neo_ray").log(level, "the store of targets: %s", error)
    return str(error).strip().splitlines()[-1][:300]


def _in_words(reason: str) -> str:
    return f"the teacher's targets: {reason}"

"""How does the teacher see every token once a sweep? Actors fill the shards that a store still lacks."""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from neo_ray import access, filling, inventory, models, stores
from neo_ray.account import NO_TRIAL, account
from neo_ray.config import SweepConfig
from neo_ray.data import TokenData, open_data
from neo_ray.heldout import num_evaluated
from neo_ray.parts import Sources, TargetSource
from neo_ray.records import Journal
from neo_ray.settings import ConfigError
from neo_ray.storage import Folder, address
from neo_ray.storehouse import InObjects, OnDisk, storehouse
from neo_ray.supply import Supply, row_bytes

Announce = Callable[[str], None]
SECONDS_BETWEEN_WORDS = 10.0


class TargetsFailed(RuntimeError):
    """The teacher cannot fill the store."""


def stored_targets(
    config: SweepConfig,
    supply: Supply,
    sources: Sources,
    workers: int,
    tokens_of_trials: int | None,
    announce: Announce,
    journal: Journal | None = None,
    past: Sequence[dict[str, Any]] = (),
) -> Sources:
    """The sources with a whole store in place of the teacher. What is there already and intact is taken as it is.

    Under `targets.mode: auto` the teacher stays alive where a store does not pay, does not fit, or cannot hold its numbers.

    Args:
        workers: how many actors may work at once, each with a trial worker's resources.
        tokens_of_trials: what all trials together train on, where that is known.
        journal: is told what filling the store took; `past`: its events so far.

    Raises:
        ConfigError: the disk is too small, or the mode does not suit the models.
        TargetsFailed: the teacher does not load, or an actor keeps dying.
    """
    if supply.mode == "live" or sources.teacher is None:
        return sources
    data = open_data(sources.data)
    source = source_of(config, supply, sources, data)
    folder, cut = source.place, wanted(config, data, stores.shards(data, source.bytes_of_row))
    bill, house = _Bill(journal, folder, source.recipe.key), storehouse(folder)
    with house.sole_builder(announce):
        bill.catch_up(cut, past)
        lacking = stores.missing(folder, data, cut, with_head=supply.mode == "hidden")
        if lacking:
            access.check(access.wanted(teacher=sources.teacher), config.resources, announce)
        try:
            if lacking:
                _check_pays(config, data, tokens_of_trials)
                house.make_room(source.bytes_of_row * sum(num_rows(data, lacking).values()))
                _describe(house, config, source, num_rows(data, cut))
                house.add_filled(*_fill(config, source, sources, data, lacking, workers, announce, bill))
            else:
                _describe(house, config, source, num_rows(data, cut))
                announce(f"the teacher's targets ({supply.mode}): reused from {folder}")
        except ConfigError as error:
            if config.targets.mode != "auto":
                raise
            announce(f"the teacher runs in every trial: {error}")
            return sources
        house.mark_used()
        bill.settle(source.recipe.mode, data, cut, len(lacking))
    return dataclasses.replace(sources, targets=source)


def _describe(house: OnDisk | InObjects, config: SweepConfig, source: TargetSource, rows: dict[str, int]) -> None:
    facts = {"recipe": dataclasses.asdict(source.recipe), "bytes_of_row": source.bytes_of_row}
    house.describe({**facts, **inventory.names_of(config)}, rows)


def wanted(config: SweepConfig, data: TokenData, cut: list[stores.Shard]) -> list[stores.Shard]:
    """The shards that a trial of this sweep may read: all for training, which is shuffled; of the rest what is evaluated."""
    limit = config.evaluation.max_tokens  # no axis
    read = {name: num_evaluated(split.num_tokens, limit) for name, split in data.splits.items()}
    return [shard for shard in cut if shard.split == "train" or shard.first < read[shard.split]]


def source_of(config: SweepConfig, supply: Supply, sources: Sources, data: TokenData) -> TargetSource:
    """The store that the sweep takes, whether or not it is there."""
    assert supply.mode != "live" and sources.teacher is not None
    projects = supply.mode == "projection"
    recipe = stores.Recipe(
        mode=supply.mode,
        data=data.fingerprint,
        teacher=models.identity(sources.teacher.path, sources.teacher.revision),
        dtype=_dtype_of_workers(config, supply.dtype),
        quantization=sources.teacher.quantization,
        vocabulary=sources.vocabulary,
        temperature=supply.temperature,
        top_k=min(supply.top_k, sources.vocabulary),
        head=models.identity(sources.student.path, sources.student.revision) if projects else None,
    )
    folder = config.targets_folder / recipe.key
    return TargetSource(address(folder), recipe, _bytes_of_row(recipe, sources), config.storage.scratch)


def asks_a_worker(config: SweepConfig, dtype: str) -> bool:
    """Does it take a Ray to know which store a sweep takes?"""
    return dtype == "auto" and bool(config.resources.address or config.resources.gpus_per_worker)


def _dtype_of_workers(config: SweepConfig, name: str) -> str:
    """The precision that `auto` comes to where the trials run, which may be another kind of machine."""
    from neo_ray import devices

    def resolved() -> str:
        return str(devices.resolve_dtype(name, devices.local_device()))

    if not asks_a_worker(config, name):
        return resolved()
    worker = ray.remote(resolved).options(
        num_cpus=config.resources.cpus_per_worker,
        num_gpus=config.resources.gpus_per_worker,
        accelerator_type=config.resources.accelerator_type,
    )
    return ray.get(worker.remote())


def _check_pays(config: SweepConfig, data: TokenData, tokens_of_trials: int | None) -> None:
    """Raises ConfigError where the teacher would read more for the store than for all trials, and nobody asked for a store."""
    whole = int(data.split("train").num_tokens.sum())
    if config.targets.mode == "auto" and tokens_of_trials is not None and tokens_of_trials < whole:
        raise ConfigError(f"all trials together train on {tokens_of_trials:,} tokens, and the data has {whole:,}")


def _bytes_of_row(recipe: stores.Recipe, sources: Sources) -> int:
    mode = recipe.mode
    if mode == "topk":
        return row_bytes(mode, recipe.top_k)
    source, where = (sources.student, "student.model") if mode == "projection" else (sources.teacher, "teacher.model")
    assert source is not None
    own = models.read_config(source.path, source.revision, source.trust_remote_code, where)
    return row_bytes(mode, int(own.get_text_config().hidden_size))


def _fill(
    config: SweepConfig,
    source: TargetSource,
    sources: Sources,
    data: TokenData,
    lacking: list[stores.Shard],
    workers: int,
    announce: Announce,
    bill: _Bill,
) -> tuple[int, float]:
    """Give shards to actors that are up until none is lacking: one that waits for a node keeps nobody waiting.

    Returns the tokens that the teacher has read, and how many a second.
    """
    resources, todo, left = config.resources, deque(lacking), len(lacking)
    builder: Any = ray.remote(_Builder).options(
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        accelerator_type=resources.accelerator_type,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, int(resources.cpus_per_worker)))}},
    )
    actors: list[Any] = []
    busy: dict[Any, tuple[Any, stores.Shard | None]] = {}

    def begin() -> None:
        actors.append(builder.remote(source, sources, bill.fill))
        busy[actors[-1].ready.remote()] = actors[-1], None

    total = num_tokens(data, lacking)
    announce(f"the teacher reads {total:,} tokens, once for all trials ({source.recipe.mode} targets, at {source.folder})")
    speed, failures = _Speed(total, announce), 0
    bill.begin()
    try:
        for _ in range(min(workers, left)):
            begin()
        while left:
            done, _ = ray.wait(list(busy), timeout=SECONDS_BETWEEN_WORDS)
            if not done:
                speed.silent(len(actors))
                continue
            actor, shard = busy.pop(done[0])
            try:
                told = ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                own = isinstance(error.cause, (ConfigError, TargetsFailed))
                raise error.cause if own else TargetsFailed(_last_line(error)) from None
            except ray.exceptions.RayError as error:  # its process died
                failures = bill.restarts = failures + 1
                if failures > resources.max_failures:
                    raise TargetsFailed(_last_line(error)) from None
                todo.extendleft([shard] if shard is not None else [])
                begin()
                continue
            if shard is not None:
                left -= 1
                bill.add(shard.name, told)
            speed.add(told["tokens"])
            if todo:
                shard = todo.popleft()
                busy[actor.fill.remote(shard)] = actor, shard
    finally:
        for actor in actors:
            ray.kill(actor)
    return speed.end()


def _last_line(error: BaseException) -> str:
    logging.getLogger("neo_ray").error("the store of targets: %s", error)
    return f"the teacher's targets: {str(error).strip().splitlines()[-1][:300]}"


class _Bill:
    """What filling the store takes, told to the journal shard by shard, so that a driver that is killed leaves it there."""

    def __init__(self, journal: Journal | None, folder: Folder, store: str) -> None:
        self.journal, self.folder, self.store = journal, folder, store
        self.fill, self.restarts, self.started = uuid.uuid4().hex[:12], 0, time.monotonic()

    def begin(self) -> None:
        self._write("filling", fill=self.fill, store=self.store)

    def add(self, shard: str, told: dict[str, Any]) -> None:
        """`told`: what stands in the shard's record."""
        self._write("filled", shard=shard, **told)

    def catch_up(self, cut: list[stores.Shard], past: Sequence[dict[str, Any]]) -> None:
        """Shards whose driver was killed before it heard of them: their records name its turn. `past`: the journal's events."""
        before = account(past, ())
        if not before.fills:
            return
        for shard in cut:
            told = stores.read_record(self.folder, shard.name)
            if told.get("fill") in before.fills and (told["fill"], shard.name) not in before.filled:
                self.add(shard.name, {name: told[name] for name in ("fill", "tokens", "seconds")})

    def settle(self, mode: str, data: TokenData, cut: list[stores.Shard], num_filled: int) -> None:
        """The store is whole."""
        self._write(
            "targets",
            store=self.store,
            mode=mode,
            shards=len(cut),
            filled=num_filled,
            tokens=num_tokens(data, cut),
            rows=sum(stores.read_record(self.folder, shard.name)["rows"] for shard in cut),
            labels=sum(num_rows(data, cut).values()),
            restarts=self.restarts,
            seconds=time.monotonic() - self.started,
        )

    def _write(self, event: str, **fields: Any) -> None:
        if self.journal is not None:
            self.journal.write(event, NO_TRIAL, **fields)


def num_rows(data: TokenData, wanted: list[stores.Shard]) -> dict[str, int]:
    """Name of a shard → its scored positions."""
    return {shard.name: stores.num_rows(data.split(shard.split), shard) for shard in wanted}


def num_tokens(data: TokenData, wanted: list[stores.Shard]) -> int:
    """Tokens of the examples of shards, each once."""
    return sum(int(data.split(shard.split).num_tokens[shard.first : shard.last].sum()) for shard in wanted)


class _Speed:
    """Says from time to time how fast the teacher reads, from the first shard on."""

    def __init__(self, total: int, announce: Announce) -> None:
        self.total, self.announce, self.seen = total, announce, 0
        self.started = self.spoken = time.monotonic()

    def add(self, tokens: int) -> None:
        if not self.seen and not tokens:  # an actor is up
            self.started = time.monotonic()
        self.seen += tokens
        now = time.monotonic()
        if self.seen and now - self.spoken > SECONDS_BETWEEN_WORDS:
            self.spoken, rate = now, self.seen / (now - self.started)
            left = (self.total - self.seen) / rate
            self.announce(f"  {self.seen:,} of {self.total:,} tokens, {rate:,.0f} tokens/s, about {left:.0f} s left")

    def silent(self, num_actors: int) -> None:
        if not self.seen and time.monotonic() - self.spoken > 6 * SECONDS_BETWEEN_WORDS:
            self.spoken = time.monotonic()
            self.announce(f"  waiting for room for the teacher ({num_actors} workers asked for)")

    def end(self) -> tuple[int, float]:
        rate = self.seen / (time.monotonic() - self.started)
        self.announce(f"  done: {rate:,.0f} tokens/s")
        return self.seen, rate


@contextmanager
def _writing(what: str) -> Iterator[None]:
    """A full disk, or an object store that does not answer. What was half written is gone again."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise TargetsFailed(
            f"the teacher's targets: {what} cannot be written ({reason}); once it can, the same command goes on where it was"
        ) from None


class _Builder:
    """Holds the teacher, and fills a shard at a time."""

    def __init__(self, source: TargetSource, sources: Sources, fill: str) -> None:
        self.source, self.sources, self.folder, self.turn = source, sources, source.place, fill

    def ready(self) -> dict[str, Any]:
        """Load the models; no tokens."""
        from neo_ray import devices
        from neo_ray.parts import load_source

        device, recipe, sources = devices.local_device(), self.source.recipe, self.sources
        dtype = devices.named_dtype(recipe.dtype)
        assert sources.teacher is not None
        head = None
        if recipe.mode == "projection":
            head = models.output_head(load_source(sources.student, dtype, device, "student.model")).copy()
        teacher = load_source(sources.teacher, dtype, device, "teacher.model")
        self.teacher = filling.Teacher(recipe, teacher, open_data(sources.data), sources.pad_id, head)
        if recipe.mode == "hidden":
            with _writing(f"{self.folder}"):
                stores.write_head(self.folder, self.teacher.head)
        return {"tokens": 0}

    def fill(self, shard: stores.Shard) -> dict[str, Any]:
        """Returns what it took: the driver's turn, the tokens that the teacher has seen for it, and the time."""
        before, started = self.teacher.tokens_seen, time.monotonic()
        tensors = self.teacher.fill(shard)
        seconds = time.monotonic() - started
        told = {"fill": self.turn, "tokens": self.teacher.tokens_seen - before, "seconds": seconds}
        with _writing(f"{self.folder / shard.name}"):
            stores.write_shard(self.folder, shard, tensors, told)
        return told

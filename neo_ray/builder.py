"""How does the teacher see every token once a sweep? Builders fill the shards that a store still lacks."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from rich.console import Console

from neo_ray import access, filling, inventory, models, stores
from neo_ray.account import NO_TRIAL, account
from neo_ray.config import SweepConfig
from neo_ray.crew import Crew, Look, TargetsFailed
from neo_ray.data import TokenData, open_data
from neo_ray.heldout import num_evaluated
from neo_ray.parts import ModelSource, Sources, TargetSource, received
from neo_ray.progress import SECONDS_BETWEEN_WORDS, Filling
from neo_ray.records import Journal
from neo_ray.settings import ConfigError
from neo_ray.storage import Folder, NoRoom, Remote, address, check_room
from neo_ray.storehouse import sole_builder, storehouse
from neo_ray.supply import Supply, row_bytes
from neo_ray.weights import identity

Announce = Callable[[str], None]


def stored_targets(
    config: SweepConfig,
    supply: Supply,
    sources: Sources,
    look: Look,
    tokens_of_trials: int | None,
    announce: Announce,
    journal: Journal | None = None,
    past: Sequence[dict[str, Any]] = (),
    console: Console | None = None,
) -> Sources:
    """The sources with a whole store in place of the teacher. What is there already and intact is taken as it is.

    Under `targets.mode: auto` the teacher stays alive where a store does not pay, does not fit, or cannot hold its numbers.

    Args:
        look: how many builders the cluster holds now, each with a trial worker's resources, and which nodes leave it.
        tokens_of_trials: what all trials together train on, where that is known.
        journal: is told what filling the store took; `past`: its events so far.
        console: for a bar, where it is a terminal that has no other.

    Raises:
        ConfigError: the disk is too small, or the mode does not suit the models.
        TargetsFailed: the teacher does not load, or builders keep dying or falling silent.
        SourcesDamaged: handed over again, they may serve.
    """
    if supply.mode == "live" or sources.teacher is None:
        return sources
    data = open_data(sources.data)
    source = source_of(config, supply, sources, data)
    folder, cut = source.place, wanted(config, data, stores.shards(data, source.bytes_of_row))
    bill = _Bill(journal, folder, source.recipe.key)
    with sole_builder(folder, announce):
        bill.catch_up(cut, past)
        lacking = stores.missing(folder, data, cut, with_head=supply.mode == "hidden")
        if lacking:
            access.check(access.wanted(teacher=sources.teacher), config.resources, announce)
        try:
            if lacking:
                _check_pays(config, data, tokens_of_trials)
                needed = bytes_lacking(source, sources, data, lacking)
                storehouse(folder).make_room(needed)
                _describe(folder, config, source, num_rows(data, cut))
                bill.whole_bytes = needed + inventory.bytes_in(folder)
                inventory.add_filled(folder, *_fill(config, source, sources, data, lacking, look, announce, bill, console))
            else:
                _describe(folder, config, source, num_rows(data, cut))
                announce(f"the teacher's targets ({supply.mode}): reused from {folder}")
        except ConfigError as error:
            if config.targets.mode != "auto":
                raise
            announce(f"the teacher runs in every trial: {error}")
            return sources
        inventory.mark_used(folder)
        bill.settle(source.recipe.mode, data, cut, len(lacking))
    return dataclasses.replace(sources, targets=source)


def _describe(folder: Folder, config: SweepConfig, source: TargetSource, rows: dict[str, int]) -> None:
    facts = {"recipe": dataclasses.asdict(source.recipe), "bytes_of_row": source.bytes_of_row}
    inventory.describe(folder, {**facts, **inventory.names_of(config)}, rows)


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
        teacher=identity(sources.teacher.path, sources.teacher.revision, config.cache),
        dtype=_dtype_of_workers(config, supply.dtype),
        quantization=sources.teacher.quantization,
        vocabulary=sources.vocabulary,
        temperature=supply.temperature,
        top_k=min(supply.top_k, sources.vocabulary),
        head=identity(sources.student.path, sources.student.revision, config.cache) if projects else None,
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


def bytes_lacking(source: TargetSource, sources: Sources, data: TokenData, lacking: list[stores.Shard]) -> int:
    """What a store still takes: rows of shards, and the teacher's head where hidden states go without it so far."""
    head = 0
    if source.recipe.mode == "hidden" and not stores.is_whole(source.place, stores.HEAD):
        from neo_ray import devices

        teacher = _text_config(sources.teacher, "teacher.model")
        head = teacher.vocab_size * teacher.hidden_size * devices.named_dtype(source.recipe.dtype).itemsize
    return head + source.bytes_of_row * sum(num_rows(data, lacking).values())


def _bytes_of_row(recipe: stores.Recipe, sources: Sources) -> int:
    mode = recipe.mode
    if mode == "topk":
        return row_bytes(mode, recipe.top_k)
    source, where = (sources.student, "student.model") if mode == "projection" else (sources.teacher, "teacher.model")
    return row_bytes(mode, int(_text_config(source, where).hidden_size))


def _text_config(source: ModelSource | None, where: str) -> Any:
    assert source is not None
    return models.read_config(source.path, source.revision, source.trust_remote_code, where).get_text_config()


def _fill(
    config: SweepConfig,
    source: TargetSource,
    sources: Sources,
    data: TokenData,
    lacking: list[stores.Shard],
    look: Look,
    announce: Announce,
    bill: _Bill,
    console: Console | None,
) -> tuple[int, float]:
    """Have builders fill what is lacking. Returns the tokens that the teacher has read, and how many a second.

    Plain actors, for they hold the teacher from shard to shard, and which of them has what, and whose fault a loss is, is known.
    """
    resources = config.resources
    builder: Any = ray.remote(_Builder).options(
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        accelerator_type=resources.accelerator_type,
        max_concurrency=2,  # it says how far it is while it fills
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, int(resources.cpus_per_worker)))}},
    )

    def make() -> Any:
        return builder.remote(source, sources, bill.fill, bill.whole_bytes)

    def filled(shard: stores.Shard | None, told: dict[str, Any]) -> None:
        if shard is not None:
            bill.add(shard.name, told)
        progress.add(told["tokens"])

    total = num_tokens(data, lacking)
    announce(f"the teacher reads {total:,} tokens, once for all trials ({source.recipe.mode} targets, at {source.folder})")
    bill.begin()
    silence_seconds = 60 * resources.silence_minutes
    with Filling(total, announce, console) as progress:
        crew = Crew(make, lacking, look, resources.max_failures, silence_seconds, bill.landed, filled, progress.say)
        try:
            while crew.left:
                if not crew.work(SECONDS_BETWEEN_WORDS):
                    progress.silent(len(crew.members))
        finally:
            bill.restarts = crew.restarts
            crew.end()
    rate = progress.rate
    announce(f"  done: {rate:,.0f} tokens/s")
    return progress.seen, rate


class _Bill:
    """What filling the store takes, told to the journal shard by shard, so that a driver that is killed leaves it there."""

    def __init__(self, journal: Journal | None, folder: Folder, store: str) -> None:
        self.journal, self.folder, self.store = journal, folder, store
        self.fill, self.restarts, self.started = uuid.uuid4().hex[:12], 0, time.monotonic()
        self.whole_bytes = 0  # of the store, once it is filled

    def begin(self) -> None:
        self._write("filling", fill=self.fill, store=self.store)

    def add(self, shard: str, told: dict[str, Any]) -> None:
        """`told`: what stands in the shard's record."""
        self._write("filled", shard=shard, **told)

    def landed(self, shard: stores.Shard) -> dict[str, Any]:
        """What a builder that is gone had filled before anybody heard of it, told as to `add`; empty where it had not."""
        told = stores.read_record(self.folder, shard.name)
        return _told(told) if told.get("fill") == self.fill else {}

    def catch_up(self, cut: list[stores.Shard], past: Sequence[dict[str, Any]]) -> None:
        """Shards whose driver was killed before it heard of them: their records name its turn. `past`: the journal's events."""
        before = account(past, ())
        if not before.fills:
            return
        for shard in cut:
            told = stores.read_record(self.folder, shard.name)
            if told.get("fill") in before.fills and (told["fill"], shard.name) not in before.filled:
                self.add(shard.name, _told(told))

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


def _told(record: dict[str, Any]) -> dict[str, Any]:
    """Of a shard's record, what its builder told."""
    return {name: record[name] for name in ("fill", "tokens", "seconds")}


def num_rows(data: TokenData, wanted: list[stores.Shard]) -> dict[str, int]:
    """Name of a shard → its scored positions."""
    return {shard.name: stores.num_rows(data.split(shard.split), shard) for shard in wanted}


def num_tokens(data: TokenData, wanted: list[stores.Shard]) -> int:
    """Tokens of the examples of shards, each once."""
    return sum(int(data.split(shard.split).num_tokens[shard.first : shard.last].sum()) for shard in wanted)


@contextmanager
def _writing(folder: Folder, name: str) -> Iterator[None]:
    """A full disk, or an object store that does not answer. What was half written is gone again."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        what = f"{folder / name}" + (f", by way of {folder.here}," if isinstance(folder, Remote) else "")
        raise TargetsFailed(
            f"the teacher's targets: {what} cannot be written ({reason}); once it can, the same command goes on where it was"
        ) from None


class _Builder:
    """Holds the teacher, and fills a shard at a time."""

    def __init__(self, source: TargetSource, sources: Sources, fill: str, whole_bytes: int) -> None:
        self.source, self.sources, self.folder, self.turn, self.whole_bytes = source, sources, source.place, fill, whole_bytes

    def node(self) -> str:
        """The id of the node that it has come to."""
        return str(ray.get_runtime_context().get_node_id())

    def tokens_seen(self) -> int:
        """By the teacher so far; it grows batch by batch."""
        return self.teacher.tokens_seen

    def ready(self) -> dict[str, Any]:
        """Load the models; no tokens. Raises ConfigError where this machine's disk takes no copy of an object store's rows."""
        from neo_ray import devices
        from neo_ray.parts import load_source

        if isinstance(self.folder, Remote):
            try:
                check_room(self.folder.here, self.whole_bytes - inventory.bytes_in(self.folder.here))
            except NoRoom as error:
                raise ConfigError(f"{error}, or targets.mode=live") from None
        device, recipe, sources = devices.local_device(), self.source.recipe, received(self.sources)
        dtype = devices.named_dtype(recipe.dtype)
        assert sources.teacher is not None
        head = None
        if recipe.mode == "projection":
            head = models.output_head(load_source(sources.student, dtype, device, "student.model")).copy()
        teacher = load_source(sources.teacher, dtype, device, "teacher.model")
        self.teacher = filling.Teacher(recipe, teacher, open_data(sources.data), sources.pad_id, head)
        if recipe.mode == "hidden":
            with _writing(self.folder, stores.HEAD):
                stores.write_head(self.folder, self.teacher.head)
        return {"tokens": 0}

    def fill(self, shard: stores.Shard) -> dict[str, Any]:
        """Returns what it took: the driver's turn, the tokens that the teacher has seen for it, and the time."""
        before, started = self.teacher.tokens_seen, time.monotonic()
        tensors = self.teacher.fill(shard)
        seconds = time.monotonic() - started
        told = {"fill": self.turn, "tokens": self.teacher.tokens_seen - before, "seconds": seconds}
        with _writing(self.folder, shard.name):
            stores.write_shard(self.folder, shard, tensors, told)
        return told

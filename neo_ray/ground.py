"""What must stand before the first trial? Data, a Ray with room, the student and a whole store of targets, whatever the door."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_ray import local, refusals, uploads
from neo_ray.config import SweepConfig
from neo_ray.plan import Plan, TrainSplit, make_plan
from neo_ray.settings import ConfigError
from neo_ray.space import build_space
from neo_ray.supply import Supply, choose

if TYPE_CHECKING:
    from neo_ray.cluster import Capacity
    from neo_ray.parts import Sources
    from neo_ray.records import Journal

Announce = Callable[[str], None]


@dataclass(frozen=True)
class Room:
    """What a connected Ray has for a sweep."""

    capacity: Capacity
    slots: int
    """Trials at a time."""
    builders: int
    """Workers that may fill a store of targets at once."""
    plan: Plan
    """Of the sweep, now that its data is known."""


def check(config: SweepConfig) -> Supply:
    """What can be told before anything heavy is imported, and anything is written, beside `check_writable`. Raises ConfigError.

    Returns where the teacher's word comes from, as far as that is known without the models.
    """
    check_accelerator(config)
    for one in local.CHECKS:
        one(config)
    return choose(config, build_space(config))


def check_writable(config: SweepConfig) -> None:
    shared = (("storage.path", config.results), ("storage.cache", config.shared_cache), ("targets.path", config.targets_folder))
    for key, place in shared:
        if not isinstance(place, Path):
            uploads.check(place, key)
    for key, path in (("storage.path", config.folder), ("storage.cache", config.cache)):
        nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        try:
            with tempfile.TemporaryFile(dir=nearest):  # to look at permissions is not enough: /proc says yes and means no
                pass
        except OSError as error:
            raise ConfigError(f"{key}: {path} cannot be written ({nearest}: {error.strerror or error})") from None


def check_accelerator(config: SweepConfig) -> None:
    """A GPU sweep that would start Ray on a machine without one: say so before anything is prepared."""
    refusals.check_installed(config)
    if config.resources.gpus_per_worker and not config.resources.address and not Path("/dev/nvidia0").exists():
        raise ConfigError(
            f"resources.gpus_per_worker: {config.resources.gpus_per_worker:g} asked for, and this machine has no GPU; "
            "on a cluster's head give resources.address=auto, from outside use `ray exec cluster.yaml …`"
        )


def prepared(config: SweepConfig, announce: Announce) -> tuple[Sources, Supply]:
    """Data and models, and where the teacher's word comes from now that they are known. Raises ConfigError."""
    _quiet()
    from neo_ray.prepare import prepare, supply_of

    sources = prepare(config, announce)
    return sources, supply_of(config, sources)


@contextmanager
def connected(config: SweepConfig, sources: Sources, supply: Supply, announce: Announce) -> Iterator[Room]:
    """A Ray that the sweep fits; one that was started here is shut down again. Raises ConfigError; nothing is written."""
    import ray

    from neo_ray import access, cluster
    from neo_ray.slot import slots_wait

    announce("connecting to Ray" if config.resources.address else "starting Ray on this machine")
    capacity = cluster.connect(config.resources)
    try:
        slots = cluster.concurrency(config.resources, capacity)
        plan = make_plan(config, _train_split(sources), supply=supply)
        slots = cluster.fit_memory(config.resources, capacity, plan.least_memory_bytes, slots)
        if (room := cluster.fit_head(config.resources, capacity, slots, plan.least_memory_bytes)) < slots:
            announce(f"of {slots} trials at a time, the head has memory for what {room} keep there: a larger one takes more")
            slots = room
        builders = cluster.builders(config.resources, capacity, plan.builder_bytes, slots)
        student = sources.student if config.student.model is not None else None  # a pruned one is made here
        teacher = sources.teacher if supply.mode == "live" else None  # else asked for where a store lacks shards
        access.check(access.wanted(teacher=teacher, student=student), config.resources, announce)
        yield Room(capacity, slots, builders, plan)
    finally:
        if capacity.started_here and not slots_wait():
            ray.shutdown()


def stand(
    config: SweepConfig,
    sources: Sources,
    supply: Supply,
    room: Room,
    announce: Announce,
    journal: Journal | None = None,
    past: Sequence[dict[str, Any]] = (),
) -> Sources:
    """The sources with the student that is cut from the teacher, and with a whole store where the teacher is not alive.

    Args:
        journal: is told what the store takes; `past`: its events so far.

    Raises:
        ConfigError, TargetsFailed: as `builder.stored_targets`.
    """
    from neo_ray import cluster
    from neo_ray.builder import stored_targets
    from neo_ray.crew import SourcesDamaged
    from neo_ray.handover import hand_over
    from neo_ray.prepare import make_student
    from neo_ray.progress import SweepConsole

    console = SweepConsole()
    made = make_student(config, sources, announce)

    def look() -> tuple[int, set[str]]:
        capacity, plan = cluster.present(alone=not config.resources.address), room.plan
        slots = cluster.places(config.resources, capacity, plan.least_memory_bytes)
        return cluster.builders(config.resources, capacity, plan.builder_bytes, slots), cluster.draining()

    def stood() -> Sources:
        given = hand_over(made, config.shared_cache, announce)
        return stored_targets(config, supply, given, look, room.plan.tokens_of_all, announce, journal, past, console)

    try:
        return stood()
    except SourcesDamaged as error:
        announce(f"{error}: once more")
        return stood()


def mend(config: SweepConfig, sources: Sources, supply: Supply, announce: Announce, journal: Journal) -> None:
    """Upload and fill again what of the sources of trials is not as it was written; one worker may, in a lost one's place.

    Raises:
        ConfigError, TargetsFailed, Damaged: as `builder.stored_targets` and `handover.hand_over`.
    """
    from neo_ray import cluster
    from neo_ray.builder import stored_targets
    from neo_ray.handover import hand_over
    from neo_ray.lease import LeaseLost

    def look() -> tuple[int, set[str]]:
        return 1, cluster.draining()

    def mended() -> None:
        given = hand_over(sources, config.shared_cache, announce)
        if sources.targets is not None:
            past = list(journal.events())
            stored_targets(with_store(config, supply), supply, given, look, None, announce, journal, past)

    try:
        mended()
    except LeaseLost as error:  # the other one does the same work, and is waited for
        announce(f"{error}: once more")
        mended()


def with_store(config: SweepConfig, supply: Supply) -> SweepConfig:
    """The sweep that asks for its store by name: under `auto` it might go without."""
    return config.model_copy(update={"targets": config.targets.model_copy(update={"mode": supply.mode})})


def _train_split(sources: Sources) -> TrainSplit:
    from neo_ray.data import open_data

    split = open_data(sources.data).split("train")
    return TrainSplit(len(split), int(split.num_tokens.sum()))


def _quiet() -> None:
    """Libraries' bars and warnings do not belong between a sweep's lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

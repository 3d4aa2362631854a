"""How does the teacher see every token once a sweep? Actors fill the shards that a store still lacks."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import ray
from ray.util import ActorPool

from neo_ray import models, targets
from neo_ray.config import SweepConfig
from neo_ray.data import TokenData, open_data
from neo_ray.parts import ModelSource, Sources, TargetSource
from neo_ray.settings import ConfigError
from neo_ray.supply import Supply, row_bytes

Announce = Callable[[str], None]
SECONDS_BETWEEN_WORDS = 10.0
SPARE = 1.1  # of a disk, beyond the store itself


class TargetsFailed(RuntimeError):
    """The teacher cannot fill the store."""


def stored_targets(config: SweepConfig, supply: Supply, sources: Sources, workers: int, announce: Announce) -> Sources:
    """The sources with a whole store in place of the teacher. What is there already and intact is taken as it is.

    Args:
        workers: how many actors may work at once, each with a trial worker's resources.

    Raises:
        ConfigError: the disk is too small, or the mode does not suit the models.
        TargetsFailed: an actor keeps dying.
    """
    if supply.mode == "live" or sources.teacher is None:
        return sources
    assert supply.mode in ("projection", "hidden")
    data = open_data(sources.data)
    recipe = targets.Recipe(
        mode=supply.mode,
        data=data.fingerprint,
        teacher=models.identity(sources.teacher.path, sources.teacher.revision),
        dtype=_precision(config),
        vocabulary=sources.vocabulary,
        temperature=supply.temperature if supply.mode == "projection" else 1.0,
        head=models.identity(sources.student.path, sources.student.revision) if supply.mode == "projection" else None,
    )
    source = TargetSource(str((config.cache / "targets" / recipe.key).resolve()), recipe, _bytes_of_row(supply.mode, sources))
    folder, cut = Path(source.folder), targets.shards(data, source.bytes_of_row)
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f"{folder.name}.lock"))
    while True:
        try:
            lock.acquire(timeout=5)
            break
        except filelock.Timeout:
            announce("waiting for another sweep, which fills the same store of targets")
    try:
        lacking = targets.missing(folder, data, cut)
        if not lacking:
            announce(f"the teacher's targets ({supply.mode}): reused from {folder}")
        else:
            _check_disk(folder, data, lacking, source.bytes_of_row)
            _fill(config, source, sources, data, lacking, workers, announce)
    finally:
        lock.release()
    return dataclasses.replace(sources, targets=source)


def head_soft_cap(student: ModelSource) -> float | None:
    """The soft-cap of a model's logits, from its config."""
    own = models.read_config(student.path, student.revision, student.trust_remote_code, "student.model")
    return getattr(own.get_text_config(), "final_logit_softcapping", None)


def _precision(config: SweepConfig) -> str:
    """What decides in which numbers the teacher computes; `auto` is another on another kind of device."""
    bits = config.teacher.quantization if config.teacher is not None else "none"
    return f"{config.training.dtype} on a {'GPU' if config.resources.gpus_per_worker else 'CPU'}, quantization {bits}"


def _bytes_of_row(mode: str, sources: Sources) -> int:
    source, where = (sources.student, "student.model") if mode == "projection" else (sources.teacher, "teacher.model")
    assert source is not None
    own = models.read_config(source.path, source.revision, source.trust_remote_code, where)
    return row_bytes(mode, int(own.get_text_config().hidden_size))


def _check_disk(folder: Path, data: TokenData, lacking: list[targets.Shard], bytes_of_row: int) -> None:
    needed = bytes_of_row * sum(targets.num_rows(data.split(shard.split), shard) for shard in lacking)
    free = shutil.disk_usage(folder).free
    if needed * SPARE > free:
        raise ConfigError(
            f"storage.cache: the teacher's targets take {needed / 1e9:,.1f} GB and {folder.parent} has {free / 1e9:,.1f} GB; "
            "name a larger disk, or targets.mode=live"
        )


def _fill(
    config: SweepConfig,
    source: TargetSource,
    sources: Sources,
    data: TokenData,
    lacking: list[targets.Shard],
    workers: int,
    announce: Announce,
) -> None:
    """Give shards to actors until none is lacking. A dead actor starts again; a shard is written whole or not at all."""
    resources = config.resources
    options = {
        "num_cpus": resources.cpus_per_worker,
        "num_gpus": resources.gpus_per_worker,
        "max_restarts": resources.max_failures,
    }
    threads = str(max(1, int(resources.cpus_per_worker)))
    builder: Any = ray.remote(_Builder).options(
        **options, max_task_retries=resources.max_failures, runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}}
    )
    actors = [builder.remote(source, sources, config.training.dtype) for _ in range(min(workers, len(lacking)))]
    total = sum(int(data.split(s.split).num_tokens[s.first : s.last].sum()) for s in lacking)
    announce(f"the teacher reads {total:,} tokens, once for all trials ({source.recipe.mode} targets, at {source.folder})")
    seen, started, spoken = 0, time.monotonic(), time.monotonic()
    try:
        for tokens in ActorPool(actors).map_unordered(lambda actor, shard: actor.fill.remote(shard), lacking):
            seen += tokens
            if time.monotonic() - spoken > SECONDS_BETWEEN_WORDS:
                spoken = time.monotonic()
                rate = seen / (spoken - started)
                announce(f"  {seen:,} of {total:,} tokens, {rate:,.0f} tokens/s, about {(total - seen) / rate:.0f} s left")
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, ConfigError) else None
        raise cause or TargetsFailed(f"the teacher's targets: {str(error).strip().splitlines()[-1]}") from None
    except ray.exceptions.RayError as error:
        raise TargetsFailed(f"the teacher's targets: {str(error).strip().splitlines()[0]}") from None
    finally:
        for actor in actors:
            ray.kill(actor)
    announce(f"  done: {seen / (time.monotonic() - started):,.0f} tokens/s")


class _Builder:
    """Holds the teacher, and fills a shard at a time."""

    def __init__(self, source: TargetSource, sources: Sources, dtype_name: str) -> None:
        from neo_ray import devices
        from neo_ray.parts import load_source

        device = devices.local_device()
        dtype = devices.resolve_dtype(dtype_name, device)
        assert sources.teacher is not None
        head = None
        if source.recipe.mode == "projection":
            head = models.output_head(load_source(sources.student, dtype, device, "student.model")).copy()
        teacher = load_source(sources.teacher, dtype, device, "teacher.model")
        self.folder = Path(source.folder)
        self.teacher = targets.Teacher(source.recipe, teacher, open_data(sources.data), sources.pad_id, head)
        if source.recipe.mode == "hidden":
            targets.write_head(self.folder, self.teacher.head)

    def fill(self, shard: targets.Shard) -> int:
        """Returns the tokens that the teacher has seen for it."""
        before = self.teacher.tokens_seen
        targets.write_shard(self.folder, shard, self.teacher.fill(shard))
        return self.teacher.tokens_seen - before

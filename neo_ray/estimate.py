"""What does it take to keep what the teacher says of the data? From sizes of files and limits, before anything is prepared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from neo_ray import inventory
from neo_ray.assets import PREFIX, is_quickstart
from neo_ray.config import SweepConfig
from neo_ray.inventory import Stored
from neo_ray.memory import FP32, compute_bytes
from neo_ray.records import TrialRecord, load_records
from neo_ray.settings import ConfigError, TrialConfig
from neo_ray.shapes import ModelShape
from neo_ray.storage import NoRoom, Remote, check_room, scratch_folder
from neo_ray.supply import SHARD_BYTES, Supply, bytes_of_row

BYTES_PER_TOKEN = 4  # of English text under a vocabulary of 32,000 or more
SUITE_TOKENS = 512
"""Of a sequence of a suite. Assumption: few items of benchmarks without shots are longer, and those are asked first."""

Certainty = Literal["exact", "at most", "about"]


@dataclass(frozen=True)
class Reading:
    """What the teacher reads for a store, once."""

    num_tokens: int
    """All for training; of a held-out split what is evaluated, and the rest of that shard."""
    are: Certainty
    """Of the tokens, and of the bytes that follow from them."""
    num_bytes: int | None
    """Of the store, if every token is scored; None where the width of a row is not known."""
    bytes_there: int
    """Of them, in a store of this cache that names the same models, data and mode, or in this machine's copy of one in an object
    store, which may name others: it may be the same."""
    tokens_per_second: float | None
    """Of this teacher, when it last filled a store of this cache."""
    is_there: bool = False
    """Is one of those in this cache without a gap? One in an object store is not looked at."""

    @property
    def seconds(self) -> float | None:
        return None if self.tokens_per_second is None else self.num_tokens / self.tokens_per_second

    def check_room(self, config: SweepConfig) -> None:
        """Raises ConfigError where the disk of the stores has less free than this one still takes.

        Of one in an object store each node keeps a copy: this machine is asked about it where the trials run here.
        """
        place = config.targets_folder
        if self.num_bytes is None:
            return
        if isinstance(place, Path):
            inventory.check_room(place, self.num_bytes - self.bytes_there, f"{self.are} ")
        elif config.resources.address is None:
            try:
                check_room(scratch_folder(config.storage.scratch), self.num_bytes - self.bytes_there)
            except NoRoom as error:
                raise ConfigError(f"{error}, or targets.mode=live") from None


def reading_of(
    config: SweepConfig, supply: Supply, teacher: ModelShape | None, student: ModelShape | None, head_bytes: int
) -> Reading | None:
    """None where the teacher is alive in every trial, or nothing tells the size of the data.

    Args:
        head_bytes: of the teacher's head, which a store of hidden states holds too.
    """
    if supply.mode == "live":
        return None
    row = bytes_of_row(supply, teacher, student)
    tokens, are = 0, set()
    for split in ("train", "select", "report"):
        found = tokens_of_split(config, split)
        if found is None:
            return None
        limit = config.evaluation.max_tokens
        if split != "train" and limit is not None:
            found = min(found[0], limit + (SHARD_BYTES // row if row else 0)), found[1]
        tokens += found[0]
        are.add(found[1])
    place = config.targets_folder
    stores = inventory.stores_within(place) if isinstance(place, Path) else []
    same = [stored for stored in stores if _has_the_names(stored, config, supply)]
    there = max((stored.num_bytes for stored in same), default=0)
    if isinstance(place, Remote):
        there = max(map(inventory.bytes_in, place.copies()), default=0)
    size = None if row is None else row * tokens + head_bytes
    is_whole = any(stored.facts.get("shards") and not stored.absent for stored in same)
    sure: Certainty = "about" if "about" in are else "at most"
    return Reading(tokens, sure, size, min(there, size or 0), _last_speed(stores, config), is_whole)


def tokens_of_split(config: SweepConfig, split: str) -> tuple[int, Certainty] | None:
    """Tokens of a split: about, from the size of a local source (compressed ones hold more); at most, from the limits."""
    data = config.data
    held_out = {"select": data.select_fraction, "report": data.report_fraction}
    share = held_out.get(split, 1 - sum(held_out.values()))
    caps = [share * data.limit * data.max_length] if data.limit else []
    caps += [data.train_limit * data.max_length] if data.train_limit and split == "train" else []
    paths = local_files(config)
    tokens = share * sum(path.stat().st_size for path in paths) / BYTES_PER_TOKEN
    if paths and all(tokens <= cap for cap in caps):
        return max(1, round(tokens)), "about"
    return (max(1, round(min(caps))), "at most") if caps else None


def seconds_of_trial(config: SweepConfig) -> tuple[float, int] | None:
    """Mean seconds × devices of the COMPLETE trials in the sweep's own folder, and how many there are; None without any."""
    return _mean([record.accelerator_seconds for record in _complete(config)])


def seconds_of_suite(config: SweepConfig) -> tuple[float, int] | None:
    """Mean seconds that those trials were asked benchmarks at their end, and how many there are; None without any."""
    return _mean([record.details.get("suite_seconds") for record in _complete(config)])


def suite_bytes(config: SweepConfig, trial: TrialConfig, student: ModelShape) -> int:
    """Of a batch of benchmarks beside the models: what the head says in the compute dtype, in fp32, and its logarithms."""
    tokens = config.evaluation.batch_size * SUITE_TOKENS
    return tokens * student.vocab_size * (compute_bytes(config, trial) + 2 * FP32)


def _complete(config: SweepConfig) -> list[TrialRecord]:
    try:
        records = load_records(config.folder)
    except (ValueError, OSError):
        return []
    return [record for record in records if record.state == "COMPLETE"]


def _mean(values: list[float | None]) -> tuple[float, int] | None:
    took = [value for value in values if value]
    return (sum(took) / len(took), len(took)) if took else None


def local_files(config: SweepConfig) -> list[Path]:
    """Those of `data.source` that are on this machine."""
    path = Path(config.data.source).expanduser()
    if is_quickstart(config.data.source):
        name = config.data.source.removeprefix(PREFIX)
        return sorted((config.cache / "quickstart").glob(f"*/{name}.jsonl"))[-1:]
    return [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path] if path.is_file() else []


def notes(config: SweepConfig, reading: Reading | None, tokens_of_all: int | None) -> Iterator[str]:
    """Why `targets.mode: auto` will probably leave the teacher alive, though a store would be exact."""
    if reading is None or config.targets.mode != "auto":
        return
    train = tokens_of_split(config, "train")
    if tokens_of_all is not None and train is not None and tokens_of_all < train[0]:
        yield (
            f"all trials together train on fewer tokens ({tokens_of_all:,}) than the data has ({train[1]} {train[0]:,}): "
            "the teacher will run in every trial, unless its store is there"
        )
    try:
        reading.check_room(config)
    except ConfigError as error:
        yield f"{error}; as it is, the teacher will run in every trial"


def _has_the_names(stored: Stored, config: SweepConfig, supply: Supply) -> bool:
    recipe, names = stored.facts.get("recipe", {}), inventory.names_of(config)
    wanted: dict[str, str | float] = {"mode": supply.mode}
    if supply.mode == "hidden":  # one serves every student
        del names["student"]
    else:
        wanted["temperature"] = supply.temperature
    return all(recipe.get(k) == v for k, v in wanted.items()) and all(stored.facts.get(k) == v for k, v in names.items())


def _last_speed(stores: list[Stored], config: SweepConfig) -> float | None:
    """Tokens a second, of the store that was used last of those that this teacher filled."""
    assert config.teacher is not None
    known = [
        stored
        for stored in stores
        if stored.facts.get("teacher") == config.teacher.model
        and stored.facts["recipe"].get("quantization") == config.teacher.quantization
        and stored.facts.get("tokens_per_second")
    ]
    return float(max(known, key=lambda stored: stored.used).facts["tokens_per_second"]) if known else None

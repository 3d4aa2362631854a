"""How fast are targets read from a store, against how fast a step takes them? On a disk, or through an object store."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from neo_ray import stores
from neo_ray.bench_pairs import RandomPair
from neo_ray.bench_step import ARMS, Running, make_ready, process_group
from neo_ray.bench_turns import Announce, Measured, Samples, num_calls, take_turns
from neo_ray.config import SweepConfig
from neo_ray.data import Split, TokenData
from neo_ray.settings import ConfigError
from neo_ray.storage import Remote, at
from neo_ray.stores import Recipe, Shard, Store
from neo_ray.supply import row_bytes

READER, FIRST, STEP = "reader", "first_pass", "step"


def measure_reader(
    pair: SweepConfig | RandomPair, batch: int, length: int, rows: int, place: str | None, rounds: int, announce: Announce
) -> Measured:
    """A pass through a store of projections in shuffled batches, and a training step that takes its targets from one.

    Seconds are those of as many scored positions as the step has; so the step's ratio says how often the reader delivers what
    the step consumes. What was made at `place` is removed.

    Args:
        batch, length: sequences of a step and tokens of a sequence; the store's examples are as long.
        rows: scored positions of the store, at least one batch.

    Raises:
        ConfigError: as `measure_steps` does; something is at that place, a store that sweeps use perhaps.
    """
    _check_free(place)
    ready = make_ready(pair, batch, length, num_calls(rounds), announce)
    device, width = ready.parts.device, cast(Any, ready.parts.student).config.hidden_size
    with process_group(device), tempfile.TemporaryDirectory() as scratch:
        running = Running(ARMS["neo_projection"], ready, Path(scratch))
        with _random_store(place, Path(scratch), max(batch, rows // (length - 1)), length - 1, width) as made:
            reader = made.opened(device)
            arms = {
                READER: lambda turn: _pass(reader, batch, turn, device),
                FIRST: lambda turn: _pass(made.opened(device), batch, turn, device),
                STEP: running.step,
            }
            samples = take_turns(arms, rounds, device, announce)
        running.engine.destroy()
    per_step = int(ready.plan.labels[0]) / made.num_rows
    for name in (READER, FIRST):
        samples[name] = Samples([seconds * per_step for seconds in samples[name].seconds], samples[name].extra_bytes)
    known = {name: {"about": about, **_speed(samples[name], ready.plan.labels[0])} for name, about in ABOUT.items()}
    where = "a local folder" if place is None else place
    setting = {**ready.setting, "store": where, "store_rows": made.num_rows, "width": width, "store_bytes": made.num_bytes}
    return Measured(setting, known, samples, baseline=READER)


def _check_free(place: str | None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = at(place or scratch, scratch)
        if folder.names() if isinstance(folder, Remote) else any(folder.glob("*")):
            raise ConfigError(f"--place: {place} holds something already; name a new folder")


ABOUT = {
    READER: "targets of as many positions read from a store, shuffled",
    FIRST: "the same in the first pass: opening, checksums and what is brought here included",
    STEP: "Neo, stored projections: a step that takes them",
}


def _speed(samples: Samples, num_tokens: int) -> dict[str, float]:
    return {"tokens_per_second": round(float(num_tokens / np.median(samples.seconds)))}


@dataclass(frozen=True)
class Made:
    """A store of random projections."""

    place: str
    scratch: Path
    recipe: Recipe
    data: TokenData
    numbers: Iterator[int]

    @property
    def num_rows(self) -> int:
        return int(self.data.split("train").num_labels.sum())

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.bytes_of_row

    @property
    def bytes_of_row(self) -> int:
        return row_bytes("projection", self.recipe.vocabulary)

    def folder(self) -> Path | Remote:
        """With a copy here of its own each time, where the store is elsewhere."""
        return at(self.place, str(self.scratch / f"copy-{next(self.numbers)}"))

    def opened(self, device: torch.device) -> Store:
        return stores.open_store(self.folder(), self.recipe, self.bytes_of_row, self.data, device)


@contextmanager
def _random_store(place: str | None, scratch: Path, examples: int, length: int, width: int) -> Iterator[Made]:
    """That many examples of that many scored positions."""
    counts = np.full(examples, length)
    data = TokenData(Path("random"), "random", {}, {"train": Split(cast(Any, None), counts + 1, counts, counts)})
    recipe = Recipe("projection", data.fingerprint, "random", "torch.float32", width, head="random")
    made = Made(place or f"{scratch}/store", scratch, recipe, data, count())
    folder, cut = made.folder(), stores.shards(data, made.bytes_of_row)
    try:
        for shard in cut:
            rows = stores.num_rows(data.split("train"), shard)
            stores.write_shard(folder, shard, {"c_RH": torch.randn(rows, width).half(), "constant_R": torch.randn(rows)})
        yield made
    finally:
        _remove(folder, cut)


def _pass(store: Store, batch: int, turn: int, device: torch.device) -> None:
    """All rows once."""
    order = np.random.default_rng(turn).permutation(len(store.data.split("train")))
    for start in range(0, len(order), batch):
        store.rows("train", order[start : start + batch], device)


def _remove(folder: Path | Remote, cut: list[Shard]) -> None:
    for name in (f"{shard.name}{end}" for shard in cut for end in (".safetensors", ".json")):
        if isinstance(folder, Remote):
            (folder / name).remove()
        else:
            (folder / name).unlink(missing_ok=True)

"""How fast are targets read from a store? On a disk, or through an object store and this machine's copy of it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from neo_ray import stores
from neo_ray.data import Split, TokenData
from neo_ray.storage import Remote, at
from neo_ray.stores import Recipe, Shard, Store
from neo_ray.supply import row_bytes

LENGTH = 128
"""Scored positions of an example."""
SECONDS = 3.0
"""For so long a store that is here already is read."""


def measure_reader(place: str | None, rows: int, width: int, batch: int) -> dict[str, Any]:
    """Make a store of projections, and read it in shuffled batches.

    Returns:
        `first_tokens_per_second` of one pass through all rows, opening, checksums and downloads included, and
        `tokens_per_second` of the passes after it. What was made is removed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = at(place or f"{scratch}/store", scratch)
        data = _data(max(1, rows // LENGTH))
        recipe = Recipe("projection", data.fingerprint, "random", "torch.float32", width, head="random")
        cut = stores.shards(data, row_bytes("projection", width))
        try:
            for shard in cut:
                stores.write_shard(folder, shard, _random(stores.num_rows(data.split("train"), shard), width))
            read = _read(folder, recipe, data, batch)
        finally:
            _remove(folder, cut)
    num_bytes = row_bytes("projection", width) * int(data.split("train").num_labels.sum())
    return {"place": place or "a local folder", "width": width, "batch": batch, "store_bytes": num_bytes, **read}


def _data(examples: int) -> TokenData:
    counts = np.full(examples, LENGTH)
    return TokenData(Path("random"), "random", {}, {"train": Split(cast(Any, None), counts + 1, counts, counts)})


def _random(rows: int, width: int) -> dict[str, torch.Tensor]:
    return {"c_RH": torch.randn(rows, width).half(), "constant_R": torch.randn(rows)}


def _read(folder: Path | Remote, recipe: Recipe, data: TokenData, batch: int) -> dict[str, float]:
    started = time.perf_counter()
    store = stores.open_store(folder, recipe, row_bytes("projection", recipe.vocabulary), data, torch.device("cpu"))
    first = _pass(store, batch, 0) / (time.perf_counter() - started)
    started, tokens, number = time.perf_counter(), 0, 1
    while time.perf_counter() - started < SECONDS:
        tokens, number = tokens + _pass(store, batch, number), number + 1
    return {"first_tokens_per_second": round(first), "tokens_per_second": round(tokens / (time.perf_counter() - started))}


def _pass(store: Store, batch: int, seed: int) -> int:
    """All rows once; how many they were."""
    order, tokens = np.random.default_rng(seed).permutation(len(store.data.split("train"))), 0
    for start in range(0, len(order), batch):
        tokens += len(store.rows("train", order[start : start + batch], torch.device("cpu"))[0])
    return tokens


def _remove(folder: Path | Remote, cut: list[Shard]) -> None:
    for name in (f"{shard.name}{end}" for shard in cut for end in (".safetensors", ".json")):
        if isinstance(folder, Remote):
            (folder / name).remove()
        else:
            (folder / name).unlink(missing_ok=True)

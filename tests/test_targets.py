"""Is a store of targets filled with what a sweep reads, and can a person see, check and remove it? On the tiny world's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from doors import sweep_file
from tiny import World

from neo_ray import builder, data, models, stores
from neo_ray.config import SweepConfig
from neo_ray.data import TokenData
from neo_ray.evaluate import evaluation_batches
from neo_ray.loading import load
from neo_ray.stores import Recipe, Shard, Store

CPU = torch.device("cpu")
BYTES_OF_ROW = 2 * 4


@pytest.fixture(scope="module")
def tokens(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    config = load(sweep_file(tiny_world, tmp_path_factory.mktemp("sweep")))
    tokenizer = models.load_tokenizer(str(tiny_world.student))
    return data.open_data(data.prepare(config.data, str(tiny_world.data), tokenizer, tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def several_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "SHARD_BYTES", 2**11)


def a_sweep(world: World, folder: Path, **changes: Any) -> SweepConfig:
    return load(sweep_file(world, folder, **changes))


def write(folder: Path, tokens: TokenData, wanted: list[Shard]) -> None:
    for shard in wanted:
        stores.write_shard(folder, shard, {"hidden_RG": torch.zeros(stores.num_rows(tokens.split(shard.split), shard), 4)})


@pytest.mark.parametrize("limit", [1, 300, 700])
def test_only_what_trials_can_read_is_wanted(tiny_world: World, tokens: TokenData, tmp_path: Path, limit: int) -> None:
    config = a_sweep(tiny_world, tmp_path, evaluation={"max_tokens": limit})
    cut = stores.shards(tokens, BYTES_OF_ROW)
    wanted = builder.wanted(config, tokens, cut)
    assert len(wanted) < len(cut)
    write(tmp_path / "store", tokens, wanted)
    store = Store(tmp_path / "store", Recipe("hidden", tokens.fingerprint, "t", "torch.float32", 512), tokens, cut)
    for name, split in tokens.splits.items():
        read = range(len(split)) if name == "train" else [i for b in evaluation_batches(split, config.evaluation) for i in b]
        assert len(store.rows(name, read, CPU)[0]) == split.num_labels[list(read)].sum()
        own = [shard for shard in wanted if shard.split == name]
        assert own[-1].first <= max(read), "and none beyond"


def test_without_a_limit_all_is_wanted(tiny_world: World, tokens: TokenData, tmp_path: Path) -> None:
    cut = stores.shards(tokens, BYTES_OF_ROW)
    assert builder.wanted(a_sweep(tiny_world, tmp_path), tokens, cut) == cut


def test_a_larger_limit_adds_what_is_missing_and_reuses_the_rest(tiny_world: World, tokens: TokenData, tmp_path: Path) -> None:
    cut = stores.shards(tokens, BYTES_OF_ROW)
    few, more = (builder.wanted(a_sweep(tiny_world, tmp_path, evaluation={"max_tokens": n}), tokens, cut) for n in (1, 700))
    write(tmp_path / "store", tokens, few)
    assert stores.missing(tmp_path / "store", tokens, few) == []
    assert stores.missing(tmp_path / "store", tokens, more) == [shard for shard in more if shard not in few] != []

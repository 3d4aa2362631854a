"""Does a store of targets in an object store give what one on a disk gives, and never anything else?"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from neo_ray import models, staging, stores
from neo_ray.data import Split
from neo_ray.storage import Damaged, NoRoom, Remote
from neo_ray.stores import Recipe, Shard, Store

CPU = torch.device("cpu")
ROWS, WIDTH, EXAMPLES = 4, 16, 30
"""Scored positions of an example, numbers in a row, examples."""
RECIPE = Recipe("hidden", "data", "teacher", "torch.float32", 96)
STAGING = """
import sys
from pathlib import Path
from neo_ray import staging, storage

url, scratch = sys.argv[1:]
download, done = storage.Remote.download, []
storage.Remote.download = lambda self, file: (done.append(file), download(self, file))
staged = staging.Staged(storage.Remote(url, scratch), ["train-00000", "train-00001"])
for number in range(5):
    staged.bring(f"train-{number:05d}")
print(len(done))
"""


def some_data() -> Any:
    counts = np.full(EXAMPLES, ROWS)
    split = Split(cast(Any, None), counts + 1, counts, counts)
    return SimpleNamespace(split=lambda name: split, splits={"train": split})


def rows_of(shard: Shard) -> torch.Tensor:
    rows = torch.arange(shard.first * ROWS, shard.last * ROWS, dtype=torch.float16)
    return rows[:, None].expand(-1, WIDTH).contiguous()


@pytest.fixture
def place(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """A whole store of five shards."""
    monkeypatch.setattr(stores, "SHARD_BYTES", 6 * ROWS * 2 * WIDTH)
    place = Remote(f"{bucket}/targets/{RECIPE.key}", str(tmp_path / "scratch"))
    for shard in stores.shards(some_data(), 2 * WIDTH):
        stores.write_shard(place, shard, {"hidden_RG": rows_of(shard)})
    stores.write_head(place, models.Head(torch.ones(3, WIDTH)))
    return place


def opened(place: Remote) -> Store:
    return stores.open_store(place, RECIPE, 2 * WIDTH, some_data(), CPU)


def cut() -> list[Shard]:
    return stores.shards(some_data(), 2 * WIDTH)


def test_rows_come_through_this_machine_s_copy(place: Remote) -> None:
    assert len(cut()) == 5 and stores.missing(place, some_data(), cut(), with_head=True) == []
    store = opened(place)
    assert store.head is not None and store.head.weight_VH.shape == (3, WIDTH)
    (rows,) = store.rows("train", [29, 0, 7], CPU)
    assert rows[:, 0].tolist() == [*range(116, 120), *range(4), *range(28, 32)]
    assert [path for path in place.here.parent.rglob("*") if path.name.startswith(".part")] == []


def test_shards_are_brought_ahead_of_their_use(place: Remote) -> None:
    store, names = opened(place), {shard.name for shard in cut()}
    deadline = time.monotonic() + 30
    while store.staged is not None and not names <= set(store.staged.sound) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert store.staged is not None and names <= set(store.staged.sound)
    place.remove()
    assert len(store.rows("train", range(EXAMPLES), CPU)[0]) == EXAMPLES * ROWS, "nothing more is asked for"


def flipped(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize("harm", [flipped, lambda content: content[:-1]], ids=["flipped", "truncated"])
def test_a_harmed_object_is_never_read_and_made_again(place: Remote, harm: Callable[[bytes], bytes]) -> None:
    harmed = place / "train-00002.safetensors"
    fs, path = harmed._open()
    fs.pipe_file(path, harm(harmed.read_bytes()))
    with pytest.raises(Damaged, match="train-00002.safetensors is not what was written"):
        opened(place).rows("train", [12], CPU)
    lacking = stores.missing(place, some_data(), cut())
    assert [shard.name for shard in lacking] == ["train-00002"], "a builder finds it missing"
    assert opened(place).rows("train", [0], CPU)[0].shape == (ROWS, WIDTH), "the others are fine"
    stores.write_shard(place, lacking[0], {"hidden_RG": rows_of(lacking[0])})
    assert opened(place).rows("train", [12], CPU)[0][0, 0] == 48


def test_a_truncated_object_is_seen_without_a_download(place: Remote) -> None:
    fs, path = (place / "train-00001.safetensors")._open()
    fs.pipe_file(path, (place / "train-00001.safetensors").read_bytes()[:-1])
    assert [shard.name for shard in stores.missing(place, some_data(), cut())] == ["train-00001"]


def test_a_copy_that_was_harmed_on_this_machine_is_brought_again(place: Remote) -> None:
    opened(place).rows("train", range(EXAMPLES), CPU)
    copy = place.here / "train-00003.safetensors"
    copy.write_bytes(flipped(copy.read_bytes()))
    assert opened(place).rows("train", [18], CPU)[0].tolist() == rows_of(Shard("train", 3, 18, 19)).tolist()


def test_a_store_that_does_not_fit_this_machine_is_refused_when_it_is_opened(
    place: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What of it is here already needs no room again."""
    whole = sum(place.sizes().values())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=whole - 1))
    with pytest.raises(NoRoom, match=f"storage.scratch: {place.here}: {whole:,} bytes wanted, {whole - 1:,} bytes free"):
        opened(place)
    assert not list(place.here.glob("*.safetensors")), "nothing is brought"
    (place / "train-00000.safetensors").download(place.here / "train-00000.safetensors")
    opened(place).rows("train", range(EXAMPLES), CPU)


def test_two_processes_of_a_machine_bring_each_shard_once(place: Remote) -> None:
    command = [sys.executable, "-c", STAGING, place.url, str(place.scratch)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = [int(process.communicate(timeout=60)[0]) for process in running]
    assert sum(counts) == 5


def test_an_upload_that_ends_early_leaves_no_record(place: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = dataclasses.replace(cut()[0], number=7)

    def dies(self: Remote, file: Path) -> None:
        if file.suffix == ".json":
            raise KeyboardInterrupt

    monkeypatch.setattr(Remote, "upload", dies)
    with pytest.raises(KeyboardInterrupt):
        stores.write_shard(place, shard, {"hidden_RG": rows_of(shard)})
    assert shard.name not in staging.recorded(place)

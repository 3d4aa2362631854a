"""Does the teacher see every token once a sweep, whatever happens to the store? Real sweeps of the tiny world."""

from __future__ import annotations

import errno
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doors import finish, start, sweep_file
from test_faults import FAULT
from tiny import World

from neo_ray import builder, targets
from neo_ray.account import account
from neo_ray.records import Journal, TrialRecord, load_records
from neo_ray.settings import ConfigError
from neo_ray.storehouse import storehouse

SETTINGS: dict[str, Any] = {
    "search": {"kd_ratio": {"grid": [0.5, 1.0]}},
    "sampler": {"name": "grid"},
    "scheduler": {"name": "none"},
    "training": {"steps": 8, "batch_size": 4, "micro_batch_size": 2, "dtype": "fp32", "learning_rate": "1e-2"},
}
ALL_TOKENS = 7_440
SMALL_SHARDS = """
target = "neo_ray.stores"

def inject(stores):
    stores.SHARD_BYTES = 2**16
"""
DYING = """
target = "neo_ray.stores"

def inject(stores):
    import os, pathlib, signal
    stores.SHARD_BYTES = 2**16
    write_shard = stores.write_shard

    def dying(folder, shard, *rest):
        mark = pathlib.Path(__file__).with_name("died")
        if shard.name == "train-00001" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return write_shard(folder, shard, *rest)

    stores.write_shard = dying
"""
HANGING = """
target = "neo_ray.filling"

def inject(filling):
    import pathlib, time
    filling.BATCH_TOKENS = 48
    mark, fill, of_examples = pathlib.Path(__file__).with_name("hung"), filling.Teacher.fill, filling.Teacher._of_examples

    def filled(teacher, shard):
        teacher.pause = 0.4 if shard.name == "train-00000" else 0.0
        if shard.name == "select-00000" and not mark.exists():
            mark.touch()
            time.sleep(3600)
        return fill(teacher, shard)

    def slowly(teacher, *rest):
        time.sleep(teacher.pause)
        return of_examples(teacher, *rest)

    filling.Teacher.fill, filling.Teacher._of_examples = filled, slowly
"""


def swept(
    world: World, folder: Path, mode: str, cache: Path | None = None, fault: str = SMALL_SHARDS, **resources: Any
) -> tuple[str, list[TrialRecord]]:
    """What the sweep said, and its records."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(FAULT + fault)
    storage = {"path": str(folder / "results"), "cache": str(cache or folder / "cache")}
    changes = {**SETTINGS, "targets": {"mode": mode}, "storage": storage, "resources": {"concurrency": 2, **resources}}
    process = start(sweep_file(world, folder, **changes), also_import=folder)
    text = finish(process)
    assert process.returncode == 0, text
    return text, load_records(folder / "results" / "tiny")


def tokens_read(text: str) -> int:
    found = re.search(r"the teacher reads ([\d,]+) tokens", text)
    return int(found[1].replace(",", "")) if found else 0


def scores(records: list[TrialRecord]) -> list[float]:
    return [float(row[name]) for record in records for row in record.curve for name in ("train_kd", "select_ce", "select_kl")]


@pytest.mark.slow
def test_a_store_gives_the_trials_of_a_living_teacher_and_serves_the_next_sweep(tiny_world: World, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    _, living = swept(tiny_world, tmp_path / "live", "live")
    for mode in ("projection", "hidden"):
        text, stored = swept(tiny_world, tmp_path / mode, mode, cache)
        assert tokens_read(text) == ALL_TOKENS
        assert [record.details["targets"] for record in stored] == [mode] * 2
        assert scores(stored) == pytest.approx(scores(living), abs=2e-3)
    (shards,) = {path.parent for path in (cache / "targets").glob("*/*.safetensors") if "head" not in path.name} - {
        path.parent for path in (cache / "targets").glob("*/head.safetensors")
    }
    harmed = shards / "train-00001.safetensors"
    content = bytearray(harmed.read_bytes())
    content[len(content) // 2] ^= 1
    harmed.write_bytes(content)
    text, again = swept(tiny_world, tmp_path / "again", "projection", cache)
    assert 0 < tokens_read(text) < ALL_TOKENS / 2, "the harmed shard alone"
    text, _ = swept(tiny_world, tmp_path / "more", "projection", cache)
    assert tokens_read(text) == 0 and "reused from" in text
    assert scores(again) == pytest.approx(scores(living), abs=2e-3)


@pytest.mark.slow
def test_a_store_of_the_likeliest_tokens_says_that_it_is_biased(tiny_world: World, tmp_path: Path) -> None:
    text, records = swept(tiny_world, tmp_path / "topk", "topk")
    assert tokens_read(text) == ALL_TOKENS and "2 trials had targets.mode topk, which is biased" in " ".join(text.split())
    assert all("all but 64 tokens count as one" in record.details["targets_biased"] for record in records)


@pytest.mark.slow
def test_a_teacher_that_dies_goes_on_where_it_was(tiny_world: World, tmp_path: Path) -> None:
    text, records = swept(tiny_world, tmp_path / "dying", "projection", fault=DYING)
    assert (tmp_path / "dying" / "died").exists()
    assert [record.state for record in records] == ["COMPLETE", "COMPLETE"], text
    events = list(Journal(tmp_path / "dying" / "results" / "tiny").events())
    assert account(events, records).restarts == 1 and account(events, records).builder_tokens == ALL_TOKENS
    assert max(Counter(event["shard"] for event in events if event["event"] == "filled").values()) == 1


@pytest.mark.slow
def test_a_teacher_that_hangs_is_replaced_and_one_that_is_slow_is_not(tiny_world: World, tmp_path: Path) -> None:
    """18 s of silence are a hang. One shard takes longer, batch by batch; another one's builder says nothing more."""
    resources = {"concurrency": 1, "silence_minutes": 0.3}
    text, records = swept(tiny_world, tmp_path / "it", "projection", fault=HANGING, **resources)
    assert "a teacher is lost (no token for 18 s): another goes on with select-00000" in text
    assert [record.state for record in records] == ["COMPLETE", "COMPLETE"], text
    events = list(Journal(tmp_path / "it" / "results" / "tiny").events())
    seconds = {event["shard"]: event["seconds"] for event in events if event["event"] == "filled"}
    assert seconds["train-00000"] > 60 * resources["silence_minutes"], "else it shows nothing"
    assert account(events, records).restarts == 1 and account(events, records).builder_tokens == ALL_TOKENS


@pytest.mark.slow
def test_two_sweeps_that_need_the_same_store_fill_it_once(tiny_world: World, tmp_path: Path) -> None:
    running = []
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        storage = {"path": str(folder / "results"), "cache": str(tmp_path / "cache")}
        running.append(start(sweep_file(tiny_world, folder, **SETTINGS, targets={"mode": "projection"}, storage=storage)))
    texts = [finish(process) for process in running]
    assert [process.returncode for process in running] == [0, 0], texts
    assert sorted(tokens_read(text) for text in texts) == [0, ALL_TOKENS]


@pytest.mark.cluster
@pytest.mark.slow
def test_a_store_that_was_built_ahead_serves_a_sweep_that_would_not_have_built_it(tiny_world: World, tmp_path: Path) -> None:
    settings = {**SETTINGS, "targets": {"mode": "auto"}}  # both trials together train on fewer tokens than the data has
    path = sweep_file(tiny_world, tmp_path, **settings)
    process = start(path, door="neo_ray.targets build")
    text = finish(process)
    assert process.returncode == 0, text
    assert tokens_read(text) == ALL_TOKENS and "the store is whole: " in text
    assert not (tmp_path / "results").exists()
    assert targets.main(["verify", str(path)]) == 0, "by the key that the sweep takes"
    process = start(path)
    text = finish(process)
    assert process.returncode == 0, text
    assert tokens_read(text) == 0 and "reused from" in text
    assert [record.details["targets"] for record in load_records(tmp_path / "results" / "tiny")] == ["projection"] * 2


def test_a_shard_whose_driver_was_killed_is_counted_by_the_next_and_once(tmp_path: Path) -> None:
    """Three shards of this sweep's turn, of which its driver heard of one; one of another's; one that says nothing."""
    journal, store = Journal(tmp_path / "results"), tmp_path / "store"
    cut = [builder.stores.Shard("train", number, number, number + 1) for number in range(5)]
    killed = builder._Bill(journal, store, "key")
    killed.begin()
    rows = {"hidden_RG": torch.zeros(2, 4)}
    for shard in cut[:3]:
        builder.stores.write_shard(store, shard, rows, {"fill": killed.fill, "tokens": 3, "seconds": 0.5})
    killed.add(cut[0].name, {"fill": killed.fill, "tokens": 3, "seconds": 0.5})
    builder.stores.write_shard(store, cut[3], rows, {"fill": "another sweep's", "tokens": 3, "seconds": 0.5})
    builder.stores.write_shard(store, cut[4], rows)
    for _ in range(2):
        builder._Bill(journal, store, "key").catch_up(cut, list(journal.events()))
        found = account(journal.events(), ())
        assert found.filled == {(killed.fill, shard.name) for shard in cut[:3]}
        assert (found.builder_tokens, found.builder_seconds) == (9, 1.5)
        assert sum(event["event"] == "filled" for event in journal.events()) == 3


def test_a_disk_that_is_full_while_a_shard_is_written_leaves_no_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shard, rows = builder.stores.Shard("train", 0, 0, 1), {"hidden_RG": torch.zeros(2, 4)}
    save_file = builder.stores.save_file

    def full(tensors: Any, path: Path, settings: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(builder.stores, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        builder.stores.write_shard(tmp_path, shard, rows)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(builder.stores, "save_file", save_file)
    builder.stores.write_shard(tmp_path, shard, rows)
    assert builder.stores.is_whole(tmp_path, shard.name, 2), "room again"


def test_a_disk_too_small_is_refused_before_anything_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**8))
    house = storehouse(tmp_path / "store")
    house.make_room(90 * 10**6)
    with pytest.raises(
        ConfigError, match=r"targets.path: the teacher's targets take 0.1 GB and .* has 0.1 GB; name a larger disk"
    ):
        house.make_room(95 * 10**6)

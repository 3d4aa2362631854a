"""What goes wrong with a store of targets costs what was lost, and no more: nothing wrong is read, nothing is filled twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from doors import finish, kill_driver, start, sweep_file, wait_for
from test_builder import ALL_TOKENS, SETTINGS, tokens_read
from test_faults import FAULT, LONG, reported, workers_of
from tiny import World

from neo_ray import targets
from neo_ray.account import account
from neo_ray.records import Journal, load_records
from neo_ray.storage import Remote, checksum
from neo_ray.storehouse import WAITING

ONE: dict[str, Any] = {
    **LONG,
    "search": {"kd_ratio": {"choice": [0.5, 1.0]}},
    "sampler": {"name": "random", "num_trials": 1},
    "resources": {"concurrency": 1},
}
FULL_OR_STUCK = """
target = "neo_ray.stores"

def inject(stores):
    import pathlib, time, safetensors
    here = pathlib.Path(__file__).parent
    save_file, write_shard, stores.SHARD_BYTES = stores.save_file, stores.write_shard, 2**16

    def save(tensors, part, settings):
        if (here / "full").exists() and len(list(part.parent.glob("train-*.json"))) == 2:
            part.write_bytes(b"half of it")
            raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, part, settings)

    def write(folder, shard, *rest):
        if (here / "stuck").exists() and shard.name == "train-00004":
            (here / "reached").touch()
            time.sleep(600)
        write_shard(folder, shard, *rest)

    stores.save_file, stores.write_shard = save, write
"""
FLIPPED = """
target = "neo_ray.stores"

def inject(stores):
    import pathlib
    stores.SHARD_BYTES = 2**16
    upload = stores.Remote.upload

    def harmful(place, file):
        mark = pathlib.Path(__file__).with_name("flipped")
        if place.name == "train-00001.safetensors" and not mark.exists():
            mark.touch()
            content = bytearray(file.read_bytes())
            content[-9] ^= 1
            file.write_bytes(content)
        upload(place, file)

    stores.Remote.upload = harmful
"""

TOGETHER = """
target = "neo_ray.stores"

def inject(stores):
    import contextlib, pathlib, time
    from neo_ray import storehouse
    waited = pathlib.Path(__file__).with_name("waited")
    write_shard, unless_building, stores.SHARD_BYTES = stores.write_shard, storehouse.unless_building, 2**16

    @contextlib.contextmanager
    def watched(folder):
        with unless_building(folder) as free:
            if not free:
                waited.touch()
            yield free

    def write(folder, shard, *rest):
        until = time.monotonic() + 240
        while shard.name == "train-00002" and not waited.exists() and time.monotonic() < until:
            time.sleep(0.1)
        write_shard(folder, shard, *rest)

    storehouse.unless_building, stores.write_shard = watched, write
"""


def filled(journal: Path) -> Counter[str]:
    """Shard → how often the driver heard that it was filled."""
    return Counter(event["shard"] for event in Journal(journal).events() if event["event"] == "filled")


def written(store: Path) -> dict[str, int]:
    """Shard → when its file was written, in nanoseconds."""
    return {path.stem: path.stat().st_mtime_ns for path in store.glob("*.safetensors")}


@pytest.mark.slow
def test_a_full_disk_a_killed_driver_a_truncated_shard_and_a_killed_reader(tiny_world: World, tmp_path: Path) -> None:
    """Four faults of one sweep, one after the other; the same command each time."""
    (tmp_path / "sitecustomize.py").write_text(FAULT + FULL_OR_STUCK)
    path = sweep_file(tiny_world, tmp_path, **ONE, targets={"mode": "projection"})
    results = tmp_path / "results" / "tiny"

    (tmp_path / "full").touch()
    process = start(path, also_import=tmp_path)
    text = finish(process)
    assert process.returncode == 1 and "Traceback" not in text, text
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    assert "cannot be written" in line and "No space left on device" in line and "the same command goes on" in line
    (store,) = (path for path in (tmp_path / "cache" / "targets").iterdir() if path.is_dir())
    before = written(store)
    assert filled(results) == Counter(before.keys()) and not list(store.glob(".part-*"))
    assert sum(name.startswith("train") for name in before) == 2

    (tmp_path / "full").unlink()
    (tmp_path / "stuck").touch()
    process = start(path, also_import=tmp_path)
    wait_for((tmp_path / "reached").exists, process)
    kill_driver(process)
    text = finish(process)
    after = written(store)
    assert 0 < tokens_read(text) < ALL_TOKENS and len(after) > len(before)
    assert before.items() <= after.items(), "what was there is not filled again"

    (tmp_path / "stuck").unlink()
    harmed = store / "train-00000.safetensors"
    content = harmed.read_bytes()
    harmed.write_bytes(content[: len(content) // 2])
    process = start(path, also_import=tmp_path)
    wait_for(lambda: reported(results / "journal.jsonl"), process)
    (reader,), whole = workers_of(process), written(store)
    reader.kill()
    text = finish(process)
    assert process.returncode == 0 and "lost its workers in trial 0000" in text, text
    assert whole == written(store), "the death of a reader has nothing filled again"
    assert harmed.read_bytes() == content
    del after["train-00000"]
    assert after.items() <= whole.items() and set(whole) > set(after)
    assert filled(results) == Counter([*whole, "train-00000"]), "once each, and the truncated one twice"
    records = load_records(results)
    again = json.loads((store / "train-00000.json").read_text())["tokens"]
    assert account(Journal(results).events(), records).builder_tokens == ALL_TOKENS + again
    assert f"{again:,} of them again as shards were damaged" in " ".join(text.split())
    (record,) = records
    assert record.state == "COMPLETE" and record.attempts == 2 and record.details["resumed_from_step"] > 0


@pytest.mark.slow
def test_a_shard_that_a_reader_finds_damaged_is_filled_again_and_its_trial_goes_on(
    tiny_world: World, tmp_path: Path, bucket: str
) -> None:
    """In an object store, where only a download shows that a byte is another."""
    (tmp_path / "sitecustomize.py").write_text(FAULT + FLIPPED)
    targets = {"mode": "projection", "path": f"{bucket}/targets"}
    storage = {"path": str(tmp_path / "results"), "cache": str(tmp_path / "cache"), "scratch": str(tmp_path / "scratch")}
    sweep = {**ONE, "training": {**LONG["training"], "steps": 8}}
    process = start(sweep_file(tiny_world, tmp_path, **sweep, targets=targets, storage=storage), also_import=tmp_path)
    text = finish(process)
    assert process.returncode == 0 and "Traceback" not in text, text
    assert "train-00001.safetensors is not what was written" in text
    results = tmp_path / "results" / "tiny"
    (record,) = load_records(results)
    assert record.state == "COMPLETE" and record.attempts == 1 and len(record.curve) == 4
    assert {name for name, count in filled(results).items() if count > 1} == {"train-00001"}
    (key,) = (name for name in Remote(targets["path"]).names())
    place = Remote(targets["path"]) / key / "train-00001.safetensors"
    place.download(tmp_path / "shard")
    assert checksum(tmp_path / "shard") == json.loads(place.with_name("train-00001.json").read_text())["blake2b"]


@pytest.mark.slow
def test_two_sweeps_at_once_fill_a_store_in_an_object_store_once(
    tiny_world: World, tmp_path: Path, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """They share nothing but the bucket: caches, copies and results are each one's own. One is half done when the other comes."""
    (tmp_path / "sitecustomize.py").write_text(FAULT + TOGETHER)
    url, running = f"{bucket}/targets", {}
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        storage = {part: str(folder / part) for part in ("path", "cache", "scratch")}
        targets_of = {"mode": "projection", "path": url}
        path = sweep_file(tiny_world, folder, **SETTINGS, targets=targets_of, storage=storage)
        running[name] = start(path, also_import=tmp_path)
    texts = {name: finish(process) for name, process in running.items()}
    assert [process.returncode for process in running.values()] == [0, 0], texts
    assert (tmp_path / "waited").exists() and not any("Traceback" in text for text in texts.values())
    assert sorted(tokens_read(text) for text in texts.values()) == [0, ALL_TOKENS]
    assert [WAITING in " ".join(text.split()) for text in texts.values()] == [not tokens_read(text) for text in texts.values()]

    (key,) = Remote(url).names()
    store = Remote(url) / key
    names = {name.removesuffix(".safetensors") for name in store.names() if name.endswith(".safetensors")}
    journals = [tmp_path / name / "path" / "tiny" for name in running]
    assert filled(journals[0]) + filled(journals[1]) == Counter(names) and len(names) > 3, "each shard once, by either"
    accounts = [account(Journal(journal).events(), load_records(journal)) for journal in journals]
    assert sum(found.builder_tokens for found in accounts) == ALL_TOKENS
    assert [found.store_tokens for found in accounts] == [ALL_TOKENS] * 2
    assert not [name for name in store.names() if name.startswith("lease-")], "nobody holds it any more"
    for journal in journals:
        assert [(r.state, r.attempts, r.details["targets"]) for r in load_records(journal)] == [("COMPLETE", 1, "projection")] * 2
    assert targets.main(["verify", "--path", url]) == 0
    assert f"{len(names)} of {len(names)} files whole" in capsys.readouterr().out

"""Does the plan say how large a store gets and how long the teacher reads, and does it say so where the disk is too small?"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from neo_ray import estimate, inventory, local, sweep
from neo_ray.config import SweepConfig
from neo_ray.loading import dump, validate
from neo_ray.plan import make_plan
from neo_ray.plan_text import render
from neo_ray.settings import ConfigError
from neo_ray.storage import Remote
from neo_ray.supply import SHARD_BYTES

WIDTH, VOCABULARY = 576, 49_152
ROW = 2 * WIDTH + 4  # fp16 numbers of the student's width, and one in fp32
TEXT_BYTES = 4_000_000  # about a million tokens


def a_sweep(folder: Path, **sections: Any) -> SweepConfig:
    source = folder / "text.jsonl"
    source.write_bytes(b"x" * TEXT_BYTES)
    base = {
        "name": "demo",
        "teacher": {"model": "quickstart:smollm2-135m-instruct"},
        "student": {"prune": {"keep": 20}},
        "data": {"source": str(source), "max_length": 128, "select_fraction": 0.2, "report_fraction": 0.1},
        "training": {"epochs": 2, "dtype": "bf16"},
        "targets": {"mode": "projection"},
        "storage": {"path": str(folder / "results"), "cache": str(folder / "cache")},
    }
    merged = {name: {**base.get(name, {}), **value} if isinstance(value, dict) else value for name, value in sections.items()}
    return validate({**base, **merged})


def reading(folder: Path, **sections: Any) -> estimate.Reading:
    found = make_plan(a_sweep(folder, **sections)).reading
    assert found is not None
    return found


def keep(config: SweepConfig, key: str, tokens_per_second: float, size: int, **recipe: Any) -> None:
    """A store in the cache that goes by the sweep's names."""
    folder = inventory.folder_of(config.cache) / key
    folder.mkdir(parents=True)
    names = {"recipe": {"mode": "projection", "temperature": 1.0, "quantization": "none", **recipe}}
    inventory.describe(folder, {**names, **inventory.names_of(config)}, {})
    inventory.add_filled(folder, 1, tokens_per_second)
    (folder / "train-00000.safetensors").write_bytes(b"x" * size)
    (folder / inventory.USED).touch()


def test_a_store_holds_a_row_for_every_token_of_a_local_source(tmp_path: Path) -> None:
    found = reading(tmp_path)
    assert (found.num_tokens, found.are, found.num_bytes) == (1_000_000, "about", 1_000_000 * ROW)
    hidden = reading(tmp_path, targets={"mode": "hidden"})
    assert hidden.num_bytes == 2 * WIDTH * (1_000_000 + VOCABULARY), "and the teacher's head, in bf16"


def test_held_out_splits_are_read_as_far_as_they_are_evaluated_and_to_the_end_of_a_shard(tmp_path: Path) -> None:
    rows = SHARD_BYTES // ROW
    assert reading(tmp_path, evaluation={"max_tokens": 500}).num_tokens == 700_000 + 2 * (rows + 500)
    assert reading(tmp_path, evaluation={"max_tokens": 100_000}).num_tokens == 700_000 + rows + 100_000 + 100_000


def test_a_limit_bounds_the_tokens_and_is_all_that_is_known_of_a_hub_data_set(tmp_path: Path) -> None:
    few = reading(tmp_path, data={"limit": 1_000})
    assert (few.num_tokens, few.are) == (128_000, "at most")
    assert reading(tmp_path, data={"limit": 1_000, "source": "some/hub-data"}) == few
    assert make_plan(a_sweep(tmp_path, data={"source": "some/hub-data"})).reading is None
    mixed = reading(tmp_path, data={"train_limit": 1_000})
    assert (mixed.num_tokens, mixed.are) == (128_000 + 300_000, "about")


def test_no_store_is_spoken_of_where_the_teacher_is_alive(tmp_path: Path) -> None:
    live = make_plan(a_sweep(tmp_path, targets={"mode": "live"}))
    assert live.reading is None and "it reads" not in render(live)


def test_the_time_is_that_of_the_teachers_last_store_and_else_not_stated(tmp_path: Path) -> None:
    config = a_sweep(tmp_path)
    text = render(make_plan(config))
    assert "it reads about 1,000,000 tokens; about 1.2 GB if all of them are scored\n" in text
    keep(config, "another", 1.0, size=10, quantization="4bit")
    assert reading(tmp_path).seconds is None
    keep(config, "hidden", 500.0, size=1, mode="hidden")
    assert reading(tmp_path).seconds == 2000 and reading(tmp_path, teacher={"model": "other/teacher-1b"}).seconds is None
    assert "; about 33 min at the 500 tokens/s of its last store\n" in render(make_plan(config))


def test_what_may_be_there_already_is_said(tmp_path: Path) -> None:
    config = a_sweep(tmp_path)
    keep(config, "this", 500.0, size=2_000_000)
    assert 2_000_000 <= reading(tmp_path).bytes_there < 2_001_000
    assert ", of which 2 MB may be there" in render(make_plan(config))
    other = [{"distill": {"temperature": 2.0}}, {"student": {"prune": {"keep": 10}}}, {"targets": {"mode": "hidden"}}]
    assert [reading(tmp_path, **sections).bytes_there for sections in other] == [0, 0, 0]


def test_a_disk_too_small_would_be_refused_where_the_store_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, automatic = a_sweep(tmp_path), a_sweep(tmp_path, targets={"mode": "auto"})
    (tmp_path / "sweep.yaml").write_text(dump(config))
    free = 10**9
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    assert sweep.main([str(tmp_path / "sweep.yaml"), "--dry-run"]) == 0
    line = f"targets.path: the teacher's targets take about 1.2 GB and {tmp_path}/cache/targets has 1.0 GB; name a larger disk"
    assert f"would be refused: {line}" in capsys.readouterr().out
    local.check_room(automatic)
    assert f"   note: {line}, or targets.mode=live; as it is, the teacher will run in every trial" in render(make_plan(automatic))
    keep(config, "this", 500.0, size=300_000_000)
    local.check_room(config)
    free = 10**8
    with pytest.raises(ConfigError, match="take about 0.9 GB"):
        local.check_room(config)


def test_room_is_asked_of_each_nodes_copy_where_the_store_is_in_an_object_store(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is asked of the object store, which is none."""
    scratch, free = tmp_path / "scratch", 10**9
    away: dict[str, Any] = {
        "targets": {"mode": "projection", "path": "s3://nowhere/stores"},
        "storage": {"scratch": f"{scratch}"},
    }
    config, size = a_sweep(tmp_path, **away), 1_000_000 * ROW
    (tmp_path / "sweep.yaml").write_text(dump(config))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    assert sweep.main([str(tmp_path / "sweep.yaml"), "--dry-run"]) == 0
    text, line = capsys.readouterr().out, f"storage.scratch: {scratch}: {size:,} bytes wanted, 1,000,000,000 bytes free; "
    assert f"would be refused: {line}name a folder on a larger disk, or targets.mode=live\n" in text
    assert f"a copy of it is kept in {scratch} (storage.scratch), where 1.0 GB are free\n" in text
    automatic = render(make_plan(a_sweep(tmp_path, **{**away, "targets": {**away["targets"], "mode": "auto"}})))
    assert f"   note: {line}" in automatic and "as it is, the teacher will run in every trial" in automatic

    elsewhere = a_sweep(tmp_path, **away, resources={"address": "auto"})
    local.check_room(elsewhere)
    assert f"each node keeps a copy of it in {scratch} (storage.scratch)\n" in render(make_plan(elsewhere))

    for url, refused in (("s3://another/stores", True), ("s3://nowhere/stores", False)):
        copy = (Remote(url, str(scratch)) / "5dbc97").here
        copy.mkdir(parents=True)
        with (copy / "train-00000.safetensors").open("wb") as file:
            file.truncate(200_000_000)
        with pytest.raises(ConfigError, match="1,156,000,000 bytes wanted") if refused else nullcontext():
            local.check_room(config)
    free = size - 200_000_000
    local.check_room(config)
    free -= 1
    with pytest.raises(ConfigError, match="storage.scratch"):
        local.check_room(config)


def test_it_is_said_where_a_store_will_not_pay(tmp_path: Path) -> None:
    few = {"training": {"epochs": None, "tokens": 1_000}, "search": {"rank": {"choice": [2, 4]}}, "sampler": {"num_trials": 2}}
    said = "all trials together train on fewer tokens (2,000) than the data has (about 700,000)"
    assert said in render(make_plan(a_sweep(tmp_path, targets={"mode": "auto"}, **few)))
    assert "fewer tokens" not in render(make_plan(a_sweep(tmp_path, **few))), "it was asked for"
    assert "fewer tokens" not in render(make_plan(a_sweep(tmp_path, targets={"mode": "auto"})))

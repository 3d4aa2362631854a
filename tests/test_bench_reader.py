"""Does `bench reader` say how many times a step's targets a store delivers? On tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from neo_ray import bench, stores
from neo_ray.storage import Remote
from neo_ray.stores import Shard


def measure(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    monkeypatch.setenv("HOME", str(folder))
    words = ["reader", "--tiny", "--device", "cpu", "--batch", "2", "--length", "17", "--repeats", "3", "--rows", "640", *more]
    assert bench.main([*words, "--out", str(folder / "reader.json")]) == 0
    result: dict[str, Any] = json.loads((folder / "reader.json").read_text(encoding="utf-8"))
    return result


def test_reader_door_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "store"
    result = measure(tmp_path, monkeypatch, "--place", str(place))
    (case,) = result["cases"]
    arms, setting = case["arms"], case["setting"]
    assert result["benchmark"] == "reader" and result["environment"]["cpus"] and result["environment"]["git_revision"]
    assert setting["store_rows"] == 640 and setting["scored_positions"] == 2 * 16
    assert setting["store_bytes"] == 640 * (2 * 64 + 4), "c in fp16 as wide as the student, a constant in fp32"
    for arm in arms.values():
        assert arm["tokens_per_second"] == pytest.approx(2 * 16 / arm["median_seconds"], rel=0.01)
    each = [step / read for step, read in zip(arms["step"]["seconds"], arms["reader"]["seconds"], strict=True)]
    assert arms["step"]["time_ratio"]["value"] == sorted(each)[1], "of a round, per scored position"
    assert all(len(arm["seconds"]) == 3 and min(arm["seconds"]) > 0 for arm in arms.values())
    assert bench.markdown(result) in capsys.readouterr().out
    assert list(place.iterdir()) == []


def test_what_is_read_from_an_object_store_is_removed_from_it(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = measure(tmp_path, monkeypatch, "--place", f"{bucket}/bench")["cases"]
    assert case["setting"]["store"] == f"{bucket}/bench" and min(case["arms"]["first_pass"]["seconds"]) > 0
    assert Remote(f"{bucket}/bench").names() == []


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_the_reader_s_benchmark_touches_no_store_that_is_there(
    bucket: str, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place: Any = Remote(f"{bucket}/store") if kind == "url" else tmp_path / "store"
    stores.write_shard(place, Shard("train", 0, 0, 1), {"c_RH": torch.ones(2, 4)})
    assert bench.main(["reader", "--tiny", "--device", "cpu", "--place", str(place)]) == 2
    assert "store holds something already; name a new folder" in capsys.readouterr().err
    assert stores.is_as_written(place, "train-00000", 2)

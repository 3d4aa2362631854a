"""Do weights keep their name exactly as long as no byte of them changes? Real safetensors files of a tiny model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from doors import sweep_file
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import World

from neo_ray import builder, weights
from neo_ray.data import TokenData
from neo_ray.loading import load
from neo_ray.parts import ModelSource, Sources
from neo_ray.prepare import check_same_sources
from neo_ray.settings import ConfigError
from neo_ray.supply import Supply
from neo_ray.uploads import SOURCES_FILE
from neo_ray.weights import identity

LAST = -1


@pytest.fixture
def model(tiny_world: World, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_world.teacher, tmp_path / "model"))


def flip(path: Path, position: int) -> None:
    """One bit, in place; the time of modification is set back, as `rsync --times` or a restored backup may."""
    times = path.stat()
    with open(path, "r+b") as file:
        file.seek(position, os.SEEK_END if position < 0 else os.SEEK_SET)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def position_of(path: Path, name: str) -> int:
    """Of the middle byte of a tensor within its file."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(header))[name]["data_offsets"]
    return 8 + header + int(begin + end) // 2


@pytest.fixture
def all_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are remembered at once, however young."""
    monkeypatch.setattr(weights, "SETTLED_SECONDS", -1.0)


@pytest.mark.parametrize(
    "place", ["model.layers.2.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight", "model.norm.weight", 9, LAST]
)
def test_one_bit_anywhere_gives_another_name(model: Path, tmp_path: Path, all_settled: None, place: str | int) -> None:
    path = model / "model.safetensors"
    before = identity(str(model), None, tmp_path / "cache")
    flip(path, place if isinstance(place, int) else position_of(path, place))
    assert identity(str(model), None, tmp_path / "cache") != before
    flip(path, place if isinstance(place, int) else position_of(path, place))
    assert identity(str(model), None, tmp_path / "cache") == before


@pytest.mark.parametrize("position", [70_000, 100_000, 5_000_001, 11_900_000])
def test_one_bit_anywhere_in_a_large_file_gives_another_name(tmp_path: Path, all_settled: None, position: int) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"weight": torch.zeros(3_000_000)}, tmp_path / "model.safetensors")
    before = identity(str(tmp_path), None, tmp_path / "cache")
    flip(tmp_path / "model.safetensors", position)
    assert identity(str(tmp_path), None, tmp_path / "cache") != before


@pytest.mark.parametrize("mode", ["projection", "hidden"])
def test_targets_of_a_teacher_that_was_patched_in_place_are_not_taken(
    tiny_world: World, model: Path, tmp_path: Path, mode: str
) -> None:
    config = load(sweep_file(tiny_world, tmp_path))
    sources = Sources(ModelSource(str(tiny_world.student)), "data", ModelSource(str(model)), 512)
    data, supply = TokenData(Path(), "made", {}, {}), Supply(mode, "", dtype="fp32")  # type: ignore[arg-type]
    before = builder.source_of(config, supply, sources, data)
    assert builder.source_of(config, supply, sources, data) == before
    flip(model / "model.safetensors", position_of(model / "model.safetensors", "model.layers.1.self_attn.q_proj.weight"))
    assert builder.source_of(config, supply, sources, data).folder != before.folder


@pytest.mark.parametrize("name", ["config.json", "modeling_own.py", "model.safetensors.index.json"])
def test_what_says_how_weights_are_read_is_part_of_them(model: Path, tmp_path: Path, name: str) -> None:
    before = identity(str(model), None, tmp_path)
    with open(model / name, "a") as file:
        file.write("\n")
    assert identity(str(model), None, tmp_path) != before


def test_a_copy_has_the_same_name_and_other_weights_of_the_same_size_do_not(model: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(model, tmp_path / "elsewhere")
    assert identity(str(copied), None, tmp_path) == identity(str(model), None, tmp_path)
    with safe_open(copied / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + torch.eye(64)[17] / 64
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    assert identity(str(copied), None, tmp_path) != identity(str(model), None, tmp_path)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read: list[str] = []
    of_file = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: (read.append(file.name), of_file(file, kind))[1])
    return read


def test_a_second_start_reads_no_weights(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_settled: None) -> None:
    read = count_reads(monkeypatch)
    names = [identity(str(model), None, tmp_path / "cache") for _ in range(3)]
    assert len(set(names)) == 1 and len(read) == 1
    (model / "model.safetensors").touch()
    assert identity(str(model), None, tmp_path / "cache") == names[0] and len(read) == 2
    for note in (tmp_path / "cache" / "digests").iterdir():
        note.write_text("{")
    assert identity(str(model), None, tmp_path / "cache") == names[0] and len(read) == 3


def test_a_file_that_was_just_written_is_not_remembered(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be written once more within the same tick of the clock that its times are told by."""
    read = count_reads(monkeypatch)
    (model / "model.safetensors").touch()
    for _ in range(2):
        identity(str(model), None, tmp_path / "cache")
    assert len(read) == 2 and not (tmp_path / "cache" / "digests").exists()


def test_a_cache_that_cannot_be_written_gives_the_same_name(model: Path, tmp_path: Path, all_settled: None) -> None:
    (tmp_path / "cache").write_text("a file")
    assert identity(str(model), None, tmp_path / "cache") == identity(str(model), None, tmp_path / "other")


def test_a_snapshot_of_the_hub_is_known_by_the_names_of_its_blobs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "models--owner--name"
    snapshot, content = hub / "snapshots" / "c0ffee", (model / "model.safetensors").read_bytes()
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    shutil.copy(model / "config.json", snapshot)
    name = hashlib.sha256(content).hexdigest()
    (hub / "blobs" / name).write_bytes(content)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{name}")
    expected = identity(str(model), None, tmp_path / "cache")
    read = count_reads(monkeypatch)
    assert identity(str(snapshot), None, tmp_path / "cache") == expected and not read
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(model / "model.safetensors")
    assert identity(str(snapshot), None, tmp_path / "cache") == expected and len(read) == 1, "any other link is read"


@pytest.mark.parametrize("before", ["0123456789abcdef", "owner/name@c0ffee"])
def test_what_was_named_by_less_than_every_byte_is_not_said_to_have_changed(tmp_path: Path, before: str) -> None:
    (tmp_path / SOURCES_FILE).write_text(json.dumps({"teacher.model": before}))
    with pytest.raises(ConfigError, match="teacher.model cannot be told to be the same as when .* was begun"):
        check_same_sources(tmp_path, {"teacher.model": "sha256:1"}, "take another name")
    (tmp_path / SOURCES_FILE).write_text(json.dumps({"teacher.model": "sha256:0"}))
    with pytest.raises(ConfigError, match="teacher.model changed since .* was begun"):
        check_same_sources(tmp_path, {"teacher.model": "sha256:1"}, "take another name")

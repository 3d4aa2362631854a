"""Is a store of targets filled with what a sweep reads, and can a person see, check and remove it? On the tiny world's data."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doors import sweep_file
from tiny import World

from neo_ray import builder, cluster, crew, data, ground, inventory, models, stores, supply, sweep, targets
from neo_ray.config import SweepConfig
from neo_ray.data import TokenData
from neo_ray.heldout import evaluation_batches
from neo_ray.lease import LeaseLost
from neo_ray.loading import load
from neo_ray.parts import ModelSource, Sources, TargetSource
from neo_ray.settings import ConfigError
from neo_ray.space import build_space
from neo_ray.storage import Folder, Remote
from neo_ray.storehouse import unless_building
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


def write(folder: Folder, tokens: TokenData, wanted: list[Shard]) -> None:
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


def make_whole(folder: Folder, tokens: TokenData) -> None:
    """A store that is whole, and used just now."""
    cut = stores.shards(tokens, BYTES_OF_ROW)
    names = {"recipe": {"mode": "projection"}, "teacher": "big", "student": "small", "data": "text"}
    inventory.describe(folder, names, {s.name: stores.num_rows(tokens.split(s.split), s) for s in cut})
    write(folder, tokens, cut)
    inventory.add_filled(folder, 1234, 5.0)
    inventory.mark_used(folder)


@pytest.fixture
def cache(tokens: TokenData, tmp_path: Path) -> Path:
    """A cache with a store `abc`."""
    folder = tmp_path / "cache" / "targets" / "abc"
    folder.mkdir(parents=True)
    make_whole(folder, tokens)
    return tmp_path / "cache"


def test_stores_in_an_object_store_are_listed_read_to_the_last_byte_and_removed(
    tokens: TokenData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = Remote(f"memory://{tmp_path.name}/cache", str(tmp_path / "scratch"))
    folder = there / "targets" / "abc"
    make_whole(folder, tokens)
    asked = ["--cache", there.url]
    assert targets.main(["list", *asked]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("abc", "projection", "big", "1,234", "all there"))
    assert targets.main(["verify", *asked]) == 0
    harmed = folder / "train-00001.safetensors"
    content = bytearray(harmed.read_bytes())
    content[-1] ^= 1
    harmed._ask("pipe_file", bytes(content))
    capsys.readouterr()
    assert targets.main(["verify", *asked, "--delete"]) == 1 and not harmed.exists()
    assert "train-00001: not what was written" in capsys.readouterr().out
    assert targets.main(["list", *asked]) == 0 and "1 of " in capsys.readouterr().out
    assert targets.main(["prune", *asked, "--older-than", "10"]) == 0 and folder.names()
    (folder / inventory.USED).write_text(str(time.time() - 11 * targets.SECONDS_A_DAY))
    with unless_building(folder) as free:
        assert free and targets.main(["prune", *asked, "--older-than", "10"]) == 0 and folder.names()
    assert "somebody fills it" in capsys.readouterr().out
    assert targets.main(["prune", *asked, "--older-than", "10"]) == 0 and not folder.names()


def test_a_store_says_what_it_is_and_keeps_what_earlier_sweeps_said(cache: Path) -> None:
    folder = cache / "targets" / "abc"
    before = inventory.facts_of(folder)
    inventory.describe(folder, {"recipe": {"mode": "projection"}, "teacher": "big"}, {"train-99999": 7})
    after = inventory.facts_of(folder)
    assert after["shards"] == {**before["shards"], "train-99999": 7} and after["made"] == before["made"]
    assert (after["tokens_seen"], after["tokens_per_second"]) == (1234, 5.0)
    assert inventory.stores_within(inventory.folder_of(cache))[0].absent == ["train-99999"]


def test_the_list_names_stores_and_what_is_missing(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert targets.main(["list", "--cache", str(cache)]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("abc", "projection", "big", "small", "1,234", "all there"))
    (cache / "targets" / "abc" / "train-00001.safetensors").unlink()
    targets.main(["list", "--cache", str(cache)])
    assert "1 of " in capsys.readouterr().out


def test_verify_finds_a_flipped_byte_and_deletes_when_told(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["verify", "--cache", str(cache)]
    assert targets.main(asked) == 0
    harmed = cache / "targets" / "abc" / "train-00001.safetensors"
    content = bytearray(harmed.read_bytes())
    content[-1] ^= 1
    harmed.write_bytes(content)
    capsys.readouterr()
    assert targets.main(asked) == 1 and harmed.exists()
    assert "train-00001: not what was written" in capsys.readouterr().out
    assert targets.main([*asked, "ab", "--delete"]) == 1 and not harmed.exists()
    assert not harmed.with_suffix(".json").exists() and harmed.with_name("train-00000.safetensors").exists()


def test_prune_takes_what_was_not_used_and_never_what_is_being_filled(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, asked = cache / "targets" / "abc", ["prune", "--cache", str(cache)]
    assert targets.main([*asked, "--older-than", "10"]) == 0 and folder.exists()
    long_ago = time.time() - 11 * targets.SECONDS_A_DAY
    os.utime(folder / inventory.USED, (long_ago, long_ago))
    assert targets.main([*asked, "--older-than", "10", "--dry-run"]) == 0 and folder.exists()
    with unless_building(folder) as free:
        assert free and targets.main([*asked, "--key", "abc"]) == 0 and folder.exists()
    assert "somebody fills it" in capsys.readouterr().out
    assert targets.main([*asked, "--older-than", "10"]) == 0 and not folder.exists()
    assert "freed" in capsys.readouterr().out


def killed_reader(folder: Folder) -> None:
    """As a driver leaves a store that had no time to end."""
    inventory._stamp(folder, f"{inventory.READING}killed")


@pytest.mark.parametrize("where", ["disk", "objects"])
def test_prune_leaves_a_store_that_a_running_sweep_reads(
    tokens: TokenData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    url = f"memory://{tmp_path.name}/read"
    there: Folder = tmp_path / "cache" if where == "disk" else Remote(url, str(tmp_path / "scratch"))
    folder = there / "targets" / "abc"
    if isinstance(folder, Path):
        folder.mkdir(parents=True)
    make_whole(folder, tokens)
    asked = ["prune", "--cache", str(there), "--key", "abc"]
    with sweep.reading(SimpleNamespace(targets=SimpleNamespace(place=folder))):
        assert targets.main(asked) == 0 and inventory.bytes_in(folder)
        assert "abc: stays: a sweep reads it" in capsys.readouterr().out
        assert targets.main([*asked, "--dry-run"]) == 0
        assert "abc: stays: a sweep reads it" in capsys.readouterr().out
    assert not inventory.is_read(folder), "it has ended"
    killed_reader(folder)
    assert targets.main(asked) == 0 and inventory.bytes_in(folder)
    monkeypatch.setattr(inventory, "IN_USE_SECONDS", -1.0)  # minutes later
    assert targets.main(asked) == 0 and not inventory.sizes_in(folder)


def test_a_reader_s_sign_stays_fresh_for_as_long_as_it_runs(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "IN_USE_SECONDS", 1.0)
    folder = cache / "targets" / "abc"
    with inventory.in_use(folder):
        (sign,) = folder.glob(f"{inventory.READING}*")
        for _ in range(2):
            os.utime(sign, (0, 0))
            deadline = time.monotonic() + 30
            while not inventory.is_read(folder):
                assert time.monotonic() < deadline
                time.sleep(0.05)
    assert not sign.exists()


def test_stores_outside_of_a_cache_are_reached_by_their_path(
    cache: Path, tiny_world: World, tokens: TokenData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `targets.path` names holds stores itself, as a sweep that names it writes them."""
    stores_here = tmp_path / "big" / "stores"
    config = a_sweep(tiny_world, tmp_path, targets={"path": str(stores_here)})
    assert config.targets_folder == stores_here
    stores_here.mkdir(parents=True)
    (cache / "targets" / "abc").rename(config.targets_folder / "abd")
    (stores_here / "something else").mkdir()
    asked = ["--path", str(stores_here)]
    assert targets.main(["list", *asked]) == 0 and "all there" in capsys.readouterr().out
    assert targets.main(["verify", *asked, "abd"]) == 0
    long_ago = time.time() - 11 * targets.SECONDS_A_DAY
    for path in (stores_here / "abd" / inventory.USED, stores_here / "something else"):
        os.utime(path, (long_ago, long_ago))
    assert targets.main(["prune", *asked, "--older-than", "10"]) == 0
    assert [path.name for path in stores_here.iterdir() if path.is_dir()] == ["something else"], "which says nothing of itself"


def test_a_place_one_level_off_is_said_to_be_that(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, store = cache / "targets", cache / "targets" / "abc"
    mistakes = {
        ("--cache", place): f"--cache {place}: holds stores itself: --path {place}",
        ("--cache", store): f"--cache {store}: is a store itself, of the key abc",
        ("--path", cache): f"--path {cache}: is a cache: --cache {cache}",
        ("--path", store): f"--path {store}: is a store itself, of the key abc",
    }
    for (option, given), words in mistakes.items():
        for door in (["list"], ["verify"], ["prune", "--older-than", "0"]):
            assert targets.main([*door, option, str(given)]) == 2
            assert words in capsys.readouterr().err
    assert store.exists()
    assert targets.main(["list", "--cache", str(tmp_path / "empty")]) == 0 and "no stores" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        targets.main(["list", "--cache", str(cache), "--path", str(place)])


@pytest.mark.parametrize("words", [[], ["build"], ["prune"], ["prune", "--dry-run"], ["list", "abc"]])
def test_what_says_not_enough_is_refused_with_the_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        targets.main(words)
    assert refused.value.code == 2 and "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("targets.mode=live", "targets.mode: this sweep takes no store, as the teacher runs in every trial: as asked"),
        ("method=sft", "no trial trains on what the teacher says"),
        ("data.source=nowhere.jsonl", "data.source: nowhere.jsonl: no such file or folder"),
    ],
)
def test_what_needs_no_store_or_cannot_run_is_not_built(
    tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    search = {"learning_rate": {"choice": [1e-3, 1e-2]}}
    assert targets.main(["build", str(sweep_file(tiny_world, tmp_path, search=search)), override]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and not shown.out, "before anything is prepared"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("error", "code"), [(crew.TargetsFailed("no memory"), 1), (LeaseLost("taken over"), 1), (KeyboardInterrupt(), 130)]
)
def test_a_build_that_ends_early_says_so_in_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, tiny_world: World, tmp_path: Path, error: BaseException, code: int
) -> None:
    def failing(*_: object) -> None:
        raise error

    room = SimpleNamespace(capacity="1 node(s)", builders=1)
    monkeypatch.setattr(ground, "prepared", lambda config, announce: (None, supply.choose(config, build_space(config))))
    monkeypatch.setattr(ground, "connected", lambda *_: contextlib.nullcontext(room))
    monkeypatch.setattr(ground, "stand", failing)
    assert targets.main(["build", str(sweep_file(tiny_world, tmp_path)), "targets.mode=projection"]) == code


@pytest.mark.parametrize("started_here", [True, False])
def test_only_a_ray_that_was_started_here_is_shut_down(
    monkeypatch: pytest.MonkeyPatch, tiny_world: World, tmp_path: Path, started_here: bool
) -> None:
    import ray

    ended: list[bool] = []
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    monkeypatch.setattr(cluster, "connect", lambda _: cluster.Capacity((cluster.Node(cpus=0),), started_here=started_here))
    config, none = a_sweep(tiny_world, tmp_path), supply.Supply("live", "")
    connected = ground.connected(config, Sources(ModelSource("student"), "data"), none, lambda _: None)
    with pytest.raises(ConfigError, match="a trial takes 1 CPUs and the cluster has 0"), connected:
        raise AssertionError("no room")
    assert ended == [True] * started_here


def test_the_store_of_a_sweep_file_is_verified_alone(
    cache: Path, tiny_world: World, tokens: TokenData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep_file(tiny_world, tmp_path, targets={"mode": "projection"})
    assert targets.main(["verify", str(file)]) == 1
    stored = targets.store_of(str(file))
    assert stored.folder.parent == cache / "targets" and not stored.folder.exists()
    cut = stores.shards(tokens, BYTES_OF_ROW)
    rows = {shard.name: stores.num_rows(tokens.split(shard.split), shard) for shard in cut}
    inventory.describe(stored.folder, {"recipe": {"mode": "projection"}}, rows)
    write(stored.folder, tokens, cut)
    (cache / "targets" / "abc" / "train-00001.safetensors").unlink()
    capsys.readouterr()
    assert targets.main(["verify", str(file)]) == 0
    shown = capsys.readouterr().out
    assert f"{stored.folder.name}: {len(cut)} of {len(cut)} files whole" in shown and "abc" not in shown
    (stored.folder / "train-00001.safetensors").write_bytes(b"short")
    assert targets.main(["verify", str(file)]) == 1


def test_a_sweep_without_a_store_of_its_own_has_none_to_verify(tiny_world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes no store"):
        targets.store_of(str(sweep_file(tiny_world, tmp_path, targets={"mode": "live"})))
    there = sweep_file(tiny_world, tmp_path, targets={"mode": "projection", "path": f"memory://{tmp_path.name}/t"})
    assert (
        str(targets.store_of(str(there)).folder).startswith(f"memory://{tmp_path.name}/t/")
        and targets.main(["verify", str(there)]) == 1
    )


def test_the_room_for_hidden_states_is_that_of_their_head_too(
    tiny_world: World, tokens: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured against the files; what is there needs none."""
    recipe = Recipe("hidden", tokens.fingerprint, "teacher", "torch.float32", 512)
    source = TargetSource(str(tmp_path / "store"), recipe, 2 * 64)
    sources = Sources(ModelSource(str(tiny_world.student)), "data", ModelSource(str(tiny_world.teacher)))
    cut = stores.shards(tokens, source.bytes_of_row)[:2]
    before = builder.bytes_lacking(source, sources, tokens, cut)
    model = models.load_model(str(tiny_world.teacher), torch.float32)
    stores.write_head(source.place, models.output_head(model))
    left = builder.bytes_lacking(source, sources, tokens, cut)
    assert 0 <= (tmp_path / "store" / "head.safetensors").stat().st_size - (before - left) < 1000  # its file's own head
    assert left == 2 * 64 * sum(stores.num_rows(tokens.split(shard.split), shard) for shard in cut)


def test_a_builder_refuses_a_machine_that_has_no_room_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it loads a model; a store on a disk that all see is kept once, and asks nothing of it."""
    recipe = Recipe("hidden", "data", "teacher", "torch.float32", 512)
    place = TargetSource(f"memory://{tmp_path.name}/store", recipe, 8, scratch=str(tmp_path / "scratch"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=99))
    sources = Sources(ModelSource("/none"), "/none", ModelSource("/none"))
    with pytest.raises(ConfigError, match="storage.scratch: .*: 100 bytes wanted, 99 bytes free; .* or targets.mode=live"):
        builder._Builder(place, sources, "turn", whole_bytes=100).ready()
    with pytest.raises(ConfigError, match="teacher.model: there is no folder /none"):
        builder._Builder(place, sources, "turn", whole_bytes=99).ready()


def test_an_unknown_key_is_refused(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert targets.main(["verify", "--cache", str(cache), "abd"]) == 2
    assert "KEY abd: no store has it (did you mean `abc`?)" in capsys.readouterr().err

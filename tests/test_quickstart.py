"""Reference: wheels made here. pip itself fetches them, from a folder instead of an index (PIP_FIND_LINKS, PIP_NO_INDEX)."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from neo_ray.assets import ASSETS, SMOLLM2_CONFIG, Asset, Wheel, is_quickstart
from neo_ray.quickstart import fetch, made_once
from neo_ray.settings import ConfigError

MEMBER = "evals/registry/data/passages.jsonl"
PASSAGES = [{"0": " One – two.\n", "1": "two One"}, {"0": "Three.", "1": "x"}, {"0": "Three.", "1": "y"}]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is all pip can see."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def asset(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """A pinned text in a small wheel on the shelf."""
    content = "".join(json.dumps(row) + "\n" for row in PASSAGES).encode()
    path = shelf / "evals-9.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, content)
        archive.writestr("evals-9.9.dist-info/METADATA", "Metadata-Version: 2.1\nName: evals\nVersion: 9.9\n")
        archive.writestr("evals-9.9.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("evals-9.9.dist-info/RECORD", "")
    wheel = Wheel("evals", "9.9", hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    made = Asset(wheel, MEMBER, hashlib.sha256(content).hexdigest(), "passages.jsonl", (("text", "0"),))
    monkeypatch.setitem(ASSETS, "quickstart:passages", made)
    return made


def test_a_text_is_the_distinct_first_variants_and_is_downloaded_once(asset: Asset, tmp_path: Path) -> None:
    said: list[str] = []
    path = fetch("quickstart:passages", tmp_path / "cache", said.append)
    assert [json.loads(line) for line in Path(path).read_text().splitlines()] == [{"text": "One – two."}, {"text": "Three."}]
    assert said == ["downloading evals==9.9 (0 MB)", "passages.jsonl: ready in 0 s"]
    assert fetch("quickstart:passages", tmp_path / "cache", said.append) == path and len(said) == 2


def test_nothing_of_a_wheel_stays_but_what_is_used(asset: Asset, tmp_path: Path) -> None:
    path = Path(fetch("quickstart:passages", tmp_path / "cache", lambda _: None))
    kept = {str(p.relative_to(tmp_path / "cache")) for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    assert kept == {"quickstart/evals-9.9/passages.jsonl", "quickstart/.evals-9.9.lock"} and path.is_file()


def test_no_index_is_a_config_error_that_says_what_to_do(shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"quickstart:owt: pip could not download evals==3\.0\.1\.post1 \(ERROR: .*PIP_FIND_LINKS=FOLDER"
    ):
        fetch("quickstart:owt", tmp_path / "cache", lambda _: None)
    assert [p.name for p in (tmp_path / "cache" / "quickstart").iterdir()] == [".evals-3.0.1.post1.lock"]


def test_a_wheel_with_other_content_is_refused(asset: Asset, shelf: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(shelf / "evals-9.9-py3-none-any.whl", "a") as archive:
        archive.writestr("evals/more.py", "")
    with pytest.raises(ConfigError, match="pip could not download evals==9.9"):
        fetch("quickstart:passages", tmp_path / "cache", lambda _: None)
    assert not (tmp_path / "cache" / "quickstart" / "evals-9.9").exists()


def test_a_member_with_other_content_is_refused(asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Asset(asset.wheel, asset.member, "0" * 64, asset.file, asset.columns)
    monkeypatch.setitem(ASSETS, "quickstart:passages", wrong)
    with pytest.raises(ConfigError, match=r"passages\.jsonl: sha256 is .* not the pinned 000"):
        fetch("quickstart:passages", tmp_path / "cache", lambda _: None)
    assert not (tmp_path / "cache" / "quickstart" / "evals-9.9").exists()


def test_an_unknown_name_is_refused_with_a_guess(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"quickstart:wikipdia: .* did you mean `quickstart:wikipedia`\? allowed: .*quickstart:owt"
    ):
        fetch("quickstart:wikipdia", tmp_path, print)
    assert list(tmp_path.iterdir()) == []


def test_every_asset_is_pinned_and_has_a_quickstart_name() -> None:
    assert all(is_quickstart(name) for name in ASSETS) and not is_quickstart("some-one/some-model")
    digests = [d for asset in ASSETS.values() for d in (asset.sha256, asset.wheel.sha256)]
    assert all(len(d) == 64 and set(d) <= set("0123456789abcdef") for d in digests)
    assert len({(a.wheel, a.file) for a in ASSETS.values()}) == len(ASSETS)


def test_the_shape_is_known_without_torch() -> None:
    code = (
        "import sys, neo_ray.assets, neo_ray.quickstart as q; "
        "assert not {'torch', 'transformers'} & set(sys.modules); print(q.SMOLLM2_CONFIG)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == str(
        SMOLLM2_CONFIG
    )


def _write_slowly(target: Path, log: Path) -> None:
    def make(part: Path) -> None:
        part.mkdir()
        with open(log, "a") as file:
            file.write("made\n")
        time.sleep(0.3)
        (part / "content").write_text("whole")

    made_once(target, make)
    assert (target / "content").read_text() == "whole"


def test_two_processes_at_once_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_slowly, args=(tmp_path / "sub" / "it", tmp_path / "log")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


def test_what_fails_half_way_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        part.mkdir()
        (part / "half").write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        made_once(tmp_path / "it", fail)
    assert [p.name for p in tmp_path.iterdir()] == [".it.lock"]
    made_once(tmp_path / "it", lambda part: part.write_text("whole") and None)
    assert (tmp_path / "it").read_text() == "whole"


def test_files_are_as_readable_as_the_folder_around_them(tmp_path: Path) -> None:
    def make(part: Path) -> None:
        part.mkdir()
        (part / "private").touch(mode=0o600)

    tmp_path.chmod(0o755)
    made_once(tmp_path / "open", make)
    assert (tmp_path / "open" / "private").stat().st_mode & 0o777 == 0o644
    (tmp_path / "closed").mkdir(mode=0o700)
    made_once(tmp_path / "closed" / "it", make)
    assert (tmp_path / "closed" / "it" / "private").stat().st_mode & 0o777 == 0o600

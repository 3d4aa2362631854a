"""Does an object store keep what a folder keeps? In moto's S3 and in fsspec's memory."""

from __future__ import annotations

import errno
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from neo_ray import storage
from neo_ray.storage import Damaged, NoRoom, Remote

COUNTED = """
import sys
from pathlib import Path
from neo_ray import storage

url, scratch = sys.argv[1:]
download, done = storage.Remote.download, []
storage.Remote.download = lambda self, file: (done.append(file), download(self, file))
assert storage.bring_folder(storage.Remote(url, scratch), Path(scratch) / "here")
print(len(done))
"""


@pytest.fixture(params=["s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    root = request.getfixturevalue("bucket") if request.param == "s3" else f"memory://{tmp_path.name}"
    return Remote(f"{root}/results", str(tmp_path / "scratch"))


def a_folder(folder: Path) -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "weights").write_bytes(bytes(range(256)) * 40)
    (folder / "state.json").write_text("{}")
    return folder


def test_a_setting_is_a_folder_or_a_place() -> None:
    assert storage.at("~/x") == Path.home() / "x" and storage.at("results") == Path("results")
    assert str(storage.at("s3://b/x/")) == "s3://b/x"


def test_objects_are_written_read_listed_moved_and_removed(place: Remote) -> None:
    assert not (place / "a.json").exists() and place.names() == [] and place.sizes() == {}
    (place / "a.json").write_text("1")
    (place / "b" / "c").write_text("four")
    assert (place / "a.json").read_text() == "1" and (place / "a.json").exists()
    assert place.names() == ["a.json", "b"] and place.sizes() == {"a.json": 1}
    assert place.read_many(["a.json", "gone"]) == {"a.json": b"1"}
    (place / "b").move_to(place / "d")
    assert (place / "d").names() == ["c"] and (place / "b").names() == []
    place.remove()
    place.remove()
    assert place.names() == []


def test_of_those_that_create_an_object_one_succeeds(place: Remote) -> None:
    assert [(place / "lease").create(who) for who in "ab"] == [True, False]
    assert (place / "lease").read_text() == "a"


def test_a_folder_is_whole_with_its_record_and_comes_back_once(place: Remote, tmp_path: Path) -> None:
    there, back = place / "step-1", tmp_path / "back"
    assert not storage.bring_folder(there, back) and not back.exists()
    storage.upload_folder(a_folder(tmp_path / "made"), there)
    assert storage.bring_folder(there, back)
    assert (back / "deep" / "weights").read_bytes() == bytes(range(256)) * 40
    assert sorted(path.name for path in back.iterdir()) == ["deep", "state.json", storage.RECORD]
    (tmp_path / "made" / "state.json").write_text("{1}")
    storage.upload_folder(tmp_path / "made", there)
    assert storage.bring_folder(there, back) and (back / "state.json").read_text() == "{1}", "another one in its place"
    (there / storage.RECORD).remove()
    assert not storage.bring_folder(there, tmp_path / "other"), "without its record it is none"


def flipped(content: bytes) -> bytes:
    return content[:50] + bytes([content[50] ^ 1]) + content[51:]


@pytest.mark.parametrize("harm", [flipped, lambda content: content[:-1], None], ids=["flipped", "truncated", "gone"])
def test_what_is_not_as_written_is_never_given_out(place: Remote, tmp_path: Path, harm: Callable[[bytes], bytes] | None) -> None:
    storage.upload_folder(a_folder(tmp_path / "made"), place)
    file = place / "deep" / "weights"
    if harm is None:
        file.remove()
    else:
        fs, path = file._open()
        fs.pipe_file(path, harm(file.read_bytes()))
    with pytest.raises(Damaged, match="deep/weights is not what was written"):
        storage.bring_folder(place, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".part")] == []


def test_processes_of_a_machine_bring_a_folder_once(bucket: str, tmp_path: Path) -> None:
    storage.upload_folder(a_folder(tmp_path / "made"), Remote(f"{bucket}/x"))
    command = [sys.executable, "-c", COUNTED, f"{bucket}/x", str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = [int(process.communicate(timeout=60)[0]) for process in running]
    assert sorted(counts) == [0, 2], "the files of one folder"


class Failing:
    """A store that does not answer the first times."""

    def __init__(self, times: int, error: Exception) -> None:
        self.times, self.error = times, error

    def __call__(self, *values: Any, **settings: Any) -> bytes:
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return b"at last"


def test_a_store_that_fails_for_a_while_is_asked_again_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    place, kind = Remote("memory://x/y"), fsspec.get_filesystem_class("memory")
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    monkeypatch.setattr(kind, "cat_file", Failing(3, ConnectionError("no route")))
    assert place.read_bytes() == b"at last"
    monkeypatch.setattr(kind, "cat_file", Failing(10**9, ConnectionError("no route")))
    with pytest.raises(ConnectionError):
        place.impatient(0.1).read_bytes()
    lasting = Failing(1, PermissionError("not yours"))
    monkeypatch.setattr(kind, "cat_file", lasting)
    with pytest.raises(PermissionError):
        place.read_bytes()
    assert lasting.times == 0, "asked once"


@pytest.mark.parametrize("number", storage.FULL)
def test_a_full_disk_of_this_machine_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int) -> None:
    place = Remote(f"memory://{tmp_path.name}/rows")
    place.write_text("12345")
    full = Failing(10**9, OSError(number, "no room"))
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "get_file", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3))
    with pytest.raises(NoRoom) as raised:
        place.download(tmp_path / "scratch" / "rows")
    assert full.times == 10**9 - 1, "asked once"
    words = f"storage.scratch: {tmp_path / 'scratch'}: 5 bytes wanted, 3 bytes free; name a folder on a larger disk"
    assert str(raised.value) == str(pickle.loads(pickle.dumps(raised.value))) == words
    assert raised.value.errno == errno.ENOSPC and list((tmp_path / "scratch").iterdir()) == []


def test_a_folder_that_does_not_fit_is_refused_before_anything_is_brought(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = Remote(f"memory://{tmp_path.name}/full")
    storage.upload_folder(a_folder(tmp_path / "made"), place)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_241))
    with pytest.raises(NoRoom, match="10,242 bytes wanted, 10,241 bytes free"):
        storage.bring_folder(place, tmp_path / "back")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_242))
    assert storage.bring_folder(place, tmp_path / "back")


def test_what_a_killed_process_brought_halfway_goes_and_what_others_bring_stays(tmp_path: Path) -> None:
    left = [tmp_path / name for name in (".part-abc-01234567", ".part-abc.safetensors-89abcdef", ".part-abc.new-89abcdef")]
    others = [tmp_path / name for name in (".part-abcd-01234567", ".part-x-abc-01234567", ".part-abc-0123456")]
    for folder in (left[0], left[2], others[0]):
        (folder / "inner").mkdir(parents=True)
    for file in (left[1], *others[1:]):
        file.write_text("half of it")
    with storage.alone(tmp_path / "abc"):
        assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_scratch_is_where_the_machine_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NODE_DISK", str(tmp_path))
    one, other = (Remote(url, "$NODE_DISK/x").here for url in ("s3://a/tiny", "s3://b/tiny"))
    assert one.parent == other.parent == tmp_path / "x" and one != other

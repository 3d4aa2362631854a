"""Folders of a cache in an object store: uploaded once, and brought to a machine that shares no disk with the driver."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from neo_ray.handover import hand_over
from neo_ray.parts import ModelSource, Sources, received
from neo_ray.storage import RECORD, Damaged, Remote


def made(folder: Path, text: str) -> str:
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file.bin").write_text(text)
    return str(folder)


@pytest.fixture
def cache(tmp_path: Path) -> Remote:
    return Remote(f"memory://{tmp_path.name}/cache", str(tmp_path / "driver"))


@pytest.fixture
def sources(cache: Remote, tmp_path: Path) -> Sources:
    """Tokens, a cut student and a suite in the cache; a teacher in a folder of the user's."""
    student, teacher = (
        ModelSource(made(cache.here / "students" / "cut", "student")),
        ModelSource(made(tmp_path / "own", "teacher")),
    )
    data, suite = made(cache.here / "data" / "abc", "tokens"), made(cache.here / "suites" / "one", "tasks")
    return Sources(student, data, teacher, suite=suite)


def elsewhere(sources: Sources, scratch: Path) -> Sources:
    assert sources.shared is not None
    return received(replace(sources, shared=replace(sources.shared, scratch=str(scratch))))


@pytest.mark.parametrize("kind", ["symbolic link", "relative"])
def test_a_scratch_folder_under_another_name_is_the_same(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's paths may go through a link or from its working directory: other machines have neither."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    cache = Remote(f"memory://{tmp_path.name}/{kind[:4]}", str(tmp_path / "link") if kind == "symbolic link" else "real")
    folders = {"tokens": "data/abc", "student": "students/cut", "teacher": "quickstart/teacher", "tasks": "suites/one"}
    paths = {text: made(cache.here / name, text) for text, name in folders.items()}
    sources = Sources(
        ModelSource(paths["student"]), paths["tokens"], ModelSource(paths["teacher"], revision="main"), suite=paths["tasks"]
    )
    there = elsewhere(hand_over(sources, cache, lambda _: None), tmp_path / "node")
    assert there.teacher is not None and there.teacher.revision == "main"
    found = {"tokens": there.data, "student": there.student.path, "teacher": there.teacher.path, "tasks": there.suite}
    for text, folder in found.items():
        assert folder is not None and Path(folder).is_relative_to(tmp_path / "node")
        assert (Path(folder) / "inner" / "file.bin").read_text() == text


def test_what_is_in_the_cache_is_brought_and_nothing_else(sources: Sources, cache: Remote, tmp_path: Path) -> None:
    said: list[str] = []
    given = hand_over(sources, cache, said.append)
    assert len(said) == 3
    there = elsewhere(given, tmp_path / "node")
    found = {"tokens": there.data, "student": there.student.path, "tasks": there.suite}
    for text, folder in found.items():
        assert folder is not None and Path(folder).is_relative_to(tmp_path / "node")
        assert (Path(folder) / "inner" / "file.bin").read_text() == text
    assert there.teacher == sources.teacher and there.shared is None
    hand_over(sources, cache, said.append)
    assert len(said) == 3, "what is there is not uploaded again"


def test_the_drivers_own_machine_brings_nothing(sources: Sources, cache: Remote) -> None:
    given = hand_over(sources, cache, lambda _: None)
    for name in ("data/abc", "students/cut", "suites/one"):
        (cache / name / "inner" / "file.bin").remove()
    assert received(given) == sources


def content(there: Sources) -> dict[str, str]:
    """Of the file in each folder that was handed over."""
    folders = {"data": there.data, "student": there.student.path, "suite": str(there.suite)}
    return {name: (Path(folder) / "inner" / "file.bin").read_text() for name, folder in folders.items()}


@pytest.mark.parametrize("harm", ["flipped", "gone"])
def test_what_is_damaged_in_the_store_is_never_taken_and_uploaded_again(
    sources: Sources, cache: Remote, tmp_path: Path, harm: str
) -> None:
    given = hand_over(sources, cache, lambda _: None)
    damaged = cache / "data" / "abc" / "inner" / "file.bin"
    damaged.write_text("tokenz") if harm == "flipped" else damaged.remove()
    for node in ("one", "another"):
        with pytest.raises(Damaged, match="data/abc/inner/file.bin is not what was written"):
            elsewhere(given, tmp_path / node)
    said: list[str] = []
    again = hand_over(given, cache, said.append)
    assert [line for line in said if line.startswith("uploading")] == [f"uploading abc to {cache / 'data' / 'abc'}"]
    assert content(elsewhere(again, tmp_path / "one")) == {"data": "tokens", "student": "student", "suite": "tasks"}
    assert (cache / "data" / "abc").names() == ["inner", RECORD], "and no lease"


def another_machine(sources: Sources, cache: Remote, scratch: Path, student: str) -> tuple[Sources, Remote]:
    """A driver that shares only the store, and that chose other layers."""
    other = Remote(cache.url, str(scratch))
    paths = {"data": sources.data, "student": sources.student.path, "suite": str(sources.suite)}
    texts = {"data": "tokens", "student": student, "suite": "tasks"}
    own = {name: made(other.here / Path(path).relative_to(cache.here), texts[name]) for name, path in paths.items()}
    return replace(sources, data=own["data"], student=ModelSource(own["student"]), suite=own["suite"]), other


def test_of_two_machines_that_make_another_student_the_first_one_s_counts(
    sources: Sources, cache: Remote, tmp_path: Path
) -> None:
    first = hand_over(sources, cache, lambda _: None)
    theirs, other = another_machine(sources, cache, tmp_path / "second driver", "other layers")
    said: list[str] = []
    second = hand_over(theirs, other, said.append)
    assert any("cut: another machine made it first; bringing that one" in line for line in said)
    assert not any("uploading" in line for line in said)
    wanted = {"data": "tokens", "student": "student", "suite": "tasks"}
    assert content(received(second)) == wanted, "on that driver's own machine"
    assert content(elsewhere(second, tmp_path / "node")) == content(elsewhere(first, tmp_path / "node of first")) == wanted


def test_nodes_of_a_sweep_take_the_student_that_it_began_with_or_none(sources: Sources, cache: Remote, tmp_path: Path) -> None:
    """Damaged where it stood, another driver's took its place: that serves sweeps that begin from now on."""
    first = hand_over(sources, cache, lambda _: None)
    (cache / "students" / "cut" / "inner" / "file.bin").write_text("studenz")
    theirs, other = another_machine(sources, cache, tmp_path / "second driver", "layers")
    second = hand_over(theirs, other, lambda _: None)
    assert content(elsewhere(second, tmp_path / "node"))["student"] == "layers"
    with pytest.raises(Damaged):
        elsewhere(first, tmp_path / "node")
    assert content(elsewhere(second, tmp_path / "new node"))["student"] == "layers", "it keeps its record"
    with pytest.raises(Damaged, match="students/cut is another one than this sweep began with; run it again"):
        hand_over(first, cache, lambda _: None)
    assert content(elsewhere(hand_over(sources, cache, lambda _: None), tmp_path / "next"))["student"] == "layers"


def test_a_cache_that_all_nodes_see_hands_over_nothing(sources: Sources, tmp_path: Path) -> None:
    assert hand_over(sources, tmp_path, print) is sources and received(sources) is sources

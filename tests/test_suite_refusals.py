"""Is a suite that cannot be asked refused before anything starts? Through the door, on the tiny world.

A dry run tells what needs no harness; the run tells the rest before there is a Ray or a folder of results.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_suites
from doors import sweep_file
from tiny import SUITE, World, make_suite, make_tokenizer, passages

from neo_ray import cluster, suites
from neo_ray.sweep import main

datasets_cache = test_suites.datasets_cache


def saying(new: str, old: str) -> Callable[[Path], str]:
    """Makes a folder's suite say the one in the place of the other, and names it."""

    def make(folder: Path) -> str:
        (folder / "suite.yaml").write_text(SUITE.replace(old, new), encoding="utf-8")
        return str(folder)

    return make


without_tasks = saying("tasks: none", "tasks: tasks")
of_no_text = saying('acc_norm, passages: "quickstart:wiki"}', "acc_norm}")
without_a_metric = saying("", "metric: acc_norm")


TOLD_AT_ONCE: dict[str, tuple[Callable[[Path], str], str, str]] = {
    "unknown suite": (lambda _: "quickstat", "suite", "evaluation.suite: quickstat is no suite (did you mean `quickstart`?)"),
    "a folder of none": (
        lambda folder: str(folder / "tasks"),
        "suite",
        "own/tasks is no suite; allowed: neo-math, neo10, quickstart, a YAML file",
    ),
    "no folder of its tasks": (without_tasks, "suite", "none is no folder"),
    "a text of the quickstart that is none": (of_no_text, "suite", "next_words.passages: quickstart:wiki: no such quickstart"),
    "no metric": (without_a_metric, "suite", "suite.yaml: benchmarks.next_words.metric: Field required"),
    "an objective that it has not": (str, "suite_next_word", "no suite_next_word (did you mean `suite_next_words`?)"),
}


def asked(world: World, folder: Path, make: Callable[[Path], str], metric: str = "suite") -> str:
    """A sweep file that asks a suite of the folder `own`, as `make` changes and names it."""
    make_suite(folder / "own", passages(make_tokenizer(), 6))
    changes: dict[str, Any] = {"evaluation": {"suite": make(folder / "own")}, "objective": {"metric": metric}}
    return str(sweep_file(world, folder, scheduler={"name": "none"}, **changes))


def refused(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The line that a run ends with, once it left no results and asked for no Ray."""
    monkeypatch.setattr(cluster, "connect", lambda *_: pytest.fail("a Ray was asked for"))
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not (folder / "results").exists()
    return line.removeprefix("error: ")


@pytest.mark.parametrize("case", TOLD_AT_ONCE)
def test_a_dry_run_tells_what_is_wrong_with_a_suite_and_the_run_refuses_it_before_it_prepares(
    case: str, tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, metric, words = TOLD_AT_ONCE[case]
    file = asked(tiny_world, tmp_path, make, metric)
    assert main([file, "--dry-run"]) == 0
    (told,) = (line for line in capsys.readouterr().out.splitlines() if "would be refused: " in line)
    assert words in told
    assert refused([file], tmp_path, capsys, monkeypatch) == told.partition("would be refused: ")[2]
    assert not (tmp_path / "cache").exists(), "nothing is prepared before"


def test_a_dry_run_of_a_suite_that_can_be_asked_has_nothing_to_refuse(
    tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for make, metric in ((str, "suite_next_words"), (lambda _: "quickstart", "suite")):
        assert main([asked(tiny_world, tmp_path, make, metric), "--dry-run"]) == 0
        assert "would be refused" not in capsys.readouterr().out
    assert not (tmp_path / "cache").exists() and not (tmp_path / "results").exists()


def test_a_dry_run_says_that_the_harness_is_not_installed(
    tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, find = asked(tiny_world, tmp_path, str), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest))
    assert main([file, "--dry-run"]) == 0
    assert "would be refused: evaluation.suite: needs the LM Evaluation Harness" in capsys.readouterr().out
    assert "needs the LM Evaluation Harness" in refused([file], tmp_path, capsys, monkeypatch)


unknown_task, other_metric = saying("next_word:", "next_words:"), saying("acc_normal", "acc_norm")


def data_away(folder: Path) -> str:
    (folder / "tasks" / "items.jsonl").unlink()
    return str(folder)


def hub_away(folder: Path) -> str:
    """Tests are offline."""
    text = f"name: own\nversion: 1\ntasks: {suites.SHIPPED}/neo-math\nbenchmarks: {{svamp: {{metric: acc}}}}\n"
    (folder / "suite.yaml").write_text(text, encoding="utf-8")
    return str(folder)


TOLD_BEFORE_TRAINING: dict[str, tuple[Callable[[Path], str], str]] = {
    "unknown suite": (
        lambda _: "quickstat",
        "quickstat is no suite (did you mean `quickstart`?); allowed: neo-math, neo10, quick",
    ),
    "unknown task": (unknown_task, "own v3: no task next_word (did you mean `next_words`?)"),
    "a metric that a task does not state": (
        other_metric,
        "own v3: next_words does not state acc_normal (did you mean `acc_norm`?); it has: acc, acc_norm",
    ),
    "its data is away": (data_away, "own v3: next_words cannot be loaded (FileNotFoundError: "),
    "its data set of the hub is away": (hub_away, "own v1: svamp cannot be loaded ("),
}


@pytest.mark.parametrize("case", TOLD_BEFORE_TRAINING)
def test_a_suite_that_cannot_be_asked_ends_the_sweep_in_one_line_before_anything_starts(
    case: str, tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = TOLD_BEFORE_TRAINING[case]
    file = asked(tiny_world, tmp_path, make)
    line = refused([file], tmp_path, capsys, monkeypatch)
    assert line.startswith(f"evaluation.suite: {words}"), line

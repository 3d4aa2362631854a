"""Does `neo_ray.status` say how far a sweep is? Reference: journals written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from buckets import put_sweep
from doors import sweep_file
from tiny import World

from neo_ray.lease import lease
from neo_ray.loading import dump, load
from neo_ray.records import Journal
from neo_ray.status import lines, main, status
from neo_ray.uploads import SOURCES_FILE


@pytest.fixture
def folder(tiny_world: World, tmp_path: Path) -> Path:
    """A sweep of four trials: one complete, one failed, one half way, one not begun."""
    config = load(sweep_file(tiny_world, tmp_path), ["sampler.num_trials=4", "training.steps=null", "training.tokens=1000"])
    config.folder.mkdir(parents=True)
    (config.folder / "sweep.yaml").write_text(dump(config))
    journal = Journal(config.folder)
    for number in range(3):
        journal.write("start", f"000{number}", params={"rank": 2 + number}, config={"training": {"tokens": 1000}})
    row = {"rung": 1, "step": 4, "tokens": 500, "seconds": 5.0, "select_ce": 4.25}
    journal.write("end", "0000", state="COMPLETE", metrics={"select_ce": 4.5}, tokens=1000, seconds=10.0)
    journal.write("end", "0001", state="FAILED", cause="diverged", tokens=0, seconds=10.0)
    journal.write("report", "0002", row=row)
    return config.folder


def test_a_running_sweep_is_told_with_who_drives_it(folder: Path) -> None:
    with lease(folder):
        found = status(folder)
    assert found["driver"]["pid"] and found["driver"]["silent_seconds"] < 60
    assert (found["planned"], found["unfinished"]) == (4, 2)
    assert found["states"] == {"COMPLETE": 1, "FAILED": 1, "RUNNING": 1}
    assert [(trial["id"], trial["share"], trial["value"]) for trial in found["running"]] == [("0002", 0.5, 4.25)]
    assert found["best"]["id"] == "0000" and found["failures"] == {"diverged": ["0001"]}
    assert found["tokens_per_worker_second"] == pytest.approx(1500 / 25)
    assert found["seconds_left"] == pytest.approx(1.5 * 10), "one and a half trials of ten seconds, one at a time"


def test_a_sweep_that_nobody_drives_says_so_by_its_exit_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 1
    text = capsys.readouterr().out
    assert "nobody drives it" in text and "2 trials are left" in text
    assert "0002 50% (500 tokens of 1,000), select_ce 4.2500" in text and "failed: diverged: 0001" in text
    with lease(folder):
        assert main([str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["driver"]


@pytest.mark.parametrize("has_told", [False, True])
def test_the_suite_s_name_and_version_stand_beside_every_value_of_benchmarks(
    tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], has_told: bool
) -> None:
    asked = {"suite": "./own", "suite_limit": 50, "suite_at": "rungs"}
    config = load(sweep_file(tiny_world, tmp_path, objective={"metric": "suite"}, evaluation=asked))
    config.folder.mkdir(parents=True)
    (config.folder / "sweep.yaml").write_text(dump(config))
    journal = Journal(config.folder)
    for number in range(2):
        journal.write("start", f"000{number}", params={"rank": 2 + number}, config={})
    journal.write("report", "0001", row={"rung": 1, "step": 4, "tokens": 500, "seconds": 5.0, "suite": 0.25})
    if has_told:  # results whose first file says nothing of it
        told = {"suite": "my-own v3", "suite_limit": 50}
        journal.write("end", "0000", state="COMPLETE", metrics={"suite": 0.5}, details=told, tokens=1000, seconds=10.0)
    else:
        (config.folder / SOURCES_FILE).write_text('{"evaluation.suite": "my-own-3-0123456789abcdef"}')
    name = "my-own v3 (first 50 items of a task)"
    main([str(config.folder)])
    text = capsys.readouterr().out
    assert f", {name} 0.2500" in text and "suite 0" not in text
    found = status(config.folder)
    assert [(trial["metric"], trial["label"]) for trial in found["running"]][-1] == ("suite", name)
    if has_told:
        assert f"best: {name} 0.5000 in trial 0000" in text
        assert (found["best"]["metric"], found["best"]["label"], found["best"]["value"]) == ("suite", name, 0.5)


def test_a_store_that_is_being_filled_is_no_missing_sweep(tiny_world: World, tmp_path: Path) -> None:
    config = load(sweep_file(tiny_world, tmp_path))
    config.folder.mkdir(parents=True)
    (config.folder / "sweep.yaml").write_text(dump(config))
    Journal(config.folder).write("filling", "", fill="a", store="b")
    assert status(config.folder)["states"] == {}


def test_a_sweep_whose_budget_is_spent_is_done(folder: Path) -> None:
    (folder / "sweep.yaml").write_text(dump(load(folder / "sweep.yaml", ["budget.tokens=1000"])))
    found = status(folder)
    assert found["unfinished"] == 0 and found["budget_spent"] == "tokens: 1,500 of 1,000"


def test_watching_ends_with_the_driver(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--watch", "60"]) == 1


def test_a_sweep_without_a_trial_yet_and_no_sweep_at_all(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "journal.jsonl").unlink()
    assert lines(status(folder))[1] == "trials: 0/4"
    assert main([str(tmp_path / "nothing")]) == 2
    assert "holds no sweep" in capsys.readouterr().err


def test_a_sweep_in_an_object_store_is_told_by_its_url(folder: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = put_sweep(folder, f"memory://{folder.parent.parent.name}/results/tiny")
    assert main([place.url]) == 1
    text = capsys.readouterr().out
    assert "nobody drives it" in text and "0002 50%" in text and f"journal: {place.url}/journal\n" in text
    with lease(place):
        assert main([place.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["driver"]["pid"]
    assert main([f"{place.url}-of-nobody"]) == 2
    assert "holds no sweep" in capsys.readouterr().err

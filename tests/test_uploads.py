"""Does a sweep whose results are in an object store go on elsewhere, from there alone?"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from doors import finish, kill, start, sweep_file
from tiny import World

from neo_ray import analyze, scores, storage, uploads
from neo_ray.records import Journal, TrialRecord, fold, load_records
from neo_ray.storage import Remote

STEPS = 60
SETTINGS: dict[str, Any] = {
    "search": {"kd_ratio": {"grid": [0.5, 1.0]}},
    "sampler": {"name": "grid"},
    "scheduler": {"name": "none"},
    "training": {"steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "dtype": "fp32", "learning_rate": "1e-2"},
    "evaluation": {"points": 6},
    "resources": {"concurrency": 1},
}


@pytest.fixture
def results(tmp_path: Path) -> Remote:
    return Remote(f"memory://{tmp_path.name}/results/tiny", str(tmp_path / "scratch"))


def a_checkpoint(results: Remote, step: int, text: str = "weights") -> Path:
    folder = results.here / "trials" / "0000" / "checkpoint" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "trained.safetensors").write_text(text)
    (folder / "state.json").write_text("{}")
    return folder


def test_the_last_checkpoint_is_uploaded_before_its_row_is_reported_and_comes_back(results: Remote) -> None:
    rows: list[dict[str, Any]] = []
    there = results / "trials" / "0000" / "checkpoint"
    report = uploads.publishing(results, "0000", lambda row: rows.append({**row, "there": there.names()}))
    for step in (4, 8):
        a_checkpoint(results, step)
        report({"step": step})
    assert [row["there"] for row in rows] == [["step-00000004"], ["step-00000008"]]
    shutil.rmtree(results.here)
    uploads.bring_checkpoint(results, "0000")
    (found,) = (results.here / "trials" / "0000" / "checkpoint").glob("step-*")
    assert found.name == "step-00000008" and (found / "trained.safetensors").read_text() == "weights"
    uploads.drop_checkpoint(results, "0000")
    uploads.bring_checkpoint(results, "0000")
    assert list((results.here / "trials" / "0000" / "checkpoint").glob("step-*")) == [], "of an earlier sweep of this name"


def test_a_harmed_checkpoint_is_passed_over(results: Remote) -> None:
    a_checkpoint(results, 4)
    uploads.publish_checkpoint(results, "0000")
    (results / "trials" / "0000" / "checkpoint" / "step-00000004" / "trained.safetensors").write_text("weight")
    shutil.rmtree(results.here)
    uploads.bring_checkpoint(results, "0000")
    assert list((results.here / "trials" / "0000" / "checkpoint").glob("step-*")) == []


def test_a_fresh_sweep_sets_the_old_one_aside_and_leaves_the_lease(results: Remote) -> None:
    (results / "lease-000001.json").write_text("{}")
    Journal(results).write("start", "0000")
    uploads.set_aside(results)
    assert results.names() == ["lease-000001.json"]
    (aside,) = (name for name in Remote(results.url.rsplit("/", 1)[0]).names() if name.startswith("tiny."))
    assert len(fold(Journal(results.with_name(aside)).events())) == 1


def test_a_copy_to_read_has_what_the_journal_says_of_the_teacher(results: Remote) -> None:
    Journal(results).write("start", "0000")
    Journal(results).write("targets", "", store="abc", tokens=7)
    here = uploads.local_copy(results)
    assert [event["event"] for event in Journal(here).events()] == ["start", "targets"]
    assert (here / "trials.jsonl").read_text().count("\n") == 1


def asked(results: Remote, value: float, name: str) -> None:
    scores.save(scores.SuiteScores("own v3", None, {"a": [value] * 30}), results.here / name)


def test_items_of_trials_and_of_the_untrained_student_come_along(results: Remote) -> None:
    journal = Journal(results)
    for id in ("0000", "0001"):
        journal.write("start", id)
        asked(results, 1.0, f"trials/{id}")
        asked(results, 0.0, "benchmarks/own-3-abc/all/student")
        uploads.publish_end(results, id, "COMPLETE")
        journal.write("end", id, state="COMPLETE", metrics={"suite": 1.0}, details={"suite": "own v3"})
    shutil.rmtree(results.here)
    here = uploads.local_copy(results)
    found = scores.of_results(here, load_records(here))
    assert {name: one.average for name, one in found.items()} == {"0000": 1.0, "0001": 1.0, "student": 0.0}
    (results / "trials" / "0001" / "suite.json").remove()
    here = uploads.local_copy(results)
    assert set(scores.of_results(here, load_records(here))) == {"0000", "student"}, "of an earlier sweep of this name"


def test_a_worker_has_the_untrained_student_s_scores_of_this_sweep_alone(results: Remote) -> None:
    old = results.here / "benchmarks" / "own-3-abc" / "all" / "student" / "suite.json"
    asked(results, 0.5, "benchmarks/own-3-abc/all/student")
    uploads.bring_untrained(results)
    assert not old.exists(), "a sweep of this name that was set aside has left it here"
    asked(results, 0.25, "benchmarks/own-3-abc/all/student")
    asked(results, 1.0, "trials/0000")
    uploads.publish_end(results, "0000", "COMPLETE")
    shutil.rmtree(results.here)
    uploads.bring_untrained(results)
    assert scores.read(old).average == 0.25


def records_of(results: Remote) -> list[TrialRecord]:
    return fold(Journal(results).events())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_goes_on_from_the_object_store_alone(tiny_world: World, tmp_path: Path, bucket: str) -> None:
    storage_section = {"path": f"{bucket}/results", "cache": f"{bucket}/cache", "scratch": str(tmp_path / "scratch")}
    file = sweep_file(tiny_world, tmp_path, **SETTINGS, storage=storage_section, targets={"path": f"{bucket}/targets"})
    results, process = Remote(f"{bucket}/results/tiny"), start(file)
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        records = records_of(results)
        if len(records) == 2 and records[0].finished and records[1].curve:
            break
        time.sleep(0.2)
    kill(process)
    text = finish(process)
    before = records_of(results)
    assert [record.finished for record in before] == [True, False], text
    assert (results / "trials" / "0001" / "checkpoint").names()
    assert Remote(f"{bucket}/cache/data").names(), "workers have their tokens from there"
    shutil.rmtree(tmp_path / "scratch")
    again = start(file)
    text = finish(again)
    assert again.returncode == 0, text
    first, second = records_of(results)
    assert first == before[0], "a finished trial is left alone"
    assert second.state == "COMPLETE" and second.details["resumed_from_step"] > 0
    assert {"report.md", "trials.jsonl", "sweep.yaml", "logs", "trials"} <= set(results.names())
    assert (results / "trials").names() == ["0000", "0001"]
    assert storage.bring_folder(results / "trials" / "0001" / "adapter", tmp_path / "adapter")
    assert (results / "trials" / "0001" / "checkpoint").names() == []
    shutil.rmtree(tmp_path / "scratch")
    assert analyze.main([results.url]) == 0
    assert "tokens once for 2 trials" in (results / "report.md").read_text()

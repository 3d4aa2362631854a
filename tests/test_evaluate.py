"""The table of benchmarks on trials of the tiny world: rows, what is kept between runs, and paired differences."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from buckets import put_sweep
from test_export import make_sweep, run_trials
from tiny import World, make_suite, make_tokenizer, passages

from neo_ray import harness, loading
from neo_ray.config import SweepConfig
from neo_ray.evaluate import Row, Table, evaluate, main, markdown
from neo_ray.paired import compare
from neo_ray.records import Journal, load_records
from neo_ray.scores import STUDENT, TEACHER, SuiteScores, read
from neo_ray.uploads import ITEMS


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    make_suite(folder, passages(make_tokenizer(), 12))
    return folder


@pytest.fixture(scope="module")
def swept(tiny_world: World, own: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepConfig:
    """Two neo trials and one of each other method; each was asked the suite at its end."""
    search = {"method": {"choice": ["neo", "lora", "kd", "sft"]}, "learning_rate": {"choice": [1e-2, 1e-5]}}
    evaluation = {"points": 1, "max_tokens": 900, "suite": str(own)}
    config = make_sweep(tiny_world, tmp_path_factory.mktemp("swept"), search=search, evaluation=evaluation)
    good, bad = {"method": "neo", "learning_rate": 1e-2}, {"method": "neo", "learning_rate": 1e-5}
    run_trials(config, {"0000": good, "0001": bad, "0002": {**good, "method": "lora"}, "0003": {**bad, "method": "kd"}})
    run_trials(config, {"0004": {**bad, "method": "sft"}})
    return config


@pytest.fixture(scope="module")
def unasked(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> SweepConfig:
    """A neo and an sft trial of a sweep without a suite; a kd trial failed."""
    search = {"method": {"choice": ["neo", "sft", "kd"]}}
    config = make_sweep(tiny_world, tmp_path_factory.mktemp("unasked"), search=search)
    run_trials(config, {"0000": {"method": "neo"}, "0001": {"method": "sft"}})
    journal = Journal(config.folder)
    journal.write("start", "0002", params={"method": "kd"}, config={"method": "kd"}, seed=0)
    journal.write("end", "0002", state="FAILED", cause="diverged")
    return config


def cells(text: str, about: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {about} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_teacher_student_and_the_best_of_each_method_are_asked_once(
    swept: SweepConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, asked = harness.ask, []

    def counted(*given: Any, **how: Any) -> SuiteScores:
        asked.append(type(given[1]).__name__)
        return original(*given, **how)

    monkeypatch.setattr(harness, "ask", counted)
    assert main([str(swept.folder)]) == 0
    assert len(asked) == 1  # the teacher: the sweep's own scores of the student and of its trials are taken
    text = (swept.folder / "benchmarks" / "own-v3.md").read_text()
    assert text in capsys.readouterr().out
    by_rate = {
        record.params["learning_rate"]: record for record in load_records(swept.folder) if record.params["method"] == "neo"
    }
    best = min(by_rate.values(), key=lambda record: record.metrics["select_ce"] or 0.0)
    records = {record.id: record for record in load_records(swept.folder)}
    trials = {
        f"neo, trial {best.id}": best,
        **{f"{records[i].params['method']}, trial {i}": records[i] for i in ("0002", "0003", "0004")},
    }
    assert {about.partition(",")[0] for about in trials} == {"sft", "lora", "kd", "neo"}
    for about, record in trials.items():
        peak, seconds = cells(text, about)[-3:-1]
        assert float(peak) == pytest.approx(record.peak_memory_bytes / 1e9, abs=0.006) and float(peak) > 0
        assert float(seconds) == pytest.approx(record.seconds - record.details["suite_seconds"], abs=0.6)
    for about in ("the teacher", "the student, untrained"):
        assert cells(text, about)[-3:-1] == ["", ""]
    assert "Left out" not in text
    assert f"{100 * (best.metrics['suite'] or 0):.1f}" in text
    took = read(swept.folder / "trials" / best.id / "suite.json").seconds
    assert took == best.details["suite_seconds"] > 0 and cells(text, f"neo, trial {best.id}")[-1] == f"{took:.0f}"
    assert main([str(swept.folder)]) == 0 and len(asked) == 1


def test_a_limit_asks_anew_and_says_so(swept: SweepConfig, capsys: pytest.CaptureFixture[str]) -> None:
    table = evaluate(swept.folder, limit=5, trials=["0001", "0003"])
    assert [row.name for row in table.rows] == ["teacher", "student", "0001"]
    assert all(len(row.scores.items["next_words"]) == 5 for row in table.rows)
    text = markdown(table)
    assert "the first 5 items of each task" in text and "- Left out: kd, trial 0003: keeps no weights" in text
    assert "left out: kd, trial 0003: keeps no weights" in capsys.readouterr().out


def test_who_is_no_row_is_named_with_the_reason(unasked: SweepConfig, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(unasked.folder), "--suite", str(own)]) == 0
    text = (unasked.folder / "benchmarks" / "own-v3.md").read_text()
    assert text.count("neo, trial 0000") > 1 and "| sft, trial" not in text
    for said in (text.lower(), capsys.readouterr().out):
        assert "left out: sft, trial 0001, its best: keeps no weights, and no scores of this suite" in said
        assert "left out: kd: none of its trials is complete" in said.lower()


def test_another_trial_stands_for_a_method_whose_best_cannot_be_asked(swept: SweepConfig, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(swept.folder, tmp_path / "tiny", ignore=shutil.ignore_patterns("benchmarks")))
    neo = [record for record in load_records(folder) if record.params["method"] == "neo"]
    best, other = sorted(neo, key=lambda record: record.metrics["select_ce"] or 0.0)
    for kept in ("adapter/adapter_config.json", ITEMS):
        (folder / "trials" / best.id / kept).unlink()
    table = evaluate(folder)
    assert other.id in [row.name for row in table.rows]
    (line,) = table.left_out
    assert line.startswith(f"neo, trial {best.id}, its best: ") and line.endswith(f"neo, trial {other.id} stands for neo")


def test_what_the_sweep_was_ranked_by_plays_no_part_in_another_suite(
    tiny_world: World, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_suite(tmp_path / "other", passages(make_tokenizer(), 6))
    task = (tmp_path / "other" / "tasks" / "next_words.yaml").read_text().replace("task: next_words", "task: last_words")
    (tmp_path / "other" / "tasks" / "next_words.yaml").write_text(task)
    (tmp_path / "other" / "suite.yaml").write_text(
        "name: other\nversion: 1\ntasks: tasks\nbenchmarks: {last_words: {metric: acc}}\n"
    )
    ranked = {
        "objective": {"metric": "suite_next_words"},
        "scheduler": {"name": "asha"},
        "evaluation": {"points": 2, "max_tokens": 900, "suite": str(own), "suite_at": "rungs"},
    }
    config = make_sweep(tiny_world, tmp_path, **ranked)
    run_trials(config, {"0000": {"rank": 4}})
    sharded = {"model": str(tiny_world.teacher), "placement": "sharded"}
    make_sweep(tiny_world, tmp_path, **ranked, teacher=sharded, resources={"workers_per_trial": 2})
    assert main([str(config.folder), "--suite", str(tmp_path / "other")]) == 0, capsys.readouterr().err
    assert "neo, trial 0000" in (config.folder / "benchmarks" / "other-v1.md").read_text()


def test_results_in_an_object_store_are_asked_by_their_url(
    swept: SweepConfig, scratch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = put_sweep(swept.folder, f"memory://{tmp_path.name}/results/tiny")
    assert main([store.url, "--limit", "5"]) == 0, capsys.readouterr().err
    rows = {
        name: (store / "benchmarks" / suite / "first-5" / name / ITEMS).read_text()
        for suite in (store / "benchmarks").names()
        if not suite.endswith(".md")
        for name in (store / "benchmarks" / suite / "first-5").names()
    }
    assert {TEACHER, STUDENT, "0002"} <= set(rows)
    assert "lora, trial 0002" in (store / "benchmarks" / "own-v3.md").read_text()
    shutil.rmtree(store.here)
    capsys.readouterr()
    assert main([store.url, "--limit", "5"]) == 0
    assert not re.search("^asking", capsys.readouterr().out, re.MULTILINE), "what was asked is kept there"


def test_differences_are_item_by_item() -> None:
    def row(name: str, items: list[float]) -> Row:
        return Row(name, name, SuiteScores("own v3", None, {"one": items}))

    text = markdown(Table([row("teacher", [1.0] * 10), row("student", [0.0] * 6 + [1.0] * 4)]))
    assert "| teacher | 100.0 ± 0.0 | 100.0 ± 0.0 | +60.0 [+30.0, +90.0] | 0.031 |" in text
    assert "| student | 40.0 ± 16.3 | 40.0 ± 16.3 |  |  |  |  |  |" in text
    assert "- Item by item, teacher is better than student: +60.0 [+30.0, +90.0] points, p 0.031, better on 6 items" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "quickstat"], "did you mean `quickstart`?"),
        (["--trial", "0009"], "has no trial 0009"),
        (["--limit", "0"], "--limit: 0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(swept: SweepConfig, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(swept.folder), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_a_sweep_without_a_suite_asks_for_one(tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_sweep(tiny_world, tmp_path)
    Journal(config.folder).write("start", "0000", params={"rank": 4}, config=loading.plain(config.trial))
    assert main([str(config.folder)]) == 2
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "--suite: the sweep has no suite of its own; give one: neo-math, neo10, quickstart" in capsys.readouterr().err


STUDY = Path(__file__).parent.parent / "docs" / "studies" / "benchmarks"


def rows_of_study() -> list[Row]:
    records = {record.id: record for record in load_records(STUDY / "records.jsonl")}
    names = {TEACHER: "the teacher", STUDENT: "the student, untrained"}
    names |= {id: f"{record.config['method']}, trial {id}" for id, record in records.items()}
    return [Row(name, about, read(STUDY / "scores" / f"{name}.json"), records.get(name)) for name, about in names.items()]


def test_the_page_of_the_study_is_what_its_items_say() -> None:
    page, rows = (STUDY / "README.md").read_text(encoding="utf-8"), {row.name: row.scores for row in rows_of_study()}
    assert markdown(Table(rows_of_study())).partition("\n\n")[2] in page
    neo = next(row.name for row in rows_of_study() if row.about.startswith("neo"))
    for better, worse in ((TEACHER, neo), (neo, STUDENT)):
        found = compare(rows[better].items, rows[worse].items)
        assert found.low > 0 and found.p < 0.05


def test_each_model_of_the_study_was_asked_in_under_two_minutes() -> None:
    seconds = {row.name: row.scores.seconds for row in rows_of_study()}
    assert all(took is not None and took < 120 for took in seconds.values()), seconds

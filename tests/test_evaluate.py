"""The table of benchmarks on trials of the tiny world: rows, what is kept between runs, and paired differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_export import make_sweep, run_trials
from tiny import World, make_suite, make_tokenizer, passages

from neo_ray import harness
from neo_ray.config import SweepConfig
from neo_ray.evaluate import Row, evaluate, main, markdown
from neo_ray.harness import SuiteScores
from neo_ray.records import load_records


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    make_suite(folder, passages(make_tokenizer(), 12))
    return folder


@pytest.fixture(scope="module")
def swept(tiny_world: World, own: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepConfig:
    """Two neo trials and one without a teacher; the first was asked the suite at its end."""
    search = {"method": {"choice": ["neo", "lora"]}, "learning_rate": {"choice": [1e-2, 1e-5]}}
    evaluation = {"points": 1, "max_tokens": 900, "suite": str(own)}
    config = make_sweep(tiny_world, tmp_path_factory.mktemp("swept"), search=search, evaluation=evaluation)
    good, bad = {"method": "neo", "learning_rate": 1e-2}, {"method": "neo", "learning_rate": 1e-5}
    run_trials(config, {"0000": good, "0001": bad, "0002": {**good, "method": "lora"}})
    return config


def test_teacher_student_and_the_best_of_each_method_are_asked_once(
    swept: SweepConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, asked = harness.ask, []

    def counted(*given: Any, **how: Any) -> SuiteScores:
        asked.append(type(given[1]).__name__)
        return original(*given, **how)

    monkeypatch.setattr(harness, "ask", counted)
    assert main([str(swept.folder)]) == 0
    assert len(asked) == 2  # the trials' own scores of this suite are taken
    text = (swept.folder / "benchmarks" / "own-v3.md").read_text()
    assert text in capsys.readouterr().out
    by_rate = {
        record.params["learning_rate"]: record for record in load_records(swept.folder) if record.params["method"] == "neo"
    }
    best = min(by_rate.values(), key=lambda record: record.metrics["select_ce"] or 0.0)
    for name in ("the teacher", "the student, untrained", f"neo, trial {best.id}", "lora, trial 0002"):
        assert f"| {name} |" in text
    assert f"{100 * (best.metrics['suite'] or 0):.1f}" in text
    assert main([str(swept.folder)]) == 0 and len(asked) == 2


def test_a_limit_asks_anew_and_says_so(swept: SweepConfig) -> None:
    rows = evaluate(swept.folder, limit=5, trials=["0001"])
    assert [row.name for row in rows] == ["teacher", "student", "0001"]
    assert all(len(row.scores.items["next_words"]) == 5 for row in rows)
    assert "the first 5 items of each task" in markdown(rows)


def test_differences_are_item_by_item() -> None:
    def row(name: str, items: list[float]) -> Row:
        return Row(name, name, SuiteScores("own v3", None, {"one": items}))

    text = markdown([row("teacher", [1.0] * 10), row("student", [0.0] * 6 + [1.0] * 4)])
    assert "| teacher | 100.0 ± 0.0 | 100.0 ± 0.0 | +60.0 [+30.0, +90.0] | 0.031 |" in text
    assert "| student | 40.0 ± 16.3 | 40.0 ± 16.3 |  |  |" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "quickstat"], "did you mean `quickstart`?"),
        (["--trial", "0009"], "there is no trial 0009"),
        (["--limit", "0"], "--limit: 0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(swept: SweepConfig, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(swept.folder), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_a_sweep_without_a_suite_asks_for_one(tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_sweep(tiny_world, tmp_path)
    assert main([str(config.folder)]) == 2
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "--suite: the sweep has no suite of its own; give one: neo10, quickstart" in capsys.readouterr().err

"""A trial with a suite of benchmarks: what its record says, and that its losses are those of a trial without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from doors import sweep_file
from tiny import World, make_suite, passages

from neo_ray import bench_step, data, harness, models, scores, suites
from neo_ray.config import DataConfig
from neo_ray.loading import load
from neo_ray.parts import ModelSource, Sources, load_parts
from neo_ray.prepare import prepare
from neo_ray.records import Stop, TrialRecord
from neo_ray.scores import SuiteScores
from neo_ray.settings import ConfigError, DeepSpeedConfig, EvaluationConfig, LoraConfig, TrainingConfig, TrialConfig
from neo_ray.train import Outcome, Row, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with bench_step.process_group(CPU):
        yield


@pytest.fixture(scope="module")
def sources(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    tokenizer, cache = models.load_tokenizer(str(tiny_world.student)), tmp_path_factory.mktemp("cache")
    config = DataConfig(source=str(tiny_world.data), max_length=48, select_fraction=0.2, report_fraction=0.2)
    folder = data.prepare(config, str(tiny_world.data), tokenizer, cache)
    own = tmp_path_factory.mktemp("own")
    make_suite(own, passages(tokenizer, 12))
    student, teacher = ModelSource(str(tiny_world.student)), ModelSource(str(tiny_world.teacher))
    suite = suites.make_ready(str(own), cache)
    return Sources(student, str(folder), teacher, len(tokenizer), tokenizer.pad_token_id, suite=str(suite))


def run(
    sources: Sources,
    folder: Path | None = None,
    stage: int = 0,
    dropout: float = 0.1,
    should_stop: Callable[[], Stop] = lambda: Stop.NO,
    **evaluation: Any,
) -> tuple[list[Row], Outcome]:
    training = TrainingConfig(learning_rate=1e-2, steps=4, batch_size=4, micro_batch_size=2, dtype="fp32")
    trial = TrialConfig(
        lora=LoraConfig(rank=4, alpha=8, dropout=dropout),
        training=training,
        deepspeed=DeepSpeedConfig(zero_stage=stage),  # type: ignore[arg-type]
        evaluation=EvaluationConfig(points=2, **evaluation),
    )
    rows: list[Row] = []
    return rows, train(trial, load_parts(sources, trial, CPU), rows.append, should_stop, folder)


def losses(rows: list[Row], outcome: Outcome) -> list[Any]:
    return [[row["train_loss"], row["select_ce"]] for row in rows] + [outcome.metrics["report_ce"]]


@pytest.mark.parametrize("stage", [0, 3])
def test_asking_at_a_rung_changes_no_later_loss_by_a_bit(sources: Sources, stage: int) -> None:
    asked, without = run(sources, stage=stage, suite="own", suite_at="rungs"), run(sources, stage=stage)
    assert losses(*asked) == losses(*without)
    assert ["suite" in row for row in asked[0]] == [True, False]  # the last one is of the end
    assert "suite" in asked[1].metrics and "suite" not in without[1].metrics


def test_the_values_are_those_of_the_saved_adapter_asked_alone(sources: Sources, tmp_path: Path) -> None:
    from peft import PeftModel

    rows, outcome = run(sources, tmp_path, suite="own")
    assert not any("suite" in row for row in rows)
    kept = scores.read(tmp_path / "suite.json")
    model = PeftModel.from_pretrained(models.load_model(sources.student.path, torch.float32), str(tmp_path / "adapter"))
    tokenizer = models.load_tokenizer(sources.student.path)
    assert sources.suite is not None
    alone = harness.ask(harness.open_suite(Path(sources.suite)), model, tokenizer, len(tokenizer), CPU, torch.float32)
    assert kept == alone
    assert outcome.metrics["suite"] == outcome.metrics["suite_next_words"] == alone.average == np.mean(alone.items["next_words"])
    assert outcome.details["suite"] == "own v3"
    assert outcome.details["suite_standard_errors"] == {"average": alone.error, "next_words": alone.error}


def test_the_untrained_student_is_asked_once_a_sweep(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, asked = harness.ask, []

    def counted(*given: Any, **how: Any) -> SuiteScores:
        asked.append(original(*given, **how))
        return asked[-1]

    monkeypatch.setattr(harness, "ask", counted)
    for trial in ("0000", "0001"):  # each on a worker of its own
        _, outcome = run(sources, tmp_path / "trials" / trial, suite="own")
        assert outcome.details["baseline"]["suite"] == asked[0].average
        assert outcome.details["suite_seconds"] > 0
    assert len(asked) == 3
    records = [TrialRecord(id=trial, state="COMPLETE") for trial in ("0000", "0001", "0002")]
    assert scores.of_results(tmp_path, records) == {"0000": asked[1], "0001": asked[2], "student": asked[0]}


def test_what_benchmarks_take_of_memory_is_none_of_the_training_s(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = harness._language_model

    def greedy(*given: Any) -> Any:
        assert torch.ones(250_000_000).sum() > 0  # 1 GB
        return original(*given)

    without = run(sources, tmp_path / "plain", suite="own", suite_at="rungs")[1].totals["peak_memory_bytes"]
    monkeypatch.setattr(harness, "_language_model", greedy)
    found = run(sources, tmp_path / "greedy", suite="own", suite_at="rungs")[1].totals["peak_memory_bytes"]
    assert 0 < found < without + 500_000_000


def test_a_limit_is_stated(sources: Sources, tmp_path: Path) -> None:
    _, outcome = run(sources, tmp_path, suite="own", suite_limit=5)
    assert outcome.details["suite_limit"] == 5
    assert [len(items) for items in scores.read(tmp_path / "suite.json").items.values()] == [5]


def test_without_a_suite_nothing_of_it_is_there(sources: Sources, tmp_path: Path) -> None:
    _, outcome = run(dataclasses.replace(sources, suite=None), tmp_path)
    assert "suite" not in outcome.details and not (tmp_path / "suite.json").exists()


def test_an_objective_that_the_suite_does_not_have_is_refused(tiny_world: World, tmp_path: Path) -> None:
    make_suite(tmp_path / "own", passages(models.load_tokenizer(str(tiny_world.student)), 4))
    fields = {"evaluation": {"suite": str(tmp_path / "own")}, "scheduler": {"name": "none"}}
    config = load(sweep_file(tiny_world, tmp_path, objective={"metric": "suite_next_word"}, **fields))
    with pytest.raises(ConfigError, match=r"own v3 has no suite_next_word \(did you mean `suite_next_words`\?\)"):
        prepare(config, lambda _: None)


def test_a_worker_that_is_lost_while_it_is_asked_loses_no_training(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, asked = harness.ask, []

    def lost(*given: Any, **how: Any) -> Any:
        if asked:
            raise RuntimeError("lost")
        asked.append(original(*given, **how))  # of the untrained student
        return asked[0]

    whole = run(sources, tmp_path / "whole", suite="own")[1]
    with monkeypatch.context() as patch:
        patch.setattr(harness, "ask", lost)
        with pytest.raises(RuntimeError, match="lost"):
            run(sources, tmp_path / "again", suite="own")
    rows, outcome = run(sources, tmp_path / "again", suite="own")
    assert outcome.details["resumed_from_step"] == 4 and len(rows) == 2
    assert outcome.metrics == whole.metrics


BEGINNING, RUNG, END = 1, 2, 3
"""Which asking of a trial it is, where it asks at rungs: of the untrained student, at the first of two rungs, at the end."""


def told(monkeypatch: pytest.MonkeyPatch, asking: int, stop: Stop) -> Callable[[], Stop]:
    """Told to stop from the first batch of an asking on."""
    original, asked = harness.ask, []

    def counted(*given: Any, **how: Any) -> SuiteScores:
        asked.append(None)
        return original(*given, **how)

    monkeypatch.setattr(harness, "ask", counted)
    return lambda: stop if len(asked) >= asking else Stop.NO


@pytest.mark.parametrize(("asking", "step"), [(BEGINNING, 0), (RUNG, 3), (END, 4)])
def test_a_trial_that_is_interrupted_while_it_is_asked_goes_on_from_there(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asking: int, step: int
) -> None:
    whole = run(sources, tmp_path / "trials" / "whole", suite="own", suite_at="rungs")
    with monkeypatch.context() as patch:
        stop, folder = told(patch, asking, Stop.INTERRUPTED), tmp_path / "again" / "trials" / "0000"
        rows, outcome = run(sources, folder, should_stop=stop, suite="own", suite_at="rungs")
    assert outcome.state == "INTERRUPTED" and not outcome.metrics and outcome.totals["steps"] == step
    assert len(rows) == max(0, asking - RUNG) * 2, "a row without its benchmarks is not reported"
    kept = [path.parent.name for path in (tmp_path / "again").rglob("suite.json")]
    assert kept == (["student"] if asking > BEGINNING else []), "and no half of a suite is kept"
    rows, outcome = run(sources, folder, suite="own", suite_at="rungs")
    assert outcome.details["resumed_from_step"] == step and outcome.metrics == whole[1].metrics
    assert losses(rows, outcome) == losses(*whole)
    assert [row.get("suite") for row in rows] == [row.get("suite") for row in whole[0]]
    assert outcome.details["baseline"] == whole[1].details["baseline"]


@pytest.mark.parametrize(("asking", "state"), [(BEGINNING, "PRUNED"), (RUNG, "PRUNED"), (END, "COMPLETE")])
def test_a_trial_that_the_scheduler_gives_up_while_it_is_asked_ends_there_unless_it_is_trained(
    sources: Sources, monkeypatch: pytest.MonkeyPatch, asking: int, state: str
) -> None:
    stop = told(monkeypatch, asking, Stop.PRUNED)
    rows, outcome = run(sources, should_stop=stop, suite="own", suite_at="rungs")
    assert outcome.state == state and ("suite" in outcome.metrics) == (state == "COMPLETE")
    assert len(rows) == (2 if state == "COMPLETE" else 0)


STAGES = (0, 3)


@pytest.fixture(scope="module")
def of_two_workers(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of results folders, one a ZeRO stage. Without dropout, which each worker draws anew."""
    root = tmp_path_factory.mktemp("two")
    mp.spawn(_worker, args=(root, sources), nprocs=2)
    return root


def _worker(rank: int, root: Path, sources: Sources) -> None:
    torch.set_num_threads(1)
    with bench_step.process_group(CPU, rank, 2, root / "meeting"):
        for stage in STAGES:
            run(sources, root / str(stage) / "trials" / "0000", stage, dropout=0.0, suite="own", suite_at="rungs")


def kept(results: Path) -> dict[str, SuiteScores]:
    """Of the untrained student and of the trial."""
    return {path.parent.name: scores.read(path) for path in results.rglob("suite.json")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_suite_shared_out_over_the_workers_of_a_training_gives_what_one_gives(
    sources: Sources, of_two_workers: Path, tmp_path: Path, stage: int
) -> None:
    run(sources, tmp_path / "trials" / "0000", stage, dropout=0.0, suite="own", suite_at="rungs")
    assert kept(of_two_workers / str(stage)) == kept(tmp_path) and set(kept(tmp_path)) == {"student", "0000"}

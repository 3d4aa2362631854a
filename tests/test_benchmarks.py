"""A trial with a suite of benchmarks: what its record says, and that its losses are those of a trial without."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doors import sweep_file
from tiny import World, make_suite, passages

from neo_ray import bench_step, benchmarks, data, harness, models, suites
from neo_ray.config import DataConfig
from neo_ray.loading import load
from neo_ray.parts import ModelSource, Sources, load_parts
from neo_ray.prepare import prepare
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


def run(sources: Sources, folder: Path | None = None, stage: int = 0, **evaluation: Any) -> tuple[list[Row], Outcome]:
    training = TrainingConfig(learning_rate=1e-2, steps=4, batch_size=4, micro_batch_size=2, dtype="fp32")
    trial = TrialConfig(
        lora=LoraConfig(rank=4, alpha=8, dropout=0.1),
        training=training,
        deepspeed=DeepSpeedConfig(zero_stage=stage),  # type: ignore[arg-type]
        evaluation=EvaluationConfig(points=2, **evaluation),
    )
    rows: list[Row] = []
    return rows, train(trial, load_parts(sources, trial, CPU), rows.append, folder=folder)


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
    kept = benchmarks.read(tmp_path / "suite.json")
    model = PeftModel.from_pretrained(models.load_model(sources.student.path, torch.float32), str(tmp_path / "adapter"))
    tokenizer = models.load_tokenizer(sources.student.path)
    assert sources.suite is not None
    alone = harness.ask(harness.open_suite(Path(sources.suite)), model, tokenizer, len(tokenizer), CPU, torch.float32)
    assert kept == alone
    assert outcome.metrics["suite"] == outcome.metrics["suite_next_words"] == alone.average == np.mean(alone.items["next_words"])
    assert outcome.details["suite"] == "own v3"
    assert outcome.details["suite_standard_errors"] == {"average": alone.error, "next_words": alone.error}


def test_a_limit_is_stated(sources: Sources, tmp_path: Path) -> None:
    _, outcome = run(sources, tmp_path, suite="own", suite_limit=5)
    assert outcome.details["suite_limit"] == 5
    assert [len(items) for items in benchmarks.read(tmp_path / "suite.json").items.values()] == [5]


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
    def lost(*given: Any, **how: Any) -> Any:
        raise RuntimeError("lost")

    whole = run(sources, tmp_path / "whole", suite="own")[1]
    with monkeypatch.context() as patch:
        patch.setattr(harness, "ask", lost)
        with pytest.raises(RuntimeError, match="lost"):
            run(sources, tmp_path / "again", suite="own")
    rows, outcome = run(sources, tmp_path / "again", suite="own")
    assert outcome.details["resumed_from_step"] == 4 and len(rows) == 2
    assert outcome.metrics == whole.metrics

"""The training loop with a real DeepSpeed engine on the tiny world; fp32 on a CPU, so that equal means equal to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from tiny import World

from neo_ray import adapters, bench_step, data, models
from neo_ray.config import DataConfig
from neo_ray.parts import ModelSource, Parts, Sources, load_parts
from neo_ray.records import Stop
from neo_ray.settings import DeepSpeedConfig, DistillConfig, LoraConfig, TrainingConfig, TrialConfig
from neo_ray.train import Outcome, Row, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sources(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    tokenizer = models.load_tokenizer(str(tiny_world.student))
    config = DataConfig(source=str(tiny_world.data), max_length=48, select_fraction=0.2, report_fraction=0.2)
    folder = data.prepare(config, str(tiny_world.data), tokenizer, tmp_path_factory.mktemp("cache"))
    student, teacher = ModelSource(str(tiny_world.student)), ModelSource(str(tiny_world.teacher))
    return Sources(student, str(folder), teacher, len(tokenizer), tokenizer.pad_token_id)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with bench_step.process_group(CPU):
        yield


def a_trial(stage: int = 0, steps: int = 6, method: str = "neo", **changes: Any) -> TrialConfig:
    training = TrainingConfig(learning_rate=1e-2, steps=steps, batch_size=4, micro_batch_size=2, dtype="fp32")
    fields: dict[str, Any] = {"method": method, "lora": LoraConfig(rank=4, alpha=8, dropout=0.1), "training": training}
    return TrialConfig(**{**fields, "deepspeed": DeepSpeedConfig(zero_stage=stage), **changes})  # type: ignore[arg-type]


def run(sources: Sources, trial: TrialConfig, parts: Parts | None = None, **kwargs: Any) -> tuple[list[Row], Outcome]:
    rows: list[Row] = []
    return rows, train(trial, parts or load_parts(sources, trial, CPU), rows.append, **kwargs)


def curve(rows: list[Row]) -> list[tuple[float, float, float]]:
    return [(row["train_loss"], row["select_ce"], row["select_kl"]) for row in rows]


class Interrupted(Exception):
    pass


def interrupted_and_resumed(sources: Sources, trial: TrialConfig, folder: Path) -> tuple[list[Row], Outcome]:
    """A trial that ends without a word at its second evaluation, and goes on from the checkpoint it left."""

    def interrupt(row: Row) -> None:
        if row["rung"] == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(trial, load_parts(sources, trial, CPU), interrupt, folder=folder)
    rows, outcome = run(sources, trial, folder=folder)
    assert outcome.details["resumed_from_step"] > 0
    return rows, outcome


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resumed_trial_equals_the_uninterrupted_one_to_the_bit(sources: Sources, tmp_path: Path, stage: int) -> None:
    trial = a_trial(stage)
    whole, outcome = run(sources, trial)
    assert outcome.state == "COMPLETE" and len(whole) == 4
    resumed, again = interrupted_and_resumed(sources, trial, tmp_path)
    assert curve(resumed) == curve(whole)
    assert again.metrics == outcome.metrics


def test_every_zero_stage_gives_the_same_curve(sources: Sources) -> None:
    expected = curve(run(sources, a_trial(0))[0])
    for stage in (1, 2, 3):
        for ours, theirs in zip(curve(run(sources, a_trial(stage))[0]), expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


def test_zero_3_leaves_the_worker_as_it_was(sources: Sources) -> None:
    linear = torch.nn.functional.linear
    run(sources, a_trial(3, steps=1))
    assert torch.nn.functional.linear is linear


def test_a_warm_worker_gives_the_cold_one_s_curve_to_the_bit(sources: Sources) -> None:
    trial = a_trial()
    cold, _ = run(sources, trial)
    parts = load_parts(sources, trial, CPU)
    before = {name: value.clone() for name, value in parts.student.state_dict().items()}
    run(sources, a_trial(lora=LoraConfig(rank=8, alpha=64, variant="rslora")), parts)
    run(sources, a_trial(steps=2, lora=LoraConfig(rank=2, alpha=2, variant="dora")), parts)
    warm, _ = run(sources, trial, parts)
    assert curve(warm) == curve(cold)
    assert all(torch.equal(value, before[name]) for name, value in parts.student.state_dict().items())


def test_kd_loss_is_zero_when_the_student_is_the_teacher(sources: Sources, tiny_world: World) -> None:
    import dataclasses

    same = dataclasses.replace(sources, student=ModelSource(str(tiny_world.teacher)))
    rows, _ = run(same, a_trial(steps=1, distill=DistillConfig(kd_ratio=1.0), lora=LoraConfig(rank=2, alpha=2)))
    assert rows[0]["train_kd"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("method", ["sft", "lora", "kd", "neo"])
def test_every_method_trains(sources: Sources, method: str) -> None:
    rows, outcome = run(sources, a_trial(method=method))
    assert outcome.state == "COMPLETE"
    assert rows[-1]["select_ce"] < outcome.details["baseline"]["select_ce"]
    assert rows[-1]["train_kd"] > 0 if method in ("kd", "neo") else rows[-1]["train_kd"] is None


def test_a_stop_is_seen_between_steps(sources: Sources) -> None:
    _, outcome = run(sources, a_trial(steps=12), should_stop=lambda: Stop.PRUNED)
    assert outcome.state == "PRUNED" and outcome.totals["steps"] == 1
    rows, outcome = run(sources, a_trial(steps=4), should_stop=lambda: Stop.PRUNED)
    assert outcome.totals["steps"] == 1 and not rows, "a trial that was given up is not evaluated once more"


def test_an_interrupted_trial_goes_on_from_the_step_it_was_in(sources: Sources, tmp_path: Path) -> None:
    trial, asked = a_trial(steps=12), iter([*[Stop.NO] * 4, Stop.INTERRUPTED])
    whole, _ = run(sources, trial)
    rows, outcome = run(sources, trial, folder=tmp_path, should_stop=lambda: next(asked))
    assert outcome.state == "INTERRUPTED" and len(rows) == 1, "stopped between two evaluations"
    rows, outcome = run(sources, trial, folder=tmp_path)
    assert outcome.details["resumed_from_step"] == 5
    assert curve(rows) == curve(whole)


def test_divergence_is_an_outcome(sources: Sources) -> None:
    parts = load_parts(sources, a_trial(), CPU)
    with torch.no_grad():
        next(parts.student.parameters()).fill_(float("nan"))
    _, outcome = run(sources, a_trial(), parts)
    assert (outcome.state, outcome.cause) == ("FAILED", "diverged") and outcome.error


def test_the_adapter_loads_in_plain_peft(sources: Sources, tmp_path: Path) -> None:
    import peft

    trial = a_trial()
    _, outcome = run(sources, trial, folder=tmp_path)
    base = models.load_model(sources.student.path, torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    merged = loaded.merge_and_unload()
    parts = load_parts(sources, trial, CPU)
    from neo_ray.heldout import evaluate, whole_model

    scores = evaluate(whole_model(merged), parts, "report", trial.evaluation)
    assert scores.ce == pytest.approx(outcome.metrics["report_ce"], abs=1e-4)


def test_effective_scaling() -> None:
    assert adapters.scaling(LoraConfig(rank=16, alpha=32)) == 2
    assert adapters.scaling(LoraConfig(rank=16, alpha=32, variant="rslora")) == 8


def _worker(rank: int, world_size: int, meeting: str, sources: Sources, trial: TrialConfig, results: Any) -> None:
    torch.set_num_threads(1)
    with bench_step.process_group(CPU, rank, world_size, Path(meeting)):
        rows: list[Row] = []
        train(trial, load_parts(sources, trial, CPU), rows.append)
        if rank == 0:
            results.put(curve(rows))


@pytest.mark.parametrize("stage", [0, 2])
def test_two_workers_equal_one_worker_with_accumulation(sources: Sources, stage: int, tmp_path: Path) -> None:
    trial = a_trial(stage, lora=LoraConfig(rank=4, alpha=8))
    alone = curve(run(sources, trial)[0])
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_worker, args=(2, str(tmp_path / "meeting"), sources, trial, results), nprocs=2)
    for ours, theirs in zip(results.get(), alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)

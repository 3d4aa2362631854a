"""Is a sweep priced before any trial ran? Reference: FLOP a token as docs/scale.md has them, counted from published shapes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from test_estimate import TEXT_BYTES, a_sweep, keep

from neo_ray import inventory
from neo_ray.config import SweepConfig
from neo_ray.memory import adapter_parameters
from neo_ray.plan import Plan, make_plan
from neo_ray.plan_text import flop_text, render
from neo_ray.price import Price, forward_flop, training_flop
from neo_ray.records import TrialRecord, write_records
from neo_ray.settings import TrialConfig
from neo_ray.shapes import KNOWN_SHAPES

CONTEXT = 1024
TRIAL = TrialConfig.model_validate({"lora": {"rank": 16}})
H100 = {"gpus_per_worker": 1, "accelerator_type": "H100", "address": "auto"}
TOKENS = 10_000


def config_of(folder: Path, **sections: Any) -> SweepConfig:
    return a_sweep(folder, **{"training": {"epochs": None, "tokens": TOKENS}, "targets": {"mode": "live"}, **sections})


def plan_of(folder: Path, **sections: Any) -> Plan:
    return make_plan(config_of(folder, **sections))


def price_of(folder: Path, **sections: Any) -> Price:
    found = plan_of(folder, **sections).price
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("teacher", "student", "gflop"), [("llama-3.1-8b", "llama-3.2-1b", (15.3, 5.2)), ("llama-3.1-70b", "llama-3.1-8b", (141, 31))]
)
def test_flop_a_token_are_those_of_the_cost_model(teacher: str, student: str, gflop: tuple[float, float]) -> None:
    counted = forward_flop(KNOWN_SHAPES[teacher], CONTEXT), training_flop(KNOWN_SHAPES[student], TRIAL, CONTEXT)
    assert counted == (pytest.approx(1e9 * gflop[0], rel=0.005), pytest.approx(1e9 * gflop[1], rel=0.005))


def test_all_parameters_take_three_forward_passes_and_checkpoints_the_layers_once_more() -> None:
    shape = KNOWN_SHAPES["llama-3.2-1b"]
    forward, head = forward_flop(shape, CONTEXT), 2 * shape.vocab_size * shape.hidden_size
    assert training_flop(shape, TRIAL.model_copy(update={"method": "kd"}), CONTEXT) == 3 * forward
    saving = TRIAL.model_copy(update={"training": TRIAL.training.model_copy(update={"gradient_checkpointing": True})})
    assert training_flop(shape, saving, CONTEXT) - training_flop(shape, TRIAL, CONTEXT) == forward - head
    assert forward_flop(shape, 2 * CONTEXT) - forward == 2 * shape.num_layers * shape.hidden_size * CONTEXT


def test_under_an_adapter_weights_are_passed_twice_and_attention_three_times() -> None:
    """Frozen weights need no gradient; of queries with keys, and of their scores with values, both sides do."""
    shape = KNOWN_SHAPES["llama-3.2-1b"]
    growth = forward_flop(shape, 2 * CONTEXT) - forward_flop(shape, CONTEXT)  # attention alone grows with the context
    assert training_flop(shape, TRIAL, 2 * CONTEXT) - training_flop(shape, TRIAL, CONTEXT) == 3 * growth
    weights = forward_flop(shape, 0)
    assert training_flop(shape, TRIAL, 0) == 2 * weights + 6 * adapter_parameters(shape, TRIAL.lora)


def test_the_trial_that_computes_the_most_is_priced_and_not_the_one_with_the_most_memory(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, search={"gradient_checkpointing": {"grid": [False, True]}})
    assert plan.price is not None and plan.student is not None and not plan.largest.training.gradient_checkpointing
    training = plan.largest.training.model_copy(update={"gradient_checkpointing": True})
    saving = plan.largest.model_copy(update={"training": training})
    assert plan.price.student == TOKENS * training_flop(plan.student, saving, 128)


def test_a_store_that_is_whole_is_not_paid_and_one_that_is_not_is_in_the_total(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"targets": {"mode": "projection"}, "resources": {"tflops": 1.0}}
    plan, config = plan_of(tmp_path, **sections), config_of(tmp_path, **sections)
    assert plan.price is not None and plan.price.store > 0 and plan.seconds_of_all is not None
    assert plan.seconds_of_all == pytest.approx((plan.num_trials * plan.price.trial + plan.price.store) / 1e12)
    keep(config, "aaaa", 50.0, 4_000_000)
    folder = inventory.folder_of(config.cache) / "aaaa"
    inventory.describe(folder, {}, {"train-00000": 1})
    assert price_of(tmp_path, **sections).store > 0, "a shard lacks its record"
    assert "for the store, once, unless it is there" in render(plan_of(tmp_path, **sections))
    (folder / "train-00000.json").write_text("{}")
    filled = plan_of(tmp_path, **sections)
    assert filled.price is not None and filled.price.store == 0 and "for the store" not in render(filled)
    assert filled.seconds_of_all == pytest.approx(filled.num_trials * filled.price.trial / 1e12)


def test_the_teacher_is_paid_in_every_trial_or_once_for_all(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert plan.price is not None and plan.teacher is not None and plan.student is not None
    forward = forward_flop(plan.teacher, 128)
    assert plan.price.teacher == TOKENS * forward and plan.price.store == 0
    stored = price_of(tmp_path, targets={"mode": "projection"})
    head = 2 * plan.student.vocab_size * plan.student.hidden_size
    assert stored.teacher == 0 and stored.store == 1_000_000 * (forward + head)
    hidden = price_of(tmp_path, targets={"mode": "hidden"})
    assert hidden.teacher == TOKENS * head and hidden.store == 1_000_000 * forward, "its width is the student's here"
    assert price_of(tmp_path, method="lora").teacher == 0
    assert plan.price.student == stored.student == TOKENS * training_flop(plan.student, plan.largest, 128)


def test_evaluations_are_paid_too(tmp_path: Path) -> None:
    plan, points = plan_of(tmp_path, evaluation={"points": 4, "max_tokens": 150_000}), 4
    assert plan.price is not None and plan.student is not None
    of_all = TEXT_BYTES // 4
    select, report = min(150_000, of_all // 5), min(150_000, of_all // 10)
    assert plan.teacher is not None
    student, alive = forward_flop(plan.student, 128), forward_flop(plan.teacher, 128)
    head = 2 * plan.teacher.vocab_size * plan.teacher.hidden_size  # over states that are kept, at each evaluation
    assert plan.price.evaluation == pytest.approx((points * select + report) * (student + head))
    assert plan.price.slot == pytest.approx(select * (student + head) + (select + report) * alive)
    assert "once a slot (untrained student, teacher's held-out text)" in render(plan)
    stored = price_of(tmp_path, targets={"mode": "projection"}, evaluation={"points": 4, "max_tokens": 150_000})
    assert stored.evaluation == pytest.approx((points * select + report) * student)
    assert stored.slot == pytest.approx(select * student), "the teacher's part is the store's"
    assert plan.price.trial == plan.price.student + plan.price.teacher + plan.price.evaluation
    unknown = plan_of(tmp_path, data={"source": "some/data"})
    assert unknown.price is not None and unknown.price.evaluation is None
    assert "evaluation not known before the data is prepared" in render(unknown)


@pytest.mark.parametrize(
    ("sections", "tflops", "source"),
    [
        ({"resources": H100}, 0.4 * 989, "at 40% (an assumption) of the 989 TFLOP/s of H100"),
        ({"resources": {**H100, "tflops": 500}}, 500, "at 500 TFLOP/s (resources.tflops)"),
        ({"resources": {"tflops": 0.2}}, 0.2, "at 0.2 TFLOP/s (resources.tflops)"),
        ({}, None, ""),
        ({"resources": {**H100, "accelerator_type": "of-tomorrow"}}, None, ""),
        ({"resources": {**H100, "gpus_per_worker": 0}}, None, ""),
        ({"resources": H100, "training": {"epochs": None, "tokens": TOKENS, "dtype": "fp32"}}, None, ""),
        ({"resources": H100, "search": {"dtype": {"grid": ["bf16", "fp32"]}}}, None, ""),
    ],
)
def test_a_rate_is_stated_with_its_source_or_not_at_all(
    tmp_path: Path, sections: dict[str, Any], tflops: float | None, source: str
) -> None:
    found = price_of(tmp_path, **sections).rate
    assert (found and (found.flop_per_second, found.source)) == (tflops and (pytest.approx(tflops * 1e12), source))


def test_the_plan_says_the_time_by_arithmetic_and_then_as_the_first_trials_took(tmp_path: Path) -> None:
    config = config_of(tmp_path, resources={"tflops": 1.0}, sampler={"num_trials": 10}, search={"rank": {"choice": [4, 8]}})
    plan = make_plan(config)
    assert plan.price is not None
    hour = dataclasses.replace(plan.price, student=3.0e15, teacher=0.5e15, evaluation=0.1e15, store=7.2e15, slot=2e13)
    text = render(dataclasses.replace(plan, price=hour))
    most = "the trial that computes most: about 3.6 PFLOP"
    assert f"{most}, of which student 3 PFLOP, teacher (alive) 500 TFLOP, evaluation 100 TFLOP" in text
    assert "beside the trials: 20 TFLOP once a slot (untrained student, teacher's held-out text); 7.2 PFLOP for the store" in text
    assert "about 1.0 h of one device a trial, and 2.0 h for the store, at 1 TFLOP/s (resources.tflops)" in text
    assert "at most 100,000 in all trials; about 12.0 h of one device with the store, by arithmetic" in text
    took = TrialRecord(id="0000", state="COMPLETE", accelerator_seconds=720.0, metrics={"select_ce": 4.0})
    write_records(config.folder, [took])
    text = render(dataclasses.replace(make_plan(config), price=hour))
    assert most in text and "by arithmetic" not in text and "resources.tflops" not in text
    assert "at most 100,000 in all trials; about 2.0 h of one device, as the 1 trials so far took" in text


def test_without_a_rate_the_first_trials_tell(tmp_path: Path) -> None:
    text = render(plan_of(tmp_path))
    assert "how long that takes is measured on the first trials; resources.tflops says it before" in text
    assert "their time is known once the first have finished" in text and "of one device" not in text


def test_large_numbers_have_names() -> None:
    assert [flop_text(x) for x in (5.2e18, 3e15, 1.234e12, 2e9)] == ["5.2 EFLOP", "3 PFLOP", "1.23 TFLOP", "2 GFLOP"]

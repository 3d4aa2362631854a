"""Is a model asked for in the bits that the file says? What computes with them needs a GPU: tests/test_gpu.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import test_train
import torch
from test_space import sweep
from test_train import CPU, a_trial
from tiny import World

from neo_ray import merging, models, parts
from neo_ray.export import QUANTISED_TOLERANCE, tolerance_of
from neo_ray.memory import memory_per_worker
from neo_ray.parts import Sources, load_parts
from neo_ray.records import TrialRecord
from neo_ray.shapes import shape_from_name

sources = test_train.sources


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What transformers is asked for; it loads the plain model all the same."""
    settings: list[Any] = []
    load = models.AutoModelForCausalLM.from_pretrained

    def loading(*arguments: Any, quantization_config: Any, **named: Any) -> Any:
        settings.append(quantization_config)
        return load(*arguments, **named)

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", loading)
    return settings


def test_4_bits_are_nf4_with_quantised_scales_in_the_compute_dtype(tiny_world: World, asked: list[Any]) -> None:
    models.load_model(str(tiny_world.student), torch.bfloat16, quantization="4bit")
    (config,) = asked
    assert config.load_in_4bit and not config.load_in_8bit
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


def in_4_bits(sources: Sources) -> Sources:
    return dataclasses.replace(sources, student=dataclasses.replace(sources.student, quantization="4bit"))


def test_student_and_teacher_have_their_own(sources: Sources, asked: list[Any]) -> None:
    load_parts(sources, a_trial(), CPU)
    assert sources.teacher is not None
    teacher = dataclasses.replace(sources.teacher, quantization="8bit")
    load_parts(dataclasses.replace(in_4_bits(sources), teacher=teacher), a_trial(), CPU)
    assert asked[:2] == [None, None] and asked[2].load_in_4bit and asked[3].load_in_8bit


def test_a_merged_model_is_scored_plain_and_may_differ_by_more(
    sources: Sources, tiny_world: World, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sources] = []
    monkeypatch.setattr(merging, "load_parts", lambda given, *rest: seen.append(given) or parts.load_parts(given, *rest))
    merging.rescore(tiny_world.student, in_4_bits(sources), a_trial())
    assert asked == [None] and seen[0].student.quantization == "none"
    record = TrialRecord.model_construct(details={"dtype": "float32"})
    assert tolerance_of(record, "fp32", "4bit") == QUANTISED_TOLERANCE > tolerance_of(record, "fp32")


def test_a_plan_counts_the_bits() -> None:
    shape = shape_from_name("llama-3.1-8b")
    assert shape is not None

    def student(quantization: str) -> int:
        config = sweep(
            student={"model": "s", "quantization": quantization}, resources={"gpus_per_worker": 1}, training={"dtype": "bf16"}
        )
        return memory_per_worker(config, config.trial, shape, shape)["frozen student"]

    linear = shape.num_layers * shape.layer_parameters
    assert student("none") - student("8bit") == linear
    assert student("8bit") - student("4bit") == linear - linear * 9 // 16

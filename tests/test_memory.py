"""Is the memory that the plan promises what a step takes? Measured on a CPU, where each term of the estimate dominates once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from measured_step import build, estimate, widths

from neo_ray import adapters
from neo_ray.memory import BF16, FP32, RUNTIME_BYTES, start_bytes, update_bytes
from neo_ray.settings import LoraConfig, TrialConfig
from neo_ray.shapes import shape_from_config

TOLERANCE = 0.25
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
DEEP = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
CASES: dict[str, dict[str, Any]] = {
    "activations": {
        "shape": {**WIDE, "num_hidden_layers": 2},
        "sequences": 16,
        "length": 256,
        "trial": {"training": {"dtype": "fp32"}},
    },
    "vocabulary": {"shape": {"vocab_size": 32_000}, "sequences": 2, "length": 256, "trial": {"training": {"dtype": "fp32"}}},
    "all parameters": {"shape": WIDE, "sequences": 1, "length": 128, "trial": {"method": "sft", "training": {"dtype": "fp32"}}},
    "checkpoints": {
        "shape": DEEP,
        "sequences": 8,
        "length": 256,
        "trial": {"method": "lora", "training": {"dtype": "fp32", "gradient_checkpointing": True}},
    },
    "bf16": {"shape": {**WIDE, "num_hidden_layers": 4}, "sequences": 16, "length": 256, "trial": {"training": {"dtype": "bf16"}}},
    "ZeRO 0, bf16": {
        "shape": WIDE,
        "sequences": 1,
        "length": 128,
        "micro_batches": 2,
        "trial": {"method": "kd", "training": {"dtype": "bf16"}, "deepspeed": {"zero_stage": 0}},
    },
    "dropout": {
        "shape": {**DEEP, "num_hidden_layers": 4},
        "sequences": 8,
        "length": 256,
        "trial": {"training": {"dtype": "fp32"}, "lora": {"dropout": 0.1, "rank": 16}},
    },
    "DoRA": {
        "shape": {**DEEP, "num_hidden_layers": 4},
        "sequences": 8,
        "length": 256,
        "trial": {"training": {"dtype": "fp32"}, "lora": {"variant": "dora", "rank": 16}},
    },
    "mask": {
        "shape": {**DEEP, "num_hidden_layers": 4, "num_key_value_heads": 2},
        "sequences": 2,
        "length": 1024,
        "padded": 1,
        "trial": {"training": {"dtype": "fp32"}},
    },
}
SLOW = set(CASES) - {"vocabulary", "all parameters"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_a_step_takes_what_the_plan_says(name: str) -> None:
    case, here = CASES[name], Path(__file__).parent
    needs = estimate(case)
    runtime = needs.pop("runtime")
    command = [sys.executable, str(here / "measured_step.py"), json.dumps(case)]
    environment = {**os.environ, "PYTHONPATH": str(here.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["step"] > 120e6, "too small to tell"
    assert sum(needs.values()) == pytest.approx(measured["step"], rel=TOLERANCE), (needs, measured)
    assert runtime == RUNTIME_BYTES["cpu"] == pytest.approx(measured["baseline"], rel=TOLERANCE)


def test_an_update_takes_more_than_the_backward_pass_where_there_are_few_tokens() -> None:
    case = CASES["all parameters"]
    needs, many = estimate(case), estimate({**case, "length": 1024})
    beside = ("ZeRO bucket", "activations", "logits and loss", "update beyond backward pass")
    assert sum(needs[name] for name in beside) == 2 * needs["gradients"]
    assert "update beyond backward pass" not in many
    assert update_bytes(100, stage=2, on_gpu=True) == update_bytes(100, stage=0, on_gpu=False) == 100 * FP32


@pytest.mark.parametrize("variant", ["pissa", "olora"])
def test_factors_that_a_branch_starts_from_are_counted(variant: str) -> None:
    case = {"shape": {}, "sequences": 1, "length": 16, "trial": {"training": {"dtype": "fp32"}}}
    base = build(case).student
    lora = LoraConfig(rank=5, variant=variant)  # twice 5 is no other size of the model
    model = adapters.attach(base, TrialConfig(lora=lora))
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(inputs_embeds=torch.randn(1, 16, 32, requires_grad=True), use_cache=False)
    frozen = [buffer for name, buffer in model.named_buffers() if name.endswith(".initial")]
    cached = [factor for pair in vars(base)["factors"].values() for factor in pair]
    operands = [t for t in kept.values() if 2 * lora.rank in t.shape and 16 not in t.shape]  # without the products
    shape = shape_from_config(base.config.to_dict())
    assert shape is not None
    found = sum(t.numel() * FP32 for t in (*frozen, *cached, *operands))
    assert found == start_bytes(shape, lora, FP32, on_gpu=False)
    # the operands in bf16, and nothing cached
    assert start_bytes(shape, lora, BF16, on_gpu=True) == found // 2


@pytest.mark.parametrize("trial", [{"method": "kd"}, {"lora": {"modules_to_save": ["lm_head"]}}], ids=["whole", "copy"])
def test_a_trained_head_costs_its_gradient_and_a_chunk_at_every_stage(trial: dict[str, Any]) -> None:
    case = {"shape": {"vocab_size": 32_000}, "sequences": 4, "length": 512, "trial": {"training": {"dtype": "fp32"}}}
    frozen, *trained = (
        estimate({**case, "trial": {**case["trial"], **trial, "deepspeed": {"zero_stage": stage}}})["logits and loss"]
        for trial, stage in (({}, 0), (trial, 0), (trial, 2), (trial, 3))
    )
    assert set(trained) == {frozen + 2 * FP32 * 32_000 * widths(case)["hidden_size"]}
    assert frozen < FP32 * 32_000 * 4 * 512, "less than one tensor of all positions"


def test_every_layer_keeps_a_mask_where_sequences_are_padded() -> None:
    case = CASES["mask"]
    padded, alone = estimate(case)["activations"], estimate({**case, "sequences": 1})["activations"]
    keys = 2 * (8 - 2) * 32  # keys and values once a query head: 8 instead of 2, of width 32
    assert padded - 2 * alone == 4 * FP32 * 2 * 1024 * (1024 + keys)

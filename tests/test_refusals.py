"""Is what does not go together refused before anything starts, by its path, and nothing that does?"""

from __future__ import annotations

from typing import Any

import pytest
from test_space import sweep

from neo_ray import refusals
from neo_ray.settings import ConfigError
from neo_ray.space import build_space

GPU = {"gpus_per_worker": 1}
NVME = {"zero_stage": 3, "nvme_path": "/mnt"}


def deepspeed(**settings: Any) -> dict[str, Any]:
    return {"deepspeed": settings, "resources": GPU}


def quantised(**sections: Any) -> dict[str, Any]:
    return {"student": {"model": "s", "quantization": "4bit"}, "resources": GPU, **sections}


REFUSED: list[tuple[dict[str, Any], str]] = [
    (quantised(resources={}), "student.quantization: 4bit needs workers with a GPU (resources.gpus_per_worker is 0)"),
    ({"teacher": {"model": "t", "quantization": "8bit"}}, "teacher.quantization: 8bit needs workers with a GPU"),
    (quantised(method="sft"), "student.quantization: 4bit cannot be trained whole, as method sft does"),
    (quantised(search={"method": {"grid": ["neo", "kd"]}}), "student.quantization: 4bit cannot be trained whole, as method kd"),
    (quantised(deepspeed={"zero_stage": 3}), "student.quantization: 4bit cannot be partitioned by deepspeed.zero_stage 3"),
    (quantised(lora={"variant": "pissa"}), "student.quantization: 4bit has no plain weights for lora.variant pissa"),
    (quantised(lora={"variant": "olora"}), "student.quantization: 4bit has no plain weights for lora.variant olora"),
    (quantised(lora={"modules_to_save": ["norm", "q_proj"]}), "student.quantization: 4bit leaves no plain weights of 'q_proj'"),
    (
        {"teacher": {"model": "t", "quantization": "4bit", "placement": "offloaded"}, "resources": GPU},
        "teacher.quantization: 4bit goes with teacher.placement replicated (got offloaded)",
    ),
    ({"training": {"dtype": "fp16"}}, "training.dtype: fp16 needs workers with a GPU (resources.gpus_per_worker is 0)"),
    ({"search": {"dtype": {"grid": ["bf16", "fp16"]}}}, "training.dtype: fp16 needs workers with a GPU"),
    (
        {"training": {"dtype": "fp16"}, **deepspeed(extra={"zero_optimization": {"compute_grad_norm": False}})},
        "deepspeed.extra: training.dtype fp16 finds overflows by the gradient norm",
    ),
    (deepspeed(zero_stage=0, offload_optimizer="cpu"), "deepspeed.offload_optimizer: cpu needs deepspeed.zero_stage 1, 2 or 3"),
    (deepspeed(offload_parameters="cpu"), "deepspeed.offload_parameters: cpu needs deepspeed.zero_stage 3 (got 2)"),
    (deepspeed(nvme_path="/mnt", offload_optimizer="nvme"), "deepspeed.offload_optimizer: nvme needs deepspeed.zero_stage 3"),
    (deepspeed(zero_stage=3, offload_optimizer="nvme"), "deepspeed.offload_optimizer: nvme needs deepspeed.nvme_path"),
    (deepspeed(zero_stage=3, offload_parameters="nvme"), "deepspeed.offload_parameters: nvme needs deepspeed.nvme_path"),
    ({"deepspeed": {**NVME, "offload_optimizer": "nvme"}}, "deepspeed.offload_optimizer: nvme needs workers with a GPU"),
    (deepspeed(nvme_path="/mnt", offload_optimizer="cpu"), "deepspeed.nvme_path: nothing is offloaded there"),
    (
        {"search": {"zero_stage": {"grid": [0, 2]}}, **deepspeed(offload_optimizer="cpu")},
        "deepspeed.offload_optimizer: cpu needs deepspeed.zero_stage 1, 2 or 3 (got 0)",
    ),
    (
        {"teacher": {"model": "t", "placement": "sharded"}},
        "teacher.placement: sharded needs resources.workers_per_trial of at least 2 (got 1)",
    ),
    (
        deepspeed(extra={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
        "deepspeed.extra: `offload_optimizer` must be a mapping, without `device` and `nvme_path`: use `deepspeed.offload",
    ),
    (deepspeed(extra={"zero_force_ds_cpu_optimizer": True}), "deepspeed.extra: `zero_force_ds_cpu_optimizer` is set by neo_ray"),
]
ALLOWED: list[dict[str, Any]] = [
    quantised(lora={"variant": "dora", "modules_to_save": ["lm_head", "input_layernorm"]}),
    {"teacher": {"model": "t", "quantization": "8bit"}, "resources": GPU, "method": "kd"},
    {"teacher": {"model": "t", "placement": "offloaded"}},
    {"teacher": {"model": "t", "placement": "sharded"}, "resources": {"workers_per_trial": 2}},
    {"training": {"dtype": "fp16"}, "resources": GPU},
    {"deepspeed": {"zero_stage": 1, "offload_optimizer": "cpu"}},
    {"deepspeed": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}},
    deepspeed(**NVME, offload_optimizer="nvme", offload_parameters="nvme"),
    deepspeed(extra={"zero_optimization": {"offload_optimizer": {"pin_memory": False}}}, offload_optimizer="cpu"),
    {
        "search": {"zero_stage": {"grid": [0, 3]}, "offload_parameters": {"grid": ["none", "cpu"], "when": {"zero_stage": 3}}},
    },
]


@pytest.mark.parametrize(("sections", "message"), REFUSED, ids=str)
def test_what_does_not_go_together_is_refused_by_its_path(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_space(sweep(**sections))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("sections", ALLOWED, ids=str)
def test_what_goes_together_is_not_refused(sections: dict[str, Any]) -> None:
    build_space(sweep(**sections))


def test_what_is_not_installed_is_said_before_a_sweep_and_hinders_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"bitsandbytes": None}
    monkeypatch.setattr(refusals.importlib.util, "find_spec", found.get)
    for side in ("student", "teacher"):
        config = sweep(**{side: {"model": "m", "quantization": "8bit"}}, resources=GPU)
        with pytest.raises(ConfigError, match=f"^{side}.quantization: 8bit needs bitsandbytes, which is not installed; pip"):
            refusals.check_installed(config)
        build_space(config)
    refusals.check_installed(sweep())

"""Is what does not go together refused before anything starts, by its path, and nothing that does?"""

from __future__ import annotations

from typing import Any

import pytest
from test_space import sweep

from neo_ray.settings import ConfigError
from neo_ray.space import build_space

GPU = {"gpus_per_worker": 1}
NVME = {"zero_stage": 3, "nvme_path": "/mnt"}


def deepspeed(**settings: Any) -> dict[str, Any]:
    return {"deepspeed": settings, "resources": GPU}


REFUSED: list[tuple[dict[str, Any], str]] = [
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

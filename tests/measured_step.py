"""What does a training step take? Run in a process of its own: a case as JSON comes in, bytes go out.

Only the process's peak tells: PyTorch's own count misses what its allocator cannot use again.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tiny import SHAPE

from neo_ray import adapters, devices, train
from neo_ray.batches import plan_steps
from neo_ray.bench_step import process_group
from neo_ray.config import SweepConfig
from neo_ray.data import Split, TokenData
from neo_ray.loading import validate
from neo_ray.memory import memory_per_worker
from neo_ray.parts import Parts, Sources, shape_of
from neo_ray.shapes import shape_from_config

STEPS = 2  # the first makes the optimizer's moments


def widths(case: dict[str, Any]) -> dict[str, Any]:
    return {**SHAPE, "num_attention_heads": 8, "max_position_embeddings": 4096, "tie_word_embeddings": False, **case["shape"]}


def config_of(case: dict[str, Any]) -> SweepConfig:
    batch = {
        "batch_size": case["sequences"] * case.get("micro_batches", 1),
        "micro_batch_size": case["sequences"],
        "steps": STEPS,
    }
    sections = {"teacher": {"model": "teacher"}, "student": {"model": "student"}, **case["trial"]}
    sections["data"] = {"source": "quickstart:owt", "max_length": case["length"]}
    return validate({"name": "measured", **sections, "training": {**batch, **sections["training"]}})


def estimate(case: dict[str, Any]) -> dict[str, int]:
    config, shape = config_of(case), shape_from_config(widths(case))
    assert shape is not None
    return memory_per_worker(config, config.trial, shape, shape)


def build(case: dict[str, Any]) -> Parts:
    """Random models and tokens; every second sequence is shorter where the case says `padded`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    trial, device = config_of(case).trial, torch.device("cpu")
    dtype = devices.resolve_dtype(trial.training.dtype, device)

    def model(wanted: torch.dtype) -> torch.nn.Module:
        network: torch.nn.Module = LlamaForCausalLM(LlamaConfig(use_cache=False, **widths(case)))
        return network.to(wanted).eval().requires_grad_(False)

    count = STEPS * trial.training.batch_size
    lengths = np.array([case["length"] - 8 * (number % 2) * case.get("padded", 0) for number in range(count)])
    vocabulary = widths(case)["vocab_size"]
    draw = np.random.default_rng(0)
    rows = [draw.integers(vocabulary, size=length) for length in lengths]
    stored = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    data = TokenData(Path(), "random", {}, {"train": Split(stored, lengths, lengths - 1, np.zeros_like(lengths))})
    sources = Sources(student="random", data="random", teacher="random", vocabulary=vocabulary)
    student = model(dtype if trial.has_adapter else devices.FP32)
    return Parts(sources, shape_of(trial, device), student, model(dtype), data, device, dtype)


def run(case: dict[str, Any]) -> None:
    trial, parts = config_of(case).trial, build(case)
    split = parts.data.split("train")
    student = train.Student(adapters.attach(parts.student, trial), parts.device, parts.dtype)
    if trial.training.gradient_checkpointing:
        model: Any = student.model
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plan = plan_steps(split.num_tokens, split.num_labels, trial.training, points=1, seed=0)
    engine = train.build_engine(student, adapters.trained_parameters(student.model), trial, world_size=1)
    student.train()
    for step in range(STEPS):
        train.optimizer_step(engine, trial, parts, split, plan, step, 1e-4)
    engine.destroy()


def measure(case: dict[str, Any]) -> dict[str, int]:
    """Resident bytes of the process that has everything loaded and a tiny trial behind it, and the step's peak above them."""
    device = torch.device("cpu")
    torch.set_num_threads(1)
    devices.map_large_blocks(device)
    devices.prepare_deepspeed()
    with process_group(device):
        run({**case, "shape": {}, "length": 16, "sequences": 1})
        gc.collect()
        devices.reset_peak_memory(device)
        baseline = devices.peak_memory_bytes(device)
        run(case)
        return {"baseline": baseline, "step": devices.peak_memory_bytes(device) - baseline}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))

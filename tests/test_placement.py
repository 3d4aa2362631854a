"""Does a teacher that is shared out over two workers, or kept in host memory, give the logits of a whole one, to the bit?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import test_train
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_space import sweep
from test_train import CPU, a_trial, curve
from test_trained_head import counting_fetches
from tiny import VOCABULARY

from neo_ray.memory import memory_per_worker
from neo_ray.models import last_hidden
from neo_ray.parts import Sources, load_parts
from neo_ray.settings import LoraConfig
from neo_ray.shapes import shape_from_name
from neo_ray.train import Row, train

sources = test_train.sources
process_group = test_train.process_group
PLACEMENTS = ("replicated", "sharded", "offloaded")


@torch.no_grad()
def observe(sources: Sources, placement: Any, rank: int) -> dict[str, Any]:
    """Logits and states of the teacher on a batch of this rank's own; of trials on one and the same parts the curves, and how
    often the teacher's head was gathered. The last one's steps have twice as many micro-batches."""
    trials = [a_trial(stage, lora=LoraConfig(rank=4, alpha=8), steps=4) for stage in (2, 3, 2)]
    smaller = trials[2].training.model_copy(update={"micro_batch_size": 1})
    trials[2] = trials[2].model_copy(update={"training": smaller})
    parts = load_parts(dataclasses.replace(sources, teacher_placement=placement), trials[0], CPU)
    assert parts.teacher is not None
    held = sum(getattr(p, "ds_tensor", p).numel() for p in parts.teacher.parameters())
    ids_BL = torch.arange(40).reshape(2, 20).add(100 * rank) % VOCABULARY
    found = {"held": held, "logits": parts.teacher(input_ids=ids_BL, use_cache=False).logits}
    found["states"] = last_hidden(parts.teacher, ids_BL)
    with torch.enable_grad():
        for number, trial in enumerate(trials):
            rows: list[Row] = []
            with counting_fetches(parts.teacher.get_output_embeddings()) as counts:
                train(trial, parts, rows.append)
            found[f"trial {number}"], found[f"gathers {number}"] = curve(rows), counts[1]
    return found


def _worker(rank: int, root: Path, sources: Sources) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=2)
    torch.save({placement: observe(sources, placement, rank) for placement in PLACEMENTS}, root / f"rank-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("placement")
    mp.spawn(_worker, args=(root, sources), nprocs=2)
    return [torch.load(root / f"rank-{rank}", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("placement", ["sharded", "offloaded"])
def test_two_workers_see_the_whole_teacher_to_the_bit(found: list[dict[str, Any]], placement: str) -> None:
    for rank in (0, 1):
        expected, ours = found[rank]["replicated"], found[rank][placement]
        assert ours["held"] < 0.6 * expected["held"], "it is shared out"
        assert torch.equal(ours["logits"], expected["logits"]) and torch.equal(ours["states"], expected["states"])
        assert all(ours[f"trial {number}"] == expected[f"trial {number}"] for number in range(3))
        assert ours["gathers 2"] == ours["gathers 1"] > 0 == expected["gathers 1"], "once a step, not a micro-batch"
    assert len(found[0][placement]["trial 0"]) == 3


def test_one_worker_has_its_teacher_in_host_memory(sources: Sources) -> None:
    whole, ours = observe(sources, "replicated", 0), observe(sources, "offloaded", 0)
    assert torch.equal(ours["logits"], whole["logits"])
    assert ours["trial 0"] == whole["trial 0"] and ours["trial 1"] == whole["trial 1"]


def test_a_plan_counts_what_a_worker_holds_of_the_teacher() -> None:
    shape = shape_from_name("llama-3.1-8b")
    assert shape is not None

    def teacher(placement: str, workers: int = 2, gpus: int = 1, micro: int | str = "auto") -> int:
        resources = {"workers_per_trial": workers, "gpus_per_worker": gpus}
        training = {"dtype": "bf16", "batch_size": 4, "micro_batch_size": micro}
        config = sweep(teacher={"model": "t", "placement": placement}, resources=resources, training=training)
        return memory_per_worker(config, config.trial, shape, shape)["teacher"]

    head = 2 * shape.vocab_size * shape.hidden_size
    assert teacher("replicated") == 2 * shape.num_parameters
    assert teacher("sharded") == shape.num_parameters + head and teacher("offloaded") == head
    assert teacher("offloaded", workers=1, gpus=0) == 2 * shape.num_parameters + head
    layer = 2 * shape.layer_parameters
    assert teacher("sharded", micro=2) == shape.num_parameters + head, "one micro-batch of each worker"
    assert teacher("sharded", micro=1) == shape.num_parameters + head + layer, "the head stays over two"

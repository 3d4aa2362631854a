"""Does a trial train on a GPU in every precision, from a disk, and on quantised models? Run there with `pytest -m gpu`.

Each trial has a process of its own: the other tests keep DeepSpeed on the CPU in theirs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import test_train
import torch
import torch.multiprocessing as mp
from test_train import a_trial, run

from neo_ray import bench_step, devices
from neo_ray.parts import Sources, load_parts
from neo_ray.settings import DeepSpeedConfig, LoraConfig, TrainingConfig, TrialConfig
from neo_ray.train import Outcome, Row

pytestmark = pytest.mark.gpu
sources = test_train.sources


def _alone(rank: int, sources: Sources, trial: TrialConfig, found: Path, folder: Path | None) -> None:
    os.environ["DS_ACCELERATOR"] = "cuda"
    device = devices.local_device()
    with bench_step.process_group(device):
        torch.save(run(sources, trial, load_parts(sources, trial, device), folder=folder), found)


def go(sources: Sources, trial: TrialConfig, folder: Path | None = None) -> tuple[list[Row], Outcome]:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with tempfile.TemporaryDirectory() as place:
        mp.spawn(_alone, args=(sources, trial, Path(place) / "found", folder), nprocs=1)
        rows, outcome = torch.load(Path(place) / "found", weights_only=False)
    assert outcome.state == "COMPLETE", outcome
    assert outcome.totals["peak_memory_bytes"] > 0, "allocated on the device, as PyTorch counts it"
    assert all(math.isfinite(row[name]) for row in rows for name in ("train_loss", "select_ce", "select_kl"))
    assert rows[-1]["select_ce"] < outcome.details["baseline"]["select_ce"]
    return rows, outcome


def in_dtype(dtype: str, stage: int = 2, **deepspeed: Any) -> TrialConfig:
    training = TrainingConfig(learning_rate=1e-2, steps=6, batch_size=4, micro_batch_size=2, dtype=dtype)  # type: ignore[arg-type]
    settings = DeepSpeedConfig(zero_stage=stage, **deepspeed)  # type: ignore[arg-type]
    return a_trial(training=training, lora=LoraConfig(rank=4, alpha=8), deepspeed=settings)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_follows_fp32(sources: Sources, dtype: str, stage: int) -> None:
    expected, _ = go(sources, in_dtype("fp32", stage))
    rows, outcome = go(sources, in_dtype(dtype, stage))
    assert outcome.details["dtype"] == {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    assert rows[-1]["select_ce"] == pytest.approx(expected[-1]["select_ce"], abs=0.1)


@pytest.mark.parametrize("places", [{"offload_optimizer": "cpu"}, {"offload_optimizer": "cpu", "offload_parameters": "cpu"}])
def test_what_lies_in_host_memory_gives_the_same_curve(sources: Sources, places: dict[str, str]) -> None:
    expected, _ = go(sources, in_dtype("fp32", 3))
    rows, _ = go(sources, in_dtype("fp32", 3, **places))
    assert [row["select_ce"] for row in rows] == pytest.approx([row["select_ce"] for row in expected], abs=1e-4)


def test_what_lies_on_a_disk_gives_the_same_curve_and_leaves_nothing(sources: Sources, tmp_path: Path) -> None:
    """DeepSpeed compiles its asynchronous reads for it, which needs libaio. A rank that is wide enough: below 1 MB it stays."""
    wide = LoraConfig(rank=1024, alpha=1024)
    disk = {"offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme_path": str(tmp_path)}
    expected, _ = go(sources, in_dtype("fp32", 3).model_copy(update={"lora": wide}))
    rows, _ = go(sources, in_dtype("fp32", 3, **disk).model_copy(update={"lora": wide}), tmp_path / "trial")
    assert [row["select_ce"] for row in rows] == pytest.approx([row["select_ce"] for row in expected], abs=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["trial"]


@pytest.mark.parametrize("placement", ["replicated", "offloaded"])
def test_a_teacher_in_host_memory_teaches_the_same(sources: Sources, placement: Any) -> None:
    expected, _ = go(sources, in_dtype("fp32"))
    rows, _ = go(dataclasses.replace(sources, teacher_placement=placement), in_dtype("fp32"))
    assert [row["select_kl"] for row in rows] == pytest.approx([row["select_kl"] for row in expected], abs=1e-5)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_an_adapter_trains_on_a_quantised_student_under_a_quantised_teacher(
    sources: Sources, tmp_path: Path, bits: Any, variant: Any
) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is in the extra `quantization`")
    quantised = dataclasses.replace(sources, student_quantization=bits, teacher_quantization=bits)
    trial = in_dtype("bf16").model_copy(update={"lora": LoraConfig(rank=4, alpha=8, variant=variant)})
    go(quantised, trial, tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

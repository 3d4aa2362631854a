"""Are the benchmark's random pairs of the shape they are called by, and refused where they do not fit?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_losses import LiveTensors

from neo_ray import bench, bench_pairs, bench_step, devices
from neo_ray.batches import plan_steps
from neo_ray.settings import ConfigError

CPU = torch.device("cpu")
LLAMA = ["step", "--preset", "llama-8b-1b"]


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_the_llamas_have_the_published_sizes(side: str) -> None:
    """Of the models' cards: 8.03 and 1.24 billion parameters; the small one has tied embeddings."""
    shape = getattr(bench_pairs.LLAMA, side)
    model = bench_pairs.make_model(shape, torch.device("meta"), torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == shape.num_parameters == {"teacher": 8_030_261_248, "student": 1_235_814_400}[side]
    assert model.get_output_embeddings().weight.shape[0] == 128_256
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_model_s_weights_are_drawn_in_its_dtype_and_its_positions_in_fp32() -> None:
    model = bench_pairs.make_model(bench_pairs.TINY.student, CPU, torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 and not parameter.requires_grad for parameter in model.parameters())
    assert model.model.layers[0].mlp.up_proj.weight.float().std() > 0.01
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32 and model.model.rotary_emb.inv_freq[0] == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (LLAMA, "--preset: a teacher of 8.0 B parameters needs a GPU, and there is none"),
        ([*LLAMA, "--tiny"], "--preset: llama-8b-1b has its own random models"),
        ([*LLAMA, "--student", "x"], "--preset: llama-8b-1b has its own random models"),
        (["loss", "--preset", "llama-8b-1b"], "--preset: needs about"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "free_bytes", lambda device: 1_000_000_000)
    assert bench.main([*words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {complaint}") and error.count("\n") == 1


def test_a_gpu_too_small_is_refused_before_any_weight_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, trial = bench_pairs.LLAMA, bench_step.make_trial(1, 20)
    needed = bench_pairs.step_bytes(pair, trial, 2048, size=2, arms=8)
    assert 2 * (pair.teacher.num_parameters + pair.student.num_parameters) < needed < 80e9, "one H100 is enough"
    monkeypatch.setattr(devices, "free_bytes", lambda device: needed - 1)
    monkeypatch.setattr(devices, "resolve_dtype", lambda name, device: torch.bfloat16)
    monkeypatch.setattr(devices, "describe", lambda device: "a small one")
    with pytest.raises(ConfigError, match=f"--preset: needs about {needed / 1e9:.1f} GB, and a small one has"):
        bench_pairs.make_parts(pair, trial, torch.device("cuda"), 2048, 20, arms=8)


@pytest.mark.gpu
def test_a_shallow_llama_steps_on_a_gpu(tmp_path: Path) -> None:
    """Every arm of the preset, at 2 layers each. In a process of its own: the other tests keep DeepSpeed on the CPU in theirs."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    code = (
        "import dataclasses, sys; from neo_ray import bench, bench_pairs as p\n"
        "p.LLAMA = dataclasses.replace(p.LLAMA, teacher=p.LLAMA.teacher.with_layers(2), student=p.LLAMA.student.with_layers(2))\n"
        f"sys.exit(bench.main(['step', '--preset', 'llama-8b-1b', '--repeats', '1', '--out', {str(tmp_path / 'x.json')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"DS_ACCELERATOR": "cuda"}, timeout=600)
    assert done.returncode == 0
    (case,) = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["cases"]
    assert list(case["arms"]) == list(bench_step.installed()) and case["setting"]["dtype"] == "bfloat16"
    for arm in case["arms"].values():
        assert arm["counted_ratio"] is not None and 0 < arm["median_extra_bytes"] < 80e9


def test_free_memory_is_known_here() -> None:
    free = devices.free_bytes(CPU)
    assert free is not None and 1e8 < free < 1e13


@pytest.mark.parametrize("arm", ["reference", "trl"])
def test_the_dense_tensors_of_a_step_by_others_are_counted(arm: str, tmp_path: Path) -> None:
    """fp32 on a CPU, where nothing is made fp32 first: those two tensors come on top, as large as one."""
    trial, length = bench_step.make_trial(4, 3), 65
    trial = trial.model_copy(update={"training": trial.training.model_copy(update={"dtype": "fp32"})})
    parts = bench_pairs.make_parts(bench_pairs.TINY, trial, CPU, length, 12, arms=1)
    split = parts.data.split("train")
    plan = plan_steps(split.num_tokens, split.num_labels, trial.training, points=1, seed=0)
    with bench_step.process_group(CPU):
        running = bench_step.Running(bench_step.ARMS[arm], bench_step.Ready(trial, parts, split, plan, {}), tmp_path)
        running.step(0)
        size = 4 * length * 512 * 4
        with LiveTensors(size - 1) as live:
            running.step(1)
        running.engine.destroy()
    assert round(live.peak / size) + 1 <= bench_pairs.DENSE_TENSORS <= round(live.peak / size) + 3

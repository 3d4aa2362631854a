"""Does a stored teacher teach the quickstart's student as the living one does? Value and gradient, on a batch of 4 × 256 tokens.

Reference: the living teacher's loss in chunks (`chunked_loss`). The models are the quickstart's own, from the package index.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from neo_ray import adapters, bench, bench_step, devices
from neo_ray.data import collate
from neo_ray.parts import Parts, load_parts
from neo_ray.prepare import make_student, prepare
from neo_ray.settings import TrialConfig
from neo_ray.student import Student
from neo_ray.teaching import teach

CPU = torch.device("cpu")
BATCH, LENGTH = 4, 256
NATS, COSINE = 2e-3, 0.9999


def trial_in(dtype: str) -> TrialConfig:
    """All of the loss is the teacher's: the labels' part is the same for every arm."""
    trial = bench_step.make_trial(BATCH, 1)
    training = trial.training.model_copy(update={"dtype": dtype})
    return trial.model_copy(update={"training": training, "distill": trial.distill.model_copy(update={"kd_ratio": 1.0})})


def taught_by(arm: str, parts: Parts, student: Student, trial: TrialConfig, folder: Path) -> tuple[float, torch.Tensor]:
    """KD loss in nats a token, and the gradient on all of the adapter; the student's own pass is the same for every arm."""
    split = bench_step.full_sequences(parts.data.split("train"), LENGTH, BATCH)
    indices = range(BATCH)
    if arm != "live":
        store = bench_step.fill_store(arm, parts, split, folder / arm)  # type: ignore[arg-type]
        parts = dataclasses.replace(parts, teacher=None, targets=store)
    batch = collate(split.examples(indices), parts.sources.pad_id, CPU)
    taught = teach(parts, "train", indices, batch, batch.labels_BL)
    output = student(batch.input_ids_BL, batch.attention_mask_BL)
    loss = student.loss(output, batch.labels_BL, taught, trial, parts.vocabulary)
    trained = list(adapters.trained_parameters(student.model).values())
    gradient = torch.cat([one.flatten() for one in torch.autograd.grad(loss.total / loss.count, trained)])
    return loss.kd.item() / loss.count, gradient


@pytest.mark.slow
def test_a_store_in_fp16_teaches_the_quickstart_s_student_as_the_living_teacher_does(tmp_path: Path) -> None:
    """In fp32. In bf16 the living teacher's own loss and gradient carry rounding of that size."""
    config, trial = bench.pair(None, None, None, LENGTH), trial_in("fp32")
    parts = load_parts(make_student(config, prepare(config, print), print), trial, CPU)
    devices.seed_step(0, 0, 0)
    student = Student(adapters.attach(parts.student, trial), CPU, parts.dtype)
    with torch.no_grad():  # an adapter begins at zero, and half of its gradient with it
        for name, weight in adapters.trained_parameters(student.model).items():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    value, gradient = taught_by("live", parts, student, trial, tmp_path)
    assert value > 0.1 and gradient.norm() > 0
    for arm in ("projection", "hidden"):
        stored, its_gradient = taught_by(arm, parts, student, trial, tmp_path)
        cosine = torch.cosine_similarity(gradient.double(), its_gradient.double(), dim=0).item()
        print(f"{arm}: {value:.6f} nats live, {stored - value:+.2e} stored, 1 − cosine {1 - cosine:.2e}")
        assert abs(stored - value) <= NATS
        assert cosine >= COSINE

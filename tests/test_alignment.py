"""Are hidden states compared as the formula says, with a real DeepSpeed engine (fp32, CPU)?

Reference: float64, one example after another, unpadded, hooks on the layers in place of what transformers returns, sums written
out and divided once by the labelled positions of the whole batch. Shape suffixes: L tokens, N scored positions, H hidden width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_invariance import CPU, examples, gradient_of, make_model, make_split, process_group, scored_positions
from test_losses import LiveTensors
from tiny import VOCABULARY, World, make_world

from neo_ray import adapters, alignment, data, models, train
from neo_ray.batches import plan_steps
from neo_ray.config import DataConfig
from neo_ray.data import TokenData
from neo_ray.loading import validate
from neo_ray.memory import alignment_bytes, projection_parameters, shape_from_config
from neo_ray.parts import Parts, Sources, load_parts
from neo_ray.plan import make_plan
from neo_ray.prepare import prepare
from neo_ray.settings import (
    ConfigError,
    DeepSpeedConfig,
    DistillConfig,
    EvaluationConfig,
    LoraConfig,
    TrainingConfig,
    TrialConfig,
)
from neo_ray.space import build_space

PAIRS = ((0, 1), (1, 3))
"""The second one's states are those after the final norm, of both models."""
WEIGHT, KD_RATIO = 3.0, 0.3


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with process_group(0, 1, tmp_path_factory.mktemp("alone") / "meeting"):
        yield
    torch.nn.functional.linear = train.LINEAR


def a_trial(
    loss: str = "mse", stage: int = 0, micro: int = 8, method: str = "neo", layout: str = "right", **distill: Any
) -> TrialConfig:
    aligned = {"kd_ratio": KD_RATIO, "alignment_weight": WEIGHT, "alignment_loss": loss, "alignment_layers": PAIRS}
    return TrialConfig(
        method=method,  # type: ignore[arg-type]
        lora=LoraConfig(rank=4, alpha=8),
        distill=DistillConfig(**{**aligned, **distill}),
        training=TrainingConfig(
            batch_size=8,
            micro_batch_size=micro,
            epochs=1,
            max_grad_norm=0,
            dtype="fp32",
            packing=layout == "packed",
            padding_side="left" if layout == "left" else "right",
        ),
        deepspeed=DeepSpeedConfig(zero_stage=stage),  # type: ignore[arg-type]
    )


# One step against the reference


def make_student(trial: TrialConfig) -> train.Student:
    """A branch that is random on both sides and projections that are no identity, on models of equal width."""
    torch.manual_seed(0)
    parts = SimpleNamespace(student=make_model("student", "none"), teacher=make_model("teacher", "none"), device=CPU)
    student = train.Student(
        adapters.attach(parts.student, trial),
        CPU,
        torch.float32,
        alignment.make_projections(trial, parts),  # type: ignore[arg-type]
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_B." in name or "projections" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return student.train()


def trained_of(student: train.Student) -> dict[str, Any]:
    return adapters.trained_parameters(student.model) | student.projection_parameters()


def step(trial: TrialConfig) -> tuple[dict[str, torch.Tensor], tuple[float, ...]]:
    """The gradient of a whole optimizer step, and its sums."""
    student, split = make_student(trial), make_split()
    trained = trained_of(student)
    engine = train.build_engine(student, trained, trial, 1)
    sources = Sources(student="tiny", data="made", teacher="tiny", vocabulary=VOCABULARY, pad_id=0)
    tokens = TokenData(Path(), "made", {}, {"train": split})
    parts = Parts(sources, (), student.model, make_model("teacher", "none"), tokens, CPU, torch.float32)
    plan = plan_steps(split.num_tokens, split.num_labels, trial.training, 1, 0)
    with gradient_of(engine, trained) as gradient:
        sums = train.optimizer_step(engine, trial, parts, split, plan, step=0, rate=0.0)
    engine.destroy()
    torch.nn.functional.linear = train.LINEAR
    return gradient, sums


def states_after(model: Any, layers: list[int], ids_L: Any, rows: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the layers gave at these positions (the last one's after the norm), and the logits."""
    stack, seen = models.decoder(model), dict[int, torch.Tensor]()
    places = {layer: stack.norm if layer == len(stack.layers) - 1 else stack.layers[layer] for layer in layers}
    hooks = [
        place.register_forward_hook(
            lambda _, __, out, layer=layer: seen.update({layer: out[0] if isinstance(out, tuple) else out})
        )
        for layer, place in places.items()
    ]
    logits_LV = model(input_ids=torch.tensor(ids_L)[None]).logits[0]
    for hook in hooks:
        hook.remove()
    return [seen[layer].reshape(len(ids_L), -1)[rows] for layer in layers], logits_LV[rows]


@functools.cache
def reference(loss: str, method: str, kd_ratio: float) -> tuple[dict[str, torch.Tensor], tuple[float, ...]]:
    student, teacher = make_student(a_trial(loss, method=method)).double(), make_model("teacher", "none").double()
    assert student.projections is not None
    ce = kd = apart = torch.zeros(())
    count = 0
    for ids_L, labels_L in examples():
        rows = scored_positions(labels_L)
        count += len(rows)
        ours, student_NV = states_after(student.model, [one for one, _ in PAIRS], ids_L, rows)
        theirs, teacher_NV = states_after(teacher, [other for _, other in PAIRS], ids_L, rows)
        q_NV, p_NV = student_NV.softmax(-1), teacher_NV.softmax(-1).detach()
        ce = ce - q_NV[range(len(rows)), [labels_L[n + 1] for n in rows]].log().sum()
        kd = kd + (p_NV * (p_NV / q_NV).log()).sum()
        for layer, ours_NH, theirs_NH in zip(student.projections.maps, ours, theirs, strict=True):
            mapped_NH = torch.einsum("nh,kh->nk", ours_NH, layer.weight)  # type: ignore[arg-type]
            for one_H, other_H in zip(mapped_NH, theirs_NH.detach(), strict=True):
                if loss == "mse":
                    distance = sum((one_H - other_H) ** 2) / len(other_H)
                else:
                    distance = 1 - one_H @ other_H / (one_H @ one_H * (other_H @ other_H)).sqrt()
                apart = apart + distance / len(PAIRS)
    total = (1 - kd_ratio) * ce + kd_ratio * kd + WEIGHT * apart
    trained = trained_of(student)
    gradient = torch.autograd.grad(total / count, list(trained.values()))
    shown = (total.item(), ce.item(), kd.item() if kd_ratio else 0.0, apart.item())
    return dict(zip(trained, gradient, strict=True)), shown


@pytest.mark.parametrize(
    ("loss", "stage", "micro", "layout", "method", "kd_ratio"),
    [
        ("mse", 0, 8, "right", "neo", KD_RATIO),
        ("cosine", 0, 8, "right", "neo", KD_RATIO),
        ("mse", 0, 2, "right", "neo", KD_RATIO),  # a micro-batch without an example, and unequal label counts
        ("cosine", 0, 2, "left", "neo", KD_RATIO),
        ("mse", 0, 4, "packed", "neo", KD_RATIO),
        ("mse", 2, 2, "left", "neo", KD_RATIO),
        ("mse", 3, 2, "packed", "neo", KD_RATIO),
        ("cosine", 3, 4, "right", "kd", KD_RATIO),
        ("mse", 1, 4, "packed", "kd", KD_RATIO),
        ("mse", 0, 4, "right", "neo", 0.0),  # the teacher's logits have no part, its states do
    ],
)
def test_a_step_has_the_gradient_of_the_dense_reference(
    loss: str, stage: int, micro: int, layout: str, method: str, kd_ratio: float
) -> None:
    gradient, sums = step(a_trial(loss, stage, micro, method, layout, kd_ratio=kd_ratio))
    expected, expected_sums = reference(loss, method, kd_ratio)
    assert sums == pytest.approx(expected_sums, rel=1e-5)
    assert gradient.keys() == expected.keys()
    for part in ("projections", ""):
        names = [name for name in expected if part in name]
        ours, theirs = (torch.cat([side[name].flatten() for name in names]) for side in (gradient, expected))
        assert (ours - theirs).norm() / theirs.norm() <= 1e-4, part or "all"


def test_gradient_checkpointing_changes_no_gradient() -> None:
    trial = a_trial(micro=4)
    student = make_student(trial)
    student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    gradients = []
    for model in (student, make_student(trial)):
        ids_BL = torch.arange(2, 26).reshape(2, 12)
        _, projected = model(ids_BL, None, None, ids_BL)
        sum(state.square().sum() for state in projected).backward()
        gradients.append({name: parameter.grad for name, parameter in trained_of(model).items()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, found in gradients[0].items():
        if gradients[1][name] is None:
            assert found is None, name
        else:
            assert torch.allclose(found, gradients[1][name], rtol=1e-5, atol=1e-6), name

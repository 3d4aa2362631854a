"""How would others take the step? LLM-Neo's own trainer, TRL's loss and Liger's, on this project's models, adapter and engine.

Shapes: B sequences, L tokens, N positions, V vocabulary, H the student's hidden width, G the teacher's.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neo_ray import devices, models
from neo_ray.batches import StepPlan
from neo_ray.data import Batch, Split, collate
from neo_ray.losses import IGNORED
from neo_ray.parts import Parts
from neo_ray.settings import TrialConfig
from neo_ray.student import Student

PACKAGES = {"trl": "trl", "liger": "liger_kernel"}
"""Arms of other libraries: they are left out, and the setting says so, where the package is not installed."""

Terms = tuple[Tensor, Tensor, Tensor]
"""Loss, CE and KD: means in nats over the scored positions, of which the first takes a backward pass."""
Loss = Callable[..., Terms]


def not_installed(arms: Collection[str]) -> list[str]:
    """Of these arms those whose package is missing."""
    return [name for name in arms if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None]


def reference_loss(student_BLV: Tensor, teacher_BLV: Tensor, next_BL: Tensor, kd_ratio: float) -> Terms:
    """LLM-Neo's: log-softmax and softmax over the whole vocabulary at every position, padding included; the mask comes last."""
    ce = F.cross_entropy(student_BLV.flatten(0, 1), next_BL.flatten(), ignore_index=IGNORED)
    kl_BLV = F.kl_div(F.log_softmax(student_BLV, -1), F.softmax(teacher_BLV, -1), reduction="none")
    kd = kl_BLV.sum(-1)[next_BL != IGNORED].mean()
    return (1 - kd_ratio) * ce + kd_ratio * kd, ce, kd


def trl_loss(student_BLV: Tensor, teacher_BLV: Tensor, next_BL: Tensor, kd_ratio: float) -> Terms:
    """Cross-entropy, and the divergence of TRL's GKD trainer: at beta = 0 it is forward KL."""
    trainer = importlib.import_module("trl.experimental.gkd").GKDTrainer
    ce = F.cross_entropy(student_BLV.flatten(0, 1), next_BL.flatten(), ignore_index=IGNORED)
    kd = trainer.generalized_jsd_loss(student_BLV, teacher_BLV, next_BL, beta=0)
    return (1 - kd_ratio) * ce + kd_ratio * kd, ce, kd


def liger_loss(
    student_NH: Tensor, student_head_VH: Tensor, teacher_NG: Tensor, teacher_head_VG: Tensor, next_N: Tensor, kd_ratio: float
) -> Terms:
    """Liger's own chunked loss at beta = 0, forward KL. It takes a frozen head's gradient too; compiled on a GPU alone."""
    liger = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    on_gpu = student_NH.device.type == "cuda"
    loss = liger(1 - kd_ratio, kd_ratio, 0.0, IGNORED, compiled=on_gpu, return_soft_hard_loss=True)
    total, soft, hard = loss(student_NH, student_head_VH, teacher_NG, teacher_head_VG, next_N)
    return total, hard, soft


class WholeLogits(Student):
    """Ends its forward pass with the logits of all positions."""

    def forward(self, *given: Any) -> Tensor:  # type: ignore[override]
        with devices.autocast(self.device, self.dtype):
            return self.model(**models.inputs(self.model, *given)).logits


def dense_terms(engine: Any, parts: Parts, batch: Batch, next_BL: Tensor, kd_ratio: float, loss: Loss) -> Terms:
    """Two whole forward passes, of `WholeLogits` and of the living teacher; a loss of all their logits in fp32."""
    assert parts.teacher is not None
    student_BLV = engine(batch.input_ids_BL, batch.attention_mask_BL).float()
    with torch.no_grad():
        teacher_BLV = parts.teacher(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits.float()
    return loss(student_BLV, teacher_BLV, next_BL, kd_ratio)


def fused_terms(engine: Any, parts: Parts, batch: Batch, next_BL: Tensor, kd_ratio: float, loss: Loss) -> Terms:
    """Both decoders, and a loss that takes their last hidden states and their heads."""
    assert parts.teacher is not None
    given = batch.input_ids_BL, batch.attention_mask_BL
    student_BLH, decoder = engine(*given), models.decoder(parts.teacher)
    with torch.no_grad():
        teacher_BLG = decoder(**models.inputs(decoder, *given)).last_hidden_state
    heads = (models.output_head(model).weight_VH for model in (engine.module.model, parts.teacher))
    student_head_VH, teacher_head_VG = heads
    states = student_BLH.flatten(0, 1), student_head_VH, teacher_BLG.flatten(0, 1), teacher_head_VG
    return loss(*states, next_BL.flatten(), kd_ratio)


def step_by(terms: Callable[..., Terms], loss: Loss) -> Callable[..., tuple[float, ...]]:
    """A step as `train.optimizer_step` is called, which returns means where that returns sums.

    Adapter, optimizer, precision and engine are the project's, so that the ratio between them is the loss's.
    """

    def step(
        engine: Any, trial: TrialConfig, parts: Parts, split: Split, plan: StepPlan, step: int, rate: float
    ) -> tuple[float, ...]:
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        (indices,) = plan.micro_batches(step, 0, 1, trial.training.batch_size, split.num_tokens)
        batch = collate(split.examples(indices), parts.sources.pad_id, parts.device)
        next_BL = F.pad(batch.labels_BL, (0, 1), value=IGNORED)[:, 1:]
        found = terms(engine, parts, batch, next_BL, trial.distill.kd_ratio, loss)
        engine.backward(found[0])
        engine.step()
        return tuple(term.item() for term in found)

    return step

"""What does the teacher say of a batch's scored positions: alive, or from the store?

Shapes: N scored positions, C of a chunk, V real vocabulary, H the student's hidden width, G the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from neo_ray import models
from neo_ray.alignment import numbers, scored_states
from neo_ray.chunked import TeacherLogits
from neo_ray.data import Batch
from neo_ray.losses import TopK, divergence_sum, scored
from neo_ray.parts import Parts
from neo_ray.settings import DistillConfig

FORWARD_KL = DistillConfig(kd_ratio=1.0, temperature=1.0, divergence="forward_kl")


@dataclass(frozen=True)
class Taught:
    """The teacher's word in one of two forms, or none."""

    logits: TeacherLogits | None = None
    projected: tuple[Tensor, Tensor] | None = None
    """c_NH and constant_N of `chunked.projection`."""
    states: tuple[Tensor, ...] = ()
    """[N, width] after each layer that was asked for, in fp32."""

    @property
    def is_silent(self) -> bool:
        return self.logits is None and self.projected is None

    def kl_sum(self, logits_CV: Tensor, states_NH: Tensor | None, rows: slice) -> float:
        """Σ KL(teacher ‖ student) at T = 1 over some of the rows, in nats; a projection has to be one at T = 1.

        Of the k likeliest tokens it is a lower bound, and they have to be known at T = 1.

        Args:
            logits_CV: the student's, of the rows.
            states_NH: the student's hidden states, of all positions.
        """
        if self.projected is None:
            assert self.logits is not None
            return divergence_sum(logits_CV, self.logits(rows), FORWARD_KL).item()
        assert states_NH is not None
        c_CH, constant_C = (column[rows].float() for column in self.projected)
        kl_C = torch.logsumexp(logits_CV, dim=-1) - (states_NH[rows].float() * c_CH).sum(dim=-1) - constant_C
        return kl_C.sum().item()


@torch.no_grad()
def teach(
    parts: Parts,
    split_name: str,
    indices: Sequence[int] | np.ndarray,
    batch: Batch,
    labels_BL: Tensor,
    layers: Sequence[int] = (),
) -> Taught:
    """The teacher's word on the examples `indices` of a split, of which `batch` is made.

    Args:
        labels_BL: the batch's, or all ignored: then on no position at all.
        layers: whose hidden states are wanted, too; a store has none.
    """
    if parts.targets is not None:
        assert not layers
        parts.asked["spared_tokens"] += _tokens(parts, split_name, indices)
        return _stored(parts, split_name, indices, labels_BL)
    if parts.teacher is None:
        return Taught()
    states_NG, of_layers = _living(parts, split_name, indices, batch, labels_BL, layers)
    return replace(_through(models.output_head(parts.teacher), states_NG, parts.vocabulary), states=of_layers)


def teach_once(parts: Parts, split_name: str, indices: np.ndarray, batch: Batch) -> Taught:
    """As `teach`; a living teacher sees the batch once a worker, and its hidden states are kept in host memory."""
    key, seen = ("hidden", split_name, tuple(int(index) for index in indices)), parts.measured
    if parts.targets is not None:
        if key not in seen:
            seen[key] = None
            parts.asked["spared_tokens"] += _tokens(parts, split_name, indices)
        return _stored(parts, split_name, indices, batch.labels_BL)
    if parts.teacher is None:
        return Taught()
    if key not in seen:
        seen[key] = _living(parts, split_name, indices, batch, batch.labels_BL)[0].cpu()
    return _through(models.output_head(parts.teacher), seen[key], parts.vocabulary)


def _living(
    parts: Parts,
    split_name: str,
    indices: Sequence[int] | np.ndarray,
    batch: Batch,
    labels_BL: Tensor,
    layers: Sequence[int] = (),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A living teacher's pass: states_NG of the scored positions, and the states after each layer that is wanted."""
    parts.asked["teacher_tokens"] += _tokens(parts, split_name, indices)
    assert parts.teacher is not None
    network = models.decoder(parts.teacher)
    given = models.inputs(network, batch.input_ids_BL, batch.attention_mask_BL, batch.position_ids_BL)
    outputs = network(**given, output_hidden_states=numbers(list(layers))) if layers else network(**given)
    states_NG = scored(outputs.last_hidden_state, labels_BL, outputs.last_hidden_state.shape[-1])
    return states_NG, scored_states(outputs, list(layers), labels_BL)


def _stored(parts: Parts, split_name: str, indices: Sequence[int] | np.ndarray, labels_BL: Tensor) -> Taught:
    assert parts.targets is not None
    stored = parts.targets.rows(split_name, indices, parts.device)
    if not (labels_BL[:, 1:] >= 0).any():
        stored = tuple(column[:0] for column in stored)
    parts.asked["target_rows"] += len(stored[0])
    if parts.targets.recipe.mode == "topk":
        return Taught(logits=TopK(*stored).rows)
    if parts.targets.head is None:
        return Taught(projected=(stored[0], stored[1]))
    return _through(parts.targets.head, stored[0], parts.vocabulary)


def _tokens(parts: Parts, split_name: str, indices: Sequence[int] | np.ndarray) -> int:
    return int(parts.data.split(split_name).num_tokens[indices].sum())


def _through(head: models.Head, states_NG: Tensor, vocabulary: int) -> Taught:
    device = head.weight_VH.device
    return Taught(logits=lambda rows: head.logits(states_NG[rows].to(device), vocabulary))

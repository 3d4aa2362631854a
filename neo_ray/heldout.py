"""How good is the student? Cross-entropy, bits per byte and KL to the teacher on a held-out split."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from neo_ray import models, placement
from neo_ray.data import Batch, Split, collate
from neo_ray.losses import next_labels, scored
from neo_ray.memory import chunk_rows
from neo_ray.parts import Parts, rank_and_world_size, sum_over_ranks
from neo_ray.settings import EvaluationConfig
from neo_ray.teaching import Taught, teach_once


@dataclass(frozen=True)
class Predicted:
    """A model's answer at the scored positions of a batch."""

    logits: Callable[[slice], torch.Tensor]
    """Rows → fp32 logits_CV over the real vocabulary."""
    states_NH: torch.Tensor | None = None
    """The hidden states that they come from, where the model gives them."""
    with_head: Callable[[Callable[[], torch.Tensor]], torch.Tensor] = lambda use: use()
    """Calls a function that calls `logits`, and returns its result; every rank calls this once."""


Predict = Callable[[Batch, int], Predicted]
"""(batch, vocabulary) → what a model says of it; every rank calls it equally often."""


@dataclass(frozen=True)
class Scores:
    """Means over the scored tokens of a split."""

    ce: float
    """Nats per token."""
    bits_per_byte: float
    """Comparable across tokenizers."""
    kl: float | None
    """KL(teacher ‖ student) at T = 1, nats per token; None without a teacher."""
    tokens: int

    def named(self, split: str) -> dict[str, float | None]:
        return {f"{split}_ce": self.ce, f"{split}_bits_per_byte": self.bits_per_byte, f"{split}_kl": self.kl}


@torch.no_grad()
def evaluate(predict: Predict, parts: Parts, split_name: str, settings: EvaluationConfig) -> Scores:
    """Score the student on a split; batches are dealt out to the ranks and sums added up.

    A living teacher sees a split once a worker.
    """
    rank, world_size = rank_and_world_size()
    split = parts.data.split(split_name)
    batches = evaluation_batches(split, settings)
    sums = torch.zeros(4, dtype=torch.float64)
    for turn in range(math.ceil(len(batches) / world_size)):
        number = turn * world_size + rank
        counts = number < len(batches)  # every rank runs equally many forwards: ZeRO-3 gathers in each of them
        number = number if counts else 0
        batch = collate(split.examples(batches[number]), parts.sources.pad_id, device=str(parts.device))
        predicted = predict(batch, parts.vocabulary)
        taught = teach_once(parts, split_name, batches[number], batch)  # by every rank: the teacher may be sharded
        given = next_labels(batch.labels_BL), parts.vocabulary, split.num_bytes[batches[number]].sum()
        with placement.in_full(placement.head_of(parts.teacher)):
            found = predicted.with_head(partial(_batch_sums, predicted, taught, *given))
        sums += found if counts else 0
    ce, kl, tokens, num_bytes = sum_over_ranks(sums.to(parts.device)).tolist()
    bits = ce / math.log(2) / num_bytes if num_bytes else math.nan
    return Scores(ce / tokens, bits, kl / tokens if parts.has_teacher else None, int(tokens))


def whole_model(model: Any) -> Predict:
    """A plain transformers or peft model, in its own dtype."""

    def predict(batch: Batch, vocabulary: int) -> Predicted:
        given = models.inputs(model, batch.input_ids_BL, batch.attention_mask_BL, batch.position_ids_BL)
        logits_NV = scored(model(**given).logits, batch.labels_BL, vocabulary)
        return Predicted(lambda rows: logits_NV[rows].float())

    return predict


def num_evaluated(lengths: np.ndarray, max_tokens: int | None) -> int:
    """How many examples of a split are scored, its first ones: whole ones up to `max_tokens`, and at least one."""
    return len(lengths) if max_tokens is None else max(1, int(np.searchsorted(np.cumsum(lengths), max_tokens, side="right")))


def evaluation_batches(split: Split, settings: EvaluationConfig) -> list[np.ndarray]:
    """Whole examples in stored order up to `max_tokens` (at least one), then by length so that little is padded."""
    lengths = split.num_tokens
    taken = num_evaluated(lengths, settings.max_tokens)
    order = np.argsort(-lengths[:taken], kind="stable")
    return [order[start : start + settings.batch_size] for start in range(0, taken, settings.batch_size)]


def _batch_sums(predicted: Predicted, taught: Taught, labels_N: torch.Tensor, vocabulary: int, num_bytes: int) -> torch.Tensor:
    ce = kl = 0.0
    size = chunk_rows(vocabulary, labels_N.device.type)
    for start in range(0, len(labels_N), size):
        rows = slice(start, start + size)
        logits_CV = predicted.logits(rows)
        ce += torch.nn.functional.cross_entropy(logits_CV, labels_N[rows], reduction="sum").item()
        kl += 0.0 if taught.is_silent else taught.kl_sum(logits_CV, predicted.states_NH, rows)
    return torch.tensor([ce, kl, len(labels_N), num_bytes], dtype=torch.float64)

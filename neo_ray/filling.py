"""What does the teacher say of the examples of a shard? One forward pass, and of its states what the recipe asks for.

Shapes: R rows of a shard, N rows of a batch, C of a chunk, H the student's hidden width, G the teacher's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neo_ray import models
from neo_ray.chunked import projection
from neo_ray.data import Split, TokenData, collate
from neo_ray.losses import scored, top_k
from neo_ray.memory import chunk_rows
from neo_ray.settings import ConfigError
from neo_ray.stores import COLUMNS, Recipe, Shard

BATCH_TOKENS = 4096
"""Of the teacher's forward pass, padding included; at least one example."""


class Teacher:
    """A teacher that fills shards: its weights, and the student's head for projections."""

    def __init__(self, recipe: Recipe, model: Any, data: TokenData, pad_id: int, student_head: models.Head | None = None) -> None:
        self.recipe, self.model, self.data, self.pad_id = recipe, model, data, pad_id
        self.head = models.output_head(model)
        if student_head is not None:  # in fp32: a product rounded to bf16 would be eight times the error of a row in fp16
            bias_V = student_head.bias_V.float() if student_head.bias_V is not None else None
            student_head = models.Head(student_head.weight_VH.float(), bias_V, student_head.soft_cap, student_head.logit_scale)
        self.student_head = student_head
        self.tokens_seen = 0

    @torch.no_grad()
    def fill(self, shard: Shard) -> dict[str, Tensor]:
        """The rows of a shard, by the names of `stores.COLUMNS`.

        Raises:
            ConfigError: a row is beyond fp16.
        """
        split = self.data.split(shard.split)
        rows: dict[int, list[Tensor]] = {}
        for indices in _batches(split, shard):
            batch = collate(split.examples(indices), self.pad_id, self.model.device)
            states_BLG = models.last_hidden(self.model, batch.input_ids_BL, batch.attention_mask_BL)
            self.tokens_seen += int(split.num_tokens[indices].sum())
            states_NG = scored(states_BLG, batch.labels_BL, states_BLG.shape[-1])
            made = self._rows(states_NG, self.recipe.temperature_of(shard.split))
            counts = split.num_labels[indices].tolist()
            for index, *parts in zip(indices.tolist(), *(tensor.split(counts) for tensor in made), strict=True):
                rows[index] = parts
        names = COLUMNS[self.recipe.mode]
        columns = zip(*(rows[index] for index in range(shard.first, shard.last)), strict=True)
        tensors = {name: torch.cat(column).cpu().contiguous() for name, column in zip(names, columns, strict=True)}
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise ConfigError(f"targets.mode: {self.recipe.mode}: the teacher's values exceed fp16 in {shard.name}; live works")
        return tensors

    def _rows(self, states_NG: Tensor, temperature: float) -> tuple[Tensor, ...]:
        if self.recipe.mode == "hidden":
            return (states_NG.half(),)
        chunks = states_NG.split(chunk_rows(self.recipe.vocabulary, states_NG.device.type))
        made = [self._of_logits(self.head.logits(states_CG, self.recipe.vocabulary), temperature) for states_CG in chunks]
        return tuple(torch.cat(column) for column in zip(*made, strict=True))

    def _of_logits(self, teacher_CV: Tensor, temperature: float) -> tuple[Tensor, ...]:
        if self.recipe.mode == "topk":
            known = top_k(teacher_CV, self.recipe.top_k, temperature)
            return known.log_p_NK, known.ids_NK, known.log_tail_N
        assert self.student_head is not None
        c_CH, constant_C = projection(teacher_CV, self.student_head, self.recipe.vocabulary, temperature)
        return c_CH.half(), constant_C


def _batches(split: Split, shard: Shard) -> Iterator[np.ndarray]:
    """Examples of a shard by length, so that little is padded, as many as `BATCH_TOKENS` hold."""
    order = shard.first + np.argsort(-split.num_tokens[shard.first : shard.last], kind="stable")
    start = 0
    while start < len(order):
        count = max(1, BATCH_TOKENS // int(split.num_tokens[order[start]]))
        yield order[start : start + count]
        start += count

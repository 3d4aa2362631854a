"""What does the teacher say of the examples of a shard? One forward pass, and of its states what the recipe asks for.

Shapes: R rows of a shard, N rows of a batch, C of a chunk, H the student's hidden width, G the teacher's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neo_ray import devices, models
from neo_ray.chunked import projection
from neo_ray.data import Split, TokenData, collate
from neo_ray.losses import scored, top_k
from neo_ray.memory import chunk_rows
from neo_ray.settings import ConfigError
from neo_ray.stores import COLUMNS, Recipe, Shard

BATCH_TOKENS = 4096
"""Of the teacher's forward pass, padding included, as far as memory holds them; at least one example."""


class Teacher:
    """A teacher that fills shards: its weights, and the student's head for projections."""

    def __init__(self, recipe: Recipe, model: Any, data: TokenData, pad_id: int, student_head: models.Head | None = None) -> None:
        self.recipe, self.model, self.data, self.pad_id = recipe, model, data, pad_id
        self.head = models.output_head(model)
        if student_head is not None:  # in fp32: a product rounded to bf16 would be eight times the error of a row in fp16
            bias_V = student_head.bias_V.float() if student_head.bias_V is not None else None
            student_head = models.Head(student_head.weight_VH.float(), bias_V, student_head.soft_cap, student_head.logit_scale)
        self.student_head = student_head
        self.tokens_seen, self.batch_tokens = 0, BATCH_TOKENS

    @torch.no_grad()
    def fill(self, shard: Shard) -> dict[str, Tensor]:
        """The rows of a shard, by the names of `stores.COLUMNS`. A batch that memory does not hold is halved, and later ones are.

        Raises:
            ConfigError: a row is beyond fp16.
        """
        split, todo = self.data.split(shard.split), deque(_batches(self.data.split(shard.split), shard, self.batch_tokens))
        rows: dict[int, list[Tensor]] = {}
        while todo:
            indices, made = todo.popleft(), None
            try:
                made = self._of_examples(split, indices, self.recipe.temperature_of(shard.split))
            except Exception as error:
                if len(indices) == 1 or not devices.is_out_of_memory(error):
                    raise
            if made is None:  # here, where nothing holds what was computed
                devices.free_memory(self.model.device)
                self.batch_tokens = min(self.batch_tokens, len(indices) * int(split.num_tokens[indices].max()) // 2)
                todo.extendleft(reversed(np.array_split(indices, 2)))
                continue
            counts = split.num_labels[indices].tolist()
            for index, *parts in zip(indices.tolist(), *(tensor.split(counts) for tensor in made), strict=True):
                rows[index] = parts
        names = COLUMNS[self.recipe.mode]
        columns = zip(*(rows[index] for index in range(shard.first, shard.last)), strict=True)
        tensors = {name: torch.cat(column).cpu().contiguous() for name, column in zip(names, columns, strict=True)}
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise ConfigError(f"targets.mode: {self.recipe.mode}: the teacher's values exceed fp16 in {shard.name}; live works")
        return tensors

    def _of_examples(self, split: Split, indices: np.ndarray, temperature: float) -> tuple[Tensor, ...]:
        batch = collate(split.examples(indices), self.pad_id, self.model.device)
        states_BLG = models.last_hidden(self.model, batch.input_ids_BL, batch.attention_mask_BL)
        made = self._rows(scored(states_BLG, batch.labels_BL, states_BLG.shape[-1]), temperature)
        self.tokens_seen += int(split.num_tokens[indices].sum())
        return made

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


def _batches(split: Split, shard: Shard, batch_tokens: int) -> Iterator[np.ndarray]:
    """Examples of a shard by length, so that little is padded, as many as `batch_tokens` hold."""
    order = shard.first + np.argsort(-split.num_tokens[shard.first : shard.last], kind="stable")
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // int(split.num_tokens[order[start]]))
        yield order[start : start + count]
        start += count

"""How does the model under training answer? Its decoder everywhere, its head at scored positions alone, chunk by chunk.

Shapes: B sequences of a micro-batch, L tokens, V real vocabulary, H hidden width, N scored positions, C of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from neo_ray import devices, models, placement
from neo_ray.alignment import Projections
from neo_ray.chunked import chunked_loss, projected_loss
from neo_ray.data import Batch
from neo_ray.heldout import Predicted
from neo_ray.losses import LossSums, next_labels, scored
from neo_ray.settings import TrialConfig
from neo_ray.teaching import Taught


class Student(nn.Module):
    """A model as the engine sees it: last hidden states in the compute dtype, trained weights in fp32."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        zero_stage: int = 0,
        projections: Projections | None = None,
    ) -> None:
        super().__init__()
        self.model, self.device, self.dtype, self.projections = model, device, dtype, projections
        if zero_stage == 3 and isinstance(head := models.any_head(model), models.AdaptedHead):
            _fetch_as_one(head.module)

    def forward(
        self,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor | None,
        position_ids_BL: Tensor | None = None,
        aligned_BL: Tensor | None = None,
    ) -> Any:
        """hidden_BLH after the final norm; with labels as `aligned_BL` also the projected states that they score."""
        network: Any = models.decoder(self.model)
        given = models.inputs(network, input_ids_BL, attention_mask_BL, position_ids_BL)
        if self.projections is not None and aligned_BL is not None:
            given["output_hidden_states"] = self.projections.asked
        with devices.autocast(self.device, self.dtype):
            outputs = network(**given)
        if self.projections is None or aligned_BL is None:
            return outputs.last_hidden_state
        return outputs.last_hidden_state, self.projections(outputs, aligned_BL)

    def projection_parameters(self) -> dict[str, nn.Parameter]:
        """Trained with the model's own and kept in checkpoints, but no part of an adapter."""
        return dict(self.projections.named_parameters("projections")) if self.projections is not None else {}

    def loss(
        self,
        output: Tensor,
        labels_BL: Tensor,
        taught: Taught,
        trial: TrialConfig,
        vocabulary: int,
        factor: float = 1.0,
        rows: int | None = None,
    ) -> LossSums:
        """The trial's loss of what `forward` returned.

        Args:
            factor: what the sum is multiplied with before backward, for `chunked_loss`.
            rows: positions of a chunk.
        """
        labels_N, smoothing = next_labels(labels_BL), trial.training.label_smoothing
        states_NH = scored(output, labels_BL, output.shape[-1])
        found: list[LossSums] = []

        def total(states_NH: Tensor) -> Tensor:
            head = models.any_head(self.model)
            how = (trial.distill, vocabulary, smoothing, rows, factor, trial.training.compile_loss)
            if isinstance(head, models.Head) and head.is_frozen_linear and taught.logits is None:
                found.append(projected_loss(states_NH, head, labels_N, taught.projected, *how))
            else:
                assert taught.projected is None, "a trained head has no projection"
                found.append(chunked_loss(states_NH, head, labels_N, taught.logits, *how))
            return found[0].total

        with devices.autocast(self.device, self.dtype):
            through_hooks = self._with_head(states_NH, total)
        return replace(found[0], total=through_hooks)

    @torch.no_grad()
    def predict(self, batch: Batch, vocabulary: int) -> Predicted:
        """For evaluation: dropout off, no gradient."""
        self.eval()
        output = self(batch.input_ids_BL, batch.attention_mask_BL, batch.position_ids_BL)
        states_NH = scored(output, batch.labels_BL, output.shape[-1])
        head = models.any_head(self.model)

        def logits(rows: slice) -> Tensor:
            with devices.autocast(self.device, self.dtype):
                return head.logits(states_NH[rows], vocabulary)

        return Predicted(logits, states_NH, lambda use: self._with_head(states_NH, lambda _: use()))

    def _with_head(self, states_NH: Tensor, use: Callable[[Tensor], Tensor]) -> Tensor:
        """`use(states_NH)` with the whole head, also where ZeRO-3 has cut it: all ranks call this equally often.

        A trained head has `use` in the place of its own forward pass. So ZeRO-3's hooks on it gather it once for all of `use`,
        and once more for the backward pass, where they hand its gradient on.
        """
        layer = models.head_layer(self.model)
        if frozen := self.frozen_head():
            with placement.in_full(frozen):
                return use(states_NH)
        if not any(hasattr(parameter, "ds_id") for parameter in layer.parameters()):
            return use(states_NH)
        layer.forward = use
        try:
            return layer(states_NH)
        finally:
            del layer.forward

    def frozen_head(self) -> list[nn.Parameter]:
        """The head's parameters, where none of them is trained; else none."""
        parameters = list(models.head_layer(self.model).parameters())
        return parameters if not any(parameter.requires_grad for parameter in parameters) else []


def _fetch_as_one(layer: nn.Module) -> None:
    """ZeRO-3 gathers a module's parameters when the module is called, and here for all of its parts at once.

    Else each chunk of the loss would gather the branch of an adapted head again, and ranks have unequal numbers of chunks.
    """
    from deepspeed.utils import set_z3_leaf_module

    set_z3_leaf_module(layer, True)

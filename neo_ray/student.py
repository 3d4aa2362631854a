"""How does the model under training answer? Its decoder everywhere, its head at scored positions alone, chunk by chunk.

Shapes: B sequences of a micro-batch, L tokens, V real vocabulary, H hidden width, N scored positions, C of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from neo_ray import devices, models
from neo_ray.alignment import Projections
from neo_ray.chunked import chunked_loss, projected_loss
from neo_ray.data import Batch
from neo_ray.evaluate import Predicted
from neo_ray.losses import LossSums, neo_loss, next_labels, scored
from neo_ray.settings import TrialConfig
from neo_ray.teaching import Taught


class Student(nn.Module):
    """A model as the engine sees it: last hidden states in the compute dtype, trained weights in fp32.

    Where ZeRO-3 has cut a trained head into parts, only the model's own forward pass puts it together: then whole logits.
    """

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
        self.has_whole_logits = zero_stage == 3 and bool(models.any_head(model).trained)

    def forward(
        self,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor | None,
        position_ids_BL: Tensor | None = None,
        aligned_BL: Tensor | None = None,
    ) -> Any:
        """hidden_BLH after the final norm, or logits_BLV; with labels as `aligned_BL` also the projected states they score."""
        network: Any = self.model if self.has_whole_logits else models.decoder(self.model)
        given = models.inputs(network, input_ids_BL, attention_mask_BL, position_ids_BL)
        if self.projections is not None and aligned_BL is not None:
            given["output_hidden_states"] = self.projections.asked
        with devices.autocast(self.device, self.dtype):
            outputs = network(**given)
        output = outputs.logits if self.has_whole_logits else outputs.last_hidden_state
        if self.projections is None or aligned_BL is None:
            return output
        return output, self.projections(outputs, aligned_BL)

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
        if self.has_whole_logits:
            assert taught.projected is None, "a trained head has no projection"
            student_NV = scored(output, labels_BL, vocabulary)
            teacher_NV = taught.logits(slice(None)) if taught.logits else None
            return neo_loss(student_NV, labels_N, teacher_NV, trial.distill, smoothing)
        states_NH = scored(output, labels_BL, output.shape[-1])
        with devices.autocast(self.device, self.dtype), self._head() as head:
            how = (trial.distill, vocabulary, smoothing, rows, factor)
            if isinstance(head, models.Head) and head.is_frozen_linear and taught.logits is None:
                return projected_loss(states_NH, head, labels_N, taught.projected, *how)
            assert taught.projected is None, "a trained head has no projection"
            return chunked_loss(states_NH, head, labels_N, taught.logits, *how)

    @torch.no_grad()
    def predict(self, batch: Batch, vocabulary: int) -> Predicted:
        """For evaluation: dropout off, no gradient."""
        self.eval()
        output = self(batch.input_ids_BL, batch.attention_mask_BL, batch.position_ids_BL)
        if self.has_whole_logits:
            logits_NV = scored(output, batch.labels_BL, vocabulary)
            return Predicted(lambda rows: logits_NV[rows].float())
        states_NH = scored(output, batch.labels_BL, output.shape[-1])
        with self._head(keep=True) as head:
            pass

        def logits(rows: slice) -> Tensor:
            with devices.autocast(self.device, self.dtype):
                return head.logits(states_NH[rows], vocabulary)

        return Predicted(logits, states_NH)

    @contextmanager
    def _head(self, keep: bool = False) -> Iterator[models.AnyHead]:
        """The head, put together where ZeRO-3 has cut it: all ranks call this equally often. `keep`: it outlives the context."""
        layer = self.model.get_output_embeddings()  # type: ignore[operator]
        cut = [parameter for parameter in layer.parameters() if hasattr(parameter, "ds_id")]
        with _gathered(cut):
            head = models.any_head(self.model)
            if cut and keep and isinstance(head, models.Head):
                head = head.copy()
            yield head


def _gathered(parameters: list[Any]) -> Any:
    if not parameters:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters)

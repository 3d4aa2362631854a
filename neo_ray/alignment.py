"""How far are the student's hidden states from the teacher's? Sums in fp32 over the positions that CE and KD score.

Shapes: N scored positions, B sequences, L tokens, S width of the student, T width of the teacher.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neo_ray.config import SweepConfig
from neo_ray.losses import scored
from neo_ray.parts import Parts
from neo_ray.settings import DistillConfig, TrialConfig
from neo_ray.space import Space

Pairs = tuple[tuple[int, int], ...]
"""(student layer, teacher layer), counted from 0."""


def check(config: SweepConfig, space: Space, student_layers: int, teacher_layers: int) -> None:
    """Do models of so many layers have those that are to be compared? Raises ConfigError at `distill.alignment_layers`."""
    if any(weight > 0 for weight in space.reach("alignment_weight")):
        for layers in space.reach("alignment_layers"):
            wanted = DistillConfig.model_validate({**dict(config.distill), "alignment_layers": layers})
            wanted.layer_pairs(student_layers, teacher_layers)


def layer_pairs(trial: TrialConfig, parts: Parts) -> Pairs:
    """The pairs of layers that a trial compares; none where it compares none. Raises ConfigError."""
    if not trial.is_aligned:
        return ()
    student, teacher = (_text_config(model).num_hidden_layers for model in (parts.student, parts.teacher))
    return trial.distill.layer_pairs(student, teacher)


class Projections(nn.Module):
    """A learned linear map from the student's width to the teacher's for every pair of layers, without bias, in fp32.

    They are trained with the student and left behind at the end. Between equal widths a map starts as the identity, else as one
    that keeps lengths and angles as far as the widths allow (semi-orthogonal), drawn from the trial's seed.
    """

    def __init__(self, pairs: Pairs, student_width: int, teacher_width: int, seed: int, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)  # of its own: the adapter is drawn as it is without alignment
        self.pairs = pairs
        self.maps = nn.ModuleList(
            nn.utils.skip_init(nn.Linear, student_width, teacher_width, bias=False, device="cpu") for _ in pairs
        )
        for layer in self.maps:
            assert isinstance(layer, nn.Linear)
            if student_width == teacher_width:
                nn.init.eye_(layer.weight)
            else:
                nn.init.orthogonal_(layer.weight, generator=generator)
        self.to(device)

    def forward(self, outputs: Any, labels_BL: Tensor) -> tuple[Tensor, ...]:
        """projected_NT of each pair, from the student's outputs with `output_hidden_states=self.asked`."""
        states = scored_states(outputs, [layer for layer, _ in self.pairs], labels_BL)
        return tuple(layer(state_NS) for layer, state_NS in zip(self.maps, states, strict=True))

    @property
    def asked(self) -> list[int]:
        return numbers([layer for layer, _ in self.pairs])


def make_projections(trial: TrialConfig, parts: Parts) -> Projections | None:
    """Fresh ones for a trial; None where it compares no hidden states."""
    pairs = layer_pairs(trial, parts)
    if not pairs:
        return None
    student_width, teacher_width = (_text_config(model).hidden_size for model in (parts.student, parts.teacher))
    return Projections(pairs, student_width, teacher_width, trial.seed, parts.device)


def numbers(layers: list[int]) -> list[int]:
    """What transformers calls the states after these layers, and is to keep: its number 0 are the embeddings."""
    return sorted({layer + 1 for layer in layers})


def scored_states(outputs: Any, layers: list[int], labels_BL: Tensor) -> tuple[Tensor, ...]:
    """The hidden states after these layers at the scored positions, in fp32: one [N, width] for each layer."""
    states = (outputs.hidden_states[layer + 1] for layer in layers)
    return tuple(scored(state_BLH, labels_BL, state_BLH.shape[-1]).float() for state_BLH in states)


def alignment_sum(projected: tuple[Tensor, ...], teacher: tuple[Tensor, ...], distill: DistillConfig) -> Tensor:
    """Σ_n of the mean over pairs: `mse` ‖W s_n − t_n‖² / T (FitNets, arXiv 1412.6550; W of TinyBERT, arXiv 1909.10351), or
    `cosine` 1 − cos(W s_n, t_n) (DistilBERT, arXiv 1910.01108).

    Args:
        projected: W s of each pair, [N, T], with gradient.
        teacher: t of each pair, [N, T]; none is taken.
    """
    distance = _DISTANCES[distill.alignment_loss]
    pairs = zip(projected, teacher, strict=True)
    return torch.stack([distance(projected_NT, teacher_NT.detach()).sum() for projected_NT, teacher_NT in pairs]).mean()


def _mse(projected_NT: Tensor, teacher_NT: Tensor) -> Tensor:
    return (projected_NT - teacher_NT).square().mean(dim=-1)


def _cosine(projected_NT: Tensor, teacher_NT: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(projected_NT, teacher_NT, dim=-1)


_DISTANCES = {"mse": _mse, "cosine": _cosine}


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()

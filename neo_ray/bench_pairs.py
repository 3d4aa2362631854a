"""Which teacher and student does a benchmark take, other than a sweep file's? Random ones of a known shape, made on the device.

Shapes: V vocabulary, N tokens of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn

from neo_ray import devices
from neo_ray.data import Split, TokenData
from neo_ray.losses import IGNORED
from neo_ray.memory import FP32, LOSS_TENSORS, activation_bytes, adapter_parameters
from neo_ray.parts import ModelSource, Parts, Sources, shape_of
from neo_ray.settings import ConfigError, TrialConfig
from neo_ray.shapes import KNOWN_SHAPES, ModelShape, shape_from_config

ADAM_MOMENTS_BYTES = 2 * FP32
DENSE_TENSORS = LOSS_TENSORS["forward_kl"] + 3
"""Live [N, V] tensors of a step with whole logits as others take it, in fp32: at most those that this project's dense loss has,
and both models' logits before they are made fp32, and the divergence of each token. Counted (tests/test_bench_pairs.py)."""


@dataclass(frozen=True)
class RandomPair:
    teacher: ModelShape
    student: ModelShape
    teacher_name: str
    student_name: str
    needs_gpu: bool = False

    @property
    def vocabulary(self) -> int:
        return self.teacher.vocab_size


def _tiny(num_layers: int) -> ModelShape:
    widths = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    shape = shape_from_config({**widths, "num_hidden_layers": num_layers})
    assert shape is not None
    return shape


TINY = RandomPair(_tiny(4), _tiny(2), "random, tiny", "random, tiny")
LLAMA = RandomPair(
    KNOWN_SHAPES["llama-3.1-8b"], KNOWN_SHAPES["llama-3.2-1b"], "random, as Llama-3.1-8B", "random, as Llama-3.2-1B", True
)


def make_parts(pair: RandomPair, trial: TrialConfig, device: torch.device, length: int, count: int, arms: int) -> Parts:
    """Both models, and `count` sequences of random tokens, for so many arms.

    Raises:
        ConfigError: they need a GPU, or more memory than there is.
    """
    dtype = devices.resolve_dtype(trial.training.dtype, device)
    if pair.needs_gpu and device.type != "cuda":
        raise ConfigError(
            f"--preset: a teacher of {pair.teacher.num_parameters / 1e9:.1f} B parameters needs a GPU, and there is none"
        )
    check_memory("--preset", step_bytes(pair, trial, length, dtype.itemsize, arms), device)
    torch.manual_seed(0)
    student, teacher = (make_model(shape, device, dtype) for shape in (pair.student, pair.teacher))
    ids_EL = np.random.default_rng(0).integers(pair.vocabulary, size=(count, length))
    data = TokenData(Path(), "random", {}, {"train": even_split(ids_EL, ids_EL)})
    sources = Sources(ModelSource("random"), "random", ModelSource("random"), pair.vocabulary)
    return Parts(sources, shape_of(trial, device), student, teacher, data, device, dtype)


def make_model(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen Llama of this shape, its random weights drawn on the device in `dtype`: no other copy is ever made."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        use_cache=False,
    )
    with device:
        network: Any = LlamaForCausalLM._from_config(config, dtype=dtype)
    return network.eval().requires_grad_(False)


def even_split(ids_EL: np.ndarray, labels_EL: np.ndarray) -> Split:
    """A split of examples of one length."""
    lengths_E = np.full(len(ids_EL), ids_EL.shape[1])
    rows = datasets.Dataset.from_dict({"input_ids": list(ids_EL), "labels": list(labels_EL)})
    return Split(rows, lengths_E, (labels_EL[:, 1:] != IGNORED).sum(axis=1), np.zeros_like(lengths_E))


def step_bytes(pair: RandomPair, trial: TrialConfig, length: int, size: int, arms: int) -> int:
    """What a device holds at the peak of `bench step`: both models, an adapter with gradients and moments for each of the arms,
    the heads that stores need (the student's in fp32, the teacher's), and the step that takes most, one with whole logits.

    Args:
        size: bytes of a number in the compute dtype.
    """
    num_tokens = trial.training.batch_size * length
    weights = (pair.teacher.num_parameters + pair.student.num_parameters) * size
    adapters = arms * adapter_parameters(pair.student, trial.lora) * (2 * FP32 + ADAM_MOMENTS_BYTES)
    heads = pair.vocabulary * (pair.student.hidden_size * FP32 + pair.teacher.hidden_size * size)
    dense = DENSE_TENSORS * FP32 * num_tokens * pair.vocabulary
    return weights + adapters + heads + dense + activation_bytes(num_tokens, trial, pair.student, size)


def check_memory(where: str, needed: int, device: torch.device) -> None:
    """Raises ConfigError where the device has less memory free than that."""
    free = devices.free_bytes(device)
    if free is not None and needed > free:
        raise ConfigError(
            f"{where}: needs about {needed / 1e9:.1f} GB, and {devices.describe(device)} has {free / 1e9:.1f} GB free"
        )

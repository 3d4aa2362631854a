"""What is the shape of a model? Known from its config, the Hugging Face cache or its name, without loading it."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from neo_ray.assets import SMOLLM2_CONFIG, is_quickstart
from neo_ray.config import SweepConfig


@dataclass(frozen=True)
class ModelShape:
    """A Llama-like decoder: attention with grouped queries, a gated MLP, RMS norms."""

    num_parameters: int
    hidden_size: int
    num_layers: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    source: Literal["config.json", "name", "unknown"]
    """Where it is known from; from its name it is approximate."""

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Name → (in, out) of the linear layers of one block."""
        hidden, wide = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
            "gate_proj": (hidden, wide),
            "up_proj": (hidden, wide),
            "down_proj": (wide, hidden),
        }

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Full name → (in, out) of every layer with weights; a norm is (1, hidden)."""
        hidden = self.hidden_size
        block = {f"{'mlp' if i > 3 else 'self_attn'}.{name}": sizes for i, (name, sizes) in enumerate(self.linear_layers.items())}
        block |= {"input_layernorm": (1, hidden), "post_attention_layernorm": (1, hidden)}
        rest = {"model.embed_tokens": (self.vocab_size, hidden), "model.norm": (1, hidden), "lm_head": (hidden, self.vocab_size)}
        return rest | {f"model.layers.{n}.{name}": sizes for n in range(self.num_layers) for name, sizes in block.items()}

    @property
    def layer_parameters(self) -> int:
        return sum(n_in * n_out for n_in, n_out in self.linear_layers.values()) + 2 * self.hidden_size

    def with_layers(self, num_layers: int) -> ModelShape:
        """The model with fewer layers."""
        dropped = (self.num_layers - num_layers) * self.layer_parameters
        return replace(self, num_layers=num_layers, num_parameters=self.num_parameters - dropped)


def shape_from_config(raw: dict[str, Any], source: Literal["config.json", "name"] = "config.json") -> ModelShape | None:
    """The shape that a transformers `config.json` describes; None where its keys are not those of a Llama-like model."""
    raw = raw.get("text_config") or raw
    keys = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "num_attention_heads")
    if not all(isinstance(raw.get(key), int) for key in keys):
        return None
    hidden, layers, wide, vocabulary, heads = (raw[key] for key in keys)
    shape = ModelShape(
        num_parameters=0,
        hidden_size=hidden,
        num_layers=layers,
        intermediate_size=wide,
        vocab_size=vocabulary,
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        tied=bool(raw.get("tie_word_embeddings", False)),
        source=source,
    )
    embeddings = vocabulary * hidden * (1 if shape.tied else 2)
    return replace(shape, num_parameters=embeddings + layers * shape.layer_parameters + hidden)


def _known(hidden: int, layers: int, wide: int, vocabulary: int, heads: int, kv_heads: int, tied: bool) -> ModelShape:
    keys = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
    raw = dict(zip(keys, (hidden, layers, wide, vocabulary, heads, kv_heads), strict=True))
    shape = shape_from_config({**raw, "tie_word_embeddings": tied}, "name")
    assert shape is not None
    return shape


# Part of a name → shape, from the models' published configs. A name with another size takes the nearest of them.
KNOWN_SHAPES = {
    "smollm2-135m": _known(576, 30, 1536, 49152, 9, 3, True),
    "smollm2-360m": _known(960, 32, 2560, 49152, 15, 5, True),
    "tinyllama": _known(2048, 22, 5632, 32000, 32, 4, False),
    "llama-3.2-1b": _known(2048, 16, 8192, 128256, 32, 8, True),
    "llama-3.2-3b": _known(3072, 28, 8192, 128256, 24, 8, True),
    "llama-2-7b": _known(4096, 32, 11008, 32000, 32, 32, False),
    "llama-8b": _known(4096, 32, 14336, 128256, 32, 8, False),
    "llama-3.1-8b": _known(4096, 32, 14336, 128256, 32, 8, False),
    "llama-2-13b": _known(5120, 40, 13824, 32000, 40, 40, False),
    "llama-3.1-70b": _known(8192, 80, 28672, 128256, 64, 8, False),
}


def shape_of(model: str, revision: str | None = None) -> ModelShape | None:
    """The shape of a local folder, a model in the Hugging Face cache, or one whose name tells its size. No network."""
    if is_quickstart(model):
        return shape_from_config(SMOLLM2_CONFIG)
    for folder in (Path(model).expanduser(), cached_snapshot(model, revision)):
        try:
            shape = shape_from_config(json.loads((folder / "config.json").read_text(encoding="utf-8"))) if folder else None
        except (OSError, ValueError):
            continue
        if shape is not None:
            return shape
    return shape_from_name(model)


def cached_snapshot(model: str, revision: str | None = None) -> Path | None:
    """The folder of a hub model in the local Hugging Face cache, where it is there."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    folder = hub / f"models--{model.replace('/', '--')}"
    try:
        commit = (folder / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision or "*"
    found = sorted(folder.glob(f"snapshots/{commit}/config.json"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


def shape_from_name(model: str) -> ModelShape | None:
    """An approximate shape: of a known model that the name holds, else of the known model nearest to the size in the name."""
    name = model.rsplit("/", 1)[-1].lower()
    for part, shape in KNOWN_SHAPES.items():
        if part in name:
            return shape
    size = re.search(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name)
    if size is None:
        return None
    count = float(size[1]) * {"b": 1e9, "m": 1e6}[size[2]]
    nearest = min(KNOWN_SHAPES.values(), key=lambda shape: abs(math.log(shape.num_parameters / count)))
    return replace(nearest, num_parameters=round(count))


def model_shapes(config: SweepConfig) -> tuple[ModelShape | None, ModelShape | None]:
    """The shapes of (teacher, student) as far as they are known. A pruned student has the teacher's, with fewer layers."""
    teacher = shape_of(config.teacher.model, config.teacher.revision) if config.teacher else None
    prune = config.student.prune
    if prune is None:
        return teacher, shape_of(str(config.student.model), config.student.revision)
    return teacher, teacher.with_layers(prune.num_layers) if teacher else None

"""Where does the teacher's word come from: alive in every trial, or from a store that is filled once a sweep?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from neo_ray.config import SweepConfig
from neo_ray.settings import ConfigError, is_named
from neo_ray.shapes import ModelShape
from neo_ray.space import Space

HEADS = ("lm_head", "embed_out", "output", "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
"""What layers that are a head, or may be tied to one, are called, for as long as the model itself was not asked."""
SHARD_BYTES = 2**26
"""Of a file of a store."""


BIAS = "all but k tokens count as one, so that divergences, select_kl and report_kl are lower bounds of the whole ones"


@dataclass(frozen=True)
class Supply:
    mode: Literal["live", "projection", "hidden", "topk"]
    why: str
    """In a few words, for the plan."""
    temperature: float = 1.0
    """Of the projections or the top k that trials train with."""
    dtype: str = "auto"
    """Of all trials."""
    top_k: int = 0
    """Tokens of a position, under `topk`."""


def row_bytes(mode: str, width: int) -> int:
    """Bytes of one scored position in a store: fp16 numbers, but of a hidden state an fp32 one, of top k int32 ids.

    Args:
        width: the student's for a projection, the teacher's for a hidden state, k for the k likeliest tokens.
    """
    if mode == "topk":
        return (2 + 4) * width + 4
    return 2 * width + (4 if mode == "projection" else 0)


def bytes_of_row(supply: Supply, teacher: ModelShape | None, student: ModelShape | None) -> int | None:
    """As `row_bytes`, for the models of a sweep; None where the size of the one that counts is not known."""
    if supply.mode == "topk":
        return row_bytes("topk", min(supply.top_k, teacher.vocab_size) if teacher else supply.top_k)
    shape = student if supply.mode == "projection" else teacher
    return row_bytes(supply.mode, shape.hidden_size) if shape else None


def choose(config: SweepConfig, space: Space, soft_cap: float | None = None, heads: tuple[str, ...] | None = None) -> Supply:
    """What `targets.mode` comes to for this search space.

    Args:
        soft_cap: the student head's, where it is known.
        heads: full names of the student's layers that hold the head's weights, where they are known (`models.head_names`).

    Raises:
        ConfigError: the mode asked for is not exact here.
    """
    wanted = config.targets.mode
    if config.teacher is None:
        return Supply("live", "there is no teacher")
    if wanted == "live":
        return Supply("live", "as asked")
    alive = next(_against_a_store(config, space), None)
    if wanted == "auto" and not _is_taught(space):
        return Supply("live", "no trial trains on what the teacher says, and held-out text takes it once a worker")
    if alive and wanted != "auto":
        raise ConfigError(f"targets.mode: {wanted} cannot be: {alive}; allowed: live, auto")
    if alive:
        return Supply("live", alive)
    if wanted == "topk":
        return _top_k(config, space)
    against = next(_against_projection(space, soft_cap, heads), None)
    if wanted == "projection" and against:
        raise ConfigError(f"targets.mode: projection is not exact here: {against}; allowed: hidden, live, auto")
    (dtype,) = space.reach("dtype")
    if wanted == "hidden" or against:
        return Supply("hidden", against or "as asked", dtype=dtype)
    (temperature,) = _temperatures(space)
    return Supply("projection", "forward KL through a frozen head needs no more", temperature, dtype)


def _top_k(config: SweepConfig, space: Space) -> Supply:
    """Serves every divergence and head, at one temperature; biased, so that nothing but a wish leads to it."""
    if len(_temperatures(space)) > 1:
        raise ConfigError(
            "targets.mode: topk cannot be: distill.temperature is searched, and it has one; allowed: hidden, live, auto"
        )
    (temperature,), (dtype,) = _temperatures(space), space.reach("dtype")
    return Supply("topk", f"as asked; biased: {BIAS}", temperature, dtype, config.targets.top_k)


def _against_a_store(config: SweepConfig, space: Space) -> Iterator[str]:
    """Why the teacher has to be alive in every trial."""
    if len(space.reach("dtype")) > 1:
        yield "training.dtype is searched, and the teacher's numbers depend on it"
    if {"kd", "neo"} & set(space.reach("method")) and any(weight > 0 for weight in space.reach("alignment_weight")):
        yield "distill.alignment_weight compares hidden states of a living teacher"
    if config.teacher is not None and config.teacher.placement != "replicated":
        yield f"teacher.placement: {config.teacher.placement} takes all workers of a trial"


def _against_projection(space: Space, soft_cap: float | None, heads: tuple[str, ...] | None) -> Iterator[str]:
    """Why a projection would not be exact."""
    whole = [method for method in space.reach("method") if method in ("sft", "kd")]
    if whole:
        yield f"method {whole[0]} trains the student's head"
    others = [divergence for divergence in space.reach("divergence") if divergence != "forward_kl"]
    if others and _is_taught(space):
        yield f"divergence {others[0]} needs the teacher's whole distribution"
    if len(_temperatures(space)) > 1:
        yield "distill.temperature is searched, and a projection has one"
    if soft_cap is not None:
        yield "the student's head has a soft-cap, and is not linear"
    for name in ("modules_to_save", "target_modules"):
        layers = [layer for value in space.reach(name) for layer in _layers(value)]
        touched = [layer for layer in layers if _is_head(layer, heads)]
        if touched:
            yield f"lora.{name}: {touched[0]} changes the student's head"


def _is_head(layer: str, heads: tuple[str, ...] | None) -> bool:
    """Is it a head that a setting means by such a name?"""
    return is_named(layer, HEADS) if heads is None else any(is_named(head, (layer,)) for head in heads)


def _temperatures(space: Space) -> list[float]:
    return sorted({float(value) for value in space.reach("temperature")}) if _is_taught(space) else [1.0]


def _is_taught(space: Space) -> bool:
    return bool({"kd", "neo"} & set(space.reach("method"))) and any(ratio > 0 for ratio in space.reach("kd_ratio"))


def _layers(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())

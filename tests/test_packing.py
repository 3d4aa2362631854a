"""Do packed sequences know nothing of each other, on any model? Reference: every sequence alone, and what PyTorch keeps.

Shape suffixes: B rows, L tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import SHAPE, make_llama
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from neo_ray import models
from neo_ray.data import Batch, collate
from neo_ray.losses import next_labels, scored
from neo_ray.memory import activation_bytes
from neo_ray.parts import Parts
from neo_ray.settings import ConfigError, TrainingConfig, TrialConfig
from neo_ray.shapes import shape_from_config

SOUND = {
    "llama": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=2)),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, dict(num_key_value_heads=2)),
    "absolute positions": (GPT2Config, GPT2LMHeadModel, {}),
    "sliding window": (MistralConfig, MistralForCausalLM, dict(num_key_value_heads=2, sliding_window=4)),
    "every other layer slides": (Gemma2Config, Gemma2ForCausalLM, dict(num_key_value_heads=2, head_dim=8, sliding_window=4)),
}
LEAKING = {
    "takes no position ids": (BloomConfig, BloomForCausalLM, {}),
    "the mask ignores position ids": (OPTConfig, OPTForCausalLM, dict(ffn_dim=64, word_embed_proj_dim=32)),
    "convolutional": (Lfm2Config, Lfm2ForCausalLM, dict(num_key_value_heads=2, layer_types=["conv", "full_attention"])),
}


def build(kind: tuple[Any, Any, dict[str, Any]], attention: str | None = None) -> Any:
    config, network, extra = kind
    torch.manual_seed(0)
    given = {"attn_implementation": attention} if attention else {}
    return network._from_config(config(**SHAPE, **extra), **given).eval().requires_grad_(False)


def examples(lengths: tuple[int, ...], seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every token labelled, the first one as well."""
    ids = [np.random.default_rng([seed, i]).integers(2, 96, n).astype(np.int32) for i, n in enumerate(lengths)]
    return [(ids_L, ids_L) for ids_L in ids]


def logits(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**models.inputs(model, batch.input_ids_BL, batch.attention_mask_BL, batch.position_ids_BL)).logits


LENGTHS = (11, 7, 1, 9)
LAYOUTS: dict[str, dict[str, Any]] = {"right": {}, "left": {"side": "left"}, "packed": {"packing": True}}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", SOUND)
def test_a_sequence_has_the_logits_that_it_has_alone(kind: str, layout: str, attention: str) -> None:
    if kind == "every other layer slides" and attention == "sdpa":
        attention = "eager"  # Gemma 2 caps its attention scores, which sdpa cannot
    model, pairs = build(SOUND[kind], attention), examples(LENGTHS)
    batch = collate(pairs, pad_id=0, **LAYOUTS[layout])
    found_LV = logits(model, batch)[batch.attention_mask_BL.bool() if batch.attention_mask_BL is not None else slice(None)]
    with torch.no_grad():
        alone = [model(input_ids=torch.from_numpy(ids)[None].long(), use_cache=False).logits[0] for ids, _ in pairs]
    torch.testing.assert_close(found_LV.reshape(-1, 96), torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SOUND)
def test_no_packed_token_sees_another_sequence(kind: str) -> None:
    model, pairs, others = build(SOUND[kind]), examples(LENGTHS), examples(LENGTHS, seed=1)
    pairs_LV = logits(model, collate(pairs, pad_id=0, packing=True))[0]
    for number, start in enumerate(np.cumsum([0, *LENGTHS[:-1]])):
        changed = [*pairs[:number], others[number], *pairs[number + 1 :]]
        changed_LV = logits(model, collate(changed, pad_id=0, packing=True))[0]
        same_L = (changed_LV == pairs_LV).all(dim=1)
        inside_L = torch.zeros(sum(LENGTHS), dtype=torch.bool)
        inside_L[start : start + LENGTHS[number]] = True
        assert same_L[~inside_L].all() and not same_L[inside_L].any()


@pytest.mark.parametrize("kind", SOUND)
def test_sound_models_may_be_packed(kind: str) -> None:
    models.prove_packing(build(SOUND[kind]), "student.model")


@pytest.mark.parametrize("reason", LEAKING)
def test_a_model_whose_packed_sequences_see_each_other_is_refused(reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^training\.packing: teacher\.model: .*{reason}.*packing: false"):
        models.prove_packing(build(LEAKING[reason]), "teacher.model")


def test_a_trial_with_packing_asks_for_the_proof_of_both_models() -> None:
    from neo_ray.train import _check_packing

    def check(student: Any, teacher: Any, method: str = "neo", packing: bool = True) -> None:
        parts = Parts(None, (), student, teacher, None, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
        _check_packing(parts, TrialConfig(method=method, training=TrainingConfig(packing=packing)))  # type: ignore[arg-type]

    sound, leaking = build(SOUND["llama"]), build(LEAKING["takes no position ids"])
    check(sound, sound)
    check(leaking, leaking, packing=False)
    check(sound, leaking, method="lora")  # its teacher only evaluates, unpacked
    for student, teacher, where in ((leaking, sound, "student"), (sound, leaking, "teacher")):
        with pytest.raises(ConfigError, match=f"training.packing: {where}.model"):
            check(student, teacher)


class CountsFromTwo(GPT2Model):
    def forward(self, input_ids: Any, position_ids: Any = None, **rest: Any) -> Any:
        positions_BL = torch.arange(2, 2 + input_ids.shape[1])[None] if position_ids is None else position_ids
        return super().forward(input_ids, position_ids=positions_BL, **rest)


def test_a_model_that_counts_positions_otherwise_is_refused() -> None:
    model = build(SOUND["absolute positions"])
    models._prove_head(model, "student.model")
    model.transformer.__class__ = CountsFromTwo
    with pytest.raises(ConfigError, match=r"^student\.model: GPT2LMHeadModel .*counts positions"):
        models._prove_head(model, "student.model")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_label_is_predicted_from_its_own_sequence_only(layout: str) -> None:
    pairs = examples(LENGTHS)
    batch = collate(pairs, pad_id=0, **LAYOUTS[layout])
    assert next_labels(batch.labels_BL).tolist() == [token for ids, _ in pairs for token in ids[1:]]
    seen_N = scored(batch.input_ids_BL[..., None], batch.labels_BL, 1)[:, 0]
    assert seen_N.tolist() == [token for ids, _ in pairs for token in ids[:-1]]
    positions_N = scored(batch.position_ids_BL[..., None], batch.labels_BL, 1)[:, 0]
    assert positions_N.tolist() == [position for n in LENGTHS for position in range(n - 1)]


@pytest.mark.parametrize("size", [4, 2])
def test_what_packing_keeps_for_the_backward_pass_is_counted(size: int) -> None:
    model = make_llama(4, seed=0)
    model.set_attn_implementation("sdpa")
    shape = shape_from_config(model.config.to_dict())
    assert shape is not None
    batch = collate(examples((80, 80, 80)), pad_id=0, packing=True)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (240, 240) or tensor.numel() % 240 == 0:  # divides no size of a weight
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=size == 2):
        model(**models.inputs(model, batch.input_ids_BL, None, batch.position_ids_BL))
    measured = sum(storage.nbytes() for storage in kept.values())
    trial = TrialConfig(method="sft")
    assert activation_bytes(240, trial, shape, size, mask_width=240) == pytest.approx(measured, rel=0.15)
    assert activation_bytes(240, trial, shape, size) < 0.85 * measured


def plan_of(**training: Any) -> Any:
    from neo_ray.loading import validate
    from neo_ray.plan import make_plan

    base = {"name": "demo", "teacher": {"model": "quickstart:smollm2-135m-instruct"}, "student": {"prune": {"keep": 20}}}
    data = {"source": "quickstart:owt", "max_length": 128}
    search = training.pop("search", {})
    return make_plan(validate({**base, "data": data, "search": search, "training": {"tokens": 10_000, **training}}))


def test_the_mask_counts_where_there_is_more_than_one_sequence_to_pack() -> None:
    def activations(**training: Any) -> int:
        return plan_of(**training).memory_bytes["activations"]

    assert activations(packing=True) == activations()
    assert activations(packing=True, micro_batch_size=4) > activations(micro_batch_size=4)
    assert activations(search={"packing": {"choice": [True, False]}}, micro_batch_size=4) == activations(
        packing=True, micro_batch_size=4
    )


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"packing": True, "micro_batch_size": 2, "padding_side": "left"}, "training.padding_side is ignored"),
        ({"packing": True}, "training.packing changes nothing"),
    ],
)
def test_what_packing_ignores_is_said(training: dict[str, Any], expected: str) -> None:
    assert expected in "\n".join(plan_of(**training).warnings)
    assert expected not in "\n".join(plan_of(packing=True, micro_batch_size=2).warnings)

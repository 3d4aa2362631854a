"""Reference: what transformers computes. Tiny random models, weights large enough for every step after the head to show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import World, make_llama, make_tokenizer
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from neo_ray import models
from neo_ray.models import Head, last_hidden, output_head
from neo_ray.settings import ConfigError

SHAPE = dict(tiny.SHAPE, num_key_value_heads=2, head_dim=8)
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, dict(final_logit_softcapping=5.0, sliding_window=4)),
    "cohere": (CohereConfig, CohereForCausalLM, dict(logit_scale=0.0625)),
    "granite": (GraniteConfig, GraniteForCausalLM, dict(logits_scaling=8.0)),
}


def build(architecture: str) -> Any:
    config, network, extra = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    return network(config(**SHAPE, **extra)).eval().requires_grad_(False)


def batch(vocabulary: int = 96, num_sequences: int = 2, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids, the second sequence padded on the right by 4."""
    ids_BL = torch.randint(2, vocabulary, (num_sequences, length), generator=torch.Generator().manual_seed(3))
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, -4:] = 0
    return ids_BL, mask_BL


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_of_last_hidden_is_the_models_logits(architecture: str) -> None:
    model = build(architecture)
    ids_BL, mask_BL = batch()
    expected_BLV = model(input_ids=ids_BL, attention_mask=mask_BL).logits
    found_BLV = output_head(model).logits(last_hidden(model, ids_BL, mask_BL), 96)
    torch.testing.assert_close(found_BLV, expected_BLV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "field"), [("gemma2", "soft_cap"), ("cohere", "logit_scale"), ("granite", "logit_scale")]
)
def test_soft_cap_and_scale_matter_in_these_models(architecture: str, field: str) -> None:
    model = build(architecture)
    ids_BL, _ = batch()
    head, hidden_BLH = output_head(model), last_hidden(model, ids_BL)
    plain = Head(head.weight_VH, head.bias_V)
    assert getattr(head, field) != getattr(plain, field)
    assert (head.logits(hidden_BLH, 96) - plain.logits(hidden_BLH, 96)).abs().max() > 0.5


def test_last_hidden_of_a_peft_model_has_its_adapters() -> None:
    ids_BL, mask_BL = batch()
    base_BLH = last_hidden(build("llama"), ids_BL, mask_BL)
    torch.manual_seed(1)
    adapted = get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    expected_BLV = adapted(input_ids=ids_BL, attention_mask=mask_BL).logits
    hidden_BLH = last_hidden(adapted, ids_BL, mask_BL)
    torch.testing.assert_close(output_head(adapted).logits(hidden_BLH, 96), expected_BLV, rtol=1e-5, atol=1e-5)
    assert (hidden_BLH - base_BLH).abs().max() > 0.01


def test_last_hidden_passes_gradients_to_the_adapter() -> None:
    adapted = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    last_hidden(adapted, *batch()).square().sum().backward()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert gradients and all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_logits_are_sliced_before_any_softmax_and_in_fp32() -> None:
    model = build("llama").to(torch.bfloat16)
    logits_BLV = output_head(model).logits(last_hidden(model, batch()[0]), 90)
    assert logits_BLV.shape[-1] == 90 and logits_BLV.dtype == torch.float32


def test_bias_and_soft_cap_are_applied_in_order() -> None:
    head = Head(torch.eye(3), torch.tensor([1.0, 2.0, 3.0]), soft_cap=2.0, logit_scale=0.5)
    torch.testing.assert_close(head.logits(torch.ones(1, 3), 2), 2 * torch.tanh(torch.tensor([[2.0, 3.0]]) * 0.5 / 2))


@pytest.mark.parametrize(
    "wrapping", [dict(target_modules=["q_proj", "lm_head"]), dict(target_modules=["q_proj"], modules_to_save=["lm_head"])]
)
def test_an_adapter_on_the_head_is_refused(wrapping: dict[str, Any]) -> None:
    adapted = get_peft_model(build("qwen2"), LoraConfig(r=2, **wrapping))
    with pytest.raises(ConfigError, match="lora.target_modules"):
        output_head(adapted)


def test_a_head_with_an_unknown_twist_is_refused(tmp_path: Path) -> None:
    """HyperCLOVA X multiplies by `logits_scaling`, which Granite divides by."""
    torch.manual_seed(0)
    HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**SHAPE, logits_scaling=4.0)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="teacher.model: HyperCLOVAXForCausalLM"):
        models.load_model(str(tmp_path), torch.float32, where="teacher.model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_frozen_and_in_the_asked_dtype(tiny_world: World, dtype: torch.dtype) -> None:
    model = models.load_model(str(tiny_world.teacher), dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training and model.config.use_cache is False


def test_tied_weights_stay_tied_and_are_not_missed(tmp_path: Path) -> None:
    make_llama(2, seed=0, tied=True).save_pretrained(tmp_path)
    model = models.load_model(str(tmp_path), torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_pickled_weights_are_refused(tiny_world: World, tmp_path: Path) -> None:
    shutil.copytree(tiny_world.student, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "model" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ConfigError, match="student.model: .* holds no .*safetensors"):
        models.load_model(str(tmp_path / "model"), torch.float32, where="student.model")


def test_missing_weights_are_refused_not_drawn_at_random(tiny_world: World, tmp_path: Path) -> None:
    shutil.copytree(tiny_world.student, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"lacks weights: model\.layers\.2"):
        models.load_model(str(tmp_path / "model"), torch.float32)


def test_a_truncated_weights_file_is_a_config_error(tiny_world: World, tmp_path: Path) -> None:
    shutil.copytree(tiny_world.student, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="student.model: .* is no whole safetensors file"):
        models.load_model(str(tmp_path / "model"), torch.float32, where="student.model")


@pytest.mark.parametrize(
    "load", [models.load_tokenizer, models.read_config, lambda m, where: models.load_model(m, torch.float32, where=where)]
)
def test_what_cannot_be_found_is_named_with_its_cause(load: Any, tiny_world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.model: there is no folder .*/techer; did you mean .*/teacher\?"):
        load(str(tiny_world.teacher.parent / "techer"), where="teacher.model")
    with pytest.raises(ConfigError, match=r"teacher\.model: the folder .* holds no config\.json"):
        load(str(tmp_path), where="teacher.model")
    with pytest.raises(ConfigError, match=r"teacher\.model: some-one/some-model is no local folder, .* hub cannot be reached"):
        load("some-one/some-model", where="teacher.model")


def test_errors_leave_progress_bars_as_they_were(tiny_world: World) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    with pytest.raises(ConfigError):
        models.load_tokenizer("some-one/some-model")
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    models.load_tokenizer(str(tiny_world.teacher))
    assert not logging.is_progress_bar_enabled()


def test_a_config_needs_no_weights(tiny_world: World, tmp_path: Path) -> None:
    shutil.copy(tiny_world.teacher / "config.json", tmp_path)
    assert models.read_config(str(tmp_path)).vocab_size == 512


def test_a_tokenizer_that_pads_apart_from_its_end_is_left_alone(tiny_world: World) -> None:
    tokenizer = models.load_tokenizer(str(tiny_world.teacher))
    assert (tokenizer.pad_token, tokenizer.eos_token, len(tokenizer)) == ("<|pad|>", "<|end|>", 512)


@pytest.mark.parametrize("pad", [None, "<|end|>"])
def test_pad_moves_off_the_end_token_without_a_new_row(tiny_world: World, tmp_path: Path, pad: str | None) -> None:
    assert _reloaded(tiny_world, tmp_path, pad).pad_token == "<|pad|>"
    assert len(_reloaded(tiny_world, tmp_path, pad)) == 512


def test_pad_stays_where_no_other_special_token_exists(tiny_world: World, tmp_path: Path) -> None:
    tokenizer = _reloaded(tiny_world, tmp_path, "<|end|>", rename={"<|pad|>": "<|something|>"})
    assert tokenizer.pad_token == "<|end|>" and len(tokenizer) == 512


def _reloaded(world: World, folder: Path, pad: str | None, rename: dict[str, str] | None = None) -> Any:
    """The tiny tokenizer after its files were edited: another pad token, tokens renamed."""
    target = shutil.copytree(world.teacher, folder / "edited", dirs_exist_ok=True)
    for path in (target / "tokenizer.json", target / "tokenizer_config.json"):
        text = path.read_text(encoding="utf-8")
        for old, new in (rename or {}).items():
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
    settings = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": pad}))
    return models.load_tokenizer(str(target))


def test_equal_tokenizers_share_all_ids_whatever_the_padding_rows() -> None:
    teacher, student = make_tokenizer(), make_tokenizer()
    assert models.prove_shared_vocabulary(teacher, student, 512, 512) == 512
    assert models.prove_shared_vocabulary(teacher, student, 640, 520) == 512


def test_the_first_differing_id_is_named_with_both_tokens(tiny_world: World, tmp_path: Path) -> None:
    teacher = AutoTokenizer.from_pretrained(tiny_world.teacher)
    student = _reloaded(tiny_world, tmp_path, None, rename={"<|end|>": "<|stop|>"})
    with pytest.raises(
        ConfigError, match=r"student\.model: .* id 1 is '<\|end\|>' to the teacher and '<\|stop\|>' to the student"
    ):
        models.prove_shared_vocabulary(teacher, student, 512, 512)


def test_an_added_token_on_one_side_is_refused_and_on_both_counts() -> None:
    teacher, student = make_tokenizer(), make_tokenizer()
    teacher.add_tokens([AddedToken("<tool>", special=True)])
    with pytest.raises(ConfigError, match=r"id 512 is '<tool>' to the teacher and no token to the student \(sizes 513 and 512\)"):
        models.prove_shared_vocabulary(teacher, student, 600, 600)
    student.add_tokens([AddedToken("<tool>", special=True)])
    assert models.prove_shared_vocabulary(teacher, student, 600, 600) == 513


def test_a_token_without_an_embedding_row_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"student\.model: has 500 embedding rows, too few for .* id 511"):
        models.prove_shared_vocabulary(make_tokenizer(), make_tokenizer(), 512, 500)

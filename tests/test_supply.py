"""Is the teacher stored where that is exact for the whole search space, and alive where not?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import BloomConfig, GPT2Config, GPTNeoXConfig, LlamaConfig

from neo_ray.loading import validate
from neo_ray.parts import ModelSource, Sources
from neo_ray.prepare import supply_of
from neo_ray.settings import ConfigError
from neo_ray.space import build_space
from neo_ray.supply import Supply, choose, row_bytes

TINY: dict[str, Any] = dict(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)


def supply(soft_cap: float | None = None, mode: str = "auto", heads: tuple[str, ...] | None = None, **sections: Any) -> Supply:
    given: dict[str, Any] = {"teacher": {"model": "./big"}, "student": {"model": "./small"}, "data": {"source": "./text.jsonl"}}
    config = validate({"name": "tried", **given, "targets": {"mode": mode}, **sections})
    return choose(config, build_space(config), soft_cap, heads)


def test_forward_kl_at_one_temperature_takes_the_projection_at_that_temperature() -> None:
    found = supply(distill={"temperature": 2.0}, search={"rank": {"choice": [2, 4]}, "kd_ratio": {"uniform": [0, 1]}})
    assert (found.mode, found.temperature) == ("projection", 2.0)
    assert supply(method="lora", mode="projection", distill={"temperature": 2.0}).temperature == 1.0, "nothing is trained with it"


@pytest.mark.parametrize("sections", [{"method": "lora"}, {"method": "sft"}, {"distill": {"kd_ratio": 0}}])
def test_where_no_trial_trains_on_the_teacher_s_word_it_is_not_stored(sections: dict[str, Any]) -> None:
    assert supply(**sections).mode == "live" and "no trial trains on" in supply(**sections).why


def test_the_store_has_the_precision_of_the_trials() -> None:
    assert supply(search={"dtype": {"value": "bf16"}}).dtype == "bf16"
    assert supply(training={"steps": 3, "dtype": "fp32"}).dtype == "fp32" and supply().dtype == "auto"


AGAINST: dict[str, dict[str, Any]] = {
    "method kd trains": {"search": {"method": {"grid": ["lora", "kd"]}}},
    "method sft trains": {"search": {"method": {"grid": ["neo", "sft"]}}},
    "divergence jsd": {"distill": {"divergence": "jsd"}},
    "divergence reverse_kl": {"search": {"divergence": {"grid": ["forward_kl", "reverse_kl"]}}},
    "temperature is searched": {"search": {"temperature": {"uniform": [1, 3]}}},
    "soft-cap": {"soft_cap": 30.0},
    "modules_to_save: lm_head": {"lora": {"modules_to_save": ["lm_head"]}},
    "modules_to_save: model.embed_tokens": {"lora": {"modules_to_save": ["model.embed_tokens"]}},
    "target_modules: lm_head": {"search": {"target_modules": {"grid": ["all-linear", ["q_proj", "lm_head"]]}}},
}


ARCHITECTURES: dict[str, tuple[Any, str]] = {
    "tied, word_embeddings": (BloomConfig(vocab_size=96, hidden_size=32, n_head=4, n_layer=1), "word_embeddings"),
    "apart, embed_in": (GPTNeoXConfig(**TINY, intermediate_size=64, tie_word_embeddings=False), "embed_in"),
    "apart, lm_head": (LlamaConfig(**TINY, intermediate_size=64, tie_word_embeddings=False), "lm_head"),
    "tied, embed_tokens": (LlamaConfig(**TINY, intermediate_size=64, tie_word_embeddings=True), "embed_tokens"),
    "apart, embed_tokens": (LlamaConfig(**TINY, intermediate_size=64, tie_word_embeddings=False), "embed_tokens"),
    "tied, wte": (GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4), "wte"),
    "apart, norm": (LlamaConfig(**TINY, intermediate_size=64, tie_word_embeddings=False), "norm"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_trained_embedding_is_the_head_exactly_where_the_model_ties_them(name: str, tmp_path: Path) -> None:
    """Whatever it is called: the model is asked."""
    shape, layer = ARCHITECTURES[name]
    shape.save_pretrained(tmp_path)
    sections = {"student": {"model": str(tmp_path)}, "teacher": {"model": str(tmp_path)}, "data": {"source": "./text.jsonl"}}
    config = validate({"name": "tried", **sections, "lora": {"modules_to_save": [layer]}})
    found = supply_of(config, Sources(ModelSource(str(tmp_path)), "data"))
    assert found.mode == ("hidden" if name.startswith("tied") or layer == "lm_head" else "projection"), found.why


@pytest.mark.parametrize("layer", ["word_embeddings", "transformer.word_embeddings", "embed_in", "tok_embeddings", "wte"])
def test_before_the_model_is_known_a_trained_embedding_counts_as_the_head(layer: str) -> None:
    assert supply(lora={"modules_to_save": [layer]}).mode == "hidden"


@pytest.mark.parametrize("why", AGAINST)
def test_what_a_projection_does_not_hold_takes_the_hidden_state_and_says_why(why: str) -> None:
    found = supply(**AGAINST[why])
    assert found.mode == "hidden" and why in found.why
    with pytest.raises(ConfigError, match=r"targets.mode: projection is not exact here: .*; allowed: hidden, live, auto"):
        supply(mode="projection", **AGAINST[why])


ALIVE: dict[str, dict[str, Any]] = {
    "dtype is searched": {"search": {"dtype": {"grid": ["fp32", "bf16"]}}},
    "hidden states of a living teacher": {"search": {"alignment_weight": {"grid": [0, 1]}}},
    "placement": {"teacher": {"model": "./big", "placement": "offloaded"}},
}


@pytest.mark.parametrize("why", ALIVE)
def test_what_no_store_can_serve_keeps_the_teacher_alive(why: str) -> None:
    assert supply(**ALIVE[why]).mode == "live" and why in supply(**ALIVE[why]).why
    for mode in ("projection", "hidden", "topk"):
        with pytest.raises(ConfigError, match=f"targets.mode: {mode} cannot be: .*{why}"):
            supply(mode=mode, **ALIVE[why])


def test_what_is_asked_for_is_taken() -> None:
    assert [supply(mode=mode).mode for mode in ("live", "projection", "hidden")] == ["live", "projection", "hidden"]
    assert supply(teacher=None, method="lora").mode == "live"


def test_a_row_s_bytes() -> None:
    assert (row_bytes("projection", 2048), row_bytes("hidden", 4096), row_bytes("topk", 64)) == (4100, 8192, 388)


def test_top_k_serves_every_head_and_divergence_at_one_temperature_and_is_never_taken_by_itself() -> None:
    sections: dict[str, Any] = {
        "search": {"method": {"grid": ["neo", "kd"]}},
        "distill": {"divergence": "jsd", "temperature": 2.0},
    }
    found = supply(mode="topk", **sections)
    assert (found.mode, found.temperature, found.top_k) == ("topk", 2.0, 64) and "lower bounds" in found.why
    assert supply(**sections).mode == "hidden"
    with pytest.raises(ConfigError, match="targets.mode: topk cannot be: distill.temperature is searched"):
        supply(mode="topk", search={"temperature": {"uniform": [1, 3]}})

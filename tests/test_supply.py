"""Is the teacher stored where that is exact for the whole search space, and alive where not?"""

from __future__ import annotations

from typing import Any

import pytest

from neo_ray.loading import validate
from neo_ray.settings import ConfigError
from neo_ray.space import build_space
from neo_ray.supply import Supply, choose, row_bytes


def supply(soft_cap: float | None = None, mode: str = "auto", **sections: Any) -> Supply:
    given: dict[str, Any] = {"teacher": {"model": "./big"}, "student": {"model": "./small"}, "data": {"source": "./text.jsonl"}}
    config = validate({"name": "tried", **given, "targets": {"mode": mode}, **sections})
    return choose(config, build_space(config), soft_cap)


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

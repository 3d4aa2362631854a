"""Are exactly the right trials possible, and does every sampled setting survive the way to Optuna and back?"""

from __future__ import annotations

import json
import warnings
from typing import Any

import optuna
import pytest

from neo_ray.config import SweepConfig
from neo_ray.loading import validate
from neo_ray.records import TrialRecord
from neo_ray.settings import ConfigError
from neo_ray.space import Space, build_space
from neo_ray.trials import differences, grid_settings, identity, settings_to_run, trials_planned

optuna.logging.set_verbosity(optuna.logging.WARNING)


def sweep(search: dict[str, Any] | None = None, **sections: Any) -> SweepConfig:
    base = {"name": "demo", "teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"source": "d"}}
    return validate({**base, **sections, "search": search or {}})


def space_of(search: dict[str, Any], **sections: Any) -> Space:
    return build_space(sweep(search, **sections))


RICH = {
    "rank": {"choice": [8, 16, 32]},
    "alpha": {"of": "rank", "times": 2},
    "lora.target_modules": {"choice": ["all-linear", ["q_proj", "v_proj"]]},
    "learning_rate": {"log_uniform": ["1e-5", "1e-3"]},
    "method": {"choice": ["lora", "neo"]},
    "kd_ratio": {"quantised": [0, 1, 0.1], "when": {"method": ["kd", "neo"]}},
    "divergence": {"choice": ["forward_kl", "jsd"], "when": {"method": "neo"}},
    "temperature": {"uniform": [1, 4], "when": {"divergence": "jsd"}},
    "batch_size": {"quantised": [4, 17, 4]},
    "weight_decay": {"int_uniform": [0, 3]},
    "gradient_checkpointing": {"grid": [False, True]},
    "beta1": 0.8,
}


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ({"rnak": {"choice": [1]}}, "search.rnak: unknown axis (did you mean `rank`?); allowed: method, rank, "),
        ({"lora.rnak": {"choice": [1]}}, "search.lora.rnak: unknown axis (did you mean `lora.rank`?)"),
        ({"max_tokens": {"choice": [1]}}, "search.max_tokens: unknown axis"),
        ({"rank": {"choice": [8]}, "lora.rank": {"choice": [8]}}, "search.lora.rank: the same axis as search.rank"),
        ({"rank": {"choice": [0]}}, "search.rank: Input should be greater than or equal to 1 (got 0)"),
        ({"rank": {"choice": ["fast"]}}, "search.rank: Input should be a valid integer"),
        ({"rank": {"choice": [True]}}, "search.rank: must not be true or false"),
        ({"rank": {"choice": [8, "8"]}}, "search.rank: the value 8 stands twice"),
        ({"rank": None}, "search.rank: null is not a value"),
        ({"variant": {"choice": ["dorra"]}}, "(got 'dorra') (did you mean `dora`?)"),
        ({"kd_ratio": {"uniform": [0, 2]}}, "search.kd_ratio: Input should be less than or equal to 1 (got 2.0)"),
        ({"rank": {"int_uniform": [0, 8]}}, "search.rank: Input should be greater than or equal to 1 (got 0)"),
        ({"rank": {"uniform": [1, 64]}}, "search.rank: rank is a whole number, and `uniform` is not; use int_uniform: [1, 64]"),
        ({"rank": {"log_uniform": [1, 64]}}, "search.rank: rank is a whole number, and `log_uniform` is not; use choice"),
        ({"rank": {"quantised": [1, 9, 0.5]}}, "search.rank: rank is a whole number; low 1 and step 0.5"),
        ({"variant": {"uniform": [0, 1]}}, "search.variant: `uniform` needs a number"),
        ({"target_modules": {"choice": [5]}}, "search.target_modules: must be text"),
        ({"epochs": {"choice": [1]}, "tokens": {"choice": [100]}}, "a trial has one length, and epochs and tokens are axes"),
    ],
)
def test_an_axis_is_checked_against_its_leaf(search: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space_of(search)
    assert str(caught.value).startswith(expected) or expected in str(caught.value)


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ({"alpha": {"of": "rnak"}}, "search.alpha.of: unknown axis (did you mean `rank`?)"),
        ({"alpha": {"of": "rank"}, "rank": {"of": "alpha"}}, "depends on itself (alpha → rank → alpha)"),
        ({"rank": {"of": "rank"}}, "search.rank: depends on itself (rank → rank)"),
        (
            {"rank": {"of": "alpha", "times": 0.5}, "alpha": {"choice": [4, 3]}},
            "search.rank: 0.5 × alpha is 1.5 where alpha is 3",
        ),
        ({"rank": {"of": "alpha"}, "alpha": {"uniform": [3, 4]}}, "rank is a whole number, and alpha, which it derives from"),
        ({"rank": {"of": "alpha", "plus": -9}, "alpha": {"choice": [8]}}, "search.rank: alpha − 9: Input should be greater"),
        (
            {"kd_ratio": {"of": "temperature"}, "temperature": {"uniform": [1, 4]}},
            "search.kd_ratio: temperature: Input should be",
        ),
        ({"alpha": {"of": "variant"}}, "search.alpha.of: variant is not a number"),
        ({"variant": {"of": "rank"}}, "search.variant: variant is not a number"),
        ({"alpha": {"of": "tokens"}}, "search.alpha.of: tokens has no value"),
        ({"rank": {"choice": [8], "when": {"metod": "neo"}}}, "search.rank.when: unknown axis (did you mean `method`?)"),
        ({"rank": {"choice": [8], "when": {"method": "nea"}}}, "search.rank.when.method: Input should be"),
        ({"rank": {"choice": [8], "when": {"method": []}}}, "search.rank.when.method: is empty"),
        (
            {"rank": {"choice": [8], "when": {"variant": "dora"}}, "variant": {"choice": ["lora", "rslora"]}},
            "search.rank.when.variant: dora is never taken",
        ),
        (
            {"rank": {"choice": [8], "when": {"learning_rate": 1e-4}}, "learning_rate": {"log_uniform": [1e-5, 1e-3]}},
            "search.rank.when.learning_rate: compares for equality",
        ),
        (
            {"rank": {"choice": [8], "when": {"variant": "dora"}}, "variant": {"choice": ["dora"], "when": {"rank": 8}}},
            "search.rank: depends on itself (rank → variant → rank)",
        ),
    ],
)
def test_derived_and_conditional_axes_are_checked(search: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space_of(search)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("search", "sections", "expected"),
    [
        ({"learning_rate": {"uniform": [1e-5, 1e-3]}}, {"sampler": {"name": "grid"}}, "search.learning_rate: a grid sweep needs"),
        ({"seed": {"choice": [1]}}, {"sampler": {"name": "grid", "seeds": [1, 2]}}, "sampler.seeds: `seed` is an axis already"),
        ({}, {"sampler": {"name": "grid", "seeds": [1, 1]}}, "sampler.seeds: a seed stands twice"),
        (
            {"method": {"choice": ["lora", "kd"]}},
            {"teacher": None, "method": "lora"},
            "search.method: kd needs a `teacher` section",
        ),
    ],
)
def test_the_space_fits_the_sweep(search: dict[str, Any], sections: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space_of(search, **sections)
    assert expected in str(caught.value)


def test_values_take_the_types_of_their_leaves() -> None:
    axes = space_of({"lora.rank": {"choice": ["8", 16.0]}, "learning_rate": {"choice": ["1e-4"]}, "alpha": {"grid": [8]}}).axes
    assert repr(axes["rank"].values) == "(8, 16)"
    assert repr(axes["learning_rate"].values) == "(0.0001,)"
    assert repr(axes["alpha"].values) == "(8.0,)"


def test_the_grid_is_every_combination_once_the_first_axis_slowest() -> None:
    space = space_of({"rank": {"choice": [8, 16]}, "alpha": {"of": "rank", "times": 2}, "variant": {"grid": ["lora", "dora"]}})
    assert space.grid() == [
        {"rank": 8, "alpha": 16.0, "variant": "lora"},
        {"rank": 8, "alpha": 16.0, "variant": "dora"},
        {"rank": 16, "alpha": 32.0, "variant": "lora"},
        {"rank": 16, "alpha": 32.0, "variant": "dora"},
    ]


def test_a_conditional_axis_multiplies_only_where_it_exists() -> None:
    search = {
        "kd_ratio": {"grid": [0, 0.5], "when": {"method": ["kd", "neo"]}},
        "divergence": {"choice": ["forward_kl", "jsd"], "when": {"kd_ratio": 0.5}},
        "method": {"choice": ["lora", "neo"]},
        "learning_rate": {"choice": [1e-4, 2e-4, 3e-4]},
    }
    space = space_of(search)
    grid = space.grid()
    # lora: 3 rates; neo: kd_ratio 0 with 3, 0.5 with 2 divergences × 3
    assert len(grid) == space.size() == 3 + 3 + 6
    assert len({json.dumps(params, sort_keys=True) for params in grid}) == len(grid)
    assert all(("kd_ratio" in p) == (p["method"] == "neo") for p in grid)
    assert all(("divergence" in p) == (p.get("kd_ratio") == 0.5) for p in grid)


METHOD_RATES = {
    "method": {"grid": ["sft", "lora", "neo"]},
    "full_rate": {"sets": "learning_rate", "grid": ["2e-6", "2e-5"], "when": {"method": "sft"}},
    "lora_rate": {"sets": "training.learning_rate", "log_uniform": ["1e-5", "1e-3"], "when": {"method": "lora"}},
}


def test_two_axes_set_one_leaf_where_their_conditions_exclude_each_other() -> None:
    config = sweep(METHOD_RATES, training={"learning_rate": 0.5})
    space = build_space(config)
    full, low = {"method": "sft", "full_rate": 2e-6}, {"method": "lora", "lora_rate": 3e-4}
    assert space.trial_config(full, config.trial).training.learning_rate == 2e-6
    assert space.trial_config(low, config.trial).training.learning_rate == 3e-4
    assert space.trial_config({"method": "neo"}, config.trial).training.learning_rate == 0.5
    assert list(space.distributions(full)) == ["method", "full_rate"]
    assert space.optuna_params(low) == low
    assert sorted(space.reach("learning_rate")) == [2e-6, 1e-5, 2e-5, 1e-3, 0.5]
    assert space.searched == ("method", "full_rate", "lora_rate")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        params = space.define(study.ask())
        assert set(params) - {"method"} == {"sft": {"full_rate"}, "lora": {"lora_rate"}, "neo": set()}[params["method"]]


def test_a_leaf_of_two_axes_can_be_derived_from_and_asked_for() -> None:
    search = {
        **METHOD_RATES,
        "lora_rate": {"sets": "learning_rate", "grid": ["2e-5", "2e-4"], "when": {"method": ["lora", "neo"]}},
        "beta1": {"of": "learning_rate", "times": 100},
        "weight_decay": {"grid": [0, 0.1], "when": {"learning_rate": ["2e-5"]}},
    }
    space = space_of(search)
    grid = space.grid()
    assert all(p["beta1"] == pytest.approx(100 * (p.get("full_rate") or p["lora_rate"])) for p in grid)
    assert all(("weight_decay" in p) == (2e-5 in (p.get("full_rate"), p.get("lora_rate"))) for p in grid)
    assert len(grid) == space.size() == 3 * 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora_rate": {"sets": "learning_rate", "grid": [1e-4]}}, "search.lora_rate: sets learning_rate as search.full_rate"),
        (
            {"lora_rate": {"sets": "learning_rate", "grid": [1e-4], "when": {"method": ["sft", "lora"]}}},
            "search.lora_rate: sets learning_rate as search.full_rate does, and both may be active",
        ),
        ({"learning_rate": {"grid": [1e-4], "when": {"method": ["sft"]}}}, "search.learning_rate: sets learning_rate as search"),
        (
            {"full_rate": {"sets": "learning_rat", "grid": [1e-4]}},
            "search.full_rate.sets: unknown axis (did you mean `learning_rate`",
        ),
        ({"alpha": {"sets": "learning_rate", "grid": [1e-4]}}, "search.alpha: sets learning_rate; its own name must be"),
        ({"a b": {"sets": "learning_rate", "grid": [1e-4]}}, "search.a b: sets learning_rate; its own name must be"),
        ({"full_rate": {"sets": "learning_rate", "grid": [-1], "when": {"method": "sft"}}}, "search.full_rate: Input should be"),
    ],
)
def test_axes_of_one_leaf_are_checked(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space_of({**METHOD_RATES, **changes})
    assert expected in str(caught.value)


def test_an_axis_stands_after_those_it_depends_on() -> None:
    search = {"alpha": {"of": "rank", "times": 2}, "rank": {"of": "batch_size"}, "batch_size": {"choice": [4]}}
    space = space_of(search)
    assert list(space.axes) == ["batch_size", "rank", "alpha"]
    assert space.grid() == [{"batch_size": 4, "rank": 4, "alpha": 8.0}]


def test_size_counts_without_walking_the_grid() -> None:
    million = {"int_uniform": [1, 10**6]}
    assert space_of({"rank": million, "seed": million, "alpha": {"of": "rank"}}).size() == 10**12
    assert space_of({"rank": million, "learning_rate": {"uniform": [0.1, 0.2]}}).size() is None
    assert space_of({}).size() == 1


def test_a_derived_axis_follows_the_file_where_its_source_is_inactive() -> None:
    search = {
        "rank": {"choice": [4], "when": {"variant": "dora"}},
        "variant": {"choice": ["lora", "dora"]},
        "alpha": {"of": "rank"},
    }
    grid = space_of(search, lora={"rank": 10}).grid()
    assert {p["variant"]: p["alpha"] for p in grid} == {"lora": 10.0, "dora": 4.0}


def test_a_condition_may_name_a_leaf_of_the_file() -> None:
    search = {"rank": {"choice": [4, 8], "when": {"variant": "dora"}}}
    assert space_of(search, lora={"variant": "dora"}).size() == 2
    off = space_of(search)
    assert (off.size(), off.searched) == (1, ())


def test_a_quantised_axis_ends_on_its_last_step_and_has_round_numbers() -> None:
    assert list(space_of({"kd_ratio": {"quantised": [0, 0.35, 0.1]}}).axes["kd_ratio"].options()) == [0.0, 0.1, 0.2, 0.3]
    assert [p["rank"] for p in space_of({"rank": {"quantised": [4, 17, 4]}}).grid()] == [4, 8, 12, 16]


def test_only_sampled_axes_with_a_choice_are_searched() -> None:
    space = space_of({**RICH, "max_grad_norm": {"choice": [1]}, "dropout": {"uniform": [0.1, 0.1]}})
    assert set(space.searched) == set(RICH) - {"alpha", "beta1", "lora.target_modules"} | {"target_modules"}


@pytest.mark.parametrize(
    "sampler", [optuna.samplers.TPESampler(seed=1, n_startup_trials=5), optuna.samplers.RandomSampler(seed=1)]
)
def test_a_sampled_setting_survives_the_way_to_optuna_and_back(sampler: optuna.samplers.BaseSampler) -> None:
    config = sweep(RICH)
    space = build_space(config)
    study, copy = optuna.create_study(sampler=sampler), optuna.create_study()
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Optuna warns of choices that its storages cannot hold
        for number in range(40):
            trial = study.ask()
            params = json.loads(json.dumps(space.define(trial)))  # as a journal gives them back
            assert space.distributions(params) == trial.distributions
            assert space.optuna_params(params) == trial.params
            finished = optuna.trial.create_trial(
                params=space.optuna_params(params), distributions=space.distributions(params), value=float(number)
            )
            copy.add_trial(finished)
            assert space.define(optuna.trial.FixedTrial(finished.params)) == params
            resolved = space.trial_config(params, config.trial)
            assert resolved.lora.alpha == 2 * resolved.lora.rank
            assert resolved.training.beta1 == 0.8
            seen.add((params["method"], params.get("divergence")))
            study.tell(trial, float(number))
    assert seen == {("lora", None), ("neo", "forward_kl"), ("neo", "jsd")}


def test_every_grid_setting_is_one_that_optuna_could_have_drawn() -> None:
    finite = {k: v for k, v in RICH.items() if k not in ("learning_rate", "temperature")}
    space = space_of(finite)
    grid = space.grid()
    assert len(grid) == space.size()
    for params in grid[:: len(grid) // 200]:
        assert space.define(optuna.trial.FixedTrial(space.optuna_params(params))) == params


def test_a_value_outside_its_axis_has_no_place_in_the_study() -> None:
    space = space_of({"rank": {"choice": [8, 16]}, "learning_rate": {"log_uniform": [1e-5, 1e-3]}})
    with pytest.raises(ConfigError, match=r"search.rank: 32 is not one of 8, 16"):
        space.optuna_params({"rank": 32, "learning_rate": 1e-4})
    with pytest.raises(ConfigError, match=r"search.learning_rate: 1(\.0)? is not within"):
        space.optuna_params({"rank": 8, "learning_rate": 1.0})
    with pytest.raises(ConfigError, match="learning_rate is missing"):
        space.distributions({"rank": 8})


def test_a_trial_config_has_the_params_and_the_rest_of_the_file() -> None:
    config = sweep({"rank": {"choice": [8]}}, training={"learning_rate": 3e-4}, lora={"dropout": 0.1})
    trial = build_space(config).trial_config({"rank": 8, "target_modules": ["q_proj"], "method": "lora"}, config.trial)
    assert (trial.lora.rank, trial.lora.dropout, trial.lora.target_modules) == (8, 0.1, ("q_proj",))
    assert (trial.training.learning_rate, trial.method) == (3e-4, "lora")


@pytest.mark.parametrize(("params", "expected"), [({"rank": 0}, "lora.rank: "), ({"rnak": 1}, "params: unknown axis")])
def test_params_that_make_no_trial_are_refused(params: dict[str, Any], expected: str) -> None:
    config = sweep()
    with pytest.raises(ConfigError) as caught:
        build_space(config).trial_config(params, config.trial)
    assert str(caught.value).startswith(expected)


def test_an_axis_of_one_length_replaces_the_length_of_the_file() -> None:
    config = sweep({"tokens": {"choice": [1000, 2000]}}, training={"epochs": 3})
    space = build_space(config)
    training = space.trial_config(space.grid()[0], config.trial).training
    assert (training.tokens, training.epochs, training.steps) == (1000, None, None)


def test_the_number_of_trials_follows_sampler_seeds_and_limit() -> None:
    search = {"rank": {"choice": [4, 8, 16]}}
    for sampler, expected in [
        ({"name": "grid"}, 3),
        ({"name": "grid", "seeds": [5, 6]}, 6),
        ({"name": "grid", "seeds": [5, 6], "num_trials": 4}, 4),
        ({"name": "grid", "num_trials": 100}, 3),
        ({"name": "tpe"}, 16),
        ({"name": "random", "num_trials": 5}, 5),
    ]:
        config = sweep(search, sampler=sampler)
        space = build_space(config)
        assert trials_planned(config, space) == expected
        if config.sampler.name == "grid":
            assert len(grid_settings(config, space)) == expected
    nothing = sweep()
    assert trials_planned(nothing, build_space(nothing)) == 1


def test_grid_settings_run_all_settings_with_one_seed_before_the_next() -> None:
    config = sweep({"rank": {"choice": [4, 8]}}, sampler={"name": "grid", "seeds": [5, 6]})
    assert grid_settings(config, build_space(config)) == [({"rank": r}, s) for s in (5, 6) for r in (4, 8)]
    plain_seed = sweep({"rank": {"choice": [4]}}, sampler={"name": "grid"}, seed=3)
    assert grid_settings(plain_seed, build_space(plain_seed)) == [({"rank": 4}, 3)]
    seed_axis = sweep({"seed": {"choice": [1, 2]}}, sampler={"name": "grid"})
    assert [seed for _, seed in grid_settings(seed_axis, build_space(seed_axis))] == [1, 2]


def test_a_sweep_may_be_extended_but_its_trials_keep_their_meaning() -> None:
    search = {"rank": {"choice": [4, 8]}, "learning_rate": {"log_uniform": [1e-5, 1e-3]}}
    old = sweep(search, sampler={"num_trials": 4}, seed=1)
    more = sweep(
        {"lora.rank": {"grid": ["4", 8.0]}, "learning_rate": {"log_uniform": ["1e-5", "1e-3"]}},
        name="other",
        sampler={"name": "random", "num_trials": 40},
        scheduler={"name": "none"},
        resources={"workers_per_trial": 2},
        storage={"path": "/elsewhere"},
        seed=1,
    )
    assert differences(old, more) == []
    json.dumps(identity(old))  # it is stored

    changed = sweep({"rank": {"choice": [4, 16]}}, training={"epochs": 2}, data={"source": "e"}, seed=1)
    assert differences(old, changed) == [
        "data.source: d → e",
        "training.epochs: 1 → 2",
        "search.rank: one of 4, 8 → one of 4, 16",
        "search.learning_rate: 1e-05 … 0.001, log scale → (nothing)",
    ]


@pytest.mark.parametrize(
    "section",
    [
        {"teacher": {"model": "t", "revision": "abc"}},
        {"student": {"model": "other"}},
        {"method": "lora"},
        {"lora": {"rank": 3}},
        {"distill": {"kd_ratio": 0.9}},
        {"deepspeed": {"zero_stage": 3}},
        {"evaluation": {"points": 7}},
        {"objective": {"metric": "select_kl"}},
        {"seed": 9},
    ],
)
def test_what_a_trial_means_is_part_of_the_identity(section: dict[str, Any]) -> None:
    found = differences(sweep(), sweep(**section))
    assert len(found) == 1
    assert found[0].startswith(next(iter(section)))


def test_every_axis_is_described_in_one_line() -> None:
    lines = dict(line.split(maxsplit=1) for line in space_of(RICH).describe())
    assert lines["alpha"] == "2 × rank"
    assert lines["learning_rate"] == "1e-05 … 0.001, log scale"
    assert lines["target_modules"] == "one of all-linear, [q_proj, v_proj]"
    assert lines["kd_ratio"] == "0 … 1 in steps of 0.1, where method is kd or neo"
    assert lines["batch_size"] == "4 … 16 in steps of 4"
    assert lines["beta1"] == "always 0.8"
    assert len(lines) == len(RICH)


def test_what_is_left_of_a_grid_is_told_by_its_settings_and_not_by_their_number() -> None:
    config = sweep({"rank": {"grid": [2, 4]}}, sampler={"name": "grid", "seeds": [3, 4]})
    space = build_space(config)
    earlier = [
        TrialRecord(id=f"000{i}", state="COMPLETE", params={"rank": r}, seed=s)
        for i, (r, s) in enumerate([(2, 1), (4, 1), (2, 3)])
    ]
    stopped = TrialRecord(id="0003", params={"rank": 4}, seed=2)
    given, remaining = settings_to_run(config, space, [*earlier, stopped])
    assert given == [("0003", {"rank": 4}, 2), ("0004", {"rank": 4}, 3), ("0005", {"rank": 2}, 4), ("0006", {"rank": 4}, 4)]
    assert remaining == 4

"""Reference: surfaces planted in synthetic records, and scipy/numpy on the same numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from planted import UNTRAINED, draw, flat, planted, trial, valley
from scipy import stats

from neo_ray.effects import axis_effect, shortage
from neo_ray.matrix import rank_by_learning_rate
from neo_ray.statistics import (
    aliases,
    axes_of,
    best_setting,
    compare,
    complete,
    edge_of,
    noise,
    setting_of,
    table,
)

AXES = ("rank", "alpha", "learning_rate", "kd_ratio")


def test_table_keeps_every_trial_and_never_turns_a_missing_metric_into_zero() -> None:
    records = [
        trial("a", {"rank": 4}, 4.5),
        trial("b", {"rank": 8, "target_modules": ["q_proj", "v_proj"]}, None, state="FAILED", cause="error", metrics={}),
        trial("c", {}, 4.9, state="PRUNED", metrics={"select_ce": 4.9, "select_kl": None}),
    ]
    frame = table(records)
    assert list(frame["id"]) == ["a", "b", "c"]
    assert frame["select_ce"].isna().tolist() == [False, True, False]
    assert frame["select_kl"].isna().tolist() == [False, True, True]
    assert frame["target_modules"].tolist()[1] == '["q_proj", "v_proj"]'
    assert frame["untrained_select_ce"].tolist() == [UNTRAINED["select_ce"]] * 3


def test_a_parameter_named_like_a_measurement_gets_its_own_column() -> None:
    records = [trial("a", {"tokens": 100}, 4.5, tokens=98), trial("b", {"tokens": 200}, 4.4, tokens=199)]
    frame = table(records)
    assert frame["tokens"].tolist() == [98, 199]
    assert frame["param.tokens"].tolist() == [100, 200]
    assert axes_of(frame, records) == ("tokens",)


def test_diverged_means_nan_or_worse_than_the_untrained_student() -> None:
    records = [
        trial("fine", {}, 4.5),
        trial("worse", {}, 5.3),
        trial("nan", {}, None),
        trial("inf", {}, math.inf),
        trial("raised", {}, 4.5, state="FAILED", cause="diverged"),
        trial("no teacher", {}, 4.5, metrics={"select_ce": 4.5, "select_kl": None}),
        trial("silent", {}, None, state="RUNNING", metrics={}),
    ]
    frame = table(records)
    assert set(frame["id"][frame["diverged"]]) == {"worse", "nan", "inf", "raised"}
    assert set(complete(frame, "select_ce")["id"]) == {"fine", "worse", "no teacher"}


def test_settings_agree_where_the_same_axes_are_missing() -> None:
    frame = table([trial("a", {"rank": 4}, 4.0), trial("b", {"rank": 4}, 4.1), trial("c", {"rank": 4, "alpha": 8}, 4.2)])
    settings = setting_of(frame, ["rank", "alpha"]).tolist()
    assert settings[0] == settings[1] != settings[2]


def test_noise_is_the_pooled_deviation_within_settings() -> None:
    values = {4: [4.50, 4.54, 4.52], 8: [4.30, 4.36], 16: [4.1]}
    records = [trial(f"{r}-{s}", {"rank": r}, v, seed=s) for r, vs in values.items() for s, v in enumerate(vs)]
    found = noise(table(records), ["rank"], "select_ce")
    expected = math.sqrt((np.var(values[4], ddof=1) * 2 + np.var(values[8], ddof=1)) / 3)
    assert found is not None and found.sd == pytest.approx(expected)
    assert (found.df, found.num_settings, found.num_trials) == (3, 2, 5)
    assert found.low == pytest.approx(expected * math.sqrt(3 / stats.chi2.ppf(0.975, 3)))
    assert found.high == pytest.approx(expected * math.sqrt(3 / stats.chi2.ppf(0.025, 3)))


def test_no_noise_is_known_without_a_second_seed() -> None:
    again = [trial("a", {"rank": 4}, 4.5), trial("b", {"rank": 4}, 4.5), trial("c", {"rank": 8}, 4.4)]
    assert noise(table(again), ["rank"], "select_ce") is None


@pytest.mark.parametrize("num_trials", [24, 48])
def test_a_planted_optimum_lies_in_its_interval_and_inert_axes_have_none(num_trials: int) -> None:
    frame = table(planted(draw(num_trials, 1), valley))
    effects = {axis: axis_effect(frame, axis, "select_ce", "min", AXES) for axis in AXES}
    rate, rank = effects["learning_rate"], effects["rank"]
    assert rate is not None and rate.best_interval is not None and rank is not None
    assert rate.method == "quadratic" and rate.edge is None and rate.p < 1e-3
    assert rate.best_interval[0] <= 1e-3 <= rate.best_interval[1]
    assert rank.edge == "highest" and rank.best.value == 64 and rank.worst.value == 4
    assert rank.interval[0] <= 0.12 <= rank.interval[1]
    assert set(rank.adjusted_for) == {"alpha", "learning_rate", "kd_ratio"}
    for axis in ("alpha", "kd_ratio"):
        effect = effects[axis]
        assert effect is not None and effect.interval[0] < 0


def test_intervals_of_a_difference_cover_it_in_repeated_sweeps() -> None:
    covered = 0
    for seed in range(60):
        effect = axis_effect(table(planted(draw(24, seed), valley, seed)), "rank", "select_ce", "min", AXES)
        assert effect is not None
        true = 0.03 * math.log2(effect.best.value / effect.worst.value)
        covered += effect.interval[0] <= true <= effect.interval[1]
    assert covered >= 57  # Scheffé's interval is wider than 95 % for a single pair


def test_mode_max_is_the_mirror_of_min() -> None:
    records = planted(draw(24, 2), valley)
    mirrored = [r.model_copy(update={"metrics": {"select_ce": -(r.metrics["select_ce"] or 0)}, "details": {}}) for r in records]
    plain = [r.model_copy(update={"details": {}}) for r in records]
    low = axis_effect(table(plain), "rank", "select_ce", "min", AXES)
    high = axis_effect(table(mirrored), "rank", "select_ce", "max", AXES)
    assert low is not None and high is not None
    assert high.gain == pytest.approx(low.gain) and high.best.value == low.best.value
    assert high.best.mean == pytest.approx(-low.best.mean) and high.best.low == pytest.approx(-low.best.high)


def test_a_categorical_axis_has_a_mean_and_interval_for_each_level() -> None:
    true = {"cosine": 4.4, "linear": 4.5, "constant": 4.6}
    settings = [{"schedule": name, "rank": rank} for name in true for rank in (4, 8, 16, 32)] + [{"schedule": "rare", "rank": 4}]
    frame = table(planted(settings, lambda p: true.get(p["schedule"], 4.0)))
    effect = axis_effect(frame, "schedule", "select_ce", "min", ("schedule", "rank"))
    assert effect is not None and effect.method == "levels"
    assert effect.best.value == "cosine" and effect.worst.value == "constant"
    assert effect.left_out == ("rare",) and effect.edge is None and effect.best_interval is None
    assert {level.value: level.num_trials for level in effect.levels} == dict.fromkeys(true, 4)
    assert all(level.low < true[level.value] < level.high for level in effect.levels)


def test_pruned_trials_enter_no_effect() -> None:
    records = planted(draw(24, 3), valley)
    pruned = [trial(f"p{i}", p, 9.0, state="PRUNED") for i, p in enumerate(draw(24, 4))]
    alone = axis_effect(table(records), "rank", "select_ce", "min", AXES)
    among = axis_effect(table([*records, *pruned]), "rank", "select_ce", "min", AXES)
    assert alone is not None and among is not None
    assert (among.gain, among.p, among.ids) == (alone.gain, alone.p, alone.ids)


def test_seeds_of_a_setting_do_not_pass_for_settings() -> None:
    settings = draw(12, 5)
    once = axis_effect(table(planted(settings, valley, noise=0)), "rank", "select_ce", "min", AXES)
    thrice = axis_effect(table(planted(settings, valley, noise=0, seeds=(0, 1, 2))), "rank", "select_ce", "min", AXES)
    assert once is not None and thrice is not None
    assert thrice.num_settings == once.num_settings == 12 and len(thrice.ids) == 36
    assert thrice.p == pytest.approx(once.p) and thrice.interval == pytest.approx(once.interval)


def test_seeds_count_as_runs_where_settings_are_too_few() -> None:
    records = planted([{"kd_ratio": 0.0}, {"kd_ratio": 0.5}], lambda p: 4.6 - 0.4 * p["kd_ratio"], seeds=range(4))
    effect = axis_effect(table(records), "kd_ratio", "select_ce", "min")
    assert effect is not None and effect.by_run and effect.method == "linear"
    assert effect.interval[0] > 0 and effect.best.value == 0.5


def test_five_trials_get_spearman_with_an_exact_p() -> None:
    records = planted([{"rank": r} for r in (4, 8, 16, 32, 64)], lambda p: 4.6 - 0.1 * math.log2(p["rank"]), noise=0)
    effect = axis_effect(table(records), "rank", "select_ce", "min")
    assert effect is not None and effect.method == "spearman"
    assert effect.gain == pytest.approx(1) and effect.p == pytest.approx(2 / math.factorial(5))
    assert effect.best.value == 64 and effect.best.mean < effect.worst.mean


def test_one_exploded_run_does_not_decide_an_effect() -> None:
    records = planted(draw(24, 6), valley)
    records[3].metrics["select_ce"] = 400.0
    effect = axis_effect(table(records), "rank", "select_ce", "min", AXES)
    assert effect is not None and effect.num_capped == 1
    assert effect.gain < 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "COMPLETE trials at 0 value"),
        ([{"rank": 4}] * 6, "1 value (4)"),
        ([{"rank": 4}, {"rank": 8}, {"rank": 16}], "3 COMPLETE trials, and 5 are the least"),
        ([{"rank": 4}] * 4 + [{"rank": 8}] * 2, "4 at 4, 2 at 8"),
    ],
)
def test_shortage_says_what_is_missing(settings: list[dict[str, int]], words: str) -> None:
    frame = table(planted(settings, flat) or [trial("x", {"rank": 4}, None, state="FAILED", metrics={})])
    assert words in (shortage(frame, "rank", "select_ce") or "")
    assert axis_effect(frame, "rank", "select_ce", "min") is None


def test_equal_values_everywhere_are_no_evidence() -> None:
    effect = axis_effect(table(planted(draw(24, 7), flat, noise=0)), "rank", "select_ce", "min", AXES)
    assert effect is not None and effect.p > 0.05 and effect.interval[0] <= 0


def test_axes_that_move_together_are_named() -> None:
    settings = [{"alpha": 2.0 * r, "rank": r, "learning_rate": lr} for r in (4, 16, 64) for lr in (1e-4, 1e-3)]
    assert aliases(table(planted(settings, flat)), ("alpha", "rank", "learning_rate")) == {"alpha": "rank"}


def test_matched_settings_are_compared_in_pairs() -> None:
    settings = [{"learning_rate": lr, "kd_ratio": k} for lr in (1e-4, 3e-4, 1e-3, 3e-3) for k in (0.0, 0.5)]
    frame = table(
        planted(settings, lambda p: 4.6 + 0.3 * abs(math.log10(p["learning_rate"]) + 3) - 0.1 * (p["kd_ratio"] > 0), noise=0.01)
    )
    found = compare(frame, frame["kd_ratio"] > 0, frame["kd_ratio"] == 0, ["learning_rate"], "select_ce", "min")
    assert found is not None and found.num_pairs == 4
    assert found.interval[0] <= 0.1 <= found.interval[1] and found.interval[0] > 0
    assert found.first == pytest.approx(found.second - found.gain)


def test_unmatched_groups_need_three_settings_each() -> None:
    frame = table(planted([{"rank": r, "method": m} for r, m in zip((1, 2, 3, 4, 5), "aaabb", strict=True)], flat))
    first, second = frame["method"] == "a", frame["method"] == "b"
    assert compare(frame, first, second, ["rank"], "select_ce", "min") is None
    frame = table(planted([{"rank": r, "method": m} for r, m in zip((1, 2, 3, 4, 5, 6), "aaabbb", strict=True)], flat))
    found = compare(frame, frame["method"] == "a", frame["method"] == "b", ["rank"], "select_ce", "min")
    assert found is not None and found.num_pairs == 0 and found.interval[0] < 0 < found.interval[1]


def test_best_setting_is_the_best_mean_over_seeds_with_its_margin_in_noise() -> None:
    values = {4: [4.50, 4.52], 8: [4.30, 4.90], 16: [4.60, 4.62]}
    records = [trial(f"{r}-{s}", {"rank": r}, v, seed=s) for r, vs in values.items() for s, v in enumerate(vs)]
    records.append(trial("pruned", {"rank": 2}, 3.0, state="PRUNED"))
    frame = table(records)
    spread = noise(frame, ["rank"], "select_ce")
    best = best_setting(frame, "select_ce", "min", ["rank"], {"rank": (4, 16)}, spread)
    assert best is not None and spread is not None
    assert (best.id, best.value, best.num_seeds, best.second) == ("4-0", pytest.approx(4.51), 2, "8-0")
    assert best.margin == pytest.approx(0.09) and best.margin_in_sds == pytest.approx(0.09 / spread.sd)
    assert [(e.axis, e.side) for e in best.edges] == [("rank", "lowest")]


def test_an_edge_is_within_five_percent_of_the_range_on_the_scale_of_the_axis() -> None:
    assert edge_of("learning_rate", 9e-3, (1e-4, 1e-2)) is not None
    assert edge_of("learning_rate", 7e-3, (1e-4, 1e-2)) is None
    assert edge_of("kd_ratio", 0.05, (0, 1)) is not None
    assert edge_of("kd_ratio", 0.5, (0, 1)) is None
    assert edge_of("rank", math.nan, (4, 64)) is None and edge_of("rank", 4, (4, 4)) is None


def test_matrix_has_the_best_complete_value_and_all_states_of_each_cell() -> None:
    records = [
        trial("a", {"rank": 4, "learning_rate": 1e-3}, 4.5),
        trial("b", {"rank": 4, "learning_rate": 1e-3}, 4.4, seed=1),
        trial("c", {"rank": 8, "learning_rate": 1e-3}, 4.0, state="PRUNED"),
        trial("d", {"rank": 8, "learning_rate": 1e-2}, None, state="FAILED", cause="diverged"),
    ]
    matrix = rank_by_learning_rate(table(records), "select_ce")
    assert matrix is not None and matrix.ranks == (4, 8) and matrix.learning_rates == ((1e-3, 1e-3), (1e-2, 1e-2))
    assert matrix.best == (0, 0) and matrix.cells[0][0].best_id == "b" and matrix.cells[0][0].num_trials == 2
    assert matrix.cells[1][0].best is None and matrix.cells[1][0].states == {"PRUNED": 1}
    assert matrix.cells[0][1].num_trials == 0 and matrix.cells[1][1].states == {"FAILED": 1}


def test_many_learning_rates_fall_into_six_log_bins() -> None:
    matrix = rank_by_learning_rate(table(planted(draw(48, 8), valley)), "select_ce")
    assert matrix is not None and len(matrix.learning_rates) == 6
    assert all(low[1] < high[0] for low, high in zip(matrix.learning_rates, matrix.learning_rates[1:], strict=False))
    assert sum(cell.num_trials for row in matrix.cells for cell in row) == 48


def test_no_matrix_without_both_axes() -> None:
    assert rank_by_learning_rate(table(planted([{"rank": 4}], flat)), "select_ce") is None
    assert rank_by_learning_rate(table(planted([{"rank": "x", "learning_rate": "y"}], flat)), "select_ce") is None

"""Reference: planted truth. What is there must be found, and what is not there must not be claimed."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from planted import draw, flat, planted, sweep, trial, valley
from scipy import stats
from test_laws import grid, truth

from neo_ray.drafts import Draft, Guideline, decide
from neo_ray.evidence import gather, number
from neo_ray.guidelines import derive
from neo_ray.records import TrialRecord

AXES = ("rank", "alpha", "learning_rate", "kd_ratio")


def supported(guidelines: list[Guideline], axis: str) -> list[Guideline]:
    """Of the claims with a direction: that nothing differs is no finding about an axis."""
    return [g for g in guidelines if g.axis == axis and g.verdict == "supported" and g.margin is None]


def without_baseline(records: list[TrialRecord]) -> list[TrialRecord]:
    return [r.model_copy(update={"details": {}}) for r in records]


def test_pure_noise_supports_no_claim_about_an_axis_in_95_of_100_sweeps() -> None:
    claims = [derive(without_baseline(planted(draw(12, seed), flat, seed)), sweep()) for seed in range(100)]
    wrong = sum(any(supported(guidelines, axis) for axis in AXES) for guidelines in claims)
    assert wrong <= 5
    assert all({g.axis for g in guidelines} >= set(AXES) for guidelines in claims)  # each axis was looked at


@pytest.mark.parametrize("num_trials", [24, 48])
def test_planted_truth_is_found_and_inert_axes_are_not_claimed(num_trials: int) -> None:
    found = 0
    for seed in range(10):
        guidelines = derive(planted(draw(num_trials, seed), valley, seed), sweep())
        found += bool(supported(guidelines, "rank")) and bool(supported(guidelines, "learning_rate"))
        assert sum(bool(supported(guidelines, axis)) for axis in ("alpha", "kd_ratio")) <= 1
    assert found >= 8  # of the corrected claims, with every hypothesis that was asked


def test_an_interior_optimum_is_claimed_with_its_interval_and_not_extended() -> None:
    guidelines = derive(planted(draw(48, 1), valley), sweep())
    (claim,) = supported(guidelines, "learning_rate")
    assert "best near learning_rate" in claim.claim
    assert "extend" not in claim.claim
    assert claim.interval is not None and claim.effect is not None
    assert claim.interval[0] < claim.effect < claim.interval[1] and claim.unit == "nats per token"


def test_an_optimum_at_the_edge_asks_to_extend_the_range() -> None:
    guidelines = derive(planted(draw(36, 2), valley), sweep())
    extend = [g for g in supported(guidelines, "rank") if "extend the range to 128" in g.claim]
    assert len(extend) == 1
    falling = derive(planted(draw(36, 2), lambda p: 4.6 + 0.2 * math.log10(p["learning_rate"])), sweep())
    assert any("extend the range to 3.16e-5" in g.claim for g in supported(falling, "learning_rate"))


def test_a_best_trial_on_an_edge_is_only_undecided_where_the_axis_shows_no_effect() -> None:
    records = planted(draw(24, 3), flat)
    best = min(records, key=lambda r: r.metrics["select_ce"] or 0)
    best.params["rank"] = 64
    extend = [g for g in derive(records, sweep()) if g.axis == "rank" and "extend the range" in g.claim]
    assert [g.verdict for g in extend] == ["undecided"] and best.id in extend[0].claim


def test_a_range_is_not_extended_past_what_the_schema_allows() -> None:
    settings = [{"kd_ratio": k, "rank": r} for k in (0.0, 0.25, 0.5, 0.75, 1.0) for r in (4, 8, 16, 32)]
    search = {"kd_ratio": {"grid": [0, 0.25, 0.5, 0.75, 1]}, "rank": {"grid": [4, 8, 16, 32]}}
    guidelines = derive(planted(settings, lambda p: 4.6 - 0.2 * p["kd_ratio"]), sweep(search=search))
    assert supported(guidelines, "kd_ratio")
    assert not any("extend" in g.claim for g in guidelines if g.axis == "kd_ratio")


def test_where_trials_diverged_beyond_the_best_there_is_no_edge() -> None:
    settings = [{"learning_rate": lr, "rank": r} for lr in (1e-4, 3e-4, 1e-3) for r in (4, 8, 16, 32)]
    records = planted(settings, lambda p: 4.6 - 0.2 * math.log10(p["learning_rate"] / 1e-4))
    beyond = [trial(f"d{r}", {"learning_rate": 3e-3, "rank": r}, None, state="FAILED", cause="diverged") for r in (4, 8)]
    alone, bounded = derive(records, None), derive([*records, *beyond], None)
    assert any("extend" in g.claim for g in supported(alone, "learning_rate"))
    assert not any("extend" in g.claim for g in bounded if g.axis == "learning_rate")


@pytest.mark.parametrize(
    ("counted", "effect", "words"),
    [
        ("settings", 0.01, "about 17 more COMPLETE trials in other settings would decide it"),
        ("seeds", 0.01, "about 17 more seeds of each side would decide it"),
        ("seeds", 0.022, "about 1 more seed of each side would decide it"),
        ("trials", 0.01, "about 17 more COMPLETE trials would decide it"),
        ("seeds", 1e-3, "takes more than 100 seeds to decide"),
    ],
)
def test_what_would_decide_is_told_in_what_the_interval_comes_from(counted: Any, effect: float, words: str) -> None:
    evidence, interval = gather([trial("a", {"rank": 4}, 4.5)], None), (effect - 0.02, effect + 0.02)
    draft = Draft("a", "q", {"undecided": "?"}, "select_ce", effect, interval, 0.3, num_units=4, counted=counted)
    (found,) = decide(evidence, [draft])
    assert found.note.endswith(words)


def test_undecided_says_how_many_more_trials_would_decide() -> None:
    guidelines = derive(planted(draw(12, 4), valley, noise=0.1), sweep())
    open_ones = [g for g in guidelines if g.verdict == "undecided" and g.hypothesis.startswith("select_ce depends on")]
    assert open_ones
    assert all("would decide it" in g.note or "to decide" in g.note for g in open_ones)


def test_more_trials_are_asked_for_where_the_interval_is_wider() -> None:
    def asked(noise: float) -> int:
        found = derive(planted(draw(12, 5), valley, noise=noise), sweep())
        guideline = next(g for g in found if g.hypothesis == "select_ce depends on rank")
        assert guideline.verdict == "undecided"
        return int(guideline.note.split(" more COMPLETE trials")[0].rsplit(" ", 1)[1])

    assert asked(0.04) < asked(0.08)


def test_too_few_trials_say_what_cannot_be_said() -> None:
    guidelines = derive(planted(draw(3, 0), flat), sweep())
    for axis in AXES:
        (claim,) = [g for g in guidelines if g.hypothesis == f"select_ce depends on {axis}"]
        assert claim.effect is None and claim.num_trials == 3
        assert claim.verdict == "undecided" and claim.claim.startswith(f"Nothing can be said of {axis}: ")


def test_without_a_complete_trial_there_is_no_guideline() -> None:
    records = planted(draw(24, 1), valley)
    unfinished: list[dict[str, Any]] = [{"state": "PRUNED"}, {"state": "RUNNING"}, {"state": "FAILED", "cause": "error"}]
    for change in unfinished:
        assert derive([r.model_copy(update=change) for r in records], sweep()) == []
    assert derive([], sweep()) == []


def test_removing_the_trials_removes_the_sentence() -> None:
    records = planted(draw(48, 1), valley)
    before = supported(derive(records, sweep()), "learning_rate")
    kept = [r for r in records if 5e-4 < r.params["learning_rate"] < 2e-3]
    after = supported(derive(kept, sweep()), "learning_rate")
    assert before and not after
    assert {i for g in derive(kept, sweep()) for i in g.trials} <= {r.id for r in kept}


def test_a_teacher_that_helps_is_supported_and_one_that_hurts_refuted() -> None:
    settings = [{"learning_rate": lr, "kd_ratio": k} for lr in (1e-4, 3e-4, 1e-3, 3e-3) for k in (0.0, 0.5, 0.9)]
    for effect, verdict in ((-0.2, "supported"), (0.2, "refuted")):
        records = planted(settings, lambda p, effect=effect: 4.6 + effect * (p["kd_ratio"] > 0))  # type: ignore[misc]
        asked = [
            g for g in derive(records, None) if g.hypothesis == "select_kl is lower with kd_ratio above 0 than with kd_ratio 0"
        ]
        assert [g.verdict for g in asked] == [verdict]
        assert "4 settings that are equal otherwise" in asked[0].claim
        assert ("lower" if verdict == "supported" else "higher") in asked[0].claim


def test_methods_are_compared_on_both_metrics_only_where_both_were_run() -> None:
    settings = [{"learning_rate": lr, "method": m} for lr in (1e-4, 3e-4, 1e-3, 3e-3) for m in ("lora", "neo")]
    records = planted(settings, lambda p: 4.6 - 0.2 * (p["method"] == "neo"))
    asked = {g.metric: g.verdict for g in derive(records, None) if "method neo" in g.hypothesis}
    assert asked == {"select_kl": "supported", "select_ce": "supported"}
    alone = [r for r in records if r.params["method"] == "neo"]
    assert not any("method" in g.hypothesis for g in derive(alone, None))


def test_the_best_setting_is_judged_against_the_untrained_student() -> None:
    asked = [g for g in derive(planted(draw(24, 6), valley), sweep()) if g.axis == "training"]
    assert [g.verdict for g in asked] == ["supported"]
    worse = [g for g in derive(planted(draw(24, 6), lambda p: 5.6), sweep()) if g.axis == "training"]
    assert [g.verdict for g in worse] == ["refuted"]
    close = [g for g in derive(planted(draw(24, 6), lambda p: 5.18, noise=0.2), sweep()) if g.axis == "training"]
    assert [g.verdict for g in close] == ["undecided"]  # the best of 24 is lucky


def test_the_interval_of_the_best_setting_allows_for_its_having_been_picked() -> None:
    records = planted([{"rank": r} for r in (4, 8, 16)], valley_of_rank, seeds=range(4))
    (asked,) = [g for g in derive(records, None) if g.axis == "training"]
    spread = gather(records, None).noise
    assert spread is not None and asked.interval is not None
    half = spread.sd / math.sqrt(4) * stats.t.isf(0.025 / 3, spread.df)
    assert (asked.interval[1] - asked.interval[0]) / 2 == pytest.approx(half)


def valley_of_rank(params: dict[str, Any]) -> float:
    return valley({**params, "learning_rate": 1e-3})


def test_reference_defaults_are_judged_only_where_they_were_run() -> None:
    defaults = {"rank": 64, "alpha": 128.0, "learning_rate": 2e-4, "kd_ratio": 0.5}
    better = {"rank": 64, "alpha": 128.0, "learning_rate": 1e-3, "kd_ratio": 0.5}
    records = planted([defaults, better], valley, seeds=range(4))
    (asked,) = [g for g in derive(records, None) if g.axis == "defaults"]
    assert asked.verdict == "supported" and asked.num_seeds == 4
    worse = planted([defaults, {**better, "learning_rate": 1e-2}], valley, seeds=range(4))
    (same,) = [g for g in derive(worse, None) if g.axis == "defaults"]
    assert same.verdict == "undecided" and "is the reference defaults" in same.claim
    assert not any(g.axis == "defaults" for g in derive([r for r in records if r.params == better], None))


def test_an_axis_that_moves_with_another_is_named_and_not_claimed() -> None:
    settings = [{**p, "alpha": 2.0 * p["rank"]} for p in draw(36, 7)]
    for config in (None, sweep(search={**{k: a for k, a in SEARCH.items()}, "alpha": {"of": "rank", "times": 2}})):
        guidelines = derive(planted(settings, valley), config)
        assert not any(g.axis == "alpha" and g.trials for g in guidelines)
        assert any(
            "alpha moves with rank" in g.note and "scaling 2 at every rank" in g.note for g in guidelines if g.axis == "rank"
        )


SEARCH = {
    "rank": {"choice": [4, 8, 16, 32, 64]},
    "learning_rate": {"log_uniform": [1e-4, 1e-2]},
    "kd_ratio": {"choice": [0, 0.25, 0.5, 0.75]},
}


def test_scope_tells_models_data_tokens_ranges_and_alpha_rule() -> None:
    scope = gather(planted(draw(24, 1), valley), sweep()).scope
    assert (scope.teacher, scope.student, scope.data) == ("some/teacher", "some/student", "text.jsonl")
    assert scope.tokens == (4000, 4000)
    assert scope.tested["learning_rate"] == "0.0001 … 0.01, log scale"
    assert scope.alpha_rule is not None and scope.alpha_rule.startswith("alpha and rank vary separately")


def test_without_a_sweep_file_the_axes_are_what_varies() -> None:
    evidence = gather(planted([{**p, "warmup_ratio": 0.1} for p in draw(24, 1)], valley), None)
    assert evidence.axes == ("rank", "alpha", "learning_rate", "kd_ratio")
    assert (evidence.metric, evidence.mode) == ("select_ce", "min")


@pytest.mark.parametrize(
    ("value", "text"),
    [(2e-4, "2e-4"), (64.0, "64"), (0.5, "0.5"), (1234567, "1.235e6"), (12345, "12345"), (None, "–"), (math.nan, "–")]
    + [("neo", "neo"), (True, "True"), (0, "0"), (-3e-5, "-3e-5"), (0.00119, "1.19e-3"), (4.51234, "4.512")],
)
def test_numbers_read_as_a_person_writes_them(value: Any, text: str) -> None:
    assert number(value) == text


def test_methods_with_their_own_learning_rates_are_compared_at_equal_ones() -> None:
    rates = [1e-5, 1e-4, 1e-3]
    search = {
        "method": {"grid": ["lora", "neo"]},
        "lora_rate": {"sets": "learning_rate", "grid": rates, "when": {"method": "lora"}},
        "neo_rate": {"sets": "learning_rate", "grid": [*rates, 1e-2], "when": {"method": "neo"}},
    }
    settings = [{"method": m, f"{m}_rate": r} for m, rs in (("lora", rates), ("neo", [*rates, 1e-2])) for r in rs]

    def surface(params: dict[str, Any]) -> float:
        rate = params.get("lora_rate") or params["neo_rate"]
        return 4.6 + 0.3 * (math.log10(rate) + 4) ** 2 - (0.1 if params["method"] == "neo" else 0)

    records = planted(settings, surface, noise=0.01, seeds=(0, 1, 2))
    config = sweep(search=search, sampler={"name": "grid", "seeds": [0, 1, 2]})
    found = {g.hypothesis: g for g in derive(records, config)}
    claim = found["select_ce is lower with method neo than with method lora"]
    assert claim.verdict == "supported" and "over 3 settings that are equal otherwise" in claim.claim
    assert claim.effect == pytest.approx(0.1, abs=0.02)
    assert found["select_ce depends on neo_rate"].verdict == "supported"


def test_the_printed_means_are_those_that_the_effect_is_of_also_where_runs_diverged() -> None:
    """At the highest learning rate both sides explode, the taught one less: chance, and not what a teacher does."""
    rng = np.random.default_rng(0)

    def surface(params: dict[str, Any]) -> float:
        exploded = params["learning_rate"] == 0.02
        return rng.uniform(9, 12) - 2 * params["kd_ratio"] if exploded else 4.7 - 0.02 * params["kd_ratio"]

    rates, ranks = (3e-4, 1e-3, 0.02), (4, 16, 64)
    settings = [{"learning_rate": r, "rank": k, "kd_ratio": ratio} for r in rates for k in ranks for ratio in (0.0, 0.5)]
    asked = "select_ce is lower with kd_ratio above 0 than with kd_ratio 0"
    (found,) = [g for g in derive(planted(settings, surface, noise=0.001), None) if g.hypothesis == asked]
    assert found.effect == pytest.approx(0.01 * 6 / 9, abs=2e-3)
    numbers = re.search(r"([\d.]+) against ([\d.]+) on average", found.claim)
    assert numbers is not None
    with_teacher, without = map(float, numbers.groups())
    assert without - with_teacher == pytest.approx(found.effect, abs=2e-3)
    assert "6 of its trials ended worse than the untrained student and count as that" in found.claim
    fine = [p for p in settings if p["learning_rate"] != 0.02]
    assert not any("untrained student and count" in g.claim + g.note for g in derive(planted(fine, surface, noise=0.001), None))


def test_a_main_effect_on_an_axis_of_a_found_interaction_says_that_it_is_an_average() -> None:
    def of(gamma: float) -> Guideline:
        records = planted(grid(), lambda p: truth(p, gamma=gamma), noise=0.005)
        (found,) = [g for g in derive(records, None) if g.hypothesis == "select_ce depends on learning_rate"]
        assert found.verdict == "supported"
        return found

    moving, still = of(-0.6), of(0.0)
    assert moving.claim.startswith("On average over rank, select_ce is best near learning_rate")
    assert "its best at each rank, by the response surface: 4: " in moving.note
    assert still.claim.startswith("select_ce is best near learning_rate") and "its best at each" not in still.note


def test_a_range_to_extend_has_no_effect_of_another_question() -> None:
    found = [g for g in derive(planted(draw(36, 2), valley), sweep()) if "extend the range to 128" in g.claim]
    assert [(g.verdict, g.effect, g.interval, g.p_value) for g in found] == [("supported", None, None, None)]

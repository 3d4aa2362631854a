"""Reference: planted truth. Each hypothesis gets the verdict that the planted surface deserves, and none without its trials."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import Params, planted, sweep, trial
from test_laws import GAMMA, RATES, grid, truth
from test_upcoming import study

from neo_ray.analyze import analyse, guidelines_json
from neo_ray.charts import Band
from neo_ray.drafts import Guideline
from neo_ray.evidence import gather
from neo_ray.figures import rates
from neo_ray.guidelines import derive
from neo_ray.questions import QUESTIONS
from neo_ray.records import TrialRecord
from neo_ray.report import markdown

SEEDS = (0, 1, 2)


def verdicts(records: list[TrialRecord], config: Any = None) -> dict[str, Guideline]:
    """Key of a question → the guideline that answers it."""
    found: dict[str, Guideline] = {}
    for guideline in derive(records, config):
        for key, question in QUESTIONS.items():
            if guideline.place == question.place and guideline.hypothesis.startswith(question.text):
                found[key] = guideline
    return found


def test_a_planted_map_gets_its_verdicts() -> None:
    found = verdicts(planted(grid(), truth, noise=0.01, seeds=(0, 1)))
    assert {key: found[key].verdict for key in ("law", "trend", "ratio", "only teacher", "one rate")} == {
        "law": "supported",
        "trend": "supported",
        "ratio": "supported",
        "only teacher": "supported",
        "one rate": "supported",
    }
    law = found["law"]
    assert law.effect == pytest.approx(-GAMMA, abs=0.1) and law.interval and law.interval[0] < 0.4 < law.interval[1]
    assert "alpha rule: scaling 2 at every rank" in law.note and "the two cannot be told apart" not in law.claim
    assert found["one rate"].margin is not None and found["one rate"].unit == "nats per token"
    assert all(g.p_value is not None and g.num_trials == 150 for g in (law, found["trend"], found["one rate"]))


def test_the_opposite_of_each_is_refuted() -> None:
    def opposite(params: Params) -> float:
        return truth(params, gamma=0.4, slope=0.04, coupled=2.5) + 0.4 * params["kd_ratio"] ** 2

    found = verdicts(planted(grid(), opposite, noise=0.005, seeds=(0, 1)))
    assert {key: found[key].verdict for key in ("law", "trend", "ratio", "only teacher", "one rate")} == {
        "law": "refuted",
        "trend": "undecided",  # it saturates at the smallest rank, beyond which nothing is claimed
        "ratio": "refuted",
        "only teacher": "refuted",
        "one rate": "refuted",
    }
    trend = found["trend"]
    assert "rank 4, the lowest tried, is within one standard error of the best" in trend.claim and trend.effect is None


def test_a_valley_below_the_saturation_rank_refutes_that_quality_does_not_fall() -> None:
    def bent(params: Params) -> float:
        return truth(params, slope=0) - 0.05 * (math.log2(params["rank"]) - 3.6) ** 2

    trend = verdicts(planted(grid(), bent, noise=0.005, seeds=(0, 1)))["trend"]
    assert trend.verdict == "refuted" and "up to rank 64" in trend.claim


def test_interactions_are_found_where_they_were_planted_alone() -> None:
    def interactions(coupled: float, gamma: float) -> dict[str, str]:
        records = planted(grid(), lambda p: truth(p, gamma=gamma, coupled=coupled), noise=0.01)
        return {g.axis: g.verdict for g in derive(records, None) if g.hypothesis.startswith("what learning_rate does")}

    assert interactions(0.0, GAMMA) == {"learning_rate × rank": "supported", "learning_rate × kd_ratio": "undecided"}
    assert interactions(2.0, 0.0) == {"learning_rate × rank": "undecided", "learning_rate × kd_ratio": "supported"}


def test_alpha_and_learning_rate_that_are_exchangeable_are_told_from_those_that_are_not() -> None:
    settings = [
        {"rank": 16, "learning_rate": lr, "alpha": a}
        for lr, a in product(np.geomspace(1e-4, 1e-2, 7).tolist(), (8.0, 16.0, 32.0))
    ]

    def of(power: float) -> str:
        def surface(p: Params) -> float:
            return 4.6 + 0.03 * (math.log(p["learning_rate"] / 1e-3) + power * math.log(p["alpha"] / 16)) ** 2

        return verdicts(planted(settings, surface, noise=0.003, seeds=SEEDS))["exchange"].verdict

    assert (of(1.0), of(0.0)) == ("supported", "refuted")


def arms(neo: float = 4.5, full: float = 1e-4, kd_bytes: float = 3.4e9) -> list[TrialRecord]:
    """Four methods at six learning rates, an adapter's best 10 times that of full training, with three seeds."""
    best = {"neo": (1e-3, neo), "lora": (1e-3, 4.6), "kd": (full, 4.6), "sft": (full, 4.65)}

    def surface(p: Params) -> float:
        rate, level = best[p["method"]]
        return level + 0.02 * math.log(p["learning_rate"] / rate) ** 2

    rates = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    records = planted([{"method": m, "learning_rate": r} for m in best for r in rates], surface, noise=0.002, seeds=SEEDS)
    memory = {"neo": 2_000_000_000, "lora": 2_000_000_000, "kd": kd_bytes, "sft": 3_300_000_000}
    rng = np.random.default_rng(0)
    return [
        r.model_copy(update={"peak_memory_bytes": int(memory[r.params["method"]] * rng.uniform(0.99, 1.01))}) for r in records
    ]


def test_methods_are_compared_each_at_its_own_learning_rate() -> None:
    found = verdicts(arms())
    assert {key: found[key].verdict for key in ("full", "lora", "kd", "sft", "memory")} == dict.fromkeys(
        ("full", "lora", "kd", "sft", "memory"), "supported"
    )
    assert found["kd"].effect == pytest.approx(0.1, abs=0.01) and "(1e-4)" in found["kd"].claim
    assert "38%" in found["memory"].claim or "40%" in found["memory"].claim or "41%" in found["memory"].claim
    worse = verdicts(arms(neo=4.8))
    assert {worse[key].verdict for key in ("lora", "kd", "sft")} == {"refuted"}


def test_an_adapter_s_best_rate_near_that_of_full_training_is_refuted_to_be_ten_times_it() -> None:
    found = verdicts(arms(full=5e-4))["full"]
    assert found.verdict == "refuted" and found.claim.startswith("Not within 5 to 20 times: ")


@pytest.mark.parametrize(("rates", "end"), [((1e-6, 2e-6, 5e-6, 1e-5), "1e-5"), ((1e-3, 2e-3, 5e-3, 1e-2), "1e-3")])
def test_an_arm_that_is_best_at_the_end_of_its_rates_decides_no_ratio(rates: tuple[float, ...], end: str) -> None:
    """Full training, best at 1e-4, was tried below or above that alone."""
    adapter = [r for r in arms() if r.params["method"] == "neo"]
    full = planted(
        [{"method": "kd", "learning_rate": r} for r in rates],
        lambda p: 4.6 + 0.02 * math.log(p["learning_rate"] / 1e-4) ** 2,
        noise=0.002,
        seeds=SEEDS,
    )
    found = verdicts([*adapter, *(r.model_copy(update={"id": f"f{r.id}"}) for r in full)])["full"]
    side = "highest" if max(rates) < 1e-4 else "lowest"
    assert found.verdict == "undecided" and found.interval is None
    assert f"the best learning_rate of kd may lie beyond the {side} tried, {end}: extend its range to" in found.claim


def test_rates_that_end_below_the_best_decide_no_exchange_of_alpha_and_learning_rate() -> None:
    settings = [
        {"rank": 16, "learning_rate": lr, "alpha": a}
        for lr, a in product(np.geomspace(1e-5, 1e-4, 7).tolist(), (8.0, 16.0, 32.0))
    ]

    def rising(p: Params) -> float:
        return 4.6 + 0.015 * (math.log(p["learning_rate"] / 1e-3) + math.log(p["alpha"] / 16)) ** 2

    found = verdicts(planted(settings, rising, noise=0.003, seeds=SEEDS))["exchange"]
    assert found.verdict == "undecided" and found.interval is None and "extend its range to" in found.claim


def test_temperature_1_is_as_good_as_the_best_only_where_it_is() -> None:
    settings = [{"temperature": t, "learning_rate": lr} for t in (1.0, 2.0, 4.0) for lr in RATES]

    def of(best: float) -> Guideline:
        def surface(p: Params) -> float:
            valley = 0.03 * math.log(p["learning_rate"] / 1e-3) ** 2
            return 4.6 + valley + 0.2 * (math.log(p["temperature"] / best) / math.log(4)) ** 2

        return verdicts(planted(settings, surface, noise=0.01, seeds=range(5)))["temperature"]

    assert of(1.0).verdict == "supported" and "temperature 1 loses" in of(1.0).claim
    assert of(4.0).verdict == "refuted" and of(4.0).effect == pytest.approx(0.2, abs=0.05)


def test_memory_that_is_not_a_quarter_less_is_refuted_and_that_of_a_cpu_decides_nothing() -> None:
    assert verdicts(arms(kd_bytes=2.1e9))["memory"].verdict == "refuted"
    on_cpu = [r.model_copy(update={"details": {**r.details, "device": "CPU Xeon"}}) for r in arms()]
    found = verdicts(on_cpu)["memory"]
    assert found.verdict == "undecided" and found.interval is None and "to which trials before have added" in found.claim


def test_a_trial_that_diverged_takes_no_more_memory_for_that() -> None:
    """It is worse than the untrained student, and not larger than the largest trial."""
    gone = {"state": "FAILED", "cause": "diverged", "metrics": {}}
    lost = [r.model_copy(update=gone) if r.params["method"] == "neo" and r.seed == 1 else r for r in arms()]
    found, told = verdicts(lost)["memory"], verdicts(arms())["memory"]
    assert found.verdict == "supported" and found.effect == pytest.approx(told.effect, abs=0.02)


def test_without_weight_of_the_teacher_a_trial_of_neo_is_none_of_the_arm() -> None:
    bare = [
        trial(f"b{i}", {**r.params, "kd_ratio": 0.0}, 4.0, seed=r.seed)
        for i, r in enumerate(arms())
        if r.params["method"] == "neo" and r.params["learning_rate"] == 1e-3
    ]
    own = [r.model_copy(update={"params": {**r.params, "kd_ratio": 0.5}}) for r in arms()]
    found = verdicts([*own, *bare])
    assert found["kd"].effect == pytest.approx(0.1, abs=0.01) and not any(i.startswith("b") for i in found["kd"].trials)


def test_settings_are_the_unit_of_an_arm_and_seeds_only_where_these_are_too_few() -> None:
    def of(ranks: tuple[int, ...], rates: tuple[float, ...] = RATES) -> Guideline:
        settings = [
            {"variant": v, "learning_rate": lr, "rank": r}
            for v, some in (("lora", RATES), ("moslora", rates))
            for lr in some
            for r in ranks
        ]
        records = planted(settings, lambda p: 4.6 + 0.03 * math.log(p["learning_rate"] / 1e-3) ** 2, 0, 0.003, range(10))
        return verdicts(records)["moslora"]

    many, two = of((4, 8, 16, 32)), of((4, 8))
    assert "each seed counts by itself" not in many.note and "each seed counts by itself" in two.note
    assert {g.verdict for g in (many, two)} <= {"supported", "undecided"} and "in other settings" not in two.note
    assert "learning rates" not in many.note.partition("chosen by")[2]
    assert "moslora was tried at 3 learning rates, lora at 5: the best of more looks better" in of((4, 8), RATES[1:4]).note


def test_without_an_arm_its_sentences_are_gone_and_the_question_is_not_tested() -> None:
    kept = [r for r in arms() if r.params["method"] in ("neo", "lora")]
    found = verdicts(kept)
    for key in ("full", "kd", "sft", "memory"):
        assert found[key].verdict == "undecided" and found[key].claim.startswith("Not tested") and found[key].trials == ()
        assert QUESTIONS[key].needed in found[key].note
    assert not any(" kd" in g.claim for g in derive(kept, None) if g.trials)


def test_moslora_is_as_good_as_lora_only_where_it_is() -> None:
    settings = [{"variant": v, "learning_rate": lr} for v in ("lora", "moslora") for lr in RATES]

    def of(gap: float) -> str:
        def surface(p: Params) -> float:
            return 4.6 + 0.03 * math.log(p["learning_rate"] / 1e-3) ** 2 + gap * (p["variant"] == "moslora")

        return verdicts(planted(settings, surface, noise=0.003, seeds=range(5)))["moslora"].verdict

    assert (of(0.0), of(0.2)) == ("supported", "refuted")


@pytest.mark.parametrize(("noises", "verdict"), [(0.25, "supported"), (25, "refuted"), (1, "undecided")])
def test_the_defaults_are_judged_by_fresh_seeds_against_one_run_s_noise(noises: float, verdict: str) -> None:
    """Runs of one seed share most of their noise."""
    search = {"rank": {"choice": [16, 64]}, "learning_rate": {"choice": [2e-4, 1e-3]}}
    config = sweep(
        search=search,
        sampler={},
        phases={
            "map": {},
            "confirm": {"top": 1, "seeds": [11, 12, 13, 14, 15], "reference": {"rank": 64, "learning_rate": 2e-4}},
        },
    )
    good, defaults = {"rank": 16, "learning_rate": 1e-3}, {"rank": 64, "learning_rate": 2e-4}

    def records_of(regret: float) -> list[TrialRecord]:
        mapped = planted([good, defaults], lambda p: 4.4 + regret * (p == defaults), 3, seeds=SEEDS)
        rng, records = np.random.default_rng(5), [r.model_copy(update={"phase": "map"}) for r in mapped]
        for seed, common in zip(range(11, 16), rng.normal(0, 0.02, 5), strict=True):
            for name, params, level in (("g", good, 4.4), ("d", defaults, 4.4 + regret)):
                value = level + common + rng.normal(0, 0.004)
                metrics = {"select_ce": value, "report_ce": value}
                records.append(trial(f"{name}{seed}", params, value, seed=seed, phase="confirm", metrics=metrics))
        return records

    noise = gather(records_of(0.0), config).noise
    assert noise is not None
    records = records_of(noises * noise.sd)
    guideline = verdicts(records, config)["defaults"]
    assert guideline.verdict == verdict and guideline.effect == pytest.approx(noises * noise.sd, abs=0.01)
    assert guideline.metric == "report_ce" and guideline.num_seeds == 5
    assert verdict != "undecided" or (" seeds" in guideline.note and " settings to decide" not in guideline.note)
    (own,) = [g for g in derive(records_of(-5 * noise.sd), config) if "themselves the best" in g.claim]
    assert own.place == 10 and own.verdict == "undecided"
    unconfirmed = verdicts([r for r in records if r.phase == "map"], config)
    assert "defaults" not in unconfirmed or unconfirmed["defaults"].verdict == "undecided"


def test_rank_costs_time_where_it_does() -> None:
    def of(growth: float) -> Guideline:
        records = [
            r.model_copy(update={"seconds": 10 * r.params["rank"] ** growth * (1 + 0.01 * (i % 3))})
            for i, r in enumerate(planted(grid(), truth))
        ]
        return verdicts(records)["time"]

    assert of(0.0).verdict == "supported" and of(0.3).verdict == "refuted" and "+130%" in of(0.3).claim


def test_every_hypothesis_has_a_verdict_and_pure_noise_supports_none_with_a_direction() -> None:
    found = derive(planted(grid(), lambda p: 4.6, noise=0.02), None)
    assert {g.place for g in found} >= set(range(1, 12))
    assert not [g for g in found if g.verdict == "supported" and g.place and g.margin is None]
    assert any("leave-one-setting-out R² of the surface is" in g.claim for g in found)


def test_a_table_with_none_of_these_axes_is_asked_none_of_them() -> None:
    records = planted([{"wheels": w} for w in range(1, 9)], lambda p: p["wheels"])
    assert not any(g.claim.startswith("Not tested") for g in derive(records, None))


def test_the_edge_of_some_ranks_asks_to_extend_the_rates() -> None:
    rates = RATES[1:4]
    claims = [g.claim for g in derive(planted(grid(rates=rates), lambda p: truth(p, gamma=-1.0), noise=0.002), None)]
    assert any("rank 4 is the highest tried there: extend the range to 0.01" in claim for claim in claims) or any(
        "has the highest learning_rate tested" in claim for claim in claims
    )
    assert any("rank 64 is the lowest tried there: extend the range to 1e-4" in claim for claim in claims) or any(
        "has the lowest learning_rate tested" in claim for claim in claims
    )
    inside = [g.claim for g in derive(planted(grid(), truth, noise=0.002), None)]
    assert not any("learning_rate" in claim and "extend" in claim for claim in inside)


def test_the_report_has_the_law_its_band_and_its_data_and_loses_them_with_the_trials(tmp_path: Path) -> None:
    analysis = analyse(study(tmp_path / "a", planted(grid(), truth, noise=0.01)))
    text, data = markdown(analysis), json.loads(guidelines_json(analysis))
    assert "## Laws" in text and "rank^γ with γ -0." in text and "a Gaussian process on 75 settings" in text
    assert data["law"]["gamma"] == pytest.approx(GAMMA, abs=0.1) and len(data["law"]["optima"]) == 5
    assert {"surface", "law", "trend", "cross_check"} <= set(data)
    chart = rates(analysis)
    assert any(isinstance(layer, Band) for layer in chart.panels[0].layers) and "γ -0." in chart.caption
    few = analyse(study(tmp_path / "b", planted(grid()[:6], truth)))
    text, data = markdown(few), json.loads(guidelines_json(few))
    assert "## Laws" not in text and "γ -" not in text and not {"surface", "law", "trend", "cross_check"} & set(data)

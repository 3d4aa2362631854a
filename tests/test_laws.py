"""Reference: planted surfaces. The surface and its law must find them, name what they cannot tell apart, and refuse noise."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from planted import Params, planted, sweep, trial
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import LeaveOneOut, cross_val_predict

from neo_ray.crosscheck import cross_check
from neo_ray.drafts import equivalence_p
from neo_ray.evidence import Evidence, gather
from neo_ray.hypotheses import fitted
from neo_ray.law_text import law_lines
from neo_ray.laws import learning_rate_law, surface_of
from neo_ray.surface import Surface, bootstrap, height, peak
from neo_ray.trends import rank_trend, regret

RANKS, RATES, RATIOS = (4, 8, 16, 32, 64), tuple(float(x) for x in np.geomspace(1e-4, 1e-2, 5)), (0.0, 0.5, 1.0)
GAMMA = -0.4


def grid(alpha: Any = lambda rank: 2.0 * rank, rates: tuple[float, ...] = RATES) -> list[Params]:
    return [{"rank": r, "learning_rate": lr, "kd_ratio": k, "alpha": alpha(r)} for k, r, lr in product(RATIOS, RANKS, rates)]


def truth(params: Params, gamma: float = GAMMA, slope: float = -0.02, coupled: float = 0.0) -> float:
    """Best at lr = 1e-3 (r / 16)^γ, asymmetric around it; 0.02 better a doubling of the rank; kd_ratio best at 0.7."""
    best = math.log(1e-3) + gamma * math.log(params["rank"] / 16) + coupled * (params["kd_ratio"] - 0.5)
    x = math.log(params["learning_rate"]) - best
    level = slope * math.log2(params["rank"]) + 0.1 * (params["kd_ratio"] - 0.7) ** 2
    return 4.6 + 0.03 * x * x * (1 + 0.2 * math.tanh(x)) + level


def evidence(surface: Any = truth, noise: float = 0.01, seed: int = 0, **given: Any) -> Evidence:
    return gather(planted(grid(**given), surface, seed, noise), None)


def surface(**given: Any) -> Surface:
    found = surface_of(evidence(**given))
    assert found is not None
    return found


def test_the_peak_of_a_cubic_is_where_a_fine_search_finds_it() -> None:
    rng = np.random.default_rng(0)
    cubics = rng.normal(size=(300, 4))
    cubics[:100, 3] = 0
    fine = np.linspace(-1.5, 2.0, 7001)
    values = height(cubics[:, None, :], fine)
    assert np.allclose(height(cubics, peak(cubics, -1.5, 2.0)), values.max(axis=1), atol=1e-6)
    assert set(peak(np.array([[0.0, 1, 0, 0], [0, -1, 0, 0]]), -1.5, 2.0, 0.5)) == {2.5, -2.0}


def test_leave_one_out_is_that_of_fits_without_each_setting() -> None:
    found = surface()
    predicted = cross_val_predict(LinearRegression(fit_intercept=False), found.design, found.gains, cv=LeaveOneOut())
    means = (found.gains.sum() - found.gains) / (len(found.gains) - 1)
    assert found.r2 == pytest.approx(1 - ((found.gains - predicted) ** 2).sum() / ((found.gains - means) ** 2).sum())


def test_the_draws_are_least_squares_on_resampled_settings() -> None:
    found = surface()
    draws = bootstrap(found.design, found.gains, num=50)
    counts = np.random.default_rng(0).multinomial(75, np.full(75, 1 / 75), size=50)
    for draw, count in list(zip(draws, counts, strict=True))[:5]:
        rows = np.repeat(np.arange(75), count)
        assert np.allclose(draw, np.linalg.lstsq(found.design[rows], found.gains[rows], rcond=None)[0], atol=1e-4)


def test_seeds_of_a_setting_are_one_point_of_the_surface() -> None:
    records = planted(grid(), truth, seeds=(0, 1, 2))
    found = surface_of(gather(records, None))
    assert found is not None and len(found.gains) == 75 and len(found.ids) == 225 and found.num_seeds == 3


def test_the_law_of_a_planted_surface_is_found_with_its_interval() -> None:
    law = learning_rate_law(evidence())
    assert law is not None and law.gamma is not None and law.gamma_interval and law.c is not None and law.p is not None
    low, high = law.gamma_interval
    assert low < GAMMA < high < 0 and high - low < 0.2 and law.p < 1e-6
    assert law.c == pytest.approx(1e-3 * 16**0.4, rel=0.15)
    assert not any(censored for _, censored in law.optima.values()) and law.left_out == ()
    for rank, (rate, _) in law.optima.items():
        assert rate == pytest.approx(1e-3 * (rank / 16) ** GAMMA, rel=0.2)
    assert law.alpha_rule == "scaling 2 at every rank"
    assert all(below < rate < above for _, rate, below, above in law.curve)


def test_optima_at_the_end_of_the_tested_rates_are_left_out_of_the_law() -> None:
    law = learning_rate_law(evidence(lambda p: truth(p, gamma=-1.0), rates=RATES[1:4], noise=0.003))
    assert law is not None
    assert set(law.left_out) == {4.0, 64.0} == set(law.sides) and law.sides == {4.0: "highest", 64.0: "lowest"}
    assert law.gamma is not None and "left out" in law.note
    edge = learning_rate_law(evidence(lambda p: 4.6 - 0.1 * math.log10(p["learning_rate"]), noise=0.003))
    assert edge is None or (edge.gamma is None and len(edge.left_out) == 5)


def test_rates_that_diverged_above_the_best_are_no_range_to_extend() -> None:
    records = planted(grid(rates=RATES[:3]), lambda p: 4.6 - 0.1 * math.log10(p["learning_rate"]) + truth(p) / 10, 0, 0.003)
    beyond = [
        trial(f"d{r}", {**grid()[0], "rank": r, "learning_rate": 3e-3}, None, state="FAILED", cause="diverged") for r in RANKS
    ]
    alone, bounded = learning_rate_law(gather(records, None)), learning_rate_law(gather([*records, *beyond], None))
    assert alone is not None and bounded is not None
    assert alone.stable == () and set(bounded.stable) == {r for r, side in bounded.sides.items() if side == "highest"} != set()
    one = learning_rate_law(gather([*records, beyond[-1]], None))
    assert one is not None and one.stable == (64.0,) and len(one.sides) > 1, "what rank 64 does not bear a lower one may"


@pytest.mark.parametrize(("alpha", "words"), [(lambda r: 2.0 * r, "2 at every rank"), (lambda r: 16.0, "moves with ln rank")])
def test_what_the_alpha_rule_makes_collinear_is_named(alpha: Any, words: str) -> None:
    dropped = surface(alpha=alpha).dropped
    assert [d for d in dropped if d.startswith("ln scaling: ") and words in d]


def test_a_scaling_that_varies_on_its_own_is_a_term() -> None:
    settings = [{**p, "alpha": a} for p in grid()[25:50] for a in (8.0, 32.0, 128.0)]
    found = surface_of(gather(planted(settings, truth), None))
    assert found is not None and found.has(("learning_rate", 1), ("scaling", 1)) and found.has(("scaling", 2))


def test_pure_noise_has_no_law_and_says_its_r2() -> None:
    found = evidence(lambda p: 4.6)
    law = learning_rate_law(found)
    assert law is not None and law.gamma is None and law.gamma_interval is None and law.r2 < 0.5
    assert f"{law.r2:.2g}" in law.note and "carries no guideline" in law_lines(found, fitted(found), None)[0]


def test_without_rank_or_learning_rate_there_is_no_law() -> None:
    for name in ("rank", "learning_rate"):
        settings = [p for p in grid() if p[name] == grid()[0][name]]
        assert learning_rate_law(gather(planted(settings, truth), None)) is None
    assert surface_of(gather(planted(grid()[:4], truth), None)) is None


def test_other_axes_enter_as_lines_and_squares_or_as_levels() -> None:
    settings = [
        {"temperature": t, "variant": v, "learning_rate": lr} for t in (1.0, 2.0, 4.0) for v in ("lora", "dora") for lr in RATES
    ]
    found = surface_of(
        gather(planted(settings, lambda p: 4.6 + 0.1 * math.log(p["temperature"]) + 0.1 * (p["variant"] == "dora")), None)
    )
    assert found is not None and found.trusted
    assert found.has(("temperature", 2)) and found.has(("variant lora", 1))
    assert found.coordinates["temperature"].log


def test_runs_worse_than_the_untrained_student_bound_the_surface_and_are_counted() -> None:
    records = planted(grid(), truth)
    worse = [trial(f"w{r}", {**grid()[0], "rank": r, "learning_rate": 0.05}, 9.0) for r in RANKS]
    found = surface_of(gather([*records, *worse], None))
    assert found is not None and found.num_outside == 5 and not {r.id for r in worse} & set(found.ids)
    assert found.r2 > 0.9


def test_the_trend_saturates_where_the_planted_one_does() -> None:
    def saturating(params: Params) -> float:
        return truth(params, slope=0) + 0.05 * max(0.0, 4 - math.log2(params["rank"])) ** 2

    found = evidence(saturating)
    trend = rank_trend(found, surface_of(found))
    assert trend is not None and 8 <= trend.saturation <= 32
    assert trend.spearman[0] > 0.5 and trend.kendall[1] < 0.05
    assert list(trend.isotonic) == sorted(trend.isotonic)
    falling = evidence(lambda p: truth(p, slope=0.05))
    worse = rank_trend(falling, surface_of(falling))
    assert worse is not None and worse.saturation == 4 and worse.spearman[0] < -0.9


def test_the_regret_of_a_value_is_what_was_planted() -> None:
    found = regret(surface(), "kd_ratio", 0.0)
    assert found.loss == pytest.approx(0.1 * 0.7**2 - 0.1 * 0.04, abs=0.015)
    assert found.interval[0] < found.loss < found.interval[1]
    assert found.p(0.1) < 0.01 and found.p(0.001) < 0.01 and found.p(found.loss * 0.99) > 0.5


def test_two_one_sided_tests_are_those_of_statsmodels() -> None:
    from statsmodels.stats.weightstats import DescrStatsW

    x = np.random.default_rng(1).normal(0.1, 1, 40)
    p = DescrStatsW(x).ttost_mean(-0.5, 0.5)[0]
    assert equivalence_p(float(x.mean()), float(x.std(ddof=1) / math.sqrt(40)), 0.5, 39) == pytest.approx(p, rel=1e-6)
    assert equivalence_p(1.0, 0.1, 0.5, 39) < 0.001 and equivalence_p(0.5, 0.1, 0.5, 39) == pytest.approx(0.5)


def test_a_gaussian_process_finds_the_surface_s_optimum() -> None:
    found = surface()
    check = cross_check(found)
    assert check is not None and check.num_settings == check.num_known == 75 and check.agrees
    assert check.surface["rank"] == check.process["rank"] == 64
    assert math.log(check.process["learning_rate"] / check.surface["learning_rate"]) == pytest.approx(0, abs=0.6)


def test_a_gaussian_process_that_knows_nothing_agrees_with_nothing() -> None:
    from dataclasses import replace

    found = evidence()
    check = cross_check(fitted(found).surface)  # type: ignore[arg-type]
    assert check is not None and check.tells and "too unsure" not in law_lines(found, fitted(found), check)[-1]
    blind = replace(check, error=check.spread)
    assert blind.agrees and "too unsure of either to say anything" in law_lines(found, fitted(found), blind)[-1]


def test_a_law_without_a_map_says_that_a_sampler_chose_its_trials() -> None:
    records = planted(grid(), truth)
    law = learning_rate_law(gather(records, sweep(sampler={"name": "tpe", "num_trials": 75})))
    assert law is not None and "tpe gathered these trials" in law.note
    random = learning_rate_law(gather(records, sweep()))
    assert random is not None and "gathered" not in random.note


def test_no_more_settings_than_said_are_cross_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neo_ray.crosscheck.MOST", 30)
    found = evidence()
    check = cross_check(fitted(found).surface)  # type: ignore[arg-type]
    assert check is not None and (check.num_settings, check.num_known) == (30, 75)
    assert "on 30 settings, of 75" in law_lines(found, fitted(found), check)[-1]

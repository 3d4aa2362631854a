"""Reference: effects that are planted in several studies, and textbook values of a meta-analysis."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from planted import Params, draw, planted, sweep, trial
from test_analyze import folder_with
from test_hypotheses import SEEDS, arms
from test_laws import RATES, grid, truth

from neo_ray.analyze import analyse, main, side_by_side
from neo_ray.evidence import gather
from neo_ray.pooling import Estimate, pool, pooled, pooled_lines, trends
from neo_ray.records import TrialRecord


def estimates(values: list[float], errors: list[float]) -> list[Estimate]:
    return [Estimate("q", "", f"s{i}", v, e) for i, (v, e) in enumerate(zip(values, errors, strict=True))]


def slope(gain: float) -> object:
    def surface(params: Params) -> float:
        return 4.6 + 0.1 * (math.log10(params["learning_rate"]) + 3) ** 2 - gain * math.log2(params["rank"] / 16)

    return surface


def test_equal_estimates_have_no_heterogeneity_and_unlike_ones_have() -> None:
    same = pool(estimates([1.0, 1.0, 1.0], [0.1, 0.2, 0.1]))
    assert (same.effect, same.tau, same.i2) == (pytest.approx(1), 0, 0)
    apart = pool(estimates([0.0, 1.0, 2.0], [0.1, 0.1, 0.1]))
    assert apart.effect == pytest.approx(1) and apart.tau == pytest.approx(math.sqrt(1 - 0.01), abs=1e-3)
    assert apart.i2 == pytest.approx(1 - 2 / 200), "Q is 200 on 2 degrees of freedom"
    assert apart.interval == pytest.approx((1 - 4.3027 / 3**0.5, 1 + 4.3027 / 3**0.5), abs=1e-3)


def test_the_pooled_interval_covers_the_mean_over_studies() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        truths = rng.normal(0.5, 0.3, 4)
        low, high = pool(estimates(list(truths + 0.2 * rng.standard_normal(4)), [0.2] * 4)).interval
        covered += low <= 0.5 <= high
    assert covered >= 180


def test_a_planted_trend_is_found_in_its_unit() -> None:
    found = trends(gather(planted(draw(40, 0), slope(0.03)), sweep()))  # type: ignore[arg-type]
    unit, value, error = found["rank"]
    assert unit == "nats per token per doubling of rank" and value == pytest.approx(0.03, abs=3 * error) and error < 0.01
    assert "kd_ratio" in found and found["kd_ratio"][0] == "nats per token per 1 of kd_ratio"
    assert trends(gather(planted(draw(6, 0), slope(0.03)), sweep())) == {}  # type: ignore[arg-type]


def test_several_studies_are_pooled_and_one_pair_is_called_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    students = ("some/student", "some/student", "another/student")
    folders = [
        folder_with(tmp_path / f"s{i}", planted(draw(30, i), slope(gain), seed=i), sweep(student={"model": model}))  # type: ignore[arg-type]
        for i, (gain, model) in enumerate(zip((0.02, 0.03, 0.04), students, strict=True))
    ]
    analyses = [analyse(folder) for folder in folders]
    rank = next(found for found in pooled(analyses) if found.question == "gain in select_ce with rank")
    assert rank.effect == pytest.approx(0.03, abs=0.01) and rank.tau > 0 and len(rank.estimates) == 3
    assert pooled_lines(analyses)[0] == "3 studies of 2 pairs of models"
    assert "this pair only" in pooled_lines(analyses[:2])[0] and pooled_lines(analyses[:1]) == []
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for words, place in (["--out", str(tmp_path / "out")], tmp_path / "out"), ([], tmp_path / "here" / "results"):
        assert main([*map(str, folders[:2]), *words]) == 0
        assert "Pooled" in (printed := capsys.readouterr().out) and "pooled.md, pooled.json" in printed
        data = json.loads((place / "pooled.json").read_text())
        assert data["pooled"] and data["lines"] == pooled_lines(analyses[:2])
        text = (place / "pooled.md").read_text().replace("\\", "")
        assert all(f"- {line}\n" in text for line in (*data["lines"], *side_by_side(analyses[:2])))


def tuned_arms(settings: list[Params], leaf: str, levels: dict[object, float], seed: int) -> list[TrialRecord]:
    """A valley in the learning rate for each level of a leaf, with three seeds."""

    def surface(params: Params) -> float:
        return 4.5 + levels[params[leaf]] + 0.03 * math.log(params["learning_rate"] / 1e-3) ** 2

    return planted(settings, surface, seed, 0.003, SEEDS)


def exchangeable(seed: int) -> list[TrialRecord]:
    """lr* falls as alpha rises, at one rank."""
    rates = np.geomspace(1e-4, 1e-2, 7).tolist()
    settings = [{"rank": 16, "learning_rate": lr, "alpha": a} for lr in rates for a in (8.0, 16.0, 32.0)]
    return planted(settings, lambda p: 4.6 + 0.03 * math.log(p["learning_rate"] * p["alpha"] / 0.016) ** 2, seed, 0.003, SEEDS)


def timed(seed: int) -> list[TrialRecord]:
    """The seconds of a trial differ by chance alone."""
    rng = np.random.default_rng(seed)
    found = planted(grid(), truth, seed=seed)
    return [r.model_copy(update={"seconds": 12 * math.exp(0.02 * rng.standard_normal())}) for r in found]


def variants(seed: int) -> list[TrialRecord]:
    settings = [{"variant": v, "learning_rate": lr} for v in ("lora", "moslora") for lr in RATES]
    return tuned_arms(settings, "variant", {"lora": 0.0, "moslora": 0.01 * seed}, seed)


@pytest.mark.parametrize(
    ("studies", "truths"),
    [
        (
            [arms(4.5), arms(4.48)],
            {
                "neo beats kd (select_ce)": 0.11,
                "neo beats lora (select_ce)": 0.11,
                "neo beats sft (select_ce)": 0.16,
                "the best learning rate of an adapter is 5 to 20 times that of full training (select_ce)": 0.0,
                "neo takes a quarter less memory than kd (peak_memory_bytes)": 1 - 2.0 / 3.4 - 0.25,
            },
        ),
        ([variants(1), variants(2)], {"moslora is as good as lora within 1 % (select_ce)": -0.015}),
        ([exchangeable(0), exchangeable(1)], {"learning rate and alpha are exchangeable at fixed rank (select_ce)": 0.0}),
        ([timed(0), timed(1)], {"rank barely moves the time of a token (10 %) (seconds)": 0.0}),
    ],
    ids=["methods", "variants", "alpha", "time"],
)
def test_hypotheses_are_pooled_by_their_place(tmp_path: Path, studies: list[list[TrialRecord]], truths: dict[str, float]) -> None:
    analyses = [analyse(folder_with(tmp_path / f"s{i}", records, None)) for i, records in enumerate(studies)]
    found = {each.question: each for each in pooled(analyses)}
    for question, value in truths.items():
        assert found[question].effect == pytest.approx(value, abs=0.05) and len(found[question].estimates) == 2
        assert found[question].interval[0] <= value <= found[question].interval[1]
    assert not any("is as good as the best" in question or "does not fall" in question for question in found)


def test_exponents_under_unlike_alpha_rules_are_not_pooled(tmp_path: Path) -> None:
    """alpha = rank and alpha = 2 × rank are of one rule; one alpha for all ranks is another."""
    rules = {"same": lambda r: 1.0 * r, "double": lambda r: 2.0 * r, "fixed": lambda r: 32.0}
    found = [
        analyse(folder_with(tmp_path / name, planted(grid(alpha=rule), truth, seed=i), None))
        for i, (name, rule) in enumerate(rules.items())
    ]
    (gamma,) = [each for each in pooled(found) if each.question.startswith("γ")]
    assert [e.study for e in gamma.estimates] == ["same", "double"] and "one scaling at every rank" in gamma.question


def rooted(records: list[TrialRecord]) -> list[TrialRecord]:
    """The same trials by rsLoRA: alpha over the root of the rank."""
    return [r.model_copy(update={"scaling": r.params["alpha"] / math.sqrt(r.params["rank"])}) for r in records]


def test_alpha_over_the_rank_and_over_its_root_are_two_rules(tmp_path: Path) -> None:
    """One alpha for all ranks: γ is 0 over the rank and −¼ over its root (arXiv 2602.06204), and their mean is neither."""
    studies = {
        "fixed": planted(grid(alpha=lambda r: 32.0), truth, seed=0),
        "fixed again": planted(grid(alpha=lambda r: 16.0), truth, seed=1),
        "rslora": rooted(planted(grid(alpha=lambda r: 32.0), truth, seed=2)),
        "rslora again": rooted(planted(grid(alpha=lambda r: 16.0), truth, seed=3)),
    }
    found = [analyse(folder_with(tmp_path / name, records, None)) for name, records in studies.items()]
    gammas = [each for each in pooled(found) if each.question.startswith("γ")]
    assert [[e.study for e in each.estimates] for each in gammas] == [["fixed", "fixed again"], ["rslora", "rslora again"]]
    assert "(rsLoRA)" not in gammas[0].question and gammas[1].question.endswith(
        "one alpha at every rank over the root of the rank (rsLoRA)"
    )


def test_the_rule_says_by_what_alpha_is_divided() -> None:
    def rule(records: list[TrialRecord]) -> str | None:
        return gather(records, None).scope.alpha_rule

    fixed, moving = (
        [trial(str(r), {"rank": r, "alpha": a(r)}, 4.5) for r in (4, 16, 64)] for a in (lambda r: 16.0, lambda r: 2.0 * r)
    )
    assert rule(fixed) == "alpha 16 at every rank, scaling 0.25 to 4"
    assert rule(rooted(fixed)) == "alpha 16 at every rank over the root of the rank (rsLoRA), scaling 2 to 8"
    assert rule([*fixed, *rooted(fixed)]) == "alpha 16 at every rank over the rank or its root (rsLoRA), scaling 0.25 to 8"
    assert rule(moving) == "scaling 2 at every rank"
    assert rule(rooted(moving)) == "alpha and rank vary separately over the root of the rank (rsLoRA), scaling 4 to 16"

"""Figures and claims of benchmarks. Reference: planted scores, whose differences are known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from planted import sweep, trial
from test_analyze import folder_with

from neo_ray.analyze import analyse
from neo_ray.charts import Bars, Lines, Points
from neo_ray.drafts import Guideline
from neo_ray.figures import WHERE_ASKED
from neo_ray.page import charts_of, page
from neo_ray.records import TrialRecord
from neo_ray.report import Analysis, markdown, trials_table
from neo_ray.scores import SuiteScores, place, save

BEFORE = {"suite": 0.5, "suite_a": 0.4, "suite_b": 0.6}


def asked(id: str, params: dict[str, Any], value: float, a: float, b: float, **fields: Any) -> TrialRecord:
    """A trial of the planted kind that was asked two benchmarks."""
    record = trial(id, params, value, **fields)
    metrics = {**record.metrics, "suite": (a + b) / 2, "suite_a": a, "suite_b": b}
    errors = {"suite_standard_errors": {"average": 0.02, "a": 0.03, "b": 0.03}, "suite": "own v3"}
    baseline = {**record.details.get("baseline", {}), **BEFORE}
    return record.model_copy(update={"metrics": metrics, "details": {**record.details, **errors, "baseline": baseline}})


def papers_three_questions() -> list[TrialRecord]:
    """Before and after, two variants, three lengths: trials that have a figure of each."""
    grid = [(variant, tokens, rank) for variant in ("lora", "moslora") for tokens in (1000, 10_000, 100_000) for rank in (4, 8)]
    return [
        asked(
            f"{number:04d}",
            {"variant": variant, "tokens": tokens, "rank": rank},
            4.9 - 0.1 * number,
            0.4 + 0.02 * number,
            0.6 + 0.01 * number,
            tokens=tokens,
        )
        for number, (variant, tokens, rank) in enumerate(grid)
    ]


PAPERS_FIGURES = {"before_and_after", "variants", "lengths"}


def analysed(folder: Path, records: list[TrialRecord]) -> Analysis:
    return analyse(folder_with(folder, records))


def bars(chart: Any) -> dict[str, list[float]]:
    return {layer.name: [round(x, 6) for x in layer.length] for layer in chart.panels[0].layers if isinstance(layer, Bars)}


def test_before_and_after_are_those_of_the_best_trial(tmp_path: Path) -> None:
    records = [asked("0000", {"rank": 4}, 4.6, 0.7, 0.5), asked("0001", {"rank": 8}, 4.5, 0.55, 0.75)]
    chart = charts_of(analysed(tmp_path, records))[0]["before_and_after"]
    assert [text for _, text in chart.panels[0].y.ticks] == ["average", "b", "a"]
    assert bars(chart) == {"untrained student": [50.0, 60.0, 40.0], "trial 0001": [65.0, 75.0, 55.0]}
    (ends,) = (layer for layer in chart.panels[0].layers if isinstance(layer, Points))
    assert ends.spread[0] == pytest.approx((63.0, 67.0))
    assert "went from 50 to 65 (+15.0); it rose on 2 of 2 benchmarks" in chart.caption


def test_variants_are_compared_at_their_best_settings_over_seeds(tmp_path: Path) -> None:
    records = [
        asked("0000", {"variant": "lora", "rank": 4}, 4.5, 0.6, 0.6, seed=0),
        asked("0001", {"variant": "lora", "rank": 4}, 4.6, 0.7, 0.6, seed=1),
        asked("0002", {"variant": "lora", "rank": 8}, 4.9, 0.9, 0.9, seed=0),
        asked("0003", {"variant": "moslora", "rank": 8}, 4.4, 0.6, 0.8, seed=0),
    ]
    chart = charts_of(analysed(tmp_path, records))[0]["variants"]
    assert bars(chart) == {"lora (0000, 0001)": [62.5, 60.0, 65.0], "moslora (0003)": [70.0, 80.0, 60.0]}
    assert "lora 62.5; moslora 70" in chart.caption and "standard error of 2.0" in chart.caption


def test_scores_stand_against_the_tokens_of_each_length(tmp_path: Path) -> None:
    lengths = {1000: (4.8, 4.9), 10_000: (4.7, 4.6)}
    records = [
        asked(f"{i}{tokens}", {"tokens": tokens, "rank": 4 + i}, value, 5.2 - value, 0.6, tokens=tokens)
        for tokens, values in lengths.items()
        for i, value in enumerate(values)
    ]
    chart = charts_of(analysed(tmp_path, records))[0]["lengths"]
    loss, suite = ([layer for layer in panel.layers if isinstance(layer, Lines) and layer.wide] for panel in chart.panels)
    assert (loss[0].x, loss[0].y) == ((1000.0, 10_000.0), (4.8, 4.6))
    assert suite[0].y == pytest.approx((0.5, 0.6))
    assert "select_ce at its best: 4.8 after 1,000, 4.6 after 10,000." in chart.caption


def test_a_sweep_that_asks_none_of_it_has_no_word_of_it(tmp_path: Path) -> None:
    analysis = analysed(tmp_path, [trial(f"{i}", {"rank": 2 + i}, 4.5 + i / 10) for i in range(4)])
    charts, reasons = charts_of(analysis)
    assert not set(charts) & set(WHERE_ASKED) and not any("enchmarks" in reason for reason in reasons)
    assert "enchmarks" not in page(analysis).partition("<script>")[0]


def items(right: int, of: int = 100) -> SuiteScores:
    return SuiteScores("own v3", None, {"a": [1.0] * right + [0.0] * (of - right)})


def item_claims(folder: Path, records: list[TrialRecord], scores: dict[str, SuiteScores]) -> list[Guideline]:
    for id in scores.keys() - {"student"}:
        save(scores[id], folder / "trials" / id)
    if "student" in scores:
        save(scores["student"], place(folder, "own-3-abc", None, "student"))
    return [guideline for guideline in analysed(folder, records).guidelines if guideline.metric == "suite"]


def of_arm(id: str, value: float, method: str, variant: str = "lora") -> TrialRecord:
    record = asked(id, {"method": method, "variant": variant}, value, 0.6, 0.6)
    lora = {**record.config["lora"], "variant": variant}
    return record.model_copy(update={"config": {**record.config, "method": method, "lora": lora}})


def claims(folder: Path, scores: dict[str, SuiteScores]) -> dict[str, Any]:
    """Axis → the guideline about items, of a neo and a lora trial."""
    found = item_claims(folder, [of_arm("0000", 4.4, "neo"), of_arm("0001", 4.5, "lora")], scores)
    return {guideline.axis: guideline for guideline in found}


def test_models_are_told_apart_by_the_items_on_which_they_differ(tmp_path: Path) -> None:
    found = claims(tmp_path, {"0000": items(60), "0001": items(59), "student": items(40)})
    training, method = found["training"], found["method"]
    assert training.verdict == "supported" and training.effect == pytest.approx(0.2) and training.interval[0] > 0.1
    assert "trial 0000 is better than the untrained student: 60.0 % against 40.0 %, better on 20 and worse on 0" in training.claim
    assert method.verdict == "undecided" and method.trials == ("0000", "0001")
    assert "method neo (trial 0000) is better than method lora (trial 0001)" in method.claim
    assert "more COMPLETE trials" not in method.note


def test_items_of_another_suite_or_of_nobody_make_no_claim(tmp_path: Path) -> None:
    other = SuiteScores("other v1", None, {"a": [1.0] * 100})
    found = claims(tmp_path, {"0000": items(60), "0001": items(59), "student": other})
    assert set(found) == {"method"}


def test_methods_and_variants_are_compared_item_by_item_each_by_its_best(tmp_path: Path) -> None:
    records = [
        of_arm("0000", 4.4, "neo"),
        of_arm("0001", 4.3, "neo", "moslora"),
        of_arm("0002", 4.9, "neo", "moslora"),
        of_arm("0003", 4.5, "kd"),
        of_arm("0004", 4.6, "sft"),
        of_arm("0005", 4.7, "lora"),
    ]
    right = {"0000": 50, "0001": 80, "0002": 10, "0003": 40, "0004": 30, "0005": 20}
    found = item_claims(tmp_path, records, {id: items(number) for id, number in right.items()})
    assert {guideline.trials: guideline.hypothesis.partition(" than ")[2] for guideline in found} == {
        ("0001", "0005"): "method lora (trial 0005)",
        ("0003", "0004"): "method sft (trial 0004)",
        ("0001", "0003"): "method kd (trial 0003)",
        ("0001", "0000"): "neo with lora (trial 0000)",
    }
    (variant,) = (guideline for guideline in found if guideline.axis == "variant")
    assert variant.verdict == "supported" and variant.effect == pytest.approx(0.3)
    assert "neo with moslora (trial 0001) is better than neo with lora (trial 0000): 80.0 % against 50.0 %" in variant.claim


BARE = re.compile(r"\bsuite(_[ab])?\b")


@pytest.mark.parametrize("limit", [None, 50])
def test_the_suite_s_name_and_version_stand_beside_every_average(tmp_path: Path, limit: int | None) -> None:
    grid = [(variant, rank, seed) for variant in ("lora", "moslora") for rank in (4, 8, 16, 32) for seed in (0, 1)]
    records = []
    for number, (variant, rank, seed) in enumerate(grid):
        tokens = 1000 * rank
        params = {"variant": variant, "rank": rank, "learning_rate": 2e-4 * (1 + number // 2 % 3), "tokens": tokens}
        a = 0.4 + 0.01 * rank + 0.002 * seed
        record = asked(f"{number:04d}", params, 4.5 - a, a, 0.6, seed=seed, tokens=tokens, peak_memory_bytes=rank * 10**9)
        curve = [{"rung": i, "step": i, "tokens": i * tokens // 2, "suite": a, "select_ce": 4.0} for i in (1, 2)]
        records.append(record.model_copy(update={"curve": curve, "details": {**record.details, "suite_limit": limit}}))
    config = sweep(
        objective={"metric": "suite"},
        evaluation={"suite": "quickstart"},
        sampler={"name": "grid"},
        search={"rank": {"grid": [4, 8, 16, 32]}, "variant": {"grid": ["lora", "moslora"]}},
    )
    analysis = analyse(folder_with(tmp_path, records, config))
    title = "own v3" if limit is None else "own v3 (first 50 items of a task)"
    text = markdown(analysis)
    assert f"ranked by: {title}, higher is better" in text and f"| {title} |" in text
    assert not BARE.search(text), BARE.findall(text)
    assert {"knee", "luck", "region"} <= set(analysis.aspects)
    charts = charts_of(analysis)[0]
    assert {"variants", "lengths", "curves", "gains"} <= set(charts)
    for chart in charts.values():
        words = [chart.title, chart.caption]
        for panel in chart.panels:
            words += [
                panel.title,
                panel.x.label,
                panel.y.label,
                *(text for scale in (panel.x, panel.y) for _, text in scale.ticks),
            ]
            words += [line for layer in panel.layers for line in getattr(layer, "hover", ()) if isinstance(line, str)]
        assert not any(BARE.search(word) for word in words), (chart.name, [word for word in words if BARE.search(word)][:3])
    assert charts["lengths"].panels[0].y.label == title
    assert charts["variants"].caption.startswith(f"{title}: the best setting of each variant")


def test_the_table_of_trials_has_the_average_where_another_score_ranks(tmp_path: Path) -> None:
    columns, rows = trials_table([asked("0000", {"rank": 4}, 4.6, 0.7, 0.5), trial("0001", {"rank": 8}, 4.5)])
    values = {row[0]: row[columns.index("own v3")] for row in rows}
    assert values == {"0000": "0.6000", "0001": "–"}

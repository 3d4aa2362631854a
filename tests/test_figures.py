"""Do the figures show what the records hold? Reference: the planted records themselves, and the numbers of each chart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from planted import draw, everything, flat, planted, trial, valley
from test_analyze import STRANGE, folder_with
from test_suite_charts import PAPERS_FIGURES, papers_three_questions

from neo_ray.analyze import analyse
from neo_ray.charts import Band, Bars, Cells, Chart, Lines, NotDrawn, Points, Span, log_ticks
from neo_ray.drawing import COLOURS, ON_DARK, figure, pale_end, panel_figure
from neo_ray.figures import CHARTS, rates
from neo_ray.page import charts_of
from neo_ray.printing import write_figures
from neo_ray.records import TrialRecord
from neo_ray.report import Analysis


def analysed(folder: Path, records: list[TrialRecord]) -> Analysis:
    return analyse(folder_with(folder, records))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    return analysed(tmp_path_factory.mktemp("whole"), everything())


def layers(chart: Chart, kind: type, name: str | None = None) -> list[Any]:
    found = [layer for panel in chart.panels for layer in panel.layers if isinstance(layer, kind)]
    return [layer for layer in found if name is None or layer.name == name]


def test_a_sweep_with_everything_has_every_figure(whole: Analysis) -> None:
    charts, reasons = charts_of(whole)
    assert list(charts) == list(CHARTS) and reasons == []
    for name, chart in charts.items():
        assert chart.name == name and chart.caption and "nan" not in chart.caption and "None" not in chart.caption


def test_the_matrix_marks_the_best_the_failed_and_the_pruned(whole: Analysis) -> None:
    (cells,) = layers(CHARTS["matrix"](whole), Cells)
    assert cells.darker == "low" and cells.best == (4, 2)  # rank 64 at learning rate 1e-3
    assert cells.texts[4][2].startswith("★ ") and cells.values[4][2] == min(v for row in cells.values for v in row if v)
    assert cells.values[4][4] is None and cells.texts[4][4] == "✕4"
    assert cells.texts[0][4].endswith(" ∞2"), "these diverged; those ran out of memory"
    assert "2 PRUNED" in cells.hover[0][0]


def test_a_cell_of_pruned_trials_alone_says_so(tmp_path: Path) -> None:
    settings = [{"rank": r, "learning_rate": x} for r in (4, 8) for x in (1e-4, 1e-3)]
    records = [trial(str(i), p, 4.5 + i, state="PRUNED" if i == 3 else "COMPLETE") for i, p in enumerate(settings)]
    chart = CHARTS["matrix"](analysed(tmp_path, records))
    (cells,) = layers(chart, Cells)
    assert cells.texts[1][1] == "▽1" and "▽ pruned" in chart.caption and "✕" not in chart.caption


def test_a_higher_metric_is_darker_where_it_is_maximised(whole: Analysis) -> None:
    cells = Cells(((1.0, 2.0),), (("1", "2"),), (("", ""),), "high", (0, 1))
    pale, dark = pale_end(cells)
    assert (pale, dark) == (1.0, 2.0)
    (low,) = layers(CHARTS["matrix"](whole), Cells)
    pale, dark = pale_end(low)
    assert dark == min(v for row in low.values for v in row if v) and pale > dark


def test_the_best_rate_of_a_rank_is_open_where_it_is_at_the_end_of_those_tried(tmp_path: Path) -> None:
    def rising(params: dict[str, Any]) -> float:
        return valley(params) if params["rank"] > 4 else 4.6 - params["learning_rate"]

    settings = [{"rank": r, "learning_rate": x} for r in (4, 8, 16) for x in (1e-4, 1e-3, 1e-2)]
    analysis = analysed(tmp_path, planted(settings, rising, noise=1e-4))
    chart = rates(analysis)
    within, censored = layers(chart, Points)
    assert (within.x, within.y, within.symbol) == ((8.0, 16.0), (1e-3, 1e-3), "dot")
    assert (censored.x, censored.y, censored.symbol) == ((4.0,), (1e-2,), "ring")
    assert "At 1 of them" in chart.caption and not layers(chart, Band), "nine settings carry no law"


def test_the_gains_are_those_of_the_effects_with_their_intervals(whole: Analysis) -> None:
    chart = CHARTS["gains"](whole)
    (points,) = layers(chart, Points)
    known = sorted((e.gain, e.interval) for e in whole.effects.values() if e is not None)
    assert list(zip(points.x, points.spread, strict=True)) == known
    assert [text for _, text in chart.panels[0].y.ticks][-1] in ("learning_rate", "rank")
    (noise,) = layers(chart, Span)
    assert whole.evidence.noise is not None and (noise.low, noise.high) == (-whole.evidence.noise.sd, whole.evidence.noise.sd)


def test_slices_shade_the_values_of_the_settings_that_are_as_good_as_the_best(tmp_path: Path) -> None:
    values = {4: 5.0, 8: 4.501, 16: 4.5, 32: 5.0}
    records = [
        trial(f"{rank}-{seed}", {"rank": rank}, values[rank] + (0.01 if seed else -0.01), seed=seed)
        for rank in values
        for seed in (0, 1)
    ]
    chart = CHARTS["slices"](analysed(tmp_path, records))
    (span,) = layers(chart, Span)
    assert 7 < span.low <= 8 and 16 <= span.high < 18 and "the 2 settings" in chart.caption
    alone = CHARTS["slices"](analysed(tmp_path / "one", [r for r in records if r.seed == 0]))
    assert not layers(alone, Span) and "not known which are as good" in alone.caption


def test_slices_have_every_complete_trial_the_fit_and_the_best(whole: Analysis) -> None:
    chart = CHARTS["slices"](whole)
    complete = sum(record.state == "COMPLETE" for record in whole.evidence.records)
    assert [panel.x.label for panel in chart.panels] == list(whole.evidence.axes)
    for panel in chart.panels:
        (points,) = [layer for layer in panel.layers if isinstance(layer, Points) and layer.name == "COMPLETE"]
        assert len(points.x) == complete
        assert any(isinstance(layer, Band) for layer in panel.layers)
    assert {star.x for star in layers(chart, Points, "best")} >= {(64.0,), (1e-3,)}


def test_trials_worse_than_the_untrained_student_are_counted_not_drawn(tmp_path: Path) -> None:
    records = [*planted(draw(12, 0), flat), trial("far", draw(1, 1)[0], 900.0)]
    analysis = analysed(tmp_path, records)
    for name in ("slices", "parallel", "costs"):
        chart = CHARTS[name](analysis)
        assert "1 trial worse than the untrained student" in chart.caption
        assert all(y < 10 for layer in layers(chart, Points) for y in layer.y)


def test_parallel_coordinates_have_a_line_a_trial_in_fifths(whole: Analysis) -> None:
    lines = layers(CHARTS["parallel"](whole), Lines)
    complete = sum(record.state == "COMPLETE" for record in whole.evidence.records)
    assert len(lines) == 5 and sum(math.isnan(x) for line in lines for x in line.x) == complete
    best = lines[-1]
    assert best.name == "best fifth" and max(y for x, y in zip(best.x, best.y, strict=True) if x == 3) < 0.35
    assert all(-1e-9 <= y <= 1 + 1e-9 for line in lines for y in line.y if not math.isnan(y))


def test_no_setting_beats_one_of_the_front(tmp_path: Path) -> None:
    costs = [(4.5, 10.0, 4), (4.4, 20.0, 5), (4.6, 20.0, 5), (4.5, 11.0, 3)]
    records = [
        trial(str(i), {"rank": i + 1}, ce, accelerator_seconds=s, peak_memory_bytes=g * 2**30)
        for i, (ce, s, g) in enumerate(costs)
    ]
    chart = CHARTS["costs"](analysed(tmp_path, records))
    time, memory = chart.panels
    for panel, at in ((time, 1), (memory, 2)):
        (front,) = [layer for layer in panel.layers if isinstance(layer, Points) and layer.name == "beaten by none"]
        assert sorted(zip(front.x, front.y, strict=True)) == sorted((costs[i][at], costs[i][0]) for i in (0, 1, 3))


def test_curves_have_a_line_a_trial_and_the_states_apart(whole: Analysis) -> None:
    chart = CHARTS["curves"](whole)
    names = {line.name: line for line in layers(chart, Lines)}
    assert whole.best is not None and f"best: trial {whole.best.id}" in names
    assert names["PRUNED"].dash == "dash" and max(x for x in names["PRUNED"].x if not math.isnan(x)) == 2000
    assert names["untrained student"].y == (5.18, 5.18)
    assert "FAILED" not in names  # one value is no curve


def test_seeds_stand_beside_their_mean_and_the_noise(whole: Analysis) -> None:
    chart = CHARTS["seeds"](whole)
    (means,), (runs,) = layers(chart, Points, "mean ± one standard deviation of a run"), layers(chart, Points, "a run")
    assert whole.evidence.noise is not None
    for i, (mean, (low, high)) in enumerate(zip(means.x, means.spread, strict=True)):
        own = [x for x, y in zip(runs.x, runs.y, strict=True) if y == i]
        assert len(own) in (2, 3) and mean == pytest.approx(sum(own) / len(own))
        assert high - low == pytest.approx(2 * whole.evidence.noise.sd)
    assert chart.panels[0].y.ticks[-1][1] == "rank\u00a064, learning_rate\u00a01e-3"
    assert "In all of them: kd_ratio\u00a00.5." in chart.caption


def test_the_timeline_has_a_bar_a_trial_in_the_lane_of_its_slot(whole: Analysis) -> None:
    chart = CHARTS["timeline"](whole)
    bars = layers(chart, Bars)
    assert sum(len(bar.x) for bar in bars) == len(whole.evidence.records)
    assert [text for _, text in chart.panels[0].y.ticks] == ["slot 1", "slot 0"]
    assert min(x for bar in bars for x in bar.x) == 0.0
    assert {bar.name for bar in bars} == {"COMPLETE", "PRUNED", "FAILED"}


LACKING = {
    "one trial": ("matrix", "rates", "slices", "gains", "parallel", "costs", "seeds", "timeline"),
    "all failed": tuple(CHARTS),
    "complete without metrics": tuple(CHARTS),
    "one value on an axis": ("matrix", "rates", "seeds", "timeline"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_figure_without_data_is_a_sentence_that_says_why(case: str, tmp_path: Path) -> None:
    analysis = analysed(tmp_path, STRANGE[case])
    charts, reasons = charts_of(analysis)
    assert len(charts) + len(reasons) == len(CHARTS)
    assert all(" drawn: " in reason and reason.endswith(".") for reason in reasons)
    for name in LACKING.get(case, ()):
        with pytest.raises(NotDrawn):
            CHARTS[name](analysis)
    for chart in charts.values():
        for panel in chart.panels:
            text = panel_figure(panel).to_json()
            json.loads(text, parse_constant=lambda name: pytest.fail(name))
        figure(chart)


def test_what_is_removed_from_the_records_leaves_the_figure(whole: Analysis, tmp_path: Path) -> None:
    without = {
        "curves": {"curve": []},
        "timeline": {"started": None},
        "seeds": {"seed": 0},
        "costs": {"seconds": 0.0, "accelerator_seconds": 0.0, "peak_memory_bytes": 0},
    }
    for name, change in without.items():
        records = [record.model_copy(update=change) for record in whole.evidence.records]
        with pytest.raises(NotDrawn):
            CHARTS[name](analysed(tmp_path / name, records))


@pytest.mark.parametrize(
    "case", ["everything", "benchmarks", "mixed types", "one level each", "all equal", "one value on an axis"]
)
def test_paper_figures_are_written_as_png_and_svg(case: str, tmp_path: Path) -> None:
    records = {**STRANGE, "everything": everything(), "benchmarks": papers_three_questions()}[case]
    charts, _ = charts_of(analysed(tmp_path, records))
    assert (set(charts) >= PAPERS_FIGURES) == (case == "benchmarks")
    paths = write_figures(charts.values(), tmp_path / "figures")
    assert sorted(path.name for path in paths) == sorted(f"{name}.{kind}" for name in charts for kind in ("png", "svg"))
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in content[:1000]


def test_the_same_figure_is_the_same_file(whole: Analysis, tmp_path: Path) -> None:
    chart = CHARTS["gains"](whole)
    first, again = (write_figures([chart], tmp_path / name)[1].read_bytes() for name in ("a", "b"))
    assert first == again


def test_every_role_has_its_colour_on_dark_paper() -> None:
    assert set(COLOURS) == set(ON_DARK) and len(set(COLOURS.values())) == len(COLOURS)


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (1e-4, 1e-2, ["1e-4", "2e-4", "5e-4", "1e-3", "2e-3", "5e-3", "0.01"]),
        (1e-3, 2e-3, ["1e-3", "1.4e-3", "2e-3"]),
        (1.0, 300.0, ["1", "3", "10", "30", "100", "300"]),
        (1e-9, 1.0, ["1e-9", "1e-7", "1e-5", "1e-3", "0.1"]),
    ],
)
def test_ticks_of_a_logarithmic_axis_read_as_a_person_writes_them(low: float, high: float, texts: list[str]) -> None:
    assert [text for _, text in log_ticks(low, high)] == texts

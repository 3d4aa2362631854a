"""Does `report.html` work? Its markup by Python's own parser, and the page itself in headless Chromium."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from planted import draw, everything, flat, planted, trial
from test_analyze import STRANGE, folder_with
from test_confirmed import STUDY
from test_confirmed import records as confirmed_records
from test_laws import grid, truth
from test_objectives import RECORDS, several
from test_suite_charts import PAPERS_FIGURES, papers_three_questions
from test_upcoming import study

from neo_ray.analyze import analyse, main
from neo_ray.figures import CHARTS
from neo_ray.page import charts_of, page
from neo_ray.records import TrialRecord
from neo_ray.report import markdown

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MOST_BYTES = 6_000_000
"""plotly.js is 4.7 MB of it."""


class Markup(HTMLParser):
    """The elements of a page, and its text without scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.within = ""
        self.feed(text)
        self.ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        self.links = [a["href"] or "" for tag, a in self.elements if tag == "a"]
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.within = tag

    def handle_endtag(self, tag: str) -> None:
        self.within = ""

    def handle_data(self, data: str) -> None:
        if self.within not in ("script", "style"):
            self.texts.append(data)


def markup(folder: Path, records: list[TrialRecord]) -> Markup:
    return Markup(page(analyse(folder_with(folder, records))))


def test_the_door_writes_one_file_that_asks_the_network_for_nothing(tmp_path: Path) -> None:
    assert main([str(folder_with(tmp_path, everything()))]) == 0
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(content.encode()) < MOST_BYTES and content.count("plotly.js v") == 1
    found = Markup(content)
    assert not [a for tag, a in found.elements if tag in ("link", "img", "iframe") or "src" in a]
    assert all(link.startswith("#") for link in found.links)
    assert "@import" not in content.partition("</style>")[0] and "url(" not in content.partition("</style>")[0]


def test_every_link_leads_to_an_element_and_every_id_is_one(tmp_path: Path) -> None:
    records = [*everything(), trial("odd id/€ #1", {"rank": 4, "learning_rate": 1e-3, "kd_ratio": 0.5}, 4.5)]
    found = markup(tmp_path, records)
    assert len(set(found.ids)) == len(found.ids)
    assert len(found.links) > 50 and {link[1:] for link in found.links} <= set(found.ids)


def test_sections_guidelines_and_rows_are_there(tmp_path: Path) -> None:
    analysis = analyse(folder_with(tmp_path, everything()))
    found = Markup(page(analysis))
    sections = [a["id"] for tag, a in found.elements if tag == "section"]
    said = [f"said-{name}" for name in analysis.aspects if name not in CHARTS]
    assert sections == ["best", "laws", "guidelines", "untested", *said, *CHARTS, "failures", "swept", "noise", "trials"]
    assert all(" ".join(g.claim.split()) in found.text for g in analysis.guidelines if g.trials)
    rows = [a["id"] for tag, a in found.elements if tag == "tr" and "id" in a]
    assert len(rows) == len(analysis.evidence.records)


def study_of(name: str, folder: Path) -> Path:
    """The results folder of a study with sections that others lack."""
    if name == "undecided":
        return study(folder, planted(grid(), truth, noise=0.01))
    records, config = {
        "everything": (everything(), None),
        "confirmed": (confirmed_records(), STUDY),
        "several objectives": (RECORDS, several()),
    }[name]
    return folder_with(folder, records, config)


SECTIONS = {
    "everything": {"Rank × learning rate", "Learning curves", "Failures by cause", "Importances"},
    "confirmed": {"Phases", "Confirmed"},
    "several objectives": {"Pareto front"},
    "undecided": {"Laws", "Not tested", "What to run next"},
}


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_of_the_markdown_report_is_on_the_page(name: str, tmp_path: Path) -> None:
    """Its heading, and what is said below it; a figure may be not drawn instead, which is said."""
    analysis = analyse(study_of(name, tmp_path))
    content, sections = page(analysis), re.split(r"^## ", markdown(analysis), flags=re.MULTILINE)[1:]
    text, headings = Markup(content).text, re.findall("<h2>(.*)</h2>", content)
    assert {section.partition("\n")[0] for section in sections} >= SECTIONS[name]
    for title, _, body in (section.partition("\n") for section in sections):
        assert title in headings or f"{title} are not drawn: " in text, f"{title} is in report.md alone"
        lines = [line.replace("\\", "") for line in re.findall(r"^- (?!trials: )(.*)", body, re.MULTILINE)]
        assert not [line for line in lines if line not in text], title


def test_the_table_of_trials_marks_the_front(tmp_path: Path) -> None:
    found = Markup(page(analyse(folder_with(tmp_path, RECORDS, several()))))
    assert "trial state front" in found.text and "0001 COMPLETE yes" in found.text and "0004 COMPLETE yes" not in found.text


def test_what_is_removed_from_the_records_leaves_the_page(tmp_path: Path) -> None:
    records = everything()
    whole = markup(tmp_path / "whole", records)
    assert "out_of_memory" in whole.text and "Learning curves" in whole.text and "Not drawn" not in whole.text
    less = [r.model_copy(update={"curve": [], "started": None}) for r in records if r.state != "FAILED"]
    found = markup(tmp_path / "less", less)
    assert "out_of_memory" not in found.text and "✕" not in found.text and "Failures by cause" not in found.text
    assert not {"curves", "timeline", "failures"} & set(found.ids)
    assert "Learning curves are not drawn: no trial has told its select_ce twice." in found.text
    assert "The timeline is not drawn: no trial says when it began and ended." in found.text


def test_what_users_and_exceptions_wrote_is_not_markup(tmp_path: Path) -> None:
    evil = "</script><script>window.broken = 1</script><b>&"
    records = [trial(f"{i}{evil}", {"note": evil + str(i % 3), "rank": 2 + i}, 4.5 + i / 10, seed=i % 2) for i in range(9)]
    records.append(trial("f", {"rank": 3}, None, state="FAILED", cause="error", error=evil, metrics={}))
    found = markup(tmp_path, records)
    assert evil in found.text  # as text
    assert sum(tag == "script" for tag, _ in found.elements) == 4 and sum(tag == "b" for tag, _ in found.elements) == 0


@pytest.mark.parametrize("case", ["one trial", "all failed", "one value on an axis", "complete without metrics", "mixed types"])
def test_strange_records_have_a_page_that_says_what_is_missing(case: str, tmp_path: Path) -> None:
    found = markup(tmp_path, STRANGE[case])
    assert "Not drawn" in found.text and "trials" in found.ids
    assert "nan" not in found.text.lower().replace("nan, or worse", "") and "None" not in found.text


# In the browser.


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    study = Path(__file__).parent.parent / "docs" / "studies" / "teacher"
    assert main([str(study), "--out", str(folder / "teacher")]) == 0
    cases = {"everything": everything(), "few": planted(draw(6, 0), flat), "failed": STRANGE["all failed"]}
    cases["benchmarks"] = papers_three_questions()
    for name, records in cases.items():
        assert main([str(folder_with(folder / name, records))]) == 0
    return {name: folder / name / "report.html" for name in ("teacher", *cases)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as engine:
        started = engine.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Any, report: Path, **options: Any) -> tuple[Any, list[str]]:
    """The page after all is drawn, and what the browser complained of or asked the network for."""
    complaints: list[str] = []
    tab = browser.new_page(**options)
    tab.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on(
        "request",
        lambda asked: complaints.append(asked.url[:80]) if not asked.url.startswith(("file:", "data:", "blob:")) else None,
    )
    tab.goto(report.as_uri(), timeout=60_000)
    tab.wait_for_selector("html[data-drawn=all]", timeout=60_000)
    return tab, complaints


VIEWS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 375, "height": 800}, "is_mobile": True, "has_touch": True},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
}


def test_every_figure_is_drawn_and_nothing_is_complained_of(browser: Any, reports: dict[str, Path]) -> None:
    for view, options in VIEWS.items():
        for name, report in reports.items():
            tab, complaints = opened(browser, report, **options)
            charts, _ = charts_of(analyse(report.parent))
            wanted = [f"figure-{name}-{i}" for name, chart in charts.items() for i in range(len(chart.panels))]
            drawn = "nodes => nodes.filter(n => n.querySelector('.main-svg .plot, .main-svg .cartesianlayer')).map(n => n.id)"
            assert tab.eval_on_selector_all(".figure", drawn) == wanted, (view, name)
            assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (view, name)
            assert complaints == [], (view, name)
            tab.close()


MARKS = """name => Object.fromEntries(["bars .point", "scatter .point", "scatter .js-line"].map(kind => [
    kind, document.querySelectorAll(`[id^="figure-${name}-"] .trace.${kind}`).length]))"""
"""What plotly drew of a figure, over its panels."""


def test_benchmarks_are_drawn_bar_by_bar_and_trial_by_trial(browser: Any, reports: dict[str, Path]) -> None:
    charts, _ = charts_of(analyse(reports["benchmarks"].parent))
    assert set(charts) >= PAPERS_FIGURES
    tab, _ = opened(browser, reports["benchmarks"], **VIEWS["desktop"])
    rows, ends = 3, 1  # the average and two benchmarks; the best trial's standard errors
    assert tab.evaluate(MARKS, "before_and_after") == {
        "bars .point": 2 * rows,
        "scatter .point": ends * rows,
        "scatter .js-line": 0,
    }
    assert tab.evaluate(MARKS, "variants") == {"bars .point": 2 * rows, "scatter .point": 0, "scatter .js-line": 0}
    panels, lines = 2, 2  # held-out loss and the suite; the best of each length, and the untrained student
    trials = len(papers_three_questions())
    assert tab.evaluate(MARKS, "lengths") == {
        "bars .point": 0,
        "scatter .point": panels * trials,
        "scatter .js-line": panels * lines,
    }
    tab.close()


def test_figures_follow_dark_and_print(browser: Any, reports: dict[str, Path]) -> None:
    tab, complaints = opened(browser, reports["everything"], **VIEWS["desktop"])
    ink = "document.querySelector('#figure-curves-0 .xtick text').style.fill"
    width = "document.querySelector('#figure-curves-0 .main-svg').getBoundingClientRect().width"
    light, wide = tab.evaluate(ink), tab.evaluate(width)
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_function(f"{ink} !== '{light}'")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    tab.wait_for_function(f"{ink} === '{light}' && {width} <= 690 && {width} < {wide}")
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    tab.wait_for_function(f"{ink} !== '{light}' && {width} === {wide}")
    assert tab.pdf().startswith(b"%PDF") and complaints == []
    tab.close()


def test_the_table_sorts_by_any_column_and_what_is_missing_comes_last(browser: Any, reports: dict[str, Path]) -> None:
    tab, _ = opened(browser, reports["everything"], **VIEWS["desktop"])
    heads = tab.eval_on_selector_all("table.sortable th", "nodes => nodes.map(n => n.textContent)")

    def sorted_by(name: str) -> list[str]:
        tab.click(f"table.sortable th:nth-child({heads.index(name) + 1}) button")
        return list(
            tab.eval_on_selector_all(f"table.sortable td:nth-child({heads.index(name) + 1})", "n => n.map(c => c.textContent)")
        )

    upward, downward = sorted_by("CE"), sorted_by("CE")
    missing = upward.count("–")
    values = [float(text) for text in upward[:-missing]]
    assert missing == 6 and values == sorted(values) and set(upward[-missing:]) == {"–"}
    assert [float(text) for text in downward[:-missing]] == values[::-1] and set(downward[-missing:]) == {"–"}
    assert [float(text) for text in sorted_by("learning rate")] == sorted(float(r.params["learning_rate"]) for r in everything())
    assert sorted_by("trial") == [record.id for record in everything()]
    tab.close()


def test_a_link_to_a_trial_leads_to_its_row(browser: Any, reports: dict[str, Path]) -> None:
    tab, _ = opened(browser, reports["teacher"], **VIEWS["desktop"])
    tab.click(".verdict details summary >> nth=0")
    tab.click(".verdict details a >> nth=0")
    assert tab.eval_on_selector("tr:target", "row => row.cells[0].textContent") == "0003"
    assert tab.eval_on_selector("tr:target", "row => row.getBoundingClientRect().top < innerHeight")
    tab.close()

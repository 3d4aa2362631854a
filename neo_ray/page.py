"""How does a person look at it? `report.html`: one file with everything in it, which opens from disk and needs no network."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

from neo_ray.charts import Cells, Chart, NotDrawn
from neo_ray.drafts import Guideline
from neo_ray.figures import CHARTS, WHERE_ASKED
from neo_ray.law_text import law_lines, parted
from neo_ray.pareto import front_lines, front_trials
from neo_ray.phase_text import confirmed_lines, phase_lines
from neo_ray.report import (
    FAILURE_COLUMNS,
    Analysis,
    best_lines,
    evidence_line,
    failure_rows,
    legend,
    noise_line,
    scope_lines,
    title_of,
    trials_table,
)

HERE = Path(__file__).parent
NUMBER = re.compile(r"–|-?[\d.]+(e-?\d+)?[kM]?")
MAX_LINKS = 60
"""Trials named by a guideline that lead to their rows."""


def page(analysis: Analysis) -> str:
    """`report.html`. A section without data is not written; a figure without data is a sentence that says why."""
    evidence = analysis.evidence
    known = {record.id for record in evidence.records}
    charts, reasons = charts_of(analysis)
    told, untested = parted(analysis.guidelines)
    failures = failure_rows(evidence.records)
    columns, rows = trials_table(evidence.records, evidence.metric, evidence.mode, front_trials(evidence))
    sections = [
        ("best", "Best setting", _bullets(best_lines(analysis))),
        ("confirmed", "Confirmed", _bullets(confirmed_lines(evidence))),
        ("front", "Pareto front", _bullets(front_lines(evidence))),
        ("laws", "Laws", _bullets(law_lines(evidence, analysis.found, analysis.check))),
        ("guidelines", "Guidelines", "".join(_guideline(g, known) for g in told)),
        ("untested", "Not tested", _bullets(untested)),
        ("next", "What to run next", _bullets([line for sweep in analysis.upcoming for line in sweep.lines])),
        *((f"said-{name}", said.title, _bullets(said.lines)) for name, said in analysis.aspects.items() if name not in charts),
        *((name, chart.title, _said(analysis, name) + _chart(name, chart)) for name, chart in charts.items()),
        ("lacking", "Not drawn", _bullets(reasons)),
        ("failures", "Failures by cause", _table(FAILURE_COLUMNS, failures) if failures else ""),
        ("swept", "What was swept", _bullets(scope_lines(analysis))),
        ("phases", "Phases", _bullets(phase_lines(evidence))),
        ("noise", "Noise", f"<p>{escape(noise_line(evidence))}</p>"),
        (
            "trials",
            "All trials",
            f'<p class="caption">{escape(legend(columns))}</p>' + _table(columns, rows, anchor=True, sortable=True),
        ),
    ]
    written = [(name, title, body) for name, title, body in sections if body]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in written)
    body = "\n".join(f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{text}\n</section>' for name, title, text in written)
    return _document(title_of(analysis), _bullets(analysis.notes), links, body, _figures(charts))


def _said(analysis: Analysis, name: str) -> str:
    """The sentences that stand with a figure of the same name."""
    return _bullets(analysis.aspects[name].lines) if name in analysis.aspects else ""


def charts_of(analysis: Analysis) -> tuple[dict[str, Chart], list[str]]:
    """The charts whose data are there, by name, and for each of the others a sentence that says what is missing."""
    charts, reasons = {}, []
    for name, chart in CHARTS.items():
        try:
            charts[name] = chart(analysis)
        except NotDrawn as reason:
            reasons.append(str(reason))
    for name, chart in WHERE_ASKED.items():
        with suppress(NotDrawn):
            charts[name] = chart(analysis)
    return charts, reasons


def _document(title: str, notes: str, links: str, body: str, figures: str) -> str:
    from plotly.offline import get_plotlyjs

    from neo_ray.drawing import COLOURS, DARK_PAPER, ON_DARK, PAPER

    colours = _json(json.dumps({COLOURS[role]: ON_DARK[role] for role in COLOURS} | {PAPER: DARK_PAPER}))
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{notes}
</header>
<nav aria-label="Sections">{links}</nav>
<main>
{body}
</main>
<script type="application/json" id="figures">{figures}</script>
<script type="application/json" id="on-dark">{colours}</script>
<script>{get_plotlyjs()}</script>
<script>
{script}</script>
</body>
</html>
"""


def _chart(name: str, chart: Chart) -> str:
    several = " several" if len(chart.panels) > 1 else ""
    panels = "".join(_panel(name, index, chart) for index in range(len(chart.panels)))
    return f'{_caption(chart.caption)}\n<div class="panels{several}">{panels}</div>'


def _panel(name: str, index: int, chart: Chart) -> str:
    from neo_ray.drawing import height_of

    panel = chart.panels[index]
    columns = next((len(layer.values[0]) for layer in panel.layers if isinstance(layer, Cells)), 0)
    width = f"min-width: {90 + 62 * columns}px; " if columns else ""
    title = f"<h3>{escape(panel.title)}</h3>" if panel.title else ""
    place = f'<div id="figure-{name}-{index}" class="figure" style="{width}height: {height_of(panel)}px"></div>'
    return f'<div class="panel">{title}<div class="scroll">{place}</div></div>'


def _figures(charts: dict[str, Chart]) -> str:
    """Id of its place on the page → plotly's data and layout, as JSON that can stand in a script element."""
    from neo_ray.drawing import panel_figure

    drawn = [
        f'"figure-{name}-{index}": {panel_figure(panel).to_json()}'
        for name, chart in charts.items()
        for index, panel in enumerate(chart.panels)
    ]
    return _json("{" + ",\n".join(drawn) + "}")


def _json(text: str) -> str:
    """A `<` may end the script element, and stands in strings alone."""
    return text.replace("<", "\\u003c")


def _guideline(guideline: Guideline, known: set[str]) -> str:
    lines = [f"asked: {guideline.hypothesis}", evidence_line(guideline), guideline.note]
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in lines if line)
    shown = [trial for trial in guideline.trials[:MAX_LINKS] if trial in known]
    more = f" and {len(guideline.trials) - len(shown)} more" if len(guideline.trials) > len(shown) else ""
    links = ", ".join(f'<a href="#{_anchor(trial)}">{escape(trial)}</a>' for trial in shown)
    trials = f"<details><summary>{guideline.num_trials} trials</summary><p>{links}{more}</p></details>" if links else ""
    return (
        f'<article class="verdict {guideline.verdict}"><h3><span class="badge">{guideline.verdict}</span>'
        f"{escape(guideline.claim)}</h3>{paragraphs}{trials}</article>\n"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], anchor: bool = False, sortable: bool = False) -> str:
    """An HTML table; with `anchor`, a row can be linked to by its first cell."""
    heads = [escape(column.replace("_", " ")) for column in columns]
    if sortable:
        heads = [f'<button type="button">{text}</button>' for text in heads]
    head = "".join(f'<th scope="col"{" aria-sort=none" if sortable else ""}>{text}</th>' for text in heads)
    ids = [f' id="{_anchor(row[0])}"' if anchor else "" for row in rows]
    body = "\n".join(f"<tr{id}>{''.join(map(_cell, row))}</tr>" for id, row in zip(ids, rows, strict=True))
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _cell(text: str) -> str:
    kind = ' class="long"' if len(text) > 40 else ' class="number"' if NUMBER.fullmatch(text) else ""
    return f"<td{kind}>{escape(text)}</td>"


def _anchor(trial: str) -> str:
    """An id that needs no escaping in a link: other signs stand as their numbers."""
    return "trial-" + "".join(sign if sign.isalnum() and sign.isascii() else f"_{ord(sign)}_" for sign in trial)


def _caption(text: str) -> str:
    return f'<p class="caption">{escape(text)}</p>'


def _bullets(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""

"""How does a chart look on a screen? Its panels as plotly figures."""

from __future__ import annotations

import html
import math
import textwrap
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from neo_ray.charts import Band, Bars, Cells, Chart, Layer, Lines, Panel, Points, Role, Scale, Span, Texts

COLOURS: dict[Role, str] = {
    "COMPLETE": "#6568b2",
    "PRUNED": "#d08700",
    "FAILED": "#684739",
    "RUNNING": "#14a27b",
    "best": "#ec2965",
    "fit": "#333a41",
    "region": "#0e748d",
    "quiet": "#8c97a6",
    "fifth0": "#08519c",
    "fifth1": "#3182bd",
    "fifth2": "#6baed6",
    "fifth3": "#a8c5e0",
    "fifth4": "#cfd4da",
}
"""Any two but fifths that are not neighbours differ by 12 or more in CIELAB, to the colour-blind, too."""
ON_DARK: dict[Role, str] = {
    "COMPLETE": "#7eb0eb",
    "PRUNED": "#ffb74d",
    "FAILED": "#bb937d",
    "RUNNING": "#5ccfb2",
    "best": "#d84985",
    "fit": "#e6e8ea",
    "region": "#66ffbd",
    "quiet": "#8999ac",
    "fifth0": "#ffd166",
    "fifth1": "#8ecae6",
    "fifth2": "#5fa8d3",
    "fifth3": "#41769c",
    "fifth4": "#3a4654",
}
"""The same on a dark page."""
SHADES = ("#f0f6fc", "#b5d3e9", "#5b9dcd", "#2166ac", "#0a2f5e")
"""Of a matrix, from worse to better: readable in grey, and on light and dark pages alike."""
NO_VALUE = "#c4b9a8"
PAPER, DARK_PAPER = "#fffffe", "#14181c"
"""Behind a label that lies on lines; that of a dark page is page.css's."""
ON_SHADES = ("#0d1b2a", "#fdfdfd")
"""Text on pale and on dark cells, which begin at DARK (between 0 and 1)."""
DARK = 0.6
SYMBOLS = {
    "dot": "circle",
    "ring": "circle-open",
    "star": "star",
    "cross": "x",
    "triangle": "triangle-down-open",
    "diamond": "diamond",
}
WIDTH_OF_A_NAME = 24
"""Characters of a row's name on one line."""
HEIGHT = 340


def figure(chart: Chart) -> go.Figure:
    """All panels of a chart in one figure, as a notebook shows it."""
    columns = min(3, len(chart.panels))
    rows = math.ceil(len(chart.panels) / columns)
    titles = [panel.title for panel in chart.panels]
    drawn = make_subplots(rows, columns, subplot_titles=titles if any(titles) else None)
    for index, panel in enumerate(chart.panels):
        _add(drawn, panel, index // columns + 1, index % columns + 1)
    height = max(height_of(panel) for panel in chart.panels) * rows
    return drawn.update_layout(title=chart.title, height=height + 60, template="plotly_white")


def panel_figure(panel: Panel) -> go.Figure:
    """One panel alone, without a title: the page says it."""
    drawn = make_subplots(1, 1)
    _add(drawn, panel, 1, 1)
    return drawn.update_layout(height=height_of(panel), margin={"l": 8, "r": 8, "t": 8, "b": 8}, template=None)


def height_of(panel: Panel) -> int:
    """Pixels."""
    lines = max([1, *(len(_wrapped(text)) for _, text in panel.y.ticks)]) if panel.rows else 1
    return 120 + panel.rows * max(38, 8 + 15 * lines) if panel.rows else HEIGHT


def _add(drawn: go.Figure, panel: Panel, row: int, column: int) -> None:
    named = {trace.name for trace in drawn.data}
    for layer in panel.layers:
        for trace in TRACES[type(layer)](layer):
            if trace.name in named or trace.name in ("", "none"):
                trace.showlegend = False
            named.add(trace.name)
            drawn.add_trace(trace, row=row, col=column)
        if isinstance(layer, Span):
            add = drawn.add_vrect if layer.over == "x" else drawn.add_hrect
            ends = {"x0": layer.low, "x1": layer.high} if layer.over == "x" else {"y0": layer.low, "y1": layer.high}
            style = {"fillcolor": COLOURS[layer.role], "opacity": 0.22, "line_width": 0, "layer": "below"}
            add(**ends, **style, row=row, col=column)
        if isinstance(layer, Texts):
            for x, y, text in zip(layer.x, layer.y, layer.text, strict=True):
                style = {"showarrow": False, "bgcolor": PAPER, "borderpad": 1, "opacity": 0.9, "font": {"size": 11}}
                drawn.add_annotation(x=x, y=y, text=html.escape(text, quote=False), row=row, col=column, **style)
        if isinstance(layer, Cells) and layer.best:
            i, j = layer.best
            outline = {"line": {"color": COLOURS["best"], "width": 3}}
            drawn.add_shape(type="rect", x0=j - 0.5, x1=j + 0.5, y0=i - 0.5, y1=i + 0.5, row=row, col=column, **outline)
    plain = any(isinstance(layer, Cells | Texts) for layer in panel.layers)
    drawn.update_xaxes(**_axis(panel.x), showgrid=not plain, showline=not plain, row=row, col=column)
    told = bool(panel.y.label or panel.rows)
    drawn.update_yaxes(**_axis(panel.y), showgrid=not plain, showline=not plain, showticklabels=told, row=row, col=column)
    drawn.update_layout(
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 11}},
        hovermode="closest",
        barmode="overlay",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )


def _axis(scale: Scale) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": scale.label, "standoff": 8}, "type": "log" if scale.log else "linear"}
    axis |= {"automargin": True, "zeroline": False, "ticks": "outside" if scale.label else ""}
    if scale.ticks:
        texts = ["<br>".join(_wrapped(text)) for _, text in scale.ticks]
        axis |= {"tickvals": [at for at, _ in scale.ticks], "ticktext": texts, "tickangle": 0 if _short(texts) else None}
    if scale.ends:
        axis["range"] = [math.log10(end) for end in scale.ends] if scale.log else list(scale.ends)
    return axis


def _short(texts: list[str]) -> bool:
    return max(map(len, texts)) * len(texts) <= 40


def _wrapped(text: str) -> list[str]:
    return [html.escape(line, quote=False) for line in textwrap.wrap(text, WIDTH_OF_A_NAME)] or [""]


def _hover(texts: tuple[str, ...]) -> dict[str, Any]:
    if not texts:
        return {"hoverinfo": "skip"}
    return {"hovertext": [_told(text) for text in texts], "hoverinfo": "text"}


def _told(text: str) -> str:
    return "<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(text, 44))


def _points(layer: Points) -> list[go.Scatter]:
    colour, size = COLOURS[layer.role], 15 if layer.symbol == "star" else 9
    marker = {"color": colour, "symbol": SYMBOLS[layer.symbol], "size": size, "opacity": 0.55 if len(layer.x) > 200 else 0.85}
    marker["line"] = {"width": 2 if layer.symbol == "ring" else 0, "color": colour}
    points = go.Scatter(name=layer.name, mode="markers", x=layer.x, y=layer.y, marker=marker, **_hover(layer.hover))
    if layer.spread:
        at = layer.x if layer.along == "x" else layer.y
        more = [high - value for value, (_, high) in zip(at, layer.spread, strict=True)]
        less = [value - low for value, (low, _) in zip(at, layer.spread, strict=True)]
        error = {
            "type": "data",
            "symmetric": False,
            "array": more,
            "arrayminus": less,
            "color": colour,
            "thickness": 2,
            "width": 5,
        }
        points.update({f"error_{layer.along}": error})
    return [points]


def _lines(layer: Lines) -> list[go.Scatter]:
    line = {"color": COLOURS[layer.role], "dash": layer.dash, "width": 3 if layer.wide or layer.role == "fit" else 1.3}
    num, dots = sum(map(math.isnan, layer.x)), bool(layer.hover) and not layer.role.startswith("fifth")
    mode = "lines+markers" if dots and num <= 30 else "lines"
    given = {"mode": mode, "marker": {"size": 5}, "connectgaps": False, "opacity": 0.5 if num > 30 else 1.0}
    return [go.Scatter(name=layer.name, x=layer.x, y=layer.y, line=line, **given, **_hover(layer.hover))]


def _band(layer: Band) -> list[go.Scatter]:
    x, y = (*layer.x, *reversed(layer.x)), (*layer.low, *reversed(layer.high))
    fill = {"fill": "toself", "fillcolor": COLOURS[layer.role], "opacity": 0.18, "line": {"width": 0}, "mode": "lines"}
    return [go.Scatter(name=layer.name, x=x, y=y, hoverinfo="skip", **fill)]


def _span(layer: Span) -> list[go.Scatter]:
    """Its entry in the legend; the strip itself is a shape."""
    marker = {"symbol": "square", "size": 12, "color": COLOURS[layer.role], "opacity": 0.35}
    return [go.Scatter(name=layer.name, x=[None], y=[None], mode="markers", marker=marker, hoverinfo="skip")]


def _bars(layer: Bars) -> list[go.Bar]:
    given = {"orientation": "h", "base": layer.x, "x": layer.length, "y": layer.y, "width": layer.thick}
    pattern = {"shape": {"PRUNED": "/", "FAILED": "x"}.get(layer.role, ""), "solidity": 0.3}
    marker = {"color": COLOURS[layer.role], "line": {"color": "#ffffff", "width": 1}, "pattern": pattern}
    return [go.Bar(name=layer.name, marker=marker, **given, **_hover(layer.hover))]


def pale_end(layer: Cells) -> tuple[float, float]:
    """The values of the palest and of the darkest shade. What is far worse than the median gets the palest one, too."""
    known = sorted((value for row in layer.values for value in row if value is not None), reverse=layer.darker == "high")
    if not known:
        return 0.0, 0.0
    best, middle, worst = known[0], known[len(known) // 2], known[-1]
    limit = best + 3 * (middle - best)
    if middle == best or abs(limit - best) > abs(worst - best):
        limit = worst
    return limit, best


def _cells(layer: Cells) -> list[go.Heatmap]:
    pale, dark = pale_end(layer)
    scale = [[k / (len(SHADES) - 1), colour] for k, colour in enumerate(SHADES)]
    shared: dict[str, Any] = {"xgap": 2, "ygap": 2, "showscale": False, "hoverongaps": False, "hoverinfo": "text"}
    shared |= {"hovertext": [[_told(text) for text in row] for row in layer.hover]}
    values = go.Heatmap(name="", z=layer.values, colorscale=scale, reversescale=layer.darker == "low", **shared)
    values.update(zmin=min(dark, pale), zmax=max(dark, pale) if dark != pale else dark + 1e-9)
    pairs = [list(zip(*row, strict=True)) for row in zip(layer.values, layer.texts, strict=True)]
    empty = [[0 if value is None and text else None for value, text in row] for row in pairs]
    without = go.Heatmap(name="", z=empty, colorscale=[[0, NO_VALUE], [1, NO_VALUE]], **shared)
    return [values, *([without] if any(cell is not None for row in empty for cell in row) else []), _cell_texts(layer)]


def _cell_texts(layer: Cells) -> go.Scatter:
    places = [(i, j) for i, row in enumerate(layer.texts) for j, text in enumerate(row) if text]
    colours = [ON_SHADES[shade_of(layer, layer.values[i][j]) > DARK] for i, j in places]
    texts = {"text": [layer.texts[i][j] for i, j in places], "textfont": {"size": 12, "color": colours}}
    x, y = [j for _, j in places], [i for i, _ in places]
    return go.Scatter(name="", mode="text", x=x, y=y, hoverinfo="skip", **texts)


def shade_of(layer: Cells, value: float | None) -> float:
    """Between 0 (pale) and 1 (dark)."""
    pale, dark = pale_end(layer)
    return 0.0 if value is None or pale == dark else min(1.0, max(0.0, (value - pale) / (dark - pale)))


TRACES: dict[type[Layer], Any] = {  # type: ignore[valid-type]
    Points: _points,
    Lines: _lines,
    Band: _band,
    Span: _span,
    Bars: _bars,
    Texts: lambda layer: [],
    Cells: _cells,
}

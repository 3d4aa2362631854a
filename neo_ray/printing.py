"""How does a chart look on paper? Its panels as matplotlib figures, written as PNG and SVG."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from neo_ray.charts import Band, Bars, Cells, Chart, Layer, Lines, Panel, Points, Scale, Span, Texts
from neo_ray.drawing import COLOURS, DARK, NO_VALUE, ON_SHADES, SHADES, WIDTH_OF_A_NAME, shade_of

WIDTH = 3.4
"""Inches of a panel: one column of a two-column page."""
DOTS_PER_INCH = 200
MARKS = {"dot": "o", "ring": "o", "star": "*", "cross": "x", "triangle": "v", "diamond": "D"}
DASHES = {"solid": "-", "dash": "--", "dot": ":"}
SETTINGS: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "svg.fonttype": "none",
    "svg.hashsalt": "neo_ray",
}


def write_figures(charts: Iterable[Chart], folder: str | Path) -> list[Path]:
    """`<name>.png` and `<name>.svg` of each chart; returns their paths. Creates the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in charts:
        drawn = figure(chart)
        for suffix, dated in (("png", {}), ("svg", {"Date": None})):
            path = folder / f"{chart.name}.{suffix}"
            with mpl.rc_context(SETTINGS):
                drawn.savefig(path, dpi=DOTS_PER_INCH, metadata=dated)
            written.append(path)
    return written


def figure(chart: Chart) -> Figure:
    """All panels of a chart in one figure."""
    columns = min(3, len(chart.panels))
    rows = math.ceil(len(chart.panels) / columns)
    with mpl.rc_context(SETTINGS):
        width = WIDTH * max(columns, max(_wide(panel) for panel in chart.panels))
        drawn = Figure((width, rows * max(_height(panel) for panel in chart.panels)), layout="constrained")
        for index, panel in enumerate(chart.panels):
            _add(drawn.add_subplot(rows, columns, index + 1), panel)
    return drawn


def _wide(panel: Panel) -> float:
    """In panel widths: a matrix needs room for its numbers, rows for their names, settings side by side for theirs."""
    cells = next((layer for layer in panel.layers if isinstance(layer, Cells)), None)
    if cells:
        return max(1.0, 0.3 + 0.16 * len(cells.values[0]))
    return 1.7 if panel.rows or any(isinstance(layer, Texts) for layer in panel.layers) else 1.0


def _height(panel: Panel) -> float:
    lines = max([1, *(len(textwrap.wrap(text, WIDTH_OF_A_NAME)) for _, text in panel.y.ticks)]) if panel.rows else 1
    return max(1.5, 0.9 + panel.rows * max(0.26, 0.14 * lines)) if panel.rows else 2.7


def _add(axes: Axes, panel: Panel) -> None:
    for layer in panel.layers:
        DRAW[type(layer)](axes, layer)
    _scale(axes, panel.x, "x")
    _scale(axes, panel.y, "y")
    if not panel.y.label and not panel.y.ticks:
        axes.get_yaxis().set_visible(False)
        axes.spines["left"].set_visible(False)
    if not panel.x.label:
        axes.spines["bottom"].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        axes.legend(unique.values(), unique.keys(), loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def _scale(axes: Axes, scale: Scale, side: str) -> None:
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_label_text(scale.label)
    if scale.log:
        axes.set_xscale("log") if side == "x" else axes.set_yscale("log")
    if scale.ticks:
        axis.set_minor_locator(NullLocator())
        texts = ["\n".join(textwrap.wrap(text, WIDTH_OF_A_NAME)) for _, text in scale.ticks]
        turned: Any = {"rotation": 35, "ha": "right"} if side == "x" and max(map(len, texts)) * len(texts) > 44 else {}
        axis.set_ticks([at for at, _ in scale.ticks], texts, **turned)
    if scale.ends:
        axes.set_xlim(*scale.ends) if side == "x" else axes.set_ylim(*scale.ends)


def _points(axes: Axes, layer: Points) -> None:
    colour = COLOURS[layer.role]
    face = "none" if layer.symbol in ("ring", "triangle") else colour
    size = 90 if layer.symbol == "star" else 20
    if layer.spread:
        at = layer.x if layer.along == "x" else layer.y
        less = [value - low for value, (low, _) in zip(at, layer.spread, strict=True)]
        more = [high - value for value, (_, high) in zip(at, layer.spread, strict=True)]
        axes.errorbar(layer.x, layer.y, **{f"{layer.along}err": (less, more)}, fmt="none", ecolor=colour, capsize=2)  # type: ignore[arg-type]
    style = {"marker": MARKS[layer.symbol], "s": size, "edgecolors": colour, "facecolors": face, "alpha": 0.85}
    axes.scatter(layer.x, layer.y, label=layer.name, zorder=3, linewidths=1, **style)  # type: ignore[arg-type]


def _lines(axes: Axes, layer: Lines) -> None:
    width = 1.8 if layer.wide or layer.role == "fit" else 0.8
    alpha = 0.5 if sum(map(math.isnan, layer.x)) > 30 else 1.0
    label = "_" if layer.name == "none" else layer.name
    axes.plot(layer.x, layer.y, DASHES[layer.dash], color=COLOURS[layer.role], linewidth=width, alpha=alpha, label=label)


def _band(axes: Axes, layer: Band) -> None:
    axes.fill_between(layer.x, layer.low, layer.high, color=COLOURS[layer.role], alpha=0.18, linewidth=0, label=layer.name)


def _span(axes: Axes, layer: Span) -> None:
    shade = axes.axvspan if layer.over == "x" else axes.axhspan
    shade(layer.low, layer.high, color=COLOURS[layer.role], alpha=0.2, linewidth=0, label=layer.name)


def _bars(axes: Axes, layer: Bars) -> None:
    hatch = {"PRUNED": "//", "FAILED": "xx"}.get(layer.role, "")
    style = {"color": COLOURS[layer.role], "edgecolor": "white", "linewidth": 0.5, "hatch": hatch}
    axes.barh(layer.y, layer.length, layer.thick, left=layer.x, label=layer.name, **style)  # type: ignore[arg-type]


def _texts(axes: Axes, layer: Texts) -> None:
    for x, y, text in zip(layer.x, layer.y, layer.text, strict=True):
        paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
        axes.text(x, y, text, ha="center", va="center", fontsize=7, bbox=paper, zorder=5)


def _cells(axes: Axes, layer: Cells) -> None:
    shades = LinearSegmentedColormap.from_list("shades", SHADES)
    for i, row in enumerate(layer.values):
        for j, value in enumerate(row):
            share = shade_of(layer, value)
            if layer.texts[i][j]:
                colour = NO_VALUE if value is None else shades(share)
                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5))
                ink = ON_SHADES[share > DARK]
                axes.text(j, i, layer.texts[i][j], ha="center", va="center", fontsize=7, color=ink)
    if layer.best:
        i, j = layer.best
        axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=COLOURS["best"], linewidth=2, zorder=4))
    axes.set_xlim(-0.5, len(layer.values[0]) - 0.5)
    axes.set_ylim(-0.5, len(layer.values) - 0.5)


DRAW: dict[type[Layer], Any] = {  # type: ignore[valid-type]
    Points: _points,
    Lines: _lines,
    Band: _band,
    Span: _span,
    Bars: _bars,
    Texts: _texts,
    Cells: _cells,
}

"""What is on a figure? Panels of points, lines, bands and cells, as numbers that know nothing of a plotting library.

A chart is computed once, and drawn by plotly for a screen, by matplotlib for paper. Categories stand at 0, 1, 2 …
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from neo_ray.evidence import number
from neo_ray.records import State

Fifth = Literal["fifth0", "fifth1", "fifth2", "fifth3", "fifth4"]
Role = State | Fifth | Literal["best", "fit", "region", "quiet"]
"""What something stands for; the renderers know its colour, and symbols, dashes or words tell it, too."""
Symbol = Literal["dot", "ring", "star", "cross", "triangle", "diamond"]
GAP = math.nan
"""Between two paths of one line."""


class NotDrawn(ValueError):
    """The data of a figure are missing; the message is a sentence that says which."""


@dataclass(frozen=True)
class Scale:
    label: str
    log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()
    """(position, text); empty: the renderer's own."""
    ends: tuple[float, float] | None = None
    """Lowest and highest position shown; None: all of them."""


@dataclass(frozen=True)
class Points:
    name: str
    role: Role
    x: tuple[float, ...]
    y: tuple[float, ...]
    hover: tuple[str, ...] = ()
    symbol: Symbol = "dot"
    spread: tuple[tuple[float, float], ...] = ()
    """Lowest and highest of each point's interval, along `along`."""
    along: Literal["x", "y"] = "x"


@dataclass(frozen=True)
class Lines:
    """Paths one after the other, with a GAP between two."""

    name: str
    role: Role
    x: tuple[float, ...]
    y: tuple[float, ...]
    hover: tuple[str, ...] = ()
    dash: Literal["solid", "dash", "dot"] = "solid"
    wide: bool = False


@dataclass(frozen=True)
class Band:
    name: str
    role: Role
    x: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Span:
    """A shaded strip over all of the other axis."""

    name: str
    role: Role
    low: float
    high: float
    over: Literal["x", "y"] = "x"


@dataclass(frozen=True)
class Bars:
    """Lying bars from x to x + length."""

    name: str
    role: Role
    y: tuple[float, ...]
    x: tuple[float, ...]
    length: tuple[float, ...]
    hover: tuple[str, ...] = ()
    thick: float = 0.62
    """Of the distance between two rows."""


@dataclass(frozen=True)
class Texts:
    x: tuple[float, ...]
    y: tuple[float, ...]
    text: tuple[str, ...]


@dataclass(frozen=True)
class Cells:
    """A matrix. `values[i][j]` is row i (y) at column j (x); None with a text is a cell without a value, else there is none."""

    values: tuple[tuple[float | None, ...], ...]
    texts: tuple[tuple[str, ...], ...]
    hover: tuple[tuple[str, ...], ...]
    darker: Literal["low", "high"]
    """Which end of the values is the dark one."""
    best: tuple[int, int] | None


Layer = Points | Lines | Band | Span | Bars | Texts | Cells


@dataclass(frozen=True)
class Panel:
    x: Scale
    y: Scale
    layers: tuple[Layer, ...]
    title: str = ""
    rows: int = 0
    """Rows that need room, of a panel that grows with them."""


@dataclass(frozen=True)
class Chart:
    """One figure of a report."""

    name: str
    title: str
    caption: str
    """Computed sentences: how to read it, and what was left out."""
    panels: tuple[Panel, ...]


def log_ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """About seven ticks of a logarithmic axis at most: decades, 1, 2 and 5 of each, or (below a factor of 4) round ones."""
    if high < 4 * low:
        ends = sorted({float(f"{value:.2g}") for value in (low, math.sqrt(low * high), high)})
        return tuple((value, number(value, 2)) for value in ends)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**d for d in decades for s in steps if low * 0.99 <= s * 10.0**d <= high * 1.01]
        if len(ticks) <= 7:
            break
    stride = math.ceil(len(ticks) / 7)
    return tuple((value, number(value, 2)) for value in ticks[::stride])


def levels_or_log(values: Sequence[float]) -> tuple[tuple[float, str], ...]:
    """Ticks at the values themselves where they are few and far enough apart to be read; else those of their range."""
    found = sorted(set(values))
    apart = all(b > 1.35 * a for a, b in pairwise(found))
    return tuple((v, number(v, 3)) for v in found) if len(found) <= 8 and apart else log_ticks(found[0], found[-1])


def paths(lines: Sequence[Sequence[tuple[float, float]]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """x and y of several lines in one, with a GAP after each."""
    xs = tuple(x for line in lines for x in (*(point[0] for point in line), GAP))
    ys = tuple(y for line in lines for y in (*(point[1] for point in line), GAP))
    return xs, ys


def level_ticks(values: Sequence[float]) -> tuple[tuple[float, str], ...]:
    """Ticks at the values of a linear axis, where they are few; else the renderer's own."""
    found = sorted({float(v) for v in values})
    return tuple((v, number(v, 3)) for v in found) if len(found) <= 8 else ()


def row_scale(names: Sequence[str]) -> Scale:
    """A scale of named rows, the first one lowest."""
    return Scale("", ticks=tuple((float(i), name) for i, name in enumerate(names)), ends=(-0.6, len(names) - 0.4))

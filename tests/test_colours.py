"""Are the figures' colours apart for those who see fewer of them? Protanopia, deuteranopia and tritanopia are simulated.

Reference: the matrices of Machado, Oliveira & Fernandes, IEEE TVCG 15 (2009), severity 1, for linear RGB; distances are CIELAB's
ΔE*ab under D65. A difference is just seen side by side at 2.3 (Mahy, Van Eycken & Oosterlinck, 1994). Marks of a chart are small
and lie apart, which takes a multiple of that (Stone, Szafir & Setlur, 2014); APART is five times.
"""

from __future__ import annotations

import re
from itertools import combinations, pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from neo_ray.charts import Fifth
from neo_ray.drawing import COLOURS, DARK_PAPER, NO_VALUE, ON_DARK, ON_SHADES, PAPER, SHADES

APART = 12.0
SEEN = {
    "by most": np.eye(3),
    "with protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "with deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "with tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
"""Of linear sRGB."""
THEMES = {"light": (COLOURS, PAPER), "dark": (ON_DARK, DARK_PAPER)}
FIFTHS = get_args(Fifth)


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])


def lab(seen: str, sent: np.ndarray) -> np.ndarray:
    """L*, a*, b* of sRGB between 0 and 1."""
    linear = np.where(sent <= 0.04045, sent / 12.92, ((sent + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(SEEN[seen] @ linear, 0, 1) / (XYZ @ np.ones(3))
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(seen: str, one: str, other: str) -> float:
    return float(np.linalg.norm(lab(seen, rgb(one)) - lab(seen, rgb(other))))


def near(seen: str, pairs: list[tuple[str, str]]) -> list[tuple[str, str, float]]:
    """The pairs of colours that are too close."""
    found = [(one, other, round(distance(seen, one, other), 1)) for one, other in pairs]
    return [each for each in found if each[2] < APART]


def test_the_distance_is_the_published_one() -> None:
    assert lab("by most", rgb("#ff0000")) == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    assert distance("by most", "#000000", "#ffffff") == pytest.approx(100, abs=0.01)
    assert distance("with deuteranopia", "#1b7f3b", "#8f6a3a") < APART < distance("by most", "#1b7f3b", "#8f6a3a"), (
        "red and green"
    )


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("theme", THEMES)
def test_any_two_roles_and_any_neighbouring_fifths_are_apart_on_either_page(theme: str, seen: str) -> None:
    colours, paper = THEMES[theme]
    assert set(colours) == set(COLOURS)
    single = [colour for role, colour in colours.items() if role not in FIFTHS]
    fifths = [colours[role] for role in FIFTHS]
    assert near(seen, list(combinations(single, 2))) == []
    assert near(seen, list(pairwise(fifths))) == []
    assert near(seen, [(colour, paper) for colour in colours.values()]) == []


@pytest.mark.parametrize("seen", SEEN)
def test_the_shades_of_a_matrix_darken_by_steps_that_are_seen(seen: str) -> None:
    assert near(seen, list(pairwise(SHADES))) == []
    lightness = [lab(seen, rgb(shade))[0] for shade in SHADES]
    assert min(a - b for a, b in pairwise(lightness)) >= APART, "in grey and in print, too"


@pytest.mark.parametrize("seen", SEEN)
def test_a_cell_without_a_value_and_the_best_one_stand_out_of_every_shade(seen: str) -> None:
    between = [a + k / 10 * (b - a) for a, b in pairwise(map(rgb, SHADES)) for k in range(11)]
    for mark in (NO_VALUE, COLOURS["best"], ON_DARK["best"]):
        assert min(float(np.linalg.norm(lab(seen, rgb(mark)) - lab(seen, shade))) for shade in between) >= APART, mark
    assert distance(seen, NO_VALUE, ON_SHADES[0]) > 3 * APART, "what is written in it"


@pytest.mark.parametrize("seen", SEEN)
def test_verdicts_are_apart_in_every_theme_of_the_page(seen: str) -> None:
    """Beside the words, which stand with them."""
    style = (Path(__file__).parent.parent / "neo_ray" / "page.css").read_text(encoding="utf-8")
    found = [re.findall(rf"--{verdict}: (#\w{{6}})", style) for verdict in ("supported", "refuted", "undecided")]
    themes = list(zip(*found, strict=True))
    assert len(themes) == 3, "light, dark, print"
    assert [pair for theme in themes for pair in near(seen, list(combinations(theme, 2)))] == []

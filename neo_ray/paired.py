"""Which of two models is better on the same items? The difference of their averages, with an interval over items.

Two scores of 100 items each have standard errors of 5 points, their difference item by item a much smaller one: most items are
right, or wrong, with both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

DRAWS = 4000
Items = Mapping[str, Sequence[float]]
"""Benchmark → each item's value."""


@dataclass(frozen=True)
class Difference:
    """Of the average over benchmarks, ours minus theirs."""

    value: float
    low: float
    high: float
    """Percentile bootstrap over items, drawn anew within each benchmark."""
    better: int
    worse: int
    """Items on which ours has the larger, and the smaller, value."""
    p: float
    """Two-sided: how often would the average differ by so much if each item's difference had either sign alike? With one
    benchmark of right and wrong answers this is McNemar's exact test, otherwise a draw of signs."""


def compare(ours: Items, theirs: Items, seed: int = 0, level: float = 0.95) -> Difference:
    """
    Args:
        level: of the interval.

    Raises:
        ValueError: the two did not answer the same items.
    """
    if {name: len(items) for name, items in ours.items()} != {name: len(items) for name, items in theirs.items()}:
        raise ValueError("two models can only be compared on the same items")
    apart = [np.asarray(ours[name], float) - np.asarray(theirs[name], float) for name in ours]
    generator = np.random.default_rng(seed)
    drawn = np.mean([_means(values, generator) for values in apart], axis=0)
    low, high = np.quantile(drawn, ((1 - level) / 2, (1 + level) / 2))
    better, worse = (int(sum((sign * values > 0).sum() for values in apart)) for sign in (1, -1))
    p = _p(apart, better, worse, generator)
    return Difference(float(np.mean([values.mean() for values in apart])), float(low), float(high), better, worse, p)


def _p(apart: Sequence[np.ndarray], better: int, worse: int, generator: np.random.Generator) -> float:
    if better + worse == 0:
        return 1.0
    if len(apart) == 1 and len(np.unique(np.abs(apart[0][apart[0] != 0]))) == 1:
        return float(binomtest(better, better + worse).pvalue)
    flipped = np.mean([_flipped(values, generator) for values in apart], axis=0)
    found = abs(float(np.mean([values.mean() for values in apart])))
    return float((1 + (np.abs(flipped) >= found - 1e-12).sum()) / (1 + DRAWS))


def _flipped(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means of the values under random signs: as many of each magnitude stay positive as a binomial draws."""
    magnitudes, counts = np.unique(np.abs(values), return_counts=True)
    return (2 * generator.binomial(counts, 0.5, size=(DRAWS, len(counts))) - counts) @ magnitudes / len(values)


def _means(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Of `DRAWS` samples as large as the values: as many of each distinct value as a multinomial draws."""
    distinct, counts = np.unique(values, return_counts=True)
    return generator.multinomial(len(values), counts / len(values), size=DRAWS) @ distinct / len(values)

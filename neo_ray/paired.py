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
    """95 % percentile bootstrap over items, drawn anew within each benchmark."""
    better: int
    worse: int
    """Items on which ours has the larger, and the smaller, value."""
    p: float
    """McNemar's exact test of `better` against `worse`, two-sided: could the two be equally good?"""


def compare(ours: Items, theirs: Items, seed: int = 0) -> Difference:
    """
    Raises:
        ValueError: the two did not answer the same items.
    """
    if {name: len(items) for name, items in ours.items()} != {name: len(items) for name, items in theirs.items()}:
        raise ValueError("two models can only be compared on the same items")
    apart = [np.asarray(ours[name], float) - np.asarray(theirs[name], float) for name in ours]
    generator = np.random.default_rng(seed)
    drawn = np.mean([_means(values, generator) for values in apart], axis=0)
    low, high = np.quantile(drawn, (0.025, 0.975))
    better, worse = (int(sum((sign * values > 0).sum() for values in apart)) for sign in (1, -1))
    p = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return Difference(float(np.mean([values.mean() for values in apart])), float(low), float(high), better, worse, p)


def _means(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Of `DRAWS` samples as large as the values: as many of each distinct value as a multinomial draws."""
    distinct, counts = np.unique(values, return_counts=True)
    return generator.multinomial(len(values), counts / len(values), size=DRAWS) @ distinct / len(values)

"""Between a 95 % interval and what it came from: draws of a bootstrap, or a standard error."""

from __future__ import annotations

import numpy as np
from scipy import stats

from neo_ray.statistics import CONFIDENCE


def percentiles(draws: np.ndarray) -> tuple[float, float]:
    """The interval that holds 95 % of draws (Efron & Tibshirani, 1993)."""
    low, high = np.quantile(draws, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)


def half_width(df: int | None = None, choices: int = 1) -> float:
    """Of a 95 % interval, in standard errors: Student's t, without `df` the normal's; Bonferroni over so many choices."""
    tail = (1 - CONFIDENCE) / 2 / choices
    return float(stats.norm.isf(tail) if df is None else stats.t.isf(tail, df))


def error_of(interval: tuple[float, float], df: int | None = None, choices: int = 1) -> float:
    """The standard error that an interval was made from."""
    return (interval[1] - interval[0]) / 2 / half_width(df, choices)

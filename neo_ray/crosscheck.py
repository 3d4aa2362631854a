"""Would another kind of fit say the same? A Gaussian process over the same settings, and its optimum beside the surface's."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from neo_ray.surface import RATE, Surface

MOST = 500
"""Settings: the fit takes time by their cube. Of more, a random draw."""
MOST_TUNED = 200
"""Settings that the length scales are found on, which takes the cube many times."""
MOST_CANDIDATES = 200
"""Combinations of the other axes, each at 25 learning rates."""
LEAST = 8


@dataclass(frozen=True)
class CrossCheck:
    """The optimum of both fits over the combinations that were tried, the learning rate between its ends."""

    surface: dict[str, Any]
    """Axis → value at the surface's optimum."""
    process: dict[str, Any]
    """At that of the Gaussian process."""
    apart: float
    """What the surface's optimum loses against the process's own, as the process sees it, in units of the metric."""
    error: float
    """The process's standard error there."""
    spread: float
    """Between what the process expects at the best and at the worst of the combinations."""
    num_settings: int
    num_known: int
    """Settings that there are; more than `num_settings` where it was fitted on a draw of them."""

    @property
    def tells(self) -> bool:
        """Is it sure enough to contradict? Else it agrees with any optimum."""
        return 2 * self.error < self.spread

    @property
    def agrees(self) -> bool:
        return self.apart <= 2 * self.error


def cross_check(surface: Surface) -> CrossCheck | None:
    """Matérn 5/2 with a length scale an axis, and white noise (Rasmussen & Williams, 2006); None with too few settings."""
    if len(surface.gains) < LEAST:
        return None
    candidates = _candidates(surface)
    known, at = _inputs(surface, surface.points), _inputs(surface, candidates)
    rng = np.random.default_rng(0)
    size = len(known)
    some = np.sort(rng.choice(size, MOST, replace=False)) if size > MOST else np.arange(size)
    mean, error = _process(known[some], surface.gains[some], at)
    best, theirs = int((surface.rows(candidates) @ surface.beta).argmax()), int(mean.argmax())
    return CrossCheck(
        surface=_setting(surface, candidates.iloc[best]),
        process=_setting(surface, candidates.iloc[theirs]),
        apart=float(mean[theirs] - mean[best]),
        error=float(max(error[best], error[theirs])),
        spread=float(np.ptp(mean)),
        num_settings=len(some),
        num_known=size,
    )


def _process(known: np.ndarray, gains: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error of the gain (m) at the candidates (m × d), from settings (n × d, n)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    scale = float(gains.std()) or 1.0
    kernel = ConstantKernel(1.0) * Matern(np.ones(known.shape[1]), (0.1, 100.0), nu=2.5) + WhiteKernel(0.1, (1e-5, 10.0))
    standard, some = (gains - gains.mean()) / scale, np.random.default_rng(0).permutation(len(known))[:MOST_TUNED]
    process = GaussianProcessRegressor(kernel, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an axis without effect has its length scale at its bound
        process.fit(known[some], standard[some])
    process = GaussianProcessRegressor(process.kernel_, optimizer=None).fit(known, standard)
    mean, deviation = process.predict(at, return_std=True)
    white = process.kernel_.k2.noise_level
    return mean * scale, np.sqrt(np.maximum(deviation**2 - white, 1e-12)) * scale


def _candidates(surface: Surface) -> pd.DataFrame:
    """The combinations that were tried, each at 25 learning rates between the ends of those that were tried."""
    columns = list(dict.fromkeys(c.column for c in surface.coordinates.values()))
    combinations = surface.points[[name for name in columns if name != RATE]].drop_duplicates()
    if RATE not in surface.coordinates:
        return surface.points[columns].drop_duplicates()
    if len(combinations) > MOST_CANDIDATES:
        combinations = combinations.sample(MOST_CANDIDATES, random_state=0)
    rate, ends = surface.coordinates[RATE], surface.ends(RATE)
    return combinations.merge(pd.DataFrame({RATE: rate.back(np.linspace(*ends, 25))}), how="cross")


def _inputs(surface: Surface, points: pd.DataFrame) -> np.ndarray:
    return np.column_stack([c.of(points[c.column]) for c in surface.coordinates.values()])


def _setting(surface: Surface, point: pd.Series) -> dict[str, Any]:
    return {c.column.removeprefix("param."): point[c.column] for c in surface.coordinates.values()}

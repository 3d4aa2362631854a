"""How good is each rank at each learning rate? The matrix of the paper's Figure 2, from the trials as they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from neo_ray.statistics import complete, sign_of


@dataclass(frozen=True)
class Cell:
    best: float | None
    best_id: str | None
    states: dict[str, int]
    num_diverged: int = 0
    """COMPLETE or FAILED; how one that was stopped would have ended is not known."""
    num_failed: int = 0
    """For another cause."""

    @property
    def num_trials(self) -> int:
        return sum(self.states.values())


@dataclass(frozen=True)
class Matrix:
    """rank × learning rate: the best COMPLETE value of each cell. `cells[i][j]` is rank i at learning rate (or bin) j."""

    metric: str
    ranks: tuple[float, ...]
    learning_rates: tuple[tuple[float, float], ...]
    """Lowest and highest tried learning rate of each column; equal for a level."""
    cells: tuple[tuple[Cell, ...], ...]
    best: tuple[int, int] | None


def rank_by_learning_rate(frame: pd.DataFrame, metric: str, mode: str = "min") -> Matrix | None:
    """The matrix of rank × learning rate; None where one of them is not in the table. Above 10 learning rates: 6 log bins."""
    if not {"rank", "learning_rate"} <= set(frame) or metric not in frame:
        return None
    numbers = frame[["rank", "learning_rate"]].apply(pd.to_numeric, errors="coerce")
    runs = frame.assign(**numbers)[(numbers > 0).all(axis=1)].astype({"rank": float, "learning_rate": float})
    if runs.empty:
        return None
    rates = runs["learning_rate"]
    if rates.nunique() > 10:
        bins = pd.cut(np.log(rates), 6, labels=False)
    else:
        bins = rates.rank(method="dense") - 1
    runs = runs.assign(bin=bins)
    columns, ranks = sorted(runs["bin"].unique()), sorted(runs["rank"].unique())
    cells = tuple(tuple(_cell(runs[(runs["rank"] == r) & (runs["bin"] == b)], metric, mode) for b in columns) for r in ranks)
    filled = [(i, j) for i, row in enumerate(cells) for j, cell in enumerate(row) if cell.best is not None]
    pick = max if mode == "max" else min
    return Matrix(
        metric=metric,
        ranks=tuple(ranks),
        learning_rates=tuple((rates[bins == b].min(), rates[bins == b].max()) for b in columns),
        cells=cells,
        best=pick(filled, key=lambda ij: cells[ij[0]][ij[1]].best or 0.0) if filled else None,
    )


def _cell(runs: pd.DataFrame, metric: str, mode: str) -> Cell:
    done = complete(runs, metric)
    states = {str(state): int(count) for state, count in runs["state"].value_counts().items()}
    diverged = runs["diverged"].astype(bool) & runs["state"].isin(("COMPLETE", "FAILED"))
    lost = int(diverged.sum()), int(((runs["state"] == "FAILED") & ~diverged).sum())
    if done.empty:
        return Cell(None, None, states, *lost)
    best = done.iloc[int((sign_of(mode) * done[metric]).argmax())]
    return Cell(float(best[metric]), str(best["id"]), states, *lost)

"""What does a notebook want of a sweep? Its records, a tidy table, fits, guidelines, figures, and Ray Tune's own results.

found = neo_ray.load("results/rank")
found.frame                      # one row a trial
found.figure("matrix")           # a plotly figure, drawn inline
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from neo_ray import uploads
from neo_ray.analyze import analyse
from neo_ray.aspects import Aspect
from neo_ray.charts import Chart
from neo_ray.drafts import Guideline
from neo_ray.effects import AxisEffect
from neo_ray.laws import Law
from neo_ray.page import charts_of
from neo_ray.records import TrialRecord
from neo_ray.report import Analysis, best_lines, title_of
from neo_ray.surface import Surface

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from ray.tune import ResultGrid


class Findings:
    """What a sweep found. Computed when it is asked for, from the records as they were when it was loaded."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.folder = analysis.folder
        self.records: tuple[TrialRecord, ...] = analysis.evidence.records
        self.guidelines: tuple[Guideline, ...] = analysis.guidelines
        self.effects: dict[str, AxisEffect | None] = analysis.effects
        """Axis → its effect on the metric, with the fitted curve; None where the trials do not tell."""

    @property
    def frame(self) -> pd.DataFrame:
        """One row a trial: what was tried (a column an axis), what came out, what it cost. A missing metric is NaN."""
        return self.analysis.evidence.frame

    @property
    def best(self) -> TrialRecord | None:
        """The best trial of the best setting; None without a COMPLETE one."""
        return self.analysis.best

    @property
    def aspects(self) -> dict[str, Aspect]:
        """Sections beside the guidelines, by name: their lines, and the numbers behind them (`found`)."""
        return self.analysis.aspects

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """One row a guideline: verdict, claim, effect, the ends of its interval, trials, seeds."""
        names = ("verdict", "claim", "axis", "metric", "effect", "unit", "p_value", "num_trials", "num_seeds", "note")
        rows = [{name: getattr(g, name) for name in names} | _interval(g) for g in self.guidelines]
        return pd.DataFrame(rows, columns=[*names[:5], "low", "high", *names[5:]])

    @property
    def surface(self) -> Surface | None:
        """The fitted response surface; None where the settings are too few for one.

        `expected(settings)` is the metric at settings that nobody ran, with its interval; `r2` how well it predicts settings that
        were left out (`trusted`: well enough for a guideline); `terms`, `beta`, `covariance` and `dropped` are what was fitted,
        `points` and `gains` what to, `draws` the coefficients under 2,000 draws of the settings (computed when asked for).
        """
        return self.analysis.found.surface

    @property
    def law(self) -> Law | None:
        """The best learning rate of each rank, c × rank^γ; None where the surface does not hold both.

        `gamma`, `c` and their 95 % intervals (`gamma_interval`, `c_interval`), None where `note` says why; `alpha_rule`, under
        which it holds; `optima`: rank → its best learning rate, and whether that is at an end of those tried; `curve`, its band.
        """
        return self.analysis.found.law

    def curve(self, axis: str) -> pd.DataFrame:
        """The fit of the metric along an axis: value, mean, low and high (95 %), num_trials; empty without a fit.

        Raises:
            KeyError: not one of the axes.
        """
        effect = self.effects[axis]
        columns = ["value", "mean", "low", "high", "num_trials"]
        return pd.DataFrame([asdict(level) for level in effect.curve] if effect else [], columns=columns)

    @cached_property
    def _charts(self) -> tuple[dict[str, Chart], list[str]]:
        return charts_of(self.analysis)

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the figures whose data are there."""
        return tuple(self._charts[0])

    @property
    def not_drawn(self) -> list[str]:
        """For each other figure a sentence that says what is missing."""
        return self._charts[1]

    def figure(self, name: str) -> Figure:
        """One of `figures`, as a plotly figure.

        Raises:
            ValueError: no such figure, or none with these data.
        """
        from neo_ray.drawing import figure

        charts, reasons = self._charts
        if name not in charts:
            raise ValueError(f"{name}: not one of {', '.join(charts) or 'no figures'}. {' '.join(reasons)}".strip())
        return figure(charts[name])

    def result_grid(self) -> ResultGrid:
        """What Ray Tune wrote itself, of the last time that the sweep was run. Needs ray, and the sweep's own results folder.

        Raises:
            ValueError: there is nothing of Ray Tune in the folder.
        """
        folders = sorted(path.parent for path in self.folder.glob("ray/*/experiment_state-*.json"))
        if not folders:
            raise ValueError(f"{self.folder / 'ray'}: holds no experiment of Ray Tune")
        from ray.tune import ExperimentAnalysis, ResultGrid

        return ResultGrid(ExperimentAnalysis(str(folders[-1].resolve())))

    def __repr__(self) -> str:
        return "\n".join([title_of(self.analysis), *best_lines(self.analysis), f"figures: {', '.join(self.figures)}"])


def find(path: str | Path) -> Findings:
    """Behind `neo_ray.load`."""
    return Findings(analyse(uploads.local_copy(str(path))))


def _interval(guideline: Guideline) -> dict[str, Any]:
    low, high = guideline.interval or (None, None)
    return {"low": low, "high": high}

"""Which trial is stopped early? Ray Tune's ASHA, Hyperband and median rule over evaluation rungs, replayed from the records.

A trial goes by neo_ray's id, so that a resumed one meets its own history. The last evaluation is no rung: a trial that reached it
is complete. Nothing is ever paused: a slot runs one trial to where it ends.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule
from ray.tune.schedulers.async_hyperband import _Bracket

from neo_ray.config import SweepConfig
from neo_ray.records import TrialRecord


def make_scheduler(config: SweepConfig, records: list[TrialRecord]) -> Asha | Median | None:
    """The scheduler by name, in the state that the records leave it in; None where no trial is stopped."""
    kinds: dict[str, type[Asha] | type[Median]] = {"asha": Asha, "hyperband": Hyperband, "median": Median}
    if config.scheduler.name not in kinds:
        return None
    scheduler = kinds[config.scheduler.name](config)
    scheduler.replay(records)
    return scheduler


@dataclass(frozen=True)
class _Ours:
    """A Tune trial under neo_ray's id."""

    trial_id: str
    config: dict[str, Any] = field(compare=False, hash=False)


class Asha(ASHAScheduler):
    """Asynchronous successive halving: at each rung, the better share of those that came there goes on."""

    def __init__(self, config: SweepConfig) -> None:
        self.rungs = config.scheduler.rungs(config.evaluation.points)
        super().__init__(
            time_attr="rung",
            max_t=config.evaluation.points + 1,
            reduction_factor=config.scheduler.reduction_factor,
            metric=config.objective.metric,
            mode=config.objective.mode,
            stop_last_trials=False,  # else a value that is known at its rung is counted at a lower one, too
        )
        for bracket in self._brackets:
            bracket._rungs = [(rung, {}) for rung in reversed(self.rungs)]

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def replay(self, records: list[TrialRecord]) -> None:
        """Fill the rungs with what trials reported before an interruption."""
        for record in records:
            stub: Any = _Ours(record.id, {"trial": record.id})
            self.on_trial_add(None, stub)
            for row in record.curve:
                if row["rung"] in self.rungs and row.get(str(self._metric)) is not None:
                    super().on_trial_result(None, stub, row)  # type: ignore[arg-type]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _as_ours(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("rung") not in self.rungs or result.get(str(self._metric)) is None:
            return self.CONTINUE  # a large batch may step over a rung: its later value is no match for the others'
        return super().on_trial_result(tune_controller, _as_ours(trial), result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._trial_info.pop(trial.config["trial"], None)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._trial_info.pop(trial.config["trial"], None)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._trial_info.pop(trial.config["trial"], None)


class Hyperband(Asha):
    """ASHA with brackets, which differ in the rung that they begin to stop at; the last one stops nobody.

    A trial's bracket is drawn from its id with Ray's probabilities, e^(number of rungs), so that it is the same after a resume.
    """

    def __init__(self, config: SweepConfig) -> None:
        super().__init__(config)
        self.seed, self._brackets = config.seed, []
        for begin in range(len(self.rungs) + 1):
            bracket = _Bracket(1, self._max_t, self._reduction_factor, 0, stop_last_trials=False)
            bracket._rungs = [(rung, {}) for rung in reversed(self.rungs[begin:])]
            self._brackets.append(bracket)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        ours = trial.config["trial"]
        weights = [math.exp(-begin) for begin in range(len(self._brackets))]
        self._trial_info[ours] = random.Random(f"{self.seed}/{ours}").choices(self._brackets, weights)[0]


class Median(MedianStoppingRule):
    """Stops a trial whose best value is worse than the median of the others' means so far, where there are three of them."""

    def __init__(self, config: SweepConfig) -> None:
        self.rungs, self.ranked_by = config.scheduler.rungs(config.evaluation.points), config.objective.metric
        super().__init__(
            time_attr="rung",
            metric=self.ranked_by,
            mode=config.objective.mode,
            grace_period=min(self.rungs, default=config.evaluation.points),
            min_time_slice=math.inf,  # type: ignore[arg-type]  # else it pauses trials while it knows too few
        )

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def replay(self, records: list[TrialRecord]) -> None:
        """What trials reported before an interruption: its whole state."""
        for record in records:
            rows = [row for row in record.curve if row.get(self.ranked_by) is not None]
            if rows:
                self._results[_Ours(record.id, {})] = rows

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        ours = _Ours(trial.config["trial"], {})
        if result.get("rung") is None or result.get(self.ranked_by) is None:
            return self.CONTINUE
        if any(row["rung"] == result["rung"] for row in self._results.get(ours, ())):
            return self.CONTINUE  # reported again after it resumed
        if result["rung"] not in self.rungs:
            self._results[ours].append(result)
            return self.CONTINUE
        return super().on_trial_result(tune_controller, ours, result)  # type: ignore[arg-type]

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Its last row is there already."""


def _as_ours(trial: Any) -> Any:
    return _Ours(trial.config["trial"], trial.config)

"""Which setting is tried next, and which trial is stopped? Optuna and ASHA as Ray Tune runs them, rebuilt from the records."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from neo_ray.config import SweepConfig
from neo_ray.loading import plain
from neo_ray.records import TrialRecord
from neo_ray.space import Space
from neo_ray.trials import Setting


class StudySearch(OptunaSearch):
    """Tune's OptunaSearch over a neo_ray space: settings that are given first (resumed, a grid), then the sampler's.

    An ASHA stop is told as PRUNED and so is a diverged trial (TPE learns from both), a failure as FAIL.
    """

    def __init__(
        self,
        config: SweepConfig,
        space: Space,
        study: optuna.Study,
        given: list[Setting],
        next_id: Callable[[], str],
        on_start: Callable[[str, dict[str, Any], int], None],
    ) -> None:
        Searcher.__init__(self, metric=config.objective.metric, mode=config.objective.mode)
        self._ot_trials: dict[str, optuna.trial.Trial] = {}
        self._completed_trials: set[str] = set()
        self.study = study
        self.config, self.space, self.given = config, space, list(given)
        self.next_id, self.on_start = next_id, on_start
        self.only_given = config.sampler.name == "grid"

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The Tune config of the next trial: our id, and the resolved trial config as JSON."""
        if self.given:
            ours, params, seed = self.given.pop(0)
            self.study.enqueue_trial(self.space.optuna_params(params), user_attrs={"trial": ours})
        elif self.only_given:
            return Searcher.FINISHED  # type: ignore[return-value]
        else:
            ours, params, seed = self.next_id(), {}, self.config.seed
        asked = self.study.ask()
        asked.set_user_attr("trial", ours)
        params = self.space.define(asked)
        self._ot_trials[trial_id] = asked
        trial = self.space.trial_config(params, self.config.trial)
        trial = trial.model_copy(update={"seed": self.space.seed(params, seed)})
        self.on_start(ours, params, trial.seed)
        return {"trial": ours, "config": json.dumps(plain(trial))}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        value = result.get(self.config.objective.metric)
        if value is not None and math.isfinite(value):
            self._ot_trials[trial_id].report(value, int(result["rung"]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id in self._completed_trials:
            return
        self._completed_trials.add(trial_id)
        result = result or {}
        state, value = result.get("state", "PRUNED"), result.get(self.config.objective.metric)
        told = study_state("FAILED" if error else state, result.get("cause"), value)
        self.study.tell(self._ot_trials[trial_id], value if told == optuna.trial.TrialState.COMPLETE else None, state=told)

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher into snapshots that nothing reads: the study and the journal stay here."""
        return {"_metric": self._metric, "_mode": self._mode}

    def save(self, checkpoint_path: str) -> None:
        """The records are the truth; Tune's snapshot holds nothing of the searcher."""
        Path(checkpoint_path).write_text("")


class Asha(ASHAScheduler):
    """ASHA over evaluation rungs, keyed by neo_ray's trial ids, so that a resumed trial meets its own history.

    The last evaluation is no rung: a trial that reached it is complete.
    """

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
            stub = SimpleNamespace(trial_id=record.id, config={"trial": record.id})
            super().on_trial_add(None, stub)  # type: ignore[arg-type]
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


def _as_ours(trial: Any) -> Any:
    return SimpleNamespace(trial_id=trial.config["trial"], config=trial.config)


def study_state(state: str, cause: str | None, value: float | None) -> optuna.trial.TrialState:
    """Optuna's word for a trial's end."""
    if state == "COMPLETE" and value is not None and math.isfinite(value):
        return optuna.trial.TrialState.COMPLETE
    if state == "FAILED" and cause != "diverged":
        return optuna.trial.TrialState.FAIL
    return optuna.trial.TrialState.PRUNED


def open_study(config: SweepConfig, space: Space, records: list[TrialRecord]) -> optuna.Study:
    """The study in `<results>/study.db`, made anew from the finished records: Optuna sees what happened, no more and no less."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    config.folder.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{(config.folder / 'study.db').resolve()}"
    if config.name in optuna.get_all_study_names(storage=storage):
        optuna.delete_study(study_name=config.name, storage=storage)
    direction = optuna.study.StudyDirection.MINIMIZE if config.objective.mode == "min" else optuna.study.StudyDirection.MAXIMIZE
    study = optuna.create_study(
        study_name=config.name, storage=storage, sampler=_sampler(config, len(records)), direction=direction
    )
    study.add_trials([_frozen(config, space, record) for record in records if record.finished])
    return study


def _sampler(config: SweepConfig, past: int) -> optuna.samplers.BaseSampler:
    seed = config.seed + 10_007 * past  # a reopened study with the same seed would repeat its first points
    if config.sampler.name == "qmc":
        return optuna.samplers.QMCSampler(seed=config.seed, scramble=True)
    if config.sampler.name in ("random", "grid"):
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=config.sampler.startup_trials, multivariate=True, group=True, constant_liar=True
        )


def _frozen(config: SweepConfig, space: Space, record: TrialRecord) -> optuna.trial.FrozenTrial:
    metric = config.objective.metric
    value = record.metrics.get(metric)
    state = study_state(record.state, record.cause, value)
    curve = {int(row["rung"]): row[metric] for row in record.curve if row.get(metric) is not None}
    return optuna.trial.create_trial(
        state=state,
        value=value if state == optuna.trial.TrialState.COMPLETE else None,
        params=space.optuna_params(record.params),
        distributions=space.distributions(record.params),
        intermediate_values=curve,
        user_attrs={"trial": record.id},
    )

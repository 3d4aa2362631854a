"""Which setting is tried next? Optuna's samplers as Ray Tune asks them, their study rebuilt from the records."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from neo_ray.config import SweepConfig
from neo_ray.loading import plain
from neo_ray.phases import Phase, drawn
from neo_ray.records import TrialRecord
from neo_ray.settings import ConfigError
from neo_ray.space import Space
from neo_ray.trials import Setting, fail_everywhere, setting_key
from neo_ray.warm import warm_trials

MAX_ASKED = 20
"""How often a sampler is asked until it proposes a setting that has not failed everywhere; a space may have no other."""


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
        may_begin: Callable[[str | None], bool] = lambda trial: True,
        room: Callable[[], int] = lambda: 10**6,
        phase: Phase | None = None,
        records: Sequence[TrialRecord] = (),
    ) -> None:
        """
        Args:
            room: how many trials may be under way just now.
            phase: of a study, where it has some.
            records: of the whole sweep: what failed everywhere in it is not tried again.
        """
        Searcher.__init__(self, metric=config.objective.metric, mode=config.objective.mode)
        self._ot_trials: dict[str, optuna.trial.Trial] = {}
        self._completed_trials: set[str] = set()
        self.study = study
        self.config, self.space, self.given = config, space, list(given)
        self.next_id, self.on_start, self.may_begin, self.room = next_id, on_start, may_begin, room
        self.phase = phase or Phase(None, config, space)
        self.records = {record.id: record for record in records}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The Tune config of the next trial: our id, and the resolved trial config as JSON."""
        if len(self._ot_trials) - len(self._completed_trials) >= self.room():
            return None  # Tune asks again, and often: the budget, which takes all records, comes second
        if not self.may_begin(self.given[0][0] if self.given else None):
            return Searcher.FINISHED  # type: ignore[return-value]
        if self.given:
            ours, params, seed = self.given.pop(0)
            asked = self._given(params)
        elif self.phase.only_given:
            return Searcher.FINISHED  # type: ignore[return-value]
        else:
            ours, seed = self.next_id(), self.config.seed
            asked, params = self._ask()
        for name, value in {"trial": ours, "phase": self.phase.tag}.items():
            asked.set_user_attr(name, value)
        self._ot_trials[trial_id] = asked
        self.records[ours] = TrialRecord(id=ours, params=params)
        trial = self.space.trial_config(params, self.config.trial)
        trial = trial.model_copy(update={"seed": self.space.seed(params, seed)})
        self.on_start(ours, params, trial.seed)
        return {"trial": ours, "config": json.dumps(plain(trial)), "params": params}

    def _ask(self) -> tuple[optuna.trial.Trial, dict[str, Any]]:
        """What the sampler proposes, but for a setting that has failed everywhere: it is told so, and asked again.

        TPE, which passes over a FAIL, learns from a PRUNED that there is nothing; a study of several objectives takes none.
        """
        hopeless, states = fail_everywhere(list(self.records.values())), optuna.trial.TrialState
        for left in range(MAX_ASKED, 0, -1):
            asked = self.study.ask()
            params = self.space.define(asked)
            if left == 1 or setting_key(params) not in hopeless:
                break
            self.study.tell(asked, state=states.FAIL if self.config.objective.further else states.PRUNED)
        return asked, params

    def _given(self, params: dict[str, Any]) -> optuna.trial.Trial:
        """A trial of the study with these params; without any where they lie outside of the space, as a reference may."""
        fixed = _optuna_params(self.space, params)
        self.study.enqueue_trial(fixed)
        asked = self.study.ask()
        if fixed:
            self.space.define(asked)
        return asked

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        value = result.get(self.config.objective.metric)
        if value is not None and math.isfinite(value) and not self.config.objective.further:  # Optuna takes curves of one
            self._ot_trials[trial_id].report(value, int(result["rung"]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id in self._completed_trials:
            return
        self._completed_trials.add(trial_id)
        result = result or {}
        values: list[Any] = [result.get(objective.metric) for objective in self.config.objective.all]
        if (state := result.get("state", "PRUNED")) in ("COMPLETE", "PRUNED", "FAILED") and not error:
            ours = self.records[self._ot_trials[trial_id].user_attrs["trial"]]
            self.records[ours.id] = ours.model_copy(update={"state": state, "cause": result.get("cause")})
        told = study_state("FAILED" if error else result.get("state", "PRUNED"), result.get("cause"), values)
        self.study.tell(self._ot_trials[trial_id], values if told == optuna.trial.TrialState.COMPLETE else None, state=told)

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher into snapshots that nothing reads: the study and the journal stay here."""
        return {"_metric": self._metric, "_mode": self._mode}

    def save(self, checkpoint_path: str) -> None:
        """The records are the truth; Tune's snapshot holds nothing of the searcher."""
        Path(checkpoint_path).write_text("")


def study_state(state: str, cause: str | None, values: list[float | None]) -> optuna.trial.TrialState:
    """Optuna's word for a trial's end. Of several objectives it has none for a trial that did not reach it."""
    if state == "COMPLETE" and all(value is not None and math.isfinite(value) for value in values):
        return optuna.trial.TrialState.COMPLETE
    if len(values) > 1 or (state == "FAILED" and cause != "diverged"):
        return optuna.trial.TrialState.FAIL
    return optuna.trial.TrialState.PRUNED


def study_of(phase: Phase, phases: Sequence[Phase], records: list[TrialRecord]) -> optuna.Study:
    """The study of a phase: it knows the trials of those before, and repeats the points of none."""
    return open_study(phase.config, phase.space, phase.known(records), drawn(phases, records))


def open_study(config: SweepConfig, space: Space, records: list[TrialRecord], begun: int | None = None) -> optuna.Study:
    """The study, in memory, made anew from the finished records: Optuna sees what happened, no more and no less.

    Args:
        begun: how many trials samplers have proposed, in whichever phase; by default as many as there are records.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    minimise, maximise = optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE
    directions = [minimise if objective.mode == "min" else maximise for objective in config.objective.all]
    past = frozen_trials(config, space, records)
    begun = len(records) if begun is None else begun
    for warm in warm_trials(config, space):
        past += [_frozen(config, space, record, f"{warm.path}/{record.id}") for record in warm.records]
    study = optuna.create_study(study_name=config.name, sampler=make_sampler(config, past, begun), directions=directions)
    study.add_trials(past)
    return study


def frozen_trials(config: SweepConfig, space: Space, records: list[TrialRecord]) -> list[optuna.trial.FrozenTrial]:
    """The finished trials as Optuna has them."""
    return [_frozen(config, space, record) for record in records if record.finished]


def make_sampler(config: SweepConfig, past: list[optuna.trial.FrozenTrial], begun: int) -> optuna.samplers.BaseSampler:
    """The sampler by name, going on after what is in the study.

    Args:
        past: the trials that the study begins with.
        begun: how many trials were proposed before; a reopened study with the same seed would repeat its first points.
    """
    name, start, seed = config.sampler.name, config.sampler.startup_trials, config.seed + 10_007 * begun
    if name == "qmc":
        return _Sequence(config.seed, begun, optuna.samplers.RandomSampler(seed=seed))
    if name in ("random", "grid"):
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=start)
        if name == "nsga2":
            sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=max(2, start))
            complete = [trial for trial in past if trial.state == optuna.trial.TrialState.COMPLETE]
            for index, trial in enumerate(complete):  # what Optuna notes on each trial, and the records do not hold
                trial.system_attrs[sampler._get_generation_key()] = index // max(2, start)
            return sampler
        if name == "cmaes":
            return optuna.samplers.CmaEsSampler(
                seed=seed,
                n_startup_trials=start,
                consider_pruned_trials=True,
                warn_independent_sampling=False,
                source_trials=_ranges_of(past) if len(past) >= start else None,
            )
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=start, multivariate=True, group=True, constant_liar=True)


def _ranges_of(past: list[optuna.trial.FrozenTrial]) -> list[optuna.trial.FrozenTrial] | None:
    """What CMA-ES takes of earlier trials, whose state is lost: it begins again where the best of them are."""
    complete = [trial for trial in past if trial.state == optuna.trial.TrialState.COMPLETE]
    common = {
        name: kind
        for name, kind in (complete[0].distributions if complete else {}).items()
        if not isinstance(kind, optuna.distributions.CategoricalDistribution)
        and not kind.single()
        and all(trial.distributions.get(name) == kind for trial in complete)
    }
    if not common:
        return None
    return [
        optuna.trial.create_trial(value=trial.value, params={n: trial.params[n] for n in common}, distributions=common)
        for trial in complete
    ]


class _Sequence(optuna.samplers.QMCSampler):
    """Sobol points, going on after those that were drawn before: the study that counted them is made anew at each start."""

    def __init__(self, seed: int, begun: int, apart: optuna.samplers.BaseSampler) -> None:
        """`apart`: draws the first trial, and axes that not every trial has."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            super().__init__(seed=seed, scramble=True, independent_sampler=apart, warn_independent_sampling=False)
        self.begun = begun

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, Any]) -> int:
        return self.begun + super()._find_sample_id(study, search_space)


def _optuna_params(space: Space, params: dict[str, Any]) -> dict[str, Any]:
    """None of them where one lies outside of the space."""
    try:
        return space.optuna_params(params)
    except ConfigError:
        return {}


def _frozen(config: SweepConfig, space: Space, record: TrialRecord, name: str | None = None) -> optuna.trial.FrozenTrial:
    metric, several = config.objective.metric, bool(config.objective.further)
    values: list[Any] = [record.measured(objective.metric) for objective in config.objective.all]
    state, params = study_state(record.state, record.cause, values), _optuna_params(space, record.params)
    curve = {int(row["rung"]): row[metric] for row in record.curve if row.get(metric) is not None}
    return optuna.trial.create_trial(
        state=state,
        values=values if state == optuna.trial.TrialState.COMPLETE else None,
        params=params,
        distributions=space.distributions(record.params) if params else {},
        intermediate_values={} if several else curve,
        user_attrs={"trial": name or record.id, "phase": record.phase},
    )

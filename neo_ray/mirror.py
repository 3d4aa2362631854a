"""How does the study get into a database that optuna-dashboard opens while the sweep runs? A copy, written in the background.

The sampler asks a study in memory, and the journal is what a sweep goes on from: a database that is locked, slow or gone delays
nothing and loses nothing. It is tried again, and then catches up.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy

from neo_ray.config import SweepConfig

SECONDS_BETWEEN = 1.0
MAX_SECONDS_BETWEEN = 30.0  # while it fails
SQLITE_SECONDS = 5.0  # that SQLite waits for another's lock
SECONDS_TO_CATCH_UP = 60.0  # at the end


def study_url(config: SweepConfig) -> str:
    """The database of a sweep's study."""
    return config.storage.study or f"sqlite:///{(config.folder / 'study.db').resolve()}"


class Mirror(threading.Thread):
    """Keeps the database like the study: trials as they begin (RUNNING), report and end."""

    def __init__(
        self,
        config: SweepConfig,
        study: optuna.Study,
        say: Callable[[str], None],
        others: Sequence[optuna.trial.FrozenTrial] = (),
    ) -> None:
        """`others`: finished trials of the sweep that its sampler is not to see, of phases that come later."""
        super().__init__(daemon=True, name="study")
        self.config, self.study, self.say, self.others = config, study, say, others
        self.closing = threading.Event()
        self.storage: optuna.storages.RDBStorage | None = None
        self.copies: dict[int, optuna.trial.FrozenTrial] = {}
        """Trial number → what the database holds of it; its `_trial_id` is the database's."""
        self.missing: list[optuna.trial.FrozenTrial] = []
        """Of the others, those that the database does not hold."""
        self.begun: dict[str, optuna.trial.FrozenTrial] = {}
        """Trial → what an earlier start left of it RUNNING; the sampler has not proposed it again yet."""
        self.behind = self.caught_up = self.anew = False

    def run(self) -> None:
        pause = SECONDS_BETWEEN
        while not self.closing.wait(pause):
            pause = SECONDS_BETWEEN if self._try() else min(2 * pause, MAX_SECONDS_BETWEEN)
        self.caught_up = self._try()

    def close(self) -> None:
        """The last state, if the database takes it in time."""
        self.closing.set()
        self.join(SECONDS_TO_CATCH_UP)
        if not self.caught_up:
            self.say("the study's database misses the last trials; the records have them all")

    def _try(self) -> bool:
        try:
            self.follow()
        except Exception as error:  # whatever a database can raise: no trial depends on it
            logging.getLogger("neo_ray").warning("the study's database: %s", error)
            if not self.behind:
                reason = str(error.__cause__ or error).splitlines()[0]
                self.say(f"the study's database cannot be written ({reason}); the sweep goes on, and tries it again")
            self.behind = True
            return False
        self.behind = False
        return True

    def follow(self) -> None:
        """Bring the database up to date. Raises what it raises; the next call goes on from there."""
        storage = self.storage or self._open()
        while self.missing:
            storage.create_new_trial(self.study_id, self.missing[0])
            del self.missing[0]
        for trial in self.study.get_trials(deepcopy=False):
            name = trial.user_attrs.get("trial")
            if name is None and not trial.state.is_finished():
                continue  # it gets its name in this moment
            if trial.number not in self.copies and name in self.begun:
                if not _is_of(self.begun[name], trial):  # another trial of this name, of a sweep that was begun anew
                    self.storage, self.anew = None, True
                    return self.follow()
                self.copies[trial.number] = self.begun.pop(name)
            copy = self.copies.get(trial.number)
            if copy is None:
                trial_id = storage.create_new_trial(self.study_id, _without_notes(trial))
                self.copies[trial.number] = storage.get_trial(trial_id)
            elif not copy.state.is_finished() and (copy.state, copy.intermediate_values, copy.params, copy.user_attrs) != (
                trial.state,
                trial.intermediate_values,
                trial.params,
                trial.user_attrs,
            ):
                self._update(storage, copy, trial)
                self.copies[trial.number] = storage.get_trial(copy._trial_id)

    def _open(self) -> optuna.storages.RDBStorage:
        """A database with a study of this sweep: that of an earlier start goes on where it holds what happened and nothing else.

        Otherwise it is made anew, as the study in memory is: Optuna writes and deletes trials one by one, which takes longer.
        """
        url = study_url(self.config)
        own = {"connect_args": {"timeout": SQLITE_SECONDS}} if url.startswith("sqlite") else {"pool_pre_ping": True}
        storage = optuna.storages.RDBStorage(url, engine_kwargs=own)
        if url.startswith("sqlite"):  # a copy need not survive a power cut, and waiting for the disk takes most of the time
            sqlalchemy.event.listen(storage.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
            storage.engine.dispose()
        place, name = self.config.results, self.config.name
        results = f"{socket.gethostname()}:{place.resolve()}" if isinstance(place, Path) else str(place)
        unnamed = results if self.config.storage.study is None else None  # in a database of others only what says so is ours
        for study in storage.get_all_studies():
            ours = study.user_attrs.get("results", unnamed) == results
            if study.study_name == name and not ours:
                name = f"{name} ({results})"  # another sweep of this name, in the same database
        self.missing, self.copies, self.begun = list(self.others), {}, {}
        ids = [study._study_id for study in storage.get_all_studies() if study.study_name == name]
        if ids and not self.anew and self._goes_on(storage, ids[0]):
            self.study_id = ids[0]
        else:
            if ids:
                storage.delete_study(ids[0])
            self.study_id = storage.create_new_study(self.study.directions, name)
            storage.set_study_user_attr(self.study_id, "results", results)
        self.storage = storage
        return storage

    def _goes_on(self, storage: optuna.storages.RDBStorage, study_id: int) -> bool:
        """Takes what a study holds over, if each of its trials that ended is one of ours, and ended so."""
        if storage.get_study_directions(study_id) != self.study.directions:
            return False
        rows = storage.get_all_trials(study_id)
        held = {copy.user_attrs.get("trial"): copy for copy in rows}
        trials = self.study.get_trials(deepcopy=False)
        ours = {trial.user_attrs.get("trial"): trial for trial in [*self.others, *trials]}
        if len(held) != len(rows) or not all(
            _is_of(copy, ours[name]) if name in ours else not copy.state.is_finished() for name, copy in held.items()
        ):
            return False
        self.copies = {trial.number: held[name] for trial in trials if (name := trial.user_attrs.get("trial")) in held}
        self.missing = [trial for trial in self.others if trial.user_attrs.get("trial") not in held]
        self.begun = {str(name): copy for name, copy in held.items() if name not in ours}
        return True

    def _update(self, storage: Any, copy: optuna.trial.FrozenTrial, trial: optuna.trial.FrozenTrial) -> None:
        ours = copy._trial_id
        for name, value in trial.params.items():
            if name not in copy.params:
                kind = trial.distributions[name]
                storage.set_trial_param(ours, name, kind.to_internal_repr(value), kind)
        for name, value in trial.user_attrs.items():
            if copy.user_attrs.get(name) != value:
                storage.set_trial_user_attr(ours, name, value)
        for step, value in trial.intermediate_values.items():
            if step not in copy.intermediate_values:
                storage.set_trial_intermediate_value(ours, step, value)
        if trial.state.is_finished():
            storage.set_trial_state_values(ours, trial.state, trial.values)


def _is_of(copy: optuna.trial.FrozenTrial, trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a row that ended says of a trial what is so, and one that has not may still become it."""
    if not copy.state.is_finished():
        return all(trial.params.get(name) == value for name, value in copy.params.items())
    values = copy.values == trial.values or copy.state != optuna.trial.TrialState.COMPLETE
    return copy.state == trial.state and copy.params == trial.params and values


def _without_notes(trial: optuna.trial.FrozenTrial) -> optuna.trial.FrozenTrial:
    """A trial without what its sampler keeps for itself."""
    return optuna.trial.FrozenTrial(
        number=trial.number,
        state=trial.state,
        value=None,
        values=trial.values,
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_complete,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=trial.user_attrs,
        system_attrs={},
        intermediate_values=trial.intermediate_values,
        trial_id=-1,
    )

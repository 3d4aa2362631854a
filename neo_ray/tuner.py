"""How does a sweep run? Tune over slots: the sampler proposes, slots train, the scheduler stops, the journal keeps everything."""

from __future__ import annotations

import _thread
import logging
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
from ray import tune

from neo_ray import checkpoints, cluster, uploads
from neo_ray.adapters import scaling
from neo_ray.board import NAMESPACE, Board
from neo_ray.budget import SESSION, exhausted, hours_of
from neo_ray.cluster import HEAD
from neo_ray.config import HEAD_SLOTS, SweepConfig
from neo_ray.loading import plain
from neo_ray.loggers import loggers
from neo_ray.mirror import Mirror
from neo_ray.parts import Sources
from neo_ray.phases import Phase, trials_left
from neo_ray.progress import Progress
from neo_ray.records import Journal, TrialRecord, apply, failures, write_records
from neo_ray.relay import Relay
from neo_ray.schedulers import make_scheduler
from neo_ray.searcher import StudySearch, frozen_trials, study_of
from neo_ray.settings import TrialConfig
from neo_ray.slot import SlotJob, SlotRunner
from neo_ray.slots import Keeper
from neo_ray.space import Space
from neo_ray.steering import NO_MEMORY, steering
from neo_ray.trials import trial_id

BOARD_CALLS = 4 * HEAD_SLOTS
"""That the board answers side by side: a trial's relay and its worker wait there all the while, others in between."""
MAX_RELAYS = 100  # that follow one another for a trial: what ends one (memory, a person) is no fault of the trial
RECORDS_SHARE = 0.02  # of the time may go into `trials.jsonl`, which tells the journal again: all trials, each time
SECONDS_TO_END = 60  # for slots to put their models away; Ray ends those that have not


class SweepFailed(RuntimeError):
    """No slot can be kept alive, the journal cannot be written, or the board was ended for want of memory."""


def run_trials(
    config: SweepConfig,
    phases: tuple[Phase, ...],
    sources: Sources,
    records: list[TrialRecord],
    slots: int,
    progress: Progress,
    lost: threading.Event,
    worker_bytes: int = 0,
    mend: Callable[[], None] = lambda: None,
    hours: float = 0.0,
) -> None:
    """Run what is still to be run of a sweep. Returns when all trials have ended; the journal holds what happened.

    Args:
        phases: of the sweep; its slots stay from one to the next.
        records: what the journal holds so far.
        slots: how many there may be at once as the cluster is now.
        worker_bytes: what a worker of the largest trial takes, where known: for nodes that come later.
        lost: set when the folder is another driver's: nothing more is written.
        mend: makes again what of the store of targets workers found damaged.
        hours: in which earlier drivers ran this sweep.

    Raises:
        SweepFailed: workers die at once, again and again, or what happens cannot be written down.
        KeyboardInterrupt: as pressed; what ran is in the journal and in checkpoints.
    """
    name = f"board-{uuid.uuid4().hex[:8]}"
    board: Any = (
        ray.remote(Board)
        .options(name=name, namespace=NAMESPACE, num_cpus=0, resources=HEAD, max_concurrency=BOARD_CALLS)
        .remote(config.resources.max_failures, failures(Journal(config.results).events()))
    )
    recorder = _Recorder(config, phases[0].space, records, board, progress, lost, hours)
    results = config.results.resolve() if isinstance(config.results, Path) else config.results
    folder, silence_seconds = str(results), 60 * config.resources.silence_minutes
    alone, scratch = not config.resources.address, config.storage.scratch

    def make(slot: int) -> SlotRunner:
        job = SlotJob(slot, name, sources, folder, silence_seconds, scratch)
        return SlotRunner(job, config.resources, board, progress.say, mend)

    def look() -> tuple[int, set[str]]:
        return cluster.places(config.resources, cluster.present(alone=alone), worker_bytes), cluster.draining()

    keeper = Keeper(board, make, slots, look, progress.say)
    recorder.start()
    keeper.begin(sum(trials_left(phases, records).values()))
    keeper.start()
    watchdog = threading.Thread(target=_watch, args=(keeper, recorder), daemon=True)
    watchdog.start()
    at_end, followers = ExitStack(), loggers(config, progress.say)
    try:
        for phase in phases:
            if recorder.begin(phase):
                at_end.close()
                _fit(phase, phases, name, keeper, recorder, followers, at_end)
                recorder.wait_until_all_ended()
            if recorder.spent or recorder.failed is not None:
                break
    except KeyboardInterrupt:
        if recorder.failed is None:  # pressed, as opposed to the watchdog's
            if lost.is_set():
                raise
            progress.say("stopping: trials keep a checkpoint after the step they are in (again Ctrl-C: without it)")
            raise
    finally:
        if not lost.is_set():
            _end(keeper, recorder, board)
        at_end.close()  # a database that does not answer must not keep trials from being put away
    if recorder.failed is not None:
        raise SweepFailed(recorder.failed)


def _end(keeper: Keeper, recorder: _Recorder, board: Any) -> None:
    """Slots put their trials and models away, and only then nobody listens any more. A slot that waits for a node is left."""
    recorder.ending = True
    keeper.closing.set()
    for runner in keeper.runners:
        runner.closing = True
    deadline = time.monotonic() + SECONDS_TO_END
    try:
        asked = ray.get(board.close.remote(), timeout=10)
    except ray.exceptions.RayError:
        logging.getLogger("neo_ray").warning("the board did not answer at the end")
        asked = set()
    for runner in keeper.runners:
        if runner.job.slot in asked:
            runner.join(timeout=max(0.0, deadline - time.monotonic()))
    recorder.closing = True
    recorder.join(timeout=30)
    keeper.join(timeout=5)


def _fit(
    phase: Phase,
    phases: tuple[Phase, ...],
    board: str,
    keeper: Keeper,
    recorder: _Recorder,
    followers: list[tune.Callback],
    at_end: ExitStack,
) -> None:
    """Run a phase: Tune's trials, until none is left or its budget is spent."""
    config, space, records = phase.config, phase.space, list(recorder.records.values())
    given, remaining = phase.to_run(records)
    own, known = phase.own(records), phase.known(records)
    resumed = {record.id for record in records}
    numbers = iter(range(len(records) + sum(trial not in resumed for trial, _, _ in given), 10**6))
    study = study_of(phase, phases, records)
    search = StudySearch(
        config,
        space,
        study,
        given,
        next_id=lambda: trial_id(next(numbers)),
        on_start=recorder.started,
        may_begin=recorder.may_begin,
        room=lambda: keeper.room,
        phase=phase,
        records=records,
    )
    tuner = tune.Tuner(
        tune.with_resources(Relay, HEAD),
        param_space={"board": board},
        tune_config=tune.TuneConfig(
            num_samples=remaining,
            max_concurrent_trials=remaining,  # the search gives out no more than the slots take
            search_alg=search,
            scheduler=make_scheduler(config, own),
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["trial"],
            trial_dirname_creator=lambda trial: f"{trial.config['trial']}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=f"tune-{time.time_ns()}",
            storage_path=str((config.folder / "ray").resolve()),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=MAX_RELAYS),
            callbacks=[_TellBoard(board), *followers],
        ),
    )
    seen = {record.id for record in known}
    others = frozen_trials(config, space, [record for record in records if record.id not in seen])
    mirror = Mirror(config, study, recorder.progress.say, others)
    mirror.start()
    at_end.callback(mirror.close)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with steering():
            tuner.fit()


class _TellBoard(tune.Callback):
    """A trial that Tune is done with needs no slot any more."""

    def __init__(self, board: str) -> None:
        self.board = board

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ray.get_actor(self.board, namespace=NAMESPACE).cancel.remote(trial.config["trial"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        why = "its relay, which stands for it in Ray Tune, cannot be started (logs/driver.log)"
        ray.get_actor(self.board, namespace=NAMESPACE).orphan.remote(trial.config["trial"], why)


class _Recorder(threading.Thread):
    """Writes the journal from the board's log, where everything passes, and keeps `trials.jsonl` and the display."""

    def __init__(
        self,
        config: SweepConfig,
        space: Space,
        records: list[TrialRecord],
        board: Any,
        progress: Progress,
        lost: threading.Event,
        hours_before: float = 0.0,
    ) -> None:
        super().__init__(daemon=True, name="recorder")
        self.config, self.space, self.board, self.progress, self.lost = config, space, board, progress, lost
        self.journal = Journal(config.results)
        self.hours_before, self.begun, self.spent = hours_before, time.time(), ""
        self.journal.write(SESSION, "")
        progress.hours = self.hours
        self.records = {record.id: record for record in records}
        self.lock = threading.Lock()  # Tune's thread starts trials, this one hears of everything else
        self.open: set[str] = set()
        self.next_table = 0.0
        self.ending = self.closing = False
        self.failed: str | None = None
        self.phase, self.phase_begun, self.phase_hours, self.phase_spent = Phase(None, config, space), time.time(), 0.0, ""

    def begin(self, phase: Phase) -> bool:
        """The next phase: False where none of its trials is left, or its budget is spent."""
        hours = hours_of(self.journal.events(), phase.tag)
        records = list(self.records.values())
        if phase.confirm is not None and not phase.to_run(records)[1] and not phase.own(records):
            self.progress.say(f"phase {phase.name}: nothing to confirm, no trial is COMPLETE with {self.config.objective.metric}")
        left = trials_left([phase], records, lambda _: hours).get(phase.tag, 0)
        if not left:
            return False
        self.phase, self.phase_begun, self.phase_hours, self.phase_spent = phase, time.time(), hours, ""
        if phase.name is not None:
            self.journal.write(SESSION, "", phase=phase.name)
            self.progress.phase = phase.name
            self.progress.say(f"phase {phase.name}: {left} trials")
        return True

    def hours(self) -> float:
        """In which this sweep has run."""
        return self.hours_before + (time.time() - self.begun) / 3600

    def may_begin(self, trial: str | None) -> bool:
        """Is there budget for one trial more, or for this one if it was interrupted?"""
        with self.lock:
            records, resuming = list(self.records.values()), trial in self.records
            spent = exhausted(self.config.budget, records, self.hours(), resuming)
            hours = self.phase_hours + (time.time() - self.phase_begun) / 3600
            of_phase = self.phase.spent(records, hours, resuming)
        if spent and not self.spent:
            self.progress.say(f"the budget is spent ({spent}): no trial begins any more, those that run go to their end")
        elif of_phase and not self.phase_spent and not spent:
            self.progress.say(f"the budget of phase {self.phase.name} is spent ({of_phase}): none of its trials begins any more")
        self.spent, self.phase_spent = spent or "", of_phase or ""
        return not spent and not of_phase

    def started(self, trial: str, params: dict[str, Any], seed: int) -> None:
        """The searcher proposed a trial: it exists from now on. A resumed one begins another attempt."""
        resolved: TrialConfig = self.space.trial_config(params, self.phase.config.trial).model_copy(update={"seed": seed})
        self.open.add(trial)
        if trial in self.records:
            self._record("attempt", trial)
        else:
            factor = scaling(resolved.lora) if resolved.has_adapter else None
            self._record("start", trial, params=params, config=plain(resolved), seed=seed, phase=self.phase.tag, scaling=factor)

    def run(self) -> None:
        seen = 0
        try:
            while not self.lost.is_set():
                items = ray.get(self.board.log_after.remote(seen, 1.0))
                for item in items:
                    self._write(item)
                seen += len(items)
                if self.closing and not items:
                    return
        except Exception as error:  # a full disk, a dead board: no trial may run that is not recorded
            logging.getLogger("neo_ray").exception("the journal cannot be kept")
            if not self.closing and isinstance(error, ray.exceptions.OutOfMemoryError):
                self.give_up(NO_MEMORY)
            elif not self.closing:
                self.give_up(f"the journal cannot be kept: {type(error).__name__}: {error}")

    def give_up(self, why: str) -> None:
        """The sweep cannot go on: stop Tune, in the main thread."""
        self.failed = why
        if not self.ending:
            _thread.interrupt_main()

    def wait_until_all_ended(self) -> None:
        """A stopped trial ends at its slot's next look; the sweep is over when all have."""
        while self.open and self.failed is None:
            time.sleep(0.1)

    def _write(self, item: dict[str, Any]) -> None:
        item = dict(item)
        trial, kind = item.pop("trial"), item.pop("kind")
        if kind == "taken":  # of no account once it is over
            self.progress.taken(trial, item["slot"])
            return
        self._record(kind, trial, **item)
        if kind == "end":  # on disk now, so that its checkpoint is needed no more
            checkpoints.remove(self.config.folder / "trials" / trial / "checkpoint")
            uploads.drop_checkpoint(self.config.results, trial)
            self.open.discard(trial)
            self._write_table()

    def _write_table(self) -> None:
        """`trials.jsonl` for who reads along, less often as it grows; its last state is written when the sweep ends."""
        begun = time.monotonic()
        if begun >= self.next_table:
            with self.lock:
                write_records(self.config.folder, list(self.records.values()))
            self.next_table = begun + (time.monotonic() - begun) / RECORDS_SHARE

    def _record(self, kind: str, trial: str, **fields: Any) -> None:
        """One event into the journal, the records and the display."""
        with self.lock:
            apply(self.records, self.journal.write(kind, trial, **fields))
            self.progress.update(self.records[trial], kind)


def _watch(keeper: Keeper, recorder: _Recorder) -> None:
    """When no slot is left alive while trials wait, the sweep cannot go on: say why and stop Tune."""
    while not recorder.ending:
        time.sleep(1)
        error = keeper.given_up
        if not recorder.ending and error is not None:
            recorder.give_up(f"workers cannot be kept alive: {error}; their logs: {recorder.config.folder / 'logs'}")
            return

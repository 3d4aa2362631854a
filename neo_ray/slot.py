"""How do trials run on workers? A slot: a long-lived TorchTrainer worker group that takes one trial after another."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train
import ray.train.torch
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig

from neo_ray import uploads
from neo_ray.board import NAMESPACE, kind_of
from neo_ray.config import ResourcesConfig
from neo_ray.faults import (
    LoadError,
    PeerLost,
    StorageFailed,
    found_damage,
    of_others,
    of_peers,
    of_storage,
    smaller_may_fit,
    why_lost,
)
from neo_ray.listening import LOADING, Listener
from neo_ray.records import log_name
from neo_ray.settings import TrialConfig
from neo_ray.storage import Damaged, Folder, NoRoom, at

MEMORY_GROWTH = (1.5, 500e6)  # resident bytes after a trial: what the first of its shape left, by a factor and a term
MAX_RESTARTS_IN_A_ROW = 3  # workers that die without finishing anything, and not of one trial, are no passing fault
SECONDS_TO_BE_SEEN = 5.0  # a worker that saw another one's end waits so long, that Ray sees what ended it
PAUSES_SECONDS = (0.0, 5.0, 20.0)  # before such restarts: of what lasts, none more is lost than time


@dataclass(frozen=True)
class SlotJob:
    """What every worker of a slot is told once."""

    slot: int
    board: str
    sources: Any
    folder: str
    """Results folder; trials write into `trials/<id>`, workers log into `logs`."""
    silence_seconds: float
    """A trial without a step for so long is hung."""
    scratch: str | None = None
    """The setting `storage.scratch`."""
    begun: float = 0.0
    """Unix time at which its workers were asked for."""

    @property
    def results(self) -> Folder:
        return at(self.folder, self.scratch)

    @property
    def here(self) -> Path:
        """Where this machine writes results."""
        return uploads.working_folder(self.results)


def slot_loop(settings: dict[str, Any]) -> None:
    """The train function of every worker: build the parts for a trial's shape, or keep those there are, and train."""
    import torch.distributed as dist

    from neo_ray import devices

    job: SlotJob = settings["job"]
    rank = ray.train.get_context().get_world_rank()
    log_to(job.here / "logs" / f"slot-{job.slot}-rank-{rank}.log")
    board = ray.get_actor(job.board, namespace=NAMESPACE)
    device = devices.local_device()
    devices.map_large_blocks(device)
    ray.get(board.joined.remote(job.slot, ray.get_runtime_context().get_node_id()))
    worker = Worker(board, job, rank, device, idle_since=time.time())
    while True:
        box: list[Any] = [ray.get(board.take.remote(job.slot, worker.kind)) if rank == 0 else None]
        try:
            dist.broadcast_object_list(box, 0)
        except RuntimeError as error:
            raise _lost(str(error)) if of_peers(error) else error from None
        trial_id, data = box[0]
        if trial_id == "closed":
            return
        if data is None:
            continue
        worker.run(trial_id, TrialConfig.model_validate(data["config"]), data.get("micro_batch_size"))


@dataclass
class Worker:
    """One worker of a slot, and what it keeps from trial to trial."""

    board: Any
    job: SlotJob
    rank: int
    device: Any
    parts: Any = None
    kind: str | None = None
    """That of the trials which the parts serve, as the board calls it."""
    idle_since: float | None = None
    """Unix time since which it has waited for its first trial; None once it has had one."""
    resident: dict[Any, int] = field(default_factory=dict)
    """Shape → resident bytes after the first trial of it."""
    fits: dict[Any, int] = field(default_factory=dict)
    """Kind of trial → the micro-batch that an `auto` begins with, after one ran out of memory."""

    def run(self, trial_id: str, trial: TrialConfig, smaller: int | None) -> None:
        """Run one trial and tell the board how it ended. `smaller`: the micro-batch after an earlier attempt without memory."""
        from neo_ray.parts import rank_and_world_size, shape_of

        world_size = rank_and_world_size()[1]
        kind = (shape_of(trial, self.device), trial.method, trial.training.gradient_checkpointing, trial.training.packing)
        size = trial.training.micro_batch(world_size)
        if trial.training.micro_batch_size == "auto":
            size = min(size, self.fits.get(kind, size))
        size = min(size, smaller or size)
        trial = trial.model_copy(update={"training": trial.training.model_copy(update={"micro_batch_size": size})})
        self._tell("using", trial_id, size)
        with logged_to(self.job.here / log_name(trial_id, self.rank)):
            try:
                self._run(trial_id, trial, kind, size)
            finally:
                names = (f"logs/slot-{self.job.slot}-rank-{self.rank}.log", log_name(trial_id, self.rank))
                uploads.try_to_publish(self.job.results, *names)

    def _run(self, trial_id: str, trial: TrialConfig, kind: Any, size: int) -> None:
        from neo_ray import devices
        from neo_ray.parts import rank_and_world_size, shape_of

        log, taken = logging.getLogger("neo_ray"), time.time()
        log.info("trial %s begins: %s", trial_id, trial.model_dump_json())
        try:
            end = self._train(trial_id, trial, taken)
        except (LoadError, Damaged, NoRoom):
            log.exception("the models do not load, or the targets are not what was written, or have no room here")
            ray.get(self.board.give_back.remote(self.job.slot, trial_id))  # by whichever rank sees it
            raise
        except Exception as error:
            log.exception("trial %s failed", trial_id)
            self.parts = self.kind = None
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            if of_others(error, rank_and_world_size()[1]):
                raise _lost(message) from None
            if of_storage(error):
                ray.get(self.board.set_back.remote(self.job.slot, trial_id, message))
                raise StorageFailed(message) from error  # a slot begins anew, here or where there is room on a disk
            if size > 1 and smaller_may_fit(error):
                self.fits[kind] = (size + 1) // 2
                ray.get(self.board.retry_smaller.remote(self.job.slot, trial_id, message))
            else:
                cause = "out_of_memory" if devices.is_out_of_memory(error) else "error"
                details = {"slot": self.job.slot, "log": log_name(trial_id, self.rank)}
                end = {"state": "FAILED", "cause": cause, "error": message, "details": details}
                ray.get(self.board.finish.remote(self.job.slot, trial_id, end))
            if rank_and_world_size()[1] > 1:  # the other ranks wait in a collective: only a new worker group frees them
                raise
            return
        log.info("trial %s ends: %s", trial_id, end)
        if end["state"] == "INTERRUPTED":
            self._tell("leave", self.job.slot, trial_id)
        else:
            self._tell("finish", self.job.slot, trial_id, end)
        self._watch_memory(shape_of(trial, self.device))

    def _watch_memory(self, shape: Any) -> None:
        """A process that keeps more and more from trial to trial is replaced, before the system ends it amid one."""
        found = psutil.Process().memory_info()
        now = found.rss - getattr(found, "shared", 0)  # pages of mapped files (weights, data, targets) are the system's to drop
        first = self.resident.setdefault(shape, now)
        if now > MEMORY_GROWTH[0] * first + MEMORY_GROWTH[1]:
            text = "resident memory grew from %.2f to %.2f GB since the first such trial: the slot is replaced"
            logging.getLogger("neo_ray").warning(text, first / 1e9, now / 1e9)
            ray.get(self.board.let_go.remote(self.job.slot, "recycled"))

    def _train(self, trial_id: str, trial: TrialConfig, taken: float) -> dict[str, Any]:
        """The trial's end as the board takes it. Parts that another trial may use are kept."""
        import torch.distributed as dist

        from neo_ray.parts import rank_and_world_size, shape_of
        from neo_ray.train import train

        stop = Listener(self.board, self.job, trial_id, watching=self.rank == 0)  # the loop looks on rank 0 alone
        try:
            if self.parts is None or self.parts.shape != shape_of(trial, self.device):
                self._load(trial)
            loaded = time.time()
            if rank_and_world_size()[1] > 1:
                dist.barrier()  # another worker may have more to fetch
            stop.loaded()
            results = self.job.results
            uploads.bring_checkpoint(results, trial_id)
            if self.rank == 0 and trial.evaluation.suite is not None:
                uploads.bring_untrained(results)
            report = uploads.publishing(results, trial_id, _reporter(self.board, trial_id))
            outcome = train(trial, self.parts, report, stop.look, self.job.here / "trials" / trial_id)
            if self.rank == 0:
                uploads.publish_end(results, trial_id, outcome.state)
        finally:
            stop.close()
        reusable, self.kind = self.parts.shape[-1], kind_of(trial)
        if not reusable:
            self.parts = self.kind = None
        end = {"state": outcome.state, "cause": outcome.cause, "error": outcome.error, "metrics": outcome.metrics}
        setup: dict[str, Any] = {"setup_seconds": loaded - taken + outcome.details["setup_seconds"], "slot": self.job.slot}
        setup |= {"node": ray.util.get_node_ip_address(), "log": log_name(trial_id)}
        if self.idle_since is not None:
            setup["cold_start_seconds"] = self.idle_since - self.job.begun + setup["setup_seconds"]
            self.idle_since = None
        return end | outcome.totals | {"details": {**outcome.details, **setup}}

    def _load(self, trial: TrialConfig) -> None:
        """The parts for a trial's shape, in place of those there are."""
        from neo_ray import devices
        from neo_ray.parts import load_parts

        self.parts = None  # free the old ones before the new ones are loaded, and what a failed trial left
        gc.collect()
        devices.free_memory(self.device)
        try:
            self.parts = load_parts(self.job.sources, trial, self.device)
        except Exception as error:
            if devices.is_out_of_memory(error) or isinstance(error, (Damaged, NoRoom)) or of_peers(error):
                raise
            raise LoadError(f"the models or the data cannot be loaded: {type(error).__name__}: {error}") from error

    def _tell(self, what: str, *arguments: Any) -> None:
        if self.rank == 0:
            ray.get(getattr(self.board, what).remote(*arguments))


def slots_wait() -> bool:
    """Does a thread still wait for Ray? Then Ray must not be shut down here: it would end the process, with a code of its own."""
    return any(isinstance(thread, SlotRunner) for thread in threading.enumerate())


def _lost(message: str) -> PeerLost:
    time.sleep(SECONDS_TO_BE_SEEN)
    return PeerLost(message)


def _reporter(board: Any, trial_id: str) -> Callable[[dict[str, Any]], None]:
    def report(row: dict[str, Any]) -> None:
        ray.get(board.report.remote(trial_id, row))

    return report


def log_to(path: Path) -> logging.Handler:
    """What this process logs goes into a file of the results folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("neo_ray").setLevel(logging.INFO)
    return handler


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """So does a trial's share of it, into one of its own; where there is no room for that, the trial goes on without."""
    try:
        handler = log_to(path)
    except OSError as error:
        logging.getLogger("neo_ray").warning("%s: %s", path, error)
        handler = logging.NullHandler()
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


class SlotRunner(threading.Thread):
    """Keeps one slot alive from the driver: starts its worker group, and starts it again when it dies or is recycled.

    It ends when its node left; whether there is room for another is the keeper's to say.
    """

    def __init__(
        self,
        job: SlotJob,
        resources: ResourcesConfig,
        board: Any,
        announce: Callable[[str], None],
        mend: Callable[[], None] = lambda: None,
    ) -> None:
        """`mend`: makes again what of the store of targets is not as it was written."""
        super().__init__(daemon=True, name=f"slot-{job.slot}")
        self.job, self.resources, self.board, self.announce, self.mend = job, resources, board, announce, mend
        self.error: str | None = None
        self.broken = False
        """Its workers died again and again."""
        self.closing = False

    def run(self) -> None:
        failures = ended = 0
        last: str | None = None
        while failures <= MAX_RESTARTS_IN_A_ROW and not self.closing:
            self.job = replace(self.job, begun=time.time())
            ray.get(self.board.begin.remote(self.job.slot))
            try:
                self._trainer().fit()
                if ray.get(self.board.why_left.remote(self.job.slot)) != "recycled":
                    return
                self.announce(f"slot {self.job.slot} begins anew: its memory kept growing (see its log)")
            except Exception as error:
                if self.closing:
                    return
                message, cause = why_lost(error, ray.get(self.board.state.remote())[1].get(self.job.slot, set()))
                self.error = message
                trial, ended_by_now = ray.get(self.board.slot_lost.remote(self.job.slot, message, cause))
                if ended_by_now > ended:
                    failures = 1
                elif trial is None or trial != last:  # one that kills its workers each time is given up before its place is
                    failures += 1
                ended, last = ended_by_now, trial
                self.announce(f"slot {self.job.slot} lost its workers{f' in trial {trial}' if trial else ''}: {message}")
                if cause == "preempted":
                    return
                if found_damage(error) and not self._mended():
                    break
                self._pause(failures)
        self.broken = not self.closing

    def _pause(self, failures: int) -> None:
        """Before the workers begin anew, unless the sweep ends or they begin no more."""
        until = time.monotonic() + (PAUSES_SECONDS[failures - 1] if failures <= len(PAUSES_SECONDS) else 0.0)
        while time.monotonic() < until and not self.closing:
            time.sleep(0.1)

    def _mended(self) -> bool:
        """False where the store cannot be made whole; `error` says why."""
        try:
            self.mend()
        except Exception as error:
            logging.getLogger("neo_ray").exception("the store of targets could not be mended")
            self.error = str(error)
            return False
        return True

    def _collectives(self, backend: str) -> ray.train.torch.TorchConfig:
        """What waits for another worker waits longer than that one may take to load."""
        config = ray.train.torch.TorchConfig(backend=backend)
        return replace(config, timeout_s=max(config.timeout_s, int(2 * LOADING * self.job.silence_seconds)))

    def _trainer(self) -> Any:
        per_worker: dict[str, float] = {"CPU": self.resources.cpus_per_worker}
        if self.resources.gpus_per_worker:
            per_worker["GPU"] = self.resources.gpus_per_worker
        threads = str(max(1, int(self.resources.cpus_per_worker)))
        env = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "NEO_RAY_SLOT": str(self.job.slot)}
        use_gpu = self.resources.gpus_per_worker > 0
        if not use_gpu:
            env["DS_ACCELERATOR"] = "cpu"
        return ray.train.torch.TorchTrainer(
            slot_loop,
            train_loop_config={"job": self.job},
            torch_config=self._collectives("nccl" if use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.resources.workers_per_trial,
                use_gpu=use_gpu,
                resources_per_worker=per_worker,
                accelerator_type=self.resources.accelerator_type,
                placement_strategy=self.resources.placement_strategy,
            ),
            run_config=RunConfig(  # type: ignore[arg-type]  # Train V2's own
                name=f"slot-{self.job.slot}-{time.time_ns()}",
                storage_path=os.path.abspath(self.job.here / "ray"),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
                logging_config=LoggingConfig(log_level="ERROR"),
                worker_runtime_env={"env_vars": env},
            ),
        )

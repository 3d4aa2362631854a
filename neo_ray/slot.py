"""How do trials run on workers? A slot: a long-lived TorchTrainer worker group that takes one trial after another."""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig

from neo_ray.config import ResourcesConfig
from neo_ray.settings import TrialConfig

NAMESPACE = "neo_ray"
MAX_RESTARTS_IN_A_ROW = 3  # workers that die without finishing anything are no passing fault


@dataclass(frozen=True)
class SlotJob:
    """What every worker of a slot is told once."""

    slot: int
    board: str
    sources: Any
    folder: str
    """Results folder; trials write into `trials/<id>`, workers log into `logs`."""


def slot_loop(settings: dict[str, Any]) -> None:
    """The train function of every worker: build the parts for a trial's shape, or keep those there are, and train."""
    import torch.distributed as dist

    from neo_ray import devices

    job: SlotJob = settings["job"]
    rank = ray.train.get_context().get_world_rank()
    log_to(Path(job.folder) / "logs" / f"slot-{job.slot}-rank-{rank}.log")
    board = ray.get_actor(job.board, namespace=NAMESPACE)
    device, parts = devices.local_device(), None
    while True:
        box: list[Any] = [_take(board, job.slot) if rank == 0 else None]
        dist.broadcast_object_list(box, 0)
        trial_id, data = box[0]
        if trial_id == "closed":
            return
        if data is None:
            continue
        parts = _run_trial(board, job, rank, device, parts, trial_id, TrialConfig.model_validate(data["config"]))


def _run_trial(board: Any, job: SlotJob, rank: int, device: Any, parts: Any, trial_id: str, trial: TrialConfig) -> Any:
    """Run one trial and tell the board how it ended. Returns parts that the next trial may use, or None."""
    from neo_ray import devices
    from neo_ray.parts import load_parts, rank_and_world_size, shape_of
    from neo_ray.train import train

    log = logging.getLogger("neo_ray")
    log.info("trial %s begins: %s", trial_id, trial.model_dump_json())
    folder = Path(job.folder) / "trials" / trial_id
    stop = _Stop(board, trial_id) if rank == 0 else None
    try:
        if parts is None or parts.shape != shape_of(trial, device):
            parts = None  # free the old ones before the new ones are loaded
            parts = load_parts(job.sources, trial, device)
        report = _reporter(board, trial_id)
        outcome = train(trial, parts, report, (lambda: stop.asked) if stop else (lambda: False), folder)
        end = {"state": outcome.state, "cause": outcome.cause, "error": outcome.error, "metrics": outcome.metrics}
        end |= outcome.totals | {"details": {**outcome.details, "slot": job.slot}}
        keep = parts if parts.shape[-1] else None
    except Exception as error:
        cause = "out_of_memory" if devices.is_out_of_memory(error) else "error"
        log.exception("trial %s failed", trial_id)
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        end, keep = {"state": "FAILED", "cause": cause, "error": message, "details": {"slot": job.slot}}, None
        if rank_and_world_size()[1] > 1:  # the other ranks wait in a collective: only a new worker group frees them
            ray.get(board.finish.remote(job.slot, trial_id, end))
            raise
    finally:
        if stop is not None:
            stop.close()
    log.info("trial %s ends: %s", trial_id, end)
    if rank == 0:
        ray.get(board.finish.remote(job.slot, trial_id, end))
    return keep


class _Stop:
    """Listens to the board in the background, so that the training loop only looks at a flag."""

    def __init__(self, board: Any, trial_id: str) -> None:
        self.asked = self.closed = False
        threading.Thread(target=self._watch, args=(board, trial_id), daemon=True).start()

    def _watch(self, board: Any, trial_id: str) -> None:
        while not self.closed and not self.asked:
            self.asked = ray.get(board.when_cancelled.remote(trial_id))

    def close(self) -> None:
        """The thread ends by itself, once the board knows that the trial left its slot."""
        self.closed = True


def _take(board: Any, slot: int) -> tuple[str, Any]:
    return ray.get(board.take.remote(slot))


def _reporter(board: Any, trial_id: str) -> Callable[[dict[str, Any]], None]:
    def report(row: dict[str, Any]) -> None:
        ray.get(board.report.remote(trial_id, row))

    return report


def log_to(path: Path) -> None:
    """What this process logs goes into a file of the results folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("neo_ray").setLevel(logging.INFO)


class SlotRunner(threading.Thread):
    """Keeps one slot alive from the driver: starts its worker group, and starts it again when it dies."""

    def __init__(self, job: SlotJob, resources: ResourcesConfig, board: Any, announce: Callable[[str], None]) -> None:
        super().__init__(daemon=True, name=f"slot-{job.slot}")
        self.job, self.resources, self.board, self.announce = job, resources, board, announce
        self.error: str | None = None
        self.closing = False

    def run(self) -> None:
        failures = 0
        while failures <= MAX_RESTARTS_IN_A_ROW and not self.closing:
            started = time.monotonic()
            try:
                self._trainer().fit()
                return
            except Exception as error:
                if self.closing:
                    return
                failures = 1 if time.monotonic() - started > 300 else failures + 1
                message, cause = _why(error)
                self.error = message
                trial = ray.get(self.board.slot_lost.remote(self.job.slot, message, cause))
                self.announce(f"slot {self.job.slot} lost its workers{f' in trial {trial}' if trial else ''}: {message}")

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
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.resources.workers_per_trial, use_gpu=use_gpu, resources_per_worker=per_worker
            ),
            run_config=RunConfig(  # type: ignore[arg-type]  # Train V2's own
                name=f"slot-{self.job.slot}-{time.time_ns()}",
                storage_path=os.path.abspath(os.path.join(self.job.folder, "ray")),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
                logging_config=LoggingConfig(log_level="ERROR"),
                worker_runtime_env={"env_vars": env},
            ),
        )


def _why(error: BaseException) -> tuple[str, str]:
    """One line and a cause for a worker group that died."""
    text = str(error)
    failures = getattr(error, "worker_failures", None)
    if failures:
        text = "; ".join(str(e).strip().splitlines()[-1] for e in failures.values() if str(e).strip())
    cause = "out_of_memory" if "OutOfMemory" in text else "error"
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return (lines[-1].strip() if lines else type(error).__name__)[:300], cause

"""What does it cost to drive very many trials? `python tests/scale.py [--trials 2000] [--slots 16] [--out docs/scale.json]`.

The sweep door runs as it stands (Tune, Optuna, ASHA, board, journal, records, report) on a local Ray with made-up GPUs. Only the
workers are doubles: one process sleeps in the place of all of them, and reports rows of the size that a training's have.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import ray
from doors import sweep_file
from tiny import World, make_world

import neo_ray.tuner
from neo_ray import analyze, sweep
from neo_ray.board import NAMESPACE
from neo_ray.records import Journal, Stop, TrialRecord, fold
from neo_ray.settings import TrialConfig
from neo_ray.slot import SlotRunner

POINTS = 4
BLOCK = 250
"""Trials between two rows of figures."""
KINDS = {
    "ray::Board": "board",
    "ray::Relay": "relays",
    "ray::ResourceTrainable": "relays",
    "ray::Sleepers": "doubles",
    "gcs_server": "gcs",
    "/raylet ": "raylet",
}


class Sleepers:
    """Doubles of all slots' workers: an async actor that takes trials, sleeps, reports and stops as a slot does."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def serve(self, slot: int, board_name: str) -> None:
        board = ray.get_actor(board_name, namespace=NAMESPACE)
        while True:
            trial, job = await board.take.remote(slot)
            if trial == "closed":
                return
            if job is not None:
                await board.finish.remote(slot, trial, await self._sleep(board, slot, trial, job["config"]))

    async def _sleep(self, board: Any, slot: int, trial: str, config: dict[str, Any]) -> dict[str, Any]:
        final, taken = score(TrialConfig.model_validate(config)), time.time()
        stopped = asyncio.ensure_future(board.when_stopped.remote(trial))
        for rung in range(1, POINTS + 1):
            await asyncio.sleep(self.seconds / POINTS)
            if stopped.done():
                if stopped.result() == Stop.PRUNED:
                    return {"state": "PRUNED", "details": {"slot": slot}}
                stopped = asyncio.ensure_future(board.when_stopped.remote(trial))
            ce = final + 0.4 / rung
            costs = {"seconds": time.time() - taken, "accelerator_seconds": time.time() - taken, "peak_memory_bytes": 10**9}
            row = {"rung": rung, "rung_tokens": 1000.0 * rung, "step": rung * 10, "learning_rate": 1e-3, "train_alignment": None}
            row |= {name: ce for name in ("train_loss", "train_ce", "train_kd", "select_ce", "select_bits_per_byte", "select_kl")}
            await board.report.remote(trial, {**row, **costs, "tokens": 1000 * rung, "steps": rung * 10})
        metrics = {"select_ce": ce, "select_kl": ce, "select_bits_per_byte": ce, "report_ce": ce}
        details = {"slot": slot, "setup_seconds": 0.0, "baseline": {"select_ce": 6.0}, "workers": 1}
        totals = {**costs, "tokens": 1000 * POINTS, "steps": 10 * POINTS}
        return {"state": "COMPLETE", "metrics": metrics, "details": details, **totals}


def score(trial: TrialConfig) -> float:
    """A valley over the learning rate, better with the rank, and noise that a setting always has."""
    rate, rank = trial.training.learning_rate, trial.lora.rank
    noise = 0.02 * math.sin(1e6 * rate + rank)
    return 4.6 + 0.15 * (math.log10(rate) + 3) ** 2 - 0.03 * math.log2(rank) + noise


class SleepingRunner(SlotRunner):
    """A slot whose workers are the doubles."""

    def _trainer(self) -> Any:
        return self

    def fit(self) -> None:
        ray.get(ray.get_actor("sleepers", namespace=NAMESPACE).serve.remote(self.job.slot, self.job.board))


class Watch(threading.Thread):
    """Notes seconds, CPU seconds by kind of process, memory and sizes of files each time that so many trials have ended."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.rows = folder, list[dict[str, Any]]()
        self.begun, self.closing = time.time(), threading.Event()
        self.cpu: dict[int, tuple[str, float]] = {}

    def run(self) -> None:
        while not self.closing.wait(5):
            ended = ends_in(self.folder / "journal.jsonl")
            self._look()
            if ended // BLOCK > (self.rows[-1]["ended"] // BLOCK if self.rows else -1):
                self.note(ended)

    def note(self, ended: int) -> None:
        self._look()
        sizes = {name: size_of(self.folder / name) for name in ("journal.jsonl", "trials.jsonl", "study.db", "ray")}
        cpu: dict[str, float] = {}
        for kind, seconds in self.cpu.values():
            cpu[kind] = cpu.get(kind, 0.0) + seconds
        driver = psutil.Process().memory_info().rss
        row: dict[str, Any] = {"ended": ended, "seconds": time.time() - self.begun, "cpu_seconds": cpu, "file_bytes": sizes}
        row |= {"driver_bytes": driver, "board_bytes": sum(p.memory_info().rss for p in alive() if kind_of(p) == "board")}
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)

    def _look(self) -> None:
        for process in alive():
            try:
                times = process.cpu_times()
                self.cpu[process.pid] = (kind_of(process), times.user + times.system)
            except psutil.Error:
                continue


def alive() -> list[psutil.Process]:
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def kind_of(process: psutil.Process) -> str:
    if process.pid == os.getpid():
        return "driver"
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return "other"
    return next((kind for mark, kind in KINDS.items() if mark in words), "other of Ray")


def size_of(path: Path) -> int:
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def ends_in(journal: Path) -> int:
    return journal.read_text().count('"event": "end"') if journal.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0, help="that a trial sleeps")
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="scale-"))
    try:
        found = measured(folder, make_world(folder / "world"), asked)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: value for name, value in found.items() if name != "rows"}))
    return found["code"]


def crossed(results: Path, records: list[TrialRecord]) -> int:
    """Trials that were stopped as they completed: the study was told of the stop, and the journal of what they reached."""
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{results / 'study.db'}")
    told = {trial.user_attrs["trial"]: trial.state.name for trial in study.get_trials(deepcopy=False)}
    return sum(told[record.id] != record.state for record in records)


def measured(folder: Path, world: World, asked: argparse.Namespace) -> dict[str, Any]:
    path = sweep_file(
        world,
        folder,
        method="lora",
        search={"rank": {"choice": [4, 8, 16, 32]}, "learning_rate": {"log_uniform": [1e-4, 1e-2]}},
        sampler={"name": asked.sampler, "num_trials": asked.trials},
        scheduler={"name": "asha"},
        evaluation={"points": POINTS},
        resources={"address": "auto", "gpus_per_worker": 1, "cpus_per_worker": 0.01, "memory_check": False},
    )
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(num_cpus=2, num_gpus=asked.slots, include_dashboard=True, namespace=NAMESPACE, log_to_driver=False)
    doubles = ray.remote(Sleepers).options(name="sleepers", num_cpus=0, max_concurrency=1000).remote(asked.seconds)
    neo_ray.tuner.SlotRunner = SleepingRunner  # type: ignore[misc]
    results = folder / "results" / "tiny"
    watch = Watch(results)
    watch.start()
    code = sweep.main([str(path)])
    watch.closing.set()
    watch.join()
    watch.note(ends_in(results / "journal.jsonl"))
    found = {"trials": asked.trials, "slots": asked.slots, "trial_seconds": asked.seconds, "sampler": asked.sampler, "code": code}
    begun, cpu = time.time(), time.process_time()
    list_of = list(Journal(results).events())
    records = fold(list_of)
    found |= {"fold_seconds": time.time() - begun, "fold_cpu_seconds": time.process_time() - cpu}
    found["states"] = {state: sum(r.state == state for r in records) for state in ("COMPLETE", "PRUNED", "FAILED", "RUNNING")}
    begun, cpu = time.time(), time.process_time()
    analyze.write(analyze.analyse(results), results)
    found |= {"report_seconds": time.time() - begun, "report_cpu_seconds": time.process_time() - cpu}
    found["crossed"], found["one_more"] = crossed(results, records), list[dict[str, float]]()
    for more in (1, 2):
        begun, cpu = time.time(), time.process_time()
        found["code"] = sweep.main([str(path), f"sampler.num_trials={asked.trials + more}"]) or found["code"]
        found["one_more"].append({"seconds": time.time() - begun, "cpu_seconds": time.process_time() - cpu})
    found["rows"] = watch.rows
    del doubles  # a named actor lives as long as somebody holds it
    return found


if __name__ == "__main__":
    sys.exit(main())

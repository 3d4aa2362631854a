"""What does a model score on a suite of benchmarks? The LM Evaluation Harness, run on a model in memory and over all workers.

Nothing of a training is touched: random states, dropout and every module's mode are afterwards what they were before.
Shapes: B sequences, L tokens, V real vocabulary.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from neo_ray import devices, suites
from neo_ray.mistakes import guess
from neo_ray.parts import rank_and_world_size, sum_over_ranks
from neo_ray.records import Stop
from neo_ray.refusals import check_harness
from neo_ray.scores import SuiteScores
from neo_ray.settings import ConfigError
from neo_ray.suites import Suite

SEED = 1234
"""Of the draw of solved examples, where a suite has shots: the harness's own default."""


class NoRoomForSuite(torch.OutOfMemoryError):
    """Memory ran out while benchmarks were asked: a smaller micro-batch of the training would change nothing."""


class Stopped(Exception):
    """All workers were told to stop while benchmarks were asked: there are no scores, not even of some."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(f"benchmarks were left ({stop.name})")
        self.stop = stop


@dataclass(frozen=True)
class Opened:
    """A suite whose tasks are loaded; a model can be asked again and again."""

    suite: Suite
    tasks: dict[str, dict[str, Any]]
    """Benchmark → names of its tasks → the harness's tasks."""


def open_suite(folder: Path, limit: int | None = None, world_size: int = 1, is_cut: bool = False) -> Opened:
    """Load the tasks of a suite that `suites.make_ready` put into a folder, data sets included.

    Args:
        is_cut: the model will be, by ZeRO-3, over these workers.

    Raises:
        ConfigError: the harness is not installed, a task is not known, its data cannot be had, it does not state the metric as
            a mean over items, or it lets the model write where ranks would not do so equally often.
    """
    check_harness()
    suite = suites.read(folder / suites.FILE)
    with _quiet(), suites.task_files(folder) as files:
        own = suite.tasks is not None
        defaults = not own or suite.with_harness
        manager = _part("tasks").TaskManager(include_path=str(files) if own else None, include_defaults=defaults)
        tasks = {name: _load(manager, suite, name) for name in suite.benchmarks}
    for name, found in tasks.items():
        for task, loaded in found.items():
            _check_metric(suite, name, task, loaded)
            if is_cut and world_size > 1 and loaded.OUTPUT_TYPE == "generate_until":
                raise ConfigError(
                    f"evaluation.suite: {task} has answers written, for which the workers of a model that ZeRO-3 has cut do not "
                    "take equally many steps; deepspeed.zero_stage: 2, or workers_per_trial: 1"
                )
            number = min(len(loaded.eval_docs), limit or len(loaded.eval_docs))
            if number < world_size:
                raise ConfigError(f"evaluation.suite: {task} has {number} items for {world_size} workers of a trial")
            if loaded.config.num_fewshot != 0:  # a task that says 0 keeps that, as with the harness
                loaded.set_config(key="num_fewshot", value=suite.shots)
            _draw_by_item(loaded, task)
    return Opened(suite, tasks)


def ask(
    opened: Opened,
    model: nn.Module,
    tokenizer: Any,
    vocabulary: int,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int = 4,
    limit: int | None = None,
    should_stop: Callable[[], Stop] = lambda: Stop.NO,
) -> SuiteScores:
    """Score a model; every worker of the trial calls this, and each gets all scores.

    Args:
        model: a causal language model of transformers, with or without adapter, also one that ZeRO-3 has cut.
        vocabulary: token ids that are real; what the head says beyond them is left out.
        dtype: of matrix products.
        batch_size: sequences at once; each worker halves it for itself where it runs out of memory.
        limit: items of a task, the first ones; None: all.
        should_stop: asked on rank 0 before each batch; all workers stop before the same one.

    Raises:
        Stopped: as `should_stop` said.
        NoRoomForSuite: a single sequence does not fit, or the model is cut over workers, which must take equally many steps.
    """
    started = time.monotonic()
    tasks = {name: task for found in opened.tasks.values() for name, task in found.items()}
    with _untouched(model, device), _quiet():
        model.eval()
        lm = _language_model(_Asked(model, device, dtype, vocabulary, _Pace(should_stop, device)), tokenizer, batch_size)
        result = _part("evaluator").evaluate(lm, {"tasks": tasks}, limit=limit, bootstrap_iters=0)
    found = [(_items(opened, result), time.monotonic() - started) if result is not None else None]
    if rank_and_world_size()[1] > 1:
        dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    items, seconds = found[0]
    return SuiteScores(opened.suite.title, limit, items, str(dtype), seconds)


def _part(name: str) -> Any:
    """A module of the harness, which is an extra."""
    return importlib.import_module(f"lm_eval.{name}")


def _load(manager: Any, suite: Suite, name: str) -> dict[str, Any]:
    if name not in manager.all_tasks:
        known = manager.all_tasks
        raise ConfigError(f"evaluation.suite: {suite.title}: no task {name}{guess(name, known)}")
    try:
        return dict(manager.load([name])["tasks"])
    except Exception as error:  # of many kinds: the hub's, datasets', the harness's own
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ConfigError(f"evaluation.suite: {suite.title}: {name} cannot be loaded ({words})") from error


def _check_metric(suite: Suite, benchmark: str, task: str, loaded: Any) -> None:
    metric = suite.benchmarks[benchmark].metric
    means = {known: how.__name__ for known, how in loaded.aggregation().items()}
    if metric not in means:
        raise ConfigError(
            f"evaluation.suite: {suite.title}: {task} does not state {metric}{guess(metric, means)}; it has: {', '.join(means)}"
        )
    if means[metric] != "mean":
        raise ConfigError(
            f"evaluation.suite: {suite.title}: {metric} of {task} is no mean over items ({means[metric]}), so that trials "
            "cannot be compared item by item"
        )


def _draw_by_item(task: Any, name: str) -> None:
    """Solved examples are drawn by seed, task and item: the same ones whichever worker asks it, and whatever it asked before.

    The harness itself goes on drawing from one generator, from item to item and from one asking to the next.
    """
    build = task.fewshot_context

    def drawn(doc: Any, **how: Any) -> Any:
        task.set_fewshot_seed(seed=f"{SEED} {name} {json.dumps(doc, sort_keys=True, default=str)}")
        return build(doc, **how)

    task.fewshot_context = drawn


def _items(opened: Opened, result: Any) -> dict[str, list[float]]:
    """Benchmark → values, by task and by the item's number; of several filters of an answer the first counts."""
    found: dict[str, list[float]] = {}
    for benchmark, tasks in opened.tasks.items():
        metric, values = opened.suite.benchmarks[benchmark].metric, []
        for task in sorted(tasks):
            samples = result["samples"][task]
            first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
            values += [float(sample[metric]) for sample in sorted(first, key=lambda sample: sample["doc_id"])]
        found[benchmark] = values
    return found


@dataclass(frozen=True)
class _Pace:
    """Workers take their batches side by side, so that all hear before the same one that they are to stop."""

    should_stop: Callable[[], Stop]
    """Asked on rank 0."""
    device: torch.device

    def step(self, is_through: bool = False) -> bool:
        """Before each batch, and then until all workers are through, which it returns. Raises Stopped."""
        rank, world_size = rank_and_world_size()
        told = float(self.should_stop()) if rank == 0 else 0.0
        stop, through = sum_over_ranks(torch.tensor([told, float(is_through)], device=self.device)).tolist()
        if stop:
            raise Stopped(Stop(int(stop)))
        return through == world_size


@dataclass(frozen=True)
class _Asked:
    """The model as the harness calls it: no module, so that it neither changes its mode nor ties its weights anew."""

    model: Any
    device: torch.device
    dtype: torch.dtype
    vocabulary: int
    pace: _Pace

    @property
    def config(self) -> Any:
        return self.model.config

    def __call__(self, input_ids_BL: torch.Tensor) -> Any:
        self.pace.step()
        with torch.no_grad(), devices.autocast(self.device, self.dtype):
            logits_BLV = self.model(input_ids=input_ids_BL, use_cache=False).logits
        return SimpleNamespace(logits=logits_BLV[..., : self.vocabulary].float())

    def generate(self, **arguments: Any) -> torch.Tensor:
        self.pace.step()
        with torch.no_grad(), devices.autocast(self.device, self.dtype):
            return self.model.generate(**arguments, logits_processor=[self._real], synced_gpus=self.is_cut)

    def _real(self, ids_BL: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        """No token beyond the vocabulary is written."""
        logits_BV[:, self.vocabulary :] = -torch.inf
        return logits_BV

    @property
    def is_cut(self) -> bool:
        """By ZeRO-3, over several workers: they take each step together."""
        return rank_and_world_size()[1] > 1 and any(hasattr(parameter, "ds_id") for parameter in self.model.parameters())


def _language_model(asked: _Asked, tokenizer: Any, batch_size: int) -> Any:
    base: Any = _part("models.huggingface").HFLM

    class Workers(base):
        """Items are dealt out to the workers of a trial."""

        batch_size_per_gpu: int

        def __init__(self) -> None:
            # a cache by context would make the number of forward passes differ between ranks
            super().__init__(pretrained=asked, tokenizer=tokenizer, batch_size=batch_size, logits_cache=False)
            self._rank, self._world_size = rank_and_world_size()

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            if self.world_size <= 1:
                return tensor
            found = [torch.zeros_like(tensor) for _ in range(self.world_size)]
            dist.all_gather(found, tensor)
            return torch.stack(found)

        def barrier(self) -> None:
            """After all requests of a kind."""
            while not asked.pace.step(is_through=True):
                pass

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: list[Any], **how: Any) -> list[tuple[float, bool]]:
            return self._fitting(lambda: super(Workers, self)._loglikelihood_tokens(requests, **how))

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            return self._fitting(lambda: super(Workers, self).generate_until(requests, disable_tqdm=True))

        def _fitting(self, answer: Callable[[], list[Any]]) -> list[Any]:
            """No other worker is waited for within `answer`, so each may take batches of its own size."""
            while True:
                try:
                    return answer()
                except Exception as error:
                    if not devices.is_out_of_memory(error):
                        raise
                    if self.batch_size_per_gpu == 1 or asked.is_cut:
                        raise NoRoomForSuite(
                            f"evaluation.suite: evaluation.batch_size {batch_size} does not fit ({error})"
                        ) from None
                self.batch_size_per_gpu = (self.batch_size_per_gpu + 1) // 2
                devices.free_memory(asked.device)

    return Workers()


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Random states and the mode of every module, put back; the peak of memory, which is the training's."""
    modes = {module: module.training for module in model.modules()}
    python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), devices.uncounted_memory(device):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness and datasets tell much that a sweep's own lines would drown in."""
    loggers: list[tuple[logging.Logger, int]] = [(log, log.level) for log in map(logging.getLogger, ("lm_eval", "datasets"))]
    for log, _ in loggers:
        log.setLevel(logging.ERROR)
    restore = _without_bars()
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # the harness's own bars have no switch
            yield
    finally:
        restore()
        for log, level in loggers:
            log.setLevel(level)


def _without_bars() -> Callable[[], None]:
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    return datasets.enable_progress_bars if shown else lambda: None

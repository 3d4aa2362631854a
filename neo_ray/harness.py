"""What does a model score on a suite of benchmarks? The LM Evaluation Harness, run on a model in memory and over all workers.

Nothing of a training is touched: random states, dropout and every module's mode are afterwards what they were before.
Shapes: B sequences, L tokens, V real vocabulary.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
import random
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
from neo_ray.parts import rank_and_world_size
from neo_ray.searching import BENCHMARKS
from neo_ray.settings import ConfigError
from neo_ray.suites import Suite

SEED = 1234
"""Of the draw of solved examples, where a suite has shots: the harness's own default."""


@dataclass(frozen=True)
class SuiteScores:
    """A suite's scores of one model."""

    suite: str
    """Name and version."""
    limit: int | None
    """So many items of each task were asked, the first ones; None: all."""
    items: dict[str, list[float]]
    """Benchmark → each item's value, always in the same order: what two models are compared by, item by item."""
    dtype: str = "torch.float32"
    """Of matrix products: models are compared in the same one."""

    @property
    def values(self) -> dict[str, float]:
        """Benchmark → mean over its items."""
        return {name: float(np.mean(items)) for name, items in self.items.items()}

    @property
    def errors(self) -> dict[str, float]:
        """Benchmark → standard error of its value, from the spread of its items; nan of a single one."""
        return {
            name: float(np.std(items, ddof=1) / math.sqrt(len(items))) if len(items) > 1 else math.nan
            for name, items in self.items.items()
        }

    @property
    def average(self) -> float:
        """Unweighted mean over the benchmarks."""
        return float(np.mean(list(self.values.values())))

    @property
    def error(self) -> float:
        """Standard error of the average."""
        return math.sqrt(sum(error**2 for error in self.errors.values())) / len(self.items)

    def named(self) -> dict[str, float | None]:
        """As a record's metrics: `suite` for the average, `suite_<benchmark>` for each value."""
        return {BENCHMARKS: self.average, **{f"{BENCHMARKS}_{name}": value for name, value in self.values.items()}}


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
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("evaluation.suite: needs the LM Evaluation Harness: pip install -c constraints.txt -e '.[lm_eval]'")
    suite = suites.read(folder / suites.FILE)
    with _quiet():
        own = suite.tasks is not None
        manager = _part("tasks").TaskManager(include_path=str(folder / "tasks") if own else None, include_defaults=not own)
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
            loaded.set_fewshot_seed(seed=SEED)
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
    alive: Callable[[], object] = lambda: None,
) -> SuiteScores:
    """Score a model; every worker of the trial calls this, and each gets all scores.

    Args:
        model: a causal language model of transformers, with or without adapter, also one that ZeRO-3 has cut.
        vocabulary: token ids that are real; what the head says beyond them is left out.
        dtype: of matrix products.
        batch_size: sequences at once; halved where a worker that is alone runs out of memory.
        limit: items of a task, the first ones; None: all.
        alive: called before each forward pass.
    """
    tasks = {name: task for found in opened.tasks.values() for name, task in found.items()}
    with _untouched(model, device), _quiet():
        model.eval()
        while True:
            lm = _language_model(_Asked(model, device, dtype, vocabulary, alive), tokenizer, batch_size)
            try:
                result = _part("evaluator").evaluate(lm, {"tasks": tasks}, limit=limit, bootstrap_iters=0)
                break
            except Exception as error:
                if not devices.is_out_of_memory(error) or batch_size == 1 or rank_and_world_size()[1] > 1:
                    raise
                batch_size = (batch_size + 1) // 2
            devices.free_memory(device)
    items = [_items(opened, result) if result is not None else None]
    if rank_and_world_size()[1] > 1:
        dist.broadcast_object_list(items, src=0)
    assert items[0] is not None
    return SuiteScores(opened.suite.title, limit, items[0], str(dtype))


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
class _Asked:
    """The model as the harness calls it: no module, so that it neither changes its mode nor ties its weights anew."""

    model: Any
    device: torch.device
    dtype: torch.dtype
    vocabulary: int
    alive: Callable[[], object]

    @property
    def config(self) -> Any:
        return self.model.config

    def __call__(self, input_ids_BL: torch.Tensor) -> Any:
        self.alive()
        with torch.no_grad(), devices.autocast(self.device, self.dtype):
            logits_BLV = self.model(input_ids=input_ids_BL, use_cache=False).logits
        return SimpleNamespace(logits=logits_BLV[..., : self.vocabulary].float())

    def generate(self, **arguments: Any) -> torch.Tensor:
        self.alive()
        cut = any(hasattr(parameter, "ds_id") for parameter in self.model.parameters())  # ZeRO-3: all ranks go on together
        with torch.no_grad(), devices.autocast(self.device, self.dtype):
            return self.model.generate(**arguments, synced_gpus=cut and rank_and_world_size()[1] > 1)


def _language_model(asked: _Asked, tokenizer: Any, batch_size: int) -> Any:
    base: Any = _part("models.huggingface").HFLM

    class Workers(base):
        """Items are dealt out to the workers of a trial."""

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
            if self.world_size > 1:
                dist.barrier()

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            return super().generate_until(requests, disable_tqdm=True)

    return Workers()


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Random states and the mode of every module, put back."""
    modes = {module: module.training for module in model.modules()}
    python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
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

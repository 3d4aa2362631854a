"""What does a worker hold between trials? The frozen models, the tokenised data, and what was measured on them once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from neo_ray import devices, models, placement
from neo_ray.config import Placement, Quantization
from neo_ray.data import TokenData, open_data
from neo_ray.settings import TrialConfig
from neo_ray.storage import RECORD, Damaged, Folder, Remote, at, bring_folder, recorded
from neo_ray.stores import Recipe, Store, open_store

ASKED = ("teacher_tokens", "target_rows", "spared_tokens")
"""Tokens that a living teacher read, rows read from a store, tokens that a living one would have read in the store's place."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, and whether its own code may run."""

    path: str
    """A folder or a hub name."""
    revision: str | None = None
    trust_remote_code: bool = False
    quantization: Quantization = "none"


@dataclass(frozen=True)
class TargetSource:
    """Where a whole store of the teacher's targets is, and what stands in it."""

    folder: str
    recipe: Recipe
    bytes_of_row: int
    scratch: str | None = None
    """The setting `storage.scratch`."""

    @property
    def place(self) -> Folder:
        return at(self.folder, self.scratch)


@dataclass(frozen=True)
class SharedCache:
    """An object store in which folders of the driver's cache stand under the same names."""

    url: str
    scratch: str | None
    """The setting `storage.scratch`."""
    root: str
    """The driver's own folder."""
    records: dict[str, str]
    """Name of a folder → the record of its files: as they were handed over, whatever comes to stand there."""

    def bring(self, path: str | None) -> str | None:
        """A folder of the cache on this machine, brought once; another path as it is.

        Raises:
            Damaged: it is not what was handed over, or not there. It has lost its record, so that it is uploaded again.
        """
        name = str(Path(path).relative_to(self.root)) if path and Path(path).is_relative_to(self.root) else ""
        if name not in self.records:
            return path
        place = Remote(self.url, self.scratch)
        try:
            bring_folder(place / name, place.here / name, self.records[name])
        except Damaged:
            with suppress(PermissionError):
                if recorded(place / name) == self.records[name]:
                    (place / name / RECORD).remove()
            raise
        return str(place.here / name)


@dataclass(frozen=True)
class Sources:
    """Where the parts come from: paths that every worker can read. Plain data, sent to workers once."""

    student: ModelSource
    data: str
    teacher: ModelSource | None = None
    vocabulary: int = 0
    """Token ids that teacher and student share; logits beyond it belong to padding rows."""
    pad_id: int = 0
    teacher_placement: Placement = "replicated"
    targets: TargetSource | None = None
    """Where there is one, no worker loads the teacher."""
    suite: str | None = None
    """Folder of a suite of benchmarks, as `suites.make_ready` made it."""
    shared: SharedCache | None = None
    """Where other machines bring these folders from."""


@dataclass
class Parts:
    """Built once a worker for trials of one shape."""

    sources: Sources
    shape: tuple[Any, ...]
    student: nn.Module
    """The base: frozen, and the same tensors for every trial that takes it."""
    teacher: nn.Module | None
    data: TokenData
    device: torch.device
    dtype: torch.dtype
    """Of matrix products and frozen weights; trained weights are fp32."""
    measured: dict[Any, Any] = field(default_factory=dict)
    """Teacher states on the held-out splits and the untrained student's scores, by split."""
    targets: Store | None = None
    """What the teacher says, where it is not alive."""
    asked: Counter[str] = field(default_factory=Counter)
    """The `ASKED` of this worker so far; tokens without padding."""

    @property
    def has_teacher(self) -> bool:
        return self.teacher is not None or self.targets is not None

    @property
    def vocabulary(self) -> int:
        return self.sources.vocabulary


def shape_of(trial: TrialConfig, device: torch.device) -> tuple[Any, ...]:
    """What a trial needs of its parts; trials of equal shape share them.

    Full training changes the base and ZeRO-3 partitions it, so that these leave nothing to share.
    """
    dtype = devices.resolve_dtype(trial.training.dtype, device)
    reusable = trial.has_adapter and trial.deepspeed.zero_stage < 3
    return (trial.has_adapter, str(dtype), reusable)


def placed(sources: Sources, where: Callable[[str | None], str | None]) -> Sources:
    """The sources with each of their folders put through `where`."""
    student, teacher = (source and replace(source, path=str(where(source.path))) for source in (sources.student, sources.teacher))
    assert student is not None
    return replace(sources, data=str(where(sources.data)), suite=where(sources.suite), student=student, teacher=teacher)


def received(sources: Sources) -> Sources:
    """The sources with the folders of this machine."""
    if sources.shared is None:
        return sources
    return replace(placed(sources, sources.shared.bring), shared=None)


def load_parts(sources: Sources, trial: TrialConfig, device: torch.device) -> Parts:
    """Load what trials of this shape need. A student trained in full is loaded in fp32: its weights are the master copy."""
    sources = received(sources)
    dtype = devices.resolve_dtype(trial.training.dtype, device)
    student = load_source(sources.student, dtype if trial.has_adapter else devices.FP32, device, "student.model")
    data, teacher, store = open_data(sources.data), None, None
    if sources.targets is not None:
        if sources.targets.recipe.dtype != str(dtype):
            raise RuntimeError(f"the teacher's targets were made in {sources.targets.recipe.dtype}, and this worker has {dtype}")
        store = open_store(sources.targets.place, sources.targets.recipe, sources.targets.bytes_of_row, data, device)
    elif sources.teacher is not None:
        begun = device if sources.teacher_placement == "replicated" else torch.device("cpu")
        teacher = load_source(sources.teacher, dtype, begun, "teacher.model")
        placement.place(teacher, sources.teacher_placement, device)
    return Parts(sources, shape_of(trial, device), student, teacher, data, device, dtype, targets=store)


def load_source(source: ModelSource, dtype: torch.dtype, device: torch.device, where: str) -> nn.Module:
    """The model of a source, frozen."""
    trust, bits = source.trust_remote_code, source.quantization
    return models.load_model(source.path, dtype, str(device), source.revision, trust, where, quantization=bits)


def rank_and_world_size() -> tuple[int, int]:
    """This worker's place in the trial's process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """In place; every rank gets the sum."""
    if rank_and_world_size()[1] > 1:
        dist.all_reduce(values)
    return values

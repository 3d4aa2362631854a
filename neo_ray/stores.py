"""Where is it kept what the teacher says of each scored token? A store of shards, read by the example.

A store belongs to one teacher and one tokenised data set; the folder's name is a hash of everything that changes a number in it.
Rows stand in the order of a split's examples, and within one in the order of its scored positions, so that a batch's rows are
those of its examples, end to end, whatever the order, the padding or the packing of the batch.

Shapes: R rows of a shard, N rows of a batch, H the student's hidden width, G the teacher's.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from neo_ray import models, staging
from neo_ray.data import Split, TokenData
from neo_ray.records import write_atomically
from neo_ray.storage import PART, Damaged, Folder, Remote
from neo_ray.storage import checksum as _checksum
from neo_ray.supply import SHARD_BYTES

FORMAT_VERSION = 1
"""Raise it with any change that gives other numbers or other files."""
HEAD = "head"
"""Name of the teacher's head."""
Mode = Literal["projection", "hidden", "topk"]
COLUMNS: dict[Mode, tuple[str, ...]] = {
    "projection": ("c_RH", "constant_R"),
    "hidden": ("hidden_RG",),
    "topk": ("log_p_RK", "ids_RK", "log_tail_R"),
}
"""Of a shard, in the order in which they are given out."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a store's numbers."""

    mode: Mode
    data: str
    """Fingerprint of the tokenised data."""
    teacher: str
    """Identity of the teacher's weights."""
    dtype: str
    """`torch.…`: the teacher computes in it."""
    vocabulary: int
    temperature: float = 1.0
    """Of the training split's projections and top k; held-out splits are scored at 1. A hidden state has none."""
    head: str | None = None
    """Identity of the student's weights, whose head projections go through."""
    top_k: int = 0
    """How many tokens a position has, under `topk`."""
    quantization: str = "none"
    transformers: str = ".".join(transformers.__version__.split(".")[:2])
    version: int = FORMAT_VERSION

    @property
    def key(self) -> str:
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=16).hexdigest()

    def temperature_of(self, split: str) -> float:
        return self.temperature if split == "train" else 1.0


@dataclass(frozen=True)
class Shard:
    """The examples first … last − 1 of a split."""

    split: str
    number: int
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


def shards(data: TokenData, bytes_of_row: int) -> list[Shard]:
    """How a store is cut: whole examples, in order, about `SHARD_BYTES` each."""
    found = []
    for name, split in data.splits.items():
        ends = np.cumsum(split.num_labels)
        first = number = 0
        while first < len(split):
            begun = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, begun + SHARD_BYTES // bytes_of_row, side="right")))
            found.append(Shard(name, number, first, last))
            first, number = last, number + 1
    return found


def write_shard(folder: Folder, shard: Shard, tensors: dict[str, Tensor], told: dict[str, Any] | None = None) -> None:
    """Whole or not at all: first the rows, then a record with their checksum, each under a name of its own until it is whole.

    Args:
        told: what the record says besides.
    """
    with staging.written(folder, shard.name) as here:
        _write(here, shard.name, tensors, {}, told)


def read_record(folder: Folder, name: str) -> dict[str, Any]:
    """What was written of a file beside it: rows, bytes, checksum, and what `write_shard` was told; empty without one."""
    try:
        found = json.loads((folder / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(
    folder: Path, name: str, tensors: dict[str, Tensor], settings: dict[str, str], told: dict[str, Any] | None = None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{PART}{uuid.uuid4().hex[:8]}"
    try:
        save_file(tensors, part, settings)
        record = {"bytes": part.stat().st_size, "blake2b": _checksum(part), "rows": len(next(iter(tensors.values())))}
        record |= told or {}
        _sync(part)
        os.replace(part, folder / f"{name}.safetensors")
        part.write_text(json.dumps(record))
        _sync(part)
        os.replace(part, folder / f"{name}.json")
    finally:
        part.unlink(missing_ok=True)


def is_whole(folder: Folder, name: str, rows: int | None = None) -> bool:
    """Is a file as it was written, by its checksum (in an object store by its size), and has it so many rows?"""
    return _looked_at(folder)(name, rows)


def is_as_written(folder: Folder, name: str, rows: int | None = None) -> bool:
    """`is_whole`, with every byte read also in an object store, from which the file is brought for it."""
    if not isinstance(folder, Remote):
        return _is_whole_here(folder, name, rows)
    with tempfile.TemporaryDirectory() as brought:
        try:
            for file in (f"{name}.json", f"{name}.safetensors"):
                (folder / file).download(Path(brought) / file)
        except FileNotFoundError:
            return False
        return _is_whole_here(Path(brought), name, rows)


def _looked_at(folder: Folder) -> Callable[[str, int | None], bool]:
    """`is_whole` of a store's files, of which an object store lists all at once."""
    if not isinstance(folder, Remote):
        return partial(_is_whole_here, folder)
    found = staging.recorded(folder)
    return lambda name, rows: name in found and rows in (None, found[name])


def _is_whole_here(folder: Path, name: str, rows: int | None) -> bool:
    path = folder / f"{name}.safetensors"
    try:
        record = json.loads((folder / f"{name}.json").read_text())
        return rows in (None, record["rows"]) and record["bytes"] == path.stat().st_size and record["blake2b"] == _checksum(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def missing(folder: Folder, data: TokenData, wanted: list[Shard], with_head: bool = False) -> list[Shard]:
    """Shards that are not there, or not as they were written.

    Args:
        with_head: the teacher's head belongs to the store. It comes with any that is filled: the first, if no other is missing.
    """
    whole = _looked_at(folder)
    found = [shard for shard in wanted if not whole(shard.name, num_rows(data.split(shard.split), shard))]
    return wanted[:1] if with_head and not found and not whole(HEAD, None) else found


def write_head(folder: Folder, head: models.Head) -> None:
    """The teacher's head, for a store of hidden states: whole or not at all, by whoever comes first or last."""
    tensors = {name: tensor for name, tensor in (("weight_VH", head.weight_VH), ("bias_V", head.bias_V)) if tensor is not None}
    settings = json.dumps({"soft_cap": head.soft_cap, "logit_scale": head.logit_scale})
    with staging.written(folder, HEAD) as here:
        _write(here, HEAD, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"head": settings})


def _read_head(folder: Path, device: torch.device) -> models.Head:
    if not is_whole(folder, HEAD):
        raise Damaged(f"targets: {folder / HEAD}.safetensors is not what was written; run the sweep again")
    with safe_open(folder / f"{HEAD}.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}
        return models.Head(tensors["weight_VH"], tensors.get("bias_V"), **json.loads(file.metadata()["head"]))


def open_store(folder: Folder, recipe: Recipe, bytes_of_row: int, data: TokenData, device: torch.device) -> Store:
    """A store that `missing` finds whole. One in an object store is brought here, shard by shard, from now on."""
    cut, staged = shards(data, bytes_of_row), None
    if isinstance(folder, Remote):
        staged = staging.Staged(folder, [shard.name for shard in cut])
        folder = staged.folder
    if staged is not None and recipe.mode == "hidden":
        write_atomically(folder / f"{HEAD}.json", json.dumps(staged.bring(HEAD)))
    head = _read_head(folder, device) if recipe.mode == "hidden" else None
    return Store(folder, recipe, data, cut, head, staged)


@dataclass
class Store:
    """A whole store, read by a worker. A shard's checksum is looked at before its first row is given out."""

    folder: Path
    recipe: Recipe
    data: TokenData
    cut: list[Shard]
    head: models.Head | None = None
    """The teacher's, for hidden states."""
    staged: staging.Staged | None = None
    """Brings the shards of an object store into `folder`."""
    opened: dict[str, Any] = field(default_factory=dict)
    places: dict[str, tuple[list[Shard], list[int], np.ndarray]] = field(default_factory=dict)
    """Split → its shards, their first examples, and where each example's rows begin: counted once, not at every step."""

    def rows(self, split_name: str, indices: Sequence[int] | np.ndarray, device: torch.device) -> tuple[Tensor, ...]:
        """(c_NH fp16, constant_N fp32), (hidden_NG fp16,) or a `TopK`'s three, of scored positions, in order.

        Raises:
            Damaged: a shard is not what was written.
        """
        split = self.data.split(split_name)
        if split_name not in self.places:
            own = [shard for shard in self.cut if shard.split == split_name]
            ends = np.concatenate([[0], np.cumsum(split.num_labels)])
            self.places[split_name] = own, [shard.first for shard in own], ends
        own, firsts, ends = self.places[split_name]
        found = []
        for index in indices:
            shard = own[int(np.searchsorted(firsts, index, side="right")) - 1]
            begun = ends[shard.first]
            where = slice(int(ends[index] - begun), int(ends[index + 1] - begun))
            file = self._open(shard, split)
            found.append([file.get_slice(name)[where] for name in COLUMNS[self.recipe.mode]])
        return tuple(torch.cat(column).to(device) for column in zip(*found, strict=True))

    def _open(self, shard: Shard, split: Split) -> Any:
        if shard.name not in self.opened:
            if not self._is_whole(shard.name, num_rows(split, shard)):
                raise Damaged(f"targets: {self.folder / shard.name}.safetensors is not what was written; run the sweep again")
            self.opened[shard.name] = safe_open(self.folder / f"{shard.name}.safetensors", framework="pt")
        return self.opened[shard.name]

    def _is_whole(self, name: str, rows: int) -> bool:
        return is_whole(self.folder, name, rows) if self.staged is None else bool(self.staged.bring(name)["rows"] == rows)


def num_rows(split: Split, shard: Shard) -> int:
    """Scored positions of a shard."""
    return int(split.num_labels[shard.first : shard.last].sum())


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())

"""Which tokens? Examples → labelled token ids, cut into three splits by hash, stored once as Arrow and memory-mapped.

Shape suffixes: B examples of a batch, L tokens of the longest of them (or of the one at hand).
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import filelock
import numpy as np
import pyarrow as pa
import torch

from neo_ray.answers import Rendered, Span, render
from neo_ray.config import DataConfig
from neo_ray.settings import ConfigError
from neo_ray.sources import Example, examples, open_source

HUB_ONLY = {"subset", "split", "revision"}
"""Settings of `data` that mean nothing for a local source."""
FORMAT_VERSION = 1
"""Raise it with any change here, in `sources.py` or `answers.py` that gives other tokens, labels or columns."""
IGNORED = -100
"""Label of a token that no loss counts."""
SPLITS = ("select", "report", "train")
SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),  # of the token at the same position: not shifted
        "num_tokens": pa.int32(),
        "num_labels": pa.int32(),  # labelled positions but the first, which a causal model cannot score
        "num_bytes": pa.int32(),  # UTF-8 bytes of what num_labels covers, for bits per byte
        "key": pa.string(),
    }
)
BATCH_EXAMPLES = 512
"""Tokenised and written at a time: bounds the memory that offsets take."""
Ranked = tuple[bytes, Example]
"""Place in the order of a split, and what stands there."""


@dataclass(frozen=True)
class Split:
    """Memory-mapped examples of one split, in the order of their hashes."""

    rows: datasets.Dataset
    num_tokens: np.ndarray
    num_labels: np.ndarray
    num_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.num_tokens)

    def examples(self, indices: Sequence[int] | np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """(input_ids_L, labels_L) of each index, int32."""
        table = self.rows.with_format("arrow")[[int(i) for i in indices]]
        ids, labels = (table.column(name).combine_chunks() for name in ("input_ids", "labels"))
        return [(ids[i].values.to_numpy(), labels[i].values.to_numpy()) for i in range(len(table))]


@dataclass(frozen=True)
class TokenData:
    folder: Path
    fingerprint: str
    summary: dict[str, dict[str, int]]
    """Split → examples, tokens, labels, bytes, dropped (nothing labelled), truncated."""
    splits: dict[str, Split]

    def split(self, name: str) -> Split:
        return self.splits[name]


@dataclass(frozen=True)
class Batch:
    """What a model reads, and the labels; all int64."""

    input_ids_BL: torch.Tensor
    attention_mask_BL: torch.Tensor | None
    """0 on padding, else 1; None for packed sequences, which models tell apart by their positions."""
    labels_BL: torch.Tensor
    position_ids_BL: torch.Tensor
    """Counted from 0 in every sequence."""


@dataclass(frozen=True, slots=True)
class Tokens:
    ids_L: np.ndarray
    labels_L: np.ndarray
    is_truncated: bool

    @property
    def scored_L(self) -> np.ndarray:
        return self.labels_L[1:][self.labels_L[1:] != IGNORED]


def prepare(config: DataConfig, source: str, tokenizer: Any, cache: Path, announce: Callable[[str], None] = print) -> Path:
    """Tokenise `source` (a local path or a hub name) once; the folder to give to `open_data`.

    Raises:
        ConfigError: the source, a row of it, the chat template or a split is not usable; nothing is left in `cache` then.
    """
    opened = open_source(config, source)
    ignored = sorted(HUB_ONLY & config.not_default) if opened.is_local else []
    if ignored:
        announce(f"{' and '.join(f'data.{key}' for key in ignored)}: ignored, since {source} is no hub data set")
    name = fingerprint(config, opened.content, tokenizer, opened.is_local)
    folder = Path(cache).expanduser() / "data" / name
    if folder.exists():
        announce(f"tokens of {source}: reused from {folder}")
        return folder
    with _sole_writer(folder, announce) as part:
        if not folder.exists():  # another sweep may have made it while this one waited
            splits = _assign(config, examples(config, opened.rows()), source)
            given = sum(map(len, splits.values()))
            splits["train"] = splits["train"][: config.train_limit]
            announce(f"tokenising {sum(map(len, splits.values())):,} examples of {source}")
            started = time.monotonic()
            summary = {split: _write(part / f"{split}.arrow", splits[split], tokenizer, config) for split in SPLITS}
            _check_not_empty(config, summary, given, source)
            record = {"fingerprint": name, "format_version": FORMAT_VERSION, "splits": summary}
            (part / "summary.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
            os.replace(part, folder)
            announce(f"{_in_words(summary)}, in {time.monotonic() - started:.1f} s, at {folder}")
    return folder


def fingerprint(config: DataConfig, content: str, tokenizer: Any, is_local: bool = True) -> str:
    """Hash of everything that determines the tokens: content, settings, tokenizer, this file's format."""
    outside = {"source", *HUB_ONLY} if is_local else {"source", "revision"}
    settings = config.model_dump(exclude=outside)
    everything = [FORMAT_VERSION, content, settings, _tokenizer_identity(tokenizer)]
    return hashlib.blake2b(json.dumps(everything, sort_keys=True).encode(), digest_size=16).hexdigest()


def open_data(folder: str | Path) -> TokenData:
    """The token data that `prepare` wrote. Arrays of ids stay on disk until they are asked for."""
    folder = Path(folder)
    record = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    splits = {name: _open_split(folder / f"{name}.arrow") for name in SPLITS}
    return TokenData(folder, record["fingerprint"], record["splits"], splits)


def collate(
    examples: Sequence[tuple[np.ndarray, np.ndarray]],
    pad_id: int,
    device: str | torch.device = "cpu",
    side: Literal["right", "left"] = "right",
    packing: bool = False,
) -> Batch:
    """(input_ids_L, labels_L) pairs as one batch: padded to the longest on `side`, or packed end to end in one row.

    Labels come from the examples and the mask from their lengths, never from `pad_id`, which may be the end of a turn. The first
    label of a sequence is left out: what stands before it is padding or another sequence.
    """
    assert examples and side in ("right", "left")
    lengths = [len(ids) for ids, _ in examples]
    shape = (1, sum(lengths)) if packing else (len(examples), max(lengths))
    ids_BL, labels_BL = np.full(shape, pad_id), np.full(shape, IGNORED)
    mask_BL, positions_BL = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    row, start = 0, 0
    for number, (ids, labels) in enumerate(examples):
        if not packing:
            row, start = number, 0 if side == "right" else shape[1] - len(ids)
        where = row, slice(start, start + len(ids))
        ids_BL[where], labels_BL[where], mask_BL[where], positions_BL[where] = ids, labels, 1, np.arange(len(ids))
        labels_BL[row, start] = IGNORED
        start += len(ids)
    read, mask, scored, positions = (torch.from_numpy(a).to(device) for a in (ids_BL, mask_BL, labels_BL, positions_BL))
    return Batch(read, None if packing else mask, scored, positions)


def _open_split(path: Path) -> Split:
    rows = datasets.Dataset.from_file(str(path), in_memory=False)
    counts = (rows.data.column(name).to_numpy().astype(np.int64) for name in ("num_tokens", "num_labels", "num_bytes"))
    return Split(rows, *counts)


def _assign(config: DataConfig, found: Iterable[Example], source: str) -> dict[str, list[Ranked]]:
    """Split → examples in the order of their hashes.

    One half of the hash says which split, the other which rank: they are independent, so that `limit` keeps the shares.
    An example's split depends on its content alone; copies of it go the same way.
    """
    ranked = ((digest[8:] + digest[:8], example) for example in found for digest in [example.key()])
    if config.limit is None:
        chosen = sorted(ranked, key=lambda pair: pair[0])
    else:
        chosen = heapq.nsmallest(config.limit, ranked, key=lambda pair: pair[0])
    if not chosen:
        raise ConfigError(f"data.source: {source}: holds no examples")
    splits: dict[str, list[Ranked]] = {split: [] for split in SPLITS}
    for rank, example in chosen:
        share = int.from_bytes(rank[8:]) / 2**64
        in_select, held_out = share < config.select_fraction, share < config.select_fraction + config.report_fraction
        splits["select" if in_select else "report" if held_out else "train"].append((rank, example))
    return splits


def _write(path: Path, ranked: list[Ranked], tokenizer: Any, config: DataConfig) -> dict[str, int]:
    """Tokenise and store one split; its summary."""
    summary = dict.fromkeys(("examples", "tokens", "labels", "bytes", "dropped", "truncated"), 0)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for start in range(0, len(ranked), BATCH_EXAMPLES):
            chunk = ranked[start : start + BATCH_EXAMPLES]
            tokens = _tokenise(render([example for _, example in chunk], tokenizer), tokenizer, config.max_length)
            kept = [(t, rank.hex()) for t, (rank, _) in zip(tokens, chunk, strict=True) if len(t.scored_L)]
            rows = _rows(kept, tokenizer)
            writer.write_table(pa.table(rows, SCHEMA))
            summary["examples"] += len(kept)
            summary["dropped"] += len(chunk) - len(kept)
            summary["truncated"] += sum(t.is_truncated for t, _ in kept)
            for total in ("tokens", "labels", "bytes"):
                summary[total] += sum(rows[f"num_{total}"])
    return summary


def _rows(kept: list[tuple[Tokens, str]], tokenizer: Any) -> dict[str, list[Any]]:
    scored = [t.scored_L.tolist() for t, _ in kept]
    texts = tokenizer.batch_decode(scored, skip_special_tokens=True, clean_up_tokenization_spaces=False) if kept else []
    return {
        "input_ids": [t.ids_L for t, _ in kept],
        "labels": [t.labels_L for t, _ in kept],
        "num_tokens": [len(t.ids_L) for t, _ in kept],
        "num_labels": [len(labels) for labels in scored],
        "num_bytes": [len(text.encode()) for text in texts],
        "key": [key for _, key in kept],
    }


def _tokenise(batch: list[Rendered], tokenizer: Any, max_length: int) -> list[Tokens]:
    """Each text as a whole, so that merges are those of inference; labels by the characters that a token covers."""
    is_plain, needs_offsets = batch[0].is_plain, batch[0].answers is not None
    assert all(r.is_plain == is_plain for r in batch)
    if needs_offsets and not tokenizer.is_fast:
        raise ConfigError(
            f"data.format: prompts are masked by character offsets, which the slow tokenizer of {tokenizer.name_or_path} "
            "does not give; use a model with a tokenizer.json, or plain text"
        )
    encoded = tokenizer(
        [r.text for r in batch],
        add_special_tokens=is_plain,
        return_offsets_mapping=needs_offsets,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about model_max_length: the cut comes below
    )
    offsets = encoded["offset_mapping"] if needs_offsets else [None] * len(batch)
    eos = tokenizer.eos_token_id if is_plain else None
    return [_label(r, i, o, eos, max_length) for r, i, o in zip(batch, encoded["input_ids"], offsets, strict=True)]


def _label(rendered: Rendered, ids: list[int], offsets: list[Span] | None, eos: int | None, max_length: int) -> Tokens:
    """A token is labelled when it ends inside an answer: one that a merge made of prompt and answer counts as answer."""
    ids_L = np.asarray(ids, np.int32)
    is_answer_L = np.full(len(ids_L), rendered.answers is None)
    if offsets is not None:
        ends_L = np.asarray(offsets, np.int64).reshape(-1, 2)[:, 1]
        for start, end in rendered.answers or ():
            is_answer_L |= (start < ends_L) & (ends_L <= end)
    if eos is not None and (not ids or ids[-1] != eos):
        ids_L, is_answer_L = np.append(ids_L, np.int32(eos)), np.append(is_answer_L, True)
    labels_L = np.where(is_answer_L, ids_L, np.int32(IGNORED))
    return Tokens(ids_L[:max_length], labels_L[:max_length], len(ids_L) > max_length)


def _tokenizer_identity(tokenizer: Any) -> list[Any]:
    """What decides about ids. Padding and truncation do not, and their settings change with every call."""
    if tokenizer.is_fast:
        vocabulary = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    else:
        vocabulary = tokenizer.get_vocab()
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    return [vocabulary, tokenizer.chat_template, special]


def _check_not_empty(config: DataConfig, summary: dict[str, dict[str, int]], given: int, source: str) -> None:
    if not any(s["examples"] for s in summary.values()):
        raise ConfigError(
            f"data.source: {source}: all tokens are masked: none of {given} examples has a labelled token "
            f"within data.max_length {config.max_length}"
        )
    for split in (name for name in SPLITS if not summary[name]["examples"]):
        keys = ["select_fraction", "report_fraction"] if split == "train" else [f"{split}_fraction"]
        shares = " and ".join(f"data.{key} {getattr(config, key)}" for key in keys)
        limit = f" (or data.limit {config.limit})" if config.limit else " or give more examples"
        change = "lower" if split == "train" else "raise"
        lost = f" ({summary[split]['dropped']} had no labelled token)" if summary[split]["dropped"] else ""
        raise ConfigError(f"{shares} of {given} examples leave the {split} split empty{lost}; {change} it{limit}")


def _in_words(summary: dict[str, dict[str, int]]) -> str:
    parts = [f"{name} {s['examples']:,} ({s['tokens']:,} tokens)" for name, s in summary.items()]
    cut = sum(s["truncated"] for s in summary.values())
    dropped = sum(s["dropped"] for s in summary.values())
    return f"examples: {', '.join(parts)}; {cut:,} truncated, {dropped:,} dropped for having no labelled token"


@contextmanager
def _sole_writer(folder: Path, announce: Callable[[str], None]) -> Iterator[Path]:
    """An empty folder beside `folder` to write in, one process at a time. A failure leaves nothing behind."""
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:6]}")
    lock = filelock.FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        made = _begin(part, folder, lock, announce)
    except OSError as error:
        raise ConfigError(f"storage.cache: {folder.parent}: cannot be written ({error.strerror or error})") from None
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        lock.release()
        if not folder.exists():
            with suppress(OSError):  # another process may be at work in there
                Path(lock.lock_file).unlink(missing_ok=True)
                for parent in made:
                    parent.rmdir()


def _begin(part: Path, folder: Path, lock: filelock.BaseFileLock, announce: Callable[[str], None]) -> list[Path]:
    """Take the lock and make `part`; the folders that had to be made for it, innermost first."""
    for _ in range(10):
        made = [p for p in (folder.parent, *folder.parent.parents) if not p.exists()]
        with suppress(FileNotFoundError):  # a process that failed took the folders away meanwhile
            folder.parent.mkdir(parents=True, exist_ok=True)
            _acquire(lock, folder, announce)
            part.mkdir()
            return made
        lock.release()
    raise FileNotFoundError("it is removed again and again")


def _acquire(lock: filelock.BaseFileLock, folder: Path, announce: Callable[[str], None]) -> None:
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        announce(f"waiting for another sweep that tokenises the same data ({lock.lock_file})")
        lock.acquire()
    for abandoned in folder.parent.glob(f".{folder.name}.*"):  # by a process that was killed: the lock is ours
        shutil.rmtree(abandoned, ignore_errors=True)

"""Hyperparameter sweeps for LLM-Neo: distilling a large language model into a small one through a LoRA branch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neo_ray.notebook import Findings


def load(path: str | Path) -> Findings:
    """What the sweep at a results folder (or its URL, or a trials.jsonl) found, for a notebook: see `Findings`.

    Raises:
        ValueError: there is no record.
    """
    from neo_ray.notebook import find

    return find(path)

"""Is the merged model the one that was scored? An adapter merged into its base in fp32, written, read back and scored again."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch

from neo_ray import devices, models
from neo_ray.heldout import evaluate
from neo_ray.parts import ModelSource, Sources, load_parts
from neo_ray.quickstart import without_progress_bars
from neo_ray.settings import TrialConfig
from neo_ray.student import Student


def merge(sources: Sources, adapter: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the base with the adapter in its weights: safetensors in `dtype`, config, generation config and tokenizer.

    Merged in fp32 in host memory; only what is written is rounded. Plain transformers loads the folder.
    The base is the plain one, also where the trial had it quantised.

    Raises:
        ConfigError: the base cannot be loaded.
    """
    import peft

    source, where = sources.student, "student.model"
    base = models.load_model(source.path, devices.FP32, "cpu", source.revision, source.trust_remote_code, where)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's way of asking transformers
        merged: Any = peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    own = models.read_config(source.path, source.revision, source.trust_remote_code, where)
    merged.config.use_cache = getattr(own, "use_cache", True)  # a frozen model under training has it off
    devices.prepare_deepspeed()  # transformers imports it to save a model
    with without_progress_bars():
        merged.to(dtype).save_pretrained(folder)
    tokenizer = models.load_tokenizer(source.path, source.revision, source.trust_remote_code, where)
    tokenizer.save_pretrained(folder)


def rescore(folder: Path, sources: Sources, trial: TrialConfig) -> dict[str, float]:
    """Scores of a model folder on both held-out splits, by the trial's evaluation settings, computed in fp32.

    Names as in the trial's record. Without the teacher: there is no KL.
    """
    exact = trial.model_copy(update={"training": trial.training.model_copy(update={"dtype": "fp32"})})
    alone = dataclasses.replace(sources, student=ModelSource(str(folder)), teacher=None)
    parts = load_parts(alone, exact, devices.local_device())
    student = Student(parts.student, parts.device, parts.dtype)
    scores: dict[str, float | None] = {}
    for split in ("select", "report"):
        scores |= evaluate(student.predict, parts, split, trial.evaluation).named(split)
    return {name: value for name, value in scores.items() if value is not None}

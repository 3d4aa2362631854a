"""Which hypotheses does a sweep confirm, refute or leave open? Those of LLM-Neo, in the order of docs/statistics.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from neo_ray.records import TrialRecord
from neo_ray.settings import trial_leaves

REFERENCE = {"method": "neo", "rank": 64, "learning_rate": 2e-4, "kd_ratio": 0.5}
"""Defaults of the LLM-Neo reference code (yang3121099/LLM-Neo), with alpha = 2 × rank."""


@dataclass(frozen=True)
class Question:
    place: int
    """In docs/statistics.md."""
    axis: str
    text: str
    """The hypothesis."""
    needed: str
    """What trials would test it."""


QUESTIONS: dict[str, Question] = {
    "trend": Question(
        1,
        "rank",
        "quality does not fall with rank, each rank at its own best learning rate",
        "three ranks, at three learning rates each",
    ),
    "law": Question(
        2,
        "rank",
        "the best learning rate falls with rank (γ below 0)",
        "three ranks, at five learning rates each",
    ),
    "full": Question(
        3,
        "method",
        "the best learning rate of an adapter is 5 to 20 times that of full training",
        "methods neo and kd (or lora and sft), at five learning rates each",
    ),
    "exchange": Question(
        4,
        "alpha",
        "learning rate and alpha are exchangeable at fixed rank",
        "three alphas at the same rank, at three learning rates each",
    ),
    "ratio": Question(5, "kd_ratio", "the best kd_ratio lies above 0.5", "five values of kd_ratio between 0 and 1"),
    "only teacher": Question(5, "kd_ratio", "kd_ratio 1 is as good as the best", "kd_ratio 1 beside three others"),
    "no teacher": Question(
        5,
        "kd_ratio",
        "a teacher helps: kd_ratio above 0 beats 0",
        "kd_ratio 0 beside others, at three settings that are equal otherwise",
    ),
    "temperature": Question(6, "temperature", "temperature 1 is as good as the best", "temperature 1 beside two others"),
    "one rate": Question(
        7,
        "learning_rate × kd_ratio",
        "one learning rate serves every kd_ratio",
        "three values of kd_ratio, at three learning rates each",
    ),
    "lora": Question(8, "method", "neo beats lora", "methods neo and lora, at three learning rates each"),
    "kd": Question(8, "method", "neo beats kd", "methods neo and kd, at three learning rates each"),
    "sft": Question(8, "method", "neo beats sft", "methods neo and sft, at three learning rates each"),
    "moslora": Question(
        9,
        "variant",
        "moslora is as good as lora within 1 %",
        "variants lora and moslora, at three learning rates each",
    ),
    "defaults": Question(
        10,
        "defaults",
        "the defaults (rank 64, learning rate 2e-4, kd_ratio 0.5) lose less than one run's noise",
        "a confirm phase with the defaults as its reference, and settings with several seeds",
    ),
    "memory": Question(11, "method", "neo takes a quarter less memory than kd", "methods neo and kd in otherwise equal trials"),
    "time": Question(11, "rank", "rank barely moves the time of a token (10 %)", "two ranks, with five trials"),
}


def key_of(place: int | None, hypothesis: str) -> str | None:
    """Of the question that a guideline answers, from its place and its hypothesis, which may go on after the question's words."""
    return next((key for key, asked in QUESTIONS.items() if asked.place == place and hypothesis.startswith(asked.text)), None)


def is_reference(record: TrialRecord) -> bool:
    """Does a trial have the reference's defaults?"""
    for leaf, wanted in REFERENCE.items():
        value: Any = record.config
        for part in trial_leaves()[leaf].split("."):
            value = value.get(part) if isinstance(value, dict) else None
        value = record.params.get(leaf, value)
        if isinstance(wanted, str) or not isinstance(value, int | float):
            if value != wanted:
                return False
        elif not math.isclose(value, float(wanted), rel_tol=1e-3):  # type: ignore[arg-type]
            return False
    return True

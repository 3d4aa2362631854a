"""What does each optimizer step see? The whole course of a trial, known before its first step.

Lengths and label counts of all examples are on disk, so every rank computes the same plan: the loss's denominator is known before
the first micro-batch, evaluation falls on equal token counts whatever the batch size, and a resumed trial needs only its step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from neo_ray.settings import TrainingConfig


@dataclass(frozen=True)
class StepPlan:
    """Steps 0 … S − 1 of a trial."""

    order: np.ndarray
    """Example index of every position in the stream."""
    starts: np.ndarray
    """[S + 1] positions in the stream where steps begin."""
    tokens: np.ndarray
    """[S] training tokens (without padding) up to and including each step."""
    labels: np.ndarray
    """[S] scored positions of each step, over all ranks and micro-batches."""
    rungs: np.ndarray
    """[S] evaluations that are due by the end of each step, ascending to the number of evaluation points."""
    rung_tokens: tuple[float, ...]
    """Nominal token count of each rung: the same for every batch size."""
    batch_size: int
    """Sequences of a step, as asked for: the last step may have fewer, and so may the only one."""

    @property
    def num_steps(self) -> int:
        return len(self.tokens)

    def due(self, step: int) -> int | None:
        """The rung (from 1) to evaluate after this step; several falling on one step count as the last."""
        before = self.rungs[step - 1] if step else 0
        return int(self.rungs[step]) if self.rungs[step] > before else None

    def micro_batches(
        self, step: int, rank: int, world_size: int, micro_batch_size: int, lengths: np.ndarray
    ) -> list[np.ndarray]:
        """This rank's micro-batches of a step; every rank gets equally many, some of them perhaps empty.

        Examples are ordered by length first, so that a micro-batch holds little padding. With accumulation or with more
        workers the micro-batches are the same ones.
        """
        indices = self.order[self.starts[step] : self.starts[step + 1]]
        indices = indices[np.argsort(-lengths[indices], kind="stable")]
        count = accumulation_steps(self.batch_size, world_size, micro_batch_size)
        starts = [(turn * world_size + rank) * micro_batch_size for turn in range(count)]
        return [indices[start : start + micro_batch_size] for start in starts]


def accumulation_steps(batch_size: int, world_size: int, micro_batch_size: int) -> int:
    """Micro-batches of one step on each worker."""
    return math.ceil(batch_size / (world_size * micro_batch_size))


def plan_steps(num_tokens: np.ndarray, num_labels: np.ndarray, training: TrainingConfig, points: int, seed: int) -> StepPlan:
    """Plan a trial over examples of these token and label counts. Every epoch is a new shuffle, drawn from (seed, epoch).

    Args:
        points: evaluations at k/points of the trial's tokens; the last one falls on the last step.
    """
    order = _stream(num_tokens, training, seed)
    stream_tokens, stream_labels = np.cumsum(num_tokens[order]), np.cumsum(num_labels[order])
    ends = np.minimum(np.arange(training.batch_size, len(order) + training.batch_size, training.batch_size), len(order))
    tokens = stream_tokens[ends - 1]
    budget = float(training.tokens or tokens[-1])
    num_steps = int(np.searchsorted(tokens, budget)) + 1 if training.tokens else len(ends)
    ends, tokens = ends[:num_steps], tokens[:num_steps]
    rung_tokens = tuple(budget * k / points for k in range(1, points + 1))
    rungs = np.searchsorted(rung_tokens, tokens, side="right")
    rungs[-1] = points
    labels = np.diff(np.concatenate([[0], stream_labels[ends - 1]]))
    starts = np.concatenate([[0], ends])
    return StepPlan(order[: ends[-1]], starts, tokens, labels, rungs, rung_tokens, training.batch_size)


def _stream(num_tokens: np.ndarray, training: TrainingConfig, seed: int) -> np.ndarray:
    """Example indices in training order, long enough for the trial."""
    size = len(num_tokens)
    if training.steps:
        needed = training.steps * training.batch_size
    elif training.tokens:
        # whole epochs that certainly reach the budget, and one step more
        needed = math.ceil(training.tokens / max(1, int(num_tokens.sum()))) * size + size + training.batch_size
    else:
        assert training.epochs is not None
        needed = max(1, round(training.epochs * size))
    epochs = [np.random.default_rng([seed, epoch]).permutation(size) for epoch in range(math.ceil(needed / size))]
    return np.concatenate(epochs)[:needed]


def learning_rate(training: TrainingConfig, step: int, num_steps: int) -> float:
    """Rate of a step (from 0): linear warm-up from 0, then cosine or linear to 0, or constant, over the trial's full length."""
    warmup = round(training.warmup_ratio * num_steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[training.schedule]
    return training.learning_rate * factor

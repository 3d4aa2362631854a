"""What does a trial compute, and how long does a device take for that? Arithmetic from the models' shapes, before any trial ran.

Per token: 2 FLOP a weight forward, attention over half of the longest example (assumption) on top. Backward is that twice; of the
weights that an adapter leaves frozen once, as they need no gradient, while both operands of attention's products do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neo_ray.config import SweepConfig
from neo_ray.estimate import Reading, tokens_of_split
from neo_ray.memory import BF16, adapter_parameters, compute_bytes
from neo_ray.settings import TrialConfig
from neo_ray.shapes import ModelShape
from neo_ray.supply import Supply

PEAK_TFLOPS = {"T4": 65, "V100": 125, "L4": 121, "A10G": 70, "L40S": 362, "A100": 312, "H100": 989, "H200": 989}
"""Dense, in 16 bits, by the makers' data sheets; by Ray's name of the accelerator's type."""
EFFICIENCY = 0.4
"""Of the peak. Assumption: what training of these sizes reaches; it was not measured here."""


@dataclass(frozen=True)
class Rate:
    flop_per_second: float
    """Of one device."""
    source: str
    """Why that."""


@dataclass(frozen=True)
class Price:
    """FLOP of the trial that computes the most, run to its end over the most tokens, and of what is beside the trials.

    Benchmarks are not in it.
    """

    student: float
    teacher: float
    """In the trial: alive, or its head over stored hidden states."""
    evaluation: float | None
    """None where the size of the data is not known yet."""
    slot: float | None
    """Once in each slot: the untrained student, and a living teacher's pass over held-out text."""
    store: float
    """Once; 0 where one of the same names is whole."""
    rate: Rate | None
    """None where nothing tells how fast the device is."""

    @property
    def trial(self) -> float:
        return self.student + self.teacher + (self.evaluation or 0.0)

    def seconds(self, flop: float) -> float | None:
        """Of one device."""
        return flop / self.rate.flop_per_second if self.rate else None


def price_of(
    config: SweepConfig,
    trials: Sequence[TrialConfig],
    tokens: int,
    teacher: ModelShape | None,
    student: ModelShape,
    supply: Supply,
    reading: Reading | None,
) -> Price:
    """Args:
    trials: the corners of the space.
    tokens: that a trial trains on, at most.
    reading: what the teacher reads for a store, where there is one.
    """
    context, fills = config.data.max_length, reading is not None and not reading.is_there
    costs = [(training_flop(student, trial, context), _teacher_flop(trial, teacher, supply, context)) for trial in trials]
    of_student, of_teacher = max(costs, key=sum)
    select, report = (_evaluated_tokens(config, split) for split in ("select", "report"))
    scoring = forward_flop(student, context) + _scored_against(teacher, supply)
    evaluation = slot = None
    if select is not None and report is not None:
        evaluation = (config.evaluation.points * select + report) * scoring
        alive = forward_flop(teacher, context) if teacher is not None and supply.mode == "live" else 0.0
        slot = select * scoring + (select + report) * alive
    return Price(
        student=tokens * of_student,
        teacher=tokens * of_teacher,
        evaluation=evaluation,
        slot=slot,
        store=reading.num_tokens * _store_flop(teacher, student, supply, context) if fills and reading and teacher else 0.0,
        rate=rate_of(config, trials),
    )


def forward_flop(shape: ModelShape, context: int) -> float:
    """Of a token, in examples of `context` tokens."""
    weights = shape.num_layers * shape.layer_parameters + shape.vocab_size * shape.hidden_size
    return 2 * weights + _attention_flop(shape, context)


def _attention_flop(shape: ModelShape, context: int) -> float:
    """Of a token, forward: scores and their sums of values, over half of the context."""
    return 2 * shape.num_layers * shape.num_heads * shape.head_dim * context


def training_flop(shape: ModelShape, trial: TrialConfig, context: int) -> float:
    """Of a token, forward and backward."""
    forward = forward_flop(shape, context)
    again = forward - 2 * shape.vocab_size * shape.hidden_size if trial.training.gradient_checkpointing else 0
    if not trial.has_adapter:
        return 3 * forward + again
    return 2 * forward + _attention_flop(shape, context) + again + 6 * adapter_parameters(shape, trial.lora)


def _teacher_flop(trial: TrialConfig, teacher: ModelShape | None, supply: Supply, context: int) -> float:
    if teacher is None or not trial.has_teacher:
        return 0.0
    if supply.mode == "live":
        return forward_flop(teacher, context)
    return 2 * teacher.vocab_size * teacher.hidden_size if supply.mode == "hidden" else 0.0


def _store_flop(teacher: ModelShape, student: ModelShape, supply: Supply, context: int) -> float:
    """Of a token; a projection is the teacher's probabilities times the student's head."""
    projected = 2 * student.vocab_size * student.hidden_size if supply.mode == "projection" else 0
    return forward_flop(teacher, context) + projected


def _scored_against(teacher: ModelShape | None, supply: Supply) -> float:
    """Of a held-out token: the teacher's head over its hidden states, which are kept, in a slot or a store."""
    has_states = teacher is not None and supply.mode in ("live", "hidden")
    return 2 * teacher.vocab_size * teacher.hidden_size if has_states and teacher else 0.0


def _evaluated_tokens(config: SweepConfig, split: str) -> int | None:
    """That are scored each time."""
    found = tokens_of_split(config, split)
    return None if found is None else min(found[0], config.evaluation.max_tokens or found[0])


def rate_of(config: SweepConfig, trials: Sequence[TrialConfig]) -> Rate | None:
    """As the file has it, or by the accelerator's name where all trials compute in 16 bits."""
    resources = config.resources
    if resources.tflops is not None:
        return Rate(resources.tflops * 1e12, f"at {resources.tflops:g} TFLOP/s (resources.tflops)")
    peak = PEAK_TFLOPS.get(resources.accelerator_type or "")
    if peak is None or not resources.gpus_per_worker or any(compute_bytes(config, trial) != BF16 for trial in trials):
        return None
    source = f"at {EFFICIENCY:.0%} (an assumption) of the {peak} TFLOP/s of {resources.accelerator_type}"
    return Rate(EFFICIENCY * peak * 1e12, source)

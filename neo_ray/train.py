"""How is one trial trained? Set-up, the loop, the finish, top to bottom. Runs without Ray: `report` is any function.

Shapes: B sequences of a micro-batch, L tokens, V vocabulary, N scored positions.
"""

from __future__ import annotations

import errno
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn

from neo_ray import adapters, alignment, benchmarks, checkpoints, devices, harness, models, placement, scaling, scores
from neo_ray.batches import StepPlan, accumulation_steps, learning_rate, plan_steps
from neo_ray.data import Split, collate
from neo_ray.heldout import evaluate
from neo_ray.losses import IGNORED
from neo_ray.memory import reduce_bucket_elements
from neo_ray.parts import ASKED, Parts, rank_and_world_size, sum_over_ranks
from neo_ray.records import Stop
from neo_ray.searching import BENCHMARKS
from neo_ray.settings import TrialConfig
from neo_ray.student import Student
from neo_ray.supply import BIAS
from neo_ray.teaching import Taught, teach

LINEAR = torch.nn.functional.linear
"""PyTorch's own. ZeRO-3 puts another in its place for good, which keeps more for the backward pass of any later trial."""

MEANS = ("train_loss", "train_ce", "train_kd", "train_alignment")
"""A row's means over the scored positions since the last evaluation."""

Row = dict[str, Any]
Report = Callable[[Row], None]


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. A failure is data, not an exception."""

    state: Literal["COMPLETE", "PRUNED", "FAILED", "INTERRUPTED"]
    cause: str | None = None
    error: str | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    """Report-split scores of a complete trial."""
    details: dict[str, Any] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)
    """tokens, steps, seconds, accelerator_seconds, peak_memory_bytes"""


def train(
    trial: TrialConfig,
    parts: Parts,
    report: Report,
    should_stop: Callable[[], Stop] = lambda: Stop.NO,
    folder: Path | None = None,
) -> Outcome:
    """Train one trial from its last checkpoint, or from the start.

    Args:
        trial: everything that determines the result, with `parts`.
        report: called on rank 0 with a row for every evaluation; rows from before an interruption are reported again.
        should_stop: asked on rank 0 between optimizer steps and between batches of benchmarks; all ranks stop together.
        folder: where the trial's checkpoints and its adapter go; None keeps nothing. The last checkpoint stays there: the caller
            removes it once the outcome is on disk.

    Returns:
        COMPLETE, PRUNED or INTERRUPTED (stopped) or FAILED (diverged). Anything else raises.
    """
    started, (rank, world_size) = time.monotonic(), rank_and_world_size()
    devices.reset_peak_memory(parts.device)
    asked_before = Counter(parts.asked)
    _check_packing(parts, trial)
    baseline = _baseline(parts, trial)
    outcome: Outcome | None = None
    before, begun = time.monotonic(), Student(parts.student, parts.device, parts.dtype)
    try:
        if untrained := benchmarks.of_untrained(begun, parts, trial, folder, should_stop):
            baseline = baseline | untrained.named()
    except harness.Stopped as told:
        outcome = _stopped(told.stop)
    started += time.monotonic() - before  # asked for all trials, and no cost of this one
    split = parts.data.split("train")
    plan = plan_steps(split.num_tokens, split.num_labels, trial.training, trial.evaluation.points, trial.seed)
    base, stage = adapters.attach(parts.student, trial), trial.deepspeed.zero_stage
    student = Student(base, parts.device, parts.dtype, stage, alignment.make_projections(trial, parts))
    parameters = adapters.trained_parameters(student.model)
    trained = parameters | student.projection_parameters()
    if trial.training.gradient_checkpointing:
        cast(Any, student.model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = build_engine(student, trained, trial, world_size)

    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "peak_memory_bytes": 0, "curve": [], "window": [0.0] * 5}
    state |= dict.fromkeys(ASKED, 0)
    checkpoint_folder = folder / "checkpoint" if folder is not None else None
    resumed = checkpoints.latest(checkpoint_folder) if checkpoint_folder is not None else None
    if resumed is not None:
        state |= checkpoints.load_state(resumed)
        if engine.fp16_scale is not None:
            engine.fp16_scale = scaling.LossScale(**state["fp16_scale"])
        checkpoints.restore(engine, trained, checkpoints.load_tensors(resumed), state["step"] - _skipped(engine))
    if sum_over_ranks(torch.tensor(state["step"], device=parts.device)).item() != world_size * state["step"]:
        raise OSError(errno.ESTALE, f"another worker of this trial has another checkpoint than that of step {state['step']}")
    if resumed is None and engine.fp16_scale is not None:  # a checkpoint may come before the first step that is not skipped
        checkpoints.create_moments(engine, 0)
    details = {
        "baseline": baseline,
        "device": devices.describe(parts.device),
        "dtype": str(parts.dtype).removeprefix("torch."),
        "workers": world_size,
        "micro_batch_size": trial.training.micro_batch(world_size),
        "trained_parameters": sum(getattr(p, "ds_numel", p.numel()) for p in parameters.values()),
        "targets": parts.targets.recipe.mode if parts.targets is not None else "live" if parts.has_teacher else None,
        **_bias(parts),
        "resumed_from_step": state["step"],
        "setup_seconds": time.monotonic() - started,
    }

    def totals() -> dict[str, Any]:
        seconds = state["seconds"] + time.monotonic() - started
        peak = max(state["peak_memory_bytes"], devices.peak_memory_bytes(parts.device))
        return {
            "tokens": int(plan.tokens[step - 1]) if step else 0,
            "steps": step,
            "seconds": seconds,
            "accelerator_seconds": seconds * world_size,
            "peak_memory_bytes": peak,
        }

    def asked() -> dict[str, int]:
        """Over all ranks and all attempts, but for the steps that were lost with a worker."""
        here = [parts.asked[name] - asked_before[name] for name in ASKED]
        sums = sum_over_ranks(torch.tensor(here, dtype=torch.int64, device=parts.device)).tolist()
        return {name: state[name] + int(number) for name, number in zip(ASKED, sums, strict=True)}

    def keep(folder: Path) -> None:
        scale = {} if engine.fp16_scale is None else {"fp16_scale": engine.fp16_scale.state()}
        _save(engine, trained, folder, state | {"step": step, "window": window.tolist()} | scale | _clock(totals()) | asked())

    def is_owed(row: Row) -> bool:
        """Is a row still to get its benchmarks? It is reported only then."""
        at_rungs = parts.sources.suite is not None and trial.evaluation.suite_at == "rungs"
        return at_rungs and row["step"] < plan.num_steps and BENCHMARKS not in row

    def ask(row: Row) -> Outcome | None:
        """Benchmarks into a row; how the trial ends where it was told to stop meanwhile."""
        try:
            found = benchmarks.of_student(student, parts, trial, should_stop)
        except harness.Stopped as told:
            return _stopped(told.stop)
        if found is not None:
            row.update(found.named())
            details.update(scores.facts(found))
        return None

    step = state["step"]
    if outcome is None and state["curve"] and is_owed(state["curve"][-1]):  # it was stopped while it was asked
        outcome = ask(state["curve"][-1])
    if rank == 0:
        for row in state["curve"]:
            if not is_owed(row):
                report(row)

    window = torch.tensor(state["window"], dtype=torch.float64)  # the four sums and their count since the last evaluation
    student.train()
    while step < plan.num_steps and outcome is None:
        rate = learning_rate(trial.training, step, plan.num_steps)
        sums = optimizer_step(engine, trial, parts, split, plan, step, rate)
        flags = torch.tensor([*sums, float(should_stop() if rank == 0 else 0)], dtype=torch.float64, device=parts.device)
        total, *terms, stopped = sum_over_ranks(flags).tolist()
        window += torch.tensor([total, *terms, plan.labels[step]], dtype=torch.float64)
        due = plan.due(step)
        step += 1
        if not torch.isfinite(torch.tensor(total)):
            where = f"step {step} of {plan.num_steps} (learning rate {rate:.3g})"
            outcome = Outcome("FAILED", "diverged", f"loss is {total} at {where}")
        elif engine.fp16_scale is not None and engine.fp16_scale.hopeless:
            outcome = Outcome("FAILED", "diverged", f"gradients overflow at every loss scale at step {step} of {plan.num_steps}")
        elif due is not None and stopped != Stop.PRUNED:
            held_out = evaluate(student.predict, parts, "select", trial.evaluation).named("select")
            student.train()
            means = (window[:4] / window[4]).tolist()
            window.zero_()
            row = {"rung": due, "rung_tokens": plan.rung_tokens[due - 1], "step": step, "learning_rate": rate}
            means[2] = means[2] if _is_taught(trial) else None  # without a teacher in the loss there is no such number
            means[3] = means[3] if trial.is_aligned else None
            row |= dict(zip(MEANS, means, strict=True)) | held_out | _worst(totals(), parts)
            row["tokens"] = int(plan.tokens[step - 1])
            if is_owed(row):
                outcome = ask(row)
            state["curve"].append(row)
            if checkpoint_folder is not None and step < plan.num_steps:
                keep(checkpoint_folder)
            if rank == 0 and outcome is None:
                report(row)
            if outcome is None and not math.isfinite(held_out["select_ce"] or 0.0):
                where = f"step {step} of {plan.num_steps}"
                outcome = Outcome("FAILED", "diverged", f"held-out loss is {held_out['select_ce']} at {where}")
        if outcome is None and stopped and step < plan.num_steps:
            outcome = _stopped(stopped)
            if stopped == Stop.INTERRUPTED and checkpoint_folder is not None and due is None:
                keep(checkpoint_folder)

    if outcome is None:
        if trial.evaluation.suite is not None and checkpoint_folder is not None:
            keep(checkpoint_folder)  # benchmarks may take long: a worker that is lost then loses nothing of the training
        metrics = evaluate(student.predict, parts, "report", trial.evaluation).named("report")
        try:
            benchmark = benchmarks.of_student(student, parts, trial, lambda: _interrupted(should_stop()))
        except harness.Stopped as told:
            outcome = _stopped(told.stop)
        else:
            weights = checkpoints.gather(engine, parameters)
            if rank == 0 and folder is not None and trial.has_adapter:
                adapters.save_adapter(student.model, weights, folder / "adapter")
            if benchmark is not None:
                metrics |= benchmark.named()
                details |= scores.facts(benchmark)
                if rank == 0 and folder is not None:
                    scores.save(benchmark, folder)
            outcome = Outcome("COMPLETE", metrics=metrics)
    if engine.fp16_scale is not None:
        details |= {"skipped_steps": _skipped(engine), "loss_scale": engine.fp16_scale.value}
    final, details = _worst(totals(), parts), details | asked()
    engine.destroy()
    torch.nn.functional.linear = LINEAR
    if trial.training.gradient_checkpointing:
        cast(Any, student.model).gradient_checkpointing_disable()
    adapters.detach(student.model)
    devices.free_memory(parts.device)
    return Outcome(outcome.state, outcome.cause, outcome.error, outcome.metrics, details, final)


def _stopped(told: float) -> Outcome:
    return Outcome("PRUNED" if told == Stop.PRUNED else "INTERRUPTED")


def _interrupted(told: Stop) -> Stop:
    """What of it counts once all steps are done: such a trial is complete, whatever the scheduler says by then."""
    return told if told == Stop.INTERRUPTED else Stop.NO


def build_engine(student: Student, parameters: dict[str, nn.Parameter], trial: TrialConfig, world_size: int) -> Any:
    """A DeepSpeed engine around the student. Precision is ours (autocast over fp32 weights), so that none is cast in place."""
    devices.prepare_deepspeed()
    import deepspeed

    torch.nn.functional.linear = LINEAR  # a trial that failed has left ZeRO-3's
    training, swap = trial.training, placement.swap_folder(trial.deepspeed)
    optimizer = torch.optim.AdamW(
        adapters.parameter_groups(parameters, trial.lora.plus_ratio),
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        weight_decay=training.weight_decay,
        fused=True if trial.deepspeed.offload_optimizer != "none" else None,  # on a CPU as quick as DeepSpeed's own
    )
    extra, micro = trial.deepspeed.extra, training.micro_batch(world_size)
    config = {
        **extra,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation_steps(training.batch_size, world_size, micro),
        "gradient_clipping": training.max_grad_norm,
        "zero_optimization": {
            # DeepSpeed allocates this bucket whole in every backward pass: 2 GB by its default, for adapters of a few MB
            "reduce_bucket_size": reduce_bucket_elements(sum(p.numel() for p in parameters.values())),
            **(extra.get("zero_optimization") or {}),
            **placement.offload_sections(trial.deepspeed, student, swap.name if swap else None),
            "stage": trial.deepspeed.zero_stage,
        },
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    trained = list(parameters.values())
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, model_parameters=trained, config=config)
    engine.swap_folder, engine.fp16_scale = swap, scaling.LossScale() if student.dtype == devices.FP16 else None
    return engine


def optimizer_step(
    engine: Any, trial: TrialConfig, parts: Parts, split: Split, plan: StepPlan, step: int, rate: float
) -> tuple[float, ...]:
    """All micro-batches of one step on this rank, then the update. Returns this rank's sums: loss, CE, KD, alignment.

    The loss is (1 − kd_ratio)·CE + kd_ratio·KD + alignment_weight·alignment: LLM-Neo's (see `neo_loss`) and, as an extra term,
    that of `alignment.alignment_sum`, which LLM-Neo itself does not have.
    """
    rank, world_size = rank_and_world_size()
    devices.seed_step(trial.seed, step, rank)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
    sums = torch.zeros(4, dtype=torch.float64, device=parts.device)
    pairs = alignment.layer_pairs(trial, parts)
    training, micro = trial.training, trial.training.micro_batch(world_size)
    # DeepSpeed averages over ranks: undo that. The denominator counts every micro-batch of every rank.
    share = world_size / max(1, int(plan.labels[step]))
    factor = share if engine.fp16_scale is None else share * engine.fp16_scale.value
    batches = plan.micro_batches(step, rank, world_size, micro, split.num_tokens)
    teacher = parts.teacher if _is_taught(trial) else None
    with ExitStack() as held:
        for head in (engine.module.frozen_head(), placement.head_of(teacher)) if len(batches) > 1 else ():
            held.enter_context(placement.in_full(head))
        for number, indices in enumerate(batches, 1):
            empty = len(indices) == 0  # this rank has no share of a last, partial batch: it takes part with a loss of 0
            indices = plan.order[:1] if empty else indices
            examples = split.examples(indices)
            batch = collate(examples, parts.sources.pad_id, parts.device, training.padding_side, training.packing)
            labels_BL = torch.full_like(batch.labels_BL, IGNORED) if empty else batch.labels_BL
            given = (batch.input_ids_BL, batch.attention_mask_BL, batch.position_ids_BL)
            output, projected = engine(*given, labels_BL) if pairs else (engine(*given), ())
            taught = Taught()
            if _is_taught(trial) or pairs:
                taught = teach(parts, "train", indices, batch, labels_BL, [layer for _, layer in pairs])
            with placement.in_full(placement.head_of(teacher)):
                said = taught if _is_taught(trial) else Taught()
                loss = engine.module.loss(output, labels_BL, said, trial, parts.vocabulary, factor)
            total, apart = loss.total, torch.zeros_like(loss.ce)
            if pairs:
                apart = alignment.alignment_sum(projected, taught.states, trial.distill)
                total = total + trial.distill.alignment_weight * apart
            scaling.backward(engine, total * share, engine.fp16_scale)
            sums += torch.stack([total.detach(), loss.ce, loss.kd, apart.detach()]).double()
            if number == len(batches):
                held.close()  # the update cuts all weights, and needs the room itself
            scaling.step(engine, engine.fp16_scale)
    return tuple(sums.tolist())


def _skipped(engine: Any) -> int:
    """Steps so far whose gradients overflowed in fp16: the weights are as they were before."""
    return engine.fp16_scale.skipped_steps if engine.fp16_scale is not None else 0


def _bias(parts: Parts) -> dict[str, str]:
    """What a record says of targets that are not exact."""
    if parts.targets is None or parts.targets.recipe.mode != "topk":
        return {}
    return {"targets_biased": BIAS.replace("k tokens", f"{parts.targets.recipe.top_k} tokens")}


def _is_taught(trial: TrialConfig) -> bool:
    """Does the teacher's distribution take part in the loss?"""
    return trial.has_teacher and trial.distill.kd_ratio > 0


def _check_packing(parts: Parts, trial: TrialConfig) -> None:
    """Once a worker and model: can it tell packed sequences apart? Raises ConfigError."""
    for where, model in (("student.model", parts.student), ("teacher.model", parts.teacher if trial.has_teacher else None)):
        if trial.training.packing and model is not None and ("packing", where) not in parts.measured:
            models.prove_packing(model, where)
            parts.measured["packing", where] = True


def _baseline(parts: Parts, trial: TrialConfig) -> dict[str, float | None]:
    """The untrained student's scores on the select split, measured once a worker: the same for every trial."""
    key = ("baseline", trial.evaluation)
    if key not in parts.measured:
        student = Student(parts.student, parts.device, parts.dtype)
        parts.measured[key] = evaluate(student.predict, parts, "select", trial.evaluation).named("select")
    return parts.measured[key]


def _save(engine: Any, parameters: dict[str, nn.Parameter], folder: Path, state: dict[str, Any]) -> None:
    tensors = checkpoints.gather(engine, parameters) | checkpoints.gather_moments(engine, parameters)
    if rank_and_world_size()[0] == 0:
        checkpoints.save(folder, tensors, state)
    if dist.is_initialized():
        dist.barrier()


def _worst(totals: dict[str, Any], parts: Parts) -> dict[str, Any]:
    """The largest worker's memory and the slowest worker's clock stand for the trial."""
    names = ("seconds", "accelerator_seconds", "peak_memory_bytes")
    values = torch.tensor([float(totals[n]) for n in names], dtype=torch.float64, device=parts.device)
    if rank_and_world_size()[1] > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    seconds, accelerator_seconds, peak = values.tolist()
    return {**totals, "seconds": seconds, "accelerator_seconds": accelerator_seconds, "peak_memory_bytes": int(peak)}


def _clock(totals: dict[str, Any]) -> dict[str, Any]:
    return {"seconds": totals["seconds"], "peak_memory_bytes": totals["peak_memory_bytes"]}

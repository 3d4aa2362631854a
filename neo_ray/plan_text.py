"""How does a person read a plan?"""

from __future__ import annotations

from pathlib import Path

from neo_ray.budget import amount
from neo_ray.config import SweepConfig
from neo_ray.estimate import SUITE_TOKENS
from neo_ray.memory import adapter_parameters
from neo_ray.phases import Phase
from neo_ray.plan import Plan, ends, size_text, time_text
from neo_ray.searching import SchedulerConfig
from neo_ray.shapes import ModelShape
from neo_ray.storage import free_bytes, scratch_folder
from neo_ray.supply import bytes_of_row
from neo_ray.trials import MODELLING, fixed_settings


def render(plan: Plan) -> str:
    """The plan as a person reads it."""
    config = plan.config
    noun = "trial" if plan.num_trials == 1 else "trials"
    rows: list[tuple[str, list[str]]] = [
        ("teacher", [_model(config.teacher.model, plan.teacher) if config.teacher else "none"]),
        ("student", [_student(plan)]),
        ("data", [_data(config)]),
        ("method", [_method(plan)]),
        ("fixed", fixed_settings(config, plan.space) or ["all other settings have their defaults"]),
        ("space", plan.space.describe() or ["one setting"]),
        *_phases(plan),
        ("objectives", _objectives(config)),
        ("at once", [plan.concurrency]),
        ("tokens", [_tokens_text(plan), *_price(plan)]),
        ("time", _computing(plan)),
        ("budget", _budget(config)),
        ("targets", _targets(plan)),
        ("memory", _memory(plan)),
        ("suite", _suite(plan)),
        ("writes", list(plan.writes)),
        ("downloads", list(plan.downloads) or ["nothing"]),
    ]
    lines = [f"{config.name}: {plan.num_trials} {noun}", ""]
    for label, texts in rows:
        lines += [f"  {label if i == 0 else '':<10} {text}" for i, text in enumerate(texts)]
    trusted = [side for side in ("teacher", "student") if getattr(getattr(config, side), "trust_remote_code", False)]
    alarms = [
        f"!! {side}.trust_remote_code is on: Python code that ships with the model will run on every worker" for side in trusted
    ]
    notices = [f"   note: {warning}" for warning in plan.warnings]
    return "\n".join([*lines, *([""] if alarms or notices else []), *alarms, *notices])


def _model(name: str, shape: ModelShape | None) -> str:
    if shape is None:
        return f"{name}, size not known from here"
    about = "" if shape.source == "config.json" else "about "
    return f"{name}, {about}{shape.num_parameters / 1e6:,.0f} M parameters, {shape.num_layers} layers × {shape.hidden_size}"


def _student(plan: Plan) -> str:
    prune, shape = plan.config.student.prune, plan.student
    if prune is None:
        return _model(str(plan.config.student.model), shape)
    kept = f"{len(prune.layers)} given" if prune.layers is not None else f"{prune.keep} greedily chosen"
    return _model(f"the teacher with {kept} of its layers", shape)


def _data(config: SweepConfig) -> str:
    data = config.data
    subset = f" ({data.subset})" if data.subset else ""
    limits = [f"at most {data.limit:,} examples"] if data.limit else []
    limits += [f"at most {data.train_limit:,} to train on"] if data.train_limit else []
    splits = f"{data.select_fraction:.0%} to rank trials, {data.report_fraction:.0%} for the final table"
    return "; ".join([f"{data.source}{subset}, examples of up to {data.max_length:,} tokens", *limits, splits])


def _method(plan: Plan) -> str:
    methods, shape = plan.space.reach("method"), plan.student
    if shape is None:
        return ", ".join(methods)
    counts = []
    for method in methods:
        trials = [plan.space.trial_config({"method": method, "rank": rank}, plan.largest) for rank in ends(plan.space, "rank")]
        sizes = [adapter_parameters(shape, t.lora) if t.has_adapter else shape.num_parameters for t in trials]
        counts.append(f"{method} trains {' to '.join(f'{n / 1e6:,.1f}' for n in dict.fromkeys(sizes))} M parameters")
    return "; ".join(counts)


def _phases(plan: Plan) -> list[tuple[str, list[str]]]:
    """What runs, and what is stopped early; phase by phase where there are several."""
    (first, *_), points = plan.phases, plan.config.evaluation.points
    if first.name is None:
        trials = f"{plan.num_trials}, {_sampler(first)}"
        return [("trials", [trials]), ("scheduler", [_scheduler(first.config.scheduler, points)])]
    return [("phases", [line for phase in plan.phases for line in _phase(plan, phase)])]


def _phase(plan: Plan, phase: Phase) -> list[str]:
    """A phase with its trials, what they cost at most, and its own budget."""
    tokens, most = plan.tokens_of(phase.most()), "at most " if phase.confirm else ""
    price = (f"; at most {tokens:,} tokens" if tokens is not None else "") + _time(plan, phase.most())
    scheduler = _scheduler(phase.config.scheduler, plan.config.evaluation.points)
    budget = "".join(f"; budget: {text}" for text in _budget(phase.config))
    return [f"{phase.name}: {most}{phase.most()} trials, {_sampler(phase)}", f"  {scheduler}{price}{budget}"]


def _sampler(phase: Phase) -> str:
    sampler, seeds = phase.config.sampler, ", ".join(map(str, phase.seeds))
    if phase.confirm is not None:
        return f"the {phase.confirm.top} best settings and the reference with each of the seeds {seeds}"
    if seeds:
        return f"{phase.most() // len(phase.seeds)} settings with each of the seeds {seeds}"
    if sampler.name == "grid":
        return "every combination once" + (
            f" with each of the seeds {', '.join(map(str, sampler.seeds))}" if sampler.seeds else ""
        )
    if phase.before:
        return f"proposed by {sampler.name}, which begins with the trials of {' and '.join(phase.before)}"
    start = f" after {min(sampler.startup_trials, phase.most())} random ones" if sampler.name in MODELLING else ""
    return f"proposed by {sampler.name}{start}"


def _scheduler(scheduler: SchedulerConfig, points: int) -> str:
    if scheduler.name == "none":
        return "none: every trial runs to its end"
    rungs = [f"{rung / points:.0%}" for rung in scheduler.rungs(points)]
    kept = f"about 1 in {scheduler.reduction_factor:g} goes on"
    if scheduler.name == "median":
        kept = "the better half goes on"
    elif scheduler.name == "hyperband":
        kept = f"{kept} or, in later brackets, all go on"
    return f"{scheduler.name}: {kept} at {', '.join(rungs) or 'no rung before the end'}{' of its tokens' if rungs else ''}"


def _tokens_text(plan: Plan) -> str:
    points = plan.config.evaluation.points
    if plan.tokens_per_trial is None:
        return f"a trial's tokens are known once the data is prepared; {points} evaluations at equal distances"
    low, high = plan.tokens_per_trial
    words = "" if plan.tokens_are == "exact" else f"{plan.tokens_are} "
    if low == high or plan.tokens_are == "at most":
        marks = ", ".join(f"{high * k / points:,.0f}" for k in range(1, points + 1))
        return f"{words}{high:,} a trial, evaluated at {marks}"
    return f"{words}{low:,} to {high:,} a trial, {points} evaluations at equal distances"


def _price(plan: Plan) -> list[str]:
    if plan.tokens_of_all is None:
        return []
    text, known, seconds = f"at most {plan.tokens_of_all:,} in all trials", plan.seconds_of_trial, plan.seconds_of_all
    if seconds is None:
        return [f"{text}; their time is known once the first have finished"]
    store = " with the store" if known is None and plan.price and plan.price.store else ""
    source = f"as the {known[1]} trials so far took" if known else "by arithmetic"
    return [f"{text}; about {time_text(seconds)} of one device{store}, {source}"]


def _computing(plan: Plan) -> list[str]:
    """What a trial computes; and how long that takes, while no trial has told."""
    price = plan.price
    if price is None:
        return []
    parts = [f"student {flop_text(price.student)}"]
    if price.teacher:
        alive = "alive" if plan.supply.mode == "live" else "its head alone"
        parts.append(f"teacher ({alive}) {flop_text(price.teacher)}")
    seen = "not known before the data is prepared" if price.evaluation is None else flop_text(price.evaluation)
    text = f"the trial that computes most: about {flop_text(price.trial)}, of which {', '.join(parts)}, evaluation {seen}"
    held_out = ", teacher's held-out text" if plan.supply.mode == "live" and plan.teacher else ""
    beside = [f"{flop_text(price.slot)} once a slot (untrained student{held_out})"] if price.slot else []
    unless = ", unless it is there" if plan.reading and plan.reading.bytes_there else ""
    beside += [f"{flop_text(price.store)} for the store, once{unless}"] if price.store else []
    lines = [text, *([f"beside the trials: {'; '.join(beside)}"] if beside else [])]
    if plan.seconds_of_trial is not None:
        return lines
    if price.rate is None:
        return [*lines, "how long that takes is measured on the first trials; resources.tflops says it before"]
    once = f", and {time_text(price.seconds(price.store) or 0.0)} for the store" if price.store else ""
    return [*lines, f"about {time_text(price.seconds(price.trial) or 0.0)} of one device a trial{once}, {price.rate.source}"]


def _time(plan: Plan, num_trials: int) -> str:
    """Of so many trials on one device after another."""
    seconds = plan.seconds_a_trial
    return f"; about {time_text(num_trials * seconds)} of one device" if seconds is not None else ""


def _objectives(config: SweepConfig) -> list[str]:
    """Where there are several."""
    named = [f"{'highest' if objective.mode == 'max' else 'lowest'} {objective.metric}" for objective in config.objective.all]
    return [f"{', '.join(named)}; the first ranks"] if len(named) > 1 else []


def _budget(config: SweepConfig) -> list[str]:
    limits = {name: value for name, value in config.budget if value is not None}
    return [", ".join(f"{name.replace('_', ' ')} {amount(value)}" for name, value in limits.items())] if limits else []


def _targets(plan: Plan) -> list[str]:
    """How the teacher's word comes to the trials, and what a store of it takes."""
    supply = plan.supply
    if supply.mode == "live":
        return [f"the teacher runs in every trial: {supply.why}"]
    row = bytes_of_row(supply, plan.teacher, plan.student)
    size = f", {row:,} bytes a labelled token" if row else ""
    return [f"the teacher runs once for all trials ({supply.mode}{size}): {supply.why}", _reading(plan), *_copies(plan.config)]


def _reading(plan: Plan) -> str:
    reading = plan.reading
    if reading is None:
        return "how much it reads is known once the data is prepared"
    text = f"it reads {reading.are} {reading.num_tokens:,} tokens"
    if reading.num_bytes is not None:
        text += f"; {reading.are} {size_text(reading.num_bytes)} if all of them are scored"
    if reading.bytes_there:
        text += f", of which {size_text(reading.bytes_there)} may be there"
    if reading.seconds is not None:
        text += f"; about {time_text(reading.seconds)} at the {reading.tokens_per_second:,.0f} tokens/s of its last store"
    return text


def _copies(config: SweepConfig) -> list[str]:
    """Where a store in an object store takes room beside that."""
    if isinstance(config.targets_folder, Path):
        return []
    scratch = config.storage.scratch
    if config.resources.address is not None:
        return [f"each node keeps a copy of it in {scratch or 'its folder for temporary files'} (storage.scratch)"]
    folder = scratch_folder(scratch)
    return [f"a copy of it is kept in {folder} (storage.scratch), where {size_text(free_bytes(folder))} are free"]


def _memory(plan: Plan) -> list[str]:
    if not plan.memory_bytes:
        return ["not known: the size of a model is not known from here"]
    trial = plan.largest
    values = {"method": trial.method, "rank": trial.lora.rank, "micro_batch_size": trial.training.micro_batch_size}
    if not trial.has_adapter:
        del values["rank"]
    setting = ", ".join(f"{name} {value}" for name, value in values.items())
    rows = [f"  {size_text(size):>8}  {name}" for name, size in plan.memory_bytes.items() if size]
    return [f"about {size_text(plan.total_memory_bytes)} a worker in the largest trial ({setting})", *rows]


def _suite(plan: Plan) -> list[str]:
    """Which benchmarks are asked when, what that takes; nothing without any."""
    settings, known = plan.config.evaluation, plan.suite_seconds
    if settings.suite is None:
        return []
    some = "all items" if settings.suite_limit is None else f"the first {settings.suite_limit:,} items"
    times = {
        "end": "at the end of each complete trial",
        "rungs": f"the same ones at each of the {settings.points} evaluations of a trial",
        "confirm": "at the end of the trials of confirm alone",
    }
    time = f"about {time_text(known[0])} each time, as with the {known[1]} trials so far" if known else "their time is known then"
    room = ""
    if plan.suite_bytes:
        how = f"{settings.batch_size} sequences of {SUITE_TOKENS} tokens"
        room = f"; about {size_text(plan.suite_bytes)} a worker beside the models for {how}, and not while it trains"
    return [
        f"{settings.suite}: {some} of each task, {times[settings.suite_at]}, and once of the untrained student",
        f"{time}{room}",
    ]


def flop_text(flop: float) -> str:
    """`5.2 PFLOP`, `310 TFLOP`."""
    for name, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flop >= size:
            return f"{flop / size:,.3g} {name}"
    return f"{flop / 1e9:,.3g} GFLOP"

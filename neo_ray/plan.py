"""What will this sweep do, and does it fit? All that can be said before anything heavy is imported, as data."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neo_ray import estimate
from neo_ray.assets import ASSETS, is_quickstart
from neo_ray.cautions import cautions
from neo_ray.config import SweepConfig
from neo_ray.estimate import Certainty, Reading, reading_of, tokens_of_split
from neo_ray.memory import CHUNK_BYTES, RUNTIME_BYTES, compute_bytes, memory_per_worker
from neo_ray.phases import Phase, phases_of
from neo_ray.price import Price, price_of
from neo_ray.settings import TrainingConfig, TrialConfig
from neo_ray.shapes import ModelShape, cached_snapshot, model_shapes
from neo_ray.space import LENGTHS, Space, build_space
from neo_ray.supply import Supply, choose

HUB_BYTES_PER_PARAMETER = 2  # published weights are bf16 or fp16 as a rule


@dataclass(frozen=True)
class TrainSplit:
    """What is known of prepared data."""

    num_examples: int
    num_tokens: int


@dataclass(frozen=True)
class Plan:
    config: SweepConfig
    space: Space
    phases: tuple[Phase, ...]
    num_trials: int
    """At most, in all phases."""
    teacher: ModelShape | None
    student: ModelShape | None
    tokens_per_trial: tuple[int, int] | None
    """Training tokens of the shortest and the longest trial; None where the data's size is not known yet."""
    tokens_are: Certainty
    seconds_of_trial: tuple[float, int] | None
    """Mean seconds × devices of so many trials that this sweep has completed; None before the first."""
    memory_bytes: dict[str, int]
    """Of one worker of the largest trial; empty where the shape of a model is not known."""
    largest: TrialConfig
    """The trial that needs the most memory."""
    least_memory_bytes: int
    """What that trial's worker cannot do with less than: where `micro_batch_size` is `auto`, with one sequence at a time."""
    supply: Supply
    reading: Reading | None
    """Of the teacher, for a store; None where there is none, or the size of the data is not known yet."""
    concurrency: str
    writes: tuple[str, ...]
    downloads: tuple[str, ...]
    warnings: tuple[str, ...]
    suite_seconds: tuple[float, int] | None = None
    """Mean seconds of asking benchmarks at the end of so many trials of this sweep; None before the first."""
    suite_bytes: int | None = None
    """Of a worker that asks them, beside the models; None without a suite, or where the student's shape is not known."""
    price: Price | None = None
    """What a trial computes; None where the shape of a model or the size of the data is not known."""

    @property
    def seconds_a_trial(self) -> float | None:
        """× devices: as the trials so far took, else by arithmetic, of the one that computes the most."""
        if self.seconds_of_trial is not None:
            return self.seconds_of_trial[0]
        return self.price.seconds(self.price.trial) if self.price else None

    @property
    def seconds_of_all(self) -> float | None:
        """Of all trials; by arithmetic with the store, where it is not there yet."""
        if self.seconds_a_trial is None:
            return None
        store = self.price.seconds(self.price.store) if self.price and self.seconds_of_trial is None else None
        return self.num_trials * self.seconds_a_trial + (store or 0.0)

    @property
    def tokens_of_all(self) -> int | None:
        """At most, what all trials together train on."""
        return self.tokens_of(self.num_trials)

    def tokens_of(self, num_trials: int) -> int | None:
        """At most, what so many trials train on."""
        return None if self.tokens_per_trial is None else num_trials * self.tokens_per_trial[1]

    @property
    def builder_bytes(self) -> int:
        """Of a worker that fills the store: teacher, student for its head and that in fp32, a few tensors of a chunk."""
        if self.supply.mode == "live" or self.teacher is None or self.student is None:
            return 0
        size, on_gpu = compute_bytes(self.config, self.largest), self.config.resources.gpus_per_worker > 0
        models = size * (self.teacher.num_parameters + self.student.num_parameters)
        head = 4 * self.student.vocab_size * self.student.hidden_size
        chunk = CHUNK_BYTES["cuda" if on_gpu else "cpu"]
        return models + head + 6 * chunk + RUNTIME_BYTES["gpu" if on_gpu else "cpu"]

    @property
    def total_memory_bytes(self) -> int:
        return sum(self.memory_bytes.values())


def make_plan(
    config: SweepConfig,
    prepared: TrainSplit | None = None,
    overrides: Sequence[str] = (),
    supply: Supply | None = None,
) -> Plan:
    """The plan of a sweep; `supply` where the models are known better. Raises ConfigError where its space is not sound."""
    space = build_space(config)
    teacher, student = model_shapes(config)
    supply = supply or choose(config, space)
    trials = _corners(config, space)
    largest, memory, least = _largest_trial(config, trials, teacher, student, supply)
    tokens, certainty = _tokens(config, space, prepared)
    phases, reading = phases_of(config), reading_of(config, supply, teacher, student, memory.get("teacher", 0))
    num_trials = sum(phase.most() for phase in phases)
    at_most = None if tokens is None else num_trials * tokens[1]
    return Plan(
        config=config,
        space=space,
        phases=phases,
        num_trials=num_trials,
        teacher=teacher,
        student=student,
        tokens_per_trial=tokens,
        tokens_are=certainty,
        seconds_of_trial=estimate.seconds_of_trial(config),
        memory_bytes=memory,
        largest=largest,
        least_memory_bytes=least,
        supply=supply,
        reading=reading,
        concurrency=_concurrency(config),
        writes=tuple(_writes(config)),
        downloads=tuple(_downloads(config, teacher, student)),
        warnings=(*cautions(config, space, overrides), *_not_fitting(config, memory), *estimate.notes(config, reading, at_most)),
        suite_seconds=estimate.seconds_of_suite(config),
        suite_bytes=estimate.suite_bytes(config, largest, student) if config.evaluation.suite and student else None,
        price=price_of(config, trials, tokens[1], teacher, student, supply, reading) if tokens and student and memory else None,
    )


def tokens_per_trial(config: SweepConfig, trial: TrialConfig, prepared: TrainSplit | None) -> tuple[int, int] | None:
    """Fewest and most training tokens of a trial; None where the size of the data is not known.

    Without prepared data an example has between 1 token and `data.max_length`, and a local file a token in four bytes.
    """
    training = trial.training
    if training.tokens is not None:
        return training.tokens, training.tokens
    if training.steps is not None:
        examples = training.steps * training.batch_size
        if prepared is None:
            return examples, examples * config.data.max_length
        tokens = round(examples * prepared.num_tokens / prepared.num_examples)
        return tokens, tokens
    known = prepared.num_tokens if prepared else _estimated_tokens(config)
    if known is None:
        return None
    tokens = round(float(training.epochs or 1) * known)
    return tokens, tokens


def _tokens(config: SweepConfig, space: Space, prepared: TrainSplit | None) -> tuple[tuple[int, int] | None, Certainty]:
    """Over all trials of the space."""
    trials = _trials_with_lengths(config, space)
    spans = [tokens_per_trial(config, trial, prepared) for trial in trials]
    certainty: Certainty = "exact"
    if any(trial.training.tokens is None for trial in trials):
        certainty = "at most" if prepared is None and any(trial.training.steps for trial in trials) else "about"
    known = [span for span in spans if span is not None]
    if len(known) < len(spans):
        return None, certainty
    return (min(low for low, _ in known), max(high for _, high in known)), certainty


def _trials_with_lengths(config: SweepConfig, space: Space) -> list[TrialConfig]:
    """Trials with the shortest and the longest length and the smallest and the largest batch."""
    names: list[str | None] = [name for name in LENGTHS if space.setters(name)]
    if not names or all(axis.when for name in names for axis in space.setters(str(name))):
        names.append(None)  # where no length axis is active, the file's own length counts
    batches, trials = ends(space, "batch_size"), []
    for name in names:
        for length in ends(space, name) if name else [None]:
            params = {name: length} if name and length is not None else {}
            trials += [space.trial_config({**params, "batch_size": batch}, config.trial) for batch in batches]
    return trials


def ends(space: Space, name: str) -> list[int | float]:
    """The smallest and the largest that a numeric leaf can be."""
    values = [value for value in space.reach(name) if value is not None]
    return sorted({min(values), max(values)}) if values else []


def _estimated_tokens(config: SweepConfig) -> int | None:
    """Tokens of one epoch, where the source is here."""
    found = tokens_of_split(config, "train") if estimate.local_files(config) else None
    return found[0] if found else None


def _corners(config: SweepConfig, space: Space) -> list[TrialConfig]:
    """Trials of which one needs the most memory, and one computes the most. Ignores which values go together."""
    alternatives = (
        "method",
        "target_modules",
        "variant",
        "divergence",
        "alignment_layers",
        "dtype",
        "gradient_checkpointing",
        "zero_stage",
        "offload_optimizer",
        "offload_parameters",
        "micro_batch_size",  # may be `auto`
    )
    options = {name: space.reach(name) for name in alternatives if space.setters(name)}
    growing = ("rank", "batch_size", "kd_ratio", "alignment_weight", "packing")
    options |= {name: [max(space.reach(name))] for name in growing if space.setters(name)}
    corners = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    return [space.trial_config(corner, config.trial) for corner in corners]


def _largest_trial(
    config: SweepConfig, trials: list[TrialConfig], teacher: ModelShape | None, student: ModelShape | None, supply: Supply
) -> tuple[TrialConfig, dict[str, int], int]:
    """Of these the one that needs the most memory, and what it needs: as set, and at least."""
    if student is None or (config.teacher is not None and teacher is None):
        return config.trial, {}, 0
    needs = [_needs(config, trial, teacher, student, supply) for trial in trials]
    largest = max(range(len(trials)), key=lambda i: sum(needs[i].values()))
    smaller = [trial.model_copy(update={"training": _one_at_a_time(trial.training)}) for trial in trials]
    least = max(sum(_needs(config, trial, teacher, student, supply).values()) for trial in smaller)
    return trials[largest], needs[largest], least


def _one_at_a_time(training: TrainingConfig) -> TrainingConfig:
    return training.model_copy(update={"micro_batch_size": 1}) if training.micro_batch_size == "auto" else training


def _needs(
    config: SweepConfig, trial: TrialConfig, teacher: ModelShape | None, student: ModelShape, supply: Supply
) -> dict[str, int]:
    """A worker's bytes; of a teacher that a store speaks for it has the head at most."""
    if teacher is None or supply.mode == "live":
        return memory_per_worker(config, trial, teacher, student)
    head = teacher.vocab_size * teacher.hidden_size * compute_bytes(config, trial) if supply.mode == "hidden" else 0
    return memory_per_worker(config, trial, None, student) | {"teacher": head}


def _runs_here(config: SweepConfig) -> bool:
    """On the CPUs of this machine, as opposed to a cluster or GPUs that only connecting can tell."""
    return config.resources.address is None and config.resources.gpus_per_worker == 0


def _trials_by_cores(config: SweepConfig) -> int:
    """Trials that this machine's cores let run at the same time."""
    resources = config.resources
    fit = int((os.cpu_count() or 1) / (resources.workers_per_trial * resources.cpus_per_worker))
    return fit if resources.concurrency == "auto" else min(fit, resources.concurrency)


def _concurrency(config: SweepConfig) -> str:
    wanted = config.resources.concurrency
    if _runs_here(config):
        return f"decided after connecting; at most {_trials_by_cores(config)} on the {os.cpu_count()} cores of this machine"
    return f"decided after connecting; {'as many as there is room for' if wanted == 'auto' else f'at most {wanted}'}"


def _not_fitting(config: SweepConfig, memory: dict[str, int]) -> list[str]:
    """This machine's cores and memory against the trials, where the sweep runs here."""
    if not _runs_here(config):
        return []
    resources, at_once, total = config.resources, _trials_by_cores(config), _machine_memory_bytes()
    needed = sum(memory.values()) * resources.workers_per_trial
    found = []
    if at_once < 1:
        wanted = f"{resources.workers_per_trial * resources.cpus_per_worker:g} cores (workers_per_trial × cpus_per_worker)"
        found.append(f"a trial takes {wanted}, and this machine has {os.cpu_count()}")
    if total is not None and needed > total:
        found.append(f"a trial needs about {size_text(needed)} of memory, and this machine has {size_text(total)}")
    elif total is not None and needed * at_once > total:
        found.append(
            f"{at_once} trials at once need about {size_text(needed * at_once)} of memory, and this machine has "
            f"{size_text(total)}; set resources.concurrency to {int(total / needed)}"
        )
    return found


def _machine_memory_bytes() -> int | None:
    """Installed, or what the container may take, if less."""
    try:
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
    try:
        return min(installed, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return installed


def _writes(config: SweepConfig) -> list[str]:
    known = config.folder if isinstance(config.results, Path) else config.results / "sweep.yaml"
    state = "exists: the sweep is continued" if known.exists() else "new"
    cache = f"{config.cache}: tokenised data{', the pruned student' if config.student.prune else ''}, downloads"
    return [f"{config.results} ({state}): resolved config, journal, trials, study, checkpoints, report, best.yaml", cache]


def _downloads(config: SweepConfig, teacher: ModelShape | None, student: ModelShape | None) -> list[str]:
    """What is not on this machine yet, with its size where that is known."""
    found: dict[str, str] = {}
    models = [(config.teacher.model, config.teacher.revision, teacher)] if config.teacher else []
    models += [(config.student.model, config.student.revision, student)] if config.student.model else []
    for name, revision, shape in models:
        if not _is_here(name) and cached_snapshot(name, revision) is None:
            size = f"about {size_text(shape.num_parameters * HUB_BYTES_PER_PARAMETER)}" if shape else "size unknown"
            found[name] = f"{name} from the hub ({size})"
    if not _is_here(config.data.source):
        found[config.data.source] = f"{config.data.source} from the hub, unless cached (size unknown)"
    return [*_quickstart_downloads(config), *found.values()]


def _quickstart_downloads(config: SweepConfig) -> list[str]:
    names = [config.data.source, config.teacher.model if config.teacher else "", config.student.model or ""]
    if not any(is_quickstart(name) for name in names):
        return []

    wheels = {}
    for asset in (ASSETS[name] for name in names if name in ASSETS):
        if not (config.cache / "quickstart" / f"{asset.wheel.project}-{asset.wheel.version}").exists():
            wheels[asset.wheel.requirement] = asset.wheel.size_bytes
    return [f"{wheel} from the package index ({size_text(size)})" for wheel, size in wheels.items()]


def _is_here(name: str) -> bool:
    """A path, or what the quickstart brings."""
    return is_quickstart(name) or name.startswith(("/", "./", "../", "~")) or Path(name).exists()


def size_text(num_bytes: float) -> str:
    """`1.8 GB`, `403 MB`."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB" if num_bytes >= 1e6 else "< 1 MB"


def time_text(seconds: float) -> str:
    """`3.2 h`, `12 min`."""
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:,.0f} min" if seconds >= 60 else "< 1 min"

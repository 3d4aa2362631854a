"""What does a sweep file say? One typed, frozen tree.

Neither torch nor ray is imported here, so that every mistake in a file is reported in a fraction of a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Method = Literal["sft", "lora", "kd", "neo"]


class ConfigError(ValueError):
    """A mistake of the user's: names the YAML path, the value and what is allowed. Exit code 2."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _switch_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts true as 1; `rank: true` is a mistake all the same."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation not in (bool, Any):
            raise ValueError("must not be true or false")
        return value


class TeacherConfig(Section):
    model: str
    """Hub name, local folder, or `quickstart:smollm2-135m-instruct`."""
    revision: str | None = None
    """Hub revision; pin it for a sweep that others repeat."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off unless you read that code."""


class PruneConfig(Section):
    layers: tuple[int, ...] | None = None
    """The teacher's layers to keep, ascending, counted from 0."""
    keep: int | None = Field(None, ge=1)
    """How many layers to keep; which ones is found by greedy removal on training text."""
    calibration_tokens: int = Field(1024, ge=16)
    """Training tokens on which the greedy removal measures the loss."""

    @model_validator(mode="after")
    def _one_of(self) -> PruneConfig:
        if (self.layers is None) == (self.keep is None):
            raise ValueError("give exactly one of `layers` and `keep`")
        layers = list(self.layers or ())
        if self.layers is not None and (not layers or layers != sorted(set(layers)) or layers[0] < 0):
            raise ValueError("`layers` must be ascending, distinct, not negative, and at least one")
        return self


class StudentConfig(Section):
    model: str | None = None
    """Hub name or local folder."""
    prune: PruneConfig | None = None
    """Make the student from the teacher by dropping layers."""
    revision: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_of(self) -> StudentConfig:
        if (self.model is None) == (self.prune is None):
            raise ValueError("give exactly one of `model` and `prune`")
        return self


class DataConfig(Section):
    source: str
    """A JSONL, Parquet, CSV or text file, a folder of them, a hub name, or `quickstart:owt`."""
    subset: str | None = None
    """Hub configuration name (`0625` of Infinity-Instruct)."""
    split: str = "train"
    """Hub split that the three splits are cut from."""
    format: Literal["auto", "text", "instruction", "chat"] = "auto"
    """`auto` looks at the columns: `messages` or `conversations`; `instruction` + `response`; `text`."""
    columns: dict[str, str] = {}
    """Role → column name where the names differ, e.g. `{text: body}`; roles: text, messages, instruction, input, response."""
    max_length: int = Field(2048, ge=2)
    """Tokens an example is truncated to."""
    limit: int | None = Field(None, ge=1)
    """Use at most this many examples of the source (chosen by hash, so stable under reordering)."""
    train_limit: int | None = Field(None, ge=1)
    """At most this many training examples (a small-data regime); the other splits keep theirs."""
    select_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the examples on which trials are ranked."""
    report_fraction: float = Field(0.05, gt=0, lt=1)
    """Share that no ranking touches: for the confirm phase and the final table."""

    @model_validator(mode="after")
    def _room_for_training(self) -> DataConfig:
        if self.select_fraction + self.report_fraction >= 1:
            raise ValueError("select_fraction + report_fraction leave nothing to train on")
        return self


class LoraConfig(Section):
    rank: int = Field(64, ge=1)
    """Rank of the low-rank branch."""
    alpha: float = Field(128, gt=0)
    """The branch is scaled by alpha / rank (rsLoRA: alpha / √rank)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """Adapter variant, through peft."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear` (without the head), `attention`, `mlp`, or module names."""

    @field_validator("target_modules")
    @classmethod
    def _some(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one module")
        return value


class DistillConfig(Section):
    kd_ratio: float = Field(0.5, ge=0, le=1)
    """Weight of the distillation term; 1 − kd_ratio weighs the cross-entropy on the labels."""
    temperature: float = Field(1.0, gt=0)
    """Softens both distributions; the term is scaled by its square, in value and gradient."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """Distance between teacher and student; LLM-Neo uses forward KL."""


class TrainingConfig(Section):
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate of AdamW."""
    batch_size: int = Field(8, ge=1)
    """Sequences of one optimizer step, over all workers and micro-batches."""
    micro_batch_size: int = Field(1, ge=1)
    """Sequences of one forward pass on one worker; accumulation follows from it and never changes the result."""
    epochs: float | None = Field(None, gt=0)
    """Length of a trial. Exactly one of epochs, tokens, steps; 1 epoch when none is given."""
    tokens: int | None = Field(None, ge=1)
    """Length of a trial in training tokens (not counting padding)."""
    steps: int | None = Field(None, ge=1)
    """Length of a trial in optimizer steps."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate over the full length of the trial, also where a scheduler stops it early."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the steps over which the rate rises linearly from 0."""
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the global gradient norm; 0 switches it off."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 where the device computes it natively, otherwise fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        given = [n for n in ("epochs", "tokens", "steps") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of epochs, tokens, steps, not {' and '.join(given)} (null unsets one)")
        if not given:
            object.__setattr__(self, "epochs", 1.0)
        return self


class DeepSpeedConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO shards: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    extra: dict[str, Any] = {}
    """Any other DeepSpeed setting, passed through; keys that neo_ray sets itself are refused."""

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, extra: dict[str, Any]) -> dict[str, Any]:
        ours = {
            "train_batch_size": "training.batch_size",
            "train_micro_batch_size_per_gpu": "training.micro_batch_size",
            "gradient_accumulation_steps": "training.micro_batch_size",
            "gradient_clipping": "training.max_grad_norm",
            "bf16": "training.dtype",
            "fp16": "training.dtype",
            "optimizer": "training.learning_rate",
            "scheduler": "training.schedule",
        }
        for key in extra:
            if key in ours:
                raise ValueError(f"`{key}` is set by neo_ray; use `{ours[key]}`")
        zero = extra.get("zero_optimization") or {}
        if not isinstance(zero, dict) or "stage" in zero:
            raise ValueError("`zero_optimization` must be a mapping, without `stage`: use `deepspeed.zero_stage`")
        return extra


class SamplerConfig(Section):
    name: Literal["tpe", "random", "qmc", "grid"] = "tpe"
    """How settings are proposed; `grid` runs every combination once and needs finite axes."""
    num_trials: int | None = Field(None, ge=1)
    """Number of trials; for `grid` at most this many of the combinations (null: all)."""
    startup_trials: int = Field(8, ge=1)
    """Random trials before TPE begins to model."""
    seeds: tuple[int, ...] = ()
    """Repeat every setting with each of these seeds (grid only)."""


class SchedulerConfig(Section):
    name: Literal["asha", "none"] = "asha"
    """`asha` stops the worse trials early; `none` runs all to the end (what laws are fitted on)."""
    grace: float = Field(0.25, gt=0, le=1)
    """Share of a trial's tokens before which none is stopped."""
    reduction_factor: float = Field(3, gt=1)
    """At each rung about 1 / reduction_factor of the trials go on."""


class ResourcesConfig(Section):
    address: str | None = None
    """Ray address (`auto`, `ray://…`); null starts Ray on this machine."""
    workers_per_trial: int = Field(1, ge=1)
    """Data-parallel workers of one trial."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of a worker; a fraction packs several trials on a GPU (one worker a trial then)."""
    cpus_per_worker: float = Field(1, gt=0)
    concurrency: int | Literal["auto"] = "auto"
    """Trials at the same time; `auto` fills the cluster."""
    max_failures: int = Field(2, ge=0)
    """How often a trial whose worker died is put back, from its last checkpoint."""

    @field_validator("concurrency")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1, or auto")
        return value

    @model_validator(mode="after")
    def _whole_gpus(self) -> ResourcesConfig:
        gpus = self.gpus_per_worker
        if gpus != int(gpus) and self.workers_per_trial > 1:
            raise ValueError(
                f"a fraction of a GPU (gpus_per_worker: {gpus}) takes one worker a trial, "
                f"not {self.workers_per_trial}: workers of one trial must sit on different devices"
            )
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(f"gpus_per_worker: {gpus} must be a whole number or below 1")
        return self


class ObjectiveConfig(Section):
    metric: Literal["select_ce", "select_bits_per_byte", "select_kl"] = "select_ce"
    """What trials are ranked by, on the select split. Never the training loss: kd_ratio and temperature change that."""
    mode: Literal["min", "max"] = "min"


class EvaluationConfig(Section):
    points: int = Field(4, ge=1)
    """Evaluations of a trial, at equal token counts; they are the scheduler's rungs."""
    max_tokens: int | None = Field(None, ge=1)
    """Evaluate on at most this many tokens of each split (whole examples, in a fixed order)."""
    batch_size: int = Field(4, ge=1)


class StorageConfig(Section):
    path: str = "results"
    """Results go to `<path>/<name>`; on a cluster a folder that all nodes see."""
    cache: str = "~/.cache/neo_ray"
    """Tokenised data, pruned students, downloads; shared by sweeps. On a cluster a folder that all nodes see."""


class Axis(Section):
    """One axis of the search space. Exactly one of the kinds; `of` + `times` or `plus` derive a value from another axis."""

    grid: tuple[Any, ...] | None = None
    choice: tuple[Any, ...] | None = None
    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    int_uniform: tuple[int, int] | None = None
    quantised: tuple[float, float, float] | None = None
    """[low, high, step]"""
    of: str | None = None
    times: float = 1.0
    plus: float = 0.0
    value: Any = None
    """A fixed value."""
    when: dict[str, Any] | None = None
    """The axis exists only where other axes have these values (one, or a list of them)."""

    @model_validator(mode="before")
    @classmethod
    def _bare_value(cls, raw: Any) -> Any:
        return raw if isinstance(raw, (dict, Axis)) else {"value": raw}

    @model_validator(mode="after")
    def _one_kind(self) -> Axis:
        kinds = [k for k in AXIS_KINDS if k in self.model_fields_set]
        if len(kinds) != 1:
            raise ValueError(f"give exactly one of {', '.join(AXIS_KINDS)}, not {kinds or 'none'}")
        kind, value = kinds[0], getattr(self, kinds[0])
        if value is None and kind != "value":
            raise ValueError(f"`{kind}` is empty")
        if kind in ("grid", "choice") and not value:
            raise ValueError(f"`{kind}` is empty")
        if kind in ("uniform", "log_uniform", "int_uniform", "quantised"):
            low, high = value[0], value[1]
            if low > high:
                raise ValueError(f"`{kind}` has low {low} > high {high}")
            if kind == "log_uniform" and low <= 0:
                raise ValueError(f"`log_uniform` takes the logarithm of its bounds, and {low} has none")
            if kind == "quantised" and value[2] <= 0:
                raise ValueError(f"`quantised` has step {value[2]}, which must be above 0")
        if kind != "of" and {"times", "plus"} & self.model_fields_set:
            raise ValueError("`times` and `plus` go with `of`")
        return self

    @property
    def kind(self) -> str:
        return next(k for k in AXIS_KINDS if k in self.model_fields_set)


AXIS_KINDS = ("grid", "choice", "uniform", "log_uniform", "int_uniform", "quantised", "of", "value")


class TrialConfig(Section):
    """Everything that determines one trial, on given models and data. Any leaf of it can be an axis."""

    method: Method = "neo"
    """`sft` and `kd` train all parameters, `lora` and `neo` an adapter; `kd` and `neo` have a teacher."""
    lora: LoraConfig = LoraConfig()
    distill: DistillConfig = DistillConfig()
    training: TrainingConfig = TrainingConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = Field(0, ge=0)

    @property
    def has_adapter(self) -> bool:
        return self.method in ("lora", "neo")

    @property
    def has_teacher(self) -> bool:
        return self.method in ("kd", "neo")


class SweepConfig(TrialConfig):
    """A whole sweep file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the results folder."""
    teacher: TeacherConfig | None = None
    student: StudentConfig
    data: DataConfig
    search: dict[str, Axis] = {}
    """Axis name → axis. A name is a leaf of the trial config (`rank`) or its path (`lora.rank`)."""
    sampler: SamplerConfig = SamplerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    resources: ResourcesConfig = ResourcesConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    storage: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> SweepConfig:
        if self.student.prune is not None and self.teacher is None:
            raise ValueError("student.prune drops layers of the teacher, and there is no `teacher` section")
        if self.has_teacher and self.teacher is None:
            raise ValueError(f"method: {self.method} needs a `teacher` section (without one: lora, sft)")
        if self.objective.metric == "select_kl" and self.teacher is None:
            raise ValueError("objective.metric: select_kl is measured against a teacher, and there is no `teacher` section")
        return self

    @property
    def trial(self) -> TrialConfig:
        """The trial's part, before any axis is applied."""
        return TrialConfig.model_validate({n: getattr(self, n) for n in TrialConfig.model_fields})

    @property
    def folder(self) -> Path:
        return Path(self.storage.path).expanduser() / self.name

    @property
    def cache(self) -> Path:
        return Path(self.storage.cache).expanduser()


def trial_leaves() -> dict[str, str]:
    """Leaf name → path in `TrialConfig` (`rank` → `lora.rank`); evaluation settings are not axes."""
    leaves: dict[str, str] = {}
    for name, field in TrialConfig.model_fields.items():
        section = field.annotation
        if name == "evaluation":
            continue
        if isinstance(section, type) and issubclass(section, Section):
            leaves.update({leaf: f"{name}.{leaf}" for leaf in section.model_fields if leaf != "extra"})
        else:
            leaves[name] = name
    return leaves

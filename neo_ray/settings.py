"""What determines one trial, on given models and data? Method, adapter, loss, training, DeepSpeed, evaluation."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from neo_ray.mistakes import guess

Method = Literal["sft", "lora", "kd", "neo"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl", "total_variation"]
Layer = Annotated[int, Field(strict=True)]


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

    @property
    def not_default(self) -> set[str]:
        """The fields with another value than the default. A resolved file states all, so that to be given tells nothing."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}


class LoraConfig(Section):
    rank: int = Field(64, ge=1)
    """Rank of the low-rank branch."""
    alpha: float = Field(128, gt=0)
    """The branch is scaled by alpha / rank (rsLoRA: alpha / √rank)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    variant: Literal["lora", "rslora", "dora", "pissa", "olora", "moslora"] = "lora"
    """Adapter variant. Every adapter is saved as one that plain peft loads: PiSSA and OLoRA with twice the rank."""
    plus_ratio: float = Field(1.0, gt=0)
    """LoRA+: the learning rate of B is this many times that of A; 1 is plain LoRA."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear` (without the head), `attention`, `mlp`, or module names."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, strict=True)]] = {}
    """Layers with another rank: end of the layer's name, or an expression for it, → rank. The first that matches counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, strict=True)]] = {}
    """Layers with another alpha, in the same way."""
    modules_to_save: tuple[str, ...] = ()
    """Layers that are trained and saved whole, instead of an adapter on them, e.g. `lm_head`, `embed_tokens`, `norm`."""

    @field_validator("target_modules")
    @classmethod
    def _some(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one module")
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _expressions(cls, patterns: dict[str, Any]) -> dict[str, Any]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns

    @staticmethod
    def pattern_of(layer: str, patterns: dict[str, Any]) -> str | None:
        """The pattern that counts for a layer: peft's rule."""
        return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", layer)), None)

    def rank_of(self, layer: str) -> int:
        """The rank of the branch on a layer, given by its full name."""
        return self.rank_pattern.get(self.pattern_of(layer, self.rank_pattern) or "", self.rank)


def is_named(layer: str, names: tuple[str, ...]) -> bool:
    """Is a layer, given by its full name, meant by one of the names? By its last parts, as peft has it."""
    return any(layer == name or layer.endswith(f".{name}") for name in names)


class DistillConfig(Section):
    kd_ratio: float = Field(0.5, ge=0, le=1)
    """Weight of the distillation term; 1 − kd_ratio weighs the cross-entropy on the labels."""
    temperature: float = Field(1.0, gt=0)
    """Softens both distributions; the term is scaled by its square, in value and gradient (total variation: by itself)."""
    divergence: Divergence = "forward_kl"
    """Distance between teacher and student; LLM-Neo uses forward KL."""
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of `jsd`, and of KL(teacher ‖ mixture); near 0 it acts like forward KL."""
    skew: float = Field(0.1, ge=0, lt=1)
    """How much of its own first argument `skew_kl` and `skew_reverse_kl` mix into the second; 0 is plain KL."""
    head_mass: float = Field(0.5, gt=0, lt=1)
    """`adaptive_kl`: the teacher's likeliest tokens up to this mass are the head, where forward KL has its weight."""
    alignment_weight: float = Field(0.0, ge=0)
    """Weight of the distance between hidden states, added to the other two terms; 0 leaves it out."""
    alignment_loss: Literal["mse", "cosine"] = "mse"
    """That distance: mean squared error, or one minus the cosine."""
    alignment_layers: tuple[tuple[Layer, Layer], ...] = ((-1, -1),)
    """Pairs [student layer, teacher layer], counted from 0, or from −1 backwards; a last layer is taken after the final norm."""

    @field_validator("alignment_layers")
    @classmethod
    def _some_pair(cls, value: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        if not value:
            raise ValueError("must name at least one pair [student layer, teacher layer]; alignment_weight: 0 switches it off")
        return value

    def layer_pairs(self, student_layers: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
        """`alignment_layers` for models of so many layers, all counted from 0.

        Raises:
            ConfigError: a layer that a model does not have, or a pair that stands twice.
        """
        counts, pairs = {"student": student_layers, "teacher": teacher_layers}, []
        for pair in self.alignment_layers:
            for layer, (side, count) in zip(pair, counts.items(), strict=True):
                if not -count <= layer < count:
                    raise ConfigError(
                        f"distill.alignment_layers: {list(pair)} names layer {layer} of a {side} that has {count}; "
                        f"allowed: 0 to {count - 1}, or -1 to -{count} from the last one backwards"
                    )
            pairs.append((pair[0] % student_layers, pair[1] % teacher_layers))
            if pairs.count(pairs[-1]) > 1:
                raise ConfigError(f"distill.alignment_layers: the pair {list(pairs[-1])} stands twice")
        return tuple(pairs)


class TrainingConfig(Section):
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate of AdamW."""
    batch_size: int = Field(8, ge=1)
    """Sequences of one optimizer step, over all workers and micro-batches."""
    micro_batch_size: int | Literal["auto"] = 1
    """Sequences of one forward pass on one worker; accumulation follows from it and never changes the result.

    `auto`: a worker's share of the batch. Where memory runs out, this one and a number are halved until they fit."""
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
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """`auto`: bf16 where the device computes it natively, otherwise fp32. `fp16`: for GPUs without bf16; the loss is scaled."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each label spread over the vocabulary in the training cross-entropy; the held-out one has none."""
    packing: bool = False
    """Lay the sequences of a micro-batch end to end in one row, without padding; each sees itself only."""
    padding_side: Literal["right", "left"] = "right"
    """Where the shorter sequences of a micro-batch are filled up; packed ones are not."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile_loss: bool = True
    """On a GPU: compile the loss, once a worker. Where that fails, a line in the log says so and it is taken uncompiled."""

    @field_validator("micro_batch_size")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1, or auto")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        given = [n for n in ("epochs", "tokens", "steps") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of epochs, tokens, steps, not {' and '.join(given)} (null unsets one)")
        if not given:
            object.__setattr__(self, "epochs", 1.0)
        return self

    def micro_batch(self, num_workers: int) -> int:
        """Sequences of one forward pass: as asked, at most a worker's share of the batch, which is what `auto` means."""
        share = math.ceil(self.batch_size / num_workers)
        return share if self.micro_batch_size == "auto" else min(self.micro_batch_size, share)


DEEPSPEED_OURS = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "gradient_clipping": "training.max_grad_norm",
    "bf16": "training.dtype",
    "fp16": "training.dtype",
    "torch_autocast": "training.dtype",
    "zero_force_ds_cpu_optimizer": "deepspeed.offload_optimizer",
    "optimizer": "training.learning_rate",
    "scheduler": "training.schedule",
}
"""DeepSpeed's key → the setting of a sweep that it would contradict."""
DEEPSPEED_PASSED = (
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "aio",
    "activation_checkpointing",
    "checkpoint",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
)
"""Settings of DeepSpeed that change no result; it takes a misspelled key without a word."""


class DeepSpeedConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO shards: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where AdamW's state and step are: on the device (none), in host memory (ZeRO 1 to 3), on a local disk (ZeRO 3)."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where ZeRO 3 keeps the student's weights while their layer is not at work; frozen ones too."""
    nvme_path: str | None = None
    """For `nvme`: a folder on a local disk of every node. Each worker makes its own in it, and takes it away."""
    extra: dict[str, Any] = {}
    """Any other DeepSpeed setting, passed through; keys that neo_ray sets itself are refused."""

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for key in extra:
            if key in DEEPSPEED_OURS:
                raise ValueError(f"`{key}` is set by neo_ray; use `{DEEPSPEED_OURS[key]}`")
            if key not in DEEPSPEED_PASSED:
                hint, allowed = guess(key, DEEPSPEED_PASSED), ", ".join(DEEPSPEED_PASSED)
                raise ValueError(f"`{key}` is no setting that is passed through{hint}; allowed: {allowed}")
        zero = extra.get("zero_optimization") or {}
        if not isinstance(zero, dict) or "stage" in zero:
            raise ValueError("`zero_optimization` must be a mapping, without `stage`: use `deepspeed.zero_stage`")
        for key, ours in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
            options = zero.get(key) or {}
            if not isinstance(options, dict) or {"device", "nvme_path"} & options.keys():
                raise ValueError(f"`{key}` must be a mapping, without `device` and `nvme_path`: use `deepspeed.{ours}`")
        return extra


class EvaluationConfig(Section):
    points: int = Field(4, ge=1)
    """Evaluations of a trial, at equal token counts; they are the scheduler's rungs."""
    max_tokens: int | None = Field(None, ge=1)
    """Evaluate on at most this many tokens of each split (whole examples, in a fixed order)."""
    batch_size: int = Field(4, ge=1)
    suite: str | None = None
    """Benchmarks of the LM Evaluation Harness: `quickstart`, `neo10`, a YAML file, or a folder with `suite.yaml` and tasks."""
    suite_at: Literal["end", "rungs", "confirm"] = "end"
    """When the suite is asked: at the end of a complete trial; at each evaluation, too; or at the end of trials of the phase
    `confirm` alone."""
    suite_limit: int | None = Field(None, ge=1)
    """Items of each task, the same first ones whenever the suite is asked; all where it is null."""

    @model_validator(mode="after")
    def _of_a_suite(self) -> EvaluationConfig:
        given = [name for name in ("suite_at", "suite_limit") if name in self.not_default]
        if given and self.suite is None:
            raise ValueError(f"{given[0]} is given, and there is no suite")
        return self


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

    @property
    def is_aligned(self) -> bool:
        """Are hidden states compared?"""
        return self.has_teacher and self.distill.alignment_weight > 0


def trial_leaves() -> dict[str, str]:
    """Leaf name → path in `TrialConfig` (`rank` → `lora.rank`); evaluation settings and mappings are not axes."""
    leaves: dict[str, str] = {}
    for name, field in TrialConfig.model_fields.items():
        section = field.annotation
        if name == "evaluation":
            continue
        if isinstance(section, type) and issubclass(section, Section):
            fields = {leaf: f.annotation for leaf, f in section.model_fields.items()}
            leaves.update({leaf: f"{name}.{leaf}" for leaf, kind in fields.items() if get_origin(kind) is not dict})
        else:
            leaves[name] = name
    return leaves

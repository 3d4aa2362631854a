"""What determines one trial, on given models and data? Method, adapter, loss, training, DeepSpeed, evaluation."""

from __future__ import annotations

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


class EvaluationConfig(Section):
    points: int = Field(4, ge=1)
    """Evaluations of a trial, at equal token counts; they are the scheduler's rungs."""
    max_tokens: int | None = Field(None, ge=1)
    """Evaluate on at most this many tokens of each split (whole examples, in a fixed order)."""
    batch_size: int = Field(4, ge=1)


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

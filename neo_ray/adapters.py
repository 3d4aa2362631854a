"""What is trained? The low-rank branch on a frozen student, put on for a trial and taken off after it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from neo_ray.mistakes import guess
from neo_ray.records import write_atomically
from neo_ray.settings import ConfigError, LoraConfig, TrialConfig


def scaling(lora: LoraConfig) -> float:
    """Effective factor of the branch: alpha / rank; rsLoRA (arXiv 2312.03732): alpha / √rank."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.variant == "rslora" else lora.rank)


def attach(base: nn.Module, trial: TrialConfig) -> nn.Module:
    """The model to train: the base with a fresh branch (lora, neo), or the base itself with gradients on (sft, kd).

    The branch is drawn from the trial's seed. Trained weights are fp32 whatever the base's dtype.
    """
    if not trial.has_adapter:
        base.requires_grad_(True)
        return base
    import peft

    torch.manual_seed(trial.seed)
    lora = trial.lora
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it: a float is right
        lora_dropout=lora.dropout,
        target_modules=target_modules(base, lora.target_modules),
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(base, settings)  # type: ignore[arg-type]


def detach(model: nn.Module) -> nn.Module:
    """Take the branch off again; the base's weights are the very tensors they were."""
    import peft

    base = model.unload() if isinstance(model, peft.PeftModel) else model
    base.requires_grad_(False)
    for parameter in base.parameters():
        parameter.grad = None
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


def target_modules(base: nn.Module, wanted: str | tuple[str, ...]) -> str | list[str]:
    """peft's words for `all-linear`, `attention`, `mlp` or names. Raises ConfigError for a name that matches nothing."""
    if wanted == "all-linear":
        return "all-linear"  # peft leaves the output head alone
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    if wanted in ("attention", "mlp"):
        part = "attn" if wanted == "attention" else "mlp"
        suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear if part in name})
        if suffixes:
            return suffixes
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    for name in names:
        if not any(module == name or module.endswith(f".{name}") for module in linear):
            raise ConfigError(
                f"lora.target_modules: no linear layer is called {name!r}{guess(name, known)}; "
                f"allowed: all-linear, attention, mlp, or names among {', '.join(known)}"
            )
    return names


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter of everything that gets a gradient, in a fixed order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write an adapter folder that plain peft loads. `weights`: full fp32 tensors by parameter name (gathered from all ranks)."""
    import peft
    from safetensors.torch import save

    assert isinstance(model, peft.PeftModel)
    state = peft.get_peft_model_state_dict(model, state_dict=weights)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / ".adapter_model.part"
    part.write_bytes(save({name: tensor.contiguous() for name, tensor in state.items()}, metadata={"format": "pt"}))
    part.replace(folder / "adapter_model.safetensors")
    settings = model.peft_config["default"].to_dict()
    settings.update(inference_mode=True, target_modules=_sorted(settings.get("target_modules")))
    import json

    write_atomically(folder / "adapter_config.json", json.dumps(settings, indent=2, default=str, sort_keys=True))


def _sorted(names: object) -> object:
    return sorted(names) if isinstance(names, (set, frozenset, list, tuple)) else names

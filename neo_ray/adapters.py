"""What is trained? The low-rank branch on a frozen student, put on for a trial and taken off after it.

The base's own weights are never written, by any variant: every trial of a worker, and the adapter that is saved, starts from
the very same ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from neo_ray.mistakes import guess
from neo_ray.parts import rank_and_world_size
from neo_ray.records import write_atomically
from neo_ray.settings import ConfigError, LoraConfig, TrialConfig, is_named

ADAPTER = "default"
"""peft's name for the only adapter of a model."""


def scaling(lora: LoraConfig) -> float:
    """Effective factor of the branch: alpha / rank; rsLoRA (arXiv 2312.03732): alpha / √rank.

    The same for all other variants. A layer that `rank_pattern` or `alpha_pattern` names has its own; this is that of the others.
    """
    return lora.alpha / (math.sqrt(lora.rank) if lora.variant == "rslora" else lora.rank)


def attach(base: nn.Module, trial: TrialConfig) -> nn.Module:
    """The model to train: the base with a fresh branch (lora, neo), or the base itself with gradients on (sft, kd).

    The branch is drawn from the trial's seed, and the model computes what the base does. Trained weights are fp32 whatever the
    base's dtype.

    Raises:
        ConfigError: a name that matches no layer, or a rank that a layer does not have.
    """
    if not trial.has_adapter:
        base.requires_grad_(True)
        return base
    import peft

    settings = peft_settings(base, trial.lora)
    if "fingerprint" not in vars(base):
        vars(base).update(fingerprint=fingerprint(base), factors={})
    torch.manual_seed(trial.seed)
    model: Any = peft.get_peft_model(base, settings)  # type: ignore[arg-type]
    for name, layer in _branches(model):
        _prepare(layer, trial.lora.variant, vars(base)["factors"], name)
    for parameter in trained_parameters(model).values():
        parameter.data = parameter.data.float()
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take the branch off again; the base's weights are the very tensors they were, and bit for bit what they were.

    Raises:
        RuntimeError: something else wrote into them, so that no other trial may use this base.
    """
    import peft

    base: Any = model
    if isinstance(model, peft.PeftModel):
        for module in model.modules():
            if isinstance(module, peft.utils.ModulesToSaveWrapper):
                module.set_adapter([])  # otherwise unload() would leave the trained copy in the place of the original
        base = model.unload()
        partitioned = any(hasattr(parameter, "ds_id") for parameter in base.parameters())  # ZeRO-3: there is no base left
        if not partitioned and fingerprint(base) != vars(base)["fingerprint"]:
            raise RuntimeError("the frozen weights of the student changed during the trial")
    base.requires_grad_(False)
    for parameter in base.parameters():
        parameter.grad = None
    return base


@torch.no_grad()
def fingerprint(base: nn.Module) -> tuple[int, ...]:
    """A checksum of each parameter's bits: any single changed element shows, at the price of reading the weights once."""
    return tuple(torch.stack([_checksum(parameter.detach()) for parameter in base.parameters()]).tolist())


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of the bits as whole numbers, of 64 bits where they fit: that reads several times as fast."""
    wide = all(n * tensor.element_size() % 8 == 0 for n in (tensor.numel(), tensor.storage_offset()))
    return tensor.reshape(-1).view(torch.int64 if wide else torch.uint8).sum(dtype=torch.int64)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter of everything that gets a gradient, in a fixed order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(parameters: dict[str, nn.Parameter], plus_ratio: float) -> list[dict[str, Any]]:
    """Groups of an optimizer; `ratio` is what a group's learning rate is of the trial's.

    LoRA+ (arXiv 2402.12354): B has another rate than A. All else that is trained (mixers, magnitudes, whole layers) has A's.
    """
    fast = [name for name in parameters if name.endswith(f".lora_B.{ADAPTER}.weight")] if plus_ratio != 1 else []
    groups = [{"params": [p for name, p in parameters.items() if name not in fast], "ratio": 1.0}]
    return [*groups, {"params": [parameters[name] for name in fast], "ratio": plus_ratio}] if fast else groups


def save_adapter(model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write an adapter folder that plain peft loads on the original base, whatever the variant.

    `weights`: full fp32 tensors by parameter name (gathered from all ranks).
    """
    import peft
    from safetensors.torch import save

    assert isinstance(model, peft.PeftModel)
    state, settings = _as_lora(model, weights)
    state = peft.get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / ".adapter_model.part"
    part.write_bytes(save({name: tensor.contiguous() for name, tensor in state.items()}, metadata={"format": "pt"}))
    part.replace(folder / "adapter_model.safetensors")
    # Keys in order, but not those of a pattern: its first match counts.
    write_atomically(folder / "adapter_config.json", json.dumps(dict(sorted(settings.items())), indent=2, default=str))


def target_modules(base: nn.Module, wanted: str | tuple[str, ...]) -> str | list[str]:
    """peft's words for `all-linear`, `attention`, `mlp` or names. Raises ConfigError for a name that matches nothing."""
    if wanted == "all-linear":
        return "all-linear"  # peft leaves the output head alone
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    if wanted in ("attention", "mlp"):
        part = "attn" if wanted == "attention" else "mlp"
        suffixes = sorted({_last(name) for name in linear if part in name})
        if suffixes:
            return suffixes
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    known = sorted({_last(name) for name in linear})
    for name in names:
        if not any(is_named(module, (name,)) for module in linear):
            raise ConfigError(
                f"lora.target_modules: no linear layer is called {name!r}{guess(name, known)}; "
                f"allowed: all-linear, attention, mlp, or names among {', '.join(known)}"
            )
    return names


def peft_settings(base: nn.Module, lora: LoraConfig) -> Any:
    """peft's own configuration. Raises ConfigError for a name or a pattern that is no layer's."""
    import peft

    saved = _saved_modules(base, lora.modules_to_save)
    targets = target_modules(base, lora.target_modules)
    _check_patterns(base, lora, targets, saved)
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it: a float is right
        lora_dropout=lora.dropout,
        target_modules=targets,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        modules_to_save=saved or None,
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
        task_type="CAUSAL_LM",
    )


def _saved_modules(base: nn.Module, wanted: tuple[str, ...]) -> list[str]:
    """Full names of the layers that are trained whole. peft takes any name that ends so: `norm` would be every norm there is."""
    layers = [name for name, module in base.named_modules() if list(module.parameters(recurse=False))]
    known = sorted({_last(name) for name in layers})
    for name in wanted:
        if not any(is_named(layer, (name,)) for layer in layers):
            raise ConfigError(f"lora.modules_to_save: no layer is called {name!r}{guess(name, known)}; known: {', '.join(known)}")
    return [layer for layer in layers if is_named(layer, wanted)]


def _check_patterns(base: Any, lora: LoraConfig, targets: str | list[str], saved: list[str]) -> None:
    """Every pattern is the first match of some adapted layer; peft passes over one that matches none."""
    head = base.get_output_embeddings()
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear) and module is not head}
    adapted = [n for n in sorted(linear) if targets == "all-linear" or is_named(n, tuple(targets))]
    adapted = [name for name in adapted if name not in saved]
    known = sorted({_last(name) for name in adapted})
    for key, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        used = {lora.pattern_of(name, patterns) for name in adapted}
        for pattern in patterns:
            if pattern not in used:
                raise ConfigError(
                    f"lora.{key}: {pattern!r} matches no adapted layer that an earlier pattern does not{guess(pattern, known)}; "
                    f"a pattern is the end of a layer's name ({', '.join([*known, *adapted[-1:]])}), or an expression for it"
                )


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _branches(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and peft layer of each adapted layer."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


class Mixed(nn.Linear):
    """B with a trained mixer M before it. MoSLoRA (arXiv 2406.11909): the branch is s·B·M·A x.

    M is drawn like A (Kaiming uniform, a = √5), as in the paper's code, where the orthogonal start is commented out.
    """

    def __init__(self, up: nn.Linear) -> None:
        super().__init__(up.in_features, up.out_features, bias=False, device="meta")
        self.weight = up.weight
        self.mixer = nn.Linear(up.in_features, up.in_features, bias=False)
        nn.init.kaiming_uniform_(self.mixer.weight, a=math.sqrt(5))
        self.mixer.to(up.weight.device)

    def forward(self, low_BLR: torch.Tensor) -> torch.Tensor:
        return super().forward(self.mixer(low_BLR))


class FromBase(nn.Linear):
    """A factor of a branch that starts as a part of the base (PiSSA, OLoRA), with that start, frozen, beside it.

    The reference codes take the part out of the base: (W − s·B₀A₀)x + s·BA x. The same function is W x + s·(BA − B₀A₀)x, which
    leaves W alone: no rounding of a base in bf16, nothing to restore, and nothing lost where the adapter is saved. Dropout acts
    on the change alone. In the reference codes it hits the part of the base as well, so that peft's example of PiSSA has none.
    """

    initial: torch.Tensor

    def __init__(self, weight: torch.Tensor, initial: torch.Tensor, dim: Literal[0, 1]) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight)
        self.register_buffer("initial", initial, persistent=False)
        self.dim = dim

    def whole(self, weight: torch.Tensor) -> torch.Tensor:
        """[A; A₀] or [B, −B₀]: one product with twice the rank."""
        return torch.cat([weight, self.initial.to(weight.device)], self.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.whole(self.weight))


@torch.no_grad()
def _prepare(layer: Any, variant: str, cache: dict[Any, Any], name: str) -> None:
    """Make of peft's fresh LoRA layer that of the variant."""
    if variant == "moslora":
        layer.lora_B[ADAPTER] = Mixed(layer.lora_B[ADAPTER])
    elif variant == "dora":  # peft takes the norm in the base's dtype: in bf16 the start would be no identity
        from peft.utils.integrations import dequantize_module_weight

        weight = dequantize_module_weight(layer.get_base_layer())  # as it is, where it is not quantised
        layer.lora_magnitude_vector[ADAPTER].weight.data = weight.float().norm(dim=1)
    elif variant in ("pissa", "olora"):
        down, up = _factors(layer, variant, cache, name)
        for tensor in (down, up):
            if rank_and_world_size()[1] > 1:  # a device may turn a singular vector around
                dist.broadcast(tensor, 0)
        layer.lora_A[ADAPTER] = FromBase(down, down.clone(), 0)
        layer.lora_B[ADAPTER] = FromBase(up, -up, 1)


def _factors(layer: Any, variant: str, cache: dict[Any, Any], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A₀ (rank × in) and B₀ (out × rank) in fp32, with s·B₀A₀ the part of the base that the branch starts from.

    PiSSA (arXiv 2404.02948): W's largest singular values, s·B₀A₀ = U S Vᵀ, √S to each factor. OLoRA (arXiv 2406.01775): the first
    columns and rows of W = QR. A worker decomposes a layer once: the cache keeps factors of the largest rank so far.
    """
    weight, rank = layer.get_base_layer().weight.float(), layer.r[ADAPTER]
    if rank > min(weight.shape):
        raise ConfigError(f"lora.rank: {variant} takes {rank} directions from {name}, which has {min(weight.shape)}")
    if len(cache.get((variant, name), ((), ()))[0]) < rank:
        if variant == "pissa":
            # in fp64: where singular values lie close together, the vectors would hang on the device's last bits
            left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
            root = values[:rank].sqrt()
            left, right = (left[:, :rank] * root).float(), (root[:, None] * right[:rank]).float()
        else:
            left, right = torch.linalg.qr(weight)
        cache[variant, name] = right[:rank].clone().cpu(), left[:, :rank].clone().cpu()
    share = math.sqrt(layer.scaling[ADAPTER]) if variant == "pissa" else 1.0
    down, up = (tensor.to(weight.device) / share for tensor in cache[variant, name])
    return down[:rank].contiguous(), up[:, :rank].contiguous()


def _as_lora(model: Any, weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and settings of the plain LoRA (or DoRA) adapter that computes the same.

    MoSLoRA's mixer is folded into B. PiSSA and OLoRA become a branch of twice the rank, that takes the start away again: with
    twice the alpha, its scaling is the same.
    """
    weights, settings = dict(weights), model.peft_config[ADAPTER].to_dict()
    twice = False
    for name, layer in _branches(model):
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        key_A, key_B = f"{name}.lora_A.{ADAPTER}.weight", f"{name}.lora_B.{ADAPTER}.weight"
        if isinstance(up, Mixed):
            weights[key_B] = weights[key_B] @ weights.pop(f"{name}.lora_B.{ADAPTER}.mixer.weight")
        elif isinstance(up, FromBase):
            weights[key_A], weights[key_B], twice = down.whole(weights[key_A]), up.whole(weights[key_B]), True
    if twice:
        settings.update({key: 2 * settings[key] for key in ("r", "lora_alpha")})
        for key in ("rank_pattern", "alpha_pattern"):
            settings[key] = {pattern: 2 * value for pattern, value in settings[key].items()}
    settings.update(inference_mode=True, target_modules=_sorted(settings.get("target_modules")))
    return weights, settings


def _sorted(names: object) -> object:
    return sorted(names) if isinstance(names, (set, frozenset, list, tuple)) else names

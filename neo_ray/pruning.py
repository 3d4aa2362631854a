"""Which layers? A student made from its teacher by dropping layers, given or found by greedy removal.

Shapes: B sequences, L tokens of a sequence, N tokens of a batch, H hidden width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from neo_ray import devices, weights
from neo_ray.config import SweepConfig
from neo_ray.local import check_layers
from neo_ray.models import Head, decoder, last_hidden, load_model, loading, output_head
from neo_ray.quickstart import made_once
from neo_ray.settings import ConfigError

Announce = Callable[[str], None]
Calibration = Callable[[], tuple[Tensor, Tensor, Tensor]]


def student_folder(config: SweepConfig, teacher_folder: str, calibration: Calibration, cache: Path, announce: Announce) -> str:
    """Folder of the pruned student: made once, in `<cache>/students/<digest>`, and found there afterwards.

    Args:
        teacher_folder: the teacher's folder or hub name.
        calibration: gives input_ids_BL, attention_mask_BL, labels_BL of training text; called only for `student.prune.keep`.

    Raises:
        ConfigError: at `student.prune` or `teacher.model`.
    """
    prune = config.student.prune
    assert prune is not None and config.teacher is not None
    source = _local_folder(teacher_folder, config.teacher.revision, "teacher.model")
    num_layers, layers = _num_layers(source), prune.layers
    check_layers(config, num_layers)
    if layers is not None:
        digest = weights.digest(source, list(layers), cache)
        return str(made_once(cache / "students" / digest, lambda folder: _write_pruned(source, layers, folder)))
    assert prune.keep is not None
    tokens, keep = calibration(), prune.keep
    of_tokens = [hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest() for tensor in tokens]
    digest = weights.digest(source, [keep, *of_tokens], cache)

    def make(folder: Path) -> None:
        announce(f"student: choosing {keep} of the teacher's {num_layers} layers on {int(tokens[1].sum()):,} tokens")
        device = devices.local_device()
        model = load_model(str(source), devices.resolve_dtype("auto", device), device, where="teacher.model")
        input_ids_BL, attention_mask_BL, labels_BL = (t.to(device) for t in tokens)
        chosen = greedy_layers(model, input_ids_BL, attention_mask_BL, labels_BL, keep, announce)
        _write_pruned(source, chosen, folder)

    return str(made_once(cache / "students" / digest, make))


@torch.no_grad()
def greedy_layers(
    model: Any,
    input_ids_BL: Tensor,
    attention_mask_BL: Tensor | None,
    labels_BL: Tensor,
    keep: int,
    announce: Announce = lambda _: None,
) -> list[int]:
    """Which `keep` layers to keep: again and again drop the one whose absence hurts the cross-entropy least.

    The hidden states below a candidate are kept, so that it costs only the layers above it. Masks and rotary embeddings are those
    that the model itself hands to each layer.

    Args:
        labels_BL: aligned with the input (shifted here); −100 counts for nothing.

    Raises:
        ConfigError: at `student.prune.keep`: too many, or no `layers` and `norm` in the decoder.
    """
    chain = _Chain.of(model, input_ids_BL, attention_mask_BL)
    kept = list(range(len(chain.layers)))
    if not 1 <= keep <= len(kept):
        raise ConfigError(f"student.prune.keep: {keep} layers of a teacher that has {len(kept)}")
    head, below = output_head(model), chain.run(chain.first_BLH, kept)
    full_loss = _loss(head, chain.norm(below[-1]), labels_BL)
    start = 0  # below[p] is what goes into kept[p]; only what lies above the last removal is stale
    while len(kept) > keep:
        below = below[: start + 1] + chain.run(below[start], kept[start:])[1:]
        losses = [_loss(head, chain.norm(chain.run(below[p], kept[p + 1 :])[-1]), labels_BL) for p in range(len(kept))]
        start = min(range(len(losses)), key=losses.__getitem__)
        dropped = kept.pop(start)
        announce(f"student: layer {dropped} dropped, {len(kept)} left, loss {losses[start]:.3f} (all layers {full_loss:.3f})")
    return kept


@dataclass(frozen=True)
class _Chain:
    """A decoder taken apart: what its first layer got, and what each layer was given beside the hidden state."""

    layers: list[Any]
    norm: Any
    first_BLH: Tensor
    extras: list[dict[str, Any]]

    @classmethod
    def of(cls, model: Any, input_ids_BL: Tensor, attention_mask_BL: Tensor | None) -> _Chain:
        stack = decoder(model)
        layers, norm = getattr(stack, "layers", None), getattr(stack, "norm", None)
        if not isinstance(layers, torch.nn.ModuleList) or norm is None:
            raise ConfigError(
                f"student.prune.keep: a {type(model).__name__} has no `model.layers` and `model.norm` to choose from; "
                "give student.model"
            )
        calls: list[tuple[Tensor, dict[str, Any]]] = []
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, extra: calls.append((args[0], extra)), with_kwargs=True)
            for layer in layers
        ]
        try:
            hidden_BLH = last_hidden(model, input_ids_BL, attention_mask_BL)
        finally:
            for hook in hooks:
                hook.remove()
        chain = cls(list(layers), norm, calls[0][0], [extra for _, extra in calls])
        rebuilt_BLH = norm(chain.run(chain.first_BLH, list(range(len(layers))))[-1])
        if not torch.allclose(rebuilt_BLH, hidden_BLH, rtol=1e-3, atol=1e-3):
            raise ConfigError(
                f"student.prune.keep: the layers of a {type(model).__name__} are more than a chain; give student.prune.layers"
            )
        return chain

    def run(self, hidden_BLH: Tensor, which: list[int]) -> list[Tensor]:
        """The hidden state before each of these layers, and after the last."""
        states = [hidden_BLH]
        for i in which:
            out = self.layers[i](states[-1], **self.extras[i])
            states.append(out[0] if isinstance(out, tuple) else out)
        return states


def _loss(head: Head, hidden_BLH: Tensor, labels_BL: Tensor, chunk_tokens: int = 512) -> float:
    """Mean cross-entropy in nats a label. Chunks bound the logits: 512 × 128,256 in fp32 is 263 MB."""
    valid_BL = labels_BL[:, 1:] != -100
    hidden_NH, labels_N = hidden_BLH[:, :-1][valid_BL], labels_BL[:, 1:][valid_BL]
    total = torch.zeros((), dtype=torch.float64)
    for hidden, labels in zip(hidden_NH.split(chunk_tokens), labels_N.split(chunk_tokens), strict=True):
        total += F.cross_entropy(head.logits(hidden, head.weight_VH.shape[0]), labels, reduction="sum").cpu()
    return float(total / len(labels_N))


LAYER_KEY = re.compile(r"^(.*?\blayers\.)(\d+)(\..+)$")
LAYERS_FILE = "pruned_layers.json"
"""In a pruned student's folder: which of its teacher's layers it has."""
PER_LAYER_LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types")


def _write_pruned(source: Path, layers: Sequence[int], folder: Path) -> None:
    folder.mkdir(parents=True)
    new_index = {old: new for new, old in enumerate(layers)}
    shards, weight_map, size_bytes = sorted(source.glob("*.safetensors")), {}, 0
    for shard in shards:
        tensors: dict[str, Tensor] = {}
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():
                match = LAYER_KEY.match(key)
                if match is None:
                    tensors[key] = file.get_tensor(key)
                elif int(match[2]) in new_index:
                    tensors[f"{match[1]}{new_index[int(match[2])]}{match[3]}"] = file.get_tensor(key)
        if tensors:
            save_file(tensors, folder / shard.name, metadata={"format": "pt"})
            weight_map.update({key: shard.name for key in tensors})
            size_bytes += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    _write_pruned_config(source, layers, folder)
    (folder / LAYERS_FILE).write_text(json.dumps(list(layers)), encoding="utf-8")
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja", ".txt", ".model") or path.name.startswith(("LICENSE", "NOTICE")):
            if path.is_file() and path.name != "config.json" and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)


def _write_pruned_config(source: Path, layers: Sequence[int], folder: Path) -> None:
    """The source's config with fewer layers. Kinds of layers are as transformers reads them: old files imply them by position."""
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    with loading(str(source), "teacher.model"):
        read = AutoConfig.from_pretrained(source)
    for name in PER_LAYER_LISTS:
        kinds = getattr(read, name, None)
        if isinstance(kinds, (list, tuple)) and len(kinds) == raw["num_hidden_layers"]:
            raw[name] = [kinds[i] for i in layers]
    raw["num_hidden_layers"] = len(layers)
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")


def _num_layers(source: Path) -> int:
    """How many layers the weights hold; they must be the `layers.0 … layers.n−1` that the config speaks of."""
    found: set[int] = set()
    for shard in source.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            found |= {int(match[2]) for match in map(LAYER_KEY.match, file.keys()) if match}
    told = json.loads((source / "config.json").read_text(encoding="utf-8")).get("num_hidden_layers")
    if not found or found != set(range(told or 0)):
        raise ConfigError(f"student.prune: {source} does not keep its layers as safetensors `layers.0 …`, so none can be dropped")
    return len(found)


def _local_folder(model: str, revision: str | None, where: str) -> Path:
    with loading(model, where) as source:
        if Path(source).is_dir():
            return Path(source)
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))

"""How much memory does one worker need? A formula for each thing that it holds.

The formulas of activations and loss were fitted to the live tensors of Llama models in PyTorch (exact there); N is tokens of a
micro-batch, padding included, V the vocabulary, H the hidden width. On CPUs whole steps are measured against them
(tests/test_memory.py); what differs on GPUs is read off the libraries' source and not measured.

Attention keeps no scores of [L, L]: PyTorch takes its flash kernel on a CPU with and without a mask and gradient (seen in a
profile, fp32 and bf16; attention dropout would end that), on a GPU flash without a mask and the memory-efficient one with it.
"""

from __future__ import annotations

from pathlib import Path

from neo_ray.config import SweepConfig
from neo_ray.settings import LoraConfig, TrialConfig, is_named
from neo_ray.shapes import ModelShape

FP32, BF16 = 4, 2
CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**27}
"""Of a chunk's fp32 logits, by kind of device: a core's caches are small, and a GPU wants large products."""
# Live [N, V] fp32 tensors at the peak of loss and backward: logits of the whole batch and of the scored positions, log-softmaxes,
# probabilities and their gradients. Counted (tests/test_losses.py), the most over kd_ratio and temperature.
LOSS_TENSORS = {
    "none": 5,
    "forward_kl": 8,
    "reverse_kl": 9,
    "jsd": 12,
    "skew_kl": 11,
    "skew_reverse_kl": 13,
    "adaptive_kl": 10,
    "total_variation": 9,
}
# Saved for the backward pass, bytes per token and layer. Norms work in fp32 (2 × 4 H); queries, attention output and the inputs
# of the linear layers make up the rest of H, gate, its SiLU, up and their product 4 of the MLP's width.
HIDDEN_BYTES_ADAPTER, HIDDEN_BYTES_FULL = 24, 32
RUNTIME_BYTES = {"cpu": 600_000_000, "gpu": 700_000_000}
"""Python with torch, transformers and DeepSpeed; on a GPU the CUDA context."""
ZERO_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, which is allocated whole in every backward pass from stage 1 on."""
STARTS_FROM_BASE = ("pissa", "olora")
"""Variants that keep the factors they began with beside the trained ones (`adapters.FromBase`)."""


def chunk_rows(vocabulary: int, device_type: str) -> int:
    """Positions whose logits are held at once."""
    return max(1, CHUNK_BYTES[device_type] // (FP32 * vocabulary))


def adapter_parameters(shape: ModelShape, lora: LoraConfig) -> int:
    """Parameters that are trained: rank × (in + out) of each adapted layer, and whole layers (`modules_to_save`).

    DoRA adds a magnitude per output, MoSLoRA a mixer of rank × rank.
    """
    total = sum(n_in * n_out for name, (n_in, n_out) in shape.layers.items() if is_named(name, lora.modules_to_save))
    for _, rank, n_in, n_out in _adapted(shape, lora):
        total += rank * (n_in + n_out) + {"dora": n_out, "moslora": rank * rank}.get(lora.variant, 0)
    return total


def _adapted(shape: ModelShape, lora: LoraConfig) -> list[tuple[str, int, int, int]]:
    """(full name, rank, in, out) of every layer with a branch."""
    layers = {name: sizes for name, sizes in shape.layers.items() if not is_named(name, lora.modules_to_save)}
    return [(name, lora.rank_of(name), *sizes) for name, sizes in layers.items() if _is_adapted(name, lora.target_modules)]


def _is_adapted(name: str, wanted: str | tuple[str, ...]) -> bool:
    groups = {"all-linear": "_proj", "attention": "self_attn.", "mlp": "mlp."}
    if isinstance(wanted, str):
        return groups[wanted] in name if wanted in groups else is_named(name, (wanted,))
    return is_named(name, wanted)


def compute_bytes(config: SweepConfig, trial: TrialConfig) -> int:
    """Bytes of a number in the compute dtype. `auto` is bf16 on a GPU (assumption: a current one) and on a CPU that has it."""
    if trial.training.dtype != "auto":
        return {"bf16": BF16, "fp16": BF16, "fp32": FP32}[trial.training.dtype]
    if config.resources.gpus_per_worker > 0:
        return BF16
    try:
        local_flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if config.resources.address is None else ""
    except OSError:
        local_flags = ""
    return BF16 if "avx512_bf16" in local_flags else FP32


def memory_per_worker(config: SweepConfig, trial: TrialConfig, teacher: ModelShape | None, student: ModelShape) -> dict[str, int]:
    """What a worker holds at the peak of a step, in bytes.

    Trained weights are fp32 whatever the compute dtype, so there is no other master copy than the one that ZeRO makes. The
    teacher is held whole on every worker, also where a method has none: the held-out KL is measured against it.

    Said too high: gradients and ZeRO's bucket fill up while activations are freed, where a step has one micro-batch (measured for
    all parameters in bf16: 1.58 GB said, 1.31 GB taken).
    """
    size, stage = compute_bytes(config, trial), trial.deepspeed.zero_stage
    shards = [config.resources.workers_per_trial if stage >= needed else 1 for needed in range(4)]
    trained = adapter_parameters(student, trial.lora) if trial.has_adapter else student.num_parameters
    trained += projection_parameters(trial, teacher, student)
    frozen = student.num_parameters if trial.has_adapter else 0
    # Under bf16 autocast a weight that is trained has a bf16 copy for as long as its backward pass needs it.
    trained_bytes = FP32 if size == FP32 else FP32 + BF16
    layer = student.layer_parameters * (size if trial.has_adapter else FP32)
    head = student.vocab_size * student.hidden_size * (FP32 if _trains_head(trial) else size)
    # A layer at a time comes in whole, and beside it the head, which stays for all micro-batches of a step (`placement.in_full`).
    gathered = layer + head if shards[3] > 1 or trial.deepspeed.offload_parameters != "none" else 0
    bits, on_gpu = config.student.quantization, config.resources.gpus_per_worker > 0
    places = (trial.deepspeed.offload_optimizer, trial.deepspeed.offload_parameters)
    elsewhere = [on_gpu and place != "none" for place in places]  # host memory is not a GPU's
    needs = {
        "frozen student": (
            0 if elsewhere[1] else _frozen_bytes(student, size, bits) if frozen and bits != "none" else frozen * size // shards[3]
        )
        + gathered,
        "teacher": _teacher_bytes(config, trial, teacher, size) if teacher else 0,
        "trained weights": trained * trained_bytes // shards[3],
        "gradients": trained * FP32 // shards[2],
        "optimizer": 0 if elsewhere[0] else trained * (2 * FP32 + (FP32 if stage else 0)) // shards[1],
        "ZeRO bucket": _bucket_bytes(trial, trained),
        "activations": activation_bytes(micro_batch_tokens(config, trial), trial, student, size, _mask_width(config, trial)),
        "logits and loss": loss_bytes(config, trial, student, size),
        "hidden states": alignment_bytes(micro_batch_tokens(config, trial), trial, teacher, student),
        "runtime": RUNTIME_BYTES["gpu" if on_gpu else "cpu"],
    }
    backward = needs["ZeRO bucket"] + needs["activations"] + needs["logits and loss"]
    if (update := update_bytes(trained // shards[1], stage, on_gpu)) > backward:  # a worker holds the one or the other
        needs["update beyond backward pass"] = update - backward
    if trial.has_adapter and trial.lora.variant in STARTS_FROM_BASE:
        needs["adapter's start"] = start_bytes(student, trial.lora, size, on_gpu)
    return needs


def _frozen_bytes(shape: ModelShape, size: int, quantization: str) -> int:
    """A whole frozen model. Quantised are the linear layers of its blocks; 4 bits have scales of half a bit at most."""
    if quantization == "none":
        return shape.num_parameters * size
    linear = shape.num_layers * shape.layer_parameters
    return (shape.num_parameters - linear) * size + linear * {"8bit": 16, "4bit": 9}[quantization] // 16


def _teacher_bytes(config: SweepConfig, trial: TrialConfig, shape: ModelShape, size: int) -> int:
    """Shared out, a worker has its share and the layer that is at work, or the head; both, where a step has several
    micro-batches, over which the head stays (`placement.in_full`)."""
    placement, workers = config.teacher.placement if config.teacher else "replicated", config.resources.workers_per_trial
    if placement == "replicated":
        return _frozen_bytes(shape, size, config.teacher.quantization if config.teacher else "none")
    share = shape.num_parameters // workers
    share = 0 if placement == "offloaded" and config.resources.gpus_per_worker else share
    layer, head = shape.layer_parameters, shape.vocab_size * shape.hidden_size
    accumulates = workers * trial.training.micro_batch(workers) < trial.training.batch_size
    return (share + (layer + head if accumulates else max(layer, head))) * size


def update_bytes(trained: int, stage: int, on_gpu: bool) -> int:
    """What the update makes beside weights, gradients and moments, when the backward pass has freed what it held.

    AdamW's denominator. From stage 1 on all parameters are one tensor, of which PyTorch's plain loop (CPU) takes the root and
    divides it into another; its `foreach` form (GPU) divides in place. At stage 0 DeepSpeed lays the gradients end to end
    before that, and the loop goes through one parameter after another. Measured on a CPU at stages 0 and 2; the rest as read.
    """
    return FP32 * trained * (2 if stage and not on_gpu else 1)


def start_bytes(shape: ModelShape, lora: LoraConfig, size: int, on_gpu: bool) -> int:
    """A₀ and B₀ of PiSSA and OLoRA in fp32, the products' operands [A; A₀] and [B, −B₀] that the backward pass keeps.

    The factors cached for later trials lie in host memory, and so count on a CPU alone.
    """
    factors = sum(rank * (n_in + n_out) for _, rank, n_in, n_out in _adapted(shape, lora))
    return factors * (FP32 + 2 * size + (0 if on_gpu else FP32))


def _mask_width(config: SweepConfig, trial: TrialConfig) -> int:
    """Keys that the mask gives each token; 0 where there is no mask: a single sequence is neither padded nor packed."""
    if trial.training.micro_batch(config.resources.workers_per_trial) == 1:
        return 0
    return micro_batch_tokens(config, trial) if trial.training.packing else config.data.max_length


def activation_bytes(num_tokens: int, trial: TrialConfig, shape: ModelShape, size: int, mask_width: int = 0) -> int:
    """Kept for the backward pass of a micro-batch; with gradient checkpointing each layer's input, and one layer in full.

    Sequences of different lengths need a mask, in the compute dtype and in every layer [B, L, L] where they are padded, [N, N]
    where they are packed; and with one PyTorch's attention keeps keys and values once a query head. Assumption: that attention
    (sdpa) is used; flash attention has no mask.
    """
    hidden = (HIDDEN_BYTES_ADAPTER if trial.has_adapter else HIDDEN_BYTES_FULL) * shape.hidden_size
    keys = 2 * size * (shape.num_heads if mask_width else shape.num_kv_heads) * shape.head_dim
    mask = size * mask_width
    twice = 2 if trial.lora.variant in STARTS_FROM_BASE else 1
    low_rank = 7 * size * twice * trial.lora.rank if trial.has_adapter else 0
    layer = hidden + keys + mask + 4 * size * shape.intermediate_size + low_rank + _branch_bytes(trial, shape, size)
    if trial.training.gradient_checkpointing:
        return num_tokens * (shape.num_layers * size * shape.hidden_size + layer)
    return num_tokens * shape.num_layers * layer


def _branch_bytes(trial: TrialConfig, shape: ModelShape, size: int) -> int:
    """Per token and layer: dropout gives each branch an input of its own, with a mask; DoRA keeps two summands to scale them."""
    branches = _adapted(shape, trial.lora) if trial.has_adapter else []
    dropped = sum(n_in for _, _, n_in, _ in branches) * (size + 1) if trial.lora.dropout else 0
    scaled = sum(n_out for _, _, _, n_out in branches) * 2 * size if trial.lora.variant == "dora" else 0
    return (dropped + scaled) // shape.num_layers


def loss_bytes(config: SweepConfig, trial: TrialConfig, shape: ModelShape, size: int) -> int:
    """The [C, V] tensors of a chunk of the loss, beside the scored hidden states, their gradient and the teacher's states."""
    kind = trial.distill.divergence if trial.has_teacher and trial.distill.kd_ratio > 0 else "none"
    num_tokens, width = micro_batch_tokens(config, trial), FP32 * shape.vocab_size
    chunk = min(num_tokens, chunk_rows(shape.vocab_size, "cuda" if config.resources.gpus_per_worker else "cpu"))
    head = width * shape.hidden_size * 2 if _trains_head(trial) else 0  # its gradient, of a chunk and summed up
    return LOSS_TENSORS[kind] * width * chunk + head + 3 * size * num_tokens * shape.hidden_size


def _trains_head(trial: TrialConfig) -> bool:
    """The whole of it, and not a branch on it."""
    return not trial.has_adapter or is_named("lm_head", trial.lora.modules_to_save)


def projection_parameters(trial: TrialConfig, teacher: ModelShape | None, student: ModelShape) -> int:
    """A matrix for every pair of layers whose hidden states are compared."""
    pairs = len(trial.distill.alignment_layers) if trial.is_aligned else 0
    return pairs * student.hidden_size * teacher.hidden_size if teacher else 0


def alignment_bytes(num_tokens: int, trial: TrialConfig, teacher: ModelShape | None, student: ModelShape) -> int:
    """Hidden states that are compared, in fp32, and their gradients, beside the logits. Counted (tests/test_alignment.py).

    For every pair two tensors of the student's width (states, gradient) and three of the teacher's (its states, the projected
    ones, their difference or what the cosine keeps), and four more of that while a pair's gradient is formed.
    """
    if not trial.is_aligned or teacher is None:
        return 0
    pairs, narrow, wide = len(trial.distill.alignment_layers), student.hidden_size, teacher.hidden_size
    return FP32 * num_tokens * (pairs * (2 * narrow + 3 * wide) + 4 * wide)


def micro_batch_tokens(config: SweepConfig, trial: TrialConfig) -> int:
    """Tokens of one forward pass where every example is as long as it may be."""
    return trial.training.micro_batch(config.resources.workers_per_trial) * config.data.max_length


def reduce_bucket_elements(trained: int) -> int:
    """DeepSpeed's `reduce_bucket_size` for so many trained parameters: all of them at once, up to its own default."""
    return max(1, min(trained, ZERO_BUCKET_ELEMENTS))


def _bucket_bytes(trial: TrialConfig, trained: int) -> int:
    if trial.deepspeed.zero_stage == 0:
        return 0
    zero = trial.deepspeed.extra.get("zero_optimization") or {}
    return FP32 * int(zero.get("reduce_bucket_size", reduce_bucket_elements(trained)))

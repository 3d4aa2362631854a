"""Which weights? Tokenizers, frozen models, their output heads, and the proof of a shared vocabulary.

Shapes: B sequences, L tokens of a sequence, N tokens of a batch, H hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from neo_ray.config import Quantization
from neo_ray.local import locate_model
from neo_ray.quickstart import without_progress_bars
from neo_ray.settings import ConfigError

PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
"""Special tokens that stand for padding in published tokenizers, the clearest first (Llama 3.1, SmolLM2 and Qwen, Llama 2)."""


def load_tokenizer(model: str, revision: str | None = None, trust_remote_code: bool = False, where: str = "model") -> Any:
    """The model's fast tokenizer, its pad token other than its end token where its own vocabulary has one to offer.

    Masking labels by a pad that is also the end token would delete every end-of-turn label. The vocabulary is never resized.

    Raises:
        ConfigError: at YAML path `where`, with the cause.
    """
    with loading(model, where) as source:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ConfigError(f"{where}: {model} has no fast tokenizer (tokenizer.json)")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(tokenizer.all_special_tokens)
        spare = [t for t in PAD_TOKENS if t in special and t in tokenizer.get_vocab() and t != tokenizer.eos_token]
        if spare:
            tokenizer.pad_token = spare[0]
    return tokenizer


def load_model(
    model: str,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    where: str = "model",
    quantization: Quantization = "none",
) -> Any:
    """A frozen causal language model in evaluation mode, read from safetensors straight into `dtype` on `device`.

    Quantised, its linear layers but the head have fewer bits and compute in `dtype`; all else is as it was.

    Raises:
        ConfigError: at YAML path `where`: not found, not reachable, no safetensors, missing weights, an unknown kind of head.
    """
    with loading(model, where) as source:
        check_weights(source, where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            revision=revision,
            trust_remote_code=trust_remote_code,
            device_map=None if str(device) == "cpu" else {"": device},
            quantization_config=_quantised(quantization, dtype),
            output_loading_info=True,
        )
    network, report = loaded
    if report["missing_keys"]:  # transformers would fill them with random numbers
        raise ConfigError(f"{where}: {model} lacks weights: {', '.join(sorted(report['missing_keys'])[:3])}")
    network.config.use_cache = False
    network.eval().requires_grad_(False)
    _prove_head(network, where)
    return network


def _quantised(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "4bit":  # QLoRA (arXiv 2305.14314)
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return None


def read_config(model: str, revision: str | None = None, trust_remote_code: bool = False, where: str = "model") -> Any:
    """The model's config as transformers has it; no weights are needed. Raises ConfigError."""
    with loading(model, where) as source:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)


def check_context(max_length: int, model: str, config: Any, where: str) -> None:
    """Raises ConfigError where examples may be longer than what the model was made to read."""
    reads = getattr(config.get_text_config(), "max_position_embeddings", None)
    if reads is not None and max_length > reads:
        raise ConfigError(f"data.max_length: {max_length} tokens, and {where} {model} reads at most {reads}")


def prove_shared_vocabulary(teacher_tokenizer: Any, student_tokenizer: Any, teacher_rows: int, student_rows: int) -> int:
    """V: ids 0 … V−1 mean the same token to both. Embedding rows from V on are padding, on either side, and belong in no softmax.

    Raises:
        ConfigError: names the first id on which the tokenizers differ, or that has no embedding row.
    """
    teacher, student = ({i: t for t, i in tokenizer.get_vocab().items()} for tokenizer in (teacher_tokenizer, student_tokenizer))
    for i in sorted(teacher.keys() | student.keys()):
        if teacher.get(i) != student.get(i):
            names = (repr(v[i]) if i in v else "no token" for v in (teacher, student))
            raise ConfigError(
                "student.model: teacher and student do not share a vocabulary: id {} is {} to the teacher and {} to the student "
                "(sizes {} and {}); distillation compares them token by token".format(i, *names, len(teacher), len(student))
            )
    vocabulary = max(teacher) + 1
    for side, rows in (("teacher", teacher_rows), ("student", student_rows)):
        if rows < vocabulary:
            last = teacher[vocabulary - 1]
            raise ConfigError(
                f"{side}.model: has {rows} embedding rows, too few for {last!r}, id {vocabulary - 1} of its tokenizer"
            )
    return vocabulary


def outline(model: str, config: Any, trust_remote_code: bool, where: str) -> Any:
    """The model of a config without weights (on the meta device): which layers it has, and their names. Raises ConfigError."""
    with loading(model, where), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def check_weights(model: str, where: str) -> None:
    """A local folder's weights are safetensors, each of them whole. Raises ConfigError. Hub names are not looked at."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ConfigError(f"{where}: {model} holds no *.safetensors; pickled weights run code when loaded and are refused")
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as opened:
                opened.keys()
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{where}: {shard} is no whole safetensors file ({str(error).splitlines()[0]})") from None


@dataclass(frozen=True)
class Head:
    """What turns the last hidden state into logits: z = cap·tanh(scale·(W h + b) / cap)."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    soft_cap: float | None = None
    """Gemma's `final_logit_softcapping`."""
    logit_scale: float = 1.0
    """Multiplies: Cohere's `logit_scale`, one over Granite's `logits_scaling`."""

    def logits(self, hidden_NH: Tensor, vocabulary: int) -> Tensor:
        """fp32 logits_NV over the first `vocabulary` ids, any leading shape; the product in the weights' dtype, as a model's."""
        bias_V = None if self.bias_V is None else self.bias_V[:vocabulary]
        logits_NV = F.linear(hidden_NH.to(self.weight_VH.dtype), self.weight_VH[:vocabulary], bias_V).float()
        return _capped(logits_NV, self.logit_scale, self.soft_cap)

    @property
    def trained(self) -> list[Tensor]:
        return [tensor for tensor in (self.weight_VH, self.bias_V) if tensor is not None and tensor.requires_grad]

    @property
    def is_frozen_linear(self) -> bool:
        """Are its logits linear in the hidden state, with weights that stay?"""
        return self.soft_cap is None and not self.trained

    def copy(self) -> Head:
        bias_V = None if self.bias_V is None else self.bias_V.detach().clone()
        return dataclasses.replace(self, weight_VH=self.weight_VH.detach().clone(), bias_V=bias_V)


@dataclass(frozen=True)
class AdaptedHead:
    """A head that an adapter has wrapped: only its module knows its product."""

    module: torch.nn.Module
    soft_cap: float | None
    logit_scale: float

    def logits(self, hidden_NH: Tensor, vocabulary: int) -> Tensor:
        """As `Head.logits`. Past ZeRO-3's hooks on the module, which belong around a whole loss (`Student.loss`)."""
        adapted_NV = type(self.module).forward(self.module, hidden_NH)[..., :vocabulary]
        return _capped(adapted_NV.float(), self.logit_scale, self.soft_cap)

    @property
    def trained(self) -> list[Tensor]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


AnyHead = Head | AdaptedHead


def _capped(logits_NV: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    if scale != 1.0:
        logits_NV = logits_NV * scale
    return logits_NV if soft_cap is None else soft_cap * torch.tanh(logits_NV / soft_cap)


def any_head(model: Any) -> AnyHead:
    """The head of a model under training, whatever an adapter made of it."""
    layer, cap_and_scale = head_layer(model), _cap_and_scale(model)
    return Head(layer.weight, layer.bias, *cap_and_scale) if _is_plain(layer) else AdaptedHead(layer, *cap_and_scale)


def head_layer(model: Any) -> Any:
    """The module that makes the logits: the copy that peft trains (`modules_to_save`), where there is one."""
    layer = model.get_output_embeddings()
    return layer.modules_to_save[layer.active_adapters[0]] if hasattr(layer, "modules_to_save") else layer


def head_names(model: Any) -> tuple[str, ...]:
    """Full names of the layers that hold the head's weights: the head, and an embedding that is tied to it."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:  # refused once it is loaded
        return ()
    tied = head.weight is embedding.weight or getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    layers = (head, embedding) if tied else (head,)
    return tuple(name for name, module in model.named_modules() if any(module is layer for layer in layers))


def output_head(model: Any) -> Head:
    """The model's head; its tensors are the model's own.

    Raises:
        ConfigError: it is no plain linear layer. An adapter on it would be left out without a word.
    """
    layer = model.get_output_embeddings()
    if not _is_plain(layer):
        raise ConfigError(
            f"lora.target_modules: the output head is a {type(layer).__name__}, and only a plain linear one can be distilled "
            "through (`all-linear` leaves the head alone)"
        )
    return Head(layer.weight, layer.bias, *_cap_and_scale(model))


def _is_plain(layer: Any) -> bool:
    return isinstance(layer, torch.nn.Linear) and layer.weight.is_floating_point()


def _cap_and_scale(model: Any) -> tuple[float | None, float]:
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return getattr(config, "final_logit_softcapping", None), scale


def last_hidden(
    model: Any, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None, position_ids_BL: Tensor | None = None
) -> Tensor:
    """hidden_BLH after the final norm. The head is never run, so no tensor of the vocabulary's size exists.

    A `PeftModel`'s adapters sit inside the decoder's layers and take part.
    """
    network = decoder(model)
    return network(**inputs(network, input_ids_BL, attention_mask_BL, position_ids_BL)).last_hidden_state


def decoder(model: Any) -> Any:
    """The model without its head; what a `PeftModel` wraps."""
    return _without_adapter(model).get_decoder()


def inputs(
    model: Any, input_ids_BL: Tensor, attention_mask_BL: Tensor | None, position_ids_BL: Tensor | None = None
) -> dict[str, Any]:
    """Arguments of a forward pass over whole sequences; positions go to the models that take them.

    Never with a cache: transformers takes packed sequences for a single one where there is one.
    """
    given = {"input_ids": input_ids_BL, "attention_mask": attention_mask_BL, "use_cache": False}
    return {**given, "position_ids": position_ids_BL} if position_ids_BL is not None and takes_positions(model) else given


def takes_positions(model: Any) -> bool:
    return _reads_positions(type(_without_adapter(model)))  # type: ignore[arg-type]  # a class is hashable


@functools.cache  # asked before every forward pass
def _reads_positions(network: type) -> bool:
    return "position_ids" in inspect.signature(network.forward).parameters  # type: ignore[attr-defined]


@torch.no_grad()
def prove_packing(model: Any, where: str) -> None:
    """Refuse a model whose packed sequences see each other. Its class does not tell: OPT takes positions and masks by none.

    Raises:
        ConfigError: at `training.packing`, for the model at YAML path `where`.
    """
    name, allowed = type(model).__name__, "training.packing: false pads instead"
    if not takes_positions(model):
        raise ConfigError(
            f"training.packing: {where}: {name} takes no position ids, by which packed sequences are told apart; {allowed}"
        )
    ids_BL = torch.arange(9, device=model.device).remainder(model.config.get_text_config().vocab_size)[None]
    other_BL = torch.cat([ids_BL[:, 4:], ids_BL[:, 5:]], dim=1)
    positions_BL = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]], device=model.device)
    one_LV, two_LV = (model(**inputs(model, ids, None, positions_BL)).logits[0, 5:].float() for ids in (ids_BL, other_BL))
    if _differ(one_LV, two_LV, model.dtype):
        raise ConfigError(
            f"training.packing: {where}: packed sequences of {name} see each other, as where layers are recurrent or "
            f"convolutional, or the mask ignores position ids; {allowed}"
        )


def _without_adapter(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def _prove_head(model: Any, where: str) -> None:
    """Refuse a model whose logits are not those of its `Head`, at positions counted from 0.

    Names of settings do not tell: HyperCLOVA X multiplies by the `logits_scaling` that Granite divides by. RoBERTa counts from 2.
    """
    ids_BL = torch.arange(8, device=model.device).remainder(model.config.get_text_config().vocab_size)[None]
    expected_BLV = model(input_ids=ids_BL, use_cache=False).logits.float()
    positions_BL = torch.arange(ids_BL.shape[1], device=model.device)[None]
    found_BLV = output_head(model).logits(last_hidden(model, ids_BL, None, positions_BL), expected_BLV.shape[-1])
    if _differ(found_BLV, expected_BLV, model.dtype):
        raise ConfigError(
            f"{where}: {type(model).__name__} changes its logits, or counts positions, in a way this project does not know; "
            "known: soft-cap (Gemma), logit_scale (Cohere), logits_scaling (Granite)"
        )


def _differ(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """By more than rounding explains: bf16 keeps 8 bits, and a model rounds after every step."""
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    return not (found - expected).abs().max() <= tolerance * expected.abs().max()


@contextlib.contextmanager
def loading(model: str, where: str) -> Iterator[str]:
    """Gives the folder or hub name to load from, without progress bars; what goes wrong inside is a ConfigError at `where`."""
    try:
        with without_progress_bars():
            yield locate_model(model, where)
    except ConfigError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{where}: {model} {_cause(error, where)}") from error


def _cause(error: BaseException, where: str) -> str:
    """Why a model could not be loaded, in words; hub errors are wrapped several times over."""
    names, link = set(), error
    while link is not None:
        names |= {c.__name__ for c in type(link).__mro__}
        link = link.__cause__ or link.__context__  # type: ignore[assignment]
    if "GatedRepoError" in names:
        return "is gated: accept its licence on the hub and set HF_TOKEN in the environment"
    if "LocalEntryNotFoundError" in names or "OfflineModeIsEnabled" in names:
        return "is no local folder, is not in the hub's cache, and the hub cannot be reached (offline?); give a local folder"
    if "RevisionNotFoundError" in names:
        return f"has no such revision on the hub; see {where.removesuffix('model')}revision"
    if "RepositoryNotFoundError" in names:
        return "is neither a local folder nor a model on the hub (or it is private: set HF_TOKEN)"
    if "trust_remote_code" in str(error):
        return f"comes with its own Python code; after reading that code set {where.removesuffix('model')}trust_remote_code: true"
    return f"cannot be loaded: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"

"""Which models and which text do the tests run on? Tokenizer, teacher, student and passages, made on the spot in seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)

TASK = """
task: next_words
dataset_path: json
dataset_kwargs: {data_files: {test: "${SUITE}/tasks/items.jsonl"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
SUITE = "name: own\nversion: 3\ntasks: tasks\nbenchmarks:\n  next_words: {metric: acc_norm}\n"
SHAPE = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
"""Of models of any architecture whose weights are never kept."""


@dataclass(frozen=True)
class World:
    teacher: Path
    """Folder of a Llama of 4 layers, with its tokenizer."""
    student: Path
    """Folder of a Llama of 2 layers with other weights and the same tokenizer."""
    data: Path
    """JSONL, 200 lines of `{"text": ...}`, 20 to 60 tokens each."""


def make_world(folder: Path, tied: bool = False) -> World:
    """The same bytes for the same arguments. `tied`: both models share input and output embeddings."""
    tokenizer = make_tokenizer()
    world = World(folder / "teacher", folder / "student", folder / "passages.jsonl")
    for path, num_layers, seed in ((world.teacher, 4, 0), (world.student, 2, 1)):
        make_llama(num_layers, seed, tied=tied).save_pretrained(path)
        tokenizer.save_pretrained(path)
    write_lines(world.data, [{"text": text} for text in passages(tokenizer)])
    return world


def make_tokenizer() -> Any:
    """Byte-level BPE over `VOCABULARY` tokens; `<|pad|>` is 0 and `<|end|>` (eos) is 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(english_paragraphs(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_llama(num_layers: int, seed: int, tied: bool = False, vocabulary: int = VOCABULARY) -> Any:
    """Random weights that matter: with the usual 0.02 every layer is nearly the identity and every prediction nearly uniform.

    1/√64 keeps each layer's output as large as its input; doubling the head gives logits of standard deviation about 2.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.125,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    return model


def english_paragraphs() -> list[str]:
    """Real prose from the standard library: the language reference, one paragraph an item."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def passages(tokenizer: Any, count: int = 200, shortest: int = 20, longest: int = 60) -> list[str]:
    """The first `count` distinct paragraphs of `shortest` to `longest` tokens."""
    chosen = []
    for text in dict.fromkeys(english_paragraphs()):
        if shortest <= len(tokenizer(text)["input_ids"]) <= longest:
            chosen.append(text)
        if len(chosen) == count:
            return chosen
    raise AssertionError(f"only {len(chosen)} paragraphs of {shortest} to {longest} tokens")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_suite(folder: Path, texts: list[str]) -> None:
    """A user's suite of one task: which of three ends has the passage? One item a text."""
    words = [text.split() for text in texts]
    ends = [" ".join(one[-4:]) for one in words]
    items = [
        {"context": " ".join(one[:-4]), "choices": [ends[number], ends[number - 1], ends[number - 2]], "gold": 0}
        for number, one in enumerate(words)
    ]
    write_lines(folder / "tasks" / "items.jsonl", items)
    (folder / "tasks" / "next_words.yaml").write_text(TASK, encoding="utf-8")
    (folder / "suite.yaml").write_text(SUITE, encoding="utf-8")

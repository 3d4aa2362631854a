"""Which losses does each kind of trial have in its first ten steps? The tiny model's, kept in `golden/curves.json`.

`python tests/golden.py` writes the file again; a change of numerics shows as its diff, and is to be explained there. It depends
on no version of Python or of the tokenizers: the text is made by a rule, and every byte is a token.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, get_args

import conftest  # noqa: F401  # the tests' environment, before torch is imported
import torch
from tiny import CHAT_TEMPLATE, make_llama, write_lines

from neo_ray import data
from neo_ray.bench_step import process_group
from neo_ray.config import DataConfig
from neo_ray.parts import ModelSource, Sources, load_parts
from neo_ray.settings import DistillConfig, Divergence, EvaluationConfig, LoraConfig, TrainingConfig, TrialConfig
from neo_ray.train import train

FILE = Path(__file__).parent / "golden" / "curves.json"
CPU = torch.device("cpu")
KEPT = ("train_loss", "select_ce")
Curve = list[dict[str, float]]


def a_trial(method: str = "neo", lora: dict[str, Any] | None = None, **sections: Any) -> TrialConfig:
    """Ten steps in fp32, with three evaluations."""
    return TrialConfig(
        method=method,  # type: ignore[arg-type]
        lora=LoraConfig(**{"rank": 4, "alpha": 8, **(lora or {})}),
        training=TrainingConfig(learning_rate=5e-3, steps=10, batch_size=4, micro_batch_size=2, dtype="fp32"),
        evaluation=EvaluationConfig(points=3, max_tokens=500),
        **sections,
    )


PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}}
TRIALS: dict[str, TrialConfig] = {
    **{method: a_trial(method) for method in ("sft", "lora", "kd", "neo")},
    **{variant: a_trial(lora={"variant": variant}) for variant in ("rslora", "dora", "pissa", "olora", "moslora")},
    "plus": a_trial(lora={"plus_ratio": 4}),
    "patterns": a_trial(lora=PATTERNS),
    "whole layers": a_trial(lora={"modules_to_save": ("lm_head",)}),
    **{name: a_trial(distill=DistillConfig(divergence=name)) for name in get_args(Divergence) if name != "forward_kl"},
    "alignment": a_trial(distill=DistillConfig(alignment_weight=1, alignment_layers=((0, 1), (-1, -1)))),
}


def sources(folder: Path) -> Sources:
    """A teacher of four layers, a student of two, and sentences that they can learn."""
    tokenizer = byte_tokenizer()
    for name, num_layers, seed in (("teacher", 4, 0), ("student", 2, 1)):
        make_llama(num_layers, seed).save_pretrained(folder / name)
    write_lines(folder / "sentences.jsonl", [{"text": text} for text in sentences(120)])
    settings = DataConfig(source=str(folder / "sentences.jsonl"), max_length=64, select_fraction=0.2, report_fraction=0.1)
    prepared = data.prepare(settings, settings.source, tokenizer, folder / "cache")
    student, teacher = ModelSource(str(folder / "student")), ModelSource(str(folder / "teacher"))
    return Sources(student, str(prepared), teacher, len(tokenizer), tokenizer.pad_token_id)


def byte_tokenizer() -> Any:
    """One token a byte; `<|pad|>` is 0 and `<|end|>` (eos) is 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<|pad|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def sentences(count: int) -> list[str]:
    """`who does what`, numbered, so that no two are the same."""
    who, does = ("the cat", "a small dog", "my sister", "nobody"), ("sees", "likes", "paints", "forgets", "carries")
    what = ("the red house", "a song", "old bread", "seven stones", "the sea", "some tea", "a letter")
    return [f"{who[i % 4]} {does[i * 7 % 5]} {what[i * 3 % 7]} {i}" for i in range(count)]


def curve(trial: TrialConfig, where: Sources) -> Curve:
    """What is kept of every evaluation of a trial, to seven digits."""
    rows: list[dict[str, Any]] = []
    outcome = train(trial, load_parts(where, trial, CPU), rows.append)
    assert outcome.state == "COMPLETE", outcome.error
    return [{key: float(f"{row[key]:.7g}") for key in KEPT} for row in rows]


def stored() -> dict[str, Curve]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, process_group(CPU):
        where = sources(Path(folder))
        lines = [f"{json.dumps(name)}: {json.dumps(curve(trial, where))}" for name, trial in TRIALS.items()]
    FILE.parent.mkdir(exist_ok=True)
    part = FILE.with_suffix(".part")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(part, FILE)
    print(f"{len(lines)} curves in {FILE}")


if __name__ == "__main__":
    main()

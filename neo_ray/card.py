"""What is said of an exported model? Its card: base, licence, setting and scores, as Markdown under a front matter."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from neo_ray.config import SweepConfig
from neo_ray.evidence import number
from neo_ray.records import TrialRecord
from neo_ray.searching import of_suite

LICENCE_FIELDS = ("license", "license_name", "license_link")
UNKNOWN = {"license": "unknown"}
WHOLE = "Plain transformers loads the model, plain peft the adapter."
CUT = (
    "Plain transformers loads the model, and that is the way to it: the adapter is for the cut student, which is not in this "
    "folder and goes by no name of its own; put on the whole model it is of no use."
)
"""Of a student that was cut from its teacher."""


def card(record: TrialRecord, alone: SweepConfig, facts: dict[str, Any]) -> str:
    """The card of a trial's merged model.

    Args:
        alone: the sweep of this one trial.
        facts: what `export.json` says.
    """
    base, licence, teacher = facts["base"], facts["license"], alone.teacher if alone.trial.has_teacher else None
    front = {
        "base_model": base["model"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **licence,
        "tags": ["neo_ray", "lora", *(["llm-neo", "distillation"] if teacher else [])],
    }
    layers = f" cut to its layers {', '.join(map(str, base['layers']))}" if base["layers"] else ""
    distilled = f", distilled from `{teacher.model}`" if teacher else ""
    command = f"python -m neo_ray.export {shlex.quote(facts['results'])} --trial {record.id} --dtype {facts['dtype']}"
    setting = {"method": alone.method, "variant": alone.lora.variant, "seed": alone.seed, **record.params}
    untrained = record.details.get("baseline") or {}
    scores = [(name, _number(untrained.get(name)), *_score(score)) for name, score in facts["scores"].items()]
    found = [f"- {line['claim']} ({line['verdict']})" for line in facts.get("guidelines", ())]
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {facts['sweep']}, trial {record.id}",
        f"`{base['model']}`{layers}, trained on `{alone.data.source}`{distilled}. The adapter is merged in fp32; the weights are "
        f"written in {facts['dtype']}. {CUT if base['layers'] else WHOLE}",
        "## Setting\n\n" + _rows(("", ""), [(name, number(value)) for name, value in setting.items()]),
        f"`trial.yaml` has all of it; `python -m neo_ray.sweep trial.yaml` trains it again. `{command}` wrote this "
        f"folder; the sweep's own file has the sha256 `{facts['sweep_sha256']}`.",
        "## Held-out scores\n\n" + _rows(("", "untrained", "trial", "merged model", "difference"), scores),
        f"CE is in nats per token, and may differ by {facts['tolerance']:g}. The trial was scored in {facts['trial_dtype']}, the "
        "merged model in float32.",
        *_benchmarks(record, untrained),
        *(["## What the sweep found\n\n" + "\n".join(found)] if found else []),
        "## Licence\n\n" + ("Unknown: the base model names none." if licence == UNKNOWN else "That of the base model."),
    ]
    return "\n\n".join(sections) + "\n"


def licence_of(model: str, revision: str | None) -> tuple[dict[str, str], list[Path]]:
    """What the card of a model (folder or hub name) says of its licence, and the files that hold it.

    `license: unknown` where nothing is said, or where the hub cannot be reached.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=["README.md", "LICENSE*", "NOTICE*"]))
        except (OSError, ValueError):
            return UNKNOWN, []
    files = sorted(path for path in folder.iterdir() if path.name.startswith(("LICENSE", "NOTICE")) and path.is_file())
    front = _front_matter(folder / "README.md")
    fields = {name: str(front[name]) for name in LICENCE_FIELDS if front.get(name)}
    texts = [path.name for path in files if path.name.startswith("LICENSE")]
    if not fields and texts:
        fields = {"license": "other", "license_link": texts[0]}
    return fields or UNKNOWN, files


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; nothing where there is none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    try:
        found = yaml.safe_load(text[4:].partition("\n---")[0]) if text.startswith("---\n") else {}
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _benchmarks(record: TrialRecord, untrained: dict[str, float | None]) -> list[str]:
    """The table of a suite's scores, where the trial was asked one."""
    names = [name for name in record.metrics if of_suite(name)]
    if not names:
        return []
    rows = [(name, _number(untrained.get(name)), _number(record.metrics[name])) for name in names]
    some = record.details.get("suite_limit")
    items = "all items" if some is None else f"the first {some} items of each task"
    title = f"## Benchmarks\n\n{record.details.get('suite', 'A suite')}, {items}: shares of right answers, their mean first.\n\n"
    return [title + _rows(("", "untrained", "trial"), rows)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _score(score: dict[str, float]) -> tuple[str, str, str]:
    return f"{score['before']:.6f}", f"{score['after']:.6f}", f"{score['difference']:+.1e}"


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))

"""Which fields can a sweep file have? The tables of docs/reference.md, rendered from the schema.

`python tests/reference.py` writes them again; test_readme.py compares. A field's words are its docstring in neo_ray/config.py or
neo_ray/settings.py; those that have none there have theirs here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from neo_ray.config import Axis, SweepConfig
from neo_ray.settings import trial_leaves

FILE = Path(__file__).parent.parent / "docs" / "reference.md"
BEGIN, END = "<!-- fields: begin -->", "<!-- fields: end -->"
WORDS = {
    "seed": "Of the adapter's start, the order of the data and dropout. A grid repeats every setting with `sampler.seeds`.",
    "lora.dropout": "On the input of the branch.",
    "student.revision": "Hub revision of `student.model`; pin it for a sweep that others repeat.",
    "student.trust_remote_code": "As for the teacher.",
    "training.weight_decay": "AdamW's decoupled weight decay, on all that is trained.",
    "training.beta1": "AdamW's decay of the first moment.",
    "training.beta2": "AdamW's decay of the second moment.",
    "evaluation.batch_size": "Sequences of one forward pass of an evaluation, on one worker.",
    "resources.cpus_per_worker": "CPUs of a worker, and its number of threads.",
    "search.AXIS.grid": "Every value of a list. `sampler.name: grid` runs all combinations; other samplers draw from it.",
    "search.AXIS.choice": "The same as `grid`.",
    "search.AXIS.uniform": "[low, high]",
    "search.AXIS.log_uniform": "[low, high], uniform in the logarithm; low above 0.",
    "search.AXIS.int_uniform": "[low, high], whole numbers, both ends included.",
    "search.AXIS.of": "The axis or leaf that the value is computed from: times × of + plus.",
    "search.AXIS.times": "Goes with `of`.",
    "search.AXIS.plus": "Goes with `of`.",
}
NAMES = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", Any: "any value"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def fields() -> Iterator[tuple[str, str, FieldInfo]]:
    """(section, name, field) of everything that a sweep file can hold; the sections in the file's order."""
    top = [(name, field) for name, field in SweepConfig.model_fields.items() if section_of(field) is None]
    yield from (("", name, field) for name, field in sorted(top, key=lambda item: not item[1].is_required()))
    for name, field in SweepConfig.model_fields.items():
        if name == "search":
            yield from (("search.AXIS", leaf, f) for leaf, f in Axis.model_fields.items())
        elif section := section_of(field):
            yield from _inside(name, section)


def _inside(path: str, section: type[BaseModel]) -> Iterator[tuple[str, str, FieldInfo]]:
    yield from ((path, name, field) for name, field in section.model_fields.items())
    for name, field in section.model_fields.items():
        inner = section_of(field)
        if inner and inner not in TOP:  # what a phase has as a sweep has it stands there
            yield from _inside(f"{path}.{name}", inner)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one."""
    options = (field.annotation, *get_args(field.annotation))
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel) and o is not Axis), None)


TOP = {field.annotation: name for name, field in SweepConfig.model_fields.items() if section_of(field) is field.annotation}
"""Section → where it stands in a sweep file."""


def words_of(path: str, field: FieldInfo) -> str:
    return " ".join((field.description or WORDS.get(path, "")).split())


def path_of(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def kind(annotation: Any, metadata: list[Any]) -> str:
    """A type as the file's author thinks of it."""
    bounds = [f"{sign} {getattr(m, name):g}" for m in metadata for name, sign in BOUNDS.items() if hasattr(m, name)]
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(inner[0], [*inner[1:], *(m for i in inner[1:] for m in getattr(i, "metadata", ()))])
    if origin in (Union, UnionType):
        options = [option for option in inner if option is not type(None)]  # null is what unsets any of them
        return ", or ".join(kind(option, metadata if option in (int, float) else []) for option in options)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in inner)
    if origin is tuple:
        return f"list: {kind(inner[0], [])}" if inner[-1] is Ellipsis else f"list of {len(inner)}: {kind(inner[0], [])}"
    if origin is dict:
        return f"mapping: {kind(inner[0], [])} → {kind(inner[1], [])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "axis" if annotation is Axis else "section"
    return " ".join([NAMES[annotation], ", ".join(bounds)]).strip()


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        return ""
    return f"`{json.dumps(field.default).strip(chr(34))}`"


def rendered() -> str:
    """All tables, one a section."""
    leaves, lines, last = set(trial_leaves().values()), [], None
    for section, name, field in fields():
        if section != last:
            lines += ["", f"## {section or 'At the top'}", "", "| field | type | default | meaning |", "|---|---|---|---|"]
            last = section
        path = path_of(section, name)
        mark = " ◆" if path in leaves else ""
        shown = f"as `{TOP[field.annotation]}`" if section and field.annotation in TOP else kind(field.annotation, field.metadata)
        cells = (f"`{name}`{mark}", shown, default(field), words_of(path, field))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n\n"


def main() -> None:
    text = FILE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    part = FILE.with_suffix(".part")
    part.write_text(f"{before}{BEGIN}\n{rendered()}{END}{after}", encoding="utf-8")
    os.replace(part, FILE)
    print(FILE)


if __name__ == "__main__":
    main()

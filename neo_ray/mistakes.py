"""How is a mistake in a file told? In one line: the path, the value, what is allowed, and a guess."""

from __future__ import annotations

import difflib
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistakes of a pydantic report, one line each, in the file's own words."""
    lines = []
    for item in error.errors()[:5]:
        path = [str(p) for p in item["loc"] if not (isinstance(p, str) and ("[" in p or p in ("int", "str", "constrained-int")))]
        where, kind = ".".join(path), item["type"]
        if kind == "extra_forbidden":
            known = _fields_at(root, path[:-1])
            lines.append(f"{where}: unknown key{guess(path[-1], known)}; allowed: {', '.join(known)}")
        elif kind == "missing":
            lines.append(f"{where}: is required")
        else:
            lines.append(f"{where}: {reason(item)}" if path else reason(item))  # a message about several sections names them
    return "; ".join(dict.fromkeys(lines))


_IN_THE_FILES_WORDS = {
    "model_type": "must be a mapping of keys",
    "dict_type": "must be a mapping of keys",
    "tuple_type": "must be a list",
    "string_type": "must be text",
}


def reason(item: Any) -> str:
    """What is wrong with one value, from an item of a pydantic report: message, value and a guess."""
    value, known = item["input"], item.get("ctx", {}).get("expected")
    message = _IN_THE_FILES_WORDS.get(item["type"], item["msg"].removeprefix("Value error, "))
    if item["type"] == "string_type" and isinstance(value, (int, float)):
        message += "; put a number in quotes"
    if isinstance(value, (list, tuple)) and item["type"] in (
        "int_type",
        "float_type",
        "string_type",
        "literal_error",
        "bool_type",
    ):
        message += "; several values to try go under `search`, as {choice: [...]} or {grid: [...]}"
    shown = "" if isinstance(value, (dict, BaseModel)) else f" (got {value!r})"
    return f"{message}{shown}{guess(value, known)}"


def _fields_at(root: type[BaseModel], path: list[str]) -> list[str]:
    """The fields of the section at a path; a key that is none of a section's own names an entry of a mapping of sections."""
    node: Any = root
    for part in path:
        if part not in node.model_fields:
            continue
        annotation = node.model_fields[part].annotation
        options = get_args(annotation) if get_origin(annotation) in (Union, type(int | str), dict) else (annotation,)
        node = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), node)
    return list(node.model_fields)


def guess(word: Any, known: Any) -> str:
    """` (did you mean `x`?)`, or nothing."""
    if isinstance(known, str):
        known = [k.strip(" '") for k in known.replace(" or ", ",").split(",")]
    close = difflib.get_close_matches(str(word), [str(k) for k in known or []], n=1, cutoff=0.6)
    return f" (did you mean `{close[0]}`?)" if close else ""

"""How is a sweep file read and written? YAML and `key=value` overrides to a config, and a config back to YAML."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from neo_ray.config import AXIS_KINDS, SweepConfig
from neo_ray.mistakes import explain
from neo_ray.settings import ConfigError


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> SweepConfig:
    """Read a sweep file and apply `key=value` overrides (YAML values, dotted keys).

    Raises:
        ConfigError: one line that names the path, the value, what is allowed, and a guess.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    raw = _parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError(f"{path}: a sweep file is a mapping of sections, and this one holds {found}")
    for override in overrides:
        _apply_override(raw, override)
    return validate(raw)


def validate(raw: dict[str, Any]) -> SweepConfig:
    """A sweep from plain data (as read back from a results folder). Raises ConfigError."""
    try:
        return SweepConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error, SweepConfig)) from None


def dump(config: BaseModel) -> str:
    """The resolved config as YAML that loads back to the same tree."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def plain(config: BaseModel) -> dict[str, Any]:
    """Plain data (JSON types) of a config. An axis keeps only what was set: an unset kind is not an empty one."""
    data = json.loads(config.model_dump_json())
    if isinstance(config, SweepConfig):
        data["search"] = {k: json.loads(a.model_dump_json(exclude_unset=True)) for k, a in config.search.items()}
    return data


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice (PyYAML silently keeps the last) and reads 1e-4 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key_node.value}` stands twice", key_node.start_mark
                )
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep)


# YAML 1.2 numbers; PyYAML keeps to 1.1, where a mantissa without a point makes a string.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"override `{override}`: write key=value, e.g. training.learning_rate=1e-4")
    node, parts = raw, key.strip().split(".")
    if parts[0] == "search" and len(parts) > 1:  # axis names may hold dots themselves
        kind = parts[-1] if len(parts) > 2 and parts[-1] in AXIS_KINDS else None
        name = ".".join(parts[1:-1] if kind else parts[1:])
        if kind:  # one kind takes the place of another; conditions stay
            axis = (raw.get("search") or {}).get(name)
            kept = {k: v for k, v in axis.items() if k in ("when", "sets")} if isinstance(axis, dict) else {}
            raw["search"] = {**(raw.get("search") or {}), name: kept}
        parts = ["search", name, *([kind] if kind else [])]
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        if not isinstance(node[part], dict):
            raise ConfigError(f"override `{override}`: `{part}` is a value, not a section")
        node = node[part]
    value = _parse_yaml(text, f"override `{override}`")
    if value is None and parts[0] in ("search", "student", "teacher"):
        node.pop(parts[-1], None)  # null takes an axis or a source away
    else:
        node[parts[-1]] = value

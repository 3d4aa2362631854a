"""Is the repository fit to be cloned elsewhere? No trace of one machine, every dependency declared and pinned, no long file."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 400
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# The brackets keep these lines from finding themselves.
TRACES = {
    "a package registry's host": re.compile(
        r"pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org|registry[.]npmjs|conda[.]anaconda|docker[.]io|gh[c]r[.]io|quay[.]io"
    ),
    "an option that names a registry": re.compile(r"--(extra-)?index[-]url|--find[-]links"),
    "a path of one machine": re.compile(r"(?<![\w.~}-])/(work|root|home|Users)/|file:[/]{3}"),
}


def text_files() -> dict[str, str]:
    """Path → content of every file that git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    files = {}
    for name in filter(None, names):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in content:
            files[name] = content.decode("utf-8")
    return files


def traces(text: str) -> list[str]:
    return [what for what, pattern in TRACES.items() if pattern.search(text)]


def canonical(name: str) -> str:
    """A distribution's name as indexes compare it: `types_PyYAML` and `types-pyyaml` are one."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(extras: bool = True) -> set[str]:
    """The distributions that pyproject.toml asks for."""
    wanted = list(PROJECT["dependencies"])
    if extras:
        wanted += [name for names in PROJECT["optional-dependencies"].values() for name in names]
    return {canonical(re.split(r"[\[<>=!~; ]", name)[0]) for name in wanted}


def pins() -> list[tuple[str, str]]:
    """(distribution, version) of each line of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.partition("==") for line in lines if line.strip() and not line.startswith("#")]
    return [(canonical(name), version) for name, _, version in pairs]


def test_no_line_names_a_registry_or_a_path_of_one_machine() -> None:
    found = [
        f"{name}:{number}: {what}"
        for name, text in text_files().items()
        for number, line in enumerate(text.splitlines(), 1)
        for what in traces(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "parts",
    [
        ("https://", "pypi", ".org/simple"),
        ("pip install --index", "-url https://example.com"),
        ("PIP_ARGS=--find", "-links ."),
        ("cd /wo", "rk/main"),
        ("`/ro", "ot/.cache`"),
        ("path: /ho", "me/somebody/data"),
        ("file", ":///opt/wheels"),
    ],
)
def test_a_trace_is_found(parts: tuple[str, ...]) -> None:
    assert len(traces("".join(parts))) == 1


@pytest.mark.parametrize("text", ["~/work/x", "frame/work/y", "https://example.com/home/page", "$HOME/root/z", "/mnt/shared"])
def test_what_only_looks_like_a_trace_is_none(text: str) -> None:
    assert traces(text) == []


def test_no_room_is_larger_than_one_can_read() -> None:
    sizes = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / "neo_ray").rglob("*.py")}
    assert sizes and {name: lines for name, lines in sizes.items() if lines > MAX_LINES} == {}


def test_constraints_pin_exact_versions_once() -> None:
    names = [name for name, _ in pins()]
    assert len(names) == len(set(names))
    assert [pin for pin in pins() if not re.fullmatch(r"[0-9][0-9a-z.]*", pin[1])] == []  # no local build tag, URL or range


def test_every_dependency_is_pinned() -> None:
    assert declared() - {name for name, _ in pins()} == set()


def test_every_import_is_a_declared_dependency() -> None:
    known, wanted = packages_distributions(), declared(extras=False)
    missing = {}
    for path in (ROOT / "neo_ray").rglob("*.py"):
        for module in _outside_modules(ast.parse(path.read_text(encoding="utf-8"))):
            if not wanted & {canonical(name) for name in known.get(module, [module])}:
                missing[module] = path.name
    assert not missing, f"add to dependencies in pyproject.toml: {missing}"


def _outside_modules(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"neo_ray"}


@pytest.mark.parametrize("target", PROJECT["scripts"].values())
def test_every_command_exists(target: str) -> None:
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))

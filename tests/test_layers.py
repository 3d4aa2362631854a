"""Does every import go down? The floors of the house, and what each may import, read from the source of every module.

Reference: an import of any form counts, also one inside a function or under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "neo_ray"

ROOMS = {
    "facts": (
        "account assets axes budget cautions config continuations environment estimate inventory loading memory mistakes outbox "
        "phases plan plan_text points price records refusals scores searching settings shapes space staging storage supply "
        "trials uploads warm weights wordings"
    ),
    "training": (
        "adapters alignment answers batches benchmarks checkpoints chunked data devices filling harness heldout local losses "
        "merging models parts placement prepare pruning quickstart scaling sources stores student suites teaching train"
    ),
    "analysis": (
        "arms aspects card charts choosing confirmed crosscheck drafts drawing effects evidence extensions figures "
        "foreign guidelines histories hypotheses importances intervals interplay knee law_text laws luck matrix page paired "
        "pareto phase_text pooling printing questions report rungs screen slices stability startup statistics suite_charts "
        "suite_claims surface trends upcoming "
    ),
    "ray": (
        "access board builder cluster crew faults handover lease listening loggers mirror progress relay running schedulers "
        "searcher slot slots steering storehouse trackers tuner"
    ),
    "doors": (
        "__init__ analyze bench bench_loss bench_others bench_pairs bench_reader bench_step bench_summary bench_sweep "
        "bench_turns door evaluate export ground notebook status sweep targets"
    ),
}
ROOM = {module: room for room, modules in ROOMS.items() for module in modules.split()}
FLOOR = {"facts": 0, "training": 1, "analysis": 1, "ray": 2, "doors": 3}

# What imports torch counts as torch: it takes as long to import, and fails where torch is not installed.
TORCH = {"torch", "transformers", "peft", "deepspeed", "accelerate"}
FORBIDDEN = {"facts": {*TORCH, "ray"}, "training": {"ray"}, "analysis": {*TORCH, "ray"}, "ray": set(), "doors": set()}
WITHOUT_RAY = {"lease", "progress", "running"}
"""They stand with ray, and need none of it: a lease is taken before Ray starts, and a bar is drawn without it."""
QUICK_DOORS = ("__init__", "analyze", "bench", "evaluate", "export", "notebook", "status", "sweep", "targets")
"""Doors that answer `--help`, `--dry-run` and a mistake in a file before anything heavy is imported."""


def imports(source: str) -> Iterator[str]:
    """Everything that a module imports, with full dotted names: `from neo_ray import x` and `from . import x` are neo_ray.x."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, ("neo_ray" if node.level else "", node.module)))
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def _called(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def violations(module: str, source: str) -> list[str]:
    """What a module imports and may not."""
    room = ROOM[module]
    forbidden = FORBIDDEN[room] | ({"ray"} if module in WITHOUT_RAY else set())
    found = []
    for name in imports(source):
        top, _, rest = name.partition(".")
        if top in forbidden:
            found.append(f"{module} ({room}) imports {top}")
        target = rest.split(".")[0] if top == "neo_ray" else ""
        target = target if target in ROOM else "__init__" if top == "neo_ray" else ""
        if target and not _may_import(room, ROOM[target]):
            found.append(f"{module} ({room}) imports {target} ({ROOM[target]})")
    return list(dict.fromkeys(found))


def _may_import(room: str, other: str) -> bool:
    return room == other or FLOOR[other] < FLOOR[room]


def modules() -> dict[str, list[Path]]:
    """Module → its files: one, or those of a folder of the same name."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(path)
    return found


def test_every_module_has_a_floor() -> None:
    missing = sorted(set(modules()) - set(ROOM))
    assert not missing, f"say in ROOMS where these stand: {missing}"


def test_no_import_goes_up_or_across() -> None:
    known = [(m, path) for m, paths in modules().items() if m in ROOM for path in paths]
    found = [line for module, path in known for line in violations(module, path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("config", "import torch.nn"),
        ("config", "from ray import tune"),
        ("space", "def f():\n    import ray.train as t"),
        ("plan", "from neo_ray import quickstart"),
        ("records", "from .train import train"),
        ("records", "from . import config, train"),
        ("losses", "import neo_ray.report"),
        ("losses", "import importlib\nimportlib.import_module('ray')"),
        ("report", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from neo_ray.losses import neo_loss"),
        ("report", "from transformers import AutoTokenizer"),
        ("tuner", "from neo_ray.sweep import main"),
        ("lease", "import ray"),
    ],
)
def test_an_upward_import_is_found_in_every_form(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("space", "from neo_ray.config import Axis"),
        ("losses", "import torch\nfrom neo_ray import config"),
        ("train", "from neo_ray.losses import neo_loss"),
        ("slot", "import ray\nimport rayon\nfrom neo_ray.train import train"),
        ("sweep", "from neo_ray.tuner import run\nfrom neo_ray.report import markdown"),
    ],
)
def test_a_downward_import_is_allowed(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_doors_and_what_needs_no_torch_import_neither_torch_nor_ray() -> None:
    """In a process of its own, so that what a library drags in counts too."""
    names = [m for m in modules() if m in QUICK_DOORS or ROOM.get(m) in ("facts", "analysis")]
    code = "\n".join(
        [
            "import importlib, sys",
            f"for name in {names!r}:",
            "    importlib.import_module('neo_ray' if name == '__init__' else f'neo_ray.{name}')",
            f"    heavy = sorted({ {*TORCH, 'ray'}!r} & set(sys.modules))",
            "    assert not heavy, f'neo_ray.{name} imports {heavy}'",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


def test_what_stands_on_the_head_for_each_trial_imports_no_torch() -> None:
    code = (
        f"import sys, neo_ray.relay; heavy = sorted({TORCH!r} & set(sys.modules)); sys.exit(f'imports {{heavy}}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120)
    assert done.returncode == 0, done.stderr

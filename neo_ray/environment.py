"""Where did this run? Versions, revision and hardware for `environment.json`. No environment variables: they may hold tokens."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "neo_ray",
    "ray",
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "datasets",
    "optuna",
    "accelerate",
    "lm_eval",
    "numpy",
    "pandas",
)


def environment() -> dict[str, Any]:
    """Plain data; a package that is not installed is null."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "git_revision": _revision(Path(__file__).resolve().parent),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _revision(here: Path) -> str | None:
    """The checkout's commit; `-changed` when its tracked files differ from it, measured figures aside: they run nothing, and a
    benchmark's are written before the next one begins."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10)
        but_figures = ["--", ":/", ":(top,exclude)docs/benchmarks"]
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", *but_figures], cwd=here, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("-changed" if changed.returncode else "")

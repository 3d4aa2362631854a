"""Which benchmarks, in which version? Suites of tasks of the LM Evaluation Harness, made ready in a folder. Imports no torch.

A suite is a YAML file: `name`, `version`, `shots` and `benchmarks`, each a task or group of the harness with the metric that
counts. The average of a suite is the unweighted mean over its benchmarks, a benchmark's value the mean over its items.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from neo_ray import continuations, quickstart
from neo_ray.mistakes import guess
from neo_ray.settings import ConfigError

SHIPPED = Path(__file__).parent / "suites"
FILE = "suite.yaml"
HERE = "${SUITE}"
"""In a file of a suite: the folder that it was made ready in, with `tasks/` and `items/`."""


class Benchmark(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    metric: str
    """Of those that the task states; its mean over items is the benchmark's value."""
    passages: str | None = None
    """A text of the quickstart: the items are continuations of its passages, made by `continuations.make_items`."""


class Suite(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    version: int = Field(ge=1)
    """Raised with every change that changes a score."""
    shots: int = Field(0, ge=0)
    """Solved examples before each item; a task whose own file says 0 keeps that."""
    tasks: str | None = None
    """A folder of task files, beside this one; the harness's own tasks are not looked at then."""
    benchmarks: dict[str, Benchmark] = Field(min_length=1)
    """Task or group → its metric. A group's value is the mean over the items of all its tasks."""

    @property
    def title(self) -> str:
        return f"{self.name} v{self.version}"


def shipped() -> tuple[str, ...]:
    """Names of the suites that come with neo_ray."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def find(name: str) -> Path:
    """The file of a shipped suite, or of a user's: `name` is then a YAML file, or a folder with a `suite.yaml`.

    Raises:
        ConfigError: no such suite.
    """
    if (SHIPPED / f"{name}.yaml").is_file():
        return SHIPPED / f"{name}.yaml"
    path = Path(name).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        allowed = f"{', '.join(shipped())}, a YAML file, or a folder with {FILE}"
        raise ConfigError(f"evaluation.suite: {name} is no suite{guess(name, shipped())}; allowed: {allowed}")
    return path


def read(path: Path) -> Suite:
    """
    Raises:
        ConfigError: the file is none of a suite.
    """
    try:
        return Suite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ConfigError(f"evaluation.suite: {path}: no YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"evaluation.suite: {path}: {where}: {first['msg']}") from None


def make_ready(name: str, cache: Path, announce: Callable[[str], None] = print) -> Path:
    """A folder in `cache` that holds all of a suite but the harness and the hub's data sets; named by its content.

    Raises:
        ConfigError: no such suite, or a text of it cannot be fetched.
    """
    path = find(name)
    suite = read(path)
    files = {FILE: suite.model_dump_json(indent=1)}
    if suite.tasks is not None:
        folder = path.parent / suite.tasks
        if not folder.is_dir():
            raise ConfigError(f"evaluation.suite: {path}: tasks: {folder} is no folder")
        files |= {
            f"tasks/{p.relative_to(folder)}": p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*")) if p.is_file()
        }
    for task, benchmark in suite.benchmarks.items():
        if benchmark.passages is not None:
            text = quickstart.fetch(benchmark.passages, cache, announce)
            passages = [json.loads(line)["text"] for line in Path(text).read_text(encoding="utf-8").splitlines()]
            files[f"items/{task}.jsonl"] = "".join(json.dumps(item) + "\n" for item in continuations.make_items(passages))
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]

    target = cache / "suites" / f"{suite.name}-{suite.version}-{digest}"

    def write(part: Path) -> None:
        for file, text in files.items():
            (part / file).parent.mkdir(parents=True, exist_ok=True)
            (part / file).write_text(text.replace(HERE, str(target)), encoding="utf-8")

    return quickstart.made_once(target, write)

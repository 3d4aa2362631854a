"""Which benchmarks, in which version? Suites of tasks of the LM Evaluation Harness, made ready in a folder. Imports no torch.

A suite is a YAML file: `name`, `version`, `shots` and `benchmarks`, each a task or group of the harness with the metric that
counts. The average of a suite is the unweighted mean over its benchmarks, a benchmark's value the mean over its items.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from neo_ray import continuations, quickstart, wordings
from neo_ray.mistakes import guess
from neo_ray.settings import ConfigError

SHIPPED = Path(__file__).parent / "suites"
FILE = "suite.yaml"
MAKERS: dict[str, Callable[[Sequence[str], int | None], list[dict[str, Any]]]] = {
    "continuation": continuations.make_items,
    "order": wordings.order_items,
    "word": wordings.word_items,
}
HERE = "${SUITE}"
"""In a task file of a suite: the folder that the suite is in when it is opened, with `tasks/` and `items/`."""


class Benchmark(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    metric: str
    """Of those that the task states; its mean over items is the benchmark's value."""
    passages: str | None = None
    """A text of the quickstart that the items are made of."""
    kind: Literal["continuation", "order", "word"] = "continuation"
    """Of items made of passages: `continuations.make_items`, `wordings.order_items`, `wordings.word_items`."""
    count: int = Field(200, ge=1)
    """Items made of passages, at most."""


class Suite(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    version: int = Field(ge=1)
    """Raised with every change that changes a score."""
    shots: int = Field(0, ge=0)
    """Solved examples before each item; a task whose own file says 0 keeps that."""
    tasks: str | None = None
    """A folder of task files, beside this one; the harness's own tasks are not looked at then."""
    with_harness: bool = False
    """Look at them all the same, beside the `tasks`."""
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


def check(name: str) -> tuple[Path, Suite]:
    """The file of a suite and what it says, once all that it names is here, but for what the harness knows: tasks, their data.

    Raises:
        ConfigError: no such suite, no folder of its tasks, or no such text.
    """
    path = find(name)
    suite = read(path)
    if suite.tasks is not None and not (folder := path.parent / suite.tasks).is_dir():
        raise ConfigError(f"evaluation.suite: {path}: tasks: {folder} is no folder")
    for task, benchmark in suite.benchmarks.items():
        if benchmark.passages is not None:
            try:
                quickstart.known(benchmark.passages)
            except ConfigError as error:
                raise ConfigError(f"evaluation.suite: {path}: benchmarks.{task}.passages: {error}") from None
    return path, suite


def make_ready(name: str, cache: Path, announce: Callable[[str], None] = print) -> Path:
    """A folder in `cache` that holds all of a suite but the harness and the hub's data sets: `<name>-<version>-<digest of all>`.

    Raises:
        ConfigError: no such suite, or a text of it cannot be fetched.
    """
    path, suite = check(name)
    files = {FILE: suite.model_dump_json(indent=1)}
    if suite.tasks is not None:
        folder = path.parent / suite.tasks
        files |= {
            f"tasks/{p.relative_to(folder)}": p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*")) if p.is_file()
        }
    for task, benchmark in suite.benchmarks.items():
        if benchmark.passages is not None:
            text = quickstart.fetch(benchmark.passages, cache, announce)
            passages = [json.loads(line)["text"] for line in Path(text).read_text(encoding="utf-8").splitlines()]
            items = MAKERS[benchmark.kind](passages, benchmark.count)
            files[f"items/{task}.jsonl"] = "".join(json.dumps(item) + "\n" for item in items)
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]

    target = cache / "suites" / f"{suite.name}-{suite.version}-{digest}"

    def write(part: Path) -> None:
        for file, text in files.items():
            (part / file).parent.mkdir(parents=True, exist_ok=True)
            (part / file).write_text(text, encoding="utf-8")

    return quickstart.made_once(target, write)


@contextmanager
def task_files(folder: Path) -> Iterator[Path]:
    """The task files of a suite that was made ready, for as long as they are loaded: they know where it is on this machine."""
    with tempfile.TemporaryDirectory() as name:
        for path in (path for path in (folder / "tasks").rglob("*") if path.is_file()):
            resolved = Path(name) / path.relative_to(folder / "tasks")
            resolved.parent.mkdir(parents=True, exist_ok=True)
            resolved.write_text(path.read_text(encoding="utf-8").replace(HERE, str(folder.resolve())), encoding="utf-8")
        yield Path(name)

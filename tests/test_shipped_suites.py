"""Do the suites that come with neo_ray ask what they say? By the installed harness's own files, on made-up passages and problems.

No data of the hub is looked at: a task's file says which metrics it has, how they are summed up, and how many examples it shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_suites
import yaml
from lm_eval import tasks
from lm_eval.tasks._index import Kind
from test_suites import ask
from tiny import World, english_paragraphs, write_lines

from neo_ray import harness, suites
from neo_ray.assets import ASSETS

datasets_cache = test_suites.datasets_cache

FOLDERS = "arc hellaswag winogrande piqa openbookqa sciq mmlu/default cmmlu ceval gsm8k asdiv mathqa"
"""Of the harness's tasks: to look through all of them takes ten times as long."""
BENCHMARKS = {
    "neo10": "arc_easy arc_challenge hellaswag winogrande piqa openbookqa sciq mmlu cmmlu ceval-valid",
    "neo-math": "gsm8k asdiv mathqa svamp mawps",
}
SHOTS = {"neo10": 0, "neo-math": 5}
SUBJECTS = {"mmlu": 57, "cmmlu": 67, "ceval-valid": 52}


@pytest.fixture(scope="module")
def index() -> dict[str, Any]:
    """Task, group or tag → what the harness knows of it."""
    folders = [suites.SHIPPED / "neo-math", *(Path(tasks.__file__).parent / name for name in FOLDERS.split())]
    return tasks.TaskManager(include_path=list(map(str, folders)), include_defaults=False).task_index


def leaves(index: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """What the files of a task say, or of all tasks of a group."""
    entry = index[name]
    children = {Kind.GROUP: lambda: entry.cfg["task"], Kind.TAG: lambda: sorted(entry.tags)}
    if entry.kind not in children:
        yield entry.cfg
        return
    for child in children[entry.kind]():
        yield from leaves(index, child if isinstance(child, str) else child.get("task", child.get("group")))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_task_states_the_metric_as_a_mean_and_shows_as_many_examples_as_the_suite_says(
    index: dict[str, Any], name: str
) -> None:
    suite = suites.read(suites.find(name))
    assert list(suite.benchmarks) == BENCHMARKS[name].split() and suite.shots == SHOTS[name]
    for benchmark, asked in suite.benchmarks.items():
        found = list(leaves(index, benchmark))
        assert len(found) == SUBJECTS.get(benchmark, 1)
        for task in found:
            stated = {one["metric"]: one.get("aggregation") for one in task["metric_list"]}
            assert stated.get(asked.metric) == "mean", (benchmark, task["task"], stated)
            assert task.get("num_fewshot", suite.shots) == suite.shots, (benchmark, task["task"])


def test_the_quickstart_s_tasks_can_be_asked(tmp_path: Path, tiny_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "passages.jsonl"
    write_lines(path, [{"text": text} for text in english_paragraphs()])
    monkeypatch.setattr(suites.quickstart, "fetch", lambda *_: str(path))
    ready = suites.make_ready("quickstart", tmp_path / "cache", lambda _: None)
    opened = harness.open_suite(ready)
    for benchmark, asked in opened.suite.benchmarks.items():
        items = [json.loads(line) for line in (ready / "items" / f"{benchmark}.jsonl").read_text().splitlines()]
        (task,) = opened.tasks[benchmark].values()
        assert 8 < len(items) <= asked.count and list(task.eval_docs) == items
        assert {len(item["choices"]) for item in items} == {4}
    found = ask(opened, tiny_world.student, limit=4).items
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(opened.suite.benchmarks, 4)
    assert {value for values in found.values() for value in values} <= {0.0, 1.0}


VERSIONS = {
    "neo-math v2": "6acacaa899763f4fd44c7c0fb37237b6fc2bb4a489c6f8bd7e0c9cf55ba8b17d",
    "neo10 v1": "daeef775f22e34d2c48083aa66ec863b65cc84cab48a67bae651ba8b9322f737",
    "quickstart v2": "853231e7d4807bdac9c22a90f8b61c64cfc1a3cb1bc56679468f792e70484a43",
}
"""Suite and version → `content` of it. A line that stands here is never changed: other content is another version."""
WORDS = "small tall brown old quiet early road Anna broken narrow lamp distant heavy river garden bird 1990 window bottle red"


def fixed_passages() -> list[str]:
    """Made of numbers alone, so that they are the same for ever: of sentences as long as items may be, and of some beyond."""
    texts, known = [], WORDS.split()
    for number in range(60):
        said = []
        for place in range(4):
            length = 5 + (number + 7 * place) % 27
            words = [
                known[(number * (place + 3) + 5 * step * step + 3 * step * place + step) % len(known)] for step in range(length)
            ]
            said.append(" ".join(["The", *words[:-1], f"{words[-1]}."]))
        texts.append(" ".join(said))
    return texts


def content(name: str) -> str:
    """A digest of what decides a score: the suite, its tasks' files, the text that its items are of, and how they are made."""
    path = suites.find(name)
    suite = suites.read(path)
    found: dict[str, Any] = {"suite": yaml.safe_load(path.read_text(encoding="utf-8"))}
    for file in sorted((path.parent / suite.tasks).rglob("*")) if suite.tasks else ():
        found[file.name] = yaml.safe_load(file.read_text(encoding="utf-8"))
    for task, asked in suite.benchmarks.items():
        if asked.passages is not None:
            made = suites.MAKERS[asked.kind](fixed_passages(), asked.count)
            assert len(made) >= 10, (task, len(made))
            found[f"items of {task}"] = (ASSETS[asked.passages].sha256, ASSETS[asked.passages].columns, made)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("name", suites.shipped())
def test_a_suite_with_other_content_has_another_version(name: str) -> None:
    title = suites.read(suites.find(name)).title
    assert title in VERSIONS, f"a new version has a line of its own in VERSIONS: {title!r}: {content(name)!r}"
    assert content(name) == VERSIONS[title], f"{title} asks something else than before: give it the next version"


OURS = ("svamp", "mawps")
NUMBERS = {1.5: "1.5", 2.0: "2", 1234567.0: "1234567", 1234.5678: "1234.5678", 0.00005: "0.00005", 0.0: "0", 70.0: "70"}
PROBLEMS = [{"question": f"Ann has {2 * n} apples and eats half. How many are left?", "result_float": n} for n in NUMBERS]


def test_our_tasks_of_neo_math_ask_for_the_number_with_solved_examples(tmp_path: Path, tiny_world: World) -> None:
    (tmp_path / "own" / "tasks").mkdir(parents=True)
    write_lines(tmp_path / "problems.jsonl", PROBLEMS)
    local = f"json\ndataset_kwargs: {{data_files: {{train: {tmp_path}/problems.jsonl, test: {tmp_path}/problems.jsonl}}}}"
    for name in OURS:
        text = (suites.SHIPPED / "neo-math" / f"{name}.yaml").read_text(encoding="utf-8")
        (tmp_path / "own" / "tasks" / f"{name}.yaml").write_text(text.replace(f"MU-NLPC/Calc-{name}", local), encoding="utf-8")
    listed = "".join(f"  {name}: {{metric: acc}}\n" for name in OURS)
    (tmp_path / "own" / "suite.yaml").write_text(f"name: own\nversion: 1\nshots: 2\ntasks: tasks\nbenchmarks:\n{listed}")
    opened = harness.open_suite(suites.make_ready(str(tmp_path / "own"), tmp_path / "cache"))
    for name in OURS:
        task = opened.tasks[name][name]
        assert [task.doc_to_target(problem) for problem in PROBLEMS] == list(NUMBERS.values())
        assert task.doc_to_text(PROBLEMS[0]).endswith("How many are left?\nAnswer:")
    asked = ask(opened, tiny_world.student, limit=4)
    assert [len(items) for items in asked.items.values()] == [4, 4]

"""Does it matter which worker asks an item, what it asked before, and when it is stopped? Solved examples and written answers.

The values that the tasks here state say what was asked and answered: sums of log-likelihoods, and a checksum of a text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_suites
import torch
import torch.multiprocessing as mp
from test_suites import CPU, ask
from tiny import World, make_suite, make_tokenizer, passages

from neo_ray import bench_step, harness, models, suites
from neo_ray.records import Stop

datasets_cache = test_suites.datasets_cache

SHOWN = """
task: shown
dataset_path: json
dataset_kwargs: {data_files: {train: "${SUITE}/tasks/solved.jsonl", test: "${SUITE}/tasks/items.jsonl"}}
fewshot_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: gold
process_results: !function said.likelihood
metric_list:
  - {metric: said, aggregation: mean, higher_is_better: true}
"""
WRITTEN = (
    SHOWN.replace("task: shown", "task: written")
    .replace("multiple_choice", "generate_until\ngeneration_kwargs: {until: ['.'], max_gen_toks: 6}")
    .replace("doc_to_choice: choices\ndoc_to_target: gold", 'doc_to_target: "{{choices[gold]}}"')
    .replace("said.likelihood", "said.checksum")
)
SAID = """
import zlib

def likelihood(doc, results):
    return {"said": sum(likelihood for likelihood, _ in results)}

def checksum(doc, results):
    return {"said": float(zlib.crc32(results[0].encode()))}
"""
SUITE = "name: asked\nversion: 1\nshots: 2\ntasks: tasks\nbenchmarks:\n  shown: {metric: said}\n  written: {metric: said}\n"
ITEMS = 7
"""An odd number: two workers have unequally many."""


def make_asked(folder: Path) -> None:
    """A user's suite of both tasks."""
    texts, tasks = passages(make_tokenizer(), ITEMS + 12), folder / "tasks"
    make_suite(folder, texts[ITEMS:])
    (tasks / "items.jsonl").rename(tasks / "solved.jsonl")
    make_suite(folder, texts[:ITEMS])
    (tasks / "next_words.yaml").unlink()
    for name, text in {"shown.yaml": SHOWN, "written.yaml": WRITTEN, "said.py": SAID}.items():
        (tasks / name).write_text(text, encoding="utf-8")
    (folder / "suite.yaml").write_text(SUITE, encoding="utf-8")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    make_asked(folder)
    return suites.make_ready(str(folder), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def opened(ready: Path) -> harness.Opened:
    return harness.open_suite(ready)


Items = dict[str, list[float]]


@pytest.fixture(scope="module")
def alone(opened: harness.Opened, tiny_world: World) -> Items:
    return ask(opened, tiny_world.teacher).items


def agree(found: Items, expected: Items) -> None:
    """Texts to the letter; likelihoods but for the rounding of other batches."""
    assert found["written"] == expected["written"]
    assert found["shown"] == pytest.approx(expected["shown"], abs=1e-3)


def test_an_item_is_asked_after_the_same_examples_whenever_it_is_asked(opened: harness.Opened) -> None:
    task = opened.tasks["shown"]["shown"]
    docs = list(task.eval_docs)
    prompts = [task.fewshot_context(doc, num_fewshot=2) for doc in docs]
    assert [task.fewshot_context(doc, num_fewshot=2) for doc in reversed(docs)] == prompts[::-1]
    examples = [prompt.removesuffix(doc["context"]) for doc, prompt in zip(docs, prompts, strict=True)]
    assert len(set(examples)) > 1 and all(text.count("\n\n") == 2 for text in examples)


def test_a_second_asking_and_a_suite_opened_anew_give_the_same(
    opened: harness.Opened, ready: Path, tiny_world: World, alone: Items
) -> None:
    assert len(set(alone["written"])) > 2 and len(alone["shown"]) == ITEMS
    assert ask(opened, tiny_world.teacher).items == alone
    assert ask(harness.open_suite(ready), tiny_world.teacher).items == alone
    agree(ask(opened, tiny_world.teacher, limit=3).items, {name: items[:3] for name, items in alone.items()})


def test_what_is_written_holds_no_token_beyond_the_vocabulary(opened: harness.Opened, tiny_world: World, alone: Items) -> None:
    model, tokenizer = models.load_model(str(tiny_world.teacher), torch.float32), models.load_tokenizer(str(tiny_world.teacher))
    model.resize_token_embeddings(len(tokenizer) + 32)
    with torch.no_grad():
        model.get_output_embeddings().weight[len(tokenizer) :].normal_(0, 10, generator=torch.Generator().manual_seed(0))
    assert harness.ask(opened, model, tokenizer, len(tokenizer), CPU, torch.float32).items["written"] == alone["written"]


def stop_at(batch: int) -> Callable[[], Stop]:
    """Told to stop before this batch, and from then on."""
    looks: list[None] = []

    def look() -> Stop:
        looks.append(None)
        assert len(looks) <= batch, "asked on, after it was told to stop"
        return Stop.INTERRUPTED if len(looks) == batch else Stop.NO

    return look


def test_a_stop_is_heard_between_two_batches_and_leaves_everything_as_it_was(
    opened: harness.Opened, tiny_world: World, alone: Items
) -> None:
    model, tokenizer = models.load_model(str(tiny_world.teacher), torch.float32), models.load_tokenizer(str(tiny_world.teacher))
    model.train()
    for batch in (1, 3, 7):  # among likelihoods, and among texts
        with pytest.raises(harness.Stopped) as told:
            harness.ask(opened, model, tokenizer, len(tokenizer), CPU, torch.float32, should_stop=stop_at(batch))
        assert told.value.stop == Stop.INTERRUPTED and model.training
    assert harness.ask(opened, model, tokenizer, len(tokenizer), CPU, torch.float32).items == alone


def test_two_workers_give_what_one_gives_and_stop_together(ready: Path, tiny_world: World, alone: Items, tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_worker, args=(tmp_path / "meeting", ready, tiny_world.teacher, results), nprocs=2)
    for _ in range(2):
        found, stopped = results.get()
        agree(found, alone)
        assert stopped == [Stop.INTERRUPTED, Stop.PRUNED]


def _worker(rank: int, meeting: Path, ready: Path, folder: Path, results: Any) -> None:
    torch.set_num_threads(1)
    if rank == 1:  # one of them has less memory: it halves its batch, and takes twice as many
        call = test_suites._no_more_than_two(harness._Asked.__call__, [])
        harness._Asked.__call__ = call  # type: ignore[method-assign]
    with bench_step.process_group(CPU, rank, 2, meeting):
        opened, stopped = harness.open_suite(ready, world_size=2), []
        found = ask(opened, folder).items
        for look in (stop_at(2), lambda: Stop.PRUNED):
            try:
                ask(opened, folder, should_stop=look if rank == 0 else lambda: 1 / 0)
            except harness.Stopped as told:
                stopped.append(told.stop)
        results.put((found, stopped))

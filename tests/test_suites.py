"""Suites of benchmarks on the tiny world: what is found and refused, items of passages, and that asking changes nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lm_eval import evaluator
from tiny import SUITE, World, make_suite, passages

from neo_ray import bench_step, continuations, devices, harness, models, suites, wordings
from neo_ray.records import Stop
from neo_ray.scores import SuiteScores
from neo_ray.settings import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def own(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    make_suite(folder, passages(models.load_tokenizer(str(tiny_world.student)), 21))
    return folder


@pytest.fixture(scope="module")
def ready(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return suites.make_ready(str(own), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def opened(ready: Path) -> harness.Opened:
    return harness.open_suite(ready)


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def ask(opened: harness.Opened, folder: Path, **how: Any) -> SuiteScores:
    model, tokenizer = models.load_model(str(folder), torch.float32), models.load_tokenizer(str(folder))
    return harness.ask(opened, model, tokenizer, len(tokenizer), CPU, torch.float32, **how)


def test_two_askings_agree_and_a_limit_takes_the_first_items(opened: harness.Opened, tiny_world: World) -> None:
    first, again = (ask(opened, tiny_world.teacher) for _ in range(2))
    assert first == again and first.suite == "own v3"
    (items,) = first.items.values()
    assert len(items) == 21 and set(items) == {0.0, 1.0}
    assert ask(opened, tiny_world.teacher, limit=8).items == {"next_words": items[:8]}
    assert first.average == pytest.approx(np.mean(items))
    assert first.error == pytest.approx(np.std(items, ddof=1) / np.sqrt(21))


def test_the_average_is_over_benchmarks_not_items() -> None:
    scores = SuiteScores("two v1", None, {"long": [1.0] * 3 + [0.0], "short": [0.0, 1.0]})
    assert scores.average == pytest.approx((0.75 + 0.5) / 2)
    long, short = np.std([1, 1, 1, 0], ddof=1) / 2, np.std([0, 1], ddof=1) / np.sqrt(2)
    assert scores.error == pytest.approx(np.hypot(long, short) / 2)


def test_asking_leaves_random_states_and_modes_as_they_were(
    opened: harness.Opened, tiny_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = evaluator.evaluate

    def drawing(*given: Any, **how: Any) -> Any:
        random.random(), np.random.random(), torch.rand(1)
        return original(*given, **how)

    monkeypatch.setattr(evaluator, "evaluate", drawing)
    model, tokenizer = models.load_model(str(tiny_world.student), torch.float32), models.load_tokenizer(str(tiny_world.student))
    model.train()
    model.get_input_embeddings().eval()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    drawn = (random.random(), np.random.random(), torch.rand(1).item())
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    harness.ask(opened, model, tokenizer, len(tokenizer), CPU, torch.float32, limit=3)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == drawn
    assert model.training and not model.get_input_embeddings().training


def test_tokens_beyond_the_vocabulary_do_not_count(opened: harness.Opened, tiny_world: World) -> None:
    model, tokenizer = models.load_model(str(tiny_world.teacher), torch.float32), models.load_tokenizer(str(tiny_world.teacher))
    wanted = harness.ask(opened, model, tokenizer, len(tokenizer), CPU, torch.float32, limit=6)
    model.resize_token_embeddings(len(tokenizer) + 32)
    with torch.no_grad():
        model.get_output_embeddings().weight[len(tokenizer) :].normal_(0, 10, generator=torch.Generator().manual_seed(0))
    assert harness.ask(opened, model, tokenizer, len(tokenizer), CPU, torch.float32, limit=6) == wanted


def test_sharded_over_two_workers_equals_unsharded(
    ready: Path, opened: harness.Opened, tiny_world: World, tmp_path: Path
) -> None:
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_worker, args=(2, str(tmp_path / "meeting"), ready, tiny_world.teacher, results), nprocs=2)
    alone = ask(opened, tiny_world.teacher)
    assert results.get() == alone and results.get() == alone  # every worker knows all


def _worker(rank: int, world_size: int, meeting: str, ready: Path, folder: Path, results: Any) -> None:
    torch.set_num_threads(1)
    if rank == 1:  # one of them has less memory, and halves its batch without the other
        harness._Asked.__call__ = _no_more_than_two(harness._Asked.__call__, [])  # type: ignore[method-assign]
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    results.put(ask(harness.open_suite(ready, world_size=world_size), folder))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("next_words: {", "next_word: {", "no task next_word (did you mean `next_words`?)"),
        ("acc_norm}", "acc_normal}", "next_words does not state acc_normal (did you mean `acc_norm`?); it has: acc, acc_norm"),
        ("version: 3", "version: none", "suite.yaml: version: Input should be a valid integer"),
        ("tasks: tasks", "tasks: none", "none is no folder"),
        ("benchmarks:", "benchmark:", "suite.yaml: benchmarks: Field required"),
    ],
)
def test_a_mistake_in_a_suite_is_one_line(own: Path, tmp_path: Path, old: str, new: str, words: str) -> None:
    folder = tmp_path / "mistaken"
    (folder / "tasks").mkdir(parents=True)
    for file in (own / "tasks").iterdir():
        (folder / "tasks" / file.name).write_bytes(file.read_bytes())
    (folder / "suite.yaml").write_text(SUITE.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        harness.open_suite(suites.make_ready(str(folder), tmp_path / "cache"))
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_task_whose_data_are_away_is_refused_before_any_model_is_asked(own: Path, tmp_path: Path) -> None:
    ready = suites.make_ready(str(own), tmp_path / "cache")
    (ready / "tasks" / "items.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"own v3: next_words cannot be loaded \(FileNotFoundError"):
        harness.open_suite(ready)


def test_a_suite_that_was_made_elsewhere_is_asked_where_it_is(own: Path, tiny_world: World, tmp_path: Path) -> None:
    """It is brought to nodes that have no folder of the driver's."""
    made = suites.make_ready(str(own), tmp_path / "driver")
    wanted = ask(harness.open_suite(made), tiny_world.student, limit=3)
    made.rename(tmp_path / "node")
    assert ask(harness.open_suite(tmp_path / "node"), tiny_world.student, limit=3) == wanted


def test_more_workers_than_items_are_refused(ready: Path) -> None:
    with pytest.raises(ConfigError, match="next_words has 1 items for 2 workers"):
        harness.open_suite(ready, limit=1, world_size=2)


def test_a_name_that_is_no_suite_is_guessed() -> None:
    with pytest.raises(
        ConfigError, match=r"quickstat is no suite \(did you mean `quickstart`\?\); allowed: neo-math, neo10, quickstart"
    ):
        suites.find("quickstat")


def test_every_shipped_suite_can_be_read() -> None:
    for name in suites.shipped():
        suite = suites.read(suites.find(name))
        assert suite.name == name and suite.version >= 1


def test_a_changed_suite_gets_a_folder_of_its_own(own: Path, tmp_path: Path) -> None:
    first = suites.make_ready(str(own), tmp_path)
    assert suites.make_ready(str(own), tmp_path) == first
    task = own / "tasks" / "next_words.yaml"
    before = task.read_text(encoding="utf-8")
    task.write_text(before + "metadata: {version: 2}\n", encoding="utf-8")
    try:
        assert suites.make_ready(str(own), tmp_path) != first
    finally:
        task.write_text(before, encoding="utf-8")


THREE = "The first line of {0} is here. A second one follows it now. The third says that {0} has an end of its own."
PASSAGES = [THREE.format(letter) for letter in "abcdef"]


def test_an_item_goes_on_where_its_passage_does() -> None:
    items = continuations.make_items(PASSAGES)
    assert len(items) == 6 and items == continuations.make_items(list(reversed(PASSAGES)))
    for item in items:
        assert f"{item['context']} {item['choices'][item['gold']]}" in PASSAGES
        assert len(set(item["choices"])) == continuations.CHOICES
    assert json.dumps(items) == json.dumps(continuations.make_items([*PASSAGES, *PASSAGES, "Too short."]))


WORDY = "It is as if a {0} is as it was in a {1} or so to me. It ends."
WORDS = ["house", "river", "stone", "plant", "light", "paper", "table", "chair", "cloud", "field"]


def test_a_wording_is_a_sentence_of_its_passage_and_the_others_have_two_words_or_one_changed() -> None:
    texts = [WORDY.format(word, WORDS[number - 1]) for number, word in enumerate(WORDS)]
    orders, words = (make(texts, None) for make in (wordings.order_items, wordings.word_items))
    for items in (orders, words):
        assert len(items) == len(texts) and len({item["gold"] for item in items}) > 1
        for item in items:
            right = item["choices"][item["gold"]]
            assert any(text.startswith(f"{item['context']} {right} It ends") for text in texts)
            assert len(set(item["choices"])) == 4 and len({len(choice) for choice in item["choices"]}) == 1
    for item in orders:
        assert len({tuple(sorted(choice.split())) for choice in item["choices"]}) == 1
    for item in words:
        right, *wrong = sorted(item["choices"], key=lambda choice: choice != item["choices"][item["gold"]])
        for choice in wrong:
            assert sum(a != b for a, b in zip(right.split(), choice.split(), strict=True)) == 1
    assert wordings.order_items(list(reversed(texts)), 4) == orders[:4]


def test_the_process_group_of_one_changes_nothing(opened: harness.Opened, tiny_world: World) -> None:
    alone = ask(opened, tiny_world.student, limit=5)
    with bench_step.process_group(CPU):
        assert ask(opened, tiny_world.student, limit=5) == alone


def test_out_of_memory_halves_the_batch_and_changes_nothing(
    opened: harness.Opened, tiny_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, sizes = ask(opened, tiny_world.teacher), list[int]()
    monkeypatch.setattr(harness._Asked, "__call__", _no_more_than_two(harness._Asked.__call__, sizes))
    assert ask(opened, tiny_world.teacher, batch_size=8) == wanted
    assert sizes[:3] == [8, 4, 2] and set(sizes[2:]) <= {1, 2}


def _no_more_than_two(original: Any, sizes: list[int]) -> Any:
    def small(self: Any, input_ids_BL: torch.Tensor) -> Any:
        sizes.append(len(input_ids_BL))
        if len(input_ids_BL) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, input_ids_BL)

    return small


def test_a_suite_that_does_not_fit_is_no_fault_of_the_micro_batch(
    opened: harness.Opened, tiny_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neo_ray.faults import smaller_may_fit

    def none(self: Any, input_ids_BL: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(harness._Asked, "__call__", none)
    with pytest.raises(harness.NoRoomForSuite, match="evaluation.batch_size 4 does not fit") as raised:
        ask(opened, tiny_world.student, limit=3)
    assert devices.is_out_of_memory(raised.value) and not smaller_may_fit(raised.value)
    assert smaller_may_fit(torch.OutOfMemoryError("CUDA out of memory")) and not smaller_may_fit(RuntimeError("else"))


def test_each_forward_pass_is_a_sign_of_life(opened: harness.Opened, tiny_world: World) -> None:
    signs: list[None] = []
    ask(opened, tiny_world.student, limit=4, batch_size=4, should_stop=lambda: signs.append(None) or Stop.NO)
    assert len(signs) == 3  # 4 items of 3 choices


def test_written_answers_of_a_model_that_is_cut_are_refused(tiny_world: World, tmp_path: Path) -> None:
    make_suite(tmp_path / "own", passages(models.load_tokenizer(str(tiny_world.student)), 4))
    task = tmp_path / "own" / "tasks" / "next_words.yaml"
    written = task.read_text().replace("multiple_choice", "generate_until").replace("doc_to_choice: choices\n", "")
    norm = "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
    task.write_text(written.replace("metric: acc,", "metric: exact_match,").replace(norm, ""))
    (tmp_path / "own" / "suite.yaml").write_text(SUITE.replace("acc_norm", "exact_match"))
    ready = suites.make_ready(str(tmp_path / "own"), tmp_path / "cache")
    assert harness.open_suite(ready, world_size=2) and harness.open_suite(ready, is_cut=True)
    with pytest.raises(ConfigError, match=r"next_words has answers written, .* ZeRO-3"):
        harness.open_suite(ready, world_size=2, is_cut=True)


def test_a_data_set_of_the_hub_that_cannot_be_had_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "suite.yaml").write_text(
        f"name: own\nversion: 1\ntasks: {suites.SHIPPED}/neo-math\nbenchmarks: {{svamp: {{metric: acc}}}}\n"
    )
    with pytest.raises(ConfigError, match=r"own v1: svamp cannot be loaded \(.*MU-NLPC/Calc-svamp"):
        harness.open_suite(suites.make_ready(str(tmp_path / "own"), tmp_path / "cache"))

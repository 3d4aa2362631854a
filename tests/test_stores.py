"""Is what the store says of a token what the teacher says of it? On the tiny world, in fp32."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import World

from neo_ray import adapters, data, filling, models, stores
from neo_ray.chunked import chunked_loss, projected_loss
from neo_ray.config import DataConfig
from neo_ray.data import TokenData, collate
from neo_ray.filling import Teacher
from neo_ray.losses import LossSums, neo_loss, next_labels, scored
from neo_ray.settings import ConfigError, DistillConfig, LoraConfig, TrialConfig
from neo_ray.stores import Recipe, Shard, Store
from neo_ray.student import Student
from neo_ray.supply import row_bytes
from neo_ray.teaching import Taught

CPU = torch.device("cpu")


@dataclasses.dataclass
class Pair:
    teacher: Any
    student: Any
    tokens: TokenData
    vocabulary: int
    pad_id: int


@pytest.fixture(scope="module")
def pair(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    tokenizer = models.load_tokenizer(str(tiny_world.student))
    config = DataConfig(source=str(tiny_world.data), max_length=48, select_fraction=0.2, report_fraction=0.2)
    folder = data.prepare(config, str(tiny_world.data), tokenizer, tmp_path_factory.mktemp("cache"))
    teacher, student = (models.load_model(str(path), torch.float32, "cpu") for path in (tiny_world.teacher, tiny_world.student))
    return Pair(teacher, student, data.open_data(folder), len(tokenizer), tokenizer.pad_token_id)


@pytest.fixture(autouse=True)
def several_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "SHARD_BYTES", 2**17)


def a_recipe(mode: Any, pair: Pair, **changes: Any) -> Recipe:
    head = "student" if mode == "projection" else None
    return Recipe(mode, pair.tokens.fingerprint, "teacher", "torch.float32", pair.vocabulary, head=head, **changes)


def a_store(recipe: Recipe, pair: Pair, folder: Path) -> tuple[Store, Teacher]:
    head = models.output_head(pair.student)
    teacher = Teacher(recipe, pair.teacher, pair.tokens, pair.pad_id, head if recipe.mode == "projection" else None)
    cut = stores.shards(pair.tokens, row_bytes(recipe.mode, 64))
    for shard in cut:
        stores.write_shard(folder, shard, teacher.fill(shard))
    return Store(folder, recipe, pair.tokens, cut), teacher


def live_and_stored(pair: Pair, store: Store, distill: DistillConfig, indices: Any, **layout: Any) -> tuple[Any, Any]:
    """(sums, gradient on the student's states) with the teacher alive, and from the store."""
    batch = collate(pair.tokens.split("train").examples(indices), pair.pad_id, **layout)
    labels_N, head = next_labels(batch.labels_BL), models.output_head(pair.student)
    with torch.no_grad():
        states_BLH = models.last_hidden(pair.student, batch.input_ids_BL, batch.attention_mask_BL, batch.position_ids_BL)
        given = models.inputs(pair.teacher, batch.input_ids_BL, batch.attention_mask_BL, batch.position_ids_BL)
        teacher_NV = scored(pair.teacher(**given).logits, batch.labels_BL, pair.vocabulary)
    states_NH = scored(states_BLH, batch.labels_BL, states_BLH.shape[-1])

    def told(states_NH: torch.Tensor) -> LossSums:
        stored = store.rows("train", indices, CPU)
        if store.recipe.mode == "projection":
            return projected_loss(states_NH, head, labels_N, (stored[0], stored[1]), distill, pair.vocabulary)
        teacher_head = models.output_head(pair.teacher)

        def logits(where: slice) -> torch.Tensor:
            return teacher_head.logits(stored[0][where], pair.vocabulary)

        return chunked_loss(states_NH, head, labels_N, logits, distill, pair.vocabulary)

    found = []
    for loss in (lambda s: neo_loss(head.logits(s, pair.vocabulary), labels_N, teacher_NV, distill), told):
        inputs_NH = states_NH.clone().requires_grad_()
        sums = loss(inputs_NH)
        found.append((sums, torch.autograd.grad(sums.total, inputs_NH)[0]))
    return found[0], found[1]


LAYOUTS: dict[str, dict[str, Any]] = {"right": {}, "left": {"side": "left"}, "packed": {"packing": True}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["projection", "hidden"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_stored_targets_give_the_live_loss(pair: Pair, tmp_path: Path, mode: Any, layout: str, temperature: float) -> None:
    store, _ = a_store(a_recipe(mode, pair, temperature=temperature), pair, tmp_path)
    assert len(store.cut) > 4, "several shards a split"
    distill = DistillConfig(kd_ratio=0.7, temperature=temperature)
    for indices in ([0, 1, 2], [len(pair.tokens.split("train")) - 1, 17, 40, 3]):
        (live, live_NH), (told, told_NH) = live_and_stored(pair, store, distill, indices, **LAYOUTS[layout])
        assert abs(told.kd - live.kd) / live.count < 2e-3, "nats a token"
        assert told.ce == pytest.approx(live.ce.item(), rel=1e-5)
        assert torch.cosine_similarity(told_NH.flatten(), live_NH.flatten(), dim=0) > 0.9999
        assert live.kd / live.count > 0.05


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_projection_is_exact_also_where_the_final_norm_is_trained(pair: Pair, tmp_path: Path, temperature: float) -> None:
    """It went through the head alone. Value and gradient against whole logits of both models."""
    store, _ = a_store(a_recipe("projection", pair, temperature=temperature), pair, tmp_path)
    trial = TrialConfig(
        lora=LoraConfig(rank=4, alpha=8, modules_to_save=("norm",)), distill=DistillConfig(kd_ratio=0.7, temperature=temperature)
    )
    network = adapters.attach(copy.deepcopy(pair.student), trial)
    trained, generator = adapters.trained_parameters(network), torch.Generator().manual_seed(0)
    with torch.no_grad():  # far from where it began, which is the norm of the student whose head was projected through
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 8)
    (norm,) = (name for name in trained if ".norm." in name)
    indices = [0, 5, 9]
    batch = collate(pair.tokens.split("train").examples(indices), pair.pad_id)
    given = {"input_ids": batch.input_ids_BL, "attention_mask": batch.attention_mask_BL}
    with torch.no_grad():
        teacher_NV = scored(pair.teacher(**given).logits, batch.labels_BL, pair.vocabulary)
    student_NV = scored(network(**given).logits, batch.labels_BL, pair.vocabulary)
    dense = neo_loss(student_NV, next_labels(batch.labels_BL), teacher_NV, trial.distill)
    theirs = dict(zip(trained, torch.autograd.grad(dense.total, list(trained.values())), strict=True))

    student = Student(network, CPU, torch.float32)
    c_NH, constant_N = store.rows("train", indices, CPU)
    output = student(batch.input_ids_BL, batch.attention_mask_BL)
    sums = student.loss(output, batch.labels_BL, Taught(projected=(c_NH, constant_N)), trial, pair.vocabulary)
    ours = dict(zip(trained, torch.autograd.grad(sums.total, list(trained.values())), strict=True))
    assert abs(sums.kd - dense.kd) / dense.count < 2e-3 and dense.kd / dense.count > 0.05
    assert sums.ce == pytest.approx(dense.ce.item(), rel=1e-5)
    for name in trained:
        assert torch.cosine_similarity(ours[name].flatten(), theirs[name].flatten(), dim=0) > 0.9999, name
        assert ours[name].norm() == pytest.approx(theirs[name].norm().item(), rel=2e-3)
    assert theirs[norm].norm() > 0


def test_a_hidden_state_serves_every_divergence(pair: Pair, tmp_path: Path) -> None:
    store, _ = a_store(a_recipe("hidden", pair), pair, tmp_path)
    distill = DistillConfig(kd_ratio=1.0, divergence="jsd", temperature=3.0)
    (live, live_NH), (told, told_NH) = live_and_stored(pair, store, distill, [5, 6])
    assert told.kd == pytest.approx(live.kd.item(), rel=2e-3)
    assert torch.cosine_similarity(told_NH.flatten(), live_NH.flatten(), dim=0) > 0.9999


def test_the_teacher_sees_every_token_once_and_every_scored_position_has_a_row(pair: Pair, tmp_path: Path) -> None:
    store, teacher = a_store(a_recipe("projection", pair), pair, tmp_path)
    splits = pair.tokens.splits.values()
    assert teacher.tokens_seen == sum(int(split.num_tokens.sum()) for split in splits)
    for name, split in pair.tokens.splits.items():
        c_NH, constant_N = store.rows(name, range(len(split)), CPU)
        assert len(c_NH) == len(constant_N) == split.num_labels.sum()
    assert not stores.missing(tmp_path, pair.tokens, store.cut)


@pytest.mark.parametrize("harm", ["flipped", "truncated", "gone", "unrecorded"])
def test_a_shard_that_is_not_what_was_written_is_found_and_never_read(pair: Pair, tmp_path: Path, harm: str) -> None:
    store, _ = a_store(a_recipe("hidden", pair), pair, tmp_path)
    shard = next(shard for shard in store.cut if shard.split == "train" and shard.number == 1)
    path = tmp_path / f"{shard.name}.safetensors"
    content = bytearray(path.read_bytes())
    if harm == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif harm == "truncated":
        path.write_bytes(content[:-1])
    elif harm == "gone":
        path.unlink()
    else:
        path.with_suffix(".json").unlink()
    assert stores.missing(tmp_path, pair.tokens, store.cut) == [shard]
    assert len(store.rows("train", [0], CPU)[0]), "the others are fine"
    with pytest.raises(RuntimeError, match=f"{shard.name}.safetensors is not what was written"):
        store.rows("train", [shard.first], CPU)


def test_a_part_left_by_a_crash_is_no_shard(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard("train", 0, 0, 2)
    monkeypatch.setattr(stores, "_checksum", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stores.write_shard(tmp_path, shard, {"hidden_RG": torch.zeros(3, 4)})
    assert list(tmp_path.iterdir()) == [] and not stores.is_whole(tmp_path, shard.name, 3)


def test_shards_hold_whole_examples_in_order_and_at_least_one(pair: Pair) -> None:
    for bytes_of_row in (1, 132, 10**9):
        cut = stores.shards(pair.tokens, bytes_of_row)
        for name, split in pair.tokens.splits.items():
            own = [(shard.first, shard.last) for shard in cut if shard.split == name]
            assert [first for first, _ in own] == [0, *(last for _, last in own[:-1])] and own[-1][1] == len(split)
            assert all(last > first for first, last in own)


def test_every_part_of_a_recipe_changes_its_key(pair: Pair) -> None:
    recipe = a_recipe("projection", pair)
    others = {
        "mode": "hidden",
        "data": "x",
        "teacher": "x",
        "dtype": "bfloat16",
        "vocabulary": 1,
        "temperature": 2.0,
        "head": "x",
    }
    others |= {"quantization": "4bit", "top_k": 5, "transformers": "4.0", "version": 99}
    keys = {dataclasses.replace(recipe, **{name: value}).key for name, value in others.items()}
    assert set(others) == {field.name for field in dataclasses.fields(Recipe)}
    assert len(keys | {recipe.key}) == len(others) + 1


def test_a_store_of_hidden_states_has_the_teacher_s_head(pair: Pair, tmp_path: Path) -> None:
    store, teacher = a_store(a_recipe("hidden", pair), pair, tmp_path)
    assert not stores.is_whole(tmp_path, stores.HEAD)
    assert stores.missing(tmp_path, pair.tokens, store.cut) == []
    assert stores.missing(tmp_path, pair.tokens, store.cut, with_head=True) == store.cut[:1], "whose builder writes it too"
    stores.write_head(tmp_path, teacher.head)
    assert stores.is_whole(tmp_path, stores.HEAD)
    assert stores.missing(tmp_path, pair.tokens, store.cut, with_head=True) == []
    opened = stores.open_store(tmp_path, store.recipe, row_bytes("hidden", 64), pair.tokens, CPU)
    assert opened.head is not None and torch.equal(opened.head.weight_VH, teacher.head.weight_VH)
    content = bytearray((tmp_path / "head.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "head.safetensors").write_bytes(content)
    assert not stores.is_whole(tmp_path, stores.HEAD)
    with pytest.raises(RuntimeError, match="head.safetensors is not what was written"):
        stores.open_store(tmp_path, store.recipe, row_bytes("hidden", 64), pair.tokens, CPU)


def test_values_beyond_half_precision_are_refused(pair: Pair) -> None:
    recipe = a_recipe("projection", pair)
    head = models.Head(models.output_head(pair.student).weight_VH * 1e6)
    teacher = Teacher(recipe, pair.teacher, pair.tokens, pair.pad_id, head)
    with pytest.raises(ConfigError, match="exceed fp16"):
        teacher.fill(Shard("train", 0, 0, 2))


def test_batches_of_a_shard_hold_each_example_once(pair: Pair) -> None:
    found = list(filling._batches(pair.tokens.split("train"), Shard("train", 0, 3, 30), 100))
    assert sorted(np.concatenate(found).tolist()) == list(range(3, 30)) and len(found) > 9


def test_a_batch_that_memory_does_not_hold_is_halved_and_gives_the_same_rows(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, plain = Shard("train", 0, 0, 12), models.last_hidden
    recipe, seen = a_recipe("hidden", pair), int(pair.tokens.split("train").num_tokens[:12].sum())
    wanted, sizes = Teacher(recipe, pair.teacher, pair.tokens, pair.pad_id).fill(shard), list[int]()

    def small(model: Any, input_ids_BL: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(input_ids_BL))
        if len(input_ids_BL) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, input_ids_BL, *rest)

    monkeypatch.setattr(models, "last_hidden", small)
    teacher = Teacher(recipe, pair.teacher, pair.tokens, pair.pad_id)
    for count, tried in ((seen, [12, 6, 3, 3, 6, 3, 3]), (2 * seen, None)):
        sizes.clear()
        torch.testing.assert_close(teacher.fill(shard), wanted, rtol=1e-2, atol=1e-3)
        assert teacher.tokens_seen == count and (sizes == tried if tried else max(sizes) <= 6)

    def none(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models, "last_hidden", none)
    with pytest.raises(torch.OutOfMemoryError):
        teacher.fill(shard)

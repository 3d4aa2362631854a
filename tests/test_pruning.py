"""Reference: the same model with layers taken out of its module list, run by transformers."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import World, make_llama, make_tokenizer
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from neo_ray import devices, pruning
from neo_ray.config import SweepConfig
from neo_ray.loading import validate
from neo_ray.models import load_model, load_tokenizer
from neo_ray.pruning import greedy_layers, student_folder
from neo_ray.settings import ConfigError


def sweep(teacher: Path, student: dict[str, Any]) -> SweepConfig:
    return validate({"name": "t", "teacher": {"model": str(teacher)}, "student": student, "data": {"source": "none.jsonl"}})


def no_calibration() -> Any:
    raise AssertionError("calibration was asked for")


def pruned(teacher: Path, layers: list[int], cache: Path) -> str:
    return student_folder(sweep(teacher, {"prune": {"layers": layers}}), str(teacher), no_calibration, cache, print)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random ids and labels; the second sequence is padded on the right, and some labels are masked."""
    ids_BL = torch.randint(2, 512, (3, 16), generator=torch.Generator().manual_seed(3))
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, -5:] = 0
    labels_BL = ids_BL.masked_fill(mask_BL == 0, -100)
    labels_BL[0, :6] = -100
    return ids_BL, mask_BL, labels_BL


def without(model: Any, dropped: list[int]) -> Any:
    """The reference: layers taken out of the module list of a copy."""
    smaller = copy.deepcopy(model)
    smaller.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(smaller.model.layers) if i not in dropped)
    smaller.config.num_hidden_layers = len(smaller.model.layers)
    return smaller


def loss(model: Any) -> float:
    ids_BL, mask_BL, labels_BL = batch()
    with torch.no_grad():
        logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits
    return float(F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten(), ignore_index=-100))


@pytest.mark.parametrize("tied", [False, True])
def test_a_pruned_folder_is_the_model_without_these_layers(tmp_path: Path, tied: bool) -> None:
    make_llama(4, seed=0, tied=tied).save_pretrained(tmp_path / "teacher")
    teacher = load_model(str(tmp_path / "teacher"), torch.float32)
    student = load_model(pruned(tmp_path / "teacher", [0, 3], tmp_path), torch.float32)
    ids_BL, mask_BL, _ = batch()
    expected_BLV = without(teacher, [1, 2])(input_ids=ids_BL, attention_mask=mask_BL).logits
    assert torch.equal(student(input_ids=ids_BL, attention_mask=mask_BL).logits, expected_BLV)
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied


def test_shards_are_read_one_by_one_and_indexed_again(tmp_path: Path) -> None:
    teacher = make_llama(4, seed=0)
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size="200KB")
    assert len(list((tmp_path / "teacher").glob("*.safetensors"))) > 2
    student = load_model(pruned(tmp_path / "teacher", [1, 2], tmp_path), torch.float32)
    assert loss(student) == loss(without(teacher, [0, 3]))


def test_config_and_tokenizer_stay_apart_from_the_number_of_layers(tiny_world: World, tmp_path: Path) -> None:
    student = Path(pruned(tiny_world.teacher, [0, 2], tmp_path))
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (tiny_world.teacher, student))
    assert new == {**old, "num_hidden_layers": 2}
    assert load_tokenizer(str(student)).get_vocab() == make_tokenizer().get_vocab()
    assert load_tokenizer(str(student)).chat_template == make_tokenizer().chat_template
    assert json.loads((student / pruning.LAYERS_FILE).read_text()) == [0, 2]


def test_each_layer_keeps_its_own_kind_of_attention(tmp_path: Path) -> None:
    """Gemma 2 alternates windowed and full attention by position, which older config files do not spell out."""
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "teacher")
    raw = json.loads((tmp_path / "teacher" / "config.json").read_text())
    kinds = raw.pop("layer_types")
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(raw))
    student = AutoModelForCausalLM.from_pretrained(pruned(tmp_path / "teacher", [1, 2, 3], tmp_path))
    assert student.config.layer_types == kinds[1:] != kinds[:3]


def test_impossible_layers_are_refused_and_nothing_is_written(tiny_world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"student\.prune\.layers: 4 with a teacher of 4 layers; allowed: 0 to 3"):
        pruned(tiny_world.teacher, [0, 4], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_weights_without_numbered_layers_are_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64)).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ConfigError, match=r"student\.prune: "):
        pruned(tmp_path / "teacher", [0], tmp_path)


def test_greedy_drops_what_brute_force_drops() -> None:
    model, kept = make_llama(5, seed=0), list(range(5))
    said: list[str] = []
    found = greedy_layers(model, *batch(), keep=2, announce=said.append)
    for line in said:
        losses = {i: loss(without(model, [j for j in range(5) if j not in kept or j == i])) for i in kept}
        worst = min(losses, key=losses.__getitem__)
        kept.remove(worst)
        assert f"layer {worst} dropped, {len(kept)} left, loss {losses[worst]:.3f}" in line
    assert found == kept and len(kept) == 2


def test_greedy_sees_each_layers_own_window() -> None:
    config = Gemma2Config(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=3,
        initializer_range=0.3,
        final_logit_softcapping=5.0,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    said: list[str] = []
    found = greedy_layers(model, *batch(), keep=3, announce=said.append)
    dropped = next(i for i in range(4) if i not in found)
    assert f"loss {loss(_gemma_without(model, dropped)):.3f} (all layers {loss(model):.3f})" in said[0]


def _gemma_without(model: Any, dropped: int) -> Any:
    smaller = without(model, [dropped])
    smaller.config.layer_types = [k for i, k in enumerate(model.config.layer_types) if i != dropped]
    return smaller


def test_greedy_refuses_what_it_cannot_take_apart() -> None:
    ids_BL = torch.ones(1, 4, dtype=torch.long)
    other = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64))
    with pytest.raises(ConfigError, match=r"student\.prune\.keep: a GPT2LMHeadModel has no"):
        greedy_layers(other, ids_BL, None, ids_BL, keep=1)
    with pytest.raises(ConfigError, match=r"student\.prune\.keep: 3 layers of a teacher that has 2"):
        greedy_layers(make_llama(2, seed=0), ids_BL, None, ids_BL, keep=3)


def test_given_layers_need_no_calibration_and_are_made_once(tiny_world: World, tmp_path: Path) -> None:
    config = sweep(tiny_world.teacher, {"prune": {"layers": [0, 3]}})
    folder = Path(student_folder(config, str(tiny_world.teacher), no_calibration, tmp_path, print))
    made = (folder / "model.safetensors").stat()
    assert folder.parent == tmp_path / "students"
    assert Path(student_folder(config, str(tiny_world.teacher), no_calibration, tmp_path, print)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made.st_mtime_ns


def test_kept_layers_are_found_once_a_calibration(tiny_world: World, tmp_path: Path) -> None:
    config, said = sweep(tiny_world.teacher, {"prune": {"keep": 2}}), []  # type: ignore[var-annotated]
    folder = student_folder(config, str(tiny_world.teacher), batch, tmp_path, said.append)
    expected = greedy_layers(
        load_model(str(tiny_world.teacher), devices.resolve_dtype("auto", devices.local_device())), *batch(), keep=2
    )
    assert json.loads((Path(folder) / pruning.LAYERS_FILE).read_text()) == expected and len(said) == 3
    assert student_folder(config, str(tiny_world.teacher), batch, tmp_path, said.append) == folder and len(said) == 3
    ids_BL, mask_BL, labels_BL = batch()
    other = student_folder(config, str(tiny_world.teacher), lambda: (ids_BL + 1, mask_BL, labels_BL), tmp_path, said.append)
    assert other != folder


def test_the_digest_follows_the_weights_and_not_their_place(tiny_world: World, tmp_path: Path) -> None:
    config = sweep(tiny_world.teacher, {"prune": {"layers": [0, 3]}})
    folder = student_folder(config, str(tiny_world.teacher), no_calibration, tmp_path, print)
    copied = shutil.copytree(tiny_world.teacher, tmp_path / "copy")
    assert student_folder(config, str(copied), no_calibration, tmp_path, print) == folder
    make_llama(4, seed=5).save_pretrained(copied)
    assert student_folder(config, str(copied), no_calibration, tmp_path, print) != folder


def test_more_layers_than_the_teacher_has_are_refused_before_any_calibration(tiny_world: World, tmp_path: Path) -> None:
    config = sweep(tiny_world.teacher, {"prune": {"keep": 9}})
    with pytest.raises(ConfigError, match=r"student\.prune\.keep: 9 layers of a teacher that has 4"):
        student_folder(config, str(tiny_world.teacher), no_calibration, tmp_path, print)

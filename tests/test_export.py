"""The export door on trials of the tiny world. References: the trial's own record, and plain peft on the original base."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from buckets import put_sweep
from doors import ROOT, sweep_file
from safetensors import safe_open
from tiny import World, make_llama, make_suite, make_tokenizer, make_world, passages

from neo_ray import analyze, loading, scores
from neo_ray.bench_step import process_group
from neo_ray.card import card, licence_of
from neo_ray.config import SweepConfig
from neo_ray.export import TOLERANCES, OtherScores, check_scores, main
from neo_ray.merging import rescore
from neo_ray.parts import load_parts
from neo_ray.prepare import identities, make_student, prepare
from neo_ray.records import Journal, TrialRecord, load_records, write_atomically
from neo_ray.settings import LoraConfig
from neo_ray.space import build_space
from neo_ray.train import train
from neo_ray.uploads import ASKED, ITEMS, SOURCES_FILE

Pair = tuple[Path, Path]
"""An exported folder and the base of its adapter."""
CPU = torch.device("cpu")
VARIANTS = get_args(LoraConfig.model_fields["variant"].annotation)
IDS = {variant: f"{number:04d}" for number, variant in enumerate(VARIANTS)}
STOPPED, FAILED, FULL = "0020", "0021", "0022"
TRAINING = {"steps": 8, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2}
FILES = {"README.md", "adapter", "export.json", "model", "trial.yaml"}


def make_sweep(world: World, folder: Path, **changes: Any) -> SweepConfig:
    """A results folder as a sweep begins it."""
    folder.mkdir(parents=True, exist_ok=True)
    small = {"training": {**TRAINING, "dtype": "fp32"}, "search": {"rank": {"choice": [4]}}, "lora": {"rank": 4, "alpha": 8}}
    fields = {**small, "evaluation": {"points": 2, "max_tokens": 900}, **changes}
    config = loading.load(sweep_file(world, folder, **fields))
    write_atomically(config.folder / "sweep.yaml", loading.dump(config))
    return config


def run_trials(config: SweepConfig, trials: dict[str, dict[str, Any]]) -> None:
    """Train these settings by id and write what a sweep's recorder writes of them."""
    journal, space = Journal(config.folder), build_space(config)
    prepared = prepare(config, lambda _: None)
    write_atomically(config.folder / SOURCES_FILE, json.dumps(identities(config, prepared)))
    sources = make_student(config, prepared)
    parts = load_parts(sources, config.trial, CPU)
    with process_group(CPU):
        for id, params in trials.items():
            trial = space.trial_config(params, config.trial)
            journal.write("start", id, params=params, config=loading.plain(trial), seed=trial.seed)
            report = lambda row, id=id: journal.write("report", id, row=row)  # noqa: E731
            outcome = train(trial, parts, report, folder=config.folder / "trials" / id)
            journal.write("end", id, state=outcome.state, metrics=outcome.metrics, details=outcome.details, **outcome.totals)


@pytest.fixture(scope="module")
def swept(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> SweepConfig:
    """A COMPLETE trial of every variant; one PRUNED, one FAILED, one that trained all parameters."""
    search = {"variant": {"choice": list(VARIANTS)}, "method": {"choice": ["neo", "sft"]}}
    config = make_sweep(tiny_world, tmp_path_factory.mktemp("swept"), search=search)
    run_trials(config, {id: {"variant": variant, "method": "neo"} for variant, id in IDS.items()})
    journal, space = Journal(config.folder), build_space(config)
    for id, method, end in (
        (STOPPED, "neo", {"state": "PRUNED"}),
        (FAILED, "neo", {"state": "FAILED", "cause": "diverged"}),
        (FULL, "sft", {"state": "COMPLETE", "metrics": {"select_ce": 9.0, "report_ce": 9.0}}),
    ):
        params = {"variant": "lora", "method": method}
        trial = loading.plain(space.trial_config(params, config.trial))
        journal.write("start", id, params=params, config=trial, seed=0)
        journal.write("end", id, **end)
    return config


@pytest.fixture(scope="module")
def exported(swept: SweepConfig) -> dict[str, Path]:
    """Variant → folder."""
    for id in IDS.values():
        assert main([str(swept.folder), "--trial", id]) == 0
    return {variant: swept.folder / "export" / id for variant, id in IDS.items()}


@pytest.fixture(scope="module")
def pruned(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Of a student that is cut from its teacher; its cache was deleted before it was exported."""
    folder = tmp_path_factory.mktemp("pruned")
    teacher = folder / "teacher"
    shutil.copytree(tiny_world.teacher, teacher)
    (teacher / "LICENSE").write_text("all yours")
    (teacher / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n\n# Teacher\n")
    changes = {"teacher": {"model": str(teacher)}, "student": {"prune": {"keep": 2, "calibration_tokens": 200}}}
    config = make_sweep(tiny_world, folder, **changes)
    run_trials(config, {"0000": {"rank": 4}})
    shutil.rmtree(config.cache)
    assert main([str(config.folder)]) == 0
    (student,) = (path for path in (config.cache / "students").iterdir() if path.is_dir())
    return config.folder / "export" / "0000", student


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Of a student whose head was its embeddings, and was trained whole."""
    folder = tmp_path_factory.mktemp("untied")
    world = make_world(folder / "world", tied=True)
    config = make_sweep(world, folder, lora={"alpha": 8, "modules_to_save": ["lm_head"]})
    run_trials(config, {"0000": {"rank": 4}})
    assert main([str(config.folder)]) == 0
    return config.folder / "export" / "0000", world.student


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def left_in(folder: Path) -> list[str]:
    """What is there, but for locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock")) if folder.exists() else []


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_merged_model_scores_as_the_trial_s_record_says(variant: str, swept: SweepConfig, exported: dict[str, Path]) -> None:
    folder, record = exported[variant], {r.id: r for r in load_records(swept.folder)}[IDS[variant]]
    assert set(left_in(folder)) == FILES
    said = read(folder / "export.json")
    assert (said["trial"], said["params"], said["dtype"], said["tolerance"]) == (record.id, record.params, "fp32", 1e-3)
    assert said["environment"]["packages"]["peft"] and said["base"] == {
        "model": swept.student.model,
        "revision": None,
        "layers": None,
    }
    for name in ("select_ce", "report_ce", "select_bits_per_byte", "report_bits_per_byte"):
        score = said["scores"][name]
        assert score["before"] == record.metrics[name] and score["difference"] == score["after"] - score["before"]
        assert abs(score["difference"]) < 1e-5
    assert record.metrics["select_ce"] < record.details["baseline"]["select_ce"] - 0.01, "the trial changed the model"


PLAIN = """
import json, sys
import peft, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

apart = {}
for folder, base in json.loads(sys.argv[1]):
    merged, plain = load(folder + "/model"), load(base)
    batch = AutoTokenizer.from_pretrained(folder + "/model")("The language reference", return_tensors="pt")
    words = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        ours, before = merged(**words).logits, plain(**words).logits
        theirs = peft.PeftModel.from_pretrained(plain, folder + "/adapter").eval()(**words).logits
    new = merged.generate(**words, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    apart[folder] = {
        "adapter": (ours - theirs).abs().max().item(),
        "base": (ours - before).abs().max().item(),
        "new": new.shape[1] - words["input_ids"].shape[1],
        "cache": merged.config.use_cache,
    }
print(json.dumps({"apart": apart, "neo_ray": [name for name in sys.modules if name.startswith("neo_ray")]}))
"""


def plainly(pairs: list[Pair]) -> list[dict[str, float]]:
    """What plain transformers and peft make of them in a process of its own."""
    words = json.dumps([[str(folder), str(base)] for folder, base in pairs])
    done = subprocess.run([sys.executable, "-c", PLAIN, words], capture_output=True, text=True, cwd=pairs[0][0])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["neo_ray"] == []
    return [found["apart"][str(folder)] for folder, _ in pairs]


def test_plain_transformers_and_peft_load_and_generate_what_was_exported(
    tiny_world: World, exported: dict[str, Path], pruned: Pair, untied: Pair
) -> None:
    pairs = [*((folder, tiny_world.student) for folder in exported.values()), pruned, untied]
    for found in plainly(pairs):
        assert found["adapter"] < 1e-4 and found["base"] > 0.1
        assert found["new"] == 4 and found["cache"] is True


def test_without_an_id_the_trial_of_best_yaml_is_exported_once(
    swept: SweepConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    analysis = analyze.analyse(swept.folder)
    analyze.write(analysis, tmp_path)
    assert analysis.best is not None
    out = tmp_path / "new" / "winner"
    assert main([str(swept.folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert read(out / "export.json")["trial"] == analysis.best.id
    again, best = loading.load(out / "trial.yaml"), loading.load(tmp_path / "best.yaml")
    assert again == best.model_copy(update={"name": f"tiny-{analysis.best.id}"})

    before = (out / "export.json").read_bytes()
    assert main([str(swept.folder), "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err and (out / "export.json").read_bytes() == before


def test_a_trial_of_an_object_store_is_exported_by_its_url(
    swept: SweepConfig, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = put_sweep(swept.folder, f"memory://{tmp_path.name}/results/tiny")
    monkeypatch.chdir(tmp_path)
    assert main([place.url, "--trial", IDS["lora"]]) == 0, capsys.readouterr().err
    adapter = tmp_path / "export" / IDS["lora"] / "adapter" / "adapter_model.safetensors"
    assert adapter.read_bytes() == (swept.folder / "trials" / IDS["lora"] / "adapter" / adapter.name).read_bytes()
    capsys.readouterr()
    assert main([place.url, "--trial", FULL]) == 2
    assert f"trials with an adapter: {', '.join(IDS.values())}" in capsys.readouterr().err
    assert main([f"{place.url}-of-nobody"]) == 2
    assert "of-nobody: holds no sweep" in capsys.readouterr().err


def test_bf16_rounds_what_is_written_and_nothing_else(swept: SweepConfig, exported: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "half"
    assert main([str(swept.folder), "--trial", IDS["lora"], "--out", str(out), "--dtype", "bf16"]) == 0
    with (
        safe_open(out / "model" / "model.safetensors", "pt") as half,
        safe_open(exported["lora"] / "model" / "model.safetensors", "pt") as full,
    ):
        assert set(half.keys()) == set(full.keys())
        assert all(torch.equal(half.get_tensor(name), full.get_tensor(name).bfloat16()) for name in full.keys())
    said = read(out / "export.json")
    assert (said["dtype"], said["tolerance"]) == ("bf16", TOLERANCES["bf16"])
    assert 0 < abs(said["scores"]["report_ce"]["difference"]) < TOLERANCES["bf16"]
    assert read(out / "model" / "config.json")["dtype"] == "bfloat16"


def test_a_bf16_trial_is_scored_in_fp32_and_allowed_what_bf16_rounds(tiny_world: World, tmp_path: Path) -> None:
    config = make_sweep(tiny_world, tmp_path, training={**TRAINING, "dtype": "bf16"})
    run_trials(config, {"0000": {"rank": 4}})
    assert main([str(config.folder)]) == 0
    said = read(config.folder / "export" / "0000" / "export.json")
    assert (said["trial_dtype"], said["dtype"], said["tolerance"]) == ("bfloat16", "fp32", TOLERANCES["bf16"])
    assert 0 < abs(said["scores"]["report_ce"]["difference"]) < TOLERANCES["bf16"]
    exact = config.trial.model_copy(update={"training": config.training.model_copy(update={"dtype": "fp32"})})
    scores = rescore(config.folder / "export" / "0000" / "model", prepare(config, lambda _: None), exact)
    assert {name: score["after"] for name, score in said["scores"].items()} == scores


@pytest.mark.parametrize("name", ["select_ce", "report_ce"])
def test_a_model_that_scores_otherwise_is_refused_and_nothing_is_left(
    name: str, swept: SweepConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tampered"
    shutil.copytree(swept.folder, folder, ignore=shutil.ignore_patterns("export"))
    before = {r.id: r for r in load_records(folder)}[IDS["lora"]].metrics[name]
    assert before is not None
    text = (folder / "journal.jsonl").read_text()
    assert text.count(f'"{name}": {before!r}') == 1
    (folder / "journal.jsonl").write_text(text.replace(f'"{name}": {before!r}', f'"{name}": {before + 0.002!r}'))
    assert main([str(folder), "--trial", IDS["lora"]]) == 1
    error = capsys.readouterr().err
    assert f"{name} was {before + 0.002:.6f} and is {before:.5f}"[:-1] in error and error.count("\n") == 1
    assert left_in(folder / "export") == []


def test_another_base_under_the_same_path_is_refused(
    tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = shutil.copytree(tiny_world.student, tmp_path / "student")
    config = make_sweep(tiny_world, tmp_path, student={"model": str(student)})
    run_trials(config, {"0000": {"rank": 4}})
    make_llama(2, seed=7).save_pretrained(student)
    capsys.readouterr()
    assert main([str(config.folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: student.model: student.model changed since") and "bring that back" in error
    assert left_in(config.folder / "export") == []


def test_a_score_that_is_not_a_number_is_refused() -> None:
    nan = {"report_ce": {"before": 1.0, "after": float("nan"), "difference": float("nan")}}
    with pytest.raises(OtherScores, match="nan"):
        check_scores("0000", nan, 1e-3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--trial", "3"], "has no trial 3 (did you mean `0003`?)"),
        (["--trial", STOPPED], f"trial {STOPPED} is PRUNED"),
        (["--trial", FAILED], f"trial {FAILED} is FAILED"),
        (["--trial", FULL], "trained all parameters (sft), and such trials keep no weights (best.yaml runs the setting again)"),
        (["--out", "."], "--out: . exists"),
        (["--out", "/proc/no/where"], "/proc/no"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    words: list[str],
    expected: str,
    swept: SweepConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tiny"
    shutil.copytree(swept.folder, folder, ignore=shutil.ignore_patterns("export"))
    assert main([str(folder), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected in error and error.count("\n") == 1
    assert not (folder / "export").exists()


def test_a_folder_without_what_is_needed_is_one_line(
    swept: SweepConfig, tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(folder: Path, *words: str) -> str:
        assert main([str(folder), *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "did you mean `tiny`?" in refused(swept.folder.with_name("tiyn"))
    config = make_sweep(tiny_world, tmp_path)
    assert "no such file" in refused(config.folder)
    Journal(config.folder).write("start", "0000", params={"rank": 4}, config=loading.plain(config.trial))
    assert "no COMPLETE trial has a value of select_ce" in refused(config.folder)
    Journal(config.folder).write("end", "0000", state="COMPLETE", metrics={})
    assert "has no held-out CE" in refused(config.folder, "--trial", "0000")
    Journal(config.folder).write("end", "0000", state="COMPLETE", metrics={"select_ce": 1.0})
    assert "has no adapter any more" in refused(config.folder)
    (config.folder / "sweep.yaml").unlink()
    assert "sweep.yaml: cannot be read" in refused(config.folder)
    assert not (config.folder / "export").exists()


def test_mistakes_are_told_without_torch(swept: SweepConfig) -> None:
    code = (
        "import sys; from neo_ray.export import main; code = main(sys.argv[1:]); "
        "sys.exit(f'imported {bad}' if (bad := {'torch', 'ray', 'transformers', 'peft'} & set(sys.modules)) else code)"
    )
    command = [sys.executable, "-c", code, str(swept.folder), "--trial", STOPPED]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and "PRUNED" in done.stderr, done.stderr


def test_a_pruned_student_is_named_by_its_teacher_and_has_its_licence(pruned: Pair) -> None:
    out, student = pruned
    said, teacher = read(out / "export.json"), loading.load(out / "trial.yaml").teacher
    assert teacher is not None
    assert said["base"] == {"model": teacher.model, "revision": None, "layers": read(student / "pruned_layers.json")}
    assert said["license"] == {"license": "apache-2.0"}
    assert (out / "model" / "LICENSE").read_text() == "all yours"
    text = (out / "README.md").read_text()
    assert "the adapter is for the cut student, which is not in this folder" in text and "plain peft the adapter" not in text
    front = yaml.safe_load((out / "model" / "README.md").read_text().split("---\n")[1])
    assert (front["base_model"], front["license"], front["library_name"]) == (teacher.model, "apache-2.0", "transformers")


def test_a_head_trained_whole_is_no_longer_tied_to_the_embeddings(untied: Pair) -> None:
    out, student = untied
    assert read(student / "config.json")["tie_word_embeddings"] is True
    assert read(out / "model" / "config.json")["tie_word_embeddings"] is False


def test_the_card_says_where_it_comes_from_and_how_it_scores(swept: SweepConfig, exported: dict[str, Path]) -> None:
    text = (exported["dora"] / "README.md").read_text()
    assert text == (exported["dora"] / "model" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "unknown" and {"lora", "llm-neo"} <= set(front["tags"])
    scores = read(exported["dora"] / "export.json")["scores"]
    trial, merged = (f"{scores['select_ce'][when]:.6f}" for when in ("before", "after"))
    record = {r.id: r for r in load_records(swept.folder)}[IDS["dora"]]
    assert f"| select_ce | {record.details['baseline']['select_ce']:.6f} | {trial} | {merged} |" in text
    assert hashlib.sha256((swept.folder / "sweep.yaml").read_bytes()).hexdigest() in text
    assert f"python -m neo_ray.export {swept.folder} --trial {IDS['dora']} --dtype fp32" in text
    assert "plain peft the adapter" in text
    assert "| variant | dora |" in text and "python -m neo_ray.sweep trial.yaml" in text


def test_the_card_has_the_benchmarks_and_what_the_sweep_found() -> None:
    details = {"suite": "own v3", "suite_limit": 5, "baseline": {"select_ce": 5.0, "suite": 0.25, "suite_a": 0.25}}
    record = TrialRecord(id="0003", metrics={"select_ce": 4.0, "suite": 0.5, "suite_a": 0.5}, details=details)
    alone = loading.validate({"name": "x", "student": {"model": "m"}, "data": {"source": "d"}, "method": "lora"})
    found = [{"verdict": "supported", "claim": "rank 64 is best"}]
    facts = {"sweep": "x", "sweep_sha256": "00", "guidelines": found, "scores": {}, "tolerance": 1e-3, "dtype": "fp32"}
    facts |= {
        "results": "s3://some where/x",
        "trial_dtype": "float32",
        "license": {"license": "mit"},
        "base": {"model": "m", "layers": None},
    }
    text = card(record, alone, facts)
    assert "own v3, the first 5 items of each task" in text and "| suite_a | 0.250000 | 0.500000 |" in text
    assert "- rank 64 is best (supported)" in text
    assert "`python -m neo_ray.export 's3://some where/x' --trial 0003 --dtype fp32`" in text


def test_an_export_says_what_the_sweep_found_and_asks_for_no_benchmarks(
    tiny_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_suite(tmp_path / "own", passages(make_tokenizer(), 12))
    asked = {"evaluation": {"points": 2, "max_tokens": 900, "suite": str(tmp_path / "own")}, "scheduler": {"name": "none"}}
    config = make_sweep(tiny_world, tmp_path, objective={"metric": "suite_next_words"}, **asked)
    run_trials(config, {"0000": {"rank": 4}})
    right = {"trials/0000": 1.0, f"{ASKED}/own-3-0/all/student": 0.0}
    for name, value in right.items():
        found = scores.SuiteScores("own v3", None, {"next_words": [value] * 40})
        scores.save(found, config.folder / name)
    for path in config.folder.glob(f"{ASKED}/*/all/student/{ITEMS}"):
        if path.parts[-4] != "own-3-0":
            path.unlink()
    shutil.rmtree(tmp_path / "own")
    monkeypatch.setattr("neo_ray.harness.open_suite", None)
    capsys.readouterr()
    assert main([str(config.folder)]) == 0, capsys.readouterr().err
    out = config.folder / "export" / "0000"
    (found,) = read(out / "export.json")["guidelines"]
    assert found["verdict"] == "supported" and found["claim"].startswith(
        "On own v3 trial 0000 is better than the untrained student"
    )
    assert f"## What the sweep found\n\n- {found['claim']} (supported)" in (out / "README.md").read_text()
    assert loading.load(out / "trial.yaml").evaluation.suite == str(tmp_path / "own")


@pytest.mark.parametrize(
    ("files", "fields", "copied"),
    [
        ({}, {"license": "unknown"}, []),
        ({"README.md": "# No front matter\n---\nlicense: mit\n---\n"}, {"license": "unknown"}, []),
        ({"README.md": "---\n[broken\n---\n"}, {"license": "unknown"}, []),
        ({"LICENSE.txt": "x", "NOTICE": "y"}, {"license": "other", "license_link": "LICENSE.txt"}, ["LICENSE.txt", "NOTICE"]),
        (
            {"README.md": "---\nlicense: other\nlicense_name: llama2\nlanguage: [en]\n---\n", "LICENSE": "x"},
            {"license": "other", "license_name": "llama2"},
            ["LICENSE"],
        ),
    ],
)
@pytest.mark.parametrize("place", ["folder", "hub cache"])
def test_licence_fields_are_those_of_the_base(
    place: str, files: dict[str, str], fields: dict[str, str], copied: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--some--base"
    folder = cached / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    for name, text in files.items():
        (folder / name).write_text(text)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    found, paths = licence_of(str(folder) if place == "folder" else "some/base", None)
    assert (found, [path.name for path in paths]) == (fields, copied)
    assert licence_of("some/other", None) == ({"license": "unknown"}, [])

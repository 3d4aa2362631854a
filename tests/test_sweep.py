"""The door: real sweeps of the tiny world on a local Ray with DeepSpeed, each in its own process; and every refusal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import yaml
from doors import ROOT, finish, kill, start, sweep_file
from tiny import World

import neo_ray
from neo_ray.loading import dump, load, validate
from neo_ray.prepare import check_same_sources, identities, prepare
from neo_ray.records import Journal, load_records
from neo_ray.sweep import _set_aside, _write_contract, main
from neo_ray.trials import differences


def test_a_sweep_runs_and_is_extended_and_leaves_its_contract(tiny_world: World, tmp_path: Path) -> None:
    path = sweep_file(tiny_world, tmp_path)
    process = start(path)
    text = finish(process)
    assert process.returncode == 0, text
    folder = tmp_path / "results" / "tiny"
    for name in ("sweep.yaml", "environment.json", "trials.jsonl", "study.db", "guidelines.json", "report.md", "report.html"):
        assert (folder / name).exists(), name
    records = load_records(folder)
    assert len(records) == 2 and all(r.finished and r.curve for r in records)
    complete = [r for r in records if r.state == "COMPLETE"]
    assert complete and all(r.metrics["report_ce"] and r.scaling == 2 for r in complete)
    assert validate(yaml.safe_load((folder / "sweep.yaml").read_text())) == load(path)
    assert load(folder / "best.yaml").search == {}
    grid = neo_ray.load(folder).result_grid()
    assert sorted(result.config["trial"] for result in grid) == ["0000", "0001"] and not grid.errors
    assert "Traceback" not in text and "Guidelines" in text
    first = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    of_the_first_driver = {path.name for path in (folder / "ray").iterdir()}

    process = start(path, "sampler.num_trials=3")
    text = finish(process)
    assert process.returncode == 0, text
    assert [r.id for r in load_records(folder)] == ["0000", "0001", "0002"]
    later = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert later[: len(first)] == first, "finished trials are not run again"
    of_the_second = {path.name for path in (folder / "ray").iterdir()}
    assert of_the_first_driver and of_the_second and not of_the_first_driver & of_the_second
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{folder / 'study.db'}")
    assert {t.user_attrs["trial"] for t in study.trials} == {"0000", "0001", "0002"}
    assert all(t.state.is_finished() for t in study.trials)
    assert not (folder / "lease.json").exists()


@pytest.mark.slow
def test_a_killed_sweep_goes_on_from_its_checkpoints(tiny_world: World, tmp_path: Path) -> None:
    settings = {
        "training": {"steps": 120, "batch_size": 4, "micro_batch_size": 2, "dtype": "fp32"},
        "scheduler": {"name": "none"},
    }
    path = sweep_file(tiny_world, tmp_path, **settings)
    process = start(path)
    journal = tmp_path / "results" / "tiny" / "journal.jsonl"
    deadline = time.monotonic() + 300
    while not (journal.exists() and '"rung": 1' in journal.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.2)
    kill(process)
    before = journal.read_text()

    process = start(path)
    text = finish(process)
    assert process.returncode == 0, text
    assert journal.read_text().startswith(before)
    records = load_records(journal.parent)
    assert [r.state for r in records] == ["COMPLETE", "COMPLETE"]
    assert max(r.details["resumed_from_step"] for r in records) > 0
    assert all([row["rung"] for row in r.curve] == [1, 2, 3, 4] for r in records)


SHORTER = {
    "study": [
        "phases.noise.seeds=[1, 2]",
        "phases.map.levels={learning_rate: [2e-3], kd_ratio: [0.9]}",
        "phases.exploit.sampler.num_trials=1",
        "phases.confirm.top=1",
        "phases.confirm.seeds=[101, 102]",
    ],
    "pareto": ["search.tokens=null", "sampler={name: nsga2, num_trials: 2}"],
    "methods": ["evaluation.suite=null", "sampler={name: random, num_trials: 2}"],  # its benchmarks come from a hub
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rank", "learning_rate", "alpha", "kd_ratio", "methods", "pareto", "study"])
def test_every_sweep_of_the_repository_runs(tiny_world: World, tmp_path: Path, name: str) -> None:
    """Two trials of two steps, or all phases; what the file says is kept, but for models, data and resources."""
    resources = "{workers_per_trial: 2, concurrency: 1}" if name == "methods" else "{concurrency: 1}"
    process = start(
        ROOT / "sweeps" / f"{name}.yaml",
        f"teacher={{model: {tiny_world.teacher}}}",
        f"student={{model: {tiny_world.student}}}",
        f"data={{source: {tiny_world.data}, max_length: 48, select_fraction: 0.2, report_fraction: 0.2}}",
        f"resources={resources}",
        f"storage={{path: {tmp_path / 'results'}, cache: {tmp_path / 'cache'}}}",
        "training.epochs=null",
        "training.steps=2",
        *SHORTER.get(name, ["sampler={name: random, num_trials: 2}"]),
        "seed=1",  # draws two settings that differ, in every file
        home=tmp_path,
    )
    text = finish(process)
    assert process.returncode == 0, text
    records = load_records(tmp_path / "results" / name)
    assert len(records) == (6 + 3 + 1 + 4 if name == "study" else 2)
    assert {r.state for r in records} == {"COMPLETE"}, [r.error for r in records]
    assert all(r.steps == 2 for r in records)
    assert records[0].params != records[1].params
    if name == "methods":
        assert [r.params["method"] for r in records] == ["lora", "kd"], "an adapter, all parameters; no teacher, a teacher"
        assert [r.metrics["train_kd"] is None for r in records] == [True, False]
        assert all(r.details["workers"] == 2 for r in records)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learning_rat=1", "did you mean `learning_rate`?"),
        ("training.learning_rate=fast", "training.learning_rate"),
        ("search={rnak: {choice: [1]}}", "did you mean `rank`?"),
        ("search={rank: {choice: []}}", "is empty"),
        ("search={learning_rate: {uniform: [2, 1]}}", "low"),
        ("lora.rank=0", "lora.rank"),
        ("distill.kd_ratio=1.5", "distill.kd_ratio"),
        ("data.source=nowhere.jsonl", "data.source"),
        ("resources.gpus_per_worker=1", "no GPU"),
        ("student.model=/nowhere/model", "student.model"),
        ("data.max_length=257", "data.max_length: 257 tokens, and student.model"),
        ("storage.path=/dev/null/results", "storage.path"),
        ("storage.path=/proc/results", "storage.path"),
        ("lora.target_modules=[nowhere]", "lora.target_modules: no linear layer is called 'nowhere'"),
        ("lora.modules_to_save=[nrom]", "lora.modules_to_save: no layer is called 'nrom'"),
        ("lora.rank_pattern={q_prj: 4}", "lora.rank_pattern: 'q_prj' matches no adapted layer"),
        ("targets.mode=projection distill.divergence=jsd", "targets.mode: projection is not exact here: divergence jsd"),
        ("student={prune: {layers: [0, 99]}}", "student.prune.layers"),
        ("student={prune: {keep: 99}}", "student.prune.keep: 99 layers of a teacher that has 4"),
        ("deepspeed.extra={zero_optimisation: {}}", "did you mean `zero_optimization`?"),
        ("deepspeed.extra={torch_autocast: {enabled: true}}", "deepspeed.extra"),
    ],
)
def test_a_mistake_is_one_line_with_its_path_and_writes_nothing(
    tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    path = sweep_file(tiny_world, tmp_path)
    assert main([str(path), *(override.split() if override.startswith("targets") else [override])]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and "\n" not in error
    assert not (tmp_path / "results").exists()


def test_a_results_folder_keeps_to_one_meaning_of_a_trial(
    tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep_file(tiny_world, tmp_path)
    folder = tmp_path / "results" / "tiny"
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(dump(load(path)))
    (folder / "trials.jsonl").write_text("{}\n")
    assert main([str(path), "training.batch_size=8"]) == 2
    error = capsys.readouterr().err
    assert "training.batch_size: 4 → 8" in error and "--fresh to put that one aside" in error
    assert not differences(load(path), load(path, ["sampler.num_trials=9", "resources.concurrency=1"])), "an extension is none"

    _set_aside(load(path))
    (aside,) = [f for f in folder.parent.iterdir() if f != folder]
    assert {f.name for f in aside.iterdir()} == {"sweep.yaml", "trials.jsonl"} and not list(folder.iterdir())


def test_another_vocabulary_is_refused(tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_world.teacher, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (next(token for token, number in vocabulary.items() if number == n) for n in (300, 301))
    vocabulary[first], vocabulary[second] = 301, 300
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main([str(sweep_file(tiny_world, tmp_path, teacher={"model": str(other)}))]) == 2
    assert "300" in capsys.readouterr().err


def test_other_data_under_the_same_path_is_refused(tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    lines = tiny_world.data.read_text().splitlines(keepends=True)
    data.write_text("".join(lines))
    path = sweep_file(tiny_world, tmp_path)
    config = load(path, [f"data.source={data}"])
    folder = tmp_path / "results" / "tiny"
    folder.mkdir(parents=True)
    _write_contract(config, identities(config, prepare(config, lambda text: None)))
    check_same_sources(folder, identities(config, prepare(config, lambda text: None)), "")
    data.write_text("".join(lines[:150]))
    assert main([str(path), f"data.source={data}"]) == 2
    assert "data.source: data.source changed since" in capsys.readouterr().err


def test_weights_that_are_not_whole_are_refused(tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_world.student, broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    assert main([str(sweep_file(tiny_world, tmp_path, student={"model": str(broken)}))]) == 2
    assert "student.model" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("options", "inherited", "address"),
    [
        (["--address", "10.0.0.2:6379"], "ray://head:10001", "10.0.0.2:6379"),
        (["--address", "10.0.0.1:6379"], "", "10.0.0.1:6379"),
        ([], "10.0.0.1:6379", "auto"),
        (["resources.address=10.0.0.2:6379"], "10.0.0.1:6379", "10.0.0.2:6379"),
        ([], "http://127.0.0.1:8265", None),
        ([], "", None),
    ],
)
def test_the_address_is_the_options_the_files_or_that_of_the_ray_job(
    tiny_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], inherited: str, address: str | None
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", inherited)
    asked: list[object] = []
    monkeypatch.setattr("neo_ray.sweep.run", lambda config, *_: asked.append(config.resources.address) or 0)
    assert main([str(sweep_file(tiny_world, tmp_path)), *options]) == 0
    assert asked == [address]


@pytest.mark.parametrize(
    ("options", "inherited", "words"),
    [
        (["--address", "ray://head:10001"], "", "resources.address: ray://head:10001 is the address of a Ray client's server"),
        (["--address", "http://head:8265"], "", "resources.address: http://head:8265 is the address of a job server"),
        (["--address", "redis://head:6379"], "", "resources.address: redis://head:6379 is the address of no Ray cluster"),
        ([], "ray://head:10001", "RAY_ADDRESS: ray://head:10001 is the address of a Ray client's server"),
        (["--address", "auto"], "ray://head:10001", "RAY_ADDRESS: ray://head:10001 is the address of a Ray client's server"),
    ],
)
def test_an_address_from_outside_of_the_cluster_is_refused_and_what_works_is_named(
    tiny_world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    inherited: str,
    words: str,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", inherited)
    monkeypatch.setattr("neo_ray.sweep.run", lambda *_: 0)
    assert main([str(sweep_file(tiny_world, tmp_path)), *options]) == 2
    said = capsys.readouterr().err
    assert words in said and all(way in said for way in ("auto", "host:port", "ray job submit", "ray exec"))


def test_ctrl_c_while_preparing_ends_with_130(
    tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("neo_ray.prepare.prepare", pressed)
    assert main([str(sweep_file(tiny_world, tmp_path))]) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on from here\n"


def test_a_dry_run_imports_neither_torch_nor_ray(tiny_world: World, tmp_path: Path) -> None:
    code = (
        "import sys; from neo_ray.sweep import main; code = main(sys.argv[1:]); "
        "bad = {'torch', 'ray', 'transformers'} & set(sys.modules); sys.exit(f'imported {bad}' if bad else code)"
    )
    path = sweep_file(tiny_world, tmp_path, student={"prune": {"keep": 99}})
    command = [sys.executable, "-c", code, str(path), "--dry-run"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rank" in done.stdout
    assert "would be refused: student.prune.keep: 99 layers of a teacher that has 4" in done.stdout


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.source=nowhere.jsonl", "data.source: nowhere.jsonl: no such file or folder"),
        ("teacher.model={folder}", "teacher.model: the folder {folder} holds no config.json"),
        ("student.model=./nowhere", "student.model: there is no folder ./nowhere"),
        ("student={{prune: {{layers: [0, 99]}}}}", "student.prune.layers: 99 with a teacher of 4 layers"),
        ("student={{prune: {{keep: 5}}}}", "student.prune.keep: 5 layers of a teacher that has 4"),
    ],
)
def test_a_dry_run_says_what_the_run_would_refuse_of_this_machine(
    tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    arguments = [str(sweep_file(tiny_world, tmp_path)), override.format(folder=tmp_path)]
    assert main([*arguments, "--dry-run"]) == 0
    (refusal,) = (line for line in capsys.readouterr().out.splitlines() if "would be refused: " in line)
    assert words.format(folder=tmp_path) in refusal
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err == f"error: {refusal.partition('would be refused: ')[2]}\n" and not shown.out, "before anything is prepared"


def test_a_dry_run_and_the_run_refuse_seeds_that_trials_have_had(
    tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = {"map": {"sampler": {"name": "random"}}, "confirm": {"seeds": [7, 8]}}
    arguments = [str(sweep_file(tiny_world, tmp_path, sampler={}, phases=phases))]
    folder = tmp_path / "results" / "tiny"
    assert main([*arguments, "--dry-run"]) == 0
    assert "would be refused" not in capsys.readouterr().out and not folder.exists(), "a dry run makes no folder"
    folder.mkdir(parents=True)
    Journal(folder).write("start", "0000", params={"rank": 2}, config={}, seed=7, phase="noise")
    assert main([*arguments, "--dry-run"]) == 0
    words = "phases.confirm.seeds: 7 is that of trial 0000 (phase noise); give others"
    assert f"would be refused: {words}\n" in capsys.readouterr().out
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err == f"error: {words}\n" and not shown.out, "before anything is prepared"
    assert main([*arguments, "--dry-run", "--fresh"]) == 0 and words not in capsys.readouterr().out

"""Is what README.md and docs/ say true? Every command is run or parsed, every example is read, every table is complete.

Reference: the doors' own parsers, `make -n`, Ray's command line, the schema. A command that no check knows fails.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import optuna
import pytest
import reference
import yaml
from doors import ROOT, finish, start, sweep_file
from planted import trial
from tiny import World, make_suite, make_tokenizer, passages

from neo_ray import analyze, bench, evaluate, export, status, sweep, targets
from neo_ray.adapters import attach, save_adapter, trained_parameters
from neo_ray.cautions import PARAMETER_OF
from neo_ray.config import AXIS_KINDS, Axis, DataConfig, SweepConfig
from neo_ray.loading import dump, load, validate
from neo_ray.records import load_records, write_records
from neo_ray.settings import DistillConfig, LoraConfig, TrialConfig
from neo_ray.sources import examples
from neo_ray.space import build_space

README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
MAX_LINES = 480
STARTS = r"python |make |ray \S+ |pip |source |optuna-dashboard "
"""What begins a command between backticks; `ray up` alone is a name."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[str]:
    """Every line of a shell block, and every command between backticks."""
    for block in blocks(text, "sh"):
        yield from filter(None, (line.partition(" #")[0].strip() for line in block.splitlines()))
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (code for code in re.findall(r"`([^`\n]+)`", prose) if re.match(STARTS, code))


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the rows under the table header that begins with `heading`."""
    lines = text.splitlines()
    start_of = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading}"))
    rows = []
    for line in lines[start_of + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def words_of(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files with a results folder of its quickstart: records, no adapters."""
    from neo_ray.mirror import Mirror
    from neo_ray.searcher import open_study

    folder = tmp_path_factory.mktemp("checkout")
    for name in ("sweeps", "docs", "deploy"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("Makefile", "cluster.yaml", "pyproject.toml", "constraints.txt"):
        shutil.copyfile(ROOT / name, folder / name)
    results = folder / "results" / "quickstart"
    config = load(ROOT / "sweeps" / "quickstart.yaml", [f"storage.path={folder / 'results'}"])
    settings = [{"rank": (4, 16, 64)[i % 3], "alpha": 32.0, "learning_rate": 1e-3 * (i + 1), "kd_ratio": 0.5} for i in range(9)]
    write_records(results, [trial(f"{i:04d}", params, 4.7 + i / 100) for i, params in enumerate(settings)])
    (results / "sweep.yaml").write_text(dump(config), encoding="utf-8")
    Mirror(config, open_study(config, build_space(config), load_records(results)), print).follow()
    (folder / "trial.yaml").write_text(dump(config.model_copy(update={"name": "trial"})), encoding="utf-8")
    (folder / "mine.yaml").write_text(next(block for block in blocks(README, "yaml") if "name: mine" in block), encoding="utf-8")
    (folder / "conversations.jsonl").write_text(blocks(README, "json")[0].splitlines()[0], encoding="utf-8")
    rows = [f"{r},{lr},{r * lr},{m}" for r in (4, 8, 16) for lr in (1e-4, 1e-3) for m in "ab"]
    (folder / "theirs.csv").write_text("\n".join(["lora_r,lr,eval_loss,model", *rows]), encoding="utf-8")
    assert analyze.main([str(results)]) == 0
    return folder


def run_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run or parse one command. An AssertionError or SystemExit: it would not work as written."""
    words = shlex.split(command)
    if "&&" in words:
        first = words.index("&&")
        run_command(shlex.join(words[:first]), capsys)
        return run_command(shlex.join(words[first + 1 :]), capsys)
    name = next((name for name in sorted(CHECKS, key=len, reverse=True) if words[: len(name.split())] == name.split()), None)
    assert name is not None, f"no check knows `{command}`"
    CHECKS[name](words[len(name.split()) :], capsys)


def _sweep(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As a dry run, which reads the file, the overrides and what is in the results folder."""
    if words[0].isupper():  # FILE stands for any
        return
    assert sweep.main([*words, "--dry-run"]) == 0, capsys.readouterr().err
    plan = capsys.readouterr().out
    assert "refused" not in plan, plan
    assert " is ignored" not in plan or words[0].startswith("results/"), plan  # a resolved file has every default written out


def _analyze(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze.main(words) == 0, capsys.readouterr().err


def _status(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Of the sweep that is here; what another one would say is parsed alone."""
    here = ["results/quickstart" if word.startswith("results/") else word for word in words]
    assert status.main(here) == 1, capsys.readouterr().err


def _export(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As far as it goes without an adapter: the trial is found and fit to be exported."""
    assert export.main(words) == 2 and "has no adapter any more" in capsys.readouterr().err


def _bench(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Minutes: its options are looked at here, and each benchmark is run on small models in test_bench."""
    assert bench._parser().parse_args(words).benchmark


def _evaluate(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As far as it goes without an adapter."""
    assert evaluate.main(words) == 2 and "has no adapter to ask" in capsys.readouterr().err


def _targets(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """On a cache of the checkout's own, which is empty; what would be built, as a sweep's dry run."""
    if words[0] == "build":
        return _sweep(words[1:], capsys)
    assert targets.main([*words, "--cache", "cache"]) == 0, capsys.readouterr().err


def _make(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    planned = subprocess.run(["make", "-n", *words], capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr


def _ray(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Ray's own parser; a command that is sent to the cluster is checked like any other."""
    from ray.scripts.scripts import cli

    words = words[: words.index(">")] if ">" in words else words
    command = cli.commands[words[0]]
    if words[0] == "job":
        words = words[1:]
        assert words[0] in command.commands
        command = command.commands[words[0]]
    command.make_context(words[0], list(words[1:]))
    assert all(Path(word).is_file() for word in words if word.endswith(".yaml") and " " not in word)
    if words[0] in ("exec", "submit"):
        run_command(words[-1], capsys)


def _cd(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    mounts = yaml.safe_load(Path("cluster.yaml").read_text(encoding="utf-8"))["file_mounts"]
    assert any(mount.startswith(f"{words[0]}/") for mount in mounts)


def _pip(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert words[:3] == ["-c", "constraints.txt", "-e"]
    extras = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert re.fullmatch(r"\.\[(\w+)\]", words[3])[1] in extras  # type: ignore[index]


def _kubectl(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The file is there; what else is named stands in it."""
    (file,) = [word for word in words if word.startswith("deploy/")] or ["deploy/kuberay/rayjob.yaml"]
    assert Path(file).is_file()
    documents = list(yaml.safe_load_all(Path(file).read_text(encoding="utf-8")))
    match words:
        case ["apply" | "delete", "-f", _]:
            return
        case ["logs", "-f", name]:
            assert name == f"job/{documents[-1]['metadata']['name']}"
        case ["create", "secret", "generic", name, source]:
            assert name in str(documents) and source.startswith("--from-file=")
        case _:
            raise AssertionError(words)


def _source(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert words == [".venv/bin/activate"] and "VENV ?= .venv\n" in Path("Makefile").read_text(encoding="utf-8")


def _dashboard(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import optuna

    assert optuna.get_all_study_names(storage=words[0])


def _python(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A script of the repository, run by a test of its own."""
    assert (ROOT / words[0]).is_file() and Path(words[0]).stem in sys.modules


CHECKS: dict[str, Callable[[list[str], pytest.CaptureFixture[str]], None]] = {
    "python -m neo_ray.sweep": _sweep,
    "python -m neo_ray.analyze": _analyze,
    "python -m neo_ray.status": _status,
    "python -m neo_ray.bench": _bench,
    "python -m neo_ray.evaluate": _evaluate,
    "python -m neo_ray.export": _export,
    "python -m neo_ray.targets": _targets,
    "python": _python,
    "make": _make,
    "ray": _ray,
    "cd": _cd,
    "pip install": _pip,
    "kubectl": _kubectl,
    "source": _source,
    "optuna-dashboard": _dashboard,
}


@pytest.mark.parametrize("command", dict.fromkeys(c for text in PAGES.values() for c in commands(text)))
def test_every_command_works_as_written(
    command: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout)
    run_command(command, capsys)


@pytest.mark.parametrize(
    "command",
    [
        "neo-ray results/quickstart",
        "python -m neo_ray.sweep sweeps/quickstart.yaml lora.rnak=3",
        "python -m neo_ray.sweep sweeps/quickstart.yaml lora.rank=3",
        "python -m neo_ray.sweep sweeps/none.yaml",
        "python -m neo_ray.sweep sweeps/quickstart.yaml --frsh",
        "python -m neo_ray.analyze results/none",
        "python -m neo_ray.export results/quickstart --trial 9999",
        "python -m neo_ray.export results/quickstart --dtype fp8",
        "python -m neo_ray.targets prune",
        "make quikstart",
        "ray up",
        "ray exec cluster.yaml 'cd ~/neo_ray && python -m neo_ray.sweep sweeps/none.yaml'",
        "ray job stopp rank",
        "ray job submit -- bash -c 'cd ~/neo_ray && python -m neo_ray.sweep sweeps/none.yaml'",
        "python -m neo_ray.status results/quickstart --wach 3",
        "ray exec cluster.yaml --tmuxx 'cd ~/neo_ray'",
        "pip install -c constraints.txt -e '.[oracle]'",
        "ray up deploy/oracle.yaml",
        "kubectl apply -f deploy/kuberay/rayjobs.yaml",
        "kubectl logs -f job/ranks",
    ],
)
def test_a_command_that_would_not_work_is_found(
    command: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import click

    monkeypatch.chdir(checkout)
    with pytest.raises((AssertionError, SystemExit, click.UsageError)):
        run_command(command, capsys)


@pytest.mark.parametrize("block", blocks(README, "yaml"))
def test_every_yaml_example_is_a_sound_sweep(block: str) -> None:
    raw = yaml.safe_load(block)
    whole = {"name": "x", "teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"source": "x.jsonl"}, **raw}
    build_space(validate(whole))


def test_the_axes_example_shows_every_kind() -> None:
    search = next(yaml.safe_load(block)["search"] for block in blocks(README, "yaml") if "name:" not in block)
    axes = [Axis.model_validate(axis) for axis in search.values()]
    assert {axis.kind for axis in axes} == set(AXIS_KINDS)
    assert any(axis.when for axis in axes) and any(axis.sets for axis in axes)


def test_the_data_examples_are_of_the_three_formats() -> None:
    (block,) = blocks(README, "json")
    found = [next(examples(DataConfig(source="x"), iter([("here", json.loads(line))]))).kind for line in block.splitlines()]
    assert found == ["chat", "instruction", "text"] and found == [row[0] for row in table(README, "format")][:3]


def test_an_exported_model_generates_as_written(tiny_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    block = next(block for block in blocks(README, "python") if "AutoModel" in block)
    shutil.copytree(tiny_world.student, tmp_path / "exported" / "0003" / "model")
    adapter: Any = attach(AutoModelForCausalLM.from_pretrained(tiny_world.student), TrialConfig())
    weights = {name: parameter.detach() for name, parameter in trained_parameters(adapter).items()}
    save_adapter(adapter, weights, tmp_path / "exported" / "0003" / "adapter")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert type(names["branch"]).__name__.startswith("PeftModel")


def test_the_notebook_s_lines_run_as_written(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = next(block for block in blocks(README, "python") if "import neo_ray" in block)
    monkeypatch.chdir(checkout)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    found = names["found"]
    assert len(found.frame) == len(found.records) == 9 and len(found.verdicts) == len(found.guidelines)
    assert set(found.figures) >= {"matrix", "slices"} and found.not_drawn
    assert list(found.curve("learning_rate").columns) == ["value", "mean", "low", "high", "num_trials"]
    assert found.surface is not None and len(found.surface.expected(found.frame)) == 9
    assert found.law is not None and found.law.gamma is None and "end of those tried" in found.law.note
    with pytest.raises(ValueError, match="ray: holds no experiment of Ray Tune"):
        found.result_grid()


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGES[name])
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


def test_every_sweep_file_has_its_row() -> None:
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "sweeps").rglob("*.yaml")}
    assert {words_of(row[0])[0] for row in table(README, "file")} == files


def test_every_section_has_its_row() -> None:
    assert {word for row in table(README, "section") for word in words_of(row[0])} == set(SweepConfig.model_fields)


def _options(section: type, name: str) -> set[str]:
    return set(get_args(section.model_fields[name].annotation))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("heading", "section", "name"),
    [("`method`", TrialConfig, "method"), ("`divergence`", DistillConfig, "divergence"), ("`variant`", LoraConfig, "variant")],
)
def test_every_method_divergence_and_variant_has_its_row(heading: str, section: type, name: str) -> None:
    rows = table(PAGES["docs/methods.md"], heading)
    assert [words_of(row[0])[0] for row in rows] == list(get_args(section.model_fields[name].annotation))  # type: ignore[attr-defined]
    assert all(word in README for word in (f"`{option}`" for option in _options(section, name)))


def test_the_parameters_of_divergences_stand_with_their_defaults() -> None:
    rows = {words_of(row[0])[0]: row for row in table(PAGES["docs/methods.md"], "`divergence`")}
    for parameter, users in PARAMETER_OF.items():
        number = str(DistillConfig.model_fields[parameter].default)
        assert {name for name, row in rows.items() if parameter in words_of(row[2])} == set(users)
        assert all(f", {number}, " in rows[user][2] for user in users)
    assert [name for name, row in rows.items() if row[3] != "T²"] == ["total_variation"]


def test_the_reference_is_the_schemas() -> None:
    between = PAGES["docs/reference.md"].partition(reference.BEGIN)[2].partition(reference.END)[0]
    assert between == "\n" + reference.rendered(), "run: python tests/reference.py"


def test_every_field_has_words_and_none_has_them_twice() -> None:
    fields = {reference.path_of(section, name): field for section, name, field in reference.fields()}
    described = {path for path, field in fields.items() if field.description}
    without = [path for path, field in fields.items() if not reference.words_of(path, field)]
    assert without == [] and set(reference.WORDS) == set(fields) - described


@pytest.mark.slow
def test_the_results_table_names_all_that_a_sweep_leaves_and_the_hubs_token_stands_nowhere(
    tiny_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_folder: Path
) -> None:
    token = "hf_" + "NotForAnyLog" * 3
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("RAY_TMPDIR", str(short_folder))
    training = {"steps": 30, "batch_size": 4, "micro_batch_size": 2, "dtype": "fp32"}
    make_suite(tmp_path / "own", passages(make_tokenizer(), 8))
    ranked_by = {"evaluation": {"points": 2, "suite": str(tmp_path / "own")}, "objective": {"metric": "suite"}}
    process = start(sweep_file(tiny_world, tmp_path, training=training, scheduler={"name": "none"}, **ranked_by))
    folder, during = tmp_path / "results" / "tiny", set[str]()
    while process.poll() is None:
        during |= _entries(folder)
        time.sleep(0.1)
    text = finish(process)
    assert process.returncode == 0, text
    named = {word.rstrip("/") for row in table(README, "name ") for word in words_of(row[0])}
    passing = {
        "lease.json",
        ".lease-…",
        "study.db-journal",
        "trials/<id>/checkpoint",
        "export/<id>",
        "wandb",
    }
    assert {"lease.json", "trials/<id>/checkpoint"} <= during
    assert {name for name in during if not any(part.startswith(".") for part in name.split("/"))} <= named | {"trials"}, (
        "a row for each"
    )
    assert named - _entries(folder) == passing
    logs = [path for path in short_folder.rglob("*") if path.is_file()]
    assert {"raylet.out", "gcs_server.out"} <= {path.name for path in logs}
    written = [*logs, *(path for path in tmp_path.rglob("*") if path.is_file())]
    assert token not in text and [str(path) for path in written if token.encode() in path.read_bytes()] == []
    records = load_records(folder)
    told = [trial.value for trial in optuna.load_study(study_name="tiny", storage=f"sqlite:///{folder / 'study.db'}").trials]
    assert sorted(told) == sorted(record.metrics["suite"] for record in records), "the benchmarks' average is what is looked for"
    assert load(folder / "best.yaml").objective.mode == "max"


def _entries(folder: Path) -> set[str]:
    """What a results folder holds, in the words of the table."""
    return {path.name for path in folder.glob("*")} | {f"trials/<id>/{path.name}" for path in folder.glob("trials/*/*")}


def test_the_readme_stays_readable() -> None:
    assert len(README.splitlines()) <= MAX_LINES

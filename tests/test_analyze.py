"""Reference: the records themselves. Whatever they hold, the door ends with exit code 0 or 2 and says what cannot be said."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from planted import draw, flat, planted, sweep, trial, valley
from rich.console import Console
from test_laws import grid, truth

from neo_ray.analyze import analyse, main, write
from neo_ray.config import SweepConfig
from neo_ray.loading import dump, load, plain
from neo_ray.records import Journal, TrialRecord, load_records, write_records
from neo_ray.report import best_yaml, markdown, render_table, trials_table
from neo_ray.settings import TrialConfig
from neo_ray.space import build_space
from neo_ray.trials import grid_settings, trials_planned


def folder_with(path: Path, records: list[TrialRecord], config: SweepConfig | None = None) -> Path:
    write_records(path, records)
    if config:
        (path / "sweep.yaml").write_text(dump(config), encoding="utf-8")
    return path


def mixed() -> list[TrialRecord]:
    """30 trials of every state."""
    records = planted(draw(24, 1), valley)
    for i, params in enumerate(draw(6, 9)):
        change: dict[str, Any] = [
            {"state": "PRUNED"},
            {"state": "FAILED", "cause": "out_of_memory", "error": "OutOfMemoryError: [1] of | 2 <b>", "metrics": {}},
            {"state": "RUNNING"},
        ][i % 3]
        records.append(trial(f"x{i}", params, 4.9, **change))
    return records


def test_the_door_writes_all_files_and_prints_their_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_with(tmp_path / "planted", mixed(), sweep())
    assert main([str(folder)]) == 0
    printed = capsys.readouterr().out
    named = printed.replace("\n", " ").partition(f"{folder}: ")[2]
    for name in ("trials.jsonl", "guidelines.json", "report.md", "best.yaml"):
        assert (folder / name).exists() and name in named
    assert "Best setting" in printed and "supported" in printed and "undecided" in printed


STUDIES = sorted(path.parent for path in (Path(__file__).parent.parent / "docs" / "studies").glob("*/trials.jsonl"))
FOUND = {path.name: lambda folder, path=path: path for path in STUDIES} | {
    "planted": lambda folder: folder_with(folder / "in", mixed(), sweep()),
    "a map": lambda folder: folder_with(folder / "in", planted(grid(), truth, noise=0.01, seeds=(0, 1))),
    "few": lambda folder: folder_with(folder / "in", planted(draw(9, 0), valley), sweep()),
    "all failed": lambda folder: folder_with(folder / "in", STRANGE["all failed"], sweep()),
}


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("case", FOUND)
def test_the_guidelines_stand_on_one_screen(
    case: str, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("neo_ray.analyze.WIDTH_OF_A_LOG", columns)
    monkeypatch.setattr("neo_ray.page.page", lambda analysis: "")
    study = FOUND[case](tmp_path)
    assert len(STUDIES) >= 2 and main([str(study), "--out", "report"]) == 0
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert len(lines) <= 40 and max(map(len, lines)) <= columns, "\n".join(lines)
    text = " ".join(" ".join(lines).split())
    data = json.loads(Path("report/guidelines.json").read_text(encoding="utf-8"))
    shown = [g for g in data["guidelines"] if g["verdict"] != "undecided" and f"{g['verdict']} {g['claim'][:90]}" in text]
    assert len(shown) == sum(g["verdict"] != "undecided" for g in data["guidelines"]), "what was decided goes before all else"
    still_open = [g["hypothesis"] for g in data["guidelines"] if g["verdict"] == "undecided" and g["trials"]]
    assert not still_open or f"undecided {still_open[0][:40]}" in text
    assert "report.md" in text and "Best setting" in text


def test_best_yaml_is_a_sweep_of_one_trial_with_the_winner_s_config(tmp_path: Path) -> None:
    records = mixed()
    best = min((r for r in records if r.state == "COMPLETE"), key=lambda r: r.metrics["select_ce"] or math.inf)
    path = tmp_path / "best.yaml"
    path.write_text(best_yaml(sweep(), best.model_copy(update={"ended": 1_700_000_000.0})), encoding="utf-8")
    again = load(path)
    assert plain(again.trial) == best.config
    assert (again.name, again.scheduler.name) == ("planted-best", "none")
    space = build_space(again)
    assert trials_planned(again, space) == 1 and grid_settings(again, space) == [({}, best.seed)]
    assert again.teacher == sweep().teacher and again.data == sweep().data
    header = path.read_text(encoding="utf-8").splitlines()[:2]
    assert best.id in header[0] and "2023-11-14" in header[0] and "select_ce" in header[1]


def test_best_yaml_keeps_the_seed_and_falls_back_to_the_parameters(tmp_path: Path) -> None:
    record = trial("a", {"rank": 4, "learning_rate": 3e-3}, 4.5, seed=7).model_copy(update={"config": {}})
    path = tmp_path / "best.yaml"
    path.write_text(best_yaml(sweep(), record), encoding="utf-8")
    again = load(path)
    assert (again.seed, again.lora.rank, again.training.learning_rate) == (7, 4, 3e-3)


def test_guidelines_json_follows_its_schema_and_has_no_nan(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, planted(draw(5, 2), valley), sweep())
    write(analyse(folder), folder)
    data = json.loads((folder / "guidelines.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert set(data) == {"schema_version", "generated_from", "noise", "best", "aspects", "notes", "guidelines"}
    assert data["schema_version"] == 1 and data["generated_from"]["trials"] == {"COMPLETE": 5}
    assert data["guidelines"]
    for guideline in data["guidelines"]:
        assert {"claim", "verdict", "effect", "interval", "trials", "scope", "p_value", "note"} <= set(guideline)
        assert guideline["verdict"] in ("supported", "refuted", "undecided")


def test_a_journal_is_the_source_and_trials_jsonl_is_rebuilt_from_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for i in range(2):
        journal.write("start", f"t{i}", params={"rank": 4 + i}, config=plain(TrialConfig()), seed=0)
        journal.write("report", f"t{i}", row={"rung": 1, "tokens": 10, "step": 1, "seconds": 1.0, "select_ce": 4.5 + i})
    journal.write("end", "t0", state="COMPLETE", metrics={"report_ce": 4.6})
    write_records(tmp_path, [trial("stale", {"rank": 1}, 1.0)])
    assert main([str(tmp_path)]) == 0
    assert [(r.id, r.state) for r in load_records(tmp_path / "trials.jsonl")] == [("t0", "COMPLETE"), ("t1", "RUNNING")]


def test_trials_jsonl_stays_as_it_is_where_it_is_the_only_source(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, mixed())
    view = folder / "trials.jsonl"
    view.write_bytes(view.read_bytes() + b'{"half": \n\xff\xfe garbage\n[1, 2]\n{"id": 7}\n')
    before = view.read_bytes()
    assert main([str(folder)]) == 0
    assert view.read_bytes() == before


def test_out_writes_elsewhere_and_leaves_the_folder_alone(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "in", mixed(), sweep())
    before = sorted(folder.iterdir())
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 0
    assert sorted(folder.iterdir()) == before
    assert len(load_records(tmp_path / "out")) == len(mixed())


@pytest.mark.parametrize("content", [None, b"", b"not json\n[]\n{}\n"])
def test_a_folder_without_records_is_one_line_and_exit_code_2(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "trials.jsonl").write_bytes(content)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize("event", [{"event": "start", "trial": "a"}, {"event": "start", "trial": "a", "time": 0, "params": 7}])
def test_an_alien_event_in_the_journal_is_one_line_and_exit_code_2(
    event: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "journal.jsonl").write_text(json.dumps(event) + "\n")
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_path_that_is_not_there_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


STRANGE: dict[str, list[TrialRecord]] = {
    "one trial": planted(draw(1, 0), flat),
    "one bare trial": [TrialRecord(id="a")],
    "complete without metrics": [TrialRecord(id=str(i), state="COMPLETE", params={"rank": i}) for i in range(1, 9)],
    "all failed": [trial(str(i), p, None, state="FAILED", metrics={}) for i, p in enumerate(draw(6, 0))],
    "all pruned": [trial(str(i), p, 4.9, state="PRUNED") for i, p in enumerate(draw(6, 0))],
    "all running": [TrialRecord(id=str(i), params=p) for i, p in enumerate(draw(6, 0))],
    "all diverged": [trial(str(i), p, None) for i, p in enumerate(draw(8, 0))],
    "one value on an axis": planted([{**p, "rank": 8} for p in draw(12, 0)], flat),
    "no axis": planted([{}] * 6, flat, seeds=(0, 1)),
    "all equal": planted(draw(12, 0), flat, noise=0),
    "mixed types": planted([{"rank": r, "x": x} for r, x in zip([1, "a", None, True, 2.5, [1]], "abcdef", strict=True)], flat),
    "missing axes": planted([{"rank": 4}, {"alpha": 8.0}, {"kd_ratio": 0.5}] * 4, flat),
    "infinite": [trial(str(i), p, math.inf if i % 2 else 4.5) for i, p in enumerate(draw(12, 0))],
    "curve without rungs": [trial(str(i), p, 4.5, curve=[{"x": 1}]) for i, p in enumerate(draw(6, 0))],
    "odd details": [trial(str(i), p, 4.5 + i, details={"baseline": "none"}) for i, p in enumerate(draw(6, 0))],
    "one level each": planted([{"method": m} for m in ("neo", "lora", "sft", "kd")] * 2, flat),
    "unknown axis": planted([{"wheels": i} for i in range(1, 9)], lambda p: p["wheels"]),
}


@pytest.mark.parametrize("config", [None, sweep()], ids=["alone", "with sweep.yaml"])
@pytest.mark.parametrize("case", STRANGE)
def test_strange_records_end_in_statements_not_in_a_traceback(case: str, config: SweepConfig | None, tmp_path: Path) -> None:
    assert main([str(folder_with(tmp_path, STRANGE[case], config))]) == 0
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "nan" not in report.lower().replace("nan, or worse", "") and "None" not in report
    data = json.loads((tmp_path / "guidelines.json").read_text())
    directions = [g for g in data["guidelines"] if g["margin"] is None and g["axis"] not in ("wheels", "training")]
    assert not any(g["verdict"] == "supported" for g in directions)


def test_without_a_winner_the_report_says_so_and_there_is_no_best_yaml(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, STRANGE["all failed"], sweep())
    assert main([str(folder)]) == 0
    assert "No COMPLETE trial has a value of select_ce" in (folder / "report.md").read_text()
    assert not (folder / "best.yaml").exists()


def test_what_is_assumed_without_a_sweep_file_is_said(tmp_path: Path) -> None:
    notes = " ".join(analyse(folder_with(tmp_path, mixed())).notes)
    assert "no sweep.yaml" in notes and "select_ce" in notes
    (tmp_path / "sweep.yaml").write_text("search: [1, 2", encoding="utf-8")
    with pytest.raises(ValueError, match=r"sweep.yaml: cannot be used"):  # nothing is guessed, and nothing overwritten
        analyse(tmp_path)


def test_notes_count_every_state_and_name_constant_axes(tmp_path: Path) -> None:
    records = [*mixed(), trial("d", {"rank": 4, "learning_rate": 0.05}, None, state="FAILED", cause="diverged")]
    notes = " ".join(analyse(folder_with(tmp_path / "a", records)).notes)
    assert "31 trials: 24 COMPLETE, 2 RUNNING, 2 PRUNED, 3 FAILED" in notes
    assert "1 trial diverged" in notes and "0.05" in notes
    constant = analyse(folder_with(tmp_path / "b", STRANGE["one value on an axis"], sweep())).notes
    assert "rank is 8 in every trial: nothing can be said of it." in constant


def test_table_has_the_best_first_then_running_pruned_and_failed_with_their_cause() -> None:
    columns, rows = trials_table(mixed())
    states = [row[columns.index("state")] for row in rows]
    assert states == ["COMPLETE"] * 24 + ["RUNNING"] * 2 + ["PRUNED"] * 2 + ["FAILED: out of memory"] * 2
    values = [float(row[columns.index("CE")]) for row in rows[:24]]
    assert values == sorted(values)
    assert rows[-1][columns.index("CE")] == "–" and {"rank", "learning_rate", "KL", "peak GB"} <= set(columns)


def test_a_parameter_that_never_varies_has_no_column() -> None:
    columns, _ = trials_table(planted([{"rank": r, "alpha": 8.0} for r in (1, 2)], flat))
    assert "rank" in columns and "alpha" not in columns
    assert "alpha" in trials_table(planted([{"rank": 1, "alpha": 8.0}], flat))[0]


def rendered(width: int) -> list[str]:
    stream = io.StringIO()
    render_table(*trials_table(mixed()), Console(file=stream, width=width))
    return stream.getvalue().splitlines()


def test_the_table_is_whole_at_width_100_and_in_a_plain_log() -> None:
    lines = rendered(100)
    assert max(map(len, lines)) <= 100 and not any("…" in line or "\x1b" in line for line in lines)
    assert not any("no room for" in line for line in lines)
    assert sum(line.startswith("t0") for line in lines) == 24


def test_a_narrow_terminal_drops_whole_columns_and_says_which() -> None:
    lines = rendered(70)
    assert max(map(len, lines)) <= 70 and not any("…" in line for line in lines)
    assert any("no room for: " in line and "peak GB" in line for line in lines)
    assert sum(line.startswith("t0") for line in lines) == 24


def test_report_has_every_trial_the_matrix_curves_and_failures(tmp_path: Path) -> None:
    text = markdown(analyse(folder_with(tmp_path, mixed(), sweep())))
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles[1:] == [
        "## What was swept",
        "## Best setting",
        "## Laws",
        "## Guidelines",
        "## Importances",
        "## Was it safe to stop early?",
        "## Not tested",
        "## What to run next",
        "## Rank × learning rate",
        "## Learning curves",
        "## Failures by cause",
        "## Noise",
        "## All trials",
    ]
    assert all(f"| {record.id} |" in text for record in mixed())
    assert "OutOfMemoryError: \\[1\\] of \\| 2 \\<b\\>" in text
    widths = {line.count("|") - line.count("\\|") for line in text.split("## All trials")[1].splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_a_section_without_data_is_not_written(tmp_path: Path) -> None:
    records = [trial("a", {"alpha": 8.0}, 4.5, curve=[], details={})]
    text = markdown(analyse(folder_with(tmp_path, records)))
    assert not any(title in text for title in ("## Guidelines", "## Rank", "## Learning curves", "## Failures"))


def test_the_analysis_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, mixed(), sweep())
    code = f"import sys, neo_ray.analyze as a; a.main([{str(folder)!r}]); print(sorted({{'torch', 'ray'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and done.stderr == ""


def test_importing_the_door_loads_nothing_heavy() -> None:
    code = "import sys, neo_ray.analyze; print(sorted({'pandas', 'scipy', 'statsmodels', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


STUDIES = sorted(p.parent for p in (Path(__file__).parent.parent / "docs" / "studies").glob("*/trials.jsonl"))


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_the_reports_of_the_studies_are_what_their_records_say(study: Path, tmp_path: Path) -> None:
    copied = tmp_path / study.name
    shutil.copytree(study, copied)
    write(analyse(copied), copied)
    assert (copied / "report.md").read_text() == (study / "report.md").read_text()
    answer = next(line for line in (study.parent / "README.md").read_text().splitlines() if f"[{study.name}]" in line)
    for number in re.findall(r"\d\.\d{2,}", answer):
        assert number in (study / "report.md").read_text()

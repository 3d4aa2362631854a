"""Reference: the files that others write. Their own libraries make them here: Ray Tune's JSON logger, Optuna's storage."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from planted import valley

from neo_ray.analyze import main
from neo_ray.foreign import Columns, Group, is_foreign, read

RANKS, RATES = (4, 8, 16, 32, 64), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
GRID = [(rank, rate) for rank in RANKS for rate in RATES]
MAPPED = Columns({"rank": "r", "learning_rate": "lr"}, "loss")


def score(rank: int, rate: float, seed: int = 0) -> float:
    """The planted valley with a ripple for noise: best at learning rate 1e-3, better with rank."""
    return valley({"rank": rank, "learning_rate": rate}) + 0.005 * math.sin(100 * rank * math.log(rate) + seed)


def csv_of(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return "\n".join([",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]) + "\n"


def rows_of(seeds: int = 1, **more: Any) -> list[dict[str, Any]]:
    return [{"r": r, "lr": lr, "loss": score(r, lr, s), "seed": s, **more} for r, lr in GRID for s in range(seeds)]


def one(path: Path, asked: Columns = MAPPED) -> Group:
    (group,) = read(str(path), asked)
    return group


def verdicts(folder: Path) -> dict[str, str]:
    data = json.loads((folder / "guidelines.json").read_text(encoding="utf-8"))
    return {g["hypothesis"]: g["verdict"] for g in data["guidelines"]}


ASKED = ["--param", "rank=r", "--param", "learning_rate=lr", "--metric", "loss"]


def test_a_csv_of_somebody_else_s_sweep_gives_guidelines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "theirs.csv"
    table.write_text(csv_of(rows_of(seeds=2)), encoding="utf-8")
    before = table.read_bytes()
    assert main([str(table), *ASKED]) == 0
    report = tmp_path / "theirs-report"
    assert {path.name for path in report.iterdir()} >= {"trials.jsonl", "guidelines.json", "report.md", "report.html"}
    assert verdicts(report)["loss depends on learning_rate"] == "supported"
    assert "rank from r, learning_rate from lr" in (report / "report.md").read_text(encoding="utf-8")
    assert table.read_bytes() == before and "supported" in capsys.readouterr().out


def test_a_table_tells_parameters_seeds_costs_and_states(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    rows = [
        {"r": 4, "lr": 1e-3, "loss": 1.5, "seed": 7, "runtime": 12.5, "tokens": 900, "state": "finished"},
        {"r": 8, "lr": 1e-3, "loss": "nan", "seed": 7, "state": "finished"},
        {"r": 8, "lr": 1e-2, "loss": 3.0, "seed": 7, "state": "Pruned"},
        {"r": 16, "lr": 1e-2, "seed": 8, "state": "crashed"},
        {"r": 16, "lr": 1e-4, "seed": 8, "state": "finished"},
    ]
    table.write_text(csv_of(rows), encoding="utf-8")
    records = one(table).records
    assert [(r.state, r.cause) for r in records] == [
        ("COMPLETE", None),
        ("FAILED", "diverged"),
        ("PRUNED", None),
        ("FAILED", "error"),
        ("FAILED", "error"),
    ]
    assert records[0].params == {"rank": 4, "learning_rate": 1e-3} and [r.seed for r in records] == [7, 7, 7, 8, 8]
    assert (records[0].seconds, records[0].tokens, records[0].metrics) == (12.5, 900, {"loss": 1.5})
    assert records[4].error == "loss is missing" and records[4].metrics == {"loss": None}  # never zero


def test_nested_jsonl_has_columns_with_dots_and_tells_its_bad_lines(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    lines = [json.dumps({"config": {"lora": {"r": r}, "lr": lr}, "eval": {"loss": score(r, lr)}}) for r, lr in GRID]
    table.write_bytes("\n".join(lines).encode() + b'\n{"half": \n[1]\n' + b"[" * 100_000 + b"\n")
    group = one(table, Columns({"rank": "config.lora.r", "lr": "config.lr"}, "eval.loss"))
    assert len(group.records) == len(GRID) and group.records[0].params == {"rank": 4, "lr": 1e-4}
    assert any("3 lines of it could not be read" in note for note in group.notes)


def test_max_means_that_higher_is_better(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(csv_of([{**row, "loss": -row["loss"]} for row in rows_of()]), encoding="utf-8")
    best = []
    for mode in ("min", "max"):
        assert main([str(table), *ASKED, "--mode", mode, "--out", str(tmp_path / mode)]) == 0
        data = json.loads((tmp_path / mode / "guidelines.json").read_text(encoding="utf-8"))
        best.append(data["best"]["value"])
        assert data["generated_from"]["mode"] == mode
    losses = [-row["loss"] for row in rows_of()]
    assert best == [pytest.approx(min(losses)), pytest.approx(max(losses))]


def test_groups_are_analysed_apart_and_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.csv"
    table.write_text(csv_of([*rows_of(model="a/1"), *rows_of(model="b")]), encoding="utf-8")
    assert main([str(table), *ASKED, "--group", "model", "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a-1", "b", "pooled.json", "pooled.md"]
    assert "loss depends on learning_rate: a/1 supported, b supported" in capsys.readouterr().out
    assert len((tmp_path / "out" / "b" / "trials.jsonl").read_text().splitlines()) == len(GRID)


def test_without_a_column_for_it_equal_settings_are_repeats_with_other_seeds(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(csv_of([{k: v for k, v in row.items() if k != "seed"} for row in rows_of(seeds=3)]), encoding="utf-8")
    group = one(table)
    assert sorted({r.seed for r in group.records}) == [0, 1, 2]
    assert any(f"{2 * len(GRID)} trials count as repeats" in note for note in group.notes)
    named = tmp_path / "named.csv"
    named.write_text(csv_of([{**row, "seed": "abc"[row["seed"]]} for row in rows_of(seeds=3)]), encoding="utf-8")
    assert len({r.seed for r in one(named).records}) == 3  # names of seeds differ as numbers do


def test_a_state_that_nobody_knows_is_told(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(csv_of(rows_of(state="bogus")), encoding="utf-8")
    group = one(table)
    assert {r.state for r in group.records} == {"COMPLETE"}
    assert any("not known count as complete: bogus" in note for note in group.notes)


@pytest.mark.parametrize("metric", ["seconds", "state", "id", "tokens"])
def test_a_metric_may_be_called_as_a_column_of_ours(metric: str, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(csv_of([{"r": r, "lr": lr, metric: score(r, lr)} for r, lr in GRID]), encoding="utf-8")
    assert main([str(table), *ASKED[:4], "--metric", metric]) == 0
    assert verdicts(tmp_path / "t-report")[f"metric.{metric} depends on learning_rate"] == "supported"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_what_a_spreadsheet_saves_is_read(encoding: str, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(csv_of(rows_of()), encoding=encoding)
    assert len(one(table).records) == len(GRID)


def test_numbers_beyond_all_sense_count_as_none(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    rows = [*rows_of(), {"r": 10**400, "lr": 1e-3, "loss": 1.0}, {"r": 4, "lr": 1e-3, "loss": 10**400}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    *_, strange, endless = one(table).records
    assert strange.params == {"learning_rate": 1e-3} and endless.cause == "diverged"
    assert main([str(table), *ASKED]) == 0


# Ray Tune


@dataclass(eq=False)
class TuneTrial:
    """What Tune's logger looks at of a trial."""

    config: dict[str, Any]
    local_path: str
    checkpoint: None = None

    def init_local_path(self) -> None:
        """The folder is there."""


def tune_folder(folder: Path, trials: list[dict[str, Any]]) -> Path:
    """An experiment folder as Ray Tune leaves it, its trials' files written by Tune's own logger."""
    from ray.tune.logger import JsonLoggerCallback

    logger = JsonLoggerCallback()
    states = []
    for number, given in enumerate(trials):
        id = f"ab12_{number:05d}"
        place = folder / f"train_{id}_{number}_lr=x"
        place.mkdir(parents=True)
        trial: Any = TuneTrial(given["config"], str(place))
        logger.log_trial_start(trial)
        for step, loss in enumerate(given["losses"], 1):
            done = given["status"] == "TERMINATED" and step == len(given["losses"])
            shared = {"training_iteration": step, "time_total_s": 2.0 * step, "trial_id": id, "done": done}
            logger.log_trial_result(step, trial, {"loss": loss, **shared, "config": given["config"]})
        logger.log_trial_end(trial)
        if given["status"] == "ERROR":
            (place / "error.txt").write_text("RuntimeError: out of luck\n", encoding="utf-8")
        states.append([json.dumps({"trial_id": id, "status": given["status"]}), "{}"])
    content = json.dumps({"trial_data": states, "runner_data": {}, "stats": {}})
    (folder / "experiment_state-2026-01-02_03-04-05.json").write_text(content, encoding="utf-8")
    return folder


def of_tune(status: str, rank: int, rate: float, num: int = 3) -> dict[str, Any]:
    losses = [score(rank, rate) + 0.5**step for step in range(1, num)] + [score(rank, rate)] * (num > 0)
    return {"status": status, "config": {"lora": {"r": rank}, "lr": rate, "fixed": 1}, "losses": losses}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trials = [of_tune("TERMINATED", *pair) for pair in GRID]
    trials += [of_tune("TERMINATED", 4, 0.05, 1), of_tune("ERROR", 4, 0.1, 2), of_tune("RUNNING", 8, 0.05, 2)]
    trials += [of_tune("PENDING", 8, 0.1, 0), {**of_tune("TERMINATED", 16, 0.1), "losses": [5.0, 6.0, math.nan]}]
    return tune_folder(tmp_path_factory.mktemp("tune"), trials)


def test_a_ray_tune_folder_is_known_and_its_parameters_need_no_mapping(experiment: Path, tmp_path: Path) -> None:
    assert is_foreign(str(experiment), Columns())
    assert main([str(experiment), "--metric", "loss", "--out", str(tmp_path)]) == 0
    assert verdicts(tmp_path)["loss depends on lr"] == "supported"
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "1 trials have fewer results than the others and count as stopped early." in report
    assert "## Learning curves" in report and "RuntimeError" not in report


def test_ray_tune_s_trials_are_told_by_what_became_of_them(experiment: Path) -> None:
    records = one(experiment, Columns({"rank": "lora.r", "rate": "lr"}, "loss")).records
    assert [r.state for r in records] == ["COMPLETE"] * 25 + ["PRUNED", "FAILED", "RUNNING", "RUNNING", "FAILED"]
    assert [r.cause for r in records[25:]] == [None, "error", None, None, "diverged"]
    assert records[0].params == {"rank": 4, "rate": 1e-4} and records[0].seconds == 6.0
    assert records[0].metrics["loss"] == pytest.approx(score(4, 1e-4))
    assert [row["loss"] for row in records[0].curve] == [pytest.approx(score(4, 1e-4) + d) for d in (0.5, 0.25, 0)]


def test_a_broken_ray_tune_folder_loses_the_broken_trials_alone(experiment: Path, tmp_path: Path) -> None:
    for number, place in enumerate(sorted(experiment.glob("train_*"))):
        copied = tmp_path / place.name
        copied.mkdir()
        (copied / "params.json").write_bytes(b"{" if number == 0 else (place / "params.json").read_bytes())
        if (place / "result.json").exists():
            (copied / "result.json").write_bytes((place / "result.json").read_bytes()[: -20 if number == 1 else None])
    (tmp_path / "experiment_state-x.json").write_bytes(b"\xff[]")
    group = one(tmp_path, Columns({}, "loss"))
    assert any("1 line of it could not be read" in note for note in group.notes)
    assert len(group.records) == 29 and group.records[0].state == "PRUNED"  # its last line is torn


# Optuna


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"sqlite:///{tmp_path_factory.mktemp('optuna') / 'theirs.db'}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=url, study_name="first", sampler=optuna.samplers.RandomSampler(seed=0))
    storage = study._storage
    for number, (rank, rate) in enumerate(GRID):
        distributions = {
            "r": optuna.distributions.CategoricalDistribution(RANKS),
            "lr": optuna.distributions.FloatDistribution(1e-4, 1e-2),
        }
        state = optuna.trial.TrialState.PRUNED if number == 24 else optuna.trial.TrialState.COMPLETE
        value = None if number == 24 else score(rank, rate)
        steps = {1: score(rank, rate) + 0.5, 2: score(rank, rate)}
        made = optuna.trial.create_trial(
            state=state, value=value, params={"r": rank, "lr": rate}, distributions=distributions, intermediate_values=steps
        )
        study.add_trial(made)
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
    study.ask()
    storage.remove_session()  # type: ignore[attr-defined]
    return url


def test_an_optuna_study_gives_guidelines(database: str, tmp_path: Path) -> None:
    assert main([database, "--param", "rank=r", "--param", "learning_rate=lr", "--out", str(tmp_path)]) == 0
    assert verdicts(tmp_path)["value depends on learning_rate"] == "supported"
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "The trials come from the Optuna study first." in report and "## Rank × learning rate" in report


def test_optuna_s_states_curves_and_names_are_kept(database: str) -> None:
    (group,) = read(database, Columns())
    assert [r.state for r in group.records] == ["COMPLETE"] * 24 + ["PRUNED", "FAILED", "RUNNING"]
    assert group.records[0].params == {"r": 4, "lr": 1e-4} and (group.metric, group.mode) == ("value", "min")
    assert [(row["step"], row["value"]) for row in group.records[24].curve] == [
        (1, score(*GRID[24]) + 0.5),
        (2, score(*GRID[24])),
    ]
    assert group.records[24].metrics["value"] == score(*GRID[24]) and group.records[25].metrics == {"value": None}


def test_every_study_of_a_database_that_has_a_trial_is_one_analysis(database: str, tmp_path: Path) -> None:
    second = optuna.create_study(storage=database, study_name="second", direction="maximize")
    optuna.create_study(storage=database, study_name="empty")
    for rate in RATES:
        dist = {"lr": optuna.distributions.FloatDistribution(1e-4, 1e-2)}
        second.add_trial(optuna.trial.create_trial(value=-rate, params={"lr": rate}, distributions=dist))
    assert [(group.name, group.mode) for group in read(database, Columns())] == [("first", "min"), ("second", "max")]
    several = optuna.create_study(storage=database, study_name="two", directions=["minimize", "maximize"])
    several.add_trial(optuna.trial.create_trial(values=[1.0, 2.0]))
    assert main([database, "--out", str(tmp_path)]) == 2  # named, not guessed

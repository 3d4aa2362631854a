"""Are several objectives looked for, resumed and reported as several? Planted trade-offs, and Optuna's own front beside ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from planted import sweep, trial

from neo_ray.analyze import analyse, guidelines_json
from neo_ray.cautions import cautions
from neo_ray.config import SweepConfig
from neo_ray.evidence import gather
from neo_ray.loading import dump, load
from neo_ray.mirror import Mirror, study_url
from neo_ray.pareto import front_lines, front_of, front_trials
from neo_ray.phases import phases_of
from neo_ray.records import TrialRecord, write_records
from neo_ray.report import best_yaml, markdown, trials_table
from neo_ray.searcher import StudySearch, open_study
from neo_ray.settings import ConfigError
from neo_ray.space import build_space

THREE = [{"metric": "select_ce"}, {"metric": "peak_memory_bytes"}, {"metric": "accelerator_seconds"}]
SEARCH = {"rank": {"choice": [4, 8, 16, 32, 64]}, "learning_rate": {"log_uniform": [1e-4, 1e-2]}}
BENCHMARKS = {"evaluation": {"suite": "quickstart"}}
Params = dict[str, Any]


def several(folder: Path | None = None, **changes: Any) -> SweepConfig:
    storage = {"storage": {"path": str(folder)}} if folder else {}
    raw = {"search": SEARCH, "objective": THREE, "scheduler": {"name": "none"}, "sampler": {"name": "nsga2", "startup_trials": 4}}
    return sweep(**{**raw, **storage, **changes})


def measured(number: int, params: Params, ce: float | None, memory: int, seconds: float, **fields: Any) -> TrialRecord:
    return trial(f"{number:04d}", params, ce, peak_memory_bytes=memory, accelerator_seconds=seconds, **fields)


def at(rank: int) -> Params:
    return {"rank": rank, "learning_rate": 1e-3}


RECORDS = [
    measured(0, at(4), 4.5, 10, 30.0),
    measured(1, at(8), 4.3, 20, 30.0),
    measured(2, at(16), 4.4, 25, 30.0),  # rank 8 beats it in two, and is as quick
    measured(3, at(32), 4.6, 30, 10.0),
    measured(4, at(64), 4.1, 90, 90.0),
    measured(5, at(64), 5.1, 90, 90.0, seed=1),  # the mean of rank 64 is 4.6, and it is large and slow
    measured(6, {"rank": 4, "learning_rate": 2e-3}, 1.0, 1, 1.0, state="PRUNED"),
    measured(7, {"rank": 4, "learning_rate": 3e-3}, None, 1, 1.0, state="FAILED", cause="diverged"),
    measured(8, {"rank": 4, "learning_rate": 4e-3}, 1.0, 0, 1.0),  # its memory was not measured
]


def test_the_front_holds_the_settings_that_no_other_beats_by_their_means() -> None:
    front, total = front_of(RECORDS, several().objective)
    assert [member.params["rank"] for member in front] == [8, 4, 32] and total == 5
    assert front[0].values == {"select_ce": 4.3, "peak_memory_bytes": 20, "accelerator_seconds": 30}
    lines = front_lines(gather(RECORDS, several()))
    assert lines[0].startswith("3 of 5 settings are beaten by no other in select_ce, peak_memory_bytes, accelerator_seconds:")
    assert "rank 8" in lines[1] and "(0001)" in lines[1] and front_lines(gather(RECORDS, sweep(search=SEARCH))) == []


def test_an_optuna_study_has_the_same_front_and_the_records_rebuild_it(tmp_path: Path) -> None:
    config = several(tmp_path)
    study = open_study(config, build_space(config), [r for r in RECORDS if r.id not in ("0005",)])
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 5 + ["FAIL"] * 3
    assert {t.user_attrs["trial"] for t in study.best_trials} == {"0000", "0001", "0003", "0004"}
    assert [m.trials[0] for m in front_of(RECORDS[:5], config.objective)[0]] == ["0004", "0001", "0000", "0003"]
    config.folder.mkdir(parents=True)
    Mirror(config, study, print).follow()
    copied = optuna.load_study(study_name="planted", storage=study_url(config))
    assert [t.values for t in copied.trials[:5]] == [t.values for t in study.trials[:5]] and len(copied.directions) == 3


@pytest.mark.parametrize("name", ["nsga2", "tpe", "gp", "random", "qmc"])
def test_a_search_tells_all_objectives_and_goes_on_after_a_resume(tmp_path: Path, name: str) -> None:
    config = several(tmp_path, sampler={"name": name, "startup_trials": 4, "num_trials": 12})
    space, begun = build_space(config), list[tuple[str, Params, int]]()
    study = open_study(config, space, RECORDS)
    numbers = iter(range(len(RECORDS), 99))
    search = StudySearch(config, space, study, [], lambda: f"{next(numbers):04d}", lambda *a: begun.append(a))
    for i in range(5):
        search.suggest(f"tune-{i}")
        search.on_trial_result(f"tune-{i}", {"rung": 1, "select_ce": 4.0})
    row = {"select_ce": 4.1, "peak_memory_bytes": 7, "accelerator_seconds": 3.0}
    search.on_trial_complete("tune-0", {**row, "state": "COMPLETE"})
    search.on_trial_complete("tune-1", {**row, "select_ce": None, "state": "COMPLETE"})
    search.on_trial_complete("tune-2", {**row, "state": "FAILED", "cause": "diverged"})
    search.on_trial_complete("tune-3", {**row, "state": "FAILED", "cause": "error"})
    told = study.trials[len(RECORDS) :]
    assert [t.state.name for t in told] == ["COMPLETE", "FAIL", "FAIL", "FAIL", "RUNNING"] and told[0].values == [4.1, 7, 3.0]
    different = len({repr(params) for _, params, _ in begun})
    assert different == 5 or (name == "nsga2" and different > 1), "only a child without a mutation is its parent again"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": [{"metric": "seconds"}]}, r"objective: 0: metric: .*; trials are ranked by the first objective"),
        ({"objective": [{"metric": "select_ce"}, {"metric": "peak_memory"}]}, r"objective: 1: metric: .*did you mean `peak_mem"),
        ({"objective": [{"metric": "select_ce"}, {"metrik": "seconds"}]}, r"objective: 1: .*metrik: unknown key"),
        ({"objective": [{"metric": "select_ce"}] * 2}, "objective: select_ce stands twice"),
        ({"objective": []}, "objective: is an empty list"),
        (
            {"teacher": None, "method": "lora", "objective": [{}, {"metric": "select_kl"}]},
            "select_kl is measured against a teacher",
        ),
        ({"sampler": {"name": "cmaes"}}, r"sampler\.name: cmaes has one objective, and there are 3"),
        ({"scheduler": {"name": "asha"}}, r"scheduler\.name: asha stops trials by the first objective alone"),
        (
            {"objective": {"metric": "suit"}},
            r"'suit' is no metric \(did you mean `suite`\?\); allowed: select_ce, ",
        ),
        ({"objective": {"metric": "suite"}}, "suite is of a suite of benchmarks, and there is no evaluation.suite"),
        (
            {**BENCHMARKS, "objective": {"metric": "suite_a"}, "scheduler": {}, "sampler": {}},
            r"evaluation\.suite_at: end measures suite_a of complete trials alone",
        ),
        (
            {"evaluation": {"suite": "quickstart", "suite_at": "confirm"}, "objective": {}},
            r"evaluation\.suite_at: confirm is a phase that this sweep does not have",
        ),
        (
            {
                "evaluation": {"suite": "quickstart", "suite_at": "confirm"},
                "objective": {"metric": "suite"},
                "sampler": {},
                "scheduler": {},
                "phases": {"exploit": {"scheduler": {"name": "none"}}, "confirm": {"seeds": [7, 8]}},
            },
            r"evaluation\.suite_at: confirm measures suite of the settings that are chosen already",
        ),
        (
            {"scheduler": {}, "sampler": {}, "phases": {"exploit": {}}},
            r"phases\.exploit\.scheduler\.name: asha stops trials by the f",
        ),
    ],
)
def test_what_cannot_be_looked_for_together_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        phases_of(several(**changes))


def test_one_objective_stays_as_written_and_a_list_of_one_is_the_same(tmp_path: Path) -> None:
    one = sweep(objective={"metric": "select_kl"})
    assert sweep(objective=[{"metric": "select_kl"}]) == one and one.objective.all == (one.objective,)
    for config in (one, several()):
        (tmp_path / "sweep.yaml").write_text(dump(config))
        assert load(tmp_path / "sweep.yaml") == config
    notes = "\n".join(cautions(several(), build_space(several())))
    assert "peak_memory_bytes of a CPU worker is that of its process" in notes


def test_benchmarks_are_looked_for_at_their_highest() -> None:
    config = sweep(
        search=SEARCH, scheduler={"name": "none"}, objective=[{"metric": "suite"}, {"metric": "select_ce"}], **BENCHMARKS
    )
    assert [objective.mode for objective in config.objective.all] == ["max", "min"]
    directions = [direction.name for direction in open_study(config, build_space(config), []).directions]
    assert directions == ["MAXIMIZE", "MINIMIZE"]
    assert not any("worst" in note for note in cautions(config, build_space(config)))
    wrong = sweep(search=SEARCH, scheduler={"name": "none"}, objective={"metric": "suite", "mode": "min"}, **BENCHMARKS)
    assert any("min looks for the worst trial; a higher suite is better" in note for note in cautions(wrong, build_space(wrong)))


def test_the_report_shows_the_front_and_the_first_objective_chooses_the_best(tmp_path: Path) -> None:
    write_records(tmp_path, RECORDS[:8])
    (tmp_path / "sweep.yaml").write_text(dump(several()))
    analysis = analyse(tmp_path)
    assert analysis.best is not None and analysis.best.params["rank"] == 8
    columns, rows = trials_table(RECORDS, front=front_trials(analysis.evidence))
    assert columns[2] == "front" and {row[0] for row in rows if row[2] == "yes"} == {"0000", "0001", "0003"}
    assert "front" not in trials_table(RECORDS)[0]
    assert "## Pareto front" in markdown(analysis) and "- 3 of 5 settings" in markdown(analysis)
    assert [m["params"]["rank"] for m in json.loads(guidelines_json(analysis))["front"]] == [8, 4, 32]
    (tmp_path / "best.yaml").write_text(best_yaml(several(), analysis.best))
    assert load(tmp_path / "best.yaml").objective == several().objective
    (tmp_path / "sweep.yaml").write_text(dump(sweep(search=SEARCH)))
    assert "Pareto" not in markdown(analyse(tmp_path)) and "front" not in json.loads(guidelines_json(analyse(tmp_path)))

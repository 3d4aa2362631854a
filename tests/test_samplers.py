"""Does every sampler go on where it was, over any space? Each asked through the study that the records rebuild."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from planted import sweep

from neo_ray import refusals
from neo_ray.cautions import cautions
from neo_ray.config import SweepConfig
from neo_ray.phases import phases_of
from neo_ray.records import TrialRecord
from neo_ray.searcher import StudySearch, open_study, study_of, study_state
from neo_ray.settings import ConfigError
from neo_ray.space import build_space
from neo_ray.trials import fail_everywhere, setting_key

SEARCH = {
    "rank": {"choice": [4, 8, 16]},
    "learning_rate": {"log_uniform": [1e-4, 1e-2]},
    "dropout": {"uniform": [0.0, 0.2]},
    "kd_ratio": {"choice": [0.25, 0.75], "when": {"rank": [8, 16]}},
}
SETTING = {"rank": 4, "learning_rate": 1e-3, "dropout": 0.1}
Params = dict[str, Any]


def config(folder: Path, name: str, **sampler: Any) -> SweepConfig:
    storage = {"path": str(folder)}
    return sweep(search=SEARCH, sampler={"name": name, "startup_trials": 4, **sampler}, storage=storage)


def value(params: Params) -> float:
    """Best at the lowest dropout."""
    return 4 + 5 * params["dropout"]


def done(number: int, params: Params, phase: str, state: Any = "COMPLETE") -> TrialRecord:
    metrics = {"select_ce": value(params)} if state == "COMPLETE" else {}
    return TrialRecord(id=f"{number:04d}", state=state, params=params, phase=phase, metrics=metrics)


def run(config: SweepConfig, records: list[TrialRecord], count: int) -> list[TrialRecord]:
    """The records after `count` more trials, proposed by the sampler and completed one after another."""
    space = build_space(config)
    study, records = open_study(config, space, records), list(records)
    for _ in range(count):
        asked = study.ask()
        params = space.define(asked)
        study.tell(asked, value(params))
        records.append(
            TrialRecord(id=f"{len(records):04d}", state="COMPLETE", params=params, metrics={"select_ce": value(params)})
        )
    return records


@pytest.mark.parametrize("name", ["tpe", "gp", "cmaes", "nsga2", "random", "qmc"])
def test_a_sampler_proposes_settings_of_the_space_and_new_ones_after_a_resume(tmp_path: Path, name: str) -> None:
    first = run(config(tmp_path, name), [], 10)
    both = run(config(tmp_path, name), first, 6)
    assert all(("kd_ratio" in r.params) == (r.params["rank"] != 4) for r in both)
    repeated = 16 - len({repr(r.params) for r in both})
    allowed = {"nsga2": 7, "gp": 1}  # a child without a mutation is its parent again; a model may be sure of a corner
    assert repeated <= allowed.get(name, 0)


@pytest.mark.parametrize("name", ["tpe", "gp", "cmaes"])
def test_a_resumed_sampler_knows_what_was_found(tmp_path: Path, name: str) -> None:
    """Not one random trial more: half of those would lie above 0.1."""
    found = run(config(tmp_path, "qmc"), [], 24)
    later = [r.params["dropout"] for r in run(config(tmp_path, name), found, 6)[24:]]
    assert sum(later) / 6 < 0.07


def test_nsga2_goes_on_with_its_generation(tmp_path: Path) -> None:
    past = run(config(tmp_path, "nsga2"), [], 9)
    study = open_study(config(tmp_path, "nsga2"), build_space(config(tmp_path, "nsga2")), past)
    key = "NSGAIISampler:generation"
    assert [t.system_attrs[key] for t in study.trials] == [0] * 4 + [1] * 4 + [2]
    build_space(config(tmp_path, "nsga2")).define(study.ask())
    assert study.trials[-1].system_attrs[key] == 2


def test_a_sequence_goes_on_after_an_interruption_as_without_one(tmp_path: Path) -> None:
    """Sobol points are spread evenly only as one sequence."""
    whole = {r.params["learning_rate"] for r in run(config(tmp_path, "qmc"), [], 12)}
    halves = {r.params["learning_rate"] for r in run(config(tmp_path, "qmc"), run(config(tmp_path, "qmc"), [], 6), 6)}
    assert len(whole & halves) >= 11, "but for the point that the first, random trial stands for"


def test_what_a_sampler_cannot_search_is_said_or_refused(tmp_path: Path) -> None:
    notes = "\n".join(cautions(config(tmp_path, "cmaes"), build_space(config(tmp_path, "cmaes"))))
    assert "search.rank is drawn at random: cmaes searches ranges, and `choice` is a list" in notes
    assert "search.kd_ratio is drawn at random: cmaes searches axes that every trial has" in notes
    assert "search.dropout is drawn" not in notes
    assert "gp learns from complete trials alone" in "\n".join(
        cautions(config(tmp_path, "gp"), build_space(config(tmp_path, "gp")))
    )
    with pytest.raises(ConfigError, match=r"sampler\.name: cmaes searches ranges"):
        build_space(sweep(search={"rank": {"choice": [4, 8]}}, sampler={"name": "cmaes"}))


def test_a_missing_package_is_refused_with_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals.check_installed(config(tmp_path, "cmaes"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"cmaes, which is not installed; pip install .*\[cmaes\]"):
        refusals.check_installed(config(tmp_path, "cmaes"))


def test_the_samplers_are_optunas(tmp_path: Path) -> None:
    kinds = {
        name: type(open_study(config(tmp_path, name), build_space(config(tmp_path, name)), []).sampler)
        for name in ("gp", "cmaes")
    }
    assert kinds == {"gp": optuna.samplers.GPSampler, "cmaes": optuna.samplers.CmaEsSampler}


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize(("first", "then"), [("random", "random"), ("random", "tpe"), ("qmc", "qmc"), ("qmc", "random")])
def test_a_phase_repeats_no_trial_of_the_one_before(tmp_path: Path, first: str, then: str, noise: bool) -> None:
    phases: Params = {"map": {"sampler": {"name": first, "num_trials": 4}}, "exploit": {"sampler": {"name": then}}}
    of = sweep(search=SEARCH, sampler={}, phases=({"noise": {}} if noise else {}) | phases, storage={"path": str(tmp_path)})
    for state in ("COMPLETE", "FAILED"):
        records = [TrialRecord(id=f"n{i}", phase="noise", state="COMPLETE") for i in range(2 * noise)]
        for phase in [p for p in phases_of(of) if p.name != "noise"]:
            for _ in range(2):  # each is interrupted once
                study = study_of(phase, phases_of(of), records)
                for _ in range(2):
                    asked = study.ask()
                    params = phase.space.define(asked)
                    records.append(done(len(records), params, phase.tag, state))
                    told = study_state(state, None, [value(params)])
                    study.tell(asked, value(params) if state == "COMPLETE" else None, state=told)
        found = [setting_key(r.params, r.seed) for r in records if r.phase != "noise"]
        assert len(set(found)) == len(found) == 8


def test_a_sequence_goes_on_from_phase_to_phase(tmp_path: Path) -> None:
    """The Sobol points of a study are those of one sweep as long, whatever trials the noise floor had before them."""
    named = {"name": "qmc", "num_trials": 8}
    of = sweep(search=SEARCH, sampler={}, phases={"noise": {}, "map": {"sampler": named}, "exploit": {"sampler": named}})
    noise = [TrialRecord(id="n", phase="noise", state="COMPLETE", params=SETTING, metrics={"select_ce": 4.0})] * 3
    _, mapped, exploit = phases_of(of)
    whole = [0.0] * 16
    study = study_of(mapped, phases_of(of), noise)
    for i in range(16):
        asked = study.ask()
        whole[i] = mapped.space.define(asked)["learning_rate"]
        study.tell(asked, 4.0)
    past = [*noise, *(done(i, {**SETTING, "learning_rate": rate}, "map") for i, rate in enumerate(whole[:8]))]
    study = study_of(exploit, phases_of(of), past)
    later = []
    for _ in range(8):
        asked = study.ask()
        later.append(exploit.space.define(asked)["learning_rate"])
        study.tell(asked, 4.0)
    assert later == whole[8:]


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_a_setting_that_fails_everywhere_is_not_tried_again_while_there_is_another(tmp_path: Path, name: str) -> None:
    """One failed under an earlier driver, one does now; a space that has no other is no dead end."""
    where = config(tmp_path, name).model_copy(update={"search": sweep(search={"rank": {"choice": [4, 8, 16]}}).search})
    space = build_space(where)
    before = [TrialRecord(id="0000", state="FAILED", cause="out_of_memory", params={"rank": 4})]
    study, begun = open_study(where, space, before), list[tuple[str, Params]]()
    search = StudySearch(
        where,
        space,
        study,
        [],
        next_id=lambda: f"{len(begun) + 1:04d}",
        on_start=lambda trial, params, seed: begun.append((trial, params)),
        records=before,
    )
    for number in range(24):
        assert search.suggest(f"tune-{number}") is not None
        failed = begun[-1][1]["rank"] == 8
        end = {"state": "FAILED", "cause": "error"} if failed else {"state": "COMPLETE", "select_ce": 4.0}
        search.on_trial_complete(f"tune-{number}", end)
    ranks = [params["rank"] for _, params in begun]
    assert len(ranks) == 24 and 4 not in ranks and ranks.count(8) <= 1
    assert len(ranks) == len({trial for trial, _ in begun}), "who is asked again takes no number"

    alone = [
        TrialRecord(id=f"{n:04d}", state="FAILED", cause="error", params={"rank": rank}) for n, rank in enumerate((4, 8, 16))
    ]
    asked = StudySearch(where, space, open_study(where, space, alone), [], lambda: "0003", lambda *_: None, records=alone)
    assert asked.suggest("tune") is not None


def test_what_failed_for_another_reason_or_once_went_well_may_be_tried_again() -> None:
    def record(state: Any, cause: Any, rank: int) -> TrialRecord:
        return TrialRecord(id="x", state=state, cause=cause, params={"rank": rank})

    passing = [record("FAILED", cause, rank) for rank, cause in enumerate(("diverged", "preempted", "storage"))]
    assert fail_everywhere(passing) == set()
    once = [record("FAILED", "error", 4), record("FAILED", "error", 8), record("COMPLETE", None, 8), record("RUNNING", None, 4)]
    assert fail_everywhere(once) == {setting_key({"rank": 4})}

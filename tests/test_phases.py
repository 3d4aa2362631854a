"""What does each phase of a study run, and what is left of it wherever the study was cut off? On made-up records."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from planted import sweep

from neo_ray.budget import hours_of
from neo_ray.cautions import cautions
from neo_ray.config import SweepConfig
from neo_ray.loading import dump, load
from neo_ray.mirror import Mirror, study_url
from neo_ray.phases import Phase, best_settings, check_seeds_are_fresh, orphans, phases_of, planned_trials, trials_left
from neo_ray.plan import make_plan
from neo_ray.plan_text import render
from neo_ray.records import Journal, TrialRecord, write_records
from neo_ray.searcher import StudySearch, frozen_trials, open_study
from neo_ray.settings import ConfigError
from neo_ray.space import build_space
from neo_ray.supply import choose
from neo_ray.trials import differences, retried
from neo_ray.tuner import _Recorder

SEARCH = {"rank": {"grid": [4, 16]}, "alpha": {"of": "rank", "times": 2}, "learning_rate": {"grid": [1e-4, 1e-3, 1e-2]}}
PHASES: dict[str, Any] = {
    "noise": {"seeds": [1, 2]},
    "map": {},
    "exploit": {"sampler": {"name": "tpe", "num_trials": 3}},
    "confirm": {"top": 2, "seeds": [11, 12]},
}
LEAVES = ("rank", "alpha", "learning_rate")
Params = dict[str, Any]


def study(phases: dict[str, Any] | None = None, **changes: Any) -> SweepConfig:
    raw = {"search": SEARCH, "sampler": {}, "phases": PHASES if phases is None else phases, "training": {"tokens": 1000}}
    return sweep(**{**raw, **changes})


def only(*names: str, **more: Any) -> dict[str, Any]:
    return {name: PHASES[name] for name in names} | more


def loss(params: Params, seed: int) -> float:
    """Best at rank 16 and learning rate 1e-3; a seed moves all settings together."""
    return 4 + abs(math.log10(params["learning_rate"]) + 3) - params["rank"] / 100 + seed / 1000


def run(config: SweepConfig, records: list[TrialRecord], most: int = 10**6) -> list[TrialRecord]:
    """The records once every phase has run what it has, or after `most` trials more; a sampler proposes (16, 1e-3)."""
    records = list(records)
    for phase in phases_of(config):
        given, remaining = phase.to_run(records)
        proposed = {"rank": 16, "alpha": 32.0, "learning_rate": 1e-3}
        given = given + [(f"{len(records) + i:04d}", proposed, 0) for i in range(remaining - len(given))]
        for ours, params, seed in given:
            if most == 0:
                return records
            most -= 1
            records = [r for r in records if r.id != ours]
            records.append(done(ours, params, seed, phase.tag))
    return records


def done(ours: str, params: Params, seed: int, phase: str, value: float | None = None, state: Any = "COMPLETE") -> TrialRecord:
    value = loss(params, seed) if value is None else value
    return TrialRecord(id=ours, state=state, params=params, seed=seed, phase=phase, metrics={"select_ce": value})


def of(records: list[TrialRecord], phase: str) -> list[TrialRecord]:
    return [r for r in records if r.phase == phase]


def settings(records: list[TrialRecord]) -> set[tuple[int, float]]:
    return {(r.params["rank"], r.params["learning_rate"]) for r in records}


def test_a_sweep_without_phases_is_one_phase_as_it_was() -> None:
    (phase,) = phases_of(sweep(sampler={"name": "random", "num_trials": 5}))
    assert phase.name is None and phase.most() == 5 and phase.tag == "exploit", "asha stops some of them"
    assert phases_of(sweep(sampler={"name": "random"}, scheduler={"name": "none"}))[0].tag == "map"
    older = [TrialRecord(id="0000", state="COMPLETE", params={"rank": 4})]
    assert older[0].phase == "explore" and phase.own(older) == older and phase.to_run(older)[1] == 4


def test_benchmarks_may_be_asked_in_confirm_alone() -> None:
    phases = phases_of(study(evaluation={"suite": "quickstart", "suite_at": "confirm", "suite_limit": 5}))
    assert {phase.name: phase.config.trial.evaluation.suite for phase in phases} == {
        **dict.fromkeys(("noise", "map", "exploit")),
        "confirm": "quickstart",
    }


def test_each_phase_runs_its_own_trials_under_its_own_name() -> None:
    records = run(study(), [])
    assert [r.id for r in records] == [f"{i:04d}" for i in range(len(records))], "numbered through"
    assert {name: len(of(records, name)) for name in PHASES} == {"noise": 2, "map": 6, "exploit": 3, "confirm": 6}
    assert settings(of(records, "noise")) == {(16, 1e-3)}, "the middle: the file's own rank 64 is not in the space"
    assert {r.seed for r in of(records, "map")} == {0} and settings(of(records, "map")) == {
        (rank, rate) for rank in (4, 16) for rate in (1e-4, 1e-3, 1e-2)
    }
    assert settings(of(records, "confirm")) == {(64, 2e-4), (16, 1e-3), (4, 1e-3)}, "the reference and the best two"
    assert [r.seed for r in of(records, "confirm")] == [11] * 3 + [12] * 3, "seed by seed: a budget leaves pairs"
    assert not {r.seed for r in of(records, "confirm")} & {r.seed for r in records if r.phase != "confirm"}
    assert not trials_left(phases_of(study()), records)


@pytest.mark.parametrize("cut", range(17))
def test_a_study_that_was_cut_off_anywhere_goes_on_there_and_ends_the_same(cut: int) -> None:
    whole, part = run(study(), []), run(study(), [], most=cut)
    left = trials_left(phases_of(study()), part)
    assert sum(left.values()) == 17 - cut and next(iter(left)) == whole[cut].phase
    assert planned_trials(phases_of(study()), part) == 17
    assert run(study(), part) == whole


def test_a_trial_that_was_interrupted_goes_on_in_its_own_phase_first() -> None:
    whole = run(study(), [])
    for running in (whole[1], whole[4], whole[9], whole[13]):
        part = [r for r in whole if r.id < running.id] + [running.model_copy(update={"state": "RUNNING"})]
        phase = next(p for p in phases_of(study()) if p.name == running.phase)
        assert phase.to_run(part)[0][0][:2] == (running.id, running.params)
        assert sorted(run(study(), part), key=lambda r: r.id) == whole


def test_an_interrupted_trial_of_a_phase_that_is_gone_is_nobodys() -> None:
    part = run(study(), [], most=3)
    part[1:] = [r.model_copy(update={"state": "RUNNING"}) for r in part[1:]]
    assert orphans(phases_of(study(only("map"))), part) == ["0001"] and orphans(phases_of(study()), part) == []
    assert orphans(phases_of(sweep(search=SEARCH)), part) == [], "a sweep without phases takes all"


def test_the_best_are_those_with_the_best_mean_not_the_luckiest_run() -> None:
    def at(rank: int, *values: float, **fields: Any) -> list[TrialRecord]:
        return [done(f"{rank}-{i}", {"rank": rank}, i, "map", value).model_copy(update=fields) for i, value in enumerate(values)]

    lucky, steady = at(1, 3.0, 5.0, 5.0), at(2, 4.0, 4.1, 4.2)
    pruned, failed = at(3, 1.0, state="PRUNED"), at(4, 1.0, state="FAILED", cause="out_of_memory")
    diverged = [*at(5, 1.0), *at(5, 9.0, state="FAILED", cause="diverged")]
    records = [*lucky, *steady, *pruned, *failed, *diverged, *at(6, math.nan)]
    assert best_settings(records, "select_ce", "min") == [{"rank": 2}, {"rank": 1}]
    assert best_settings(records, "select_ce", "max") == [{"rank": 1}, {"rank": 2}]
    assert best_settings(records, "select_kl", "min") == []


def test_a_longer_exploit_goes_on_and_confirm_adds_only_what_is_missing() -> None:
    before = run(study(), [])
    longer = study(PHASES | {"exploit": {"sampler": {"name": "tpe", "num_trials": 5}}})
    assert trials_left(phases_of(longer), before) == {"exploit": 2}, "confirm is whole, unless they change the best"
    better = {"rank": 4, "alpha": 8.0, "learning_rate": 1e-4}
    found = [*before, *(done(f"{17 + i:04d}", better, 0, "exploit", 1.0) for i in range(2))]
    assert trials_left(phases_of(longer), found) == {"confirm": 2}, "the new best with both seeds; the reference has run"
    after = run(longer, found)
    assert [r.params for r in after[-2:]] == [better] * 2 and {r.id for r in before} < {r.id for r in after}
    assert not differences(study(), longer) and not differences(study(), sweep(search=SEARCH, training={"tokens": 1000}))


def test_what_confirm_finds_chooses_nothing() -> None:
    part = run(study(), [], most=14)
    lucky = [r.model_copy(update={"metrics": {"select_ce": 0.1}}) if r.params["rank"] == 64 else r for r in part]
    assert [r.phase for r in part[11:]] == ["confirm"] * 3, "all with the first seed"
    rest = phases_of(study())[3].to_run(part)[0]
    assert phases_of(study())[3].to_run(lucky)[0] == rest and [seed for *_, seed in rest] == [12] * 3


def test_the_database_has_the_trials_of_all_phases_whichever_runs(tmp_path: Path) -> None:
    config = study(storage={"path": str(tmp_path)})
    records, mapped = run(config, []), phases_of(config)[1]
    config.folder.mkdir(parents=True)
    known = mapped.known(records)
    others = frozen_trials(mapped.config, mapped.space, [r for r in records if r not in known])
    mirror = Mirror(mapped.config, open_study(mapped.config, mapped.space, known, 6), print, others)
    for _ in range(2):
        mirror.follow()
    copied = optuna.load_study(study_name="planted", storage=study_url(config))
    assert sorted(t.user_attrs["trial"] for t in copied.trials) == [r.id for r in records]


def test_a_confirm_without_anything_to_confirm_runs_nothing() -> None:
    records = [r.model_copy(update={"state": "FAILED", "cause": "error"}) for r in run(study(only("map")), [])]
    phases = phases_of(study(only("map", "confirm")))
    assert phases[1].to_run(records) == ([], 0) and trials_left(phases, records) == {}
    assert trials_left(phases, retried(records, True)) == {"map": 6, "confirm": 6}


def test_one_earlier_phase_is_enough_and_a_reference_among_the_best_runs_once() -> None:
    phases = only("noise", confirm={"seeds": [11, 12], "reference": {"rank": 16, "learning_rate": 1e-3}})
    records = run(study(phases), [])
    assert [(r.phase, r.seed) for r in records] == [("noise", 1), ("noise", 2), ("confirm", 11), ("confirm", 12)]


def test_a_phase_ends_with_its_own_budget_and_the_next_begins() -> None:
    phases = phases_of(study(PHASES | {"map": {"budget": {"trials": 2}}}))
    part = run(study(), [], most=4)
    assert phases[1].spent(part, 0.0) == "trials: 2 of 2" and phases[2].spent(part, 0.0) is None
    assert trials_left(phases, part) == {"exploit": 3, "confirm": 6}
    assert trials_left(phases_of(study(PHASES | {"map": {"budget": {"hours": 1}}})), part, lambda tag: 2.0).keys() == {
        "exploit",
        "confirm",
    }


def test_a_phases_own_budget_counts_in_what_is_left_of_it(tmp_path: Path) -> None:
    config = study(PHASES | {"map": {"budget": {"trials": 3}}, "confirm": {"budget": {"trials": 5}}})
    phases = phases_of(config)
    assert trials_left(phases, []) == {"noise": 2, "map": 3, "exploit": 3, "confirm": 5} and planned_trials(phases, []) == 13
    part = run(study(), [], most=4)
    part[3] = part[3].model_copy(update={"state": "RUNNING"})
    assert trials_left(phases, part)["map"] == 2, "the interrupted one and one more"
    assert planned_trials(phases, part) == 13
    more = run(study(), [], most=7)
    more[3:] = [r.model_copy(update={"state": "RUNNING"}) for r in more[3:]]
    assert trials_left(phases, more)["map"] == 4, "those that were begun under a larger budget go on, and no other begins"
    said = list[str]()
    progress: Any = SimpleNamespace(say=said.append, update=lambda *_: None, phase="")
    here = study(config.model_dump()["phases"], storage={"path": str(tmp_path)})
    recorder = _Recorder(here, phases[0].space, part, None, progress, None)  # type: ignore[arg-type]
    assert recorder.begin(phases[1]) and said == ["phase map: 2 trials"]


def test_exploit_begins_with_the_trials_before_it_and_confirm_teaches_no_sampler() -> None:
    records, phase = run(study(), []), phases_of(study())[2]
    known = phase.known(records)
    assert [r.phase for r in known] == ["noise"] * 2 + ["map"] * 6 + ["exploit"] * 3
    taught = open_study(phase.config, phase.space, known, len(phase.own(records)))
    assert [(t.user_attrs["trial"], t.user_attrs["phase"]) for t in taught.trials] == [(r.id, r.phase) for r in known]
    assert phase.config.sampler.num_trials == 3 and phase.config.scheduler.name == "asha"


def test_a_reference_outside_of_the_space_runs_and_is_tagged() -> None:
    config = study(only("map", "confirm"))
    phase, records = phases_of(config)[1], run(config, [], most=6)
    begun: list[tuple[str, Params, int]] = []
    taught = open_study(phase.config, phase.space, records, 0)
    given = phase.to_run(records)[0]
    search = StudySearch(phase.config, phase.space, taught, given, lambda: "", lambda *a: begun.append(a), phase=phase)
    asked = [search.suggest(f"tune-{i}") for i in range(7)]
    assert asked[6] == "FINISHED" and [a["trial"] for a in asked[:6]] == [f"{i:04d}" for i in range(6, 12)]  # type: ignore[index]
    assert begun[0] == ("0006", {"rank": 64, "alpha": 128.0, "learning_rate": 2e-4}, 11)
    reference, best = taught.trials[6:8]
    assert reference.params == {} and best.params == {"rank": 16, "learning_rate": 1e-3}
    assert {t.user_attrs["phase"] for t in taught.trials[6:]} == {"confirm"}


def test_the_supply_and_the_plan_look_at_the_reference_too() -> None:
    search = {**SEARCH, "temperature": {"grid": [2.0]}, "learning_rate": {"grid": [1e-3]}}
    alone, both = study(only("map"), search=search), study(only("map", "confirm"), search=search)
    assert choose(alone, build_space(alone)).mode == "projection"
    assert choose(both, build_space(both)).mode == "hidden", "the reference has temperature 1"
    assert build_space(both).reach("rank") == [4, 16, 64] and build_space(alone).reach("rank") == [4, 16]
    with pytest.raises(ConfigError, match="needs deepspeed.zero_stage"):
        build_space(
            study(
                only("map", "confirm"),
                search={"offload_optimizer": {"grid": ["none"]}, **SEARCH},
                deepspeed={"zero_stage": 0, "offload_optimizer": "cpu"},
            )
        )


def test_a_map_takes_levels_of_ranges_that_exploit_searches_whole() -> None:
    search = {**SEARCH, "learning_rate": {"log_uniform": [1e-4, 1e-2]}, "dropout": {"uniform": [0, 0.2], "when": {"rank": 4}}}
    levels = {"learning_rate": [1e-4, 1e-3], "dropout": [0.0, 0.1], "rank": [4]}
    config = study(PHASES | {"noise": None, "map": {"levels": levels, "sampler": {"seeds": [0, 1]}}}, search=search)
    mapped, exploit, _ = phases_of(config)
    settings_of_map = [(p["learning_rate"], p["dropout"], seed) for _, p, seed in mapped.to_run([])[0]]
    assert settings_of_map == [(rate, dropout, seed) for seed in (0, 1) for rate in (1e-4, 1e-3) for dropout in (0.0, 0.1)]
    assert mapped.most() == 8 and mapped.seeds == () and mapped.only_given
    records = [done(ours, params, seed, "map") for ours, params, seed in mapped.to_run([])[0]]
    assert mapped.to_run(records) == ([], 0) and "learning_rate" in exploit.space.axes
    taught = open_study(exploit.config, exploit.space, exploit.known(records), 0)
    assert len(taught.trials) == 8 and taught.trials[0].distributions["learning_rate"].high == 1e-2


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        (
            {"confirm": {}},
            "phases: confirm takes the best settings of earlier phases; add noise, map",
        ),
        ({}, "phases: name at least one of noise, map, exploit"),
        ({"mapp": {}}, r"phases\.mapp: unknown key \(did you mean `map`\?\)"),
        ({"map": {"sampler": {"name": "tpe"}}}, r"phases\.map\.sampler\.name: .*'grid', 'qmc' or 'random'"),
        ({"map": {"scheduler": {"name": "asha"}}}, r"phases\.map\.scheduler: name: asha stops trials"),
        (only("map", confirm={"seeds": [0, 5]}), r"phases\.confirm\.seeds: 0 is a seed of an earlier phase"),
        (only("noise", confirm={"seeds": [2, 5]}), r"phases\.confirm\.seeds: 2 is a seed of an earlier phase"),
        (only("map", confirm={"seeds": [5, 5]}), r"phases\.confirm\.seeds: a seed stands twice"),
        (only("map", confirm={"reference": {"rnak": 4}}), r"phases\.confirm\.reference\.rnak: unknown axis"),
        ({"exploit": {"seed": 7}, "confirm": {"seeds": [7, 8]}}, r"phases\.confirm\.seeds: 7 is a seed"),
        ({"noise": {"points": [{"rank": 5}]}}, r"phases\.noise\.points\.0\.rank: 5 is not a value of search\.rank"),
        (
            {"map": {"levels": {"learning_rate": [0.5]}}},
            r"phases\.map\.levels\.learning_rate: 0\.5 is not a value of search",
        ),
        ({"map": {"levels": {"rnak": [4]}}}, r"phases\.map\.levels\.rnak: unknown axis"),
        ({"map": {"levels": {"rank": [4]}, "sampler": {"name": "qmc"}}}, r"phases\.map\.levels: qmc draws from whole axes"),
        ({"exploit": {"sampler": {"name": "cmaes"}}}, r"phases\.exploit\.sampler\.name: cmaes searches ranges"),
    ],
)
def test_a_phase_that_cannot_be_is_refused_by_its_path(phases: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        phases_of(study(phases))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": {"num_trials": 3}}, r"sampler: each of the `phases` has its own \(phases\.exploit\.sampler\)"),
        ({"scheduler": {"name": "none"}}, "scheduler: each of the `phases` has its own"),
        ({"phases": only("map"), "points": [{"rank": 4}]}, "points: no phase begins with them"),
        ({"search": {**SEARCH, "seed": {"grid": [0, 5]}}}, r"phases\.noise\.seeds: `seed` is an axis already"),
    ],
)
def test_what_does_not_go_with_phases_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        phases_of(study(**changes))


def test_a_grid_of_a_range_is_told_to_have_levels() -> None:
    with pytest.raises(
        ConfigError, match=r"phases\.map\.levels: a grid has no end of values of learning_rate; give learning_rate"
    ):
        phases_of(study(only("map"), search={"learning_rate": {"log_uniform": [1e-4, 1e-2]}}))


def test_seeds_that_trials_have_had_confirm_nothing() -> None:
    records = run(study(), [])
    check_seeds_are_fresh(phases_of(study()), records)
    moved = study(PHASES | {"noise": {"seeds": [3, 4]}, "confirm": {"seeds": [1, 5]}})
    with pytest.raises(ConfigError, match=r"phases\.confirm\.seeds: 1 is that of trial 0000 \(phase noise\)"):
        check_seeds_are_fresh(phases_of(moved), records)


def test_points_are_repeated_by_noise_or_begin_exploit() -> None:
    point = {"rank": 4, "learning_rate": 1e-3}

    def settings_of(phase: Phase) -> list[Params]:
        return [params for _, params, _ in phase.to_run([])[0]]

    noise, _, exploit, _ = phases_of(study(points=[point]))
    assert settings_of(noise) == [{**point, "alpha": 8.0}] * 2 and settings_of(exploit) == []
    assert settings_of(phases_of(study(only("exploit"), points=[point]))[0]) == [{**point, "alpha": 8.0}]
    own = study(PHASES | {"noise": {"points": [{"rank": 16, "learning_rate": 1e-2}]}}, points=[point])
    assert settings_of(phases_of(own)[0])[0]["rank"] == 16 and settings_of(phases_of(own)[2])[0]["rank"] == 4


def test_the_plan_shows_each_phase_with_its_trials_and_price() -> None:
    text = render(make_plan(study(PHASES | {"map": {"budget": {"tokens": 5000}}})))
    for part in (
        "planted: 17 trials",
        "noise: 2 trials, 1 settings with each of the seeds 1, 2",
        "map: 6 trials, every combination once",
        "none: every trial runs to its end; at most 6,000 tokens; budget: tokens 5,000",
        "exploit: 3 trials, proposed by tpe, which begins with the trials of noise and map",
        "confirm: at most 6 trials, the 2 best settings and the reference with each of the seeds 11, 12",
        "at most 17,000 in all trials",
    ):
        assert part in text
    notes = "\n".join(cautions(study(), build_space(study())))
    assert "phases.confirm.seeds: two seeds leave an interval very wide" in notes
    assert "phases.map.sampler.num_trials: 5 of the grid's 6 trials run" in "\n".join(
        cautions(study(only("map") | {"map": {"sampler": {"num_trials": 5}}}), build_space(study()))
    )


def test_the_trials_so_far_correct_the_price(tmp_path: Path) -> None:
    config = study(storage={"path": str(tmp_path)})
    assert "their time is known once the first have finished" in render(make_plan(config))
    took = [r.model_copy(update={"accelerator_seconds": 600.0}) for r in run(config, [], most=4)]
    write_records(config.folder, [*took, TrialRecord(id="0004", accelerator_seconds=5.0)])
    text = render(make_plan(config))
    assert "map: 6 trials" in text and "at most 6,000 tokens; about 1.0 h of one device" in text
    assert "at most 17,000 in all trials; about 2.8 h of one device, as the 4 trials so far took" in text


def test_no_trial_of_a_phase_begins_once_its_budget_is_spent_and_the_sweep_goes_on(tmp_path: Path) -> None:
    config = study(PHASES | {"map": {"budget": {"trials": 3}}}, storage={"path": str(tmp_path)}, budget={"trials": 7})
    phases, said = phases_of(config), list[str]()
    progress: Any = SimpleNamespace(say=said.append, update=lambda *_: None, phase="")
    recorder = _Recorder(config, phases[0].space, run(config, [], most=2), None, progress, None)  # type: ignore[arg-type]
    assert not recorder.begin(phases[0]), "it is done"
    assert recorder.begin(phases[1]) and progress.phase == "map"
    for i, (params, seed) in enumerate([({"rank": 4, "alpha": 8.0, "learning_rate": 1e-4 * 10**i}, 0) for i in range(3)]):
        assert recorder.may_begin(None)
        recorder.started(f"{2 + i:04d}", params, seed)
    assert not recorder.may_begin(None) and not recorder.spent and recorder.may_begin("0004"), "one that was begun may go on"
    assert said[-1] == "the budget of phase map is spent (trials: 3 of 3): none of its trials begins any more"
    assert [e.get("phase") for e in Journal(config.folder).events() if e["event"] == "session"] == [None, "map"]
    assert {r.phase for r in recorder.records.values() if r.id > "0001"} == {"map"}
    assert recorder.begin(phases[2]) and recorder.may_begin(None)
    for i in range(2):
        recorder.started(f"{5 + i:04d}", {"rank": 4, "alpha": 8.0, "learning_rate": 1e-3}, 0)
    assert not recorder.may_begin(None) and recorder.spent == "trials: 7 of 7" and not recorder.phase_spent


def test_hours_of_a_phase_are_its_own() -> None:
    times = [("map", 0), ("", 3600), ("exploit", 3600), ("", 9000), ("map", 90_000), ("", 91_800)]
    events = [{"event": "session" if p else "end", "trial": "" if p else "0000", "time": t, "phase": p} for p, t in times]
    assert [hours_of(events, phase) for phase in ("map", "exploit", None)] == [1.5, 1.5, 3.0]


def test_a_resolved_file_reads_the_same(tmp_path: Any) -> None:
    (tmp_path / "sweep.yaml").write_text(dump(study()))
    assert load(tmp_path / "sweep.yaml") == study()

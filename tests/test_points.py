"""Do known settings run first, and do earlier trials teach a sampler only what they can? Points and warm starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from buckets import put_sweep
from planted import sweep

from neo_ray.config import SweepConfig
from neo_ray.loading import dump, plain
from neo_ray.points import point_settings
from neo_ray.records import Journal, TrialRecord, load_records, write_records
from neo_ray.searcher import open_study
from neo_ray.settings import ConfigError
from neo_ray.space import build_space
from neo_ray.trials import settings_to_run
from neo_ray.warm import check_same_models, warm_trials

SEARCH = {
    "rank": {"choice": [4, 64]},
    "alpha": {"of": "rank", "times": 2},
    "learning_rate": {"log_uniform": [1e-4, 1e-2]},
    "label_smoothing": {"quantised": [0.0, 0.2, 0.05]},
    "variant": {"choice": ["lora", "dora"]},
    "kd_ratio": {"choice": [0.5, 0.9], "when": {"rank": 64}},
}
SOURCES = {"data.source": "abc", "teacher.model": "t", "student.model": "s"}


def config(**changes: Any) -> SweepConfig:
    return sweep(**{"search": SEARCH, "sampler": {"name": "tpe", "num_trials": 6}, **changes})


def test_points_run_first_once_and_the_samplers_trials_after_them() -> None:
    asked = config(points=[{"learning_rate": 2e-4}, {"lora.rank": 4, "label_smoothing": 0.15}, {"learning_rate": 2e-4}])
    space = build_space(asked)
    given, remaining = settings_to_run(asked, space, [])
    default = {"rank": 64, "alpha": 128.0, "learning_rate": 2e-4, "label_smoothing": 0.0, "variant": "lora", "kd_ratio": 0.5}
    assert [(trial, seed) for trial, _, seed in given] == [("0000", 0), ("0001", 0)] and remaining == 6
    assert given[0][1] == default and "kd_ratio" not in given[1][1] and given[1][1]["label_smoothing"] == 0.15
    done = TrialRecord(id="0000", state="COMPLETE", params=json.loads(json.dumps(default)))
    given, remaining = settings_to_run(asked, space, [done])
    assert [trial for trial, _, _ in given] == ["0001"] and remaining == 5
    assert len(settings_to_run(config(points=asked.points, sampler={"num_trials": 1}), space, [])[0]) == 1


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ({"rnak": 4}, r"points\.0\.rnak: unknown axis.*rank.*; allowed: rank, learning_rate"),
        ({"alpha": 4}, r"points\.0\.alpha: is not chosen: it is 2 × rank"),
        ({"rank": 5}, r"points\.0\.rank: 5 is not a value of search\.rank \(one of 4, 64\)"),
        ({"learning_rate": 1.0}, r"points\.0\.learning_rate: 1 is not a value of search\.learning_rate"),
        ({"label_smoothing": 0.07}, r"points\.0\.label_smoothing: 0\.07 is not a value"),
        ({"rank": "many"}, r"points\.0\.rank: "),
        ({"rank": 4, "kd_ratio": 0.5}, r"points\.0\.kd_ratio: does not exist in this setting .*where rank is 64"),
    ],
)
def test_a_point_outside_the_space_is_refused_by_its_path(point: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_space(config(points=[point]))


def test_a_point_that_leaves_an_axis_out_needs_the_files_own_value_in_it() -> None:
    with pytest.raises(ConfigError, match=r"points\.0: rank is missing, and the sweep file's own 64 is not in search\.rank"):
        build_space(config(search={"rank": {"choice": [2, 4]}}, points=[{}]))
    assert point_settings(config(points=[{}]), build_space(config()))[0]["rank"] == 64
    with pytest.raises(ConfigError, match="points: a grid runs all its settings"):
        build_space(config(search={"rank": {"choice": [2, 4]}}, points=[{"rank": 2}], sampler={"name": "grid"}))


def earlier(folder: Path, **changes: Any) -> Path:
    """A results folder with five trials, of which two fit a sweep over `SEARCH`."""
    of, space = config(**changes), build_space(config(**changes))
    params = {"rank": 64, "alpha": 128.0, "learning_rate": 3e-4, "label_smoothing": 0.1, "variant": "lora", "kd_ratio": 0.5}

    def trial(number: int, state: Any = "COMPLETE", value: float | None = 4.0, **other: Any) -> TrialRecord:
        own = {**params, **other}
        settings = plain(space.trial_config(own, of.trial))
        return TrialRecord(id=f"{number:04d}", state=state, params=own, config=settings, seed=9, metrics={"select_ce": value})

    wide = trial(3).model_copy(update={"params": {**params, "learning_rate": 0.5}})
    curve = [{"rung": 1, "select_ce": 4.4}]
    pruned = trial(1, "PRUNED", 4.4).model_copy(update={"curve": curve})
    write_records(folder, [trial(0), pruned, trial(2, "FAILED"), wide, trial(4, "RUNNING")])
    (folder / "sources.json").write_text(json.dumps(SOURCES))
    (folder / "sweep.yaml").write_text(dump(of))
    return folder


def test_a_sampler_begins_with_the_earlier_trials_that_fit_and_they_are_not_this_sweeps(tmp_path: Path) -> None:
    sampler = {"name": "tpe", "num_trials": 6, "warm_start": [str(earlier(tmp_path / "other"))]}
    mine = config(sampler=sampler, storage={"path": str(tmp_path)})
    space = build_space(mine)
    (warm,) = warm_trials(mine, space)
    assert [r.id for r in warm.records] == ["0000", "0001"] and "; 3 are left out" in warm.text
    study = open_study(mine, space, [])
    assert [(t.state.name, t.value) for t in study.trials] == [("COMPLETE", 4.0), ("PRUNED", None)]
    assert study.trials[0].user_attrs["trial"].endswith("other/0000")
    assert settings_to_run(mine, space, [])[1] == 6


def test_a_url_warms_a_sampler_as_its_folder_does(tmp_path: Path, scratch: Path) -> None:
    folder = earlier(tmp_path / "other")
    for record in load_records(folder):
        Journal(folder).write("start", record.id, params=record.params, config=record.config, seed=record.seed)
        for row in record.curve:
            Journal(folder).write("report", record.id, row=row)
        Journal(folder).write("end", record.id, state=record.state, metrics=record.metrics)
    place = put_sweep(folder, f"memory://{tmp_path.name}/other")
    mine = config(sampler={"name": "tpe", "num_trials": 6, "warm_start": [place.url]})
    space = build_space(mine)
    (warm,) = warm_trials(mine, space)
    assert [r.id for r in warm.records] == ["0000", "0001"] and "; 3 are left out" in warm.text
    check_same_models(mine, SOURCES)
    with pytest.raises(ConfigError, match=r"sampler\.warm_start\.0: memory://.*other is of another data\.source"):
        check_same_models(mine, {**SOURCES, "data.source": "abd"})
    (place / "journal").remove()
    assert warm_trials(mine, space) == [warm], "read once"
    with pytest.raises(ConfigError, match=r"sampler\.warm_start\.0: memory://.*/none: holds no sweep"):
        warm_trials(config(sampler={"warm_start": [f"memory://{tmp_path.name}/none"]}), space)


def test_trials_of_other_settings_models_or_data_are_left_out_or_refused(tmp_path: Path) -> None:
    path = str(earlier(tmp_path / "other", training={"steps": 7}))
    mine = config(sampler={"warm_start": [path]})
    assert not warm_trials(mine, build_space(mine))[0].records, "trials of seven steps"
    check_same_models(mine, SOURCES)
    with pytest.raises(ConfigError, match=r"sampler\.warm_start\.0: .*other is of another data\.source; warm_start_anyway"):
        check_same_models(mine, {**SOURCES, "data.source": "abd"})
    anyway = config(sampler={"warm_start": [path], "warm_start_anyway": True})
    check_same_models(anyway, {**SOURCES, "data.source": "abd"})
    assert len(warm_trials(anyway, build_space(anyway))[0].records) == 2
    with pytest.raises(ConfigError, match=r"sampler\.warm_start\.0: .*no such file"):
        warm_trials(config(sampler={"warm_start": [str(tmp_path / "none")]}), build_space(mine))

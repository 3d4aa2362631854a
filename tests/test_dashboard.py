"""Do study, database and optuna-dashboard say of each trial how it ended, whichever word Ray Tune has for it?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
from planted import sweep

from neo_ray.mirror import Mirror, study_url
from neo_ray.searcher import StudySearch, open_study
from neo_ray.space import build_space

NAN = math.nan
ENDS: list[tuple[dict[str, Any] | None, bool, str]] = [
    ({"state": "COMPLETE", "select_ce": 4.0}, False, "COMPLETE"),
    ({"state": "PRUNED", "select_ce": 4.5}, False, "PRUNED"),  # ASHA's stop, which came while it ran
    ({"select_ce": 4.5}, False, "PRUNED"),  # and before anything else was told of it
    (None, False, "PRUNED"),
    ({"state": "FAILED", "cause": "diverged", "select_ce": NAN}, False, "PRUNED"),  # a sampler learns from it
    ({"state": "COMPLETE", "select_ce": NAN}, False, "PRUNED"),
    ({"state": "FAILED", "cause": "error"}, False, "FAIL"),
    (None, True, "FAIL"),
]
"""What Tune tells of a trial's end, whether it is an error of Tune's, and the state in Optuna's words."""


def test_every_end_of_a_trial_is_told_and_seen_in_a_browser_while_the_study_runs(tmp_path: Path) -> None:
    (tmp_path / "planted").mkdir()
    of = sweep(storage={"path": str(tmp_path)})
    space, names = build_space(of), iter(f"{number:04d}" for number in range(len(ENDS) + 1))
    study = open_study(of, space, [])
    search, copy = StudySearch(of, space, study, [], lambda: next(names), lambda *_: None), Mirror(of, study, print)
    expected: list[tuple[str, str]] = []
    for number, (result, error, state) in enumerate(ENDS):
        assert search.suggest(f"tune-{number}") is not None
        search.on_trial_result(f"tune-{number}", {"rung": 1, "select_ce": NAN if number % 2 else 5.0})
        copy.follow()
        assert shown(study_url(of)) == [*expected, (f"{number:04d}", "Running")]
        search.on_trial_complete(f"tune-{number}", result, error)
        search.on_trial_complete(f"tune-{number}", result, error)  # Tune may tell it twice
        expected.append((f"{number:04d}", state.capitalize()))
        copy.follow()
        assert shown(study_url(of)) == expected
    search.suggest("tune-last")
    assert [trial.state.name for trial in study.trials] == [*(state for _, _, state in ENDS), "RUNNING"]
    held = optuna.load_study(study_name=of.name, storage=study_url(of)).trials
    assert [trial.state.name for trial in held] == [state for _, _, state in ENDS]
    assert held[0].value == 4.0 and held[0].intermediate_values == {1: 5.0}


def shown(url: str) -> list[tuple[str, str]]:
    """Trial → state, as optuna-dashboard's server tells the page of a study. A new server: one keeps its answers for seconds."""
    from optuna_dashboard import wsgi
    from werkzeug.test import Client

    client = Client(wsgi(url))  # type: ignore[arg-type]
    (summary,) = client.get("/api/studies").json["study_summaries"]
    trials = client.get(f"/api/studies/{summary['study_id']}").json["trials"]
    named = ({attr["key"]: attr["value"] for attr in trial["user_attrs"]} for trial in trials)
    return [(name["trial"].strip('"'), trial["state"]) for name, trial in zip(named, trials, strict=True)]

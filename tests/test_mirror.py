"""Does the database show the study as it is, while it runs, and does a locked one cost nothing? Read by another connection."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest
from planted import sweep

from neo_ray import mirror, refusals
from neo_ray.config import SweepConfig
from neo_ray.mirror import Mirror, study_url
from neo_ray.records import TrialRecord
from neo_ray.searcher import open_study
from neo_ray.settings import ConfigError
from neo_ray.space import build_space

STATE = optuna.trial.TrialState
PARAMS = {"rank": 8, "alpha": 16.0, "learning_rate": 1e-3, "kd_ratio": 0.5}


def config(folder: Path, **storage: Any) -> SweepConfig:
    (folder / "planted").mkdir(exist_ok=True, parents=True)
    return sweep(storage={"path": str(folder), **storage})


def seen(of: SweepConfig) -> list[optuna.trial.FrozenTrial]:
    """What optuna-dashboard would show."""
    return optuna.load_study(study_name=of.name, storage=study_url(of)).trials


def test_the_database_follows_a_running_study(tmp_path: Path) -> None:
    of = config(tmp_path)
    done = TrialRecord(id="0000", state="COMPLETE", params=PARAMS, metrics={"select_ce": 4.0})
    study = open_study(of, build_space(of), [done])
    copy = Mirror(of, study, print)
    copy.follow()
    first, second = study.ask(), study.ask()
    copy.follow()
    assert len(seen(of)) == 1, "no trial before it has its name"
    for asked, name in ((first, "0001"), (second, "0002")):
        asked.set_user_attr("trial", name)
    copy.follow()
    assert [t.state for t in seen(of)] == [STATE.COMPLETE, STATE.RUNNING, STATE.RUNNING]
    assert seen(of)[0].value == 4.0 and seen(of)[0].params["rank"] == 8
    params = build_space(of).define(first)
    first.report(5.0, 1)
    copy.follow()
    running = seen(of)[1]
    assert running.params == params and running.intermediate_values == {1: 5.0} and running.user_attrs["trial"] == "0001"
    first.report(4.5, 2)
    study.tell(first, state=STATE.PRUNED)
    study.tell(second, 3.5)
    copy.follow()
    copy.follow()
    assert [(t.state, t.value) for t in seen(of)] == [(STATE.COMPLETE, 4.0), (STATE.PRUNED, 4.5), (STATE.COMPLETE, 3.5)]
    assert seen(of)[1].intermediate_values == {1: 5.0, 2: 4.5}
    Mirror(of, open_study(of, build_space(of), [done]), print).follow()
    assert len(seen(of)) == 1, "what was asked for and never began is gone at the next start"


def test_a_start_writes_only_what_the_database_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = config(tmp_path)
    records = [
        TrialRecord(id="0000", state="COMPLETE", params=PARAMS, metrics={"select_ce": 4.0}),
        TrialRecord(id="0001", state="PRUNED", params=PARAMS, curve=[{"rung": 1, "step": 5, "select_ce": 5.0}]),
        TrialRecord(id="0002", state="FAILED", cause="error", params=PARAMS),
    ]
    others = open_study(of, build_space(of), records[:1]).trials
    study = open_study(of, build_space(of), records[1:])
    for name in ("0003", "0004"):  # they run when the driver is killed
        study.ask().set_user_attr("trial", name)
    Mirror(of, study, print, others).follow()
    held = seen(of)
    assert len(held) == 5
    written = list[str]()
    create = optuna.storages.RDBStorage.create_new_trial

    def counted(storage: Any, study_id: int, template: Any = None) -> int:
        written.append(template.user_attrs["trial"])
        return create(storage, study_id, template)

    monkeypatch.setattr(optuna.storages.RDBStorage, "create_new_trial", counted)
    ended = TrialRecord(id="0003", state="COMPLETE", params=PARAMS, metrics={"select_ce": 4.25})
    fresh = TrialRecord(id="0005", state="COMPLETE", params=PARAMS, metrics={"select_ce": 3.0})
    study = open_study(of, build_space(of), [*records[1:], ended, fresh])
    copy = Mirror(of, study, print, others)
    copy.follow()
    again = study.ask()
    copy.follow()
    again.set_user_attr("trial", "0004")
    copy.follow()
    study.tell(again, 2.0)
    copy.follow()
    assert written == ["0005"]
    assert [t._trial_id for t in seen(of)[:5]] == [t._trial_id for t in held]
    complete = [(t.user_attrs["trial"], t.value) for t in seen(of) if t.state == STATE.COMPLETE]
    assert complete == [("0000", 4.0), ("0003", 4.25), ("0004", 2.0), ("0005", 3.0)]
    assert all(t.state.is_finished() for t in seen(of))


@pytest.mark.parametrize(
    "changed",
    [
        {"id": "0001"},
        {"state": "FAILED", "cause": "error"},
        {"metrics": {"select_ce": 3.0}},
        {"params": {**PARAMS, "rank": 4}},
    ],
)
def test_a_study_that_says_something_else_is_made_anew(tmp_path: Path, changed: dict[str, Any]) -> None:
    of = config(tmp_path)
    done = TrialRecord(id="0000", state="COMPLETE", params=PARAMS, metrics={"select_ce": 4.0})
    Mirror(of, open_study(of, build_space(of), [done]), print).follow()
    now = done.model_copy(update=changed)
    Mirror(of, open_study(of, build_space(of), [now]), print).follow()
    (trial,) = seen(of)
    assert trial.user_attrs["trial"] == now.id and trial.params["rank"] == now.params["rank"]
    assert trial.state == (STATE.FAIL if now.state == "FAILED" else STATE.COMPLETE)
    assert trial.value == (now.metrics["select_ce"] if now.state == "COMPLETE" else None)


def test_a_running_trial_of_the_same_name_and_another_setting_is_not_taken_over(tmp_path: Path) -> None:
    of = config(tmp_path)
    space = build_space(of)
    for rate in (1e-3, 2e-3):  # the second is a sweep that was begun anew in the place of one that no trial ended of
        study = open_study(of, space, [])
        copy = Mirror(of, study, print)
        copy.follow()
        study.enqueue_trial({"learning_rate": rate})
        asked = study.ask()
        space.define(asked)
        asked.set_user_attr("trial", "0000")
        asked.report(1000 * rate, 1)
        copy.follow()
    copy.follow()
    (found,) = seen(of)
    assert found.params["learning_rate"] == 2e-3 and found.intermediate_values == {1: 2.0}


def test_a_locked_database_is_said_once_and_catches_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "SQLITE_SECONDS", 0.05)
    of, said = config(tmp_path), list[str]()
    study = open_study(of, build_space(of), [])
    copy = Mirror(of, study, said.append)
    copy.follow()
    other = sqlite3.connect(tmp_path / "planted" / "study.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    asked = study.ask()
    build_space(of).define(asked)
    study.tell(asked, 4.0)
    assert [copy._try(), copy._try()] == [False, False]
    assert len(said) == 1 and "database is locked" in said[0]
    copy.start()
    copy.close()
    assert "misses the last trials" in said[1]
    other.execute("ROLLBACK")
    assert copy._try() and [t.value for t in seen(of)] == [4.0]


def test_a_file_that_is_no_database_ends_nothing(tmp_path: Path) -> None:
    of, said = config(tmp_path), list[str]()
    (tmp_path / "planted" / "study.db").write_text("not one of SQLite's" * 99)
    copy = Mirror(of, open_study(of, build_space(of), []), said.append)
    copy.start()
    copy.close()
    assert len(said) == 2


def test_a_database_of_several_sweeps_keeps_each(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'all.db'}"
    for folder in ("one", "other", "other"):
        of = config(tmp_path / folder, study=url)
        study = open_study(of, build_space(of), [])
        study.tell(study.ask(), 1.0)
        Mirror(of, study, print).follow()
    names = optuna.get_all_study_names(url)
    assert len(names) == 2 and "planted" in names and any(str(tmp_path / "other" / "planted") in name for name in names)


def test_a_study_of_somebody_else_stays(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'all.db'}"
    theirs = optuna.create_study(study_name="planted", storage=url)
    theirs.tell(theirs.ask(), 1.0)
    of = config(tmp_path, study=url)
    Mirror(of, open_study(of, build_space(of), []), print).follow()
    assert len(optuna.get_all_study_names(url)) == 2 and len(optuna.load_study(study_name="planted", storage=url).trials) == 1


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("results/study.db", r"storage\.study: must be a database URL"),
        ("postgresql+nowhere://host/studies", r"storage\.study: "),
        ("sqlite://user:secret@/x", r"^storage\.study: the URL holds a password, which sweep\.yaml would show"),
    ],
)
def test_a_url_that_cannot_work_is_refused(tmp_path: Path, url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        refusals.check_installed(config(tmp_path, study=url))
    assert "secret" not in str(caught.value)

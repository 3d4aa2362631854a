"""Do others see what a trial reports? TensorBoard's event files, read back; Ray's own integrations by what they are given."""

from __future__ import annotations

import importlib.util
import os
import pickle
import queue
import socket
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from planted import sweep
from tensorboardX.proto.event_pb2 import Event

from neo_ray.loading import validate
from neo_ray.loggers import SECONDS_TO_SEND, TensorBoard, loggers
from neo_ray.outbox import MOST_WAITING, Outbox
from neo_ray.refusals import check_installed
from neo_ray.settings import ConfigError
from neo_ray.storage import Remote
from neo_ray.trackers import Mlflow


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag → (step, value), over all event files of a folder, by TensorBoard's record format."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


class Told:
    """What a callback asks a Tune trial for."""

    config: ClassVar[dict[str, Any]] = {"trial": "0003", "params": {"rank": 4}}
    evaluated_params: ClassVar[dict[str, Any]] = {"params": {"rank": 4}}


def test_event_files_hold_a_trials_curve_over_steps(tmp_path: Path) -> None:
    config = sweep(storage={"path": str(tmp_path)})
    (writer,) = loggers(config)
    assert isinstance(writer, TensorBoard)
    trial: Any = Told()
    for step in (13, 25):
        row = {"rung": step // 12, "step": step, "select_ce": 100.0 / step, "train_kd": None, "training_iteration": 1, "pid": 7}
        writer.log_trial_result(1, trial, row)
    writer.log_trial_result(2, trial, {"report_ce": 5.0, "done": True})
    writer.log_trial_end(trial)
    found = scalars(config.folder / "trials" / "0003" / "tensorboard")
    assert found["ray/tune/select_ce"] == [(13, pytest.approx(100 / 13)), (25, pytest.approx(4))]
    assert found["ray/tune/report_ce"] == [(25, 5.0)], "the end of a trial is told at its last step"
    assert not [tag for tag in found if "pid" in tag or "train_kd" in tag or "iteration" in tag]
    writer.log_trial_result(2, trial, {"step": 25, "select_ce": 4.0})
    writer.log_trial_end(trial)
    assert len(scalars(config.folder / "trials" / "0003" / "tensorboard")["ray/tune/select_ce"]) == 3, "a resumed trial goes on"
    assert loggers(sweep(logging={"tensorboard": False})) == []


def test_a_trial_that_ends_before_its_first_row_has_no_curve(tmp_path: Path) -> None:
    (writer,) = loggers(sweep(storage={"path": str(tmp_path)}))
    writer.log_trial_result(1, Told(), {"seconds": 1.0, "state": "FAILED", "done": True})  # type: ignore[arg-type]


def test_a_password_in_the_file_and_a_missing_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"logging\.mlflow\.tracking_uri: .*holds a password"):
        validate({**sweep().model_dump(), "logging": {"mlflow": {"tracking_uri": "https://me:secret@host/x"}}})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("wandb", "mlflow") else object())
    for name in ("wandb", "mlflow"):
        with pytest.raises(ConfigError, match=rf"logging\.{name}: needs the package {name}"):
            check_installed(sweep(logging={name: {}}))


def test_a_folder_is_refused_where_mlflow_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    for name in ("MLFLOW_ALLOW_FILE_STORE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for place in ("./mlruns", f"file://{tmp_path}", str(tmp_path)):
        with pytest.raises(ConfigError, match=rf"^logging\.mlflow\.tracking_uri: {place} is a folder, .*sqlite:////"):
            check_installed(sweep(logging={"mlflow": {"tracking_uri": place}}))
    for place in ("sqlite:////m.db", "https://host:5000", "databricks"):
        check_installed(sweep(logging={"mlflow": {"tracking_uri": place}}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path))
    with pytest.raises(ConfigError, match="is a folder"):
        check_installed(sweep(logging={"mlflow": {}}))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    check_installed(sweep(logging={"mlflow": {"tracking_uri": "./mlruns"}}))


def test_wandb_offline_is_refused_where_its_files_would_stay_behind(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    offline = {"wandb": {"mode": "offline"}}
    with pytest.raises(ConfigError, match=r"logging\.wandb\.mode: offline .* storage\.path s3://bucket/x is an object store"):
        check_installed(sweep(storage={"path": "s3://bucket/x"}, logging=offline))
    check_installed(sweep(storage={"path": "s3://bucket/x"}, logging={"wandb": {}}))
    check_installed(sweep(storage={"path": str(tmp_path)}, logging=offline))


def test_wandb_is_rays_own_and_gets_no_secret_and_neither_does_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages may be missing here: the callbacks are constructed with a stand-in for one, and begin nothing."""
    import ray.air.integrations.wandb as of_wandb

    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "")  # so that it is as before in the end
        monkeypatch.delenv(name)
    monkeypatch.setattr(of_wandb, "wandb", SimpleNamespace())
    config = sweep(logging={"tensorboard": False, "wandb": {"project": "p", "mode": "offline"}, "mlflow": {"tracking_uri": "/m"}})
    wandb, mlflow = loggers(config)
    assert isinstance(wandb, of_wandb.WandbLoggerCallback) and isinstance(mlflow, Mlflow)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2" and os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"
    assert (wandb.project, wandb.group, wandb.kwargs["mode"], wandb.api_key) == ("p", "planted", "offline", None)
    assert "config" in wandb.excludes and "params" not in wandb.excludes
    assert (mlflow.uri, mlflow.experiment_name, mlflow.client) == ("/m", "planted", None)


class Trial(Told):
    """What the real callbacks ask for, too."""

    def __init__(self, folder: Path) -> None:
        self.config = {"trial": "0003", "params": {"rank": 4}, "board": "a name", "config": "{}"}
        self.trial_id, self.experiment_dir_name, self.local_path = "a1b2c3", "tune-1", str(folder)

    def __str__(self) -> str:
        return "0003"


RESULTS = (
    {"rung": 1, "step": 13, "select_ce": 4.03125, "train_kd": None, "training_iteration": 1, "pid": 7},
    {"rung": 2, "step": 25, "select_ce": 3.515625, "train_kd": None, "training_iteration": 2, "pid": 7},
    {"report_ce": 5.0625, "state": "COMPLETE", "done": True, "training_iteration": 3, "pid": 7},
)
"""As a relay tells them to Tune. The values are binary fractions, which are written as they stand here."""


def run_of_a_trial(callback: Any, trial: Trial) -> None:
    """As Tune calls it."""
    callback.setup()
    callback.log_trial_start(trial)
    for iteration, result in enumerate(RESULTS, 1):
        callback.log_trial_result(iteration, trial, result)
    callback.log_trial_end(trial)
    callback.on_experiment_end([trial])


def curves_in(place: str) -> tuple[Any, dict[str, list[tuple[int, float]]]]:
    """The only run there, and its curves."""
    from mlflow import MlflowClient

    client = MlflowClient(place)
    experiment = client.get_experiment_by_name("planted")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run, {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}


CURVES = {"select_ce": [(13, 4.03125), (25, 3.515625)], "report_ce": [(25, 5.0625)]}


def an_mlflow(place: str, said: list[str]) -> Mlflow:
    (callback,) = loggers(sweep(logging={"tensorboard": False, "mlflow": {"tracking_uri": place}}), said.append)
    assert isinstance(callback, Mlflow)
    return callback


@pytest.mark.parametrize("kind", ["a file of SQLite", "a folder"])
def test_mlflow_holds_a_trial_s_parameters_and_curve(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # where MLflow puts what it was not told a place for
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    place = f"sqlite:///{tmp_path / 'mlflow.db'}" if "SQLite" in kind else str(tmp_path / "mlruns")
    callback = an_mlflow(place, said := list[str]())
    run_of_a_trial(callback, Trial(tmp_path))
    run, curves = curves_in(place)
    assert (run.info.run_name, run.info.status, run.data.tags["sweep"]) == ("0003", "FINISHED", "planted")
    assert run.data.params == {"rank": "4"}, "nothing but what was searched"
    assert curves == CURVES and not said
    pickle.dumps(callback)


def test_an_mlflow_that_is_away_from_the_start_is_said_once_and_told_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As between two phases: Tune calls `setup`, and then the hooks of a trial."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        callback = an_mlflow(f"http://127.0.0.1:{taken.getsockname()[1]}", said := list[str]())
        run_of_a_trial(callback, Trial(tmp_path))
        callback.on_experiment_end([])
    assert len(said) == 1 and said[0].startswith("MLflow takes nothing (MlflowException: ") and "the sweep goes on" in said[0]
    callback.uri, callback.client = f"sqlite:///{tmp_path / 'mlflow.db'}", None  # it is back
    callback.on_experiment_end([])
    run, curves = curves_in(callback.uri)
    assert run.data.params == {"rank": "4"} and run.info.status == "FINISHED" and curves == CURVES and len(said) == 1


def test_an_mlflow_that_does_not_answer_keeps_tunes_loop_not_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    told, kept_waiting, said = threading.Event(), list[str](), list[str]()

    def slow(uri: str) -> Any:
        if not told.wait(30):
            kept_waiting.append(uri)
        raise ConnectionError("nobody is there")

    monkeypatch.setattr(mlflow, "MlflowClient", slow)
    callback, ending = an_mlflow("http://host", said), list[float]()
    with monkeypatch.context() as patched:
        patched.setattr(callback.outbox, "flush", ending.append)
        run_of_a_trial(callback, Trial(tmp_path))
    told.set()
    callback.outbox.flush(60)
    assert not kept_waiting
    assert said == ["MLflow takes nothing (ConnectionError: nobody is there); the sweep goes on, and tries it again"]
    assert ending == [SECONDS_TO_SEND], "the end waits for so long at most"


def test_what_mlflow_refuses_is_said_and_the_rest_is_told(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    place, trial = f"sqlite:///{tmp_path / 'mlflow.db'}", Trial(tmp_path)
    trial.config = {**trial.config, "params": {"no name*": 4}}
    run_of_a_trial(an_mlflow(place, said := list[str]()), trial)
    run, curves = curves_in(place)
    assert len(said) == 1 and "no name*" in said[0]
    assert run.data.params == {} and run.info.status == "FINISHED" and curves == CURVES


def test_a_run_that_is_gone_is_not_replaced_by_another_that_is_active(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    place, before = f"sqlite:///{tmp_path / 'mlflow.db'}", mlflow.get_tracking_uri()
    callback = an_mlflow(place, said := list[str]())
    run_of_a_trial(callback, Trial(tmp_path))
    mlflow.set_tracking_uri(place)
    try:
        with mlflow.start_run() as active:
            callback.runs["0003"] = "of-no-run"
            for job in (callback.log_trial_start, callback.log_trial_end):
                job(Trial(tmp_path))
            callback.on_experiment_end([])
        everything = mlflow.MlflowClient(place).search_runs(["0", callback.experiment])
    finally:
        mlflow.set_tracking_uri(before)
    assert len(everything) == 2 and len(said) == 1 and "of-no-run" in said[0]
    assert [run.data.params for run in everything if run.info.run_id == active.info.run_id] == [{}]


def test_so_much_waits_and_no_more() -> None:
    said, go_on, sent = list[str](), threading.Event(), list[int]()

    def job(number: int) -> None:
        go_on.wait(30)
        sent.append(number)

    outbox = Outbox("test", said.append)
    outbox.put(*(partial(job, number) for number in range(MOST_WAITING + 5)))
    assert len(outbox.waiting) == MOST_WAITING and said == ["more than 10,000 messages wait"]
    go_on.set()
    outbox.flush(60)
    assert not outbox.waiting and sent[-2:] == [MOST_WAITING + 3, MOST_WAITING + 4] and sent == sorted(sent)


def test_after_a_failure_nothing_is_tried_for_a_while() -> None:
    said, tried = list[str](), list[int]()

    def job(number: int) -> str:
        tried.append(number)
        return "nobody is there"

    outbox = Outbox("test", said.append)
    outbox.put(partial(job, 0))
    outbox.flush(60)
    tried.clear()
    outbox.put(partial(job, 1), partial(job, 2))
    assert not tried and outbox.thread is None
    outbox.flush(60)
    assert tried == [0] and len(outbox.waiting) == 3 and said == ["nobody is there"], "in order"


def test_wandb_offline_asks_for_no_key_and_writes_a_trial_s_curve_into_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's actor and W&B are real; the actor runs in a thread of this process, with a queue of Python's."""
    pytest.importorskip("wandb")
    import ray.air.integrations.wandb as of_wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # for its own process, which a busy machine begins slowly
    monkeypatch.setenv("WANDB_MODE", "")  # so that it is as before in the end
    monkeypatch.delenv("WANDB_MODE")
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    elsewhere = tmp_path / "ray" / "0003"
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # the actor moves to the folder of its trial
    monkeypatch.setattr(of_wandb, "Queue", lambda **_: queue.Queue())
    monkeypatch.setattr(of_wandb, "_force_on_current_node", dict)  # which starts a Ray
    (callback,) = loggers(
        sweep(storage={"path": "results"}, logging={"tensorboard": False, "wandb": {"project": "p", "mode": "offline"}})
    )
    results, trial, ended = tmp_path / "results" / "planted", Trial(elsewhere), list[threading.Thread]()
    results.mkdir(parents=True)

    def begin(**told: Any) -> Any:
        actor = of_wandb._WandbLoggingActor(**told)

        def run() -> str:
            ended.append(threading.Thread(target=actor.run))
            ended[0].start()
            return "a future"

        return SimpleNamespace(run=SimpleNamespace(remote=run))

    tracked: Any = callback
    tracked._remote_logger_class = SimpleNamespace(remote=begin)
    monkeypatch.setattr(tracked, "_cleanup_logging_actors", lambda **_: None)
    run_of_a_trial(tracked, trial)
    ended[0].join(300)
    tracked._trial_logging_futures.clear()
    tracked._trial_logging_actors.clear()
    (written,) = results.glob("wandb/offline-run-*/run-*.wandb")
    words = (b"select_ce", b"4.03125", b"3.515625", b"report_ce", b"5.0625", b'{"rank":4}', b"planted")
    until = time.monotonic() + 60  # W&B's own process may write its last after it has said that the run is over
    while not all(word in (data := written.read_bytes()) for word in words) and time.monotonic() < until:
        time.sleep(0.2)
    assert [word for word in words if word not in data] == []
    assert b"a name" not in data


def test_a_store_that_is_away_keeps_no_trial_waiting_and_is_said_once(
    tmp_path: Path, bucket: str, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune's loop tells of a trial's end. What could not be sent goes when the store is back."""
    config, said, away = sweep(storage={"path": bucket}), list[str](), threading.Event()
    trials_have_ended, kept_waiting = threading.Event(), list[Path]()
    upload = Remote.upload

    def slow(place: Remote, file: Path) -> None:
        if away.is_set():
            if not trials_have_ended.wait(30):
                kept_waiting.append(file)
            raise ConnectionError("nobody is there")
        upload(place, file)

    monkeypatch.setattr(Remote, "upload", slow)
    away.set()
    writer = TensorBoard(config, said.append)
    pickle.dumps(writer)
    for number in range(3):
        trial: Any = Told()
        trial.config = {"trial": f"{number:04d}", "params": {}}
        writer.log_trial_result(1, trial, {"rung": 1, "step": 5, "select_ce": 4.0})
        writer.log_trial_end(trial)
    trials_have_ended.set()
    writer.on_experiment_end([])
    assert not kept_waiting and len(said) == 1 and "nobody is there" in said[0] and len(writer.outbox.waiting) == 3
    away.clear()
    writer.on_experiment_end([])
    assert not writer.outbox.waiting and isinstance(config.results, Remote)
    for number in range(3):
        assert len((config.results / "trials" / f"{number:04d}" / "tensorboard").names()) == 1

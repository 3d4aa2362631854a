"""What goes wrong in a sweep stays where it belongs: trials that fail, workers that die, a person who presses Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from doors import ROOT, finish, start, sweep_file, wait_for
from intact import begun, intact, watched_steps
from test_loggers import scalars
from tiny import World

from neo_ray.records import Journal, TrialRecord, load_records

LONG = {
    "training": {"steps": 120, "batch_size": 4, "micro_batch_size": 2, "dtype": "fp32"},
    "scheduler": {"name": "none"},
}


FAULT = """
import builtins, sys
plain, target = builtins.__import__, "neo_ray.train"

def importing(*arguments, **named):
    module = plain(*arguments, **named)
    found = sys.modules.get(target)
    if found is not None and not found.__spec__._initializing and not hasattr(found, "injected"):
        found.injected = True
        inject(found)
    return module

builtins.__import__ = importing

"""
"""Given to every process as its sitecustomize, with a function `inject` that breaks the training module (or another `target`)."""
UNREADABLE = """
target = "neo_ray.parts"

def inject(parts):
    def load_parts(sources, trial, device):
        raise OSError("the disk with the weights is gone")

    parts.load_parts = load_parts
"""
SMALL_MEMORY = """
def inject(train):
    loss = train.Student.loss

    def small(student, output_BLH, *rest):
        if len(output_BLH) > 2:
            raise sys.modules["torch"].OutOfMemoryError("more than two sequences at a time")
        return loss(student, output_BLH, *rest)

    train.Student.loss = small
"""
BROKEN = """
def inject(train):
    plan_steps = train.plan_steps

    def broken(num_tokens, num_labels, training, *rest):
        if training.weight_decay == 0.5:
            raise RuntimeError("a fault of this trial")
        return plan_steps(num_tokens, num_labels, training, *rest)

    train.plan_steps = broken
"""
HANGING = """
def inject(train):
    import pathlib, time
    due = train.StepPlan.due

    def hanging(plan, step):
        mark = pathlib.Path(__file__).with_name("hung")
        if step == 80 and not mark.exists():
            mark.touch()
            time.sleep(600)
        return due(plan, step)

    train.StepPlan.due = hanging
"""


RELAY = "ray::ResourceTrainable"
"""The process that stands for a trial in Tune: Ray names it after what Tune makes of a Relay."""


def reported(journal: Path, rung: int = 1) -> bool:
    return journal.exists() and f'"rung": {rung}' in journal.read_text()


def workers_of(process: subprocess.Popen[str] | psutil.Process, kind: str = "RayTrainWorker") -> list[psutil.Process]:
    """The processes that train, or another kind's, of those below: Ray renames them after the class of the actor."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has ended meanwhile
            if kind in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_a_trial_that_fails_is_recorded_with_its_cause_and_the_sweep_goes_on(tiny_world: World, tmp_path: Path) -> None:
    search = {
        "learning_rate": {"grid": ["1e30", "1e-2"]},
        "weight_decay": {"grid": [0.5, 0], "when": {"learning_rate": "1e-2"}},
        "rank": {"grid": [10**9, 2], "when": {"weight_decay": 0}},
    }
    (tmp_path / "sitecustomize.py").write_text(FAULT + BROKEN)
    changes = {"search": search, "sampler": {"name": "grid"}, "scheduler": {"name": "none"}}
    path = sweep_file(tiny_world, tmp_path, **changes, resources={"concurrency": 1, "memory_check": False})
    process = start(path, also_import=tmp_path)
    text = finish(process)
    assert process.returncode == 0, text
    found: dict[str | None, TrialRecord] = {r.cause: r for r in load_records(tmp_path / "results" / "tiny")}
    assert set(found) == {"diverged", "error", "out_of_memory", None}
    assert "loss is" in str(found["diverged"].error) and "step" in str(found["diverged"].error)
    assert "RuntimeError: a fault of this trial (sitecustomize.py:" in str(found["error"].error)
    assert "memory" in str(found["out_of_memory"].error)
    assert found["out_of_memory"].attempts == 2, "once with the micro-batch asked for, once with half of it"
    assert all(record.state == "FAILED" for cause, record in found.items() if cause)
    assert found[None].state == "COMPLETE" and found[None].id == "0003"
    assert "FAILED (out_of_memory)" in text and "Traceback" not in text


@pytest.mark.slow
def test_a_stop_ends_a_trial_in_the_step_that_it_is_in(tiny_world: World, tmp_path: Path) -> None:
    """ASHA at the first of two evaluations: whoever waits for the next one takes four steps more. Steps of a second each."""
    (tmp_path / "sitecustomize.py").write_text(FAULT + watched_steps(1.0))
    settings = {
        "search": {"learning_rate": {"grid": [1e-2, 1e-7]}},
        "sampler": {"name": "grid"},
        "scheduler": {"name": "asha", "grace": 0.5, "reduction_factor": 2},
        "training": {"steps": 8, "batch_size": 4, "micro_batch_size": 2, "dtype": "fp32"},
        "evaluation": {"points": 2},
        "resources": {"concurrency": 1},
    }
    process = start(sweep_file(tiny_world, tmp_path, **settings), also_import=tmp_path)
    text = finish(process)
    assert process.returncode == 0, text
    folder = tmp_path / "results" / "tiny"
    records = load_records(folder)
    assert [r.state for r in records] == ["COMPLETE", "PRUNED"], text
    (stop,) = (event for event in Journal(folder).events() if event["event"] == "stop")
    after = [step.number for step in begun(tmp_path) if step.rate == 1e-7 and step.at > stop["at"]]
    assert len(after) <= 1, f"steps {after} were begun after the stop"
    assert records[1].steps <= 4 + 2 and records[1].details["stop_seconds"] < 60
    assert "Early stopping: 1 trials left" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_models_that_do_not_load_end_the_sweep_and_fail_no_trial(tiny_world: World, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULT + UNREADABLE)
    resources = {"concurrency": 1, "max_failures": 0}
    path = sweep_file(tiny_world, tmp_path, sampler={"name": "tpe", "num_trials": 1}, resources=resources)
    process = start(path, also_import=tmp_path)
    text = finish(process)
    assert process.returncode == 1, text
    assert "error: workers cannot be kept alive: " in text and "the disk with the weights is gone" in text
    assert "lost its workers in trial" not in text and "Traceback" not in text
    assert [(r.state, r.attempts) for r in load_records(tmp_path / "results" / "tiny")] == [("RUNNING", 1)]

    (tmp_path / "sitecustomize.py").unlink()
    process = start(path)
    text = finish(process)
    assert process.returncode == 0, text
    assert [(r.state, r.id) for r in load_records(tmp_path / "results" / "tiny")] == [("COMPLETE", "0000")]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "is_first"), [(1, True), (2, True), (2, False)])
def test_a_trial_whose_worker_dies_goes_on_from_its_checkpoint(
    tiny_world: World, tmp_path: Path, count: int, is_first: bool
) -> None:
    """Of two, the other one sees a collective fail, which is no failure of the trial."""
    (tmp_path / "sitecustomize.py").write_text(FAULT + watched_steps())
    resources = {"concurrency": 1, "workers_per_trial": count, "max_failures": 1}
    path = sweep_file(tiny_world, tmp_path, **LONG, sampler={"name": "tpe", "num_trials": 1}, resources=resources)
    process = start(path, also_import=tmp_path)
    journal = tmp_path / "results" / "tiny" / "journal.jsonl"
    wait_for(lambda: reported(journal), process)
    workers = workers_of(process)
    assert len(workers) == count, "one slot"
    first = begun(tmp_path)[-1].pid
    next(worker for worker in workers if (worker.pid == first) == is_first).kill()
    text = finish(process)
    assert process.returncode == 0, text
    assert "lost its workers in trial 0000" in text and "gloo" not in text
    (record,) = intact(journal.parent, {"0000": ["error"]}, watched=tmp_path)
    assert record.details["resumed_from_step"] >= 30 and record.details["workers"] == count


@pytest.mark.slow
def test_a_trial_whose_relay_is_killed_is_not_run_again(tiny_world: World, tmp_path: Path) -> None:
    """Ray's memory monitor takes what it likes: here what stands for a trial in Tune, once amid it and once more."""
    (tmp_path / "sitecustomize.py").write_text(FAULT + watched_steps(0.1))
    hold, killed = tmp_path / "hold", set[int]()
    scheduler = {"name": "asha", "grace": 0.25}
    path = sweep_file(tiny_world, tmp_path, **{**LONG, "scheduler": scheduler}, sampler={"name": "tpe", "num_trials": 2})
    process = start(path, "resources.concurrency=1", also_import=tmp_path)
    journal = tmp_path / "results" / "tiny" / "journal.jsonl"

    def relays() -> list[psutil.Process]:
        return [relay for relay in workers_of(process, RELAY) if relay.pid not in killed]

    for rung in (1, 2):
        wait_for(lambda rung=rung: reported(journal, rung), process)  # type: ignore[misc]
        hold.touch()
        wait_for(relays, process)
        for relay in relays():
            killed.add(relay.pid)
            relay.kill()
        wait_for(relays, process)
        hold.unlink()
    text = finish(process)
    assert process.returncode == 0, text
    records = load_records(journal.parent)
    assert [r.attempts for r in records] == [1, 1] and not any(r.lost_attempts for r in records), text
    assert records[0].state == "COMPLETE" and [row["rung"] for row in records[0].curve] == [1, 2, 3, 4]
    assert records[0].details["resumed_from_step"] == 0
    assert all(r.state in ("COMPLETE", "PRUNED") for r in records), "Tune still hears of it, and goes on"
    steps = [step for step, _ in scalars(journal.parent / "trials" / "0000" / "tensorboard")["ray/tune/train_loss"]]
    told = [row["step"] for row in records[0].curve]
    assert sorted(steps) == [*told, told[-1]], "each is told once; the end repeats the last"


@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batch_and_changes_no_result(tiny_world: World, tmp_path: Path) -> None:
    changes = {
        "training": {"steps": 8, "batch_size": 8, "micro_batch_size": "auto", "dtype": "fp32", "learning_rate": "1e-2"},
        "search": {"kd_ratio": {"grid": [0.5, 0.9]}},
        "sampler": {"name": "grid"},
        "scheduler": {"name": "none"},
        "resources": {"concurrency": 1},
    }
    curves, used = {}, {}
    for name, code in (("roomy", ""), ("small", FAULT + SMALL_MEMORY)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(code)
        process = start(sweep_file(tiny_world, folder, **changes), also_import=folder)
        text = finish(process)
        assert process.returncode == 0, text
        records = load_records(folder / "results" / "tiny")
        assert [r.state for r in records] == ["COMPLETE", "COMPLETE"], [r.error for r in records]
        curves[name] = [[row["select_ce"] for row in r.curve] for r in records]
        used[name] = [(r.details["micro_batch_size"], r.attempts) for r in records]
    assert used == {"roomy": [(8, 1), (8, 1)], "small": [(2, 3), (2, 1)]}, "8, 4, 2; the next trial begins with 2"
    for roomy, small in zip(curves["roomy"], curves["small"], strict=True):
        assert small == pytest.approx(roomy, rel=1e-4)  # sums of fp32 in another order, through eight steps of Adam


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_with_130_sigterm_with_143_and_the_same_command_goes_on(
    tiny_world: World, tmp_path: Path, sent: signal.Signals
) -> None:
    path = sweep_file(tiny_world, tmp_path, **LONG)
    process = start(path)
    journal = tmp_path / "results" / "tiny" / "journal.jsonl"
    wait_for(lambda: reported(journal), process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(sent)
    text = finish(process)
    assert process.returncode == 128 + sent, text
    assert "interrupted; the same command goes on from here" in text and "Traceback" not in text
    assert not (journal.parent / "lease.json").exists()
    assert not psutil.wait_procs(children, timeout=20)[1], "nothing is left running"
    before = journal.read_text()

    process = start(path)
    text = finish(process)
    assert process.returncode == 0, text
    assert journal.read_text().startswith(before)
    records = load_records(journal.parent)
    assert [r.state for r in records] == ["COMPLETE", "COMPLETE"]
    assert max(r.details["resumed_from_step"] for r in records) >= 30


@pytest.mark.slow
def test_a_second_ctrl_c_waits_for_no_step(tiny_world: World, tmp_path: Path) -> None:
    """Steps that do not end while the sweep is there: what they would have done is done again from the last evaluation."""
    (tmp_path / "sitecustomize.py").write_text(FAULT + watched_steps())
    search = {"learning_rate": {"grid": [1e-2, 2e-2]}}
    path = sweep_file(tiny_world, tmp_path, **LONG, search=search, sampler={"name": "grid"})
    process = start(path, also_import=tmp_path)
    journal = tmp_path / "results" / "tiny" / "journal.jsonl"
    wait_for(lambda: reported(journal), process)
    children = psutil.Process(process.pid).children(recursive=True)
    (tmp_path / "hold").touch()
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None, "the first waits for a checkpoint"
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    text = finish(process)
    assert process.returncode == 130 and time.monotonic() - sent < 45, text  # it would wait a minute
    assert "interrupted; the same command goes on from here" in text and "Traceback" not in text
    assert not psutil.wait_procs(children, timeout=20)[1], "nothing is left running"

    (tmp_path / "hold").unlink()
    process = start(path, also_import=tmp_path)
    text = finish(process)
    assert process.returncode == 0, text
    intact(journal.parent, {"0000": ["interrupted"], "0001": ["interrupted"]}, watched=tmp_path)


@pytest.mark.slow
def test_a_sweep_that_nobody_reads_any_more_goes_on(tiny_world: World, tmp_path: Path) -> None:
    process = start(sweep_file(tiny_world, tmp_path, **LONG))
    journal = tmp_path / "results" / "tiny" / "journal.jsonl"
    wait_for(lambda: reported(journal), process)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(240) == 0
    assert [r.state for r in load_records(journal.parent)] == ["COMPLETE", "COMPLETE"]
    assert (journal.parent / "report.md").exists()


def test_a_ray_without_its_state_api_is_refused(tmp_path: Path) -> None:
    code = """
import ray
from neo_ray.cluster import connect
from neo_ray.config import ResourcesConfig
ray.init(include_dashboard=False, num_cpus=1, log_to_driver=False)
connect(ResourcesConfig())
"""
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert "ConfigError: resources.address: this Ray has no State API; start it with its dashboard" in done.stderr


@pytest.mark.slow
def test_failing_trials_of_two_workers_end_their_slot_and_not_the_sweep(tiny_world: World, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULT + BROKEN)
    changes = {
        "search": {"seed": {"grid": [0, 1]}, "weight_decay": {"grid": [0.5, 0]}, "beta1": {"grid": [0.8, 0.9]}},
        "sampler": {"name": "grid"},
        "scheduler": {"name": "none"},
        "training": {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "dtype": "fp32"},
        "resources": {"workers_per_trial": 2},
    }
    process = start(sweep_file(tiny_world, tmp_path, **changes), also_import=tmp_path)
    text = finish(process)
    assert process.returncode == 0, text
    records = load_records(tmp_path / "results" / "tiny")
    assert len(records) == 8, text
    assert all((r.state == "FAILED") == (r.params["weight_decay"] == 0.5) for r in records), text
    assert all(r.details["workers"] == 2 for r in records if r.state == "COMPLETE")
    assert text.count("FAILED (error)") == 4, "each failure is told once, though both workers saw it"


@pytest.mark.slow
def test_a_hung_trial_gets_new_workers(tiny_world: World, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULT + HANGING)
    resources = {"concurrency": 1, "silence_minutes": 0.25}
    path = sweep_file(tiny_world, tmp_path, **LONG, sampler={"name": "tpe", "num_trials": 1}, resources=resources)
    process = start(path, also_import=tmp_path)
    text = finish(process)
    assert process.returncode == 0, text
    (record,) = intact(tmp_path / "results" / "tiny", {"0000": ["hung"]})
    assert record.details["resumed_from_step"] >= 60
    assert "no step for 15 s" in (tmp_path / "results" / "tiny" / "logs" / "slot-0-rank-0.log").read_text()

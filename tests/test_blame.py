"""Whose fault is it that a trial broke off? A slot's worker alone, with training that fails as it is told."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from botocore.exceptions import ClientError, EndpointConnectionError
from safetensors import SafetensorError
from test_slots import Called

from neo_ray import checkpoints, listening, slot
from neo_ray.board import Board
from neo_ray.faults import LoadError, PeerLost, StorageFailed, of_peers, of_storage
from neo_ray.records import Stop, log_name
from neo_ray.settings import TrialConfig
from neo_ray.storage import Remote

FULL = OSError(errno.ENOSPC, "No space left on device")
EXPIRED = ClientError({"Error": {"Code": "ExpiredToken", "Message": "expired"}}, "PutObject")


def raised_from(error: BaseException) -> BaseException:
    outer = RuntimeError("the checkpoint cannot be kept")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FULL, True),
        *((OSError(number, "x"), True) for number in (errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES)),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (EXPIRED, True),
        (EndpointConnectionError(endpoint_url="http://x"), True),
        (ConnectionResetError("x"), True),
        (TimeoutError("x"), True),
        (raised_from(FULL), True),
        (FileNotFoundError(errno.ENOENT, "x"), False),
        (OSError("Can't load the tokenizer"), False),
        (SafetensorError("Error while deserializing header: invalid"), False),
        (RuntimeError("No space left"), False),
        (ValueError("x"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (MemoryError(), False),
    ],
)
def test_an_error_of_storage_is_told_from_others(error: BaseException, expected: bool) -> None:
    assert of_storage(error) is expected


GLOO = RuntimeError("[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:8605")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (GLOO, True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (torch.distributed.DistNetworkError("x"), True),
        (raised_from(GLOO), True),
        (RuntimeError("a fault of this trial"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("/gloo/"), False),
    ],
)
def test_a_collective_that_breaks_off_is_told_from_other_errors(error: BaseException, expected: bool) -> None:
    assert of_peers(error) is expected


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A slot's only worker, holding trial 0000 of a board that it calls without Ray."""
    monkeypatch.setattr(slot.ray, "get", lambda value, timeout=None: value)
    monkeypatch.setattr("neo_ray.parts.shape_of", lambda trial, device: ("shape", True))
    board = Board(1)
    called: Any = Called(board)
    called.submit.remote("0000", {"config": {}})
    called.take.remote(0)
    made: Any = slot.Worker(called, slot.SlotJob(0, "board", None, str(tmp_path), 60), 0, torch.device("cpu"))
    made.real = board
    return made


def failing(worker: Any, error: BaseException) -> Any:
    """The trial's end as the board has it, after training that raises this; and what the worker raises itself."""

    def train(*_: Any) -> dict[str, Any]:
        logging.getLogger("neo_ray").info("in training")
        raise error

    worker._train, raised = train, None
    try:
        worker.run("0000", TrialConfig(), None)
    except Exception as found:
        raised = found
    return worker.real.items["0000"], raised


def test_a_full_disk_costs_its_slot_and_not_the_trial(worker: Any) -> None:
    items, raised = failing(worker, FULL)
    assert isinstance(raised, StorageFailed) and "No space left" in str(raised), "the slot ends"
    assert [(item["kind"], item["cause"]) for item in items] == [("attempt", "storage")]
    assert "No space left on device" in items[0]["message"] and list(worker.real.queue) == ["0000"]


def test_a_fault_of_the_trial_ends_it_and_names_its_log(worker: Any, tmp_path: Path) -> None:
    items, raised = failing(worker, RuntimeError("a fault of this trial"))
    (end,) = items
    assert raised is None and (end["state"], end["cause"]) == ("FAILED", "error")
    text = (tmp_path / end["details"]["log"]).read_text()
    assert "trial 0000 begins" in text and "in training" in text and "a fault of this trial" in text
    logging.getLogger("neo_ray").warning("of another trial")
    assert "of another trial" not in (tmp_path / end["details"]["log"]).read_text()


@pytest.mark.parametrize("count", [1, 2])
def test_who_sees_another_worker_end_says_nothing_of_the_trial(worker: Any, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """One that is alone has no other: then it is a fault of the trial."""
    monkeypatch.setattr("neo_ray.parts.rank_and_world_size", lambda: (0, count))
    monkeypatch.setattr(slot, "SECONDS_TO_BE_SEEN", 0.0)
    items, raised = failing(worker, GLOO)
    if count == 1:
        assert raised is None and [item["state"] for item in items] == ["FAILED"]
    else:
        assert isinstance(raised, PeerLost) and not items and worker.real.in_slot == {0: "0000"}


def test_a_board_that_is_out_of_reach_fails_no_trial(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "SECONDS_TO_BE_SEEN", 0.0)
    items, raised = failing(worker, slot.ray.exceptions.ActorUnavailableError("the board", None))
    assert isinstance(raised, PeerLost) and not items and worker.real.in_slot == {0: "0000"}


def test_a_stop_is_heard_though_the_board_was_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [slot.ray.exceptions.ActorUnavailableError("the board", None), Stop.PRUNED]

    def when_stopped(trial: str) -> Any:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(slot.ray, "get", lambda value: value)
    monkeypatch.setattr(listening.time, "sleep", lambda seconds: None)
    board: Any = SimpleNamespace(when_stopped=SimpleNamespace(remote=when_stopped))
    heard = listening.Listener(board, slot.SlotJob(0, "board", None, "folder", 60), "0000", watching=False)
    heard._listen()
    assert heard.look() == Stop.PRUNED and not answers


def test_a_log_that_cannot_be_kept_fails_no_trial(worker: Any, tmp_path: Path) -> None:
    (tmp_path / "trials").write_text("no folder")
    worker._train = lambda *_: {"state": "COMPLETE"}
    worker.run("0000", TrialConfig(), None)
    assert worker.real.items["0000"][-1]["state"] == "COMPLETE"


def test_the_log_of_a_trial_that_failed_is_uploaded(worker: Any, bucket: str, scratch: Path) -> None:
    worker.job = slot.SlotJob(0, "board", None, f"{bucket}/results", 60)
    failing(worker, FULL)
    assert "No space left on device" in (Remote(f"{bucket}/results") / log_name("0000")).read_text()


def test_models_that_do_not_load_are_no_fault_of_the_trial(worker: Any) -> None:
    items, raised = failing(worker, LoadError("no weights"))
    assert isinstance(raised, LoadError) and not items and list(worker.real.queue) == ["0000"]


@pytest.mark.parametrize("loads", [False, True])
def test_loading_that_hangs_is_seen_later_than_a_step_that_does_and_is_no_fault_of_the_trial(
    worker: Any, loads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    died, begun = threading.Event(), time.monotonic()
    monkeypatch.setattr(listening.os, "_exit", lambda code: (died.set(), stop.close()))
    job = slot.SlotJob(0, "board", None, "folder", 0.2)
    monkeypatch.setattr(listening.Listener, "_listen", lambda self: None)
    stop = listening.Listener(worker.board, job, "0000", watching=True)
    if loads:
        stop.loaded()
    assert died.wait(20)
    assert time.monotonic() - begun >= 0.2 * (1 if loads else listening.LOADING)
    assert worker.real.hung == ({0} if loads else set())
    assert list(worker.real.queue) == ([] if loads else ["0000"])


def test_half_of_a_checkpoint_takes_no_room_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(tmp_path, {"a": torch.ones(1)}, {"step": 1})

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise FULL

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(tmp_path, {"a": torch.ones(1)}, {"step": 2})
    assert os.listdir(tmp_path) == ["step-00000001"], "the one before is there, and nothing else"

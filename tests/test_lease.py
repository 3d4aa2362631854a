"""Two drivers never run one sweep."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from neo_ray.lease import Held, LeaseLost, _InObjects, lease
from neo_ray.settings import ConfigError
from neo_ray.storage import Remote


def test_a_living_driver_is_refused_and_the_end_frees_it(tmp_path: Path) -> None:
    with lease(tmp_path), pytest.raises(ConfigError, match="another driver"), lease(tmp_path):
        pass
    with lease(tmp_path):
        assert (tmp_path / "lease.json").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_dead_process_of_this_host_is_taken_over_at_once(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    held = {"nonce": "x", "host": socket.gethostname(), "pid": dead.pid, "born": time.time(), "beat": time.time()}
    (tmp_path / "lease.json").write_text(json.dumps(held))
    with lease(tmp_path):
        assert json.loads((tmp_path / "lease.json").read_text())["nonce"] != "x"


def elsewhere(path: Path, beat: float) -> None:
    path.write_text(json.dumps({"nonce": "x", "host": "elsewhere", "pid": 1, "born": 0, "beat": beat}))


def test_another_host_is_taken_over_when_no_beat_comes_whatever_its_clock_says(tmp_path: Path) -> None:
    elsewhere(tmp_path / "lease.json", beat=time.time() + 3600)
    with lease(tmp_path, silence_seconds=0.5):
        assert json.loads((tmp_path / "lease.json").read_text())["nonce"] != "x"


def test_another_host_that_beats_is_refused_whatever_its_clock_says(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    elsewhere(path, beat=time.time() - 3600)
    beating = threading.Timer(0.3, elsewhere, (path, time.time() - 3590))
    beating.start()
    with pytest.raises(ConfigError, match="process 1 on elsewhere"), lease(tmp_path, silence_seconds=5):
        pass
    beating.join()


def test_a_driver_that_lost_its_lease_is_interrupted_and_one_that_cannot_read_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neo_ray.lease.HEARTBEAT_SECONDS", 0.05)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as the sweep door does: a background job ignores it
    path = tmp_path / "lease.json"
    with lease(tmp_path):
        content = path.read_text()
        path.write_text("torn")
        time.sleep(0.3)
        assert path.read_text() != "torn", "the beat goes on"
        assert json.loads(path.read_text())["nonce"] == json.loads(content)["nonce"]
    with pytest.raises(LeaseLost, match="another driver took"), lease(tmp_path):
        elsewhere(path, beat=time.time())
        time.sleep(5)
    assert json.loads(path.read_text())["host"] == "elsewhere", "the other's lease stays"


def test_a_lease_that_another_thread_loses_interrupts_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot's thread fills damaged shards again: the main thread would take an interrupt for Ctrl-C."""
    monkeypatch.setattr("neo_ray.lease.HEARTBEAT_SECONDS", 0.05)
    found: list[BaseException] = []

    def hold() -> None:
        try:
            with lease(tmp_path) as lost:
                elsewhere(tmp_path / "lease.json", beat=time.time())
                assert lost.wait(20)
        except LeaseLost as error:
            found.append(error)

    holder = threading.Thread(target=hold)
    holder.start()
    deadline = time.monotonic() + 30
    while holder.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)  # where a KeyboardInterrupt would arrive
    assert len(found) == 1 and "another driver took" in str(found[0])


def test_a_lease_in_an_object_store_is_held_taken_over_when_abandoned_and_lost_to_another(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neo_ray.lease.HEARTBEAT_SECONDS", 0.1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    place = Remote(f"{bucket}/results")
    with lease(place):
        with pytest.raises(Held, match="another driver"), lease(place):
            pass
        begun = json.loads((place / "lease-000001.json").read_text())["beat"]
        time.sleep(0.5)
        assert json.loads((place / "lease-000001.json").read_text())["beat"] > begun
    assert place.names() == []
    abandoned = {"nonce": "x", "host": "elsewhere", "pid": 1, "born": 0, "beat": 0}
    (place / "lease-000003.json").write_text(json.dumps(abandoned))
    with lease(place, silence_seconds=0.3):
        assert place.names() == ["lease-000004.json"]
    (place / "lease-000003.json").write_text(json.dumps(abandoned))
    with pytest.raises(LeaseLost), lease(place, silence_seconds=0.3):
        (place / "lease-000005.json").write_text(json.dumps({**abandoned, "nonce": "y"}))
        time.sleep(5)
    assert "lease-000005.json" in place.names(), "the other's lease stays"


def test_of_two_that_take_an_abandoned_lease_over_one_holds_it() -> None:
    place = Remote("memory://two-leases")
    (place / "lease-000001.json").write_text(json.dumps({"nonce": "x"}))
    one, other = _InObjects(place), _InObjects(place)
    for taker in (one, other):
        taker.set_aside({"nonce": "x"})
    assert [one.create("a"), other.create("b")] == [True, False]
    assert place.names() == ["lease-000002.json"]
    place.remove()

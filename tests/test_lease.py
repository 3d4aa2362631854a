"""Two drivers never run one sweep."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neo_ray.lease import lease
from neo_ray.settings import ConfigError


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


def test_another_host_is_taken_over_after_its_silence_alone(tmp_path: Path) -> None:
    held = {"nonce": "x", "host": "elsewhere", "pid": 1, "born": 0, "beat": time.time() - 30}
    (tmp_path / "lease.json").write_text(json.dumps(held))
    with pytest.raises(ConfigError, match="elsewhere"), lease(tmp_path, silence_seconds=60):
        pass
    with lease(tmp_path, silence_seconds=20):
        pass

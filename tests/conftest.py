"""What do all tests share? A quiet, offline, single-threaded CPU environment and one tiny world."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports torch, tokenizers or deepspeed: they read these once.
os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    DS_ACCELERATOR="cpu",
)

import pytest
from buckets import bucket, s3_server, scratch  # noqa: F401  (fixtures)
from sites import cluster, site  # noqa: F401
from tiny import World, make_world

UNTIL = float(os.environ.get("NEO_RAY_TESTS_UNTIL", "inf"))
"""Unix time after which no slow test begins: .ci/run has a limit, on slow machines too, and lists those it left out."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > UNTIL and any(item.get_closest_marker(mark) for mark in ("slow", "cluster")):
        pytest.skip("no time left")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an accelerator")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "cluster: starts a local Ray cluster")


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(Path(tmp_path_factory.mktemp("world")))


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For a Ray's sockets: their paths have at most 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="nr", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """A library that was imported earlier (a pytest plugin) may have sized the thread pool already."""
    import sys

    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)

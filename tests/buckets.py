"""Where do tests keep objects? In a bucket of an S3 that runs in this process (moto); nothing of it is left behind."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from neo_ray.storage import Remote, upload_folder
from neo_ray.uploads import ASKED, CONTRACT, ITEMS

NUMBERS = itertools.count()


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process keeps its copies of objects."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 on a free port."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://…` of a new bucket; this process and those that it starts reach it."""
    import fsspec

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # one of another server
    name = f"bucket-{next(NUMBERS)}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


def put_sweep(folder: Path, url: str) -> Remote:
    """A results folder as a sweep with `storage.path` there would have left it: events, what it is, items of suites, adapters."""
    place = Remote(url)
    for number, line in enumerate((folder / "journal.jsonl").read_text().splitlines()):
        (place / "journal" / f"{number:06d}.json").write_text(line)
    for name in CONTRACT:
        if (folder / name).exists():
            (place / name).upload(folder / name)
    for items in (*folder.glob(f"trials/*/{ITEMS}"), *folder.glob(f"{ASKED}/*/*/*/{ITEMS}")):
        (place / str(items.relative_to(folder))).upload(items)
    for adapter in folder.glob("trials/*/adapter"):
        upload_folder(adapter, place / str(adapter.relative_to(folder)))
    return place

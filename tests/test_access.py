"""Are models asked for where they will be read?

Reference: a server of our own that answers as the hub does. A gated model is refused without the token and given with it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from neo_ray import access
from neo_ray.access import Wanted
from neo_ray.config import ResourcesConfig
from neo_ray.parts import ModelSource
from neo_ray.settings import ConfigError

TOKEN = "hf_" + "NotForAnyLog" * 3
OPEN, GATED, UNKNOWN = (Wanted("teacher.model", f"org/{name}") for name in ("open", "gated", "unknown"))


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        name = self.path.split("/resolve/")[0].strip("/")
        known = name.endswith(("/open", "/gated"))
        allowed = name.endswith("/open") or self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.send_response(200 if known and allowed else 401)
        if not known:
            self.send_header("X-Error-Code", "RepoNotFound")
        elif not allowed:
            self.send_header("X-Error-Code", "GatedRepo")
        for header, value in {"X-Repo-Commit": "0" * 40, "ETag": '"1"', "Content-Length": "2"}.items():
            self.send_header(header, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture
def online(hub: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This process reaches the hub of the test, and has no token and no cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def test_folders_are_not_asked_for(tmp_path: Path) -> None:
    hub_model = ModelSource("org/gated", "v2")
    assert access.wanted(teacher=ModelSource(str(tmp_path)), student=None) == []
    assert access.wanted(teacher=hub_model, student=ModelSource(str(tmp_path))) == [Wanted("teacher.model", "org/gated", "v2")]


def test_a_gated_model_is_refused_without_the_token_and_given_with_it(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    why, token = access.may_read([OPEN, GATED]) or ("", "")
    assert why.startswith("teacher.model: org/gated is gated: accept its licence") and token == "which has no hub token"
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert (access.may_read([GATED]) or ("", ""))[1] == "which has a hub token"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert access.may_read([GATED]) is None


def test_a_model_that_is_not_there_and_a_hub_that_is_not_there(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert "is neither a local folder nor a model on the hub" in (access.may_read([UNKNOWN]) or "")[0]
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    assert "the hub does not answer" in (access.may_read([OPEN]) or "")[0]


def test_weights_in_the_cache_need_no_leave_but_a_config_alone_does(online: None, tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "models--org--gated" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert access.may_read([GATED]) is not None, "the driver brings config and tokenizer alone"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    (folder / "1.safetensors").touch()
    assert access.may_read([GATED]) is not None
    (folder / "2.safetensors").touch()
    assert access.may_read([GATED]) is None


@pytest.mark.cluster
def test_every_node_that_takes_workers_is_asked(hub: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    environment = {"RAY_AUTH_MODE": "disabled", "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_another"}
    for name, value in {**environment, "HOME": str(short_folder)}.items():
        monkeypatch.setenv(name, value)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=str(short_folder))
    try:
        said: list[str] = []
        access.check([OPEN], ResourcesConfig(), said.append)
        assert said == ["may the workers read org/open?"]
        refusal = r"^teacher.model: org/gated is gated: .* node [\d.]+, which has a hub token; README"
        with pytest.raises(ConfigError, match=refusal):
            access.check([GATED], ResourcesConfig(), said.append)
    finally:
        ray.shutdown()

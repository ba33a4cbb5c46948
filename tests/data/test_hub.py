"""A hub that does not answer, and messages for the errors of one that does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pytest
from huggingface_hub import constants
from transformers import AutoConfig

from simpo.config.data import DataConfig, SourceConfig
from simpo.config.errors import ConfigError, DataError
from simpo.data import hub
from simpo.data.mixture import load_mixture
from simpo.model.pretrained import load_pretrained


@contextmanager
def answering(status: int, code: str) -> Iterator[str]:
    """A hub on this machine that refuses everything."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def at(address: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The libraries may ask the hub; nothing answers at its address."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    at("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    hub.go_offline_if_unreachable.cache_clear()
    yield monkeypatch
    hub.go_offline_if_unreachable.cache_clear()


def test_no_network(online: pytest.MonkeyPatch) -> None:
    """One line each, and nobody waits for a second answer."""
    absent = "does not answer or HF_HUB_OFFLINE is set (check the network, or name a local folder)"
    with pytest.raises(ConfigError) as error:
        load_pretrained("model.path", "some/model", AutoConfig)
    assert str(error.value) == (
        f"model.path: some/model cannot be loaded: it is not in the cache, and http://127.0.0.1:9 "
        f"{absent}"
    )
    with pytest.raises(DataError) as data_error:
        load_mixture(DataConfig(name="x", sources=[SourceConfig(path="some/data")]))
    assert str(data_error.value) == (
        f"some/data train: cannot be read: it is not in the cache, and http://127.0.0.1:9 {absent}"
    )


@pytest.mark.parametrize(
    ("status", "code", "fault"),
    [
        (
            403,
            "GatedRepo",
            "it is gated (ask for access on {page}, then `hf auth login` or set HF_TOKEN)",
        ),
        (
            404,
            "RepoNotFound",
            "{page} is not there, or private (`hf auth login` or set HF_TOKEN)",
        ),
    ],
)
def test_refused_by_the_hub(
    status: int,
    code: str,
    fault: str,
    online: pytest.MonkeyPatch,
) -> None:
    with answering(status, code) as address:
        at(address, online)
        with pytest.raises(ConfigError) as error:
            load_pretrained("model.path", "some/model", AutoConfig)
    fault = fault.format(page=f"{address}/some/model")
    assert str(error.value) == f"model.path: some/model cannot be loaded: {fault}"


@pytest.mark.matrix
def test_nothing_else_is_printed() -> None:
    """No line of the libraries about their requests, and none of it again by Hydra's handler."""
    with answering(403, "GatedRepo") as address:
        done = subprocess.run(
            [sys.executable, "-m", "simpo.train", "model.path=some/model"],
            env=os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2
    assert done.stdout == "smollm2-demo-sigmoid: loading torch and transformers ...\n"
    assert done.stderr.startswith("model.path: some/model cannot be loaded: it is gated (")
    assert len(done.stderr.splitlines()) == 1

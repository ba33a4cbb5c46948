"""Serves the page of some folders on this machine alone, and keeps it up to date.

It answers GET and HEAD of two paths: / is the page, /content what its script asks for again and
again. It reads run folders as `simpo report` does, and gives out no file.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from simpo.config.errors import ConfigError
from simpo.config.launchers import SlurmConfig
from simpo.report.compare import comparison
from simpo.report.page import content, page, title, waiting
from simpo.run.runs import DamagedRun, Known, Run, find_runs, read_runs

PORTS = 20
"""How many ports are tried if none is asked for."""
FRESH_S, SLURM_S = 1.0, 30.0
"""How long an answer holds before the folders are looked at again; with jobs of Slurm, which is
asked each time."""
HOSTS = ("127.0.0.1", "localhost")
"""Names by which a browser may ask. Others are those of a web page that tries to read this one
through a name of its own."""


class Shown(NamedTuple):
    """What the page shows: its title, its sections as HTML, and a hash of them."""

    title: str
    content: str
    version: str


class Source:
    """Makes the content of the page, anew when a run's files or its progress have changed."""

    def __init__(self, folders: Sequence[Path], metric: str | None = None) -> None:
        self._folders, self._metric = folders, metric
        self._known: Known = {}
        self._read: list[Run | DamagedRun] | None = None
        self._shown = Shown("", "", "")
        self._lock = threading.Lock()
        self._until = 0.0

    def look(self) -> Shown:
        """What there is to show; the folders are looked at unless that was done a moment ago."""
        with self._lock:
            if time.monotonic() >= self._until:
                runs, damaged = read_runs(find_runs(self._folders), self._known)
                read: list[Run | DamagedRun] = [*runs, *damaged]
                # Runs that have not changed are the same objects.
                if self._read is None or list(map(id, read)) != list(map(id, self._read)):
                    self._shown = self._render(runs, damaged)
                    self._read = read
                asks_slurm = any(isinstance(run.config.launcher, SlurmConfig) for run in runs)
                self._until = time.monotonic() + (SLURM_S if asks_slurm else FRESH_S)
            return self._shown

    def _render(self, runs: Sequence[Run], damaged: Sequence[DamagedRun]) -> Shown:
        try:
            if not runs and not damaged:
                raise ConfigError(["no folder below it has a run.yaml"])
            report = comparison(runs, damaged, self._metric, self._folders)
            name, inside = title(report), content(report)
        except ConfigError as error:
            name, inside = "no run yet", waiting(self._folders, str(error))
        return Shown(
            name, inside, hashlib.sha256(inside.encode(errors="backslashreplace")).hexdigest()[:16]
        )


class Server(ThreadingHTTPServer):
    """The server, bound to the loopback address.

    Raises:
        OSError: the port is in use.
    """

    daemon_threads = True

    def __init__(self, source: Source, port: int) -> None:
        self.source = source
        super().__init__(("127.0.0.1", port), _Request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A browser may go away in the middle of an answer.
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Request(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "simpo", ""
    timeout = 60

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in HOSTS:
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, "ask for localhost\n")
            return
        if self.path not in ("/", "/content"):
            self._answer(HTTPStatus.NOT_FOUND, "there is / alone\n")
            return
        try:
            shown = self.server.source.look()
        except OSError as error:  # a file went away while it was read
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error.strerror}\n")
            return
        if self.path == "/":
            self._answer(HTTPStatus.OK, page(shown.content, shown.title, live=True), "html")
        elif self.headers.get("If-None-Match") == f'"{shown.version}"':
            self._answer(HTTPStatus.NOT_MODIFIED)
        else:
            self._answer(HTTPStatus.OK, shown.content, "html", shown.version)

    do_HEAD = do_GET

    def _answer(
        self, status: HTTPStatus, text: str = "", kind: str = "plain", version: str = ""
    ) -> None:
        body = text.encode(errors="backslashreplace")
        self.send_response(status)
        self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        if version:
            self.send_header("ETag", f'"{version}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Print nothing about requests."""


def start(source: Source, port: int, others: bool = False) -> Server:
    """Bind a server to a port, or with `others` to the first free one from it on.

    Raises:
        ConfigError: no such port can be taken.
    """
    last = port + PORTS - 1 if others else port
    for number in range(port, last + 1):
        try:
            return Server(source, number)
        except OSError as error:
            reason = error.strerror
    tried = f"{port} to {last}" if others else str(port)
    remedy = (
        f"choose another, such as port={last + 1}" if others else "leave port= out for a free one"
    )
    raise ConfigError([f"port: {tried}: {reason} ({remedy})"])

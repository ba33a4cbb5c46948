"""A hub of models on this machine: takes uploads, and serves what was uploaded."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789" * 4


@dataclass
class SmallHub:
    """What the hub holds.

    Attributes:
        address: what HF_ENDPOINT must be.
        files: content of each file of each repository, by `owner/name` and path.
        private: whether each repository was created as a private one.
    """

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)

    def posted(self, path: str, body: bytes) -> dict[str, Any] | None:
        """The answer to a request that writes; None if there is no such address."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            visibility = asked.get("visibility")
            self.private[repo] = asked.get("private", visibility == "private")
            self.files.setdefault(repo, {})
            return {"url": f"{self.address}/{repo}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        _, _, _, owner, name, action, *_ = [*path.split("/"), *[""] * 6]
        if action == "preupload":
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            files = json.loads(body)["files"]
            return {"files": [{"path": file["path"], **regular} for file in files]}
        if action == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[f"{owner}/{name}"][line["value"]["path"]] = content
            url = f"{self.address}/{owner}/{name}/commit/{COMMIT}"
            return {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""}
        return None

    def got(self, path: str) -> bytes | None:
        """The answer to a request that reads; None if there is no such file."""
        if path == "/":
            return b"a small hub"
        if path == "/api/whoami-v2":
            return json.dumps({"name": "me", "auth": {"accessToken": {"role": "write"}}}).encode()
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            files = self.files.get(f"{owner}/{name}")
            if files is None:
                return None
            if rest[:1] == ["tree"]:
                sizes = {file: len(content) for file, content in files.items()}
                tree = [{"type": "file", "path": k, "size": v, "oid": k} for k, v in sizes.items()]
                return json.dumps(tree).encode()
            siblings = [{"rfilename": file} for file in files]
            about = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
            return json.dumps(about).encode()
        repo, _, file = path.lstrip("/").partition("/resolve/")
        return self.files.get(repo, {}).get(file.partition("/")[2])


@contextmanager
def small_hub() -> Iterator[SmallHub]:
    """Serve an empty hub on a free port."""
    hub = SmallHub()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(hub.got(self.path.partition("?")[0]))

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            answer = hub.posted(self.path.partition("?")[0], body)
            self._answer(None if answer is None else json.dumps(answer).encode())

        def _answer(self, content: bytes | None) -> None:
            self.send_response(404 if content is None else 200)
            if content is None:
                content = b""
                known = any(self.path.startswith(f"/{repo}/") for repo in hub.files)
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()

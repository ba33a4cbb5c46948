"""The page served while runs go on: what it answers, what it refuses, and how it follows them."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from simpo.config.errors import ConfigError
from simpo.report import serve
from simpo.report.serve import Server, Source, start
from simpo.run.runs import find_runs, read_runs
from tests.support.browser import Tab
from tests.support.made_runs import make
from tests.support.whole_runs import run_command


@contextmanager
def serving(*folders: Path, metric: str | None = None) -> Iterator[Server]:
    server = start(Source(folders, metric), 0)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(
    server: Server, path: str = "/content", method: str = "GET", **headers: str
) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=named)
    answer = connection.getresponse()
    told = answer.status, answer.read().decode(), answer.headers
    connection.close()
    return told


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question looks at the folders."""
    monkeypatch.setattr(serve, "FRESH_S", 0.0)


def test_what_is_answered_and_what_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "one")
    (tmp_path / "secret.txt").write_text("a secret")
    with serving(tmp_path) as server:
        assert server.server_address[0] == "127.0.0.1"
        status, page, headers = ask(server, "/")
        assert status == 200 and page.startswith("<!doctype html>") and 'id="live"' in page
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        status, content, headers = ask(server)
        assert status == 200 and content.lstrip().startswith('<section id="top">')
        version = headers["ETag"]
        assert ask(server, If_None_Match=version)[:2] == (304, "")
        status, body, headers = ask(server, "/", "HEAD")
        assert (status, body, int(headers["Content-Length"])) == (200, "", len(page.encode()))
        for path in ("/secret.txt", "/../secret.txt", "/one/run.yaml", "/content/", "/?x"):
            assert ask(server, path)[:2] == (404, "there is / alone\n"), path
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
            assert ask(server, "/", method)[0] == 501
        # A web page that has its own name point at this machine.
        for host in ("evil.example", "evil.example:8642", "127.0.0.1.evil.example", "[::1]:1"):
            assert ask(server, "/", Host=host)[:2] == (421, "ask for localhost\n"), host
        # The other end of ssh -L may have another port.
        for host in ("localhost:9000", "localhost", "127.0.0.1:9000"):
            assert ask(server, Host=host)[0] == 200, host


def test_runs_come_go_on_and_vanish(tmp_path: Path, at_once: None) -> None:
    def names(content: str) -> list[str]:
        return re.findall(r'class="name" data-sort="([^"]*)"', content)

    with serving(tmp_path) as server:
        status, content, _ = ask(server)
        assert status == 200 and "<h1>No run to show yet</h1>" in content
        assert "no folder below it has a run.yaml" in content and f"<code>{tmp_path}<" in content
        make(tmp_path / "a")
        going = make(tmp_path / "b", beta=3, state="running")
        assert names(ask(server)[1]) == ["a", "b"]
        with (going / "metrics.jsonl").open("a") as file:
            file.write('{"step": 39, "eval/rewards/accuracies": 0.99}\n{"step": 40, "eval/lo')
        content = ask(server)[1]
        assert names(content) == ["b", "a"]
        assert '<td class="number" data-sort="0.99">0.9900</td>' in content
        assert ", step 39 of 40" in content
        for broken in ("{broken", '{"step": 1e400}'):
            (going / "metrics.jsonl").write_text(f"{broken}\n")
            assert "its last line is not a line of metrics" in ask(server)[1]
        shutil.rmtree(going)
        assert names(ask(server)[1]) == ["a"]
        shutil.rmtree(tmp_path / "a")
        assert "<h1>No run to show yet</h1>" in ask(server)[1]


def test_a_metric_that_no_run_has_yet(tmp_path: Path, at_once: None) -> None:
    make(tmp_path / "a", held_out=False)
    with serving(tmp_path, metric="loss") as server:
        assert "metric: no such held-out metric, got loss (none yet)" in ask(server)[1]
        make(tmp_path / "b")
        assert "Compared by held-out <code>loss</code> (min)" in ask(server)[1]


def test_only_what_has_changed_is_read_again(tmp_path: Path) -> None:
    for name in "abc":
        make(tmp_path / name, state="running")
    known: serve.Known = {}
    paths = find_runs([tmp_path])
    first, _ = read_runs(paths, known)
    again, _ = read_runs(paths, known)
    assert all(one is other for one, other in zip(first, again, strict=True))
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "train/loss": 1.0}\n')
    (tmp_path / "c" / "samples" / "step-000020.json").write_text("[]")
    (tmp_path / "a" / "run.yaml").unlink()
    runs, damaged = read_runs(paths, known)
    assert [run.folder.name for run in runs] == ["b", "c"] and not runs[1].replies[1]
    assert [run.folder.name for run in damaged] == ["a"]
    assert runs[0].lines[-1] == {"step": 30, "train/loss": 1.0}
    read_runs(paths[1:], known)
    assert list(known) == paths[1:]


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as error:
            start(Source([tmp_path]), port)
        assert str(error.value) == (
            f"port: {port}: Address already in use (leave port= out for a free one)"
        )
        with start(Source([tmp_path]), port, others=True) as server:
            assert port < server.server_port < port + serve.PORTS


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["port=8642"], "port: is for --serve alone (add --serve)"),
        (["--serve", "port=0"], "port: must be a number from 1 to 65535, got 0"),
        (["--serve", "port=http"], "port: must be a number from 1 to 65535, got http"),
        (["--serve", "over=x"], "over: --serve shows the page alone (leave out over=)"),
        (["--serve", "html=x"], "html: --serve shows the page alone (leave out html=)"),
    ],
)
def test_words_that_do_not_go_together(words: list[str], line: str, tmp_path: Path) -> None:
    from simpo.launch.commands.report import main

    with pytest.raises(ConfigError) as error:
        main([str(tmp_path), *words])
    assert str(error.value) == line


@pytest.mark.process
def test_the_command_until_ctrl_c(tmp_path: Path) -> None:
    """It serves an empty folder too, writes nothing, and ends with exit code 0."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "simpo.report", str(tmp_path), "--serve", f"port={port}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout is not None
        line = one.stdout.readline()
        assert line == f"live   http://127.0.0.1:{port} (Ctrl-C ends it)\n"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        told = run_command("simpo.report", str(tmp_path), "--serve", f"port={port}")
        assert (told.returncode, told.stderr) == (
            2,
            f"port: {port}: Address already in use (leave port= out for a free one)\n",
        )
        one.send_signal(signal.SIGINT)
        assert one.communicate(timeout=60) == ("\nended\n", "")
    assert one.returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_a_browser_follows_the_runs(tmp_path: Path, at_once: None) -> None:
    """Without being asked; what its reader has chosen stays."""
    rows = "document.querySelectorAll('#runs tbody tr').length"
    names = "[...document.querySelectorAll('#runs tbody .name')].map(c => c.dataset.sort).join(' ')"
    with serving(tmp_path) as server, Tab(f"http://localhost:{server.server_port}/") as tab:
        assert tab.run("document.querySelector('h1').textContent") == "No run to show yet"
        for index, name in enumerate("ab"):
            make(tmp_path / name, beta=2.0 + index, prompts=8)
        tab.until(f"{rows} === 2")
        assert tab.run("document.title") == "simpo: a, b"
        assert tab.run("document.querySelectorAll('#curves .plot svg').length") > 0
        assert tab.run(names) == "b a"
        tab.run("document.getElementById('by-run').click()")
        tab.run("document.getElementById('by-run').focus()")
        tab.run("document.querySelectorAll('#replies summary').forEach(line => line.click())")
        tab.run("document.querySelectorAll('#runs .pick input')[1].click()")
        tab.run("scrollTo(0, 700)")
        going = make(tmp_path / "c", beta=9.0, state="running")
        tab.until(f"{rows} === 3")
        assert tab.run(names) == "a b c"
        assert tab.run("document.activeElement.id") == "by-run"
        assert tab.run("[...document.querySelectorAll('#replies details')].map(d => d.open)") == [
            *(False, True, False)
        ]
        assert tab.run("[...document.querySelectorAll('.legend li')].map(i => i.title)") == ["a"]
        assert tab.run("scrollY") == 700
        with (going / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 39, "train/loss": 9.5}) + '\n{"step": 40, "tra')
        top = "Math.max(...document.querySelector('#curves .plot')._fullData[0].y)"
        tab.until(f"{top} === 9.5")
        shutil.rmtree(tmp_path / "b")
        tab.until(f"{rows} === 2")
        assert tab.console == []
        server.shutdown()
        server.server_close()
        tab.until("document.getElementById('live').textContent.startsWith('not live')")

"""Starts processes in milliseconds by forking one that has imported everything.

Most of a tiny run's time is imports. `Forked` forks a parent process that has imported torch,
transformers and the rest once and has computed nothing. The child runs `python -m MODULE` with its
own environment, working directory and streams, and forks its ranks and the members of its sweep in
the same way. They are real processes with their own ids, signals and exit codes.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import gc
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

PR_SET_NAME = 15
M_MMAP_THRESHOLD = -3


class _Signalled:
    """A process that is sent signals as long as its `poll` says that it runs."""

    pid: int

    def poll(self) -> int | None:
        raise NotImplementedError

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forked(_Signalled):
    """What `subprocess.Popen` is to a started process: pid, poll, wait, communicate, signals."""

    def __init__(
        self, words: list[str], env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        self._link = _connect()
        env = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
        there = str(cwd or os.getcwd())
        request = json.dumps({"words": words, "env": dict(env), "cwd": there}).encode()
        fds = array.array("i", [out_write, err_write])
        self._link.sendmsg(
            [len(request).to_bytes(4, "big") + request],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)],
        )
        os.close(out_write)
        os.close(err_write)
        self._answers = self._link.makefile("r")
        self.pid = int(self._answers.readline())
        self.args = words
        self.returncode: int | None = None
        self._ended = threading.Event()
        self._texts = ["", ""]
        self._threads = [
            threading.Thread(target=self._read, args=(i, fd), daemon=True)
            for i, fd in enumerate((out_read, err_read))
        ]
        self._threads.append(threading.Thread(target=self._reap, daemon=True))
        for thread in self._threads:
            thread.start()

    def _read(self, index: int, fd: int) -> None:
        with open(fd, errors="replace") as stream:
            self._texts[index] = stream.read()

    def _reap(self) -> None:
        code, cpu_s = (self._answers.readline() or f"{-signal.SIGKILL} 0").split()
        _children_cpu_s.append(float(cpu_s))
        self.returncode = int(code)
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode if self._ended.is_set() else None

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        for thread in self._threads:
            thread.join(timeout)
        return self._texts[0], self._texts[1]


_lease: socket.socket | None = None
_children_cpu_s: list[float] = []


def cpu_s() -> float:
    """CPU seconds of what this process has had forked, as far as that has ended."""
    return sum(_children_cpu_s)


def _folder() -> Path:
    """Where the test processes of one session find their parent."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    return Path(tempfile.gettempdir()) / f"simpo-forks-{session}"


def _connect() -> socket.socket:
    """A link to the parent, which the first test process starts; it ends after the last of them."""
    global _lease
    folder = _folder()
    if _lease is None:
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "socket").exists():
                _start_parent(folder / "socket")
            _lease = _link_to(folder / "socket")
    return _link_to(folder / "socket")


def _start_parent(path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, __file__, str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    while not path.exists():
        assert process.poll() is None, "the parent of forked runs died"
        time.sleep(0.01)


def _link_to(path: Path) -> socket.socket:
    link = socket.socket(socket.AF_UNIX)
    link.connect(str(path))
    return link


# What follows runs in the parent and in what it forks.


class ForkedPopen(_Signalled):
    """`subprocess.Popen` for a process that this one forks: only what simpo asks of it."""

    def __init__(self, command, env=None, stdout=None, stderr=None, start_new_session=False, **_):  # type: ignore[no-untyped-def]
        self.args = command
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            if start_new_session:
                os.setsid()
            streams = [s.fileno() if hasattr(s, "fileno") else s for s in (stdout, stderr)]
            _become(command[1:], dict(env or os.environ), os.getcwd(), streams)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout if timeout is not None else 1e9)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode


def _become(
    words: list[str], env: dict[str, str], cwd: str, streams: Sequence[int | None]
) -> NoReturn:
    """Go on as `python WORDS`, where they are -m and a module of ours."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for target, stream in enumerate(streams, start=1):
            if stream is not None:
                os.dup2(stream, target)
        menus = os.environ["SIMPO_MENUS"]  # set where simpo is imported
        os.environ.clear()
        os.environ.update(env | {"SIMPO_MENUS": menus})
        sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
        os.chdir(cwd)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        name = f"rank-{env['RANK']}" if "RANK" in env else "run"
        library = ctypes.CDLL(None)
        library.prctl(PR_SET_NAME, name.encode())
        if size := env.get("MALLOC_MMAP_THRESHOLD_"):  # read where a program begins
            library.mallopt(M_MMAP_THRESHOLD, int(size))
        assert words[0] == "-m", words
        import simpo.run.parent

        names = vars(simpo.run.parent)
        assert "subprocess" in names, "processes are started elsewhere"
        names["subprocess"] = _ForkingSubprocess
        sys.argv = [words[1], *words[2:]]
        warnings.filterwarnings("ignore", message=".* found in sys.modules after import")
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _ForkingSubprocess:
    """The module `subprocess`, to `start_child`."""

    Popen = ForkedPopen


def _use_once() -> None:
    """Fill caches of libraries that each run would fill anew; no weight is computed with."""
    import numpy as np
    import torch
    from matplotlib.figure import Figure
    from transformers import LlamaConfig
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from simpo.config.compose import compose_run
    from simpo.data.packing import pack
    from simpo.data.pairs import TokenizedPair
    from simpo.model.memory import Estimate, Place

    run = compose_run(["model.lora.rank=0"])
    row = pack([TokenizedPair.of(*np.ones((3, 2), np.int32))], [0])
    settings = LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    Estimate(run, settings, Place(torch.device("cpu"))).step(row)
    get_checkpoint_conversion_mapping("llama")
    Figure().savefig(os.devnull, format="png")
    # Else the first whole collection in a child copies all pages of what was imported.
    gc.collect()
    gc.freeze()
    gc.enable()


def _serve(path: str) -> None:
    gc.disable()  # what is imported stays
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import deepspeed.utils.nvtx
    import matplotlib.backends.backend_agg  # noqa: F401
    import peft  # noqa: F401
    import torch.distributed.checkpoint  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    import simpo.backend.zero
    import simpo.launch.commands.preview
    import simpo.launch.commands.report
    import simpo.launch.commands.train
    import simpo.launch.member
    import simpo.launch.rank
    import simpo.launch.rounds.process
    import simpo.loop.publish
    import simpo.loop.train
    import simpo.model.merge
    import simpo.on_policy.annotate
    import simpo.on_policy.generate
    import simpo.previewing.stages  # noqa: F401

    # Marks for a profiler of NVIDIA's around each of a step's thousands of calls.
    deepspeed.utils.nvtx.enable_nvtx = False
    _use_once()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.part")
    listener.listen(64)
    os.rename(f"{path}.part", path)
    watched = selectors.DefaultSelector()
    watched.register(listener, selectors.EVENT_READ)
    children: dict[int, tuple[int, socket.socket]] = {}  # by what tells that one has ended
    while True:
        for key, _ in watched.select():
            if key.fileobj is listener:
                watched.register(listener.accept()[0], selectors.EVENT_READ)
                continue
            watched.unregister(key.fileobj)
            if key.fd in children:
                os.close(key.fd)
                _tell_the_end(*children.pop(key.fd))
                continue
            link: Any = key.fileobj
            request, fds = _receive(link)
            if request is None:
                link.close()
                if len(watched.get_map()) == len(children) + 1:  # no test process is left
                    shutil.rmtree(os.path.dirname(path))
                    return
                continue
            pid = os.fork()
            if pid == 0:
                for other in [link, *(link for _, link in children.values())]:
                    other.close()
                for registered in watched.get_map().values():
                    os.close(registered.fd)
                _become(request["words"], request["env"], request["cwd"], fds)
            for fd in fds:
                os.close(fd)
            link.sendall(f"{pid}\n".encode())
            ended = os.pidfd_open(pid)
            watched.register(ended, selectors.EVENT_READ)
            children[ended] = pid, link


def _receive(link: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """A request and its two streams; None where the other side has closed its link."""
    data, ancillary, _, _ = link.recvmsg(65536, socket.CMSG_SPACE(8))
    if not data:
        return None, []
    size = int.from_bytes(data[:4], "big")
    while len(data) < 4 + size:
        data += link.recv(65536)
    return json.loads(data[4:]), array.array("i", ancillary[0][2]).tolist()


def _tell_the_end(pid: int, link: socket.socket) -> None:
    _, status, used = os.wait4(pid, 0)
    answer = f"{os.waitstatus_to_exitcode(status)} {used.ru_utime + used.ru_stime}\n"
    with link, contextlib.suppress(BrokenPipeError):  # its test process was killed
        link.sendall(answer.encode())


if __name__ == "__main__":
    _serve(sys.argv[1])

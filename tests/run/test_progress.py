"""What a run prints while it goes on: on terminals of several widths, and without one."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from simpo.__main__ import main
from simpo.launch.commands import train
from simpo.loop.console import libraries_quiet, metrics_text
from simpo.run import progress
from tests.support.made_runs import make
from tests.support.whole_runs import start

METRICS = {
    "loss": 0.9612,
    "rewards/accuracies": 0.75,
    "rewards/margins": 1.814,
    "logps/chosen": -0.65,
}


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Terminal:
    """What stands on a terminal that stderr writes to."""

    def __init__(self, fd: int) -> None:
        self._fd, self.written = fd, ""

    def read(self) -> str:
        """Everything written so far."""
        os.set_blocking(self._fd, False)
        try:
            while chunk := os.read(self._fd, 65536):
                self.written += chunk.decode()
        except (BlockingIOError, OSError):
            pass
        return self.written

    def screen(self) -> list[str]:
        """The lines as one sees them, without spaces at their ends."""
        lines = [""]
        column = 0
        for letter in self.read():
            if letter == "\r":
                column = 0
            elif letter == "\n":
                lines.append("")
            else:
                lines[-1] = f"{lines[-1]:{column}}"
                lines[-1] = lines[-1][:column] + letter + lines[-1][column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]


@contextmanager
def terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal to which stdout and stderr go."""
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w", encoding="utf-8", closefd=False) as stream, monkeypatch.context() as m:
        m.setattr(sys, "stderr", stream)
        m.setattr(sys, "stdout", stream)
        yield Terminal(ours)
    os.close(theirs)
    os.close(ours)


def test_metrics_in_words() -> None:
    assert metrics_text(METRICS) == "loss 0.961, accuracy 0.75, margin +1.81"
    assert metrics_text({"loss": 2.0, "logps/chosen": -0.5}) == "loss 2.000"
    singles = {"loss": 0.5, "rewards/chosen": 0.1, "rewards/rejected": -0.234}
    assert metrics_text(singles) == "loss 0.500, desirable +0.10, undesirable -0.23"
    assert metrics_text(METRICS | singles) == "loss 0.500, accuracy 0.75, margin +1.81"
    assert metrics_text({"rule_pass_rate": 0.5}) == "50% of the replies obey"
    assert metrics_text({}) == ""


def test_time_left_and_pace(clock: Clock) -> None:
    """An evaluation of 50 s is in the time that is left, but not in that of a step."""
    with progress.bar("train", 110, "step", stays=True) as bar:
        clock.now += 1e4  # evaluated before the first step
        bar.begin_at(10)
        assert bar.line() == "train 10/110"
        for _ in range(25):
            clock.now += 1.5
            bar.advance(text="loss 1.000", took_s=1.5)
        assert bar.line() == "train 35/110, loss 1.000, 1:52 left, 1.50 s/step"  # 75 * 1.5 = 112.5
        clock.now += 50.0
        clock.now += 1.5
        bar.advance(took_s=1.5)
        # 26 steps in 26 * 1.5 + 50 = 89 s, so 74 more in 253.3 s.
        assert bar.line() == "train 36/110, loss 1.000, 4:13 left, 1.50 s/step"
        for _ in range(20):
            clock.now += 100.0
            bar.advance(took_s=100.0)
        # The mean of the last 20 steps. 46 steps in 2089 s, so 54 more in 2452.3 s.
        assert bar.line() == "train 56/110, loss 1.000, 40:52 left, 100.00 s/step"
        clock.now += 7200.0
        bar.advance(54, "")
        assert bar.line() == "train 110/110, took 2:34:49, 100.00 s/step"
        bar.advance(0, "loss 1.000")
        assert bar.line() == "train 110/110, loss 1.000, took 2:34:49, 100.00 s/step"


def test_lines_without_a_terminal(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """One each 10 s, later one a minute, each whole; and one at the end."""
    with progress.bar("train", 3600, "step", stays=True) as bar:
        bar.begin_at(0)
        for _ in range(3600):
            clock.now += 1.0
            bar.advance(text="loss 1.000", took_s=1.0)
    captured = capsys.readouterr()
    assert captured.out == "" and "\r" not in captured.err
    lines = captured.err.splitlines()
    assert lines[0] == "train 10/3600, loss 1.000, 59:50 left, 1.00 s/step"
    assert lines[-1] == "train 3600/3600, loss 1.000, took 1:00:00, 1.00 s/step"
    at = [int(line.split("/")[0].split()[1]) for line in lines]
    assert at[:10] == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    gaps = [later - earlier for earlier, later in pairwise(at[:-1])]
    assert gaps == sorted(gaps) and set(gaps[-10:]) == {60}
    assert len(lines) < 100


def test_batches_whose_items_are_counted_one_by_one(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not after the first item of a batch, which has taken as long as the whole batch."""
    show = progress.Bar._print
    shown = threading.Event()

    def noted(bar: progress.Bar) -> None:
        show(bar)
        shown.set()

    monkeypatch.setattr(progress.Bar, "_print", noted)
    with progress.bar("verdicts", 96, stays=True, in_batches=True) as bar:
        bar.begin_at(0)
        clock.now += 60
        for _ in range(32):
            bar.advance()
        assert shown.wait(60)
        bar.advance(64)
    assert capsys.readouterr().err == "verdicts 32/96, 2:00 left\nverdicts 96/96, took 1:00\n"


def test_short_work_leaves_no_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("held-out pairs", 16) as bar:
        clock.now += 9.0
        bar.advance(16)
    assert capsys.readouterr().err == ""
    with progress.bar("held-out pairs", 16) as bar:
        clock.now += 11.0
        bar.advance(8)
        clock.now += 5.0
        bar.advance(6)  # other processes have the rest
    assert capsys.readouterr().err == (
        "held-out pairs 8/16, 0:11 left\nheld-out pairs 16/16, took 0:16\n"
    )
    with progress.bar("held-out replies", 16) as bar:
        clock.now += 11.0
        bar.advance(16)
    assert capsys.readouterr().err == "held-out replies 16/16, took 0:11\n"


def test_other_ranks_print_nothing(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    progress.say("reading ...")
    with progress.bar("train", 2, "step", stays=True) as bar:
        bar.begin_at(0)
        clock.now += 100.0
        bar.advance(took_s=1.0)
    assert capsys.readouterr() == ("", "")
    with terminal(80, monkeypatch) as seen, progress.bar("train", 2, stays=True) as bar:
        bar.begin_at(1)
        assert not progress.on_terminal() and seen.read() == ""


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (60, "train 160/360, loss 0.961, accuracy 0.75, margin +1.81"),
        (80, "train 160/360, loss 0.961, accuracy 0.75, margin +1.81, 5:10 left, 1.55 s/step"),
        (
            120,
            "train 160/360, loss 0.961, accuracy 0.75, margin +1.81, 5:10 left, 1.55 s/step ",
        ),
    ],
)
def test_the_bar_on_a_terminal(
    columns: int, shown: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is of interest comes first; a bar takes what room is left."""
    with terminal(columns, monkeypatch) as seen:
        with progress.bar("train", 360, "step", stays=True) as bar:
            bar.begin_at(158)
            for _ in range(2):
                clock.now += 1.55
                bar.advance(text=metrics_text(METRICS), took_s=1.55)
            (line,) = seen.screen()
            assert line.startswith(shown) and len(line) <= columns
            assert ("\u2588" in line) == (columns == 120)
            if columns == 120:
                filled = line[len(shown) :].count("\u2588")
                # Columns of the bar: the last one of the terminal is left free.
                assert filled == int(160 / 360 * (columns - 1 - len(shown)))
            else:
                assert line == shown
            progress.say("note   above")
        assert seen.screen() == ["note   above", line, ""]


def test_an_error_stands_on_a_line_of_its_own(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(80, monkeypatch) as seen:
        with pytest.raises(ValueError), progress.bar("train", 4, "step", stays=True) as bar:
            bar.begin_at(0)
            clock.now += 2.0
            bar.advance(took_s=2.0)
            raise ValueError
        print("the loss is not finite", file=sys.stderr, flush=True)
        first, second, rest = seen.screen()
    assert first.startswith("train 1/4, 0:06 left, 2.00 s/step ")
    assert (second, rest) == ("the loss is not finite", "")


def test_only_slow_work_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes by itself, though nothing has been counted yet, and vanishes."""
    with terminal(80, monkeypatch) as seen:
        with progress.bar("tokenising pairs", 3) as bar:
            bar.advance(3)
        assert seen.read() == ""
        monkeypatch.setattr(progress, "DELAY_S", 0.01)
        with progress.bar("held-out replies", 3):
            until = time.monotonic() + 20
            while "held-out replies 0/3" not in seen.read():
                assert time.monotonic() < until
                time.sleep(0.01)
        progress.say("held out")
        assert seen.screen() == ["held out", ""]


def test_a_terminal_without_carriage_returns(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(80, monkeypatch) as seen:
        monkeypatch.setenv("TERM", "dumb")
        with progress.bar("train", 2, "step", stays=True) as bar:
            bar.begin_at(0)
            clock.now += 20.0
            bar.advance(2, took_s=20.0)
        # The terminal itself begins each line with a return.
        assert seen.read().replace("\r\n", "\n") == "train 2/2, took 0:20, 10.00 s/step\n"


def test_a_terminal_without_a_width(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of containers, `script` and expect: a bar there would be empty."""
    with terminal(0, monkeypatch) as seen:
        with progress.bar("train", 2, "step", stays=True) as bar:
            bar.begin_at(0)
            clock.now += 20.0
            bar.advance(2, took_s=20.0)
        assert seen.read().replace("\r\n", "\n") == "train 2/2, took 0:20, 10.00 s/step\n"


def test_letters_that_the_locale_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands print them as escapes."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    main(["report", str(make(tmp_path / "r\u00e9sum\u00e9 \u540d", held_out=False)), "html=none"])
    *_, line = written.getvalue().splitlines()
    assert line == b"| r\xe9sum\xe9 \\u540d | finished, step 40 of 40 |"


def test_output_that_nobody_reads(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`simpo train | head` ends as other programs do there."""
    monkeypatch.setattr(train, "hide_unused", lambda run: None)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as ended:
            main(["train", *tiny_run])
    assert (ended.value.code, capsys.readouterr().err) == (141, "")


def test_deepspeed_gives_no_advice(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a model is saved without a GPU, it warns."""
    logger = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(logger, "propagate", False)  # as DeepSpeed sets it
    logger.addHandler(caplog.handler)
    try:
        for level in (logging.WARNING, logging.ERROR):
            with libraries_quiet():
                logger.log(level, "Setting accelerator to CPU.")
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        logger.warning("again")
        assert len(caplog.records) == 2
    finally:
        logger.removeHandler(caplog.handler)


def test_downloads_are_seen_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    with terminal(80, monkeypatch), libraries_quiet():
        assert not are_progress_bars_disabled() and not logging.is_progress_bar_enabled()
    with libraries_quiet():
        assert are_progress_bars_disabled() and not logging.is_progress_bar_enabled()


def test_ctrl_c_in_the_middle_of_a_bar() -> None:
    """The message of a handler of signals, which cannot close the bar, is on its own line."""
    code = (
        "import os, signal, sys\n"
        "from simpo.run.signals import exit_on_signals\n"
        "exit_on_signals()\n"
        "sys.stderr.write('\\rtokenising pairs 3/16'); sys.stderr.flush()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-c", code], stderr=theirs)
    written = Terminal(ours).read()
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 130
    assert written == (
        "\rtokenising pairs 3/16\r\ninterrupted (the same command continues from the last "
        "checkpoint, or else from the start)\r\n"
    )


def test_what_a_run_prints_into_a_pipe(
    tiny_run: list[str], tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, but for the replies of an untrained model."""
    monkeypatch.delenv("COLUMNS", raising=False)
    words = [f"run_dir={tmp_path}/run", "train.eval_every=0", "train.check_memory=true"]
    process = start([*tiny_run, *words])
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0
    number = r"[+-]?\d+\.\d+"
    metrics = rf"loss {number}, accuracy {number}, margin {number}"
    (train,) = errors.splitlines()
    assert re.fullmatch(rf"train 6/6, {metrics}, took 0:\d\d, {number} s/step", train)
    assert "\r" not in output + errors
    model = tiny_run[0].removeprefix("model.path=")
    records = f"note   {tmp_path}/%s.jsonl %s: read as prompt and replies as messages, %d records"
    lines = [
        line for line in output.splitlines() if not line.startswith(("| ", "|-", "before", "after"))
    ]
    expected = [
        "smollm2-jsonl-sigmoid: loading torch and transformers ...",
        f"reading {tmp_path}/train.jsonl ...",
        f"loading the weights of {model} ...",
        "checking that packed rows give the same as separate sequences ...",
        f"model  {model}: 0.0M weights, 0.0M trained, fp32 on 1 CPU",
        "loss = -log sigmoid(2*(l_w - l_l) - 1),  l = mean token log-prob of a response",
        *("", ""),
        "tokens N in 24 train pairs, N with a prompt for each response: N times as many",
        "plan   6 steps of 4 pairs, 1.00 passes over the train pairs",
        "       N tokens a step, rows N% full, the largest N",
        "memory about N GiB (weights N, gradients N, optimizer N, activations N, logits N)",
        "note   only 6 steps, 1 of them at learning rate 0 (fewer train.pairs_per_step or more "
        "train.epochs make more)",
        records % ("train", "train", 24),
        records % ("test", "test", 16),
        f"run    {tmp_path}/run",
        "held out after step 0: loss N, accuracy N, margin N, 0% of the replies obey",
        "held out after step 6: loss N, accuracy N, margin N, 0% of the replies obey",
        "saving the model ...",
        *("", ""),
        "prompt  Saturn is a giant planet made mostly of gas. It has many moons and a pale ...  "
        'JSON object with the keys "name", "kind" and "feature" and no other text.',
        "rule    a JSON object with the keys name, kind, feature",
        "",
        "prompt  Use two bullets, one on each line, and no other text. / Violins appear in ... y "
        "have four strings and a curved body. / What should I know about violins?",
        "rule    2 bullet points",
        "",
        "prompt  Saturn orbits in the cold space beyond Jupiter. It takes about twenty-nin ... "
        "lour. / I want to learn about Saturn. Write everything in capital letters.",
        "rule    capital letters only",
        "",
        f"model  {tmp_path}/run/model",
        f"chat   python -m simpo.chat {tmp_path}/run base=true",
    ]
    assert len(lines) == len(expected)
    for line, wanted in zip(lines, expected, strict=True):
        # N stands for a number that depends on the tokenizer or the weights.
        pattern = r"[+-]?[\d,.]*\d".join(map(re.escape, re.split(r"\bN\b", wanted)))
        assert re.fullmatch(pattern, line), (line, wanted)

"""Runs the rounds of a run, phase by phase, each in a process of its own, and ends them.

What is done lies on the disk, so the same command goes on after any interruption: a finished phase
is not repeated, an unfinished one continues as its own command does.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from simpo.config.check import load_run, run_yaml
from simpo.config.choices import WatchAction
from simpo.config.errors import (
    INTERRUPTED,
    ConfigError,
    RunError,
    SimpoError,
    Stopped,
    unwritable,
)
from simpo.config.flat import holds_secret, trajectory
from simpo.config.schema import RunConfig
from simpo.launch.rounds.phases import replies_folder
from simpo.launch.rounds.record import (
    is_done,
    kept_round,
    measured,
    measured_line,
    measured_rounds,
    metric_lines,
    next_phases,
    nothing_to_learn,
    pairs_of,
    reason_to_end,
    rounds_table,
)
from simpo.launch.rounds.terminal import Terminal, log_file
from simpo.launch.share import share_of_machine
from simpo.loop.tracker import Tracker
from simpo.loop.watch import CollapseWatch
from simpo.run.atomic import write_text
from simpo.run.files import status_or_none
from simpo.run.folder import RunFolder, new_folder, unfinished_folders
from simpo.run.parent import start_child
from simpo.run.progress import say
from simpo.run.rounds import ENDED_FILE, Kind, Phase, ended_early, error_file, run_folder
from simpo.run.signals import (
    forwarding_signals,
    signal_name,
    signals_blocked,
    stopped_by,
    stopping_at_once,
)
from simpo.run.tables import markdown_table

POLL_S = 0.05
GRACE_S = 20.0
"""Time that the other parts of a phase get to end by themselves, once one has failed."""


def run_rounds(run: RunConfig) -> Path:
    """Run the rounds of a run, or continue them.

    Returns:
        The run's folder; see `simpo.launch.rounds.phases`.

    Raises:
        ConfigError: the settings cannot be used, or another process works in the folder.
        RunError: a phase failed; the same command continues it.
        Stopped: a signal or Ctrl-C stopped a phase.
    """
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(
            [
                "rounds: start them once, without torchrun or accelerate launch: each phase starts "
                "its own processes (backend.processes=N)"
            ]
        )
    others = others_note(run)
    folder = RunFolder(run)
    with folder.recording_failure():
        # Phases read it: settings that decide no numbers may differ from those of the first start.
        write_text(folder.path / "run.yaml", run_yaml(run), holds_secret(run))
        begin = time.perf_counter()
        say(*others, *folder.notes, f"run    {folder.path}", "logs   rounds/*/*.log in it")
        terminal = Terminal(run, folder.path)
        with stopping_at_once("stopped between two phases", run.train.stopped_exit_code):
            settle(run, folder, 0.0)
            while group := next_phases(run, folder.path):
                terminal.begin(group)
                run_phases(run, folder.path, group, terminal.follow)
                terminal.end(group)
                if scored := group[0].kind is Kind.annotate:
                    say(measured_line(folder.path, group[0].round - 1))
                # What was damaged may have been made again.
                if scored or not next_phases(run, folder.path):
                    settle(run, folder, time.perf_counter() - begin)
    return folder.path


def others_note(run: RunConfig) -> list[str]:
    """A note if these settings begin anew, and rounds with others have not finished."""
    if run.run_dir is not None or unfinished_folders(run):
        return []
    for path in sorted(new_folder(run).parent.glob("*"), reverse=True):
        if not replies_folder(path, 1).is_dir() or status_or_none(path).get("state") == "finished":
            continue
        try:
            before = trajectory(load_run(path / "run.yaml", check=False))
        except SimpoError:
            continue
        now = trajectory(run)
        keys = [key for key in now.keys() | before.keys() if now.get(key) != before.get(key)]
        told = ", ".join(f"{key}={before.get(key)}" for key in sorted(keys))
        return [f"note   begins anew: the rounds in {path}, which have not finished, have {told}"]
    return []


def settle(run: RunConfig, folder: RunFolder, this_process_s: float) -> None:
    """Log what the phases that are done have measured, decide whether to go on, and finish.

    Raises:
        RunError: the replies collapse, and watch.action is stop.
    """
    found = {number: measured(folder.path, number) for number in measured_rounds(folder.path)}
    evaluations = {number: metrics.get("eval", {}) for number, metrics in found.items()}
    newest = max(evaluations, default=0)
    _log(run, folder.path, found)
    folder.write_status("running", newest, run.rounds.number)
    findings = _watch(run, found)
    if (
        0 < newest < run.rounds.number
        and not ended_early(folder.path)
        and (
            reason := reason_to_end(run, evaluations)
            or nothing_to_learn(run, pairs_of(folder.path, newest + 1), newest + 1)
        )
    ):
        folder.write_text(str(ENDED_FILE), f"{reason}\n")
        say(f"ended  {reason}")
    if not next_phases(run, folder.path):
        _finish(run, folder, evaluations, findings, this_process_s)


def _log(run: RunConfig, path: Path, found: Mapping[int, Mapping[str, dict[str, float]]]) -> None:
    """Write metrics.jsonl, whose steps are rounds, and send it to the tracker."""
    with Tracker(run.tracker, path, run.name, trajectory(run)) as tracker:
        tracker.begin(0)
        for number, prefix, metrics in metric_lines(found):
            tracker.log(number, prefix, metrics)


def _watch(run: RunConfig, found: Mapping[int, Mapping[str, dict[str, float]]]) -> list[str]:
    """The signs of a collapse over the rounds, as far as they have come.

    Raises:
        RunError: there are some, and watch.action is stop.
    """
    watch = CollapseWatch(run.watch, "round", "rounds/{following}/replies")
    for number, prefix, metrics in metric_lines(found):
        named = {f"{prefix}/{key}": value for key, value in metrics.items()}
        watch.read({"step": number, **named})
    texts = [finding.text for finding in watch.findings]
    if texts and run.watch.action is WatchAction.stop:
        raise RunError(f"watch  {texts[0]}")
    if texts:
        say(*(f"watch  {text}" for text in texts))
    return texts


def _finish(
    run: RunConfig,
    folder: RunFolder,
    evaluations: Mapping[int, Mapping[str, float]],
    findings: Sequence[str],
    this_process_s: float,
) -> None:
    """Link the model that is kept, and write results.json."""
    kept = kept_round(run, evaluations)
    _link(folder.path / "model", run_folder(folder.path, kept) / "model")
    folder.write_json(
        "results.json",
        {
            "eval_before": evaluations[0],
            "eval_after": evaluations[kept],
            "findings": list(findings),
            "train": {
                "steps": max(evaluations),
                "model_step": kept,
                "this_process_s": this_process_s,
            },
        },
    )
    folder.write_status("finished", max(evaluations), run.rounds.number)
    say(
        "",
        *markdown_table(rounds_table(evaluations)),
        "",
        f"kept   the model of round {kept}: {folder.path}/model",
        f"chat   python -m simpo.chat {shlex.quote(str(folder.path))} base=true",
        f"report python -m simpo.report {shlex.quote(str(folder.path))}",
    )


def _link(place: Path, target: Path) -> None:
    """Make `place` a link to a folder below its own parent.

    Raises:
        RunError: it cannot be made.
    """
    part = place.with_name(f".{place.name}.part")
    try:
        part.unlink(missing_ok=True)
        part.symlink_to(target.relative_to(place.parent))
        os.replace(part, place)
    except OSError as error:
        raise unwritable(place, error) from error


def run_phases(
    run: RunConfig,
    root: Path,
    group: Sequence[Phase],
    follow: Callable[[], None] = lambda: None,
) -> None:
    """Run phases at the same time, each in a process of its own that prints into its log.

    Args:
        follow: called while they run and once they have ended, to show what they print.

    Raises:
        ConfigError, RunError: one failed; the others were ended.
        Stopped: a signal or Ctrl-C stopped them.
    """
    processes: list[subprocess.Popen[bytes]] = []
    signals: list[int] = []
    for phase in group:
        reason = error_file(root, phase)
        reason.parent.mkdir(parents=True, exist_ok=True)
        reason.unlink(missing_ok=True)
    failed: list[tuple[Phase, int]] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        signals.append(number)
        if signals.count(signal.SIGINT) > 2:
            number = signal.SIGKILL  # a library may keep Python from hearing the others
        for process in processes:
            process.send_signal(number)

    with forwarding_signals(pass_on):
        try:
            with signals_blocked():
                for place, phase in enumerate(() if signals else group):
                    share = share_of_machine(place, len(group))
                    processes.append(_start(root, phase, share))
            while processes and not failed:
                codes = [process.poll() for process in processes]
                # Those that end later were ended here: the first to fail has the cause.
                failed = [(p, code) for p, code in zip(group, codes, strict=True) if code]
                if None not in codes:
                    break
                follow()
                time.sleep(POLL_S)
            for process in processes:
                process.terminate()
            for process in processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            follow()
    if failed:
        raise _failure(run, root, *failed[0], signals)
    _check_done(run, root, group, signals)


def _check_done(run: RunConfig, root: Path, group: Sequence[Phase], signals: Sequence[int]) -> None:
    """
    Raises:
        RunError: a phase has not done its work, though its process ended well.
        Stopped: there were signals, too early or too late for the phases.
    """
    undone = next((phase for phase in group if not is_done(root, phase)), None)
    if signals:
        what = f"before {undone.text()}" if undone else f"after {group[0].text()}"
        name = signal.Signals(signals[0]).name
        raise stopped_by(name, f"stopped {what}", run.train.stopped_exit_code)
    if undone:
        raise RunError(f"{undone.text()}: its process ended with exit code 0 before its end")


def _start(root: Path, phase: Phase, share: Mapping[str, str]) -> subprocess.Popen[bytes]:
    words = [str(root), str(phase.round), phase.kind.value, str(phase.part)]
    with log_file(root, phase).open("ab") as output:  # bars go to stderr
        return start_child("simpo.launch.rounds.process", *words, environment=share, stdout=output)


def _failure(
    run: RunConfig, root: Path, phase: Phase, code: int, signals: Sequence[int]
) -> Exception:
    """The error after a phase ended with an exit code that is not 0."""
    text = ""
    with suppress(OSError):
        text = error_file(root, phase).read_text(errors="replace").strip()
    stopped = run.train.stopped_exit_code
    if signals or code in (INTERRUPTED, stopped):
        interrupted = signal.SIGINT in signals or code == INTERRUPTED
        name = "interrupted" if interrupted else signal.Signals((signals or [15])[0]).name
        message = text or f"{name}: stopped in {phase.text()} (the same command continues)"
        return Stopped(message, INTERRUPTED if interrupted else stopped)
    if code < 0:
        return RunError(
            f"{phase.text()}: killed by {signal_name(-code)} (the same command continues)"
        )
    if code == 2 and text:
        return ConfigError([f"{phase.text()}: {line}" for line in text.splitlines()])
    return RunError(f"{phase.text()}: {text or f'ended with exit code {code}'}")

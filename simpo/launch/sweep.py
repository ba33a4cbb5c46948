"""Starts the members of a sweep here or queues them on Slurm, each in a folder of its own.

All members are composed and checked before the first is started. Each folder gets the resolved
run.yaml that its run will read, so later edits of conf/ do not change waiting members. A member's
folder is named by its overrides, so the same command finds the members again and skips those that
have finished or are running.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from simpo.config.choices import BenchmarkKind
from simpo.config.errors import INTERRUPTED, ConfigError, RunError, Stopped
from simpo.config.launchers import LauncherConfig, LocalConfig, SlurmConfig
from simpo.launch.folders import Member, single_folder, sweep_folder, with_files, with_folder
from simpo.launch.member import SlurmMember
from simpo.launch.rounds.chain import submit_chain
from simpo.launch.share import share_of_machine
from simpo.launch.submit import array_ids, submit
from simpo.report.compare import compare
from simpo.run import progress, slurm
from simpo.run.parent import start_child
from simpo.run.pruning import Pruning
from simpo.run.runs import (
    IN_PROGRESS,
    UNSUCCESSFUL,
    Run,
    State,
    note_job,
    read_progress,
    read_runs,
)
from simpo.run.signals import SAVING, forwarding_signals, signals_blocked, tell

GRACE_S = 60.0
"""Time that members get to save and end, if the sweep itself fails."""
NOTHING_HELD_OUT = (
    "note   nothing is held out, so no member will be the best (test_split or test_path of "
    "data.sources holds pairs out)"
)


def launch(
    members: Sequence[Member],
    sweep: str | None,
    search: bool = False,
    pruning: Pruning | None = None,
) -> list[Run] | None:
    """Run all members that have not finished and are not running, as `launcher` says.

    Args:
        sweep: its name; None for a single run, whose folder is the same as without a launcher.
        search: these are some members of a search, which prints the best of all itself.
        pruning: what may prune them; members that were pruned stay so. None: they are trained to
            their end.

    Returns:
        Each member as it has ended; None if they were not waited for.

    Raises:
        ConfigError: the members cannot be launched together; none was.
        RunError: Slurm refused them, or a member that was waited for failed.
        Stopped: a signal stopped the members on this machine, after saving.
    """
    config = members[0].run.launcher
    if any(member.run.launcher != config for member in members):
        raise ConfigError(
            ["launcher: members of a sweep share its settings (give one value for each)"]
        )
    # Ctrl-C must raise: members are then cancelled, or told to save.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sweep is None:
        folder = single_folder(members[0].run)
        members = [with_folder(members[0], folder)]
    else:
        folder = sweep_folder(members[0], sweep)
        members = [with_folder(member, folder / member.name) for member in members]
    every = list({member.path: member for member in members}.values())
    ended = (State.finished, State.pruned) if pruning else (State.finished,)
    todo = _to_start(every, ended)
    if sweep is not None and todo and not any(map(_is_evaluated, every)):
        print(NOTHING_HELD_OUT, flush=True)
    with with_files(todo, folder, pruning):
        if isinstance(config, SlurmConfig):
            _queue(config, todo, every, folder)
            if not config.wait:
                return None
        else:
            assert isinstance(config, LocalConfig)
            _run_here(config, todo, folder)
    found, damaged = read_runs([member.path for member in every])
    runs = {run.folder: run for run in found}
    _print_end(folder, with_best=sweep is not None and not search)
    bad = [run.folder.name for run in found if run.progress.state in UNSUCCESSFUL]
    bad += [run.folder.name for run in damaged]
    if bad:
        raise RunError(
            f"{len(bad)} of {len(every)} members did not finish: {', '.join(bad)} "
            f"(python -m simpo.report {_shown(folder)} tells why; the same command continues them)"
        )
    return [runs[member.path] for member in members]


def _to_start(every: Sequence[Member], ended: Sequence[State]) -> list[Member]:
    """The members to start; says how many are left alone and why.

    Args:
        ended: states in which a member is done.

    Raises:
        ConfigError: the folder of a member cannot be read.
    """
    now = read_progress([member.path for member in every])
    if unreadable := [p.note for p in now if p.state is State.damaged]:
        raise ConfigError(unreadable)
    todo: list[Member] = []
    alone: Counter[str] = Counter()
    for member, found in zip(every, now, strict=True):
        if found.state in (*_states_to_skip(member), *ended):
            alone[found.state.value] += 1
        else:
            todo.append(member)
    for name, count in alone.items():
        print(f"{count} of {len(every)} members {name} already")
    return todo


def _is_evaluated(member: Member) -> bool:
    judged = member.run.benchmark.kind is not BenchmarkKind.none
    return judged or any(source.has_held_out() for source in member.run.data.sources)


def _states_to_skip(member: Member) -> tuple[State, ...]:
    """States in which a member is not started; a pending one without a job is."""
    launched = (member.path / "jobs.jsonl").is_file()
    return IN_PROGRESS if launched else (State.running,)


def _queue(
    config: SlurmConfig, todo: Sequence[Member], every: Sequence[Member], folder: Path
) -> None:
    """Submit members to Slurm, print how to follow them, and wait with `launcher.wait`."""
    chained = bool(todo) and todo[0].run.rounds.chain
    arrays: list[str] = []
    try:
        if chained:
            for member in todo:
                arrays += submit_chain(config, member.run, member.path)
        elif todo:
            paths = [member.path for member in todo]
            jobs = submit(config, folder.name, folder / "slurm", SlurmMember(), paths)
            arrays += array_ids(job_id for job_id, _ in jobs)
            for path, (job_id, log) in zip(paths, jobs, strict=True):
                note_job(path, log, id=job_id)
    except BaseException:
        slurm.cancel(*arrays)  # without a line in jobs.jsonl they could not be found again
        raise
    if chained:
        chains = "a chain" if len(todo) == 1 else f"{len(todo)} chains"
        print(f"jobs   {' '.join(arrays)}: {chains} with a job for each phase")
    elif todo:
        print(f"job    {' '.join(arrays)}: {len(todo)} {'member' if len(todo) == 1 else 'members'}")
    print(f"folder {folder}")
    print(f"status python -m simpo.report {_shown(folder)}")
    if todo:
        print(f"cancel scancel {' '.join(arrays)}", flush=True)
    if config.wait:
        _follow(config, every, lambda: None)


def _run_here(config: LocalConfig, todo: Sequence[Member], folder: Path) -> None:
    """Run members in processes on this machine, `parallel` at a time."""
    print(f"folder {folder}", flush=True)
    waiting = list(todo)
    places = min(config.parallel, len(todo))
    at_work: dict[int, tuple[Path, subprocess.Popen[bytes]]] = {}
    signals: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        again = signals.count(signal.SIGINT) > 1
        if number == signal.SIGINT:
            # A first Ctrl-C makes the members save.
            number = signal.SIGKILL if again else signal.SIGTERM
            if not again:
                tell(SAVING)
        for _, process in at_work.values():
            process.send_signal(number)
        if again:
            raise KeyboardInterrupt

    def under_way() -> set[Path]:
        if signals:
            waiting.clear()
        for place in range(places):
            if place in at_work and at_work[place][1].poll() is not None:
                del at_work[place]
            if place not in at_work and waiting:
                member = waiting.pop(0)
                with signals_blocked():
                    at_work[place] = member.path, _start(member, place, places)
        return {member.path for member in waiting} | {path for path, _ in at_work.values()}

    with forwarding_signals(pass_on):
        try:
            _follow(config, todo, under_way)
        finally:
            for _, process in at_work.values():  # after an error here
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
                process.kill()
    if signals:
        interrupted = signal.SIGINT in signals
        name = "interrupted" if interrupted else signal.Signals(signals[0]).name
        raise Stopped(
            f"{name}: the running members have saved (the same command continues)",
            INTERRUPTED if interrupted else todo[0].run.train.stopped_exit_code,
        )


def _start(member: Member, place: int, places: int) -> subprocess.Popen[bytes]:
    log, share = member.path / "log.txt", share_of_machine(place, places)
    words = "simpo.launch.member", str(member.path)
    with log.open("ab") as output:
        process = start_child(*words, environment=share, stdout=output, stderr=output)
    note_job(member.path, log, pid=process.pid)
    return process


def _follow(
    config: LauncherConfig, members: Sequence[Member], under_way: Callable[[], set[Path] | None]
) -> None:
    """Show the progress of members until all have ended, and print how each ended.

    Args:
        under_way: called at each poll; returns the folders of the members that this process has
            still to start or to wait for. None: Slurm runs them.
    """
    unreported = [member.path for member in members]
    reasons: set[str] = set()
    with progress.bar("sweep", len(unreported)) as bar:
        while True:
            here = under_way()
            steps = []
            ended = 0
            for path, found in zip(list(unreported), read_progress(unreported), strict=True):
                at_rest = found.state not in IN_PROGRESS
                if found.state is State.running:
                    steps.append(f"{found.step}/{found.total_steps or '?'}")
                if found.state is State.pending and found.note not in {"", *reasons}:
                    reasons.add(found.note)
                    progress.say(f"{path.name}  {found.text()}: {found.note}")
                if not (at_rest if here is None else path not in here):
                    continue
                unreported.remove(path)
                ended += at_rest
                if at_rest:  # a sweep that was stopped leaves others pending
                    words = [f"{path.name}  {found.text()}", found.note]
                    progress.say(": ".join(filter(None, words)))
            bar.advance(ended, f"at step {', '.join(steps)}" if steps else "")
            if not unreported:
                return
            time.sleep(config.poll_s)


def _print_end(folder: Path, with_best: bool) -> None:
    """Print the best finished run in a folder, as `simpo report` finds it, and its command."""
    report = compare([folder]) if with_best else None
    if report and report.best is not None:
        value = report.monitored(report.best)
        print(f"best   {report.best_in_words()}: {report.metric} {value:.4f}")
    elif report:
        print(f"best   none: no finished run has {report.metric}")
    print(f"report python -m simpo.report {_shown(folder)}", flush=True)


def _shown(folder: Path) -> str:
    """A folder for a command: relative if it lies in the working directory."""
    inside = folder.is_relative_to(Path.cwd())
    return shlex.quote(str(folder.relative_to(Path.cwd()) if inside else folder))

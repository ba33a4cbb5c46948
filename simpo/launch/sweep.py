"""Members of a sweep in; started here or queued on a Slurm cluster, each in a folder of its own.

Everything is composed and checked before the first is started, and each folder gets the resolved
run.yaml that its run will read: later edits of conf/ change nothing that waits. A member's folder
follows from its overrides, so the same sweep finds its members again, and leaves alone those that
have finished or are under way.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from simpo.config.check import MAY_DIFFER, RESULT_SECTIONS, holds_secret, run_yaml
from simpo.config.errors import INTERRUPTED, ConfigError, RunError, Stopped, unwritable
from simpo.config.launchers import LauncherConfig, LocalConfig, SlurmConfig
from simpo.config.renamed import first_name
from simpo.config.schema import RunConfig
from simpo.launch.member import SlurmMember
from simpo.launch.submit import submit
from simpo.run import slurm
from simpo.run.atomic import write_text
from simpo.run.folder import new_folder, refuse_other_settings, train_command, unfinished_folders
from simpo.run.runs import IN_PROGRESS, UNSUCCESSFUL, State, note_job, read_progress, read_runs
from simpo.run.signals import SAVING, forwarding_signals, signals_blocked

GRACE_S = 60.0
"""How long members get to save and end, where the sweep itself fails."""
LONGEST_NAME = 120


@dataclass(frozen=True)
class Member:
    """One run of a sweep: its overrides, and those among them that the others do not share."""

    run: RunConfig
    overrides: tuple[str, ...]
    own: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the member's folder, the same whatever the order of its overrides."""
        # A group below another is known by its own name: experiments/objectives=orpo.
        words = (word.partition("=") for word in self.own)
        text = ",".join(sorted(f"{k.rpartition('/')[2]}{eq}{v}" for k, eq, v in words)) or "all"
        name = re.sub(r"[^\w.,=+-]+", "_", text)
        if name == text and len(name) <= LONGEST_NAME:
            return name
        return f"{name[:LONGEST_NAME]}-{_hash(text)}"

    @property
    def path(self) -> Path:
        """The run's folder."""
        assert self.run.run_dir is not None
        return Path(self.run.run_dir)


def launch(members: Sequence[Member], sweep: str | None) -> list[float | None]:
    """Run all members that have not finished and are not under way, as `launcher` says.

    Args:
        sweep: its name; None for a single run, which goes where it would go without a launcher.

    Returns:
        Each member's `monitor.metric`; None where it is not known (yet).

    Raises:
        ConfigError: the members cannot be launched together; nothing was.
        RunError: Slurm did not take them, or a member that was waited for failed.
        Stopped: a signal stopped the members here, after they had saved.
    """
    config = members[0].run.launcher
    if any(member.run.launcher != config for member in members):
        raise ConfigError(
            ["launcher: members are launched together (one value for each of its settings)"]
        )
    # What is being submitted or started is to be undone, or told to save.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sweep is None:
        folder = _single_folder(members[0].run)
        members = [_with_folder(members[0], folder)]
    else:
        folder = _sweep_folder(members[0], sweep)
        members = [_with_folder(member, folder / member.name) for member in members]
    every = list({member.path: member for member in members}.values())
    progress = read_progress([m.path for m in every])
    if unreadable := [p.note for p in progress if p.state is State.damaged]:
        raise ConfigError(unreadable)
    states = [p.state for p in progress]
    todo = [
        member
        for member, state in zip(every, states, strict=True)
        if state is not State.finished and state not in _states_to_skip(member)
    ]
    alone = Counter(s.value for m, s in zip(every, states, strict=True) if m not in todo)
    for name, count in alone.items():
        print(f"{count} of {len(every)} members {name} already")
    with _with_files(todo, folder):
        if isinstance(config, SlurmConfig):
            _queue(config, todo, every, folder)
            if not config.wait:
                return [None for _ in members]
        else:
            assert isinstance(config, LocalConfig)
            _run_here(config, todo, folder)
    found, damaged = read_runs([member.path for member in every])
    runs = {run.folder: run for run in found}
    bad = [run.folder.name for run in found if run.progress.state in UNSUCCESSFUL]
    bad += [run.folder.name for run in damaged]
    if bad:
        raise RunError(
            f"{len(bad)} of {len(every)} members did not finish: {', '.join(bad)} "
            f"(python -m simpo.report {_shown(folder)} tells why; the same command continues them)"
        )
    return [runs[member.path].monitored for member in members]


def _states_to_skip(member: Member) -> tuple[State, ...]:
    """States in which a member needs no start: here, one that has only been prepared does."""
    launched = (member.path / "jobs.jsonl").is_file()
    return IN_PROGRESS if launched else (State.running,)


def _single_folder(run: RunConfig) -> Path:
    if run.run_dir is not None:
        return Path(run.run_dir).expanduser().absolute()
    return next(iter(unfinished_folders(run)), None) or new_folder(run)


def _sweep_folder(member: Member, name: str) -> Path:
    run = member.run
    if run.run_dir is not None:
        raise ConfigError(
            [
                f"run_dir: members of a sweep have folders of their own, got {run.run_dir} "
                "(launcher.sweep_dir is the sweep's)"
            ]
        )
    if run.launcher.sweep_dir is not None:
        return Path(run.launcher.sweep_dir).expanduser().absolute()
    shared = sorted(set(member.overrides) - set(member.own))
    # Where and how a member runs may change between two submissions of the same sweep.
    telling = [
        f"{first_name(key)}{equals}{value}"
        for key, equals, value in (text.partition("=") for text in shared)
        if _decides_numbers(key)
    ]
    parent = Path(run.output_dir).expanduser().absolute() / "sweeps"
    return parent / f"{name}-{_hash(' '.join(telling))}"


def _decides_numbers(key: str) -> bool:
    section, _, rest = key.lstrip("+~").partition(".")
    return section in (*RESULT_SECTIONS, "experiments") and rest not in MAY_DIFFER.get(section, ())


def _with_folder(member: Member, folder: Path) -> Member:
    run = replace(member.run, run_dir=str(folder))
    refuse_other_settings(run, folder)
    return replace(member, run=run)


@contextmanager
def _with_files(members: Sequence[Member], folder: Path) -> Iterator[None]:
    """Settings and command in each member's folder; what is new goes again if nothing starts.

    Raises:
        RunError: a file or folder cannot be written.
    """
    new = [path for path in (folder, *(m.path for m in members)) if not path.exists()]
    try:
        for member in members:
            member.path.mkdir(parents=True, exist_ok=True)
            words = [text for text in member.overrides if not _is_placement(text)]
            private = holds_secret(member.run)
            command = train_command(words, member.path)
            write_text(member.path / "command.txt", f"{command}\n", private)
            write_text(member.path / "run.yaml", run_yaml(member.run), private)
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise unwritable(error.filename, error) from error
    finally:
        if not any((member.path / "jobs.jsonl").is_file() for member in members):
            for path in new:
                shutil.rmtree(path, ignore_errors=True)


def _is_placement(override: str) -> bool:
    return override.partition("=")[0].partition(".")[0] in ("launcher", "run_dir")


def _queue(
    config: SlurmConfig, todo: Sequence[Member], every: Sequence[Member], folder: Path
) -> None:
    """Submit members to Slurm, say how to follow them, and wait where that is asked for."""
    if todo:
        jobs = submit(config, folder.name, folder / "slurm", SlurmMember(), [m.path for m in todo])
        array = jobs[0][0].partition("_")[0]
        try:
            for member, (job_id, log) in zip(todo, jobs, strict=True):
                note_job(member.path, log, id=job_id)
        except BaseException:
            slurm.cancel(array)  # nobody would find them again
            raise
        print(f"job    {array}: {len(todo)} {'member' if len(todo) == 1 else 'members'}")
    print(f"folder {folder}")
    print(f"status python -m simpo.report {_shown(folder)}")
    if todo:
        print(f"cancel scancel {array}", flush=True)
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
            # On a first Ctrl-C they are to save.
            number = signal.SIGKILL if again else signal.SIGTERM
            os.write(2, b"" if again else SAVING)
        for _, process in at_work.values():
            if process.poll() is None:
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
            f"{name}: the members at work have saved (the same command continues)",
            INTERRUPTED if interrupted else todo[0].run.train.stopped_exit_code,
        )
    print(f"report python -m simpo.report {_shown(folder)}")


def _start(member: Member, place: int, places: int) -> subprocess.Popen[bytes]:
    log = member.path / "log.txt"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "simpo.launch.member", str(member.path)],
            env=os.environ | share_of_machine(place, places),
            stdout=output,
            stderr=output,
            # A terminal's Ctrl-C would reach them beside the one passed on.
            start_new_session=True,
        )
    note_job(member.path, log, pid=process.pid)
    return process


def share_of_machine(place: int, places: int) -> dict[str, str]:
    """Environment of one of so many members at the same time: its cores, its GPUs.

    Where there are fewer GPUs than members, each sees all.
    """
    if places == 1:
        return {}
    cores = str(max(1, (os.cpu_count() or 1) // places))
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", cores)}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        devices = [str(number) for number in range(torch.cuda.device_count())]
    else:
        devices = [name for name in visible.split(",") if name]
    if len(devices) >= places:
        share["CUDA_VISIBLE_DEVICES"] = ",".join(devices[place::places])
    return share


def _follow(
    config: LauncherConfig, members: Sequence[Member], under_way: Callable[[], set[Path] | None]
) -> None:
    """Show how far members are until all have ended, and say of each how it did.

    Args:
        under_way: called now and then; the folders of those that this process has still to start or
            to wait for. None: what Slurm says of their jobs tells.
    """
    unreported = [member.path for member in members]
    silent = not sys.stderr.isatty()
    with tqdm(total=len(unreported), unit="run", desc="sweep", leave=False, disable=silent) as bar:
        while True:
            here = under_way()
            steps = []
            for path, progress in zip(list(unreported), read_progress(unreported), strict=True):
                at_rest = progress.state not in IN_PROGRESS
                if progress.state is State.running:
                    steps.append(f"{progress.step}/{progress.total_steps or '?'}")
                if not (at_rest if here is None else path not in here):
                    continue
                unreported.remove(path)
                if at_rest:  # and not left waiting by a sweep that was told to stop
                    words = [f"{path.name}  {progress.text()}", progress.note]
                    tqdm.write(": ".join(filter(None, words)))
            bar.update(len(members) - len(unreported) - bar.n)
            bar.set_postfix_str(f"at step {', '.join(steps)}" if steps else "")
            if not unreported:
                return
            time.sleep(config.poll_s)


def _shown(folder: Path) -> str:
    return shlex.quote(os.path.relpath(folder))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]

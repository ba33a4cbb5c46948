"""A damaged file in a run's folder is reported or repaired, and never changes numbers."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, DamagedError, RunError, SimpoError, Stopped
from simpo.config.schema import RunConfig
from simpo.launch.member import _note_start
from simpo.loop.checkpoint import CheckpointStore
from simpo.loop.train import train
from simpo.report.compare import compare
from simpo.report.page import render
from simpo.report.text import text
from simpo.run import folder, provenance
from simpo.run.atomic import write_text
from simpo.run.files import read_results
from simpo.run.folder import RunFolder, refuse_unwritable
from simpo.run.provenance import git_diff
from simpo.run.runs import State, find_runs, read_progress
from tests.support.whole_runs import metrics_of, run_command, tiny_overrides


class Template:
    """A run that a signal stopped after 5 of 6 steps, to be copied and damaged.

    Attributes:
        run: its settings; run_dir is to be replaced.
        folder: of the stopped run.
        whole: of the same run undisturbed.
    """

    def __init__(self, overrides: list[str], folder: Path, whole: Path) -> None:
        self.overrides, self.folder, self.whole = overrides, folder, whole

    def copy(self, to: Path, of: Path | None = None) -> Path:
        return shutil.copytree(of or self.folder, to / "run")

    def run(self, folder: Path) -> RunConfig:
        return compose_run([*self.overrides, f"run_dir={folder}"])

    def go_on(self, folder: Path) -> None:
        """Continue a folder, which must give the undisturbed run's numbers."""
        after = read_results(train(self.run(folder)))["eval_after"]
        lines = metrics_of(self.whole)
        assert metrics_of(folder) == lines
        assert after == {k[5:]: v for k, v in lines[-1].items() if k.startswith("eval/")}
        assert (folder / "model/model.safetensors").read_bytes() == (
            self.whole / "model/model.safetensors"
        ).read_bytes()


@pytest.fixture(scope="module")
def template(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Template:
    folder = tmp_path_factory.mktemp("template")
    overrides = [*tiny_overrides(tiny_folder, folder), "sample.num_prompts=1"]
    template = Template(overrides, folder / "stopped", folder / "whole")
    train(template.run(template.whole))
    save = CheckpointStore.save

    def save_and_stop(self: CheckpointStore, step: int, *rest: object) -> None:
        save(self, step, *rest)  # type: ignore[arg-type]
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)  # read after the next step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointStore, "save", save_and_stop)
        with pytest.raises(Stopped):
            train(template.run(template.folder))
    assert sorted(p.name for p in (template.folder / "checkpoints").iterdir()) == [
        "step-000004",
        "step-000005",
    ]
    return template


def refusal(action: Callable[[], object]) -> str:
    """What an action is refused with; its frames are dropped, and the locks they hold."""
    try:
        action()
    except SimpoError as error:
        told_in_lines(error)
        text = str(error)
    else:
        raise AssertionError("not refused")
    gc.collect()
    return text


SEED, CONTINUED, REPORTED = 0, 12, 40
ODD = ("null", "[]", "3", '""', "{}", '{"step": "x"}', "[" * 5000, "\0\0", '{"a": 1')


def damage(path: Path, rng: random.Random) -> str:
    """Do to a file what a disk, a copy or an editor might; what it was."""
    content = path.read_bytes()
    kind = rng.choice(["truncated", "emptied", "flipped", "deleted", "odd", "folder"])
    if kind == "truncated":
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "flipped" and content:
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 5])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
    elif kind == "odd":
        path.write_text(rng.choice(ODD))
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
    return f"{path.name} {kind}"


def files_of(folder: Path) -> list[Path]:
    """The files of a run, of which those of checkpoints are less often chosen."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [p for p in files if "checkpoints" not in p.parts] * 2 + files


def told_in_lines(error: SimpoError) -> None:
    for line in str(error).splitlines():
        assert line and "Traceback" not in line and line.endswith(")"), str(error)


@pytest.mark.matrix
def test_any_file_damaged_then_continued(template: Template, tmp_path: Path) -> None:
    """Refused in a line, or the same numbers to the last bit."""
    rng, refused = random.Random(SEED), 0
    for case in range(CONTINUED):
        folder = template.copy(tmp_path / str(case))
        what = damage(rng.choice(files_of(folder)), rng)
        try:
            template.go_on(folder)
        except SimpoError as error:
            print(f"{case}: {what}: {error}")
            told_in_lines(error)
            refused += 1
        except BaseException:
            print(f"{case}: {what}")
            raise
        shutil.rmtree(folder)
    print(f"{refused} refused, {CONTINUED - refused} made good")
    assert 0 < refused < CONTINUED


@pytest.mark.matrix
def test_any_file_damaged_then_reported(template: Template, tmp_path: Path) -> None:
    """Shown as damaged, or with the same held-out numbers; the run beside it as always."""
    rng, seen = random.Random(SEED), 0
    shutil.copytree(template.whole, tmp_path / "beside")
    runs = {
        state: compare([template.copy(tmp_path / state, folder)]).runs[0].metrics
        for state, folder in (("stopped", template.folder), ("whole", template.whole))
    }
    for state in runs:
        shutil.rmtree(tmp_path / state)
    for case in range(REPORTED):
        state, source = rng.choice([("stopped", template.folder), ("whole", template.whole)])
        folder = template.copy(tmp_path / "case", source)
        what = damage(rng.choice(files_of(folder)), rng)
        try:
            report = compare([tmp_path])
            shown = text(report)
            if case % 8 == 0:
                render(report)
        except BaseException:
            print(f"{case}: {what} ({state})")
            raise
        found = dict(zip(report.names, report.runs, strict=True))
        assert found["beside"].metrics == runs["whole"]
        if "case/run" in report.damaged:
            assert f"\ncase/run: {report.damaged['case/run'].fault}\n" in shown
            assert len(report.lines()) == 2
            seen += 1
        elif "case/run" in found:
            assert found["case/run"].metrics == runs[state], what
        else:
            assert not find_runs([folder])
        shutil.rmtree(tmp_path / "case")
    print(f"{seen} of {REPORTED} shown as damaged")
    assert REPORTED // 6 < seen < REPORTED


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = path.read_bytes()
    place = content.index(b"0.") + 3
    path.write_bytes(content[:place] + b"98" + content[place + 2 :])


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (Path.unlink, "holds 0 bytes, {size} when step 5 was saved"),
        (lambda path: path.write_bytes(b""), "holds 0 bytes, {size} when step 5 was saved"),
        (cut, "holds {short} bytes, {size} when step 5 was saved"),
        (flip, "its first {size} bytes are not as when step 5 was saved (sha256)"),
    ],
    ids=["deleted", "emptied", "cut", "changed"],
)
def test_metrics_are_not_as_sealed(
    spoil: Callable[[Path], None], fault: str, template: Template, tmp_path: Path
) -> None:
    """Nothing is overwritten."""
    folder = template.copy(tmp_path)
    metrics = folder / "metrics.jsonl"
    size = metrics.stat().st_size
    spoil(metrics)
    before = metrics.read_bytes() if metrics.exists() else b""
    fault = fault.format(size=size, short=size - 5)
    line = f"{metrics}: {fault} (restore it, or start anew with run_dir=NEW)"
    assert refusal(lambda: train(template.run(folder))) == line
    assert metrics.read_bytes() == before
    report = compare([folder])
    assert [run.fault for run in report.damaged.values()] == [line]


def test_a_damaged_status_is_written_anew(
    template: Template, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = template.copy(tmp_path)
    (folder / "status.json").write_text('{"state": "sto')
    (folder / "samples" / "step-000000.json").write_text("[3]")
    template.go_on(folder)
    told = capsys.readouterr().out
    assert f"note   {folder}/status.json: is not JSON; written anew\n" in told
    assert f"run    {folder}, continued after step 5\n" in told
    assert f"note   {folder}/samples/step-000000.json: holds 3, not a reply ({REPLIES})\n" in told
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


DATA = "(restore it, or start anew with run_dir=NEW)"


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("data.json", None, f"is missing: was the run begun on the same data? {DATA}"),
        ("data.json", b"", f"is empty {DATA}"),
        ("data.json", b"null", f"holds None, not a dict {DATA}"),
        ("data.json", b"\xff", f"is not UTF-8 at byte 1 {DATA}"),
        (
            "data.json",
            b"{}",
            "lacks one of settings, train_fingerprint, test_fingerprint, template_sha256, "
            f"tokens_fingerprint {DATA}",
        ),
        (
            "run.yaml",
            b"",
            "lacks the section model (restore it, or remove it: the run's own command writes it "
            "anew)",
        ),
    ],
)
def test_what_decides_numbers_is_refused(
    name: str, content: bytes | None, fault: str, template: Template, tmp_path: Path
) -> None:
    """Before anything is written."""
    folder = template.copy(tmp_path)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    status = (folder / "status.json").read_bytes()
    with pytest.raises(SimpoError) as error:
        RunFolder(template.run(folder))
    assert str(error.value) == f"{folder}/{name}: {fault}"
    assert error.value.exit_code == 2
    assert (folder / "status.json").read_bytes() == status


def test_settings_are_known_without_run_yaml(template: Template, tmp_path: Path) -> None:
    """data.json holds them too: other ones are refused, and nothing is written before."""
    folder = template.copy(tmp_path)
    (folder / "run.yaml").unlink()
    other = compose_run([*template.overrides, f"run_dir={folder}", "loss.beta=3"])
    assert refusal(lambda: RunFolder(other)) == (
        f"loss.beta: the run in {folder} has 2.0, got 3.0 (restore it, or choose another folder)"
    )
    assert not (folder / "run.yaml").exists()
    RunFolder(template.run(folder))
    assert (folder / "run.yaml").exists()


STATUS = "remove it: the run's own command writes it anew"
RESULTS = "remove it and status.json: the run's own command writes both anew"
REPLIES = "restore it, or remove it: no number depends on it"


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("status.json", "", f"is empty ({STATUS})"),
        ("status.json", "[]", f"holds [], not a dict ({STATUS})"),
        (
            "status.json",
            '{"state": 3}',
            f"state is 3, none of running, stopped, failed, pruned, finished ({STATUS})",
        ),
        (
            "status.json",
            '{"state": "failed", "step": "2"}',
            f"steps are ['2', 0], not whole numbers ({STATUS})",
        ),
        ("results.json", "{}", f"lacks eval_after or train.model_step ({RESULTS})"),
        (
            "results.json",
            '{"eval_after": {"loss": 1.0}, "train": {"model_step": 6}}',
            f"differs from metrics.jsonl in the evaluation after step 6 ({RESULTS})",
        ),
        (
            "results.json",
            None,
            "is missing beside a finished run (remove status.json: the run's own command writes "
            "both anew)",
        ),
        ("samples/step-000006.json", "[3]", f"holds 3, not a reply ({REPLIES})"),
        (
            "held_out/step-000000.csv",
            "pair,loss\na,b\n",
            "is not a table of numbers (restore it, or remove it: no other number depends on it)",
        ),
        (
            "jobs.jsonl",
            '{"log": "log.txt"}\n{"log',
            "line 2 is not a line about a job (mend its last line, or remove the file if no job "
            "of this run is under way)",
        ),
        (
            "jobs.jsonl",
            '{"log": "log.txt", "pid": -2345}\n',
            "line 1 is not a line about a job (mend its last line, or remove the file if no job "
            "of this run is under way)",
        ),
        (
            "jobs.jsonl",
            '{"log": "log.txt", "id": "12\\u0000"}\n',
            "line 1 is not a line about a job (mend its last line, or remove the file if no job "
            "of this run is under way)",
        ),
        (
            "run.yaml",
            "[",
            "not the settings of a run (ParserError) (restore it, or remove it: the run's own "
            "command writes it anew)",
        ),
        (
            "benchmarks.json",
            '{"arena_hard_wr": "33"}',
            "must hold numbers of alpaca_eval_2_lc, alpaca_eval_2_wr, arena_hard_wr, got "
            "{'arena_hard_wr': '33'} (mend it)",
        ),
    ],
)
def test_a_damaged_run_beside_others(
    name: str, content: str | None, fault: str, template: Template, tmp_path: Path
) -> None:
    shutil.copytree(template.whole, tmp_path / "good")
    folder = shutil.copytree(template.whole, tmp_path / "bad")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    report = compare([tmp_path])
    assert report.names == ["good"] and report.best == 0
    lines = text(report).splitlines()
    assert lines[-1] == f"bad: {folder}/{name}: {fault}"
    assert [(line.split("|")[1], line.split("|")[-2]) for line in lines[2:4]] == [
        (" good ", " finished, step 6 of 6 "),
        (" bad  ", " damaged               "),
    ]
    good, bad = report.lines()
    assert bad.keys() == good.keys()
    assert (bad["state"], bad["note"]) == ("damaged", f"{folder}/{name}: {fault}")
    assert '<span class="state damaged">damaged</span>' in render(report)


@pytest.mark.parametrize("text", [None, "", "{", '{"log": "log.txt"}\n'])
def test_a_requeued_job_runs_without_its_records(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    if text is not None:
        (tmp_path / "jobs.jsonl").write_text(text)
    _note_start(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ([] if text is None else [text])


def test_nothing_but_damaged_runs(template: Template, tmp_path: Path) -> None:
    folder = template.copy(tmp_path)
    (folder / "run.yaml").write_text("")
    report = compare([tmp_path])
    assert text(report).startswith("| run | state   |\n")
    assert len(report.lines()) == 1 and report.best is None
    assert "lacks the section model" in render(report)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks(
    number: int, template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder, found again, and a note; a report cannot tell whether the run is alive."""

    def flock(handle: object, kind: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    run = compose_run([*template.overrides, f"output_dir={tmp_path}"])
    first = RunFolder(run)
    assert first.notes == [
        f"note   {first.path}: the file system keeps no locks ({os.strerror(number)}), so nothing "
        "keeps another process out of this run (start it only once at a time)"
    ]
    first.write_status("running", 1, 6)
    assert RunFolder(run).path == first.path
    assert RunFolder(compose_run([*template.overrides, f"run_dir={tmp_path}/own"])).notes
    (progress,) = read_progress([first.path])
    assert progress.state is State.running
    assert progress.note == "or killed: the file system has no locks, which would show it"


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_folders_that_others_hold(
    number: int, template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search for a new one ends."""

    def flock(handle: object, kind: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(folder.time, "sleep", lambda seconds: None)
    with pytest.raises(ConfigError) as error:
        RunFolder(compose_run([*template.overrides, f"run_dir={tmp_path}/own"]))
    assert str(error.value) == f"run_dir: another process works in {tmp_path}/own (wait for it)"
    run = compose_run([*template.overrides, f"output_dir={tmp_path}/out"])
    with pytest.raises(RunError, match=r"other processes work in it and in those of the seconds"):
        RunFolder(run)


def test_ranks_tell_each_other_of_damage() -> None:
    """As processes do: pickled."""
    error = DamagedError(Path("a/b"), "is empty", "remove it")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a/b: is empty (remove it)"


def test_a_diff_that_is_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An uncommitted byte that is not UTF-8 is kept as it is."""
    source = tmp_path / "provenance.py"
    source.write_bytes(b"one\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    source.write_bytes(b"one \xff\n")
    monkeypatch.setattr(provenance, "__file__", str(source))
    run = compose_run([f"run_dir={tmp_path}/run"])
    RunFolder(run).write_bytes("git.diff", git_diff())
    assert b"\n-one\n+one \xff\n" in (tmp_path / "run" / "git.diff").read_bytes()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk with options, or skips."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this machine lets nobody mount a disk")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)


def test_where_no_folder_can_be_made(tmp_path: Path, mounted: Callable[[str], Path]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    disk = mounted("ro")
    other, none = "(choose another)", f"must be a folder, but {tmp_path}/file is not one"
    for words, line in (
        (f"output_dir={tmp_path}/file", f"output_dir: {none}"),
        (f"run_dir={tmp_path}/file/a/b", f"run_dir: {none}"),
        (f"run_dir={tmp_path}/link/a", f"run_dir: {tmp_path}/link is not a folder {other}"),
        (f"output_dir={disk}/a", f"output_dir: this user may not write in {disk} {other}"),
    ):
        with pytest.raises(ConfigError) as error:
            refuse_unwritable(compose_run([words]))
        assert str(error.value) == line
    with pytest.raises(RunError) as failed:
        RunFolder(compose_run([f"run_dir={disk}/a"]))
    assert str(failed.value) == (
        f"{disk}/a: Read-only file system (let this user write there, or choose another folder)"
    )


def test_a_disk_that_is_full_before_the_first_step(
    template: Template, mounted: Callable[[str], Path]
) -> None:
    disk = mounted("size=64k")
    run = template.run(disk / "run")
    RunFolder(run)
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    for name, action in (
        ("git.diff", lambda: write_text(disk / "run" / "git.diff", "x")),
        ("data.json", lambda: train(run)),
    ):
        assert refusal(action) == (
            f"{disk}/run/{name}: No space left on device (make room, and the same command "
            "continues)"
        )
    assert sorted(path.name for path in (disk / "run").iterdir()) == [
        "command.txt",
        "lock",
        "run.yaml",
    ]


@pytest.mark.matrix
def test_a_page_that_cannot_be_written(template: Template, tmp_path: Path) -> None:
    """The table is told all the same."""
    told = run_command("simpo.report", str(template.whole), "html=/dev/full")
    assert (told.returncode, told.stderr) == (
        1,
        "/dev/full: No space left on device (make room, and the same command continues)\n",
    )
    assert "finished, step 6 of 6" in told.stdout

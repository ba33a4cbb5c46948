"""Failures during a run, each with real processes: nothing that was saved is lost."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo.config.check import run_yaml
from simpo.config.compose import compose_run
from simpo.config.paths import TEMPLATES
from tests.support.whole_runs import (
    assert_same_run,
    finish,
    logged,
    metrics_of,
    newest_checkpoint,
    ranks_of,
    run,
    start,
    status_of,
    tiny_overrides,
    wait_for,
)

TWO = ["backend=ddp", "backend.processes=2"]
INTERRUPTED = (
    "interrupted (the same command continues from the last checkpoint, or else from the start)\n"
)
SAVING = "interrupted: saving after this step (Ctrl-C again ends at once, without saving)\n"


# 24 steps with a checkpoint after each, and an evaluation before every other one.
STEPS = ["train.epochs=4", "train.eval_every=2", "train.checkpoint_every=1", "sample.num_prompts=0"]


@pytest.fixture
def settings(tiny_run: list[str]) -> list[str]:
    return [*tiny_run, *STEPS]


@pytest.fixture(scope="module")
def undisturbed(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """The same settings for half as many steps, and their run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = [*tiny_overrides(tiny_folder, folder), *STEPS, "train.epochs=2"]
    run([*settings, *TWO, f"run_dir={folder / 'run'}"])
    return settings, folder / "run"


@pytest.mark.parametrize(
    "lost", [pytest.param(0, marks=pytest.mark.process), pytest.param(1, marks=pytest.mark.matrix)]
)
def test_one_rank_is_killed(lost: int, undisturbed: tuple[list[str], Path], tmp_path: Path) -> None:
    """The others end within a minute, the message names it, and the run goes on where it was."""
    settings, whole = undisturbed
    folder = tmp_path / "run"
    process = start([*settings, *TWO, f"run_dir={folder}"], fresh=lost == 1)
    wait_for(logged(folder, 5), process)
    ranks = ranks_of(process)
    assert sorted(ranks) == [0, 1]
    begin = time.monotonic()
    os.kill(ranks[lost], signal.SIGKILL)
    message = finish(process, code=1, timeout_s=60)
    print(f"rank {lost} killed: all ended after {time.monotonic() - begin:.1f} s")
    assert message.endswith(
        f"rank {lost} was killed by SIGKILL; the others were ended (the same command continues "
        "from the last checkpoint)\n"
    )
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert status_of(folder)["state"] == ("failed" if lost else "running")
    run([*settings, *TWO, f"run_dir={folder}"])
    assert_same_run(whole, folder, tmp_path)


@pytest.mark.matrix
def test_twenty_kills(settings: list[str], tmp_path: Path) -> None:
    """All processes killed 20 times at random moments, every other time in a checkpoint's write."""
    settings = [*settings, "train.epochs=10", "train.eval_every=6"]
    settings += ["backend=fsdp", "backend.processes=2"]
    whole = tmp_path / "whole"
    run([*settings, f"run_dir={whole}"])
    folder = tmp_path / "run"
    checkpoints = folder / "checkpoints"
    command = [*settings, f"run_dir={folder}"]
    rng = random.Random(0)
    in_a_write = 0

    def steps() -> int:
        return int(newest_checkpoint(folder).name[5:]) if any(checkpoints.glob("step-*")) else 0

    def beyond(before: int) -> Callable[[], bool]:
        return lambda: steps() > before

    for attempt in range(20):
        process = start(command)
        if attempt % 2:
            # Rank 0 makes this folder, all write into it, and it is renamed when it is whole.
            wait_for(lambda: any(checkpoints.glob(".step-*/state/*")), process)
            time.sleep(rng.uniform(0, 0.01))
        elif attempt % 4:
            wait_for(beyond(steps()), process)
            time.sleep(rng.uniform(0, 0.05))
        else:
            time.sleep(rng.uniform(0, 3))
        ranks = ranks_of(process) if process.poll() is None else {}
        # The ranks have asked the system to end with their parent.
        process.send_signal(signal.SIGKILL)
        process.communicate()
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in ranks.values()):
            assert time.monotonic() < deadline, "a rank outlived its parent"
            time.sleep(0.01)
        in_a_write += any(checkpoints.glob(".step-*"))
    print(f"20 kills, {in_a_write} of them inside a checkpoint's write, {steps()} steps then")
    assert in_a_write >= 5
    run(command)
    bits = assert_same_run(whole, folder, tmp_path)
    print(f"{bits} bits of state compared")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("SIGTERM", marks=pytest.mark.process),
        pytest.param("SIGINT", marks=pytest.mark.process),
        pytest.param("SIGUSR1", marks=pytest.mark.matrix),
        pytest.param("SIGUSR2", marks=pytest.mark.matrix),
    ],
)
def test_a_signal_saves_and_ends(
    name: str, undisturbed: tuple[list[str], Path], tmp_path: Path
) -> None:
    settings, whole = undisturbed
    folder = tmp_path / "run"
    command = [*settings, *TWO, "train.checkpoint_every=0", f"run_dir={folder}"]
    code = {"SIGTERM": 75, "SIGUSR1": 75, "SIGUSR2": 0, "SIGINT": 130}[name]
    process = start([*command, f"train.stopped_exit_code={code}"], fresh=name == "SIGTERM")
    wait_for(logged(folder, 5), process)
    process.send_signal(signal.Signals[name])
    message = finish(process, code)
    step = int(newest_checkpoint(folder).name[5:])
    assert 5 <= step < 12
    name = "interrupted" if name == "SIGINT" else name
    assert message.endswith(
        f"{name}: saved after step {step} in {folder} (the same command continues)\n"
    )
    assert (message.count(SAVING) == 1) == (name == "interrupted")
    assert status_of(folder)["state"] == "stopped"
    assert f"continued after step {step}" in run(command)
    assert_same_run(whole, folder, tmp_path)


@pytest.mark.matrix
def test_a_signal_to_one_rank_stops_all(settings: list[str], tmp_path: Path) -> None:
    """Slurm and torchrun may signal ranks one by one; all save the same step."""
    folder = tmp_path / "run"
    process = start([*settings, *TWO, f"run_dir={folder}"])
    wait_for(logged(folder, 3), process)
    os.kill(ranks_of(process)[1], signal.SIGUSR1)
    assert "SIGUSR1: saved after step" in finish(process, code=75)


@pytest.mark.matrix
def test_a_second_ctrl_c_ends_at_once(settings: list[str], tmp_path: Path) -> None:
    """Also while a rank waits for another; nothing is saved, no traceback."""
    folder = tmp_path / "run"
    process = start([*settings, *TWO, "train.checkpoint_every=0", f"run_dir={folder}"], fresh=True)
    wait_for(logged(folder, 3), process)
    os.kill(ranks_of(process)[1], signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    message = finish(process, code=130, timeout_s=20)
    assert message.endswith(INTERRUPTED)
    assert "Traceback" not in message
    assert list((folder / "checkpoints").iterdir()) == []


def catches(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM."""
    caught = re.search(r"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    return bool(caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def loads_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


MOMENTS = {
    "first lines": lambda process, _: catches(process.pid),
    "import": lambda process, _: loads_torch(process.pid),
    "first rank": lambda process, _: len(ranks_of(process)) > 0,
    "import in a rank": lambda process, _: any(map(loads_torch, ranks_of(process).values())),
    "load": lambda _, folder: (folder / "data.json").is_file(),
}


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("moment", "name", "many"),
    [
        ("first lines", "SIGTERM", []),
        ("import", "SIGINT", []),
        ("first lines", "SIGUSR2", TWO),
        ("first rank", "SIGTERM", TWO),
        ("import in a rank", "SIGUSR1", TWO),
        ("import in a rank", "SIGINT", TWO),
        ("load", "SIGTERM", TWO),
    ],
)
def test_a_signal_while_it_starts(
    moment: str, name: str, many: list[str], settings: list[str], tmp_path: Path
) -> None:
    """The exit code of a stopped run from the first lines on, and one line."""
    folder = tmp_path / "run"
    # The default, which holds as long as the settings are not known.
    overrides = [*settings, *many, "train.stopped_exit_code=75", f"run_dir={folder}"]
    process = start(overrides, fresh=moment != "load")
    wait_for(lambda: MOMENTS[moment](process, folder), process)
    process.send_signal(signal.Signals[name])
    printed = finish(process, code=130 if name == "SIGINT" else 75)
    # Without what it was doing.
    message = re.sub(r".* \.\.\.\n", "", printed)
    if name == "SIGINT":
        assert message == INTERRUPTED
    else:
        stopped = f"{name}: stopped while starting (the same command continues)\n"
        saved = f"{name}: saved after step 1 in {folder} (the same command continues)\n"
        # A folder is made so late that the first step may have begun.
        assert message == stopped or (moment == "load" and message.endswith(saved))
    assert "Traceback" not in message


@pytest.mark.matrix
def test_a_signal_while_a_member_starts(settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run_config = compose_run([*settings, f"run_dir={tmp_path / 'run'}"])
    (tmp_path / "run" / "run.yaml").write_text(run_yaml(run_config))
    process = start([str(tmp_path / "run")], module="simpo.launch.member", fresh=True)
    wait_for(lambda: catches(process.pid), process)
    process.send_signal(signal.SIGTERM)
    message = finish(process, code=75)
    assert message == "SIGTERM: stopped while starting (the same command continues)\n"


@pytest.mark.matrix
def test_a_signal_in_the_last_evaluation(settings: list[str], tmp_path: Path) -> None:
    """After the last step nothing is lost either: the model is saved when the run goes on."""
    folder = tmp_path / "run"
    replies = ["train.max_steps=2", "sample.num_prompts=16", "sample.max_new_tokens=150"]
    command = [*settings, *TWO, *replies, f"run_dir={folder}"]
    process = start(command)
    wait_for(lambda: (folder / "checkpoints" / "step-000002").is_dir(), process)
    process.send_signal(signal.SIGUSR1)
    message = finish(process, code=75)
    assert message.endswith(
        f"SIGUSR1: saved after step 2 in {folder} (the same command continues)\n"
    )
    assert not (folder / "model").exists()
    assert "continued after step 2" in run(command)
    assert [line["step"] for line in metrics_of(folder)] == [0, 1, 2, 2]
    assert status_of(folder)["state"] == "finished"


def listening(pid: int) -> set[str]:
    """Addresses at which a process takes connections."""
    found = psutil.Process(pid).net_connections(kind="inet")
    return {connection.laddr.ip for connection in found if connection.status == "LISTEN"}


@pytest.mark.matrix
@pytest.mark.parametrize(("kind", "hanging", "checkpoint_every"), [("ddp", 1, 1), ("zero2", 0, 0)])
def test_a_rank_hangs(
    kind: str, hanging: int, checkpoint_every: int, settings: list[str], tmp_path: Path
) -> None:
    """Asleep in a checkpoint's write or between two steps: named, and all end within a minute."""
    folder = tmp_path / "run"
    command = [
        *settings,
        f"backend={kind}",
        "backend.processes=2",
        "backend.timeout_s=3",
        "train.epochs=1000",
        "train.eval_every=0",
        f"train.checkpoint_every={checkpoint_every}",
    ]
    process = start([*command, f"run_dir={folder}"])
    wait_for(logged(folder, 3), process)
    ranks = ranks_of(process)
    assert {address for pid in ranks.values() for address in listening(pid)} == {"127.0.0.1"}
    os.kill(ranks[hanging], signal.SIGSTOP)
    begin = time.monotonic()
    message = finish(process, code=1, timeout_s=120)
    assert time.monotonic() - begin < 3 + 60
    assert message.endswith(
        f"rank {hanging} hangs; the others were ended (the same command continues from the last "
        "checkpoint)\n"
    )
    assert "Traceback" not in message
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


@pytest.mark.matrix
def test_a_slow_rank_0(settings: list[str], tmp_path: Path) -> None:
    """It tokenises longer than the others wait in a step; they wait, and that is said."""
    slow = tmp_path / "slow.jinja"
    loop = "{%- for i in range(40) %}{%- for j in range(20000) %}{%- endfor %}{%- endfor %}"
    slow.write_text(loop + (TEMPLATES / "chatml.jinja").read_text())
    short = [*settings, *TWO, "backend.timeout_s=2", "train.max_steps=2", "train.eval_every=0"]
    message = run([*short, f"model.chat_template={slow}", f"run_dir={tmp_path / 'run'}"])
    assert (
        "wait   the other processes continue once rank 0 has read and tokenised the data\n"
        in message
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero2", "zero3"])
def test_the_disk_is_full(kind: str, settings: list[str], small_disk: Path) -> None:
    """The checkpoint before stays, the run says so, and goes on when there is room."""
    folder = small_disk / "run"
    command = [*settings, f"backend={kind}", "backend.processes=2", f"run_dir={folder}"]
    command += ["train.eval_every=0"]
    process = start([*command, "train.checkpoint_every=6"])
    wait_for(lambda: any((folder / "checkpoints").glob("step-000006")), process)
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        file.write(bytes(free - 300_000))  # metrics.jsonl fits, a checkpoint does not
    message = finish(process, code=1)
    assert re.search(
        r"step 12: the checkpoint could not be written: (\[Errno 28\] No space left on device.*|"
        r"a file could not be written whole, the disk may be full) "
        r"\(step-000006 stays; make room, and the same command continues\)",
        message,
    ), message[-3000:]
    assert newest_checkpoint(folder).name == "step-000006"
    filler.unlink()
    assert "continued after step 6" in run([*command, "train.checkpoint_every=0"])
    assert [x["step"] for x in metrics_of(folder) if "train/loss" in x] == list(range(1, 25))


@pytest.mark.matrix
def test_metrics_on_a_full_disk(settings: list[str], tmp_path: Path) -> None:
    """A run whose files may not grow says which folder wants room, in one line."""
    folder = tmp_path / "run"
    nothing_else = ["train.checkpoint_every=0", "train.eval_every=0"]
    process = start([*settings, *nothing_else, f"run_dir={folder}"])
    wait_for(logged(folder, 2), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    message = finish(process, code=1)
    assert message.endswith(
        f"{folder}: File too large (make room, and the same command continues)\n"
    )


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("single", "truncated"),
        ("single", "missing"),
        ("single", "bit flipped"),
        ("fsdp", "bit flipped"),
        ("zero3", "bit flipped"),
    ],
)
def test_a_damaged_checkpoint(kind: str, damage: str, settings: list[str], tmp_path: Path) -> None:
    """Found by its size or hash; the one before it is used, and that is said."""
    folder = tmp_path / "run"
    many = [] if kind == "single" else ["backend.processes=2"]
    command = [*settings, f"backend={kind}", *many, f"run_dir={folder}"]
    command += ["train.checkpoint_every=6", "train.eval_every=0"]
    process = start(command)
    wait_for(lambda: any((folder / "checkpoints").glob("step-000012")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    newest = newest_checkpoint(folder)
    file = max((newest / "state").rglob("*.*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    place = f"{newest} is damaged and left out: {file.relative_to(newest)}"
    if damage == "truncated":
        file.write_bytes(content[:-1])
        said = f"{place} has {len(content) - 1} bytes, not {len(content)}"
    elif damage == "missing":
        file.unlink()
        said = f"{place} is missing"
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        said = f"{place} has changed (sha256)"
    message = run(command)
    assert f"{said}\n" in message
    before = int(newest.name[5:]) - 6
    assert f"continued after step {before}" in message
    assert (newest.parent / f"damaged-{newest.name}").is_dir(), "nothing is thrown away"
    assert [x["step"] for x in metrics_of(folder) if "train/loss" in x] == list(range(1, 25))


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero2", "zero3"])
def test_a_loss_that_is_not_finite(
    kind: str, settings: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    """What one word of one pair is computed to is no number: the step with that pair is not taken.

    The length of a zero embedding is divided by, which is NaN; weights that are NaN are refused.
    """
    poisoned = tmp_path / "poisoned"
    shutil.copytree(tiny_folder, poisoned)
    (token,) = AutoTokenizer.from_pretrained(poisoned).encode("~", add_special_tokens=False)
    model = AutoModelForCausalLM.from_pretrained(poisoned)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = 0.0
    model.config.rms_norm_eps = 0.0
    model.save_pretrained(poisoned)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows[16]["chosen"][-1]["content"] += " ~"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    command = [*settings, f"backend={kind}", "backend.processes=2", f"run_dir={folder}"]
    message = finish(start([*command, f"model.path={poisoned}"]), code=1)
    match = re.search(r"step (\d+): the loss is not finite; not updated; pairs: (.*)", message)
    assert match, message[-3000:]
    assert match[2] == f"{tmp_path}/train.jsonl train record 17"
    done = int(match[1]) - 1
    assert newest_checkpoint(folder).name == f"step-{done:06d}"
    assert status_of(folder)["state"] == "failed"


@pytest.mark.matrix
def test_another_tokenizer_under_a_run(
    settings: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    """The same settings, but what lies in the tokenizer's folder has changed meanwhile."""
    own = tmp_path / "model"
    shutil.copytree(tiny_folder, own)
    folder = tmp_path / "run"
    command = [*settings, f"model.path={own}", *TWO, f"run_dir={folder}"]
    process = start(command)
    wait_for(logged(folder, 2), process)
    process.send_signal(signal.SIGTERM)
    finish(process, code=75)
    before = json.loads((folder / "data.json").read_text())["train_fingerprint"]
    tokenizer = json.loads((own / "tokenizer.json").read_text())
    del tokenizer["model"]["merges"][-20:]
    (own / "tokenizer.json").write_text(json.dumps(tokenizer))
    Tokenizer.from_file(str(own / "tokenizer.json"))
    message = finish(start(command), code=2)
    pattern = (
        rf"{folder}: the tokenizer changed under this run: tokens_fingerprint was ([0-9a-f]+), is "
        r"([0-9a-f]+) \(restore it, or start anew with run_dir=NEW\)"
    )
    match = re.search(pattern, message)
    assert match and match[1] != match[2], message[-3000:]
    assert json.loads((folder / "data.json").read_text())["train_fingerprint"] == before

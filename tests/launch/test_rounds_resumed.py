"""Rounds that are stopped at an odd moment, damaged, or continued with other settings."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from simpo.config.check import run_yaml
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, DamagedError, DataError, RunError, Stopped
from simpo.config.schema import RunConfig
from simpo.launch.rounds import driver, process
from simpo.launch.rounds.phases import Phase, replies_folder, settings_of
from simpo.launch.rounds.record import done_file, measured, measured_rounds, next_phases
from simpo.launch.rounds.unchanged import check_model, content_of_first, content_of_static
from simpo.on_policy.measures import win_rate
from simpo.run.rounds import ENDED_FILE, Kind, run_folder


class Ended:
    """A process that has ended well."""

    def poll(self) -> int:
        return 0

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int:
        return 0


def composed(*words: str) -> RunConfig:
    return compose_run(["rounds.number=2", "monitor.metric=reply_reward", *words])


def note_done(root: Path, number: int, kind: Kind, part: int = 1) -> None:
    file = done_file(root, Phase(number, kind, part))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"seconds": 1.0}\n')


def plant(root: Path, rounds: int) -> None:
    """A folder of so many rounds that have been trained and measured, as far as its record goes."""
    note_done(root, 1, Kind.check)
    for number in range(1, rounds + 2):
        note_done(root, number, Kind.generate)
        note_done(root, number, Kind.annotate)
        replies_folder(root, number).mkdir(parents=True)
        measures = {"train": {"reward": 0.5}, "test": {"reward": 0.25 * number, "kl": 0.5}}
        (replies_folder(root, number) / "measures.json").write_text(json.dumps(measures))
        if number <= rounds:
            note_done(root, number, Kind.train)
            (run_folder(root, number) / "model").mkdir(parents=True)
            (run_folder(root, number) / "model/config.json").write_text("{}")
            results = {"eval_before": {}, "eval_after": {"loss": 2.0}, "train": {"model_step": 3}}
            (run_folder(root, number) / "results.json").write_text(json.dumps(results))


def test_a_signal_that_comes_too_late_for_a_phase_stops_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(root: Path, phase: Phase, places: int) -> Ended:
        note_done(root, phase.round, phase.kind)
        os.kill(os.getpid(), signal.SIGTERM)
        return Ended()

    monkeypatch.setattr(driver, "_start", started)
    monkeypatch.setattr(Ended, "send_signal", lambda *_: None, raising=False)
    with pytest.raises(Stopped) as told:
        driver.run_phases(composed(), tmp_path, [Phase(1, Kind.train)])
    assert str(told.value) == ("SIGTERM: stopped after round 1, train (the same command continues)")
    assert told.value.exit_code == 75


def test_a_signal_that_comes_too_early_for_a_phase_keeps_it_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = driver.signals_blocked

    @contextmanager
    def blocked() -> Iterator[None]:
        os.kill(os.getpid(), signal.SIGINT)
        with real():
            yield

    def started(*_: object) -> Ended:
        raise AssertionError

    monkeypatch.setattr(driver, "_start", started)
    monkeypatch.setattr(driver, "signals_blocked", blocked)
    with pytest.raises(Stopped) as told:
        driver.run_phases(composed(), tmp_path, [Phase(1, Kind.generate)])
    assert str(told.value) == (
        "interrupted: stopped before round 1, generate (the same command continues)"
    )
    assert told.value.exit_code == 130


def test_a_signal_between_two_phases_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "settle", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.raises(Stopped) as told:
        driver.run_rounds(composed(f"run_dir={tmp_path}"))
    reason = "SIGUSR1: stopped between two phases (the same command continues)"
    assert str(told.value) == reason
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "stopped" and status["error"] == f"Stopped: {reason}"


def test_a_process_that_ends_before_its_phase_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of a reward may end it, and nothing would be left to do but to start it again."""
    monkeypatch.setattr(driver, "_start", lambda *_: Ended())
    with pytest.raises(RunError) as told:
        driver.run_phases(composed(), tmp_path, [Phase(2, Kind.annotate)])
    assert str(told.value) == (
        "round 2, annotate: its process ended with exit code 0 before its end"
    )


def test_parts_that_are_left_share_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second and the last of four; a part without a GPU would generate on the CPU."""
    seen: list[str] = []

    def started(root: Path, phase: Phase, share: dict[str, str]) -> Ended:
        seen.append(share["CUDA_VISIBLE_DEVICES"])
        note_done(root, phase.round, phase.kind, phase.part)
        return Ended()

    monkeypatch.setattr(driver, "_start", started)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    group = [Phase(1, Kind.generate, part) for part in (2, 4)]
    driver.run_phases(composed("rounds.generate_jobs=4"), tmp_path, group)
    assert seen == ["0", "1"]


def test_the_reason_of_the_part_that_failed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part that is ended for it tells a reason of its own, and later."""
    reasons = {1: Stopped("SIGTERM: stopped in round 1, generate"), 2: ConfigError(["no memory"])}

    def run_phase(run: RunConfig, root: Path, phase: Phase) -> None:
        raise reasons[phase.part]

    class Part(Ended):
        def __init__(self, part: int) -> None:
            self.part, self.code = part, None if part == 1 else self.main(part)

        def main(self, part: int) -> int:
            return process.main([str(tmp_path), "1", "generate", str(part)])

        def poll(self) -> int | None:  # type: ignore[override]
            return self.code

        def terminate(self) -> None:
            self.code = self.code or self.main(self.part)

    monkeypatch.setattr(process, "load", lambda _: composed())
    monkeypatch.setattr(process, "run_phase", run_phase)
    monkeypatch.setattr(driver, "_start", lambda root, phase, share: Part(phase.part))
    with pytest.raises(ConfigError) as told:
        driver.run_phases(composed(), tmp_path, [Phase(1, Kind.generate, n) for n in (1, 2)])
    assert told.value.problems == ["round 1, generate, part 2: no memory"]


def test_phases_get_the_settings_of_the_newest_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise Stopped("enough")

    monkeypatch.setattr(driver, "run_phases", stopped)
    for jobs in (1, 3):
        with pytest.raises(Stopped):
            driver.run_rounds(composed(f"run_dir={tmp_path}", f"rounds.generate_jobs={jobs}"))
        assert process.load(tmp_path).rounds.generate_jobs == jobs


def test_replies_of_a_part_that_is_no_more_are_not_lost(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two parts was done when rounds.generate_jobs became 1."""
    (tmp_path / "rewards_of_parts.py").write_text(
        "def length(p, replies, r):\n    return [len(t) for t in replies]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["rounds.number=2", "on_policy.reward=rewards_of_parts:length", "on_policy.seeds=[1,2]"]
    words += ["on_policy.max_new_tokens=4", "on_policy.keep_cut=true", "on_policy.batch_prompts=8"]
    run = compose_run([*tiny_run, *words, f"run_dir={tmp_path}"])
    two = replace(run, rounds=replace(run.rounds, generate_jobs=2))
    process.run_phase(two, tmp_path, Phase(1, Kind.generate, 1))
    process.run_phase(run, tmp_path, Phase(1, Kind.annotate))
    # Two replies to each of 12 train prompts and 16 held-out ones.
    scores = (replies_folder(tmp_path, 1) / "reply_scores.jsonl").read_text().splitlines()
    assert len({(line["id"], line["seed"]) for line in map(json.loads, scores)}) == 56
    # What later rounds must find the same.
    done = json.loads((tmp_path / "rounds/1/annotate.json").read_text())
    assert {json.loads(line)["reward"] for line in scores} == {done["reward"]}
    # Who is killed when all is written does it again.
    measures = (replies_folder(tmp_path, 1) / "measures.json").read_bytes()
    process.run_phase(run, tmp_path, Phase(1, Kind.annotate))
    assert (replies_folder(tmp_path, 1) / "measures.json").read_bytes() == measures
    # In the first round there is no model to end with.
    train = replace(run.train, pairs_per_step=64, epochs=1, max_steps=None, warmup_ratio=0.1)
    with pytest.raises(ConfigError) as few:
        process.run_phase(replace(run, train=train), tmp_path, Phase(1, Kind.annotate))
    number = len((replies_folder(tmp_path, 1) / "train.jsonl").read_text().splitlines())
    assert few.value.problems == [
        f"train.pairs_per_step: the replies of round 1 give {number} pairs, a run of 1 step, and "
        "the warm-up begins at learning rate 0: no weight would change (lower it, or more pairs by "
        "on_policy.num_prompts, on_policy.seeds, on_policy.max_new_tokens or rounds.prompts=all, "
        "or train.warmup_ratio=0)"
    ]

    # A win rate over fewer of them would be another number.
    held_out = [line for line in scores if '"split": "test"' in line]
    (replies_folder(tmp_path, 1) / "reply_scores.jsonl").write_text("\n".join(held_out[3:]) + "\n")
    with pytest.raises(DamagedError) as damaged:
        win_rate(replies_folder(tmp_path, 1), replies_folder(tmp_path, 1))
    assert str(damaged.value) == (
        f"{replies_folder(tmp_path, 1)}/reply_scores.jsonl: has 29 scores of test replies, "
        "measures.json counts 32 (run simpo annotate again)"
    )

    # Pairs that change before they are trained on.
    with pytest.raises(DamagedError) as damaged:
        pairs = replies_folder(tmp_path, 1) / "train.jsonl"
        pairs.write_text("".join(pairs.read_text().splitlines(True)[1:]))
        process.run_phase(run, tmp_path, Phase(1, Kind.train))
    assert str(damaged.value) == (
        f"{pairs}: is not as it was written (remove {tmp_path}/rounds/1/annotate.json: the same "
        "command writes both anew)"
    )

    # Data that change in between would give later rounds other prompts.
    process.run_phase(
        replace(run, train=replace(run.train, check_memory=False)), tmp_path, Phase(1, Kind.check)
    )
    (tmp_path / "train.jsonl").write_text(
        (tmp_path / "train.jsonl").read_text().replace("the", "this")
    )
    with pytest.raises(DataError) as told:
        process.run_phase(run, tmp_path, Phase(1, Kind.generate))
    assert str(told.value) == (
        "data.sources: the prompts changed under these rounds (restore them, or start anew with "
        "run_dir=NEW)"
    )


def trained(root: Path, number: int) -> None:
    """What the training of a round leaves."""
    folder = run_folder(root, number)
    (folder / "model").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "README.md", "curves.png"):
        (folder / "model" / name).write_text(f"{name}\n")
    results = {"eval_after": {}, "train": {"steps": 3, "model_step": 3}}
    (folder / "results.json").write_text(json.dumps(results))


@pytest.mark.parametrize("fault", ["is not as it was written", "is missing"])
def test_a_model_that_is_damaged_between_rounds(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = composed(f"run_dir={tmp_path}")
    replies_folder(tmp_path, 1).mkdir(parents=True)
    (replies_folder(tmp_path, 1) / "train.jsonl").touch()
    monkeypatch.setattr(process, "start", lambda *_, **__: trained(tmp_path, 1))
    process.run_phase(run, tmp_path, Phase(1, Kind.train))
    model, done = tmp_path / "rounds/1/run/model", tmp_path / "rounds/1/train.json"
    for name in ("README.md", "curves.png"):
        (model / name).write_text("A card that was written again.\n")
    check_model(tmp_path, 1)
    if fault == "is missing":
        (model / "model.safetensors").unlink()
    else:
        (model / "model.safetensors").write_text("model.safetensort\n")
    for kind in (Kind.generate, Kind.train):
        with pytest.raises(DamagedError) as told:
            process.run_phase(run, tmp_path, Phase(2, kind))
        assert str(told.value) == (
            f"{model}/model.safetensors: {fault} (remove {tmp_path}/rounds/1/run and {done}: the "
            "same command trains it anew)"
        )


def test_of_processes_that_train_together_one_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks of a job would write the same files at the same moment."""
    (tmp_path / "command.txt").write_text("python -m simpo.train rounds.number=2\n")
    replies_folder(tmp_path, 1).mkdir(parents=True)
    (replies_folder(tmp_path, 1) / "train.jsonl").touch()
    monkeypatch.setattr(process, "start", lambda *_, **__: trained(tmp_path, 1))
    process.run_phase(composed(), tmp_path, Phase(1, Kind.train), is_main=False)
    assert not (tmp_path / "rounds/1/train.json").exists()
    assert not (tmp_path / "rounds/1/run/command.txt").exists()
    monkeypatch.setattr(process, "start", lambda *_, **__: None)
    process.run_phase(composed(), tmp_path, Phase(1, Kind.train))
    assert (tmp_path / "rounds/1/train.json").is_file()
    assert (tmp_path / "rounds/1/run/command.txt").is_file()


@pytest.mark.parametrize("split", ["train", "test"])
def test_static_pairs_that_change_between_rounds(
    split: str, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their prompts stay the same."""
    words = [*tiny_run, "rounds.number=2", "on_policy.reward=rules", "rounds.static_weight=0.5"]
    run = compose_run([*words, f"run_dir={tmp_path}"])
    (tmp_path / "rounds/1/replies").mkdir(parents=True)
    (tmp_path / "rounds/1/replies/train.jsonl").touch()
    checked = {"static pairs": content_of_static(run)}
    (tmp_path / "rounds/1/check.json").write_text(json.dumps(checked))
    monkeypatch.setattr(process, "start", lambda *_, **__: trained(tmp_path, 1))
    process.run_phase(run, tmp_path, Phase(1, Kind.train))
    *others, last = map(json.loads, (tmp_path / f"{split}.jsonl").read_text().splitlines())
    last["rejected"] = [{"role": "assistant", "content": "other"}]
    lines = [json.dumps(record) + "\n" for record in (*others, last)]
    (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    with pytest.raises(DataError) as told:
        process.run_phase(run, tmp_path, Phase(1, Kind.train))
    assert str(told.value) == (
        "data.sources: the pairs changed under these rounds (restore them, or start anew with "
        "run_dir=NEW)"
    )


@pytest.mark.parametrize(
    ("phase", "words"),
    [(Phase(1, Kind.generate), []), (Phase(2, Kind.annotate), []),
     (Phase(2, Kind.train), ["rounds.start=first"])],
)  # fmt: skip
def test_a_first_model_that_changes_between_rounds(
    phase: Phase, words: list[str], tmp_path: Path
) -> None:
    """Replies are compared with its own, and training may begin with it."""
    plant(tmp_path, 2)
    first = tmp_path / "first"
    first.mkdir()
    (first / "config.json").write_text("{}")
    run = composed(f"model.path={first}", "model.lora.rank=0", *words)
    begun = {"first model": content_of_first(run)}
    (tmp_path / "rounds/1/check.json").write_text(json.dumps(begun))
    (first / "model.safetensors").touch()
    with pytest.raises(ConfigError) as told:
        process.run_phase(run, tmp_path, phase)
    assert told.value.problems == [
        f"model.path: {first} changed under these rounds (restore it, or start anew with "
        "run_dir=NEW)"
    ]


@pytest.mark.parametrize("other", [1, 3])
def test_a_reward_that_changes_between_rounds(
    other: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before a reply is scored; also where the replies of an earlier round are again."""
    (tmp_path / "rewards_of_rounds.py").write_text("def length(p, replies, r):\n    return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    plant(tmp_path, 2)
    done = {"seconds": 1.0, "reward": "0123456789abcdef"}
    (tmp_path / f"rounds/{other}/annotate.json").write_text(json.dumps(done))
    monkeypatch.setattr(process, "lacks_replies", lambda _: False)
    run = composed("on_policy.reward=rewards_of_rounds:length", "model.lora.rank=0")
    with pytest.raises(ConfigError) as told:
        process.run_phase(run, tmp_path, Phase(2, Kind.annotate))
    assert told.value.problems == [
        "on_policy.reward: rewards_of_rounds:length changed since the replies of round "
        f"{other} were scored (restore it, or start anew with run_dir=NEW)"
    ]


def test_an_error_that_cannot_be_noted_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a full disk."""
    (tmp_path / "rounds/2/error.txt").mkdir(parents=True)
    (tmp_path / "run.yaml").write_text(run_yaml(composed()))
    assert process.main([str(tmp_path), "2", "generate", "1"]) == 2
    assert capfd.readouterr().err == (
        f"{tmp_path}/rounds/1/run/model: holds no model (remove {tmp_path}/rounds/1/run and "
        f"{tmp_path}/rounds/1/train.json: the same command trains it anew)\n"
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "is missing (remove {done}: the same command writes both anew)"),
        ("", "is empty (remove it and {done}: the same command writes both anew)"),
        (
            '{"train": {"reward": 0.5}}',
            "lacks numbers of held-out replies (remove it and {done}: the same command writes both "
            "anew)",
        ),
        (
            '{"test": {"reward": "0.5"}}',
            "lacks numbers of held-out replies (remove it and {done}: the same command writes both "
            "anew)",
        ),
        (
            '{"test": []}',
            "lacks numbers of held-out replies (remove it and {done}: the same command writes both "
            "anew)",
        ),
    ],
)
def test_damaged_measures(text: str | None, fault: str, tmp_path: Path) -> None:
    plant(tmp_path, 1)
    file = tmp_path / "rounds/2/replies/measures.json"
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(DamagedError) as told:
        measured(tmp_path, 1)
    done = tmp_path / "rounds/2/annotate.json"
    assert str(told.value) == f"{file}: {fault.format(done=done)}"
    # What it says is what the same command then does.
    done.unlink()
    assert measured_rounds(tmp_path) == [0]
    assert next_phases(composed(), tmp_path) == [Phase(2, Kind.annotate)]


@pytest.mark.parametrize("ended", [False, True])
def test_a_run_of_a_round_that_is_gone(ended: bool, tmp_path: Path) -> None:
    plant(tmp_path, 2)
    if ended:
        (tmp_path / ENDED_FILE).write_text("enough\n")
    run = composed("rounds.number=3")
    following = [] if ended else [Phase(3, Kind.train)]
    assert next_phases(run, tmp_path) == following
    folder, done = tmp_path / "rounds/1/run", tmp_path / "rounds/1/train.json"
    (folder / "results.json").write_text("{")
    for fault in ("is not JSON", "is missing"):
        with pytest.raises(DamagedError) as told:
            measured(tmp_path, 1)
        assert str(told.value) == (
            f"{folder}/results.json: {fault} (remove {folder} and {done}: the same command trains "
            "it anew)"
        )
        (folder / "results.json").unlink(missing_ok=True)
    shutil.rmtree(folder)
    done.unlink()
    assert measured_rounds(tmp_path) == [0]
    assert next_phases(run, tmp_path) == [Phase(1, Kind.train)]
    note_done(tmp_path, 1, Kind.train)
    assert next_phases(run, tmp_path) == following


def test_the_same_folder_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    for phase in (Phase(2, Kind.generate), Phase(2, Kind.train)):
        own, linked = (settings_of(composed(), tmp_path / name, phase) for name in ("out", "link"))
        assert own == linked


def test_rounds_that_were_mended_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but training was left, after which rounds do not end otherwise."""
    plant(tmp_path, 2)
    results = (run_folder(tmp_path, 1) / "results.json").read_text()
    shutil.rmtree(run_folder(tmp_path, 1))
    (tmp_path / "rounds/1/train.json").unlink()

    def trained(run: RunConfig, root: Path, group: list[Phase], _: object) -> None:
        assert group == [Phase(1, Kind.train)]
        run_folder(root, 1).mkdir()
        (run_folder(root, 1) / "results.json").write_text(results)
        note_done(root, 1, Kind.train)

    monkeypatch.setattr(driver, "run_phases", trained)
    driver.run_rounds(composed(f"run_dir={tmp_path}"))
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "finished" and (tmp_path / "model").resolve() == (
        run_folder(tmp_path, 2) / "model"
    )

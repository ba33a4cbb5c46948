"""What the terminal shows of rounds, and what their phases say that they have done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpo.config.check import run_yaml
from simpo.config.compose import compose_run
from simpo.config.schema import RunConfig
from simpo.launch.rounds import outcome
from simpo.launch.rounds.driver import others_note
from simpo.launch.rounds.phases import Phase
from simpo.launch.rounds.record import done_file
from simpo.launch.rounds.terminal import Terminal, log_file
from simpo.run.folder import new_folder
from simpo.run.rounds import Kind


def composed(*words: str) -> RunConfig:
    return compose_run(["rounds.number=2", "monitor.metric=reply_reward", *words])


def finish(root: Path, phase: Phase, seconds: float, text: str) -> None:
    done_file(root, phase).write_text(json.dumps({"seconds": seconds, "text": text}))


def test_a_line_as_a_phase_begins_and_ends_and_each_note_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(composed(), tmp_path)
    for number in (1, 2, 3):
        (tmp_path / f"rounds/{number}").mkdir(parents=True)
        group = [Phase(number, Kind.generate, part) for part in (1, 2)]
        logs = [log_file(tmp_path, phase) for phase in group]
        logs[0].write_text("note   of a process before\n")
        terminal.begin(group)
        with logs[0].open("a") as first, logs[1].open("a") as second:
            first.write(f"folder {tmp_path}/rounds/{number}/replies\nmodel  a: 1.0M weights\n")
            first.write(f"note   {tmp_path}/rounds/{number}/replies/train.jsonl: read as pairs\n")
            first.write(f"note   {tmp_path}/rounds/{number}/run/model is large\nnote   a.jsonl: re")
            first.flush()
            second.write(f"judge  x: {number} queries\n")
            second.flush()
            terminal.follow()
            first.write("ad as prompts\n")
            first.flush()
            terminal.follow()
        finish(tmp_path, group[0], 96.0, "16 prompts")
        finish(tmp_path, group[1], 30.0, "16 prompts")
        terminal.end(group)
    assert capsys.readouterr().out.splitlines() == [
        "round 1 of 2: generate ...",
        "note   rounds/1/run/model is large",
        "judge  x: 1 queries",
        "note   a.jsonl: read as prompts",
        "round 1 of 2: generate: 16 prompts (1.6 min)",
        "round 2 of 2: generate ...",
        "judge  x: 2 queries",
        "round 2 of 2: generate: 16 prompts (1.6 min)",
        "after round 2: generate, held-out prompts ...",
        "judge  x: 3 queries",
        "after round 2: generate, held-out prompts: 16 prompts (1.6 min)",
    ]


def test_what_phases_have_done(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("{}\n" * 5)
    run = composed("on_policy.seeds=[1,2,3]")
    assert outcome.of_generating(tmp_path, run) == "5 prompts, 3 replies each"
    (tmp_path / "train.jsonl").write_text("{}\n" * 2)
    (tmp_path / "test.jsonl").write_text("")
    measures = {"train": {"prompts": 3}, "test": {"prompts": 2}}
    (tmp_path / "measures.json").write_text(json.dumps(measures))
    told = "2 pairs of 3 train prompts, 0 pairs of 2 held-out prompts"
    assert outcome.of_annotating(tmp_path) == told
    results = {"eval_after": {}, "train": {"steps": 1, "model_step": 1}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert outcome.of_training(tmp_path) == "1 step"


def test_rounds_that_begin_anew_say_which_they_leave(tmp_path: Path) -> None:
    """A user who changes a setting and means to continue."""
    before = composed(f"output_dir={tmp_path}", "loss.beta=2")
    root = new_folder(before)
    (root / "rounds/1/replies").mkdir(parents=True)
    (root / "run.yaml").write_text(run_yaml(before))
    assert others_note(before) == []
    now = composed(f"output_dir={tmp_path}", "loss.beta=3", "train.epochs=2")
    epochs = before.train.epochs
    assert others_note(now) == [
        f"note   begins anew: the rounds in {root}, which have not finished, have loss.beta=2.0, "
        f"train.epochs={epochs}"
    ]
    assert others_note(composed("loss.beta=3", f"run_dir={tmp_path}/own")) == []
    status = {"state": "finished", "step": 2, "total_steps": 2, "error": ""}
    (root / "status.json").write_text(json.dumps(status))
    assert others_note(now) == []

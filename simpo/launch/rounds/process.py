"""Runs one phase of rounds: `python -m simpo.launch.rounds.process FOLDER ROUND KIND PART`.

FOLDER holds run.yaml, which says what the rounds are.
"""

from __future__ import annotations

from simpo.run.parent import die_with_parent
from simpo.run.rounds import Kind, error_file
from simpo.run.signals import exit_on_signals

if __name__ == "__main__":
    exit_on_signals("", "")  # the process that started this one says it
    die_with_parent()

import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from simpo.config.check import check_run, load_run
from simpo.config.errors import INTERRUPTED, ConfigError, SimpoError
from simpo.config.flat import holds_secret
from simpo.config.schema import RunConfig
from simpo.launch.rounds import outcome
from simpo.launch.rounds.by_hand import commands_of
from simpo.launch.rounds.phases import begins_with, replies_folder, settings_of
from simpo.launch.rounds.record import (
    MEASURES,
    kept_round,
    measured,
    measured_rounds,
    needs_best,
    noted,
    nothing_to_learn,
    pairs_of,
)
from simpo.launch.rounds.unchanged import (
    CHECK,
    CONTENT,
    PROMPTS,
    REWARD_CONTENT,
    check_inputs,
    check_reward,
    content_of_model,
    content_of_pairs,
)
from simpo.launch.start import start
from simpo.run.atomic import make_folder, write_json, write_text
from simpo.run.files import read_status
from simpo.run.processes import end_process
from simpo.run.progress import print_all_letters, say
from simpo.run.rounds import Phase, done_file, run_folder
from simpo.run.signals import set_stopped_exit_code, stopping_at_once
from simpo.run.unused import hide_unused

OWN_NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
"""Names of folders that runs make themselves."""


def run_phase(run: RunConfig, root: Path, phase: Phase, is_main: bool = True) -> None:
    """Run one phase, or continue it, in this process, and note that it is done.

    Args:
        is_main: of several processes that train together, the one that checks and notes.

    Raises:
        SimpoError: as its own command does.
    """
    begin = time.perf_counter()
    best = _best(run, root) if phase.kind is Kind.train else 0
    own = settings_of(run, root, phase, best)
    hide_unused(own)
    if is_main:
        check_inputs(run, root, phase, begins_with(run, phase, best))
    check_run(own)
    set_stopped_exit_code(run.train.stopped_exit_code)
    if is_main and phase.kind is not Kind.check:
        _write_commands(run, own, root, phase)
    if own.train != run.train:
        say("note   no held-out pair in this round: the last model is saved, not the best")
    if phase.kind is Kind.train:
        folder = run_folder(root, phase.round)
        if read_status(folder).get("state") != "finished":
            start(own, own_process=True)
        if not is_main:
            return
        # The next round begins with the model, and three rounds of them would fill the disk.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        text, content = outcome.of_training(folder), content_of_model(root, phase.round)
        done: dict[str, Any] = {"text": text, CONTENT: content}
    else:
        with stopping_at_once(f"stopped in {phase.text()}", run.train.stopped_exit_code):
            done = _reply(run, own, root, phase)
    make_folder(done_file(root, phase).parent)
    took_s = round(time.perf_counter() - begin, 3)
    write_json(done_file(root, phase), {"seconds": took_s, **done})


def _write_commands(run: RunConfig, own: RunConfig, root: Path, phase: Phase) -> None:
    """Write command.txt into the folder of a phase, if words can say its settings `own`.

    Of parts that generate at the same time the first writes it.
    """
    if phase.part == 1 and (commands := commands_of(root, own, phase)):
        place = run_folder if phase.kind is Kind.train else replies_folder
        make_folder(place(root, phase.round))
        write_text(place(root, phase.round) / "command.txt", commands, holds_secret(run))


def _best(run: RunConfig, root: Path) -> int:
    """The round with the best model so far; 0, the first model, if it does not matter."""
    if not needs_best(run):
        return 0
    found = {number: measured(root, number).get("eval", {}) for number in measured_rounds(root)}
    return kept_round(run, found) if len(found) > 1 else 0


def _reply(run: RunConfig, own: RunConfig, root: Path, phase: Phase) -> dict[str, Any]:
    """Do what is not training; `own` are the settings of the phase.

    Returns:
        What the file that says that it is done tells beside the seconds; see `done_file`.
    """
    if phase.kind is Kind.check:
        from simpo.launch.rounds.preflight import check_rounds

        text, content = check_rounds(run, own)
        return {"text": text, **content}
    from simpo.on_policy.generate import generate

    folder = replies_folder(root, phase.round)
    checked = noted(root, CHECK).get(PROMPTS)
    if phase.kind is Kind.generate:
        generate(own, _alike(root) if phase.round == 1 else (), checked)
        return {"text": outcome.of_generating(folder, own)}
    if lacks_replies(folder):  # of a part that another number of rounds.generate_jobs had
        whole = replace(own, on_policy=replace(own.on_policy, parts=1, part=1))
        generate(whole, wanted=checked)
    reward = _annotate(run, own, root, phase)
    return {
        "text": outcome.of_annotating(folder),
        CONTENT: content_of_pairs(root, phase.round),
        REWARD_CONTENT: reward,
    }


def _annotate(run: RunConfig, own: RunConfig, root: Path, phase: Phase) -> str:
    """Score the replies of a round and measure them.

    Returns:
        The hash of the reward.

    Raises:
        ConfigError: the reward is not that of other rounds; or the first round has too few pairs:
            there is no model to end with.
    """
    from simpo.judging.ratings import open_ratings
    from simpo.on_policy.annotate import KEY, annotate
    from simpo.on_policy.drift import measure_drift
    from simpo.on_policy.measures import read_measures, win_rate, write_measures
    from simpo.on_policy.rewards import reward_content

    folder, name = replies_folder(root, phase.round), own.on_policy.reward
    assert name is not None
    rater = open_ratings(own)
    content = reward_content(own, KEY, name) if rater is None else rater.content
    check_reward(run, root, phase.round, content)
    # With a model of theirs, rounds that can learn nothing more have come to their end.
    annotate(own, rater, demanding=phase.round == 1)
    measure_drift(own, run.model)
    measures = read_measures(folder)
    measures["test"]["win_rate"] = win_rate(folder, replies_folder(root, 1))
    if phase.round > 1:
        before = replies_folder(root, phase.round - 1)
        measures["test"]["gain_rate"] = win_rate(folder, before)
    write_measures(folder, measures, MEASURES)
    pairs = pairs_of(root, phase.round)
    if phase.round == 1 and (reason := nothing_to_learn(run, pairs, 1)):
        raise ConfigError([reason])
    return content


def _alike(root: Path) -> list[Path]:
    """Folders of first replies beside this one, the newest first; the first model's replies do not
    depend on how it is trained. A folder that the user named stands alone."""
    if not (OWN_NAME.fullmatch(root.name) or (root / "jobs.jsonl").is_file()):
        return []
    found = [one for one in root.parent.glob("*") if one != root]
    return [replies_folder(one, 1) for one in sorted(found, reverse=True)]


def lacks_replies(folder: Path) -> bool:
    """Whether a folder lacks prompts, or replies to them with some seed."""
    from simpo.on_policy.files import lacking_replies, read_prompts, read_stored_replies

    prompts = read_prompts(folder)
    return not prompts or lacking_replies(folder, prompts, read_stored_replies(folder))[0] > 0


def load(root: Path) -> RunConfig:
    """The settings of the rounds of a folder.

    Raises:
        ConfigError: they cannot be read.
    """
    return replace(load_run(root / "run.yaml"), run_dir=str(root))


def main(words: list[str]) -> int:
    """Run the phase that the words name; returns the exit code."""
    name, number, kind, part = words
    root, phase = Path(name), Phase(int(number), Kind(kind), int(part))
    print_all_letters()
    try:
        run_phase(load(root), root, phase)
    except SimpoError as error:
        try:
            error_file(root, phase).write_text(f"{error}\n", errors="backslashreplace")
        except OSError:  # the disk may be full, which the error may be about
            print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))

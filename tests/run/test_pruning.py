"""What a trial decides about itself, beside a study in which Optuna runs all trials itself."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from simpo.config.choices import Mode
from simpo.config.compose import compose_run
from simpo.config.errors import DamagedError, Pruned
from simpo.run.files import PRUNING
from simpo.run.folder import RunFolder
from simpo.run.pruning import Ended, Pruner, Pruning, read_pruning
from simpo.run.runs import State, read_progress
from tests.support.made_runs import make

if TYPE_CHECKING:
    from optuna import Study
    from optuna.pruners import BasePruner

optuna = pytest.importorskip("optuna")
STEPS = (3, 6, 9, 12)


def curves(number: int) -> list[dict[int, float]]:
    """Noisy curves of very different trials, some of which become NaN."""
    draw = random.Random(7)
    found = []
    for index in range(number):
        level = draw.uniform(0.2, 0.9)
        values = {step: level + step / 50 + draw.gauss(0, 0.05) for step in STEPS}
        if index % 6 == 5:
            values |= {step: math.nan for step in STEPS[1 + index % 3 :]}
        found.append(values)
    return found


def told_by_optuna(study: Study, own: list[dict[int, float]]) -> list[int | None]:
    """The step after which each trial was pruned in one study; the last evaluation ends a trial."""
    found: list[int | None] = []
    for values in own:
        trial, pruned = study.ask(), None
        for step, value in values.items():
            trial.report(value, step)
            if trial.should_prune() and step != STEPS[-1]:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                pruned = step
                break
        else:
            study.tell(trial, values[STEPS[-1]])
        found.append(pruned)
    return found


def told_by_trials(
    folder: Path, pruning: Pruning, mode: Mode, own: list[dict[int, float]]
) -> list[int | None]:
    """The same by processes of their own, each with the file of its folder."""
    ended: list[Ended] = []
    found: list[int | None] = []
    for values in own:
        now = Pruning(
            pruning.pruner, pruning.startup_trials, pruning.warmup_steps, trials=tuple(ended)
        )
        (folder / PRUNING).write_text(now.text())
        seen: dict[int, float] = {}
        for step, value in values.items():
            seen[step] = value
            read = read_pruning(folder)
            assert read is not None
            if step != STEPS[-1] and read.is_hopeless(mode, seen):
                ended.append(Ended(seen, None))
                found.append(step)
                break
        else:
            ended.append(Ended(values, values[STEPS[-1]]))
            found.append(None)
    return found


@pytest.mark.filterwarnings("ignore:.*nan is not acceptable", "ignore:All-NaN")
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(
    ("pruning", "pruner"),
    [
        (Pruning(Pruner.median, 4, 0), lambda: optuna.pruners.MedianPruner(n_startup_trials=4)),
        (
            Pruning(Pruner.median, 1, 7),
            lambda: optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=7),
        ),
        # It keeps what it finds about the first study.
        (Pruning(Pruner.halving, 0, 0), lambda: optuna.pruners.SuccessiveHalvingPruner()),
        (
            Pruning(Pruner.halving, 0, 3),
            lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=3),
        ),
    ],
    ids=["median", "median-warmup", "halving", "halving-warmup"],
)
def test_a_trial_decides_as_optuna_in_one_process(
    pruning: Pruning, pruner: Callable[[], BasePruner], mode: Mode, tmp_path: Path
) -> None:
    own = curves(18)
    direction = {Mode.max: "maximize", Mode.min: "minimize"}[mode]
    expected = told_by_optuna(optuna.create_study(direction=direction, pruner=pruner()), own)
    assert told_by_trials(tmp_path, pruning, mode, own) == expected
    assert None in expected and set(expected) & set(STEPS)


def test_numbers_by_hand() -> None:
    """The median of 0.6, 0.7 and 0.8 is 0.7; who was pruned does not count."""
    trials = (*(Ended({3: v, 6: 0.9}, 0.9) for v in (0.6, 0.7, 0.8)), Ended({3: 0.1}, None))
    for startup, worse in ((3, True), (4, False)):
        pruning = Pruning(Pruner.median, startup, 0, trials)
        assert pruning.is_hopeless(Mode.max, {3: 0.69}) is worse
        assert pruning.is_hopeless(Mode.min, {3: 0.71}) is worse
        assert not pruning.is_hopeless(Mode.max, {3: 0.7})
        assert not pruning.is_hopeless(Mode.min, {3: 0.7})
    # One in four goes on from each rung of halving, but not before enough trials have finished.
    for startup, worse in ((3, True), (4, False)):
        halving = Pruning(Pruner.halving, startup, 3, trials)
        assert halving.is_hopeless(Mode.max, {3: 0.79}) is worse
        assert not halving.is_hopeless(Mode.max, {3: 0.81})


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("pruner", [Pruner.median, Pruner.halving])
def test_a_metric_that_is_no_number_is_pruned(pruner: Pruner) -> None:
    pruning = Pruning(pruner, 1, 3, (Ended({3: 0.5, 6: 0.5}, 0.5),))
    assert pruning.is_hopeless(Mode.max, {3: math.nan})


@pytest.mark.parametrize(
    "text",
    [
        '{"pruner": "best", "startup_trials": 1, "warmup_steps": 0, "trials": []}',
        '{"pruner": "median", "startup_trials": 1, "trials": []}',
        '{"pruner": "median", "startup_trials": 1, "warmup_steps": 0, "trials": [{"values": 3}]}',
    ],
)
def test_a_damaged_file(text: str, tmp_path: Path) -> None:
    assert read_pruning(tmp_path) is None
    path = tmp_path / PRUNING
    path.write_text(text)
    with pytest.raises(DamagedError) as error:
        read_pruning(tmp_path)
    assert str(error.value) == (
        f"{path}: is not as a sweep writes it (remove it: the sweep's command writes it anew, and "
        "nothing else prunes the run)"
    )


def test_a_pruned_run_goes_on_if_started_by_hand(tmp_path: Path) -> None:
    """It is a state of its own on the disk; who starts the run again wants it whole."""
    path = make(tmp_path / "run", state="running")
    run = compose_run([f"run_dir={path}"])
    (path / "run.yaml").unlink()
    (path / PRUNING).write_text(Pruning(Pruner.median, 0, 0).text())
    folder = RunFolder(run)
    assert read_progress([path])[0].state is State.running  # locked
    with pytest.raises(Pruned), folder.recording_failure():
        raise Pruned("hopeless")
    (progress,) = read_progress([path])
    assert (progress.state, progress.note) == (State.pruned, "Pruned: hopeless")
    assert progress.text() == "pruned, step 20 of 40"
    assert (path / PRUNING).exists()
    again = RunFolder(run)
    assert again.notes == ["note   goes on to its end now; before: Pruned: hopeless"]
    assert not again.finished and not (path / PRUNING).exists()


FIRST, LAST = "hydra.sweeper.pruner: ", ", or hydra.sweeper.pruner=none)"
NEVER = [
    (
        ["train.eval_every=0"],
        "train.eval_every: 0, so trials are evaluated at their end only and none can be pruned "
        f"(set it{LAST}",
    ),
    (
        ["train.max_steps=8"],
        "train.eval_every: 4, so trials of 8 steps are not evaluated from step 5 on before their "
        f"end and none can be pruned (set it lower{LAST}",
    ),
    (
        ["monitor.metric=win_rate", "benchmark=pairs"],
        f"{FIRST}monitor.metric=win_rate is known at the end of a run only (choose a held-out "
        f"metric{LAST}",
    ),
    (["train.max_steps=9"], None),
]


@pytest.mark.parametrize(("overrides", "message"), NEVER, ids=lambda value: str(value)[:40])
def test_trials_that_could_never_be_pruned(overrides: list[str], message: str | None) -> None:
    run = compose_run(["train.eval_every=4", *overrides])
    problems = [*Pruning(Pruner.median, 0, 5).problems(run)]
    assert problems == ([] if message is None else [message])


def test_trials_with_nothing_held_out_cannot_be_pruned(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    source = f"data.sources=[{{path: {tmp_path}/a.jsonl}}]"
    run = compose_run(["data=jsonl", source, "train.eval_every=1"])
    assert [*Pruning(Pruner.halving, 0, 0).problems(run)] == [
        f"{FIRST}nothing is held out, so trials cannot be compared (test_split or test_path of "
        f"data.sources{LAST}"
    ]


def test_where_a_trial_could_have_been_pruned() -> None:
    pruning = Pruning(Pruner.median, 0, 5)
    assert pruning.decides_on(Ended({4: 1.0, 8: 1.0, 12: 1.0}, 1.0))
    assert not pruning.decides_on(Ended({4: 1.0, 8: 1.0}, 1.0))
    assert not pruning.decides_on(Ended({}, 1.0))

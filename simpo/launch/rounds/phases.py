"""The phases of rounds, and the settings and folder of each.

A run with `rounds.number` has this in its folder beside what others have; its steps are rounds.

    rounds/1/replies/    what `simpo generate` and `simpo annotate` write: the first model's replies
    rounds/1/run/        the run that trains on their pairs
    rounds/2/replies/    replies of the model of rounds/1/run, and so on
    rounds/4/replies/    after three rounds: replies to the held-out prompts alone
    rounds/1/*.json      the phases that are done, with their seconds
    rounds/1/*.log       what the phases printed
    rounds/ended.txt     why the rounds ended before the last
    model                a link to the model that was kept

Each is an ordinary folder, whose command.txt has the commands that do the same by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from simpo.config.backends import SingleConfig
from simpo.config.choices import Dtype, Mode, RoundPrompts, RoundStart
from simpo.config.data import SourceConfig
from simpo.config.launchers import LocalConfig
from simpo.config.models import ModelConfig
from simpo.config.on_policy import OnPolicyConfig
from simpo.config.rounds import RoundsConfig
from simpo.config.schema import MonitorConfig, RunConfig
from simpo.run.rounds import Kind, Phase, round_folder, run_folder

OWN_SET = "on_policy"
"""Name of the held-out set of a round's own pairs, beside those of static data."""


def phases(run: RunConfig) -> Iterator[Phase]:
    """All phases of the rounds of a run, in order."""
    yield Phase(1, Kind.check)
    for number in range(1, run.rounds.number + 2):
        for part in range(1, run.rounds.generate_jobs + 1):
            yield Phase(number, Kind.generate, part)
        yield Phase(number, Kind.annotate)
        if number <= run.rounds.number:
            yield Phase(number, Kind.train)


def replies_folder(root: Path, number: int) -> Path:
    """The folder of the replies with which a round begins; those after the last round come next."""
    return round_folder(root, number) / "replies"


def settings_of(run: RunConfig, root: Path, phase: Phase, best: int = 0) -> RunConfig:
    """The settings of a phase, as its own command would compose them.

    Args:
        best: the round whose model is the best so far; 0: the first model.
    """
    # The same folder by another name, through a link, is no other setting.
    root = root.resolve()
    alone = replace(run, rounds=RoundsConfig(), launcher=LocalConfig(), run_dir=None)
    if phase.kind is Kind.train:
        return _training(alone, run, root, phase.round, begins_with(run, phase, best))
    return replace(
        alone,
        model=model_after(run, root, begins_with(run, phase)),
        backend=SingleConfig(name="single", device=run.backend.device),
        on_policy=_replies(run, root, phase),
    )


def begins_with(run: RunConfig, phase: Phase, best: int = 0) -> int:
    """The round whose model a phase loads; 0: the first model.

    Args:
        best: as of `settings_of`.
    """
    newest = phase.round - 1
    if phase.kind is not Kind.train:
        return newest
    return {RoundStart.last: newest, RoundStart.first: 0, RoundStart.best: best}[run.rounds.start]


def model_after(run: RunConfig, root: Path, number: int) -> ModelConfig:
    """Settings that load the model of a round to train it further; 0: the first model."""
    if number == 0:
        return run.model
    saved = str(run_folder(root, number) / "model")
    model = run.model
    if model.lora.used:
        return replace(model, lora=type(model.lora)(adapter=saved))
    return replace(model, path=saved, revision=None, tokenizer=None, chat_template=None)


def slices_of(run: RunConfig) -> int:
    """The number of slices that the train prompts are dealt into."""
    return run.rounds.number if run.rounds.prompts is RoundPrompts.slices else 1


def _replies(run: RunConfig, root: Path, phase: Phase) -> OnPolicyConfig:
    rounds, own = run.rounds, run.on_policy
    last = phase.round > rounds.number
    slices = 1 if last else slices_of(run)
    return replace(
        own,
        folder=str(replies_folder(root, phase.round)),
        slices=slices,
        slice=phase.round if slices > 1 else 1,
        held_out_only=last,
        parts=rounds.generate_jobs,
        part=phase.part,
        choice=rounds.choice or own.choice,
    )


def _training(alone: RunConfig, run: RunConfig, root: Path, number: int, start: int) -> RunConfig:
    replies = replies_folder(root, number)
    held_out = replies / "test.jsonl"
    own = SourceConfig(
        path=str(replies / "train.jsonl"),
        test_path=str(held_out) if held_out.is_file() and held_out.stat().st_size else None,
        held_out_name=OWN_SET,
    )
    sources = [own, *static_sources(run)]
    train = run.train
    if not any(source.has_held_out() for source in sources):
        train = replace(train, keep_best=False, patience_evals=0)  # nothing to go by
    trained_on = number < run.rounds.number and run.rounds.start is not RoundStart.first
    exact = trained_on and run.export.dtype is Dtype.auto
    return replace(
        alone,
        run_dir=str(run_folder(root, number)),
        name=f"{run.name}-round-{number}",
        model=model_after(run, root, start),
        train=train,
        data=replace(run.data, sources=sources, seed=run.data.seed + number - 1),
        # Rounding to the base's bf16 in between would lose what a round learned.
        export=replace(run.export, dtype=Dtype.float32) if exact else run.export,
        monitor=_monitor(run),
    )


def _monitor(run: RunConfig) -> MonitorConfig:
    """What compares models within a round: they have no replies that a reward has scored."""
    if not run.monitor.metric.startswith("reply_"):
        return run.monitor
    # As conf/loss/sft.yaml has it: rewards need a rejected reply.
    without = MonitorConfig(metric="loss", mode=Mode.min)
    return MonitorConfig() if run.loss.needs_rejected else without


def static_sources(run: RunConfig) -> list[SourceConfig]:
    """What of `data.sources` is mixed into the pairs of each round."""
    share = run.rounds.static_weight
    return [_taking(source, share) for source in run.data.sources if share]


def _taking(source: SourceConfig, share: float) -> SourceConfig:
    """A source of which that share of what it gave is taken."""
    if source.num_pairs is None:
        return replace(source, weight=source.weight * share)
    return replace(source, num_pairs=max(1, round(source.num_pairs * share)))

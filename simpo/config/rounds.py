"""Settings of `simpo rounds`: on-policy data and training, several times over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args, get_origin, get_type_hints

from simpo.config.choices import ReplyChoice, RoundPrompts, RoundStart
from simpo.config.errors import ConfigError
from simpo.config.launchers import SlurmConfig
from simpo.config.ranges import above_zero, at_least

REWARD = "reply_reward"
"""The metric of a round's model that `simpo rounds` monitors: its mean held-out reward."""


@dataclass(kw_only=True)
class RoundsConfig:
    """`simpo rounds`: in each round the newest model replies to prompts, a reward scores the
    replies, and the pairs train the next model. Settings of replies and rewards are on_policy.*."""

    number: int = 0
    """Rounds; `simpo rounds rounds=3` sets it. 0: one training run without rounds."""
    prompts: RoundPrompts = RoundPrompts.slices
    """slices: each round has its own part of the train prompts. all: each round has all."""
    choice: ReplyChoice | None = None
    """on_policy.choice in all rounds; null: that."""
    start: RoundStart = RoundStart.last
    """Where the training of a round begins: with the last round's model, the first model, or the
    best so far by `monitor.metric`. Replies always come from the newest model."""
    static_weight: float = 0.0
    """Factor of the weights of `data.sources`, whose own pairs are mixed into each round's; 0: only
    the model's own replies are trained on, and the sources give prompts alone."""
    patience: int = 0
    """Stop after this many rounds without a better `monitor.metric` than an earlier round, of which
    the first model is none; keep the best. 0: never."""
    max_kl: float | None = None
    """Stop once the model is further than this from the first, in nats per token of its held-out
    replies, and keep the newest model within; null: no limit."""
    max_length_ratio: float | None = None
    """The same for the mean length of held-out replies, against the first model's."""
    generate_jobs: int = 1
    """Processes among which a round's prompts are divided, at the same time: of this machine, each
    with its share of the GPUs, or with `chain` jobs."""
    chain: bool = False
    """launcher=slurm: a job for each phase, after the one before, instead of one job for all. The
    jobs of training get what `launcher` says."""
    generate_launcher: dict[str, Any] = field(default_factory=dict)
    """Settings of `launcher` that are different for the chain's other jobs, such as {time_min: 60,
    partition: small}; they get one process, with one GPU if training has any."""

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 0, "number", "patience", "static_weight")
        yield from above_zero(self, "max_kl")
        if self.max_length_ratio is not None and self.max_length_ratio <= 1:
            yield f"max_length_ratio: must be above 1, or null, got {self.max_length_ratio}"
        yield from at_least(self, 1, "generate_jobs")


def launcher_of_replies(launcher: SlurmConfig, rounds: RoundsConfig) -> SlurmConfig:
    """The settings of the jobs of a chain that generate and score.

    Raises:
        ConfigError: rounds.generate_launcher has a key that launchers have not, or a wrong value.
    """
    names = {item.name for item in fields(launcher)} - {"name", "wait", "sweep_dir", "poll_s"}
    if unknown := sorted(rounds.generate_launcher.keys() - names):
        raise ConfigError(
            [f"rounds.generate_launcher: launcher=slurm has no {unknown[0]} (remove it)"]
        )
    gpus = launcher.gpus_per_node and 1
    one = replace(launcher, nodes=1, tasks_per_node=1, gpus_per_node=gpus)
    types = get_type_hints(SlurmConfig)
    for key, value in rounds.generate_launcher.items():
        if not _fits(value, types[key]):
            remedy = f"see launcher.{key} in docs/config.md"
            raise ConfigError(
                [f"rounds.generate_launcher.{key}: of the wrong type, got {value!r} ({remedy})"]
            )
    changed = replace(one, **rounds.generate_launcher)
    if problems := [f"rounds.generate_launcher.{text}" for text in changed.problems()]:
        raise ConfigError(problems)
    return changed


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has the type of its setting, which OmegaConf does not check in a dict."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return type(value) in (*(get_args(kind) or [kind]), int)  # a partition may be a number

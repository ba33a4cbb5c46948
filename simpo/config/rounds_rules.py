"""Rules of runs with rounds that cross sections."""

from __future__ import annotations

from collections.abc import Iterator

from simpo.config.benchmarks import FIGURES
from simpo.config.choices import Mode
from simpo.config.data import MAX_WEIGHT
from simpo.config.errors import ConfigError
from simpo.config.launchers import SlurmConfig
from simpo.config.on_policy import OnPolicyConfig
from simpo.config.rounds import REWARD, launcher_of_replies
from simpo.config.schema import RunConfig

MORE_IS_BETTER = (
    *(REWARD, "reply_pass_rate", "reply_win_rate", "reply_gain_rate"),
    *FIGURES,
)
"""Metrics of a round's model, higher is better."""


def rounds_problems(run: RunConfig) -> Iterator[str]:
    """Faults of settings that only rounds make one."""
    if not run.on_policy.reward:
        yield "on_policy.reward: required for rounds, but not given"
    blank = OnPolicyConfig()
    for key in ("folder", "slices", "slice", "held_out_only", "parts", "part"):
        if (value := getattr(run.on_policy, key)) != getattr(blank, key):
            yield f"on_policy.{key}: rounds set it themselves, got {value} (leave it out)"
    if run.monitor.metric in MORE_IS_BETTER and run.monitor.mode is Mode.min:
        yield f"monitor.mode: more {run.monitor.metric} is better, got min (monitor.mode=max)"
    unknown = run.on_policy.pass_reward is None and run.on_policy.reward != "rules"
    if run.monitor.metric == "reply_pass_rate" and unknown:
        yield (
            "monitor.metric: reply_pass_rate needs the score from which a reply passes "
            "(on_policy.pass_reward)"
        )
    if run.export.push_to_hub:
        yield (
            "export.push_to_hub: rounds keep one of several models, when they have ended (leave it "
            "out, then simpo export RUN push_to_hub=OWNER/NAME)"
        )
    share = run.rounds.static_weight
    for index, source in enumerate(run.data.sources):
        if source.num_pairs is None and source.weight * share > MAX_WEIGHT >= source.weight:
            yield (
                f"rounds.static_weight: times data.sources[{index}].weight must be at most "
                f"{MAX_WEIGHT}, got {share} times {source.weight}"
            )
    if not isinstance(run.launcher, SlurmConfig):
        if run.rounds.chain:
            yield (
                "rounds.chain: needs launcher=slurm (leave it out: here phases follow one another)"
            )
    elif run.rounds.chain:
        try:
            launcher_of_replies(run.launcher, run.rounds)
        except ConfigError as error:
            yield from error.problems
    elif run.launcher.tasks() > 1:
        yield (
            f"launcher.tasks_per_node: each phase starts its own processes, got "
            f"{run.launcher.tasks()} tasks (launcher.nodes=1 launcher.tasks_per_node=1 "
            "backend.processes=GPUS, or rounds.chain=true)"
        )

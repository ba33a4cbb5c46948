"""Rules of runs with rounds that cross sections."""

from __future__ import annotations

from collections.abc import Iterator

from simpo.config.errors import ConfigError
from simpo.config.launchers import SlurmConfig
from simpo.config.on_policy import OnPolicyConfig
from simpo.config.rounds import launcher_of_replies
from simpo.config.schema import RunConfig


def rounds_problems(run: RunConfig) -> Iterator[str]:
    """Faults of settings that only rounds make one."""
    if not run.on_policy.reward:
        yield "on_policy.reward: required for rounds, but not given"
    blank = OnPolicyConfig()
    for key in ("folder", "slices", "slice", "held_out_only", "parts", "part"):
        if (value := getattr(run.on_policy, key)) != getattr(blank, key):
            yield f"on_policy.{key}: rounds set it themselves, got {value} (leave it out)"
    if run.export.push_to_hub:
        yield (
            "export.push_to_hub: rounds keep one of several models, when they have ended (leave it "
            "out, then simpo export RUN push_to_hub=OWNER/NAME)"
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

"""Gives the learning rate of a step. Imports no torch."""

from __future__ import annotations

import math

from simpo.config.choices import Schedule
from simpo.config.schema import TrainConfig
from simpo.data.plan import TrainPlan


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of update `step` (from 0): a linear warm-up from 0, then the schedule to 0.

    Depends on the step alone, so there is no schedule state to save. Equals transformers'
    `get_scheduler`, which the paper's runs used.
    """
    warmup_steps = math.ceil(total_steps * config.warmup_ratio)
    if step < warmup_steps:
        return config.learning_rate * step / warmup_steps
    if config.schedule is Schedule.constant:
        return config.learning_rate
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if config.schedule is Schedule.linear:
        return config.learning_rate * (1 - progress)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def changes_weights(config: TrainConfig, plan: TrainPlan) -> bool:
    """Whether a step of a run has a learning rate above 0."""
    return any(learning_rate(config, step, plan.total_steps) for step in range(plan.total_steps))

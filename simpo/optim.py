"""AdamW and the learning rate of a step."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW, Optimizer

from simpo.config import Schedule, TrainConfig


def build_optimizer(policy: nn.Module, config: TrainConfig) -> Optimizer:
    """Fused AdamW over the trainable weights; vectors (norms, biases) are not decayed."""
    trainable = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of update `step` (from 0): a linear warm-up from 0, then the schedule to 0.

    A function of the step alone, so there is no schedule state to save. The same numbers as
    transformers' `get_scheduler`, which the paper's runs used.
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


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Give all weights the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value

"""Builds AdamW, and checks that updates change weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from simpo.config.errors import ConfigError
from simpo.config.schema import TrainConfig
from simpo.data.plan import TrainPlan
from simpo.loop.rates import changes_weights, learning_rate

FEW_STEPS = 10
WEIGHTS_LOOKED_AT = 256
"""Weights sampled from each trained tensor, evenly spaced."""
MOST_LOST = 0.95


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


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Give all weights the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value


def check_rates(config: TrainConfig, plan: TrainPlan) -> None:
    """Refuse a run that would change no weight because all its learning rates are 0.

    Raises:
        ConfigError: the only step is that at which the warm-up starts.
    """
    if not changes_weights(config, plan):
        raise ConfigError(
            [
                f"train.pairs_per_step: {plan.num_pairs} pairs in steps of {plan.pairs_per_step} "
                f"give a run of {plan.total_steps} step, and the warm-up begins at learning rate "
                "0: no weight would change (lower it, or raise train.epochs or train.max_steps, or "
                "train.warmup_ratio=0)"
            ]
        )


def rate_notes(config: TrainConfig, plan: TrainPlan) -> list[str]:
    """A note on a run with few steps; none if train.max_steps asked for them."""
    steps = plan.total_steps
    if steps >= FEW_STEPS or config.max_steps is not None:
        return []
    zeros = sum(learning_rate(config, step, steps) == 0 for step in range(steps))
    return [
        f"note   only {steps} steps, {zeros} of them at learning rate 0 (fewer "
        "train.pairs_per_step or more train.epochs make more)"
    ]


def sampled_weights(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """A copy of some weights of each tensor, by name."""
    return {name: _sample(weight).clone() for name, weight in weights}


def sampling(
    weights: Iterable[tuple[str, Tensor]], samples: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The same weights, of each of which a sample is added to `samples` on the way."""
    for name, weight in weights:
        samples[name] = _sample(weight).clone()
        yield name, weight


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, len(flat) // WEIGHTS_LOOKED_AT)].cpu()


def check_updates(config: TrainConfig, sample: Mapping[str, Tensor]) -> None:
    """Refuse a learning rate that is lost in rounding: AdamW's updates are about its size.

    Args:
        sample: result of `sampled_weights`.

    Raises:
        ConfigError: nothing is trained, or almost no weight would change.
    """
    if not sample:
        raise ConfigError(["model.lora.targets: no weight would be trained (name other modules)"])
    weights = torch.cat([weight.float() for weight in sample.values()])
    lost = float((weights + config.learning_rate == weights).float().mean())
    if lost > MOST_LOST:
        raise ConfigError(
            [
                f"train.learning_rate: {config.learning_rate:g} is lost in the rounding of "
                f"{lost:.0%} of the weights, which would not change (raise it)"
            ]
        )


def change_notes(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], saved: torch.dtype
) -> list[str]:
    """A note if training changed no weight, or if saving rounds the weights.

    Args:
        before: result of `sampled_weights`.
        after: result of `sampled_weights` or whole tensors, by name, at least those in `before`.
        saved: dtype in which they are saved.
    """
    changed, kept, rounded = 0, 0, False
    for name, old in before.items():
        now = _sample(after[name])
        changed += int((old.to(now.dtype) != now).sum())
        kept += int((old.to(saved) != now.to(saved)).sum())
        rounded |= torch.finfo(saved).eps > torch.finfo(now.dtype).eps
    if changed and rounded:
        name = str(saved).removeprefix("torch.")
        return [
            f"note   saved in {name}, where {kept / changed:.0%} of the weights that training "
            "changed still differ from the base's; held-out metrics are of the weights before "
            "rounding (export.dtype=float32 saves those)"
        ]
    if changed:
        return []
    return [
        "note   no weight has changed: gradients were 0, or updates were lost in rounding (see "
        "grad_norm in metrics.jsonl; train.learning_rate, adam_epsilon, max_grad_norm)"
    ]

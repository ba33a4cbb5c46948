"""The learning rate of a step against transformers' schedulers."""

import pytest
import torch
from transformers import get_scheduler

from simpo.config import Schedule, TrainConfig
from simpo.optim import build_optimizer, learning_rate


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize(
    ("total_steps", "warmup_ratio"), [(20, 0.1), (33, 0.25), (5, 0.0), (1, 0.1)]
)
def test_learning_rate(schedule: Schedule, total_steps: int, warmup_ratio: float) -> None:
    config = TrainConfig(learning_rate=0.5, schedule=schedule, warmup_ratio=warmup_ratio)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    name = "constant_with_warmup" if schedule is Schedule.constant else schedule.value
    warmup_steps = -(-total_steps * warmup_ratio // 1)
    theirs = get_scheduler(name, optimizer, int(warmup_steps), total_steps)
    for step in range(total_steps):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(config, step, total_steps) == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        theirs.step()


def test_vectors_are_not_decayed() -> None:
    """With no gradient, AdamW moves a weight only by its decay: w * (1 - lr * decay)."""
    module = torch.nn.Linear(2, 2)
    torch.nn.init.ones_(module.weight)
    torch.nn.init.ones_(module.bias)
    optimizer = build_optimizer(module, TrainConfig(learning_rate=0.1, weight_decay=0.5))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert module.weight.unique().tolist() == pytest.approx([0.95])
    assert module.bias.unique().tolist() == [1.0]

"""Compares the learning rate of each step with transformers' schedulers."""

import pytest
import torch
from transformers import get_scheduler

from simpo.config.choices import Schedule
from simpo.config.errors import ConfigError
from simpo.config.schema import TrainConfig
from simpo.data.plan import build_plan
from simpo.loop.optim import (
    build_optimizer,
    change_notes,
    check_rates,
    check_updates,
    learning_rate,
    rate_notes,
    sampled_weights,
)


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


@pytest.mark.parametrize(
    ("num_pairs", "settings", "note"),
    [
        (1280, {}, None),
        (129, {}, "note   only 2 steps, 1 of them at learning rate 0"),
        (50, {"epochs": 3}, "note   only 3 steps, 1 of them at learning rate 0"),
        (50, {"pairs_per_step": 8}, "note   only 7 steps, 1 of them at learning rate 0"),
        (50, {"pairs_per_step": 5}, None),
        (50, {"warmup_ratio": 0.0}, "note   only 1 steps, 0 of them at learning rate 0"),
        (1280, {"max_steps": 2}, None),
    ],
)
def test_runs_of_few_steps(num_pairs: int, settings: dict, note: str | None) -> None:
    config = TrainConfig(**settings)
    plan = build_plan(num_pairs, config.pairs_per_step, config.epochs, config.max_steps, 0)
    check_rates(config, plan)
    remedy = " (fewer train.pairs_per_step or more train.epochs make more)"
    assert rate_notes(config, plan) == ([] if note is None else [note + remedy])


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("settings", [{}, {"max_steps": 1, "pairs_per_step": 8}])
def test_runs_whose_rates_are_all_zero(schedule: Schedule, settings: dict) -> None:
    config = TrainConfig(schedule=schedule, **settings)
    plan = build_plan(50, config.pairs_per_step, config.epochs, config.max_steps, 0)
    with pytest.raises(ConfigError) as error:
        check_rates(config, plan)
    assert str(error.value) == (
        f"train.pairs_per_step: 50 pairs in steps of {config.pairs_per_step} give a run of 1 step, "
        "and the warm-up begins at learning rate 0: no weight would change (lower it, or raise "
        "train.epochs or train.max_steps, or train.warmup_ratio=0)"
    )


def trained(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]


def test_rates_that_are_lost_in_rounding() -> None:
    """fp32 has 24 binary digits: 1 + 2**-25 is 1, and so is 0.5 + 2**-26."""
    module = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.ones_(module.weight)
    check_updates(TrainConfig(learning_rate=2.0**-23), sampled_weights(trained(module)))
    with pytest.raises(ConfigError) as error:
        check_updates(TrainConfig(learning_rate=2.0**-25), sampled_weights(trained(module)))
    assert str(error.value) == (
        "train.learning_rate: 2.98023e-08 is lost in the rounding of 100% of the weights, which "
        "would not change (raise it)"
    )
    with torch.no_grad():
        module.weight[3, 3] = 0.0
    check_updates(TrainConfig(learning_rate=2.0**-25), sampled_weights(trained(module)))
    module.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"^model\.lora\.targets: no weight would be trained"):
        check_updates(TrainConfig(), sampled_weights(trained(module)))


def test_no_weight_has_changed() -> None:
    """Told where it is so, also of weights that are saved in fewer digits."""
    module = torch.nn.Linear(100, 100)
    before = sampled_weights(trained(module))
    same = {name: weight.bfloat16() for name, weight in module.named_parameters()}
    told = change_notes(before, same, torch.bfloat16)
    assert told[0].startswith("note   no weight has changed: ")
    with torch.no_grad():
        module.bias[7] += 1e-3
    assert change_notes(before, dict(module.named_parameters()), torch.float32) == []


def test_what_rounding_keeps() -> None:
    """bf16 has 8 binary digits: 1 + 2**-7 is another number, 1 + 2**-9 is 1."""
    module = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.ones_(module.weight)
    before = sampled_weights(trained(module))
    with torch.no_grad():
        module.weight += torch.tensor([[2.0**-7, 2.0**-9], [2.0**-9, 2.0**-9]])
    after = dict(module.named_parameters())
    assert change_notes(before, after, torch.bfloat16) == [
        "note   saved in bfloat16, where 25% of the weights that training changed still differ "
        "from the base's; held-out metrics are of the weights before rounding "
        "(export.dtype=float32 saves those)"
    ]
    assert change_notes(before, after, torch.float32) == []

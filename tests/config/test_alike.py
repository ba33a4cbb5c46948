"""Members of a sweep that are not composed are just as if each had been composed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from omegaconf import DictConfig

from simpo.config.alike import compose_alike
from simpo.config.check import build_run
from simpo.config.composer import CONF
from simpo.config.errors import ConfigError


def counted(members: Sequence[Sequence[str]]) -> int:
    """How many members were composed; all must be as if composed."""
    composed = 0

    def compose(overrides: list[str]) -> DictConfig:
        nonlocal composed
        composed += 1
        return CONF.compose(overrides)

    runs = list(compose_alike(compose, members))
    assert [repr(run) for run in runs] == [repr(build_run(CONF.compose(list(m)))) for m in members]
    return composed


def test_a_grid_of_values_is_composed_once_for_each_choice() -> None:
    axes = [
        ["loss=simpo", "loss=hinge"],
        ["loss.beta=2", "loss.beta=2.5"],
        ["train.schedule=linear", "train.schedule=cosine"],
        ["train.seed=1"],
    ]
    assert counted([list(words) for words in itertools.product(*axes)]) == 2


@pytest.mark.parametrize(
    "axis",
    [
        ["train.max_steps=null", "train.max_steps=7"],
        ["model.revision=v1", "model.revision='007'", "model.revision=null"],
        ["train.learning_rate=1e-6", "train.learning_rate=1", "train.learning_rate=2.5e-7"],
        ["train.share_prefix=true", "train.share_prefix=false"],
        ["model.lora.rank=4", "model.lora.rank=8"],
        ["train.tokens_per_row=auto", "train.tokens_per_row=512", "train.tokens_per_row='1024'"],
    ],
)
def test_values_of_every_type(axis: list[str]) -> None:
    assert counted([[word] for word in axis]) == 1


@pytest.mark.parametrize(
    "members",
    [
        # `name` is made from it.
        [["model.name=a"], ["model.name=b"]],
        # Which of two counts depends on their order.
        [["loss.beta=2", "loss.beta=5"], ["loss.beta=3", "loss.beta=5"]],
        [["loss.beta=2", "loss={beta: 5}"], ["loss.beta=3", "loss={beta: 5}"]],
        [["loss.beta=2", "++loss.beta=5"], ["loss.beta=3", "++loss.beta=5"]],
        # Values of settings that refer to others.
        [["on_policy.num_prompts=4"], ["on_policy.num_prompts=${train.seed}"]],
        [["train.seed=1", "data.seed=${train.seed}"], ["train.seed=2", "data.seed=${train.seed}"]],
        [["train.seed=1", "data.seed=${.max_length_tokens}"], ["train.seed=2", "data.seed=3"]],
        # Values that are converted, and lists.
        [["model.revision=v1"], ["model.revision=7"]],
        [["model.lora.targets=[a]"], ["model.lora.targets=[b]"]],
        [["experiments=objectives/cpo"], ["experiments=objectives/orpo"]],
    ],
)
def test_what_is_composed_each_time(members: list[list[str]]) -> None:
    assert counted(members) == len(members)


def test_a_fault_of_a_member_is_the_same() -> None:
    members = [["loss.beta=2"], ["loss.beta=-1"], ["loss.beta=3"]]
    runs = compose_alike(CONF.compose, members)
    next(runs)
    with pytest.raises(ConfigError) as told:
        next(runs)
    with pytest.raises(ConfigError) as expected:
        build_run(CONF.compose(members[1]))
    fault = "loss.beta: must be above 0, got -1.0 (the paper uses 2.0 to 10)"
    assert str(told.value) == str(expected.value) == fault

"""Opens the judge that the settings name."""

from __future__ import annotations

from simpo.config.benchmarks import KINDS
from simpo.config.choices import BenchmarkKind
from simpo.config.errors import ConfigError
from simpo.config.schema import RunConfig
from simpo.judging.endpoint import EndpointJudge
from simpo.judging.local import LocalJudge
from simpo.judging.rewards import ScoringReward
from simpo.judging.shapes import Benchmark, Judge, Reward
from simpo.on_policy.rewards import RULES


def asked_judge(run: RunConfig) -> Judge | None:
    """The judge that answers queries, of `judge.endpoint` or `judge.local`; None if neither is set.

    Raises:
        ConfigError: it cannot be used.
    """
    if run.judge.endpoint is not None:
        return EndpointJudge(run.judge)
    return None if run.judge.local is None else LocalJudge(run, run.judge.local)


def open_judge(run: RunConfig, *benchmarks: Benchmark) -> Judge | Reward | None:
    """The judge of a benchmark, or the reward that scores its answers.

    Args:
        benchmarks: more than one where runs are asked the held-out prompts of their own data.

    Returns:
        None if nothing is asked: there are judgements already, or programs check the answers.

    Raises:
        ConfigError: the benchmark needs a judge and none is set, or it cannot be used.
    """
    config = run.judge
    if config.annotations is not None:
        return None
    if (judge := asked_judge(run)) is not None:
        return judge
    questions = [question for benchmark in benchmarks for question in benchmark.questions]
    if config.reward is not None:
        if not all(benchmark.baseline_name for benchmark in benchmarks):
            raise ConfigError(
                [
                    f"judge.reward: benchmark={run.benchmark.name} has no baseline that a score "
                    "could be compared with (leave it out, or set judge.endpoint or judge.local)"
                ]
            )
        bare = sum(question.rule is None for question in questions)
        if config.reward == RULES and bare:
            raise ConfigError(
                [
                    f"judge.reward: rules judges prompts that have a rule, but {bare:,} of "
                    f"{len(questions):,} have none (choose another judge)"
                ]
            )
        return ScoringReward(run, config.reward)
    if questions and all(question.rule is not None for question in questions):
        return ScoringReward(run, RULES)
    if run.benchmark.kind is BenchmarkKind.ifbench:
        return None
    raise ConfigError(
        [f"judge: benchmark={run.benchmark.name} needs a judge, but none is set (judge.{KINDS})"]
    )

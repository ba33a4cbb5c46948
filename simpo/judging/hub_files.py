"""Takes the files of a benchmark from its data set on the hub."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from simpo.config.benchmarks import BenchmarkConfig
from simpo.config.choices import BenchmarkKind
from simpo.config.data_path import is_hub_id
from simpo.config.errors import ConfigError
from simpo.config.schema import RunConfig
from simpo.data import hub
from simpo.judging.arena_files import BASELINES, FOLDERS

ADDRESS = re.compile(r"(hf://datasets/)?([^/@]+/[^/@]+)(?:@([^/@]+))?")
"""A data set of the hub: prefix, id and revision."""
ALPACA_BASELINE = "alpaca_eval_gpt4_baseline.json"
ALPACA_FILES = (ALPACA_BASELINE, "instruction_difficulty.csv", "df_gamed.csv")


def with_hub_files(run: RunConfig) -> RunConfig:
    """Settings in which `benchmark.path` is here, as are the files of alpaca_eval beside it.

    Of a data set of the hub the files that judging needs are fetched, or come from the cache.
    Settings that name none stay as they are.

    Raises:
        ConfigError: they cannot be fetched.
    """
    config = run.benchmark
    found = ADDRESS.fullmatch(config.path or "")
    if config.path is None or not found or not (found[1] or is_hub_id(config.path)):
        return run
    if config.kind is BenchmarkKind.alpaca_eval:
        wanted = list(ALPACA_FILES)
    elif config.kind is BenchmarkKind.arena_hard:
        version = FOLDERS[config.name]
        names = _baselines(config)
        answers = [f"data/{version}/model_answer/{name}.jsonl" for name in names]
        wanted = [f"data/{version}/question.jsonl", *answers]
    else:
        raise ConfigError(
            [f"benchmark.path: {config.name} is not read from the hub, got {config.path} (name a "
             "folder, or leave it out to take the files of its package)"]
        )  # fmt: skip
    _, repo, revision = found.groups()
    try:
        folder = hub.download(repo, revision, *wanted)
    except Exception as error:  # from the hub, its client or the network
        fault = hub.reason(error, f"datasets/{repo}")
        raise ConfigError([f"benchmark.path: {config.path} cannot be loaded: {fault}"]) from error
    if config.kind is BenchmarkKind.arena_hard:
        return replace(run, benchmark=replace(config, path=str(folder)))
    baseline, difficulty, gamed = (str(folder / file) for file in wanted)
    difficulty, gamed = config.difficulty or difficulty, config.gamed or gamed
    here = replace(config, path=baseline, difficulty=difficulty, gamed=gamed)
    return replace(run, benchmark=here)


def _baselines(config: BenchmarkConfig) -> list[str]:
    """The models that a version of Arena-Hard compares with whose answers are on the hub."""
    if config.baseline is None:
        return list(BASELINES[config.name].values())
    is_here = Path(config.baseline).expanduser().exists()  # a file, or a run
    return [] if is_here else [config.baseline]

"""Opens the benchmark that the settings name."""

from __future__ import annotations

from simpo.config.choices import BenchmarkKind
from simpo.config.errors import refused_paths
from simpo.config.schema import RunConfig
from simpo.judging.hub_files import with_hub_files
from simpo.judging.shapes import Benchmark


@refused_paths()
def open_benchmark(run: RunConfig) -> Benchmark:
    """The benchmark of `run.benchmark`, which is not none, with its questions and baseline.

    Raises:
        ConfigError, DataError: its files are missing or damaged.
    """
    run = with_hub_files(run)
    # Imported here, since each of them needs its own packages.
    match run.benchmark.kind:
        case BenchmarkKind.alpaca_eval:
            from simpo.judging.alpaca_eval import AlpacaEval

            return AlpacaEval(run)
        case BenchmarkKind.arena_hard:
            from simpo.judging.arena_hard import ArenaHard

            return ArenaHard(run)
        case BenchmarkKind.mt_bench:
            from simpo.judging.mt_bench import MTBench

            return MTBench(run)
        case BenchmarkKind.ifbench:
            from simpo.judging.ifbench import IFBench

            return IFBench(run)
    from simpo.judging.pairs import open_pairs

    return open_pairs(run)

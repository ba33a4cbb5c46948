"""`simpo judge`: let models answer a benchmark, and a judge compare their answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from simpo.config.choices import BenchmarkKind
from simpo.config.compose import run_of_words
from simpo.config.composer import CONF
from simpo.config.errors import ConfigError, refused_paths
from simpo.config.models import names_a_model
from simpo.config.renamed import new_name
from simpo.run.progress import say

USAGE = """
usage: simpo judge RUN [RUN2 ...] benchmark=NAME [key=value ...]

Let the models of runs answer the questions of a benchmark, and a judge compare their answers with a
baseline's. Answers and verdicts are kept: after an interruption the same command continues.

  simpo judge RUN benchmark=pairs benchmark.baseline=base
  simpo judge RUN RUN2 benchmark=pairs benchmark.baseline=base judge.local=JUDGE_MODEL
  simpo judge RUN benchmark=alpaca_eval_2 benchmark.path=CLONE \\
      judge.endpoint=http://localhost:8000/v1 judge.model=NAME
  simpo judge benchmark=alpaca_eval_2 benchmark.path=CLONE judge.annotations=annotations.json

RUN is the folder of a run, a model or an adapter, a hub id or builtin:smollm2, or a file of answers
in the benchmark's format. Several are compared with the first, question by question. NAME is
alpaca_eval_2, arena_hard_v0.1, arena_hard_v2, ifbench, mt_bench or pairs.
docs/judging.md tells more.

Settings:
"""
MATTER = ("benchmark", "judge", "data", "output_dir", "cache_dir")
"""Sections and keys that judging depends on, and these keys of others:"""
KEYS_THAT_MATTER = (
    *("on_policy.engine", "on_policy.batch_prompts", "train.precision", "backend.device"),
    "model.trust_remote_code",
)


@refused_paths()
def main(words: Sequence[str]) -> None:
    """Judge models.

    Raises:
        ConfigError: the words cannot be used, with the usage if no RUN is given.
        DataError: a file or folder may not be read.
    """
    sources, settings = split(words)
    _refuse(settings)
    run = run_of_words(settings)
    if run.benchmark.kind is BenchmarkKind.none:
        names = ", ".join(name for name in CONF.choices("benchmark") if name != "none")
        raise ConfigError([f"benchmark: required, but not given (choose from {names})"])
    if not sources and run.judge.annotations is None:
        raise ConfigError([f"RUN: required, but not given ({USAGE.strip().splitlines()[0]})"])
    if len(sources) > 1 and run.judge.annotations is not None:
        raise ConfigError(["judge.annotations: are of one model, got several (give one RUN)"])
    files = [source for source in sources if Path(source).expanduser().is_file()]
    if files and run.judge.annotations is not None:
        raise ConfigError([f"judge.annotations: hold answers too, got {files[0]} (leave it out)"])
    unknown = [source for source in sources if source not in files and not names_a_model(source)]
    if unknown:
        raise ConfigError([_not_there(source) for source in unknown])
    say("loading torch and transformers ...")
    # Imported here, so that a fault in the settings is answered before torch is loaded.
    from simpo.judging.after_training import finish_trained
    from simpo.judging.judge import judge

    found = judge(run, sources)
    for source, judged in zip(sources, found, strict=bool(sources)):
        finish_trained(run, source, judged)


def _not_there(source: str) -> str:
    path = Path(source).expanduser()
    if path.is_symlink() and not os.path.exists(path):
        return f"RUN: {source} is a link to nothing (mend it, or name what it should lead to)"
    if os.path.exists(path):
        return f"RUN: {source} is neither a folder nor a file (copy what it holds into a file)"
    return f"RUN: no such folder or file, got {source}"


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `RUN ... key=value ... [--config-dir DIR]` into runs, and the other words.

    A folder's name may hold an = itself, as those of a sweep's members do: loss.beta=2.
    """
    sources: list[str] = []
    settings: list[str] = []
    after_option = False
    for word in words:
        key, equals, _ = word.partition("=")
        is_path = "/" in key or Path(word).exists()
        is_setting = word.startswith("-") or (equals and not is_path)
        (settings if is_setting or after_option else sources).append(word)
        after_option = word in ("--config-dir", "-cd")
    return sources, settings


def _refuse(settings: Sequence[str]) -> None:
    """Refuse settings on which judging does not depend.

    Raises:
        ConfigError: there are some; a line for each.
    """
    faults = []
    for word in settings:
        key, equals, _ = word.lstrip("+~").partition("=")
        key = new_name(key)
        known = key.partition(".")[0] in MATTER or key in KEYS_THAT_MATTER
        if equals and not word.startswith("-") and not known:
            faults.append(f"{key}: does not matter to judging (leave it out)")
    if faults:
        raise ConfigError(faults)


if __name__ == "__main__":
    from simpo.__main__ import main as dispatch

    dispatch(["judge", *sys.argv[1:]])

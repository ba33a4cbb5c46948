"""`simpo plan`: memory, time and cost of a run on GPUs that need not be there."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from simpo.config.compose import run_of_words
from simpo.config.errors import ConfigError
from simpo.config.gpus import GPUS, gpu_named
from simpo.launch.run_words import split_settings
from simpo.run.progress import say

USAGE = f"""
usage: simpo plan [key=value ...] [gpu=NAME] [pairs=N] [tokens_per_pair=N]
                  [price_usd_per_gpu_hour=X]

Predict what a run needs: memory of a GPU by part, operations, time, and the smallest number of GPUs
that fits. Of the model only config.json is read; no weights and no GPU are needed.

  simpo plan model=llama3_instruct data=ultrafeedback_llama3_instruct backend=fsdp
  simpo plan model=mistral_base backend=fsdp backend.processes=8 pairs=60000 tokens_per_pair=926

gpu=NAME is one of {", ".join(GPUS)} (H100-80GB).
pairs=N assumes N pairs of tokens_per_pair=N (926) tokens instead of reading the run's data. Own
data must be named all the same, and `simpo preview` counts its tokens.
Settings are those of `simpo train` (see its --help). What is assumed: docs/plan.md.
"""

DEFAULTS = {
    "gpu": "H100-80GB",
    "pairs": "",
    "tokens_per_pair": "926",
    "price_usd_per_gpu_hour": "0",
}
"""The keys besides settings, with their default values."""
KEYS: dict[str, tuple[str, ...]] = {**dict.fromkeys(DEFAULTS, ()), "gpu": tuple(GPUS)}
"""The same keys with their values if there are few."""


def main(words: Sequence[str]) -> None:
    """Print the plan of a run.

    Raises:
        ConfigError: the settings cannot be used.
    """
    settings, given = split_settings(words, DEFAULTS)
    options = DEFAULTS | given
    run, gpu = run_of_words(settings), gpu_named(options["gpu"])
    pairs = _whole("pairs", options["pairs"]) if options["pairs"] else None
    tokens_per_pair = _whole("tokens_per_pair", options["tokens_per_pair"])
    if tokens_per_pair < 4:
        raise ConfigError([f"tokens_per_pair: must be 4 or more, got {tokens_per_pair}"])
    price = _price(options["price_usd_per_gpu_hour"])
    say("loading torch and transformers ...")
    # Imported here, so that a fault in the settings is answered before torch is loaded.
    from simpo.previewing.forecast import forecast

    print("\n".join(forecast(run, gpu, pairs, tokens_per_pair, price)))


def _whole(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError([f"{key}: must be a whole number of 1 or more, got {text}"])
    return int(text)


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < float("inf"):
        raise ConfigError([f"price_usd_per_gpu_hour: must be a number of dollars, got {text}"])
    return price


if __name__ == "__main__":
    from simpo.__main__ import main as dispatch

    dispatch(["plan", *sys.argv[1:]])

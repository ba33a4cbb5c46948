"""Enums of the values that settings choose from."""

from __future__ import annotations

from enum import Enum

AUTO = "auto"
"""What a setting of type `int | str` takes besides whole numbers."""


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Attention(str, Enum):
    auto = "auto"
    sdpa = "sdpa"
    varlen = "varlen"
    flash = "flash"


class Precision(str, Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Schedule(str, Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class PromptTruncation(str, Enum):
    keep_end = "keep_end"
    keep_start = "keep_start"


class Compat(str, Enum):
    none = "none"
    paper = "paper"


class Reasoning(str, Enum):
    score = "score"
    keep = "keep"
    drop = "drop"


class OnBadRecord(str, Enum):
    stop = "stop"
    drop = "drop"


class PairChoice(str, Enum):
    best_worst = "best_worst"
    best_random = "best_random"
    all = "all"


class ReplyChoice(str, Enum):
    best_worst = "best_worst"
    best_random = "best_random"
    margin = "margin"
    all = "all"
    ranked = "ranked"


class RoundPrompts(str, Enum):
    slices = "slices"
    all = "all"


class RoundStart(str, Enum):
    last = "last"
    first = "first"
    best = "best"


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class WatchAction(str, Enum):
    warn = "warn"
    stop = "stop"


class WandbMode(str, Enum):
    online = "online"
    offline = "offline"


class ReduceDtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Offload(str, Enum):
    none = "none"
    cpu = "cpu"


class Mode(str, Enum):
    max = "max"
    min = "min"

    @property
    def sign(self) -> int:
        """Factor for the metric after which a higher value is better."""
        return 1 if self is Mode.max else -1


class Quantization(str, Enum):
    none = "none"
    nf4 = "nf4"
    int8 = "int8"


class Engine(str, Enum):
    auto = "auto"
    vllm = "vllm"
    transformers = "transformers"


class BenchmarkKind(str, Enum):
    none = "none"
    pairs = "pairs"
    alpaca_eval = "alpaca_eval"
    arena_hard = "arena_hard"
    mt_bench = "mt_bench"
    ifbench = "ifbench"


class Checkpointing(str, Enum):
    none = "none"
    selective = "selective"
    full = "full"

"""Provides pairs with the lengths of three kinds of data, real pairs, and model shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig

from simpo.data.pairs import TokenizedPair

MAX_LENGTH, MAX_PROMPT = 2048, 1800
DRAWN = 20_000

# Log-normal lengths in tokens, (median, mean) of prompt and response.
PROFILES = {
    "ultrafeedback": ((150, 223), (277, 360)),
    "hh": ((421, 526), (141, 178)),
    "tldr": ((400, 425), (40, 44)),
}

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 2048, "hidden_size": 192, "num_hidden_layers": 3},
    "smol8": {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 8},
    "smol30": {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30},
    "vocab128k": {"vocab_size": 128256, "hidden_size": 256, "num_hidden_layers": 6},
    "0.5B": {"vocab_size": 128256, "hidden_size": 1024, "num_hidden_layers": 28},
    "1B": {"vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16},
    "8B": {"vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32},
}
# Heads, key heads, intermediate size; by hidden size.
WIDTHS = {
    192: (3, 3, 512),
    256: (4, 2, 704),
    576: (9, 3, 1536),
    1024: (16, 8, 3072),
    2048: (32, 8, 8192),
    4096: (32, 8, 14336),
}


def model_config(shape: str) -> LlamaConfig:
    """The Llama config of a shape; all but 8B have tied embeddings."""
    sizes = SHAPES[shape]
    heads, key_heads, intermediate = WIDTHS[sizes["hidden_size"]]
    return LlamaConfig(
        **sizes,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=intermediate,
        tie_word_embeddings=shape != "8B",
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def typical_batch(
    profile: str, num_pairs: int, vocab_size: int, seed: int = 0
) -> list[TokenizedPair]:
    """The sampled micro-batch whose padded, packed and shared token counts are nearest the means.

    A few random pairs could be twice as long as the data, or vary more in length, and would not
    represent it.
    """
    rng = np.random.default_rng(seed)
    (prompt, response) = PROFILES[profile]
    prompts = np.minimum(drawn_lengths(rng, prompt, (DRAWN, num_pairs)), MAX_PROMPT)
    responses = drawn_lengths(rng, response, (DRAWN, num_pairs, 2))
    responses = np.minimum(responses, (MAX_LENGTH - prompts)[..., None])
    whole = prompts[..., None] + responses
    sizes = np.stack(
        [
            2 * num_pairs * whole.max(axis=(1, 2)),
            whole.sum(axis=(1, 2)),
            prompts.sum(axis=1) + responses.sum(axis=(1, 2)),
        ]
    )
    distance = np.abs(np.log(sizes / sizes.mean(axis=1, keepdims=True))).sum(axis=0)
    best = int(distance.argmin())
    return [
        TokenizedPair.of(*(rng.integers(3, vocab_size, n).astype(np.int32) for n in (p, *r)))
        for p, r in zip(prompts[best], responses[best], strict=True)
    ]


def real_batches(folder: Path, num_batches: int, num_pairs: int) -> list[list[TokenizedPair]]:
    """Micro-batches of real pairs from a folder, tokenized for the built-in model."""
    from transformers import AutoTokenizer

    from simpo.data.chats.chat import Chat
    from simpo.model.smollm2 import smollm2_folder

    chat = Chat(AutoTokenizer.from_pretrained(smollm2_folder(Path("~/.cache/simpo").expanduser())))
    rows = [
        json.loads(line)
        for path in sorted(folder.glob("*.train.jsonl"))
        for line in path.read_text().splitlines()
    ]
    chosen = np.random.default_rng(0).permutation(len(rows))[: num_batches * num_pairs]
    pairs = []
    for row in (rows[i] for i in chosen):
        prompt = chat.prompt_text(row["prompt"])
        replies = [row[side][-1]["content"] + "<|im_end|>" for side in ("chosen", "rejected")]
        ids = [np.array(x, dtype=np.int32) for x in chat.encode([prompt, *replies])]
        first, good, bad = (x[: MAX_LENGTH // 2] for x in ids)
        pairs.append(TokenizedPair.of(first, good, bad))
    return [pairs[i : i + num_pairs] for i in range(0, len(pairs), num_pairs)]


def drawn_lengths(
    rng: np.random.Generator, median_mean: tuple[int, int], shape: tuple[int, ...]
) -> np.ndarray:
    """Log-normal lengths in tokens with this median and mean, at least 1."""
    median, mean = median_mean
    sigma = np.sqrt(2 * np.log(mean / median))
    drawn = rng.lognormal(np.log(median), sigma, shape)
    return np.maximum(drawn.round().astype(int), 1)


def resident(field: str, pid: int | str = "self") -> int:
    """A field of /proc/PID/status, in bytes; StopIteration of a process that has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

"""Measures what kinds of losses cost, side by side in one process on the CPU.

    python benchmarks/losses.py [--shapes smol8] [--prompts 2] [--rounds 3] [--results FILE]

Loss and gradients of a step of prompts with four ranked responses of 300 tokens each:

    six pairs       each two responses of a prompt as a pair of their own
    four responses  the same comparisons with all responses on one row (loss.compare=all)

and of the best and the worst response of each prompt as a pair:

    a pair          SimPO
    coupled         a loss that couples the pairs of a step, by two phases
    weighs tokens   a loss with a weight for each token
    squares         a loss that needs the sum of p^2 at each token

Times are medians with their range over the rounds, alternately, in reverse order every other round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import RESULTS, save, spread
from transformers import AutoModelForCausalLM
from workloads import model_config

from simpo.backend import build_backend
from simpo.config.backends import SingleConfig
from simpo.config.choices import Precision
from simpo.config.losses import LOSSES
from simpo.data.packing import pack
from simpo.data.pairs import PackedPairs, TokenizedPair
from simpo.loop.coupled import by_factors, first_phase
from simpo.loop.score import pair_table
from simpo.loss import Compare, LossConfig, PairLogps, pair_losses
from simpo.model import attention
from simpo.model.policy import Policy

TOKENS = 300
RANKED = 4


def main() -> None:
    parser = argparse.ArgumentParser(description="cost of kinds of losses")
    parser.add_argument("--shapes", nargs="+", default=["smol8"])
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS / "losses.json")
    args = parser.parse_args()
    attention.register()
    results: list[dict[str, Any]] = []
    for shape in args.shapes:
        config = model_config(shape)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.set_attn_implementation(attention.NAMES["sdpa"])
        prompts = ranked(args.prompts, config.vocab_size)
        for work in (ranked_work, pair_work):
            found = measure(Policy(model), work(prompts), args.rounds)
            results += [{"shape": shape, **line} for line in found]
            print("\n".join(table(results[-len(found) :])), flush=True)
            save(args.results, results)


def ranked(number: int, vocabulary: int) -> list[TokenizedPair]:
    """Prompts with four responses of made-up tokens, the best first but for the worst."""
    rng = np.random.default_rng(0)
    prompts = []
    for _ in range(number):
        parts = rng.integers(3, vocabulary, (1 + RANKED, TOKENS)).astype(np.int32)
        scores = (3.0, 0.0, 2.0, 1.0)
        prompts.append(TokenizedPair(parts[0], tuple(parts[1:]), (None,) * RANKED, scores))
    return prompts


Work = dict[str, tuple[LossConfig, list[PackedPairs], int]]
"""By name: the loss, the rows of a step, and the pairs that its mean is over."""


def ranked_work(prompts: list[TokenizedPair]) -> Work:
    """The same comparisons as pairs, a prompt to a row, and on one row."""
    order = (0, 2, 3, 1)
    couples = [(a, b) for at, a in enumerate(order) for b in order[at + 1 :]]
    rows = []
    for prompt in prompts:
        pairs = [
            TokenizedPair.of(prompt.prompt_ids, prompt.responses[a], prompt.responses[b])
            for a, b in couples
        ]
        rows.append(pack(pairs, range(len(pairs))))
    kind = LOSSES["sigmoid"]
    together = [pack([prompt], [index]) for index, prompt in enumerate(prompts)]
    return {
        "six pairs": (kind(), rows, len(couples) * len(prompts)),
        "four responses": (kind(compare=Compare.all), together, len(prompts)),
    }


def pair_work(prompts: list[TokenizedPair]) -> Work:
    """The best and the worst response of each prompt, for several losses."""
    best = [TokenizedPair.of(prompt.prompt_ids, *prompt.responses[:2]) for prompt in prompts]
    rows = [pack([pair], [index]) for index, pair in enumerate(best)]
    losses = {
        "a pair": "sigmoid",
        "coupled": "amapo",
        "weighs tokens": "confpo",
        "squares": "wpo",
    }
    return {
        name: (LOSSES[loss](), with_reference(rows), len(rows)) for name, loss in losses.items()
    }


def with_reference(rows: list[PackedPairs]) -> list[PackedPairs]:
    """The rows with made-up log-probs under a reference."""
    return [
        replace(row, reference_logps=torch.full((len(row.response_tokens),), -3000.0))
        for row in rows
    ]


def measure(policy: Policy, work: Work, rounds: int) -> list[dict[str, Any]]:
    """Seconds of a step for each, and the ratio of medians to the first; losses of ranked prompts
    must agree."""
    steps = {name: step_of(policy, *one) for name, one in work.items()}
    values = {name: step() for name, step in steps.items()}  # warms up
    if "six pairs" in values:
        assert abs(values["six pairs"] - values["four responses"]) < 1e-4, values
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in list(steps) if turn % 2 == 0 else list(steps)[::-1]:
            begin = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - begin)
    spreads = {name: spread(seconds) for name, seconds in times.items()}
    base = next(iter(spreads.values()))["median_s"]
    return [
        {
            "loss": name,
            **found,
            "ratio": found["median_s"] / base,
            "tokens": sum(row.input_ids.numel() for row in work[name][1]),
        }
        for name, found in spreads.items()
    ]


def step_of(
    policy: Policy, loss: LossConfig, rows: list[PackedPairs], num_pairs: int
) -> Callable[[], float]:
    """A function that computes loss and gradients of a step, and returns the loss."""
    backend = build_backend(SingleConfig(), Precision.fp32, 1.0)

    def share(logps: PairLogps) -> torch.Tensor:
        return pair_losses(loss, logps) / num_pairs

    def step() -> float:
        policy.zero_grad(set_to_none=False)
        total = 0.0
        own, pair_loss = rows, share
        if loss.couples_step:
            own, lines = first_phase(
                policy, rows, share, lambda logps: pair_table(loss, logps), backend, loss
            )
            pair_loss, total = by_factors, float(lines[:, 0].mean())
        for row in own:
            value, _ = policy(row, pair_loss, None, loss)
            value.backward()
            total += 0.0 if loss.couples_step else value.item()
        return total

    return step


def table(results: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| shape | loss | tokens | s (spread) | time |", "|---|---|---|---|---|"]
    for line in results:
        spread = f"{line['fastest_s']:.2f}-{line['slowest_s']:.2f}"
        lines.append(
            f"| {line['shape']} | {line['loss']} | {line['tokens']:,} "
            f"| {line['median_s']:.2f} ({spread}) | {line['ratio']:.2f} |"
        )
    return lines


if __name__ == "__main__":
    main()

"""Evaluates the policy on held-out pairs, and has it reply to some of their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from simpo.config.schema import RunConfig
from simpo.data.pairs import Pair
from simpo.loop.console import metrics_text
from simpo.loop.replies import greedy_replies, reply_lines, reply_metrics
from simpo.loop.score import (
    columns,
    counted,
    evaluate,
    pair_sums,
    present,
    responses_per_pair,
    summarise,
)
from simpo.loop.setup import Parts
from simpo.loss import LossConfig
from simpo.run.progress import bar, say


def held_out_metrics(run: RunConfig, parts: Parts, step: int) -> dict[str, float]:
    """Metrics of the held-out pairs, and of replies to some; empty if nothing is held out.

    The numbers of each pair and the replies are written into the run's folder.
    """
    folder, backend, test = parts.folder, parts.backend, parts.test
    sampled = test.data.held_out[: run.sample.num_prompts]
    metrics: dict[str, float] = {}
    if len(test):
        with bar("held-out pairs", len(test)) as shown:
            found, scores = evaluate(
                parts.wrapped,
                counted(test.rows(), shown, backend.processes),
                run.loss,
                backend,
                run.model.router_aux_weight,
            )
        metrics |= found | metrics_of_sets(run.loss, test.data.held_out, scores)
        there = present(torch.tensor(list(scores.values()))).tolist()
        placed = (
            (test.data.places[i], [x if has else "" for x, has in zip(numbers, own, strict=True)])
            for (i, numbers), own in zip(scores.items(), there, strict=True)
        )
        folder.write_scores(step, columns(run.loss), placed)
    if sampled:
        with backend.unsharded(parts.policy):
            replies = greedy_replies(
                parts.policy, parts.chat, sampled, run.sample.max_new_tokens, backend.device
            )
        metrics |= reply_metrics(replies)
        folder.write_json(f"samples/step-{step:06d}.json", reply_lines(replies))
    if metrics:
        say(f"held out after step {step}: {metrics_text(metrics)}")
    return metrics


def metrics_of_sets(
    loss: LossConfig, pairs: Sequence[Pair], scores: Mapping[int, Sequence[float]]
) -> dict[str, float]:
    """Metrics of each held-out set, `<name>/loss` and so on, and their mean over sets, `mean/loss`.

    Args:
        pairs: the held-out pairs.
        scores: the numbers of each pair in the order of `columns`, by its index.

    Returns:
        The metrics; empty if there is only one set. A mean is over the sets that have the metric.
    """
    tables: dict[str, list[Sequence[float]]] = {}
    for index, numbers in scores.items():
        tables.setdefault(pairs[index].held_out_set, []).append(numbers)
    if len(tables) < 2:
        return {}
    whole = responses_per_pair(loss, list(scores.values()))
    found = {}
    for name, lines in tables.items():
        table = torch.tensor(lines, dtype=torch.float64)
        # The mean over the pairs of a set is that over its responses, as that of all pairs is.
        table[:, 0] *= whole / responses_per_pair(loss, lines)
        found[name] = summarise(loss, pair_sums(table))
    keys = dict.fromkeys(key for metrics in found.values() for key in metrics)
    of_key = {key: [metrics[key] for metrics in found.values() if key in metrics] for key in keys}
    means = {key: sum(values) / len(values) for key, values in of_key.items()}
    return {
        f"{name}/{key}": value
        for name, metrics in (*found.items(), ("mean", means))
        for key, value in metrics.items()
    }

"""Evaluates the policy on held-out pairs, and has it reply to some of their prompts."""

from __future__ import annotations

from simpo.config.schema import RunConfig
from simpo.loop.replies import greedy_replies, reply_lines, reply_metrics
from simpo.loop.score import columns, evaluate
from simpo.loop.setup import Parts
from simpo.loop.tracker import Tracker


def held_out_metrics(run: RunConfig, parts: Parts, tracker: Tracker, step: int) -> dict[str, float]:
    """Metrics of the held-out pairs, and of replies to some; empty if nothing is held out.

    The numbers of each pair and the replies are written into the run's folder.
    """
    folder, backend, test = parts.folder, parts.backend, parts.test
    sampled = test.data.pairs[: run.sample.num_prompts]
    metrics: dict[str, float] = {}
    if len(test):
        tracker.print(f"held out: {len(test)} pairs, {len(sampled)} replies ...")
        found, scores = evaluate(parts.wrapped, test.rows(), run.loss, backend)
        metrics |= found
        placed = ((test.data.pairs[i].place, numbers) for i, numbers in scores.items())
        folder.write_scores(step, columns(run.loss), placed)
    if sampled:
        with backend.unsharded(parts.policy):
            replies = greedy_replies(
                parts.policy, parts.chat, sampled, run.sample.max_new_tokens, backend.device
            )
        metrics |= reply_metrics(replies)
        folder.write_replies(step, reply_lines(replies))
    return metrics

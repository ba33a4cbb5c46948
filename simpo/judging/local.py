"""A judge on this machine: a model that generates verdicts in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from simpo.config.schema import RunConfig
from simpo.data.pairs import Message, Pair
from simpo.data.reading.records import RecordFault
from simpo.judging.shapes import Query, Said, Unanswered
from simpo.model.generate import Sampling, batches
from simpo.model.pretrained import load_settings
from simpo.model.saved import naming, saved_model
from simpo.model.talk import context_tokens
from simpo.on_policy.engines import Generate, engine_of, with_saved
from simpo.on_policy.files import content_hash, weights_content
from simpo.run.progress import say

KEY = "judge.local"


class LocalJudge:
    """Asks a model that transformers or vLLM runs here; it is loaded when it is first asked."""

    def __init__(self, run: RunConfig, source: str) -> None:
        """
        Args:
            source: folder of a run, a model or an adapter, or a hub id.

        Raises:
            ConfigError: there is no such model, or its tokenizer cannot be loaded.
        """
        folder = Path(source).expanduser()
        self.name = folder.resolve().name if folder.is_dir() else source
        self._run = run
        with naming(KEY):
            self._saved = saved_model(source)
            self._chat = self._saved.chat()
            self._settings = load_settings(self._saved.model, self._saved.cache_dir)
            weights = weights_content(KEY, self._saved.model, self._saved.cache_dir)
        self.identity = content_hash(
            [
                *weights,
                self._saved.model.quantization.value,
                self._chat.template_sha256,
                self._chat.template.kwargs,
                engine_of(run.on_policy.engine).value,
            ]
        )
        self._generate: Generate | None = None

    def answers(self, queries: Sequence[Query]) -> Iterator[tuple[Query, Said | Unanswered]]:
        """Yield (query, said) batch by batch; last those that the model cannot read, because they
        are too long or hold a control token.

        Raises:
            ConfigError: the model cannot be loaded.
        """
        groups: dict[Sampling, list[tuple[Query, list[int]]]] = {}
        refused = []
        for query in queries:
            try:
                ids = self._ids(query)
            except RecordFault as fault:
                reason = f"{KEY}: {self.name} cannot read it: {fault}"
                refused.append((query, Unanswered(reason)))
                continue
            # A repeat is drawn anew.
            drawn = (query.temperature, 1.0, query.max_tokens, query.repeat, query.top_logprobs)
            groups.setdefault(Sampling(*drawn), []).append((query, ids))
        for sampling, group in groups.items():
            yield from self._answers(sampling, group)
        yield from refused

    def _answers(
        self, sampling: Sampling, group: Sequence[tuple[Query, list[int]]]
    ) -> Iterator[tuple[Query, Said]]:
        if self._generate is None:
            with naming(KEY):
                say(f"loading the weights of the judge {self.name} ...")
                self._generate = with_saved(self._run, self._saved, self._chat)
        for batch in batches([len(ids) for _, ids in group], self._run.on_policy.batch_prompts):
            replies = self._generate([group[i][1] for i in batch], sampling)
            for i, reply in zip(batch, replies, strict=True):
                query, ids = group[i]
                yield query, Said(reply.text, reply.first_logprobs, len(ids), reply.tokens)

    def _ids(self, query: Query) -> list[int]:
        """Token ids of a query's messages, with the generation prompt.

        Raises:
            RecordFault: the model cannot read them.
        """
        self._chat.check_pair(Pair(query.messages, (), None, ""))
        (ids,) = self._chat.encode([self._text(query.messages)])
        limit = context_tokens(self._settings)
        if limit is not None and len(ids) + query.max_tokens > limit:
            raise RecordFault(f"with its verdict it is longer than the judge's {limit:,} tokens")
        return ids

    def _text(self, messages: tuple[Message, ...]) -> str:
        """The prompt as text. A system prompt that the template refuses is put before the
        question."""
        try:
            return self._chat.prompt_text(messages)
        except RecordFault:
            if len(messages) < 2 or messages[0]["role"] != "system":
                raise
            system, question, *others = messages
            joined = f"{system['content']}\n\n{question['content']}"
            return self._chat.prompt_text([{**question, "content": joined}, *others])

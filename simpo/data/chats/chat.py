"""Turns the messages of a pair into the token ids of its prompt and responses, cut to length.

The prompt is what the chat template renders up to and including the generation prompt. The
response is the rest of the rendered dialogue, up to the token that ends the turn. So no header is
scored, and the prompt ids are exactly those that generation starts from:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n | Hello!<|im_end|>
    prompt ------------------------------------------------- | response ------

Of a response of several turns the replies of the assistant are scored, each from the end of its own
generation prompt to the token that ends its turn. The texts come from `simpo.data.chats.render`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from simpo.config.choices import Compat, PromptTruncation
from simpo.config.data import DataConfig
from simpo.config.errors import ConfigError
from simpo.data.chats.paper import paper_pair, paper_texts
from simpo.data.chats.render import Rendered, RenderedResponse, Reply, render_pair
from simpo.data.chats.template import Template, control_tokens
from simpo.data.pairs import Message, Pair, Tokenized, TokenizedPair
from simpo.data.reading.messages import check_text
from simpo.data.reading.records import RecordFault

BATCH_PAIRS = 512
BATCH_LETTERS = 2**22
"""Letters that are encoded at a time, or those of one pair; a token takes about 125 bytes
meanwhile, in each of the processes that tokenize."""

_ENDS_NO_REPLY = "the chat template ends no reply before the next turn"


class _Place(NamedTuple):
    """Index `at` of the first token behind a place in a text; one that spans it is `merged`."""

    at: int
    merged: bool


class Chat:
    """A tokenizer with its chat template, and the token that ends a response.

    Attributes:
        tokenizer: the tokenizer.
        template: its chat template.
        end_id: id of the first special token that the template writes after an assistant's text,
            or of the tokenizer's EOS if there is none. It ends every response.
        template_sha256: hash of the template, stored with the run.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        today: date | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            today: the date given to templates that ask for one; None is the current date.
            template_kwargs: variables given to the template, `model.chat_template_kwargs`.

        Raises:
            ConfigError: the template cannot be used, or there is no token that ends a response.
        """
        self.tokenizer = tokenizer
        self.template = Template(tokenizer, today or date.today(), template_kwargs)
        self.template_sha256 = self.template.sha256
        self._bos_id = tokenizer.bos_token_id
        self._adds_bos = self._bos_id is not None and tokenizer("x").input_ids[0] == self._bos_id
        written, tail = self.template.probe()
        self.end_id = self._find_end_id(tail)
        marks = control_tokens(tokenizer, written)
        self._end = str(tokenizer.convert_ids_to_tokens(self.end_id))
        marks.add(self._end)
        longest_first = sorted(marks, key=lambda mark: (-len(mark), mark))
        any_mark = "|".join(map(re.escape, longest_first))
        self._marks = re.compile(any_mark)
        self._run_of_marks = re.compile(rf"(?:(?:{any_mark})\s*)+")

    def prompt_text(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """The prompt as text, with the generation prompt at its end.

        Raises:
            RecordFault: the template refuses it, or it is not Unicode, which no tokenizer reads.
        """
        text = self.template.render(messages, tools, add_generation_prompt=True)
        check_text(text, "a message")
        return text

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of rendered texts, with one BOS if the tokenizer adds it."""
        token_ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False).input_ids
        if self._adds_bos:
            token_ids = [
                ids if ids[:1] == [self._bos_id] else [self._bos_id, *ids] for ids in token_ids
            ]
        return token_ids

    def tokenize(
        self, pairs: Sequence[Pair], config: DataConfig
    ) -> Iterator[Tokenized | RecordFault]:
        """Yield the tokens of each pair in order, or the fault of one that has none."""
        paper = config.compat is Compat.paper and all(pair.rejected is not None for pair in pairs)
        batch: list[Rendered | RecordFault] = []
        letters = 0
        for pair in pairs:
            batch.append(one := self._rendered(pair, config, paper))
            letters += 0 if isinstance(one, RecordFault) else sum(map(len, one.texts()))
            if len(batch) == BATCH_PAIRS or letters >= BATCH_LETTERS:
                yield from self._tokenized(batch, config, paper)
                batch, letters = [], 0
        yield from self._tokenized(batch, config, paper)

    def _rendered(self, pair: Pair, config: DataConfig, paper: bool) -> Rendered | RecordFault:
        try:
            if paper:
                return paper_texts(self.template, self.tokenizer, pair)
            self.check_pair(pair)
            return render_pair(self.template, pair, config.reasoning)
        except RecordFault as fault:
            return fault

    def _tokenized(
        self, batch: Sequence[Rendered | RecordFault], config: DataConfig, paper: bool
    ) -> Iterator[Tokenized | RecordFault]:
        """Yield the tokens of rendered pairs, whose texts are encoded together."""
        good = [texts for texts in batch if not isinstance(texts, RecordFault)]
        texts = list(dict.fromkeys(text for one in good for text in one.texts()))
        ids = dict(zip(texts, self.encode(texts) if texts else (), strict=True))
        for one in batch:
            if isinstance(one, RecordFault):
                yield one
                continue
            try:
                if paper:
                    yield paper_pair(self.tokenizer, one, ids, config)
                else:
                    yield self._pair(one, ids, config)
            except RecordFault as fault:
                yield fault

    def _find_end_id(self, tail: str) -> int:
        """The token that ends a turn, found in `tail`, the text that the template adds to a reply.

        Raises:
            ConfigError: `tail` has no special token and the tokenizer has no EOS.
        """
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        ids = self.tokenizer(tail, add_special_tokens=False).input_ids
        end_id = next((i for i in ids if i in special), self.tokenizer.eos_token_id)
        if end_id is None:
            raise ConfigError(["model.tokenizer: has no EOS token and its template ends no turn"])
        return int(end_id)

    def check_pair(self, pair: Pair) -> None:
        """
        Raises:
            RecordFault: a text of the pair contains a control token, which would be tokenized as
                that token.
        """
        parts = [("", pair.prompt)]
        for name, response in zip(pair.names, pair.responses, strict=True):
            parts.append((f"{name}: " if pair.others else "", response))
        for place, messages in parts:
            for message in messages:
                text = message["content"] or ""
                if len(message) > 2:
                    text = json.dumps(message, ensure_ascii=False)
                if mark := self._marks.search(text):
                    raise RecordFault(f"{place}a message holds the token {mark[0]} as text")
        tools = json.dumps(pair.tools, ensure_ascii=False) if pair.tools else ""
        if mark := self._marks.search(tools):
            raise RecordFault(f"the tools hold the token {mark[0]} as text")

    def _pair(
        self, rendered: Rendered, ids: Mapping[str, list[int]], config: DataConfig
    ) -> Tokenized:
        """Ids of a pair, cut to length, from the `ids` of its texts."""
        prompt = ids[rendered.prompt]
        num_prompt = _common_prefix(prompt, *(ids[one.whole] for one in rendered.responses))
        if num_prompt == 0:
            raise RecordFault("prompt and dialogue share no token (check the chat template)")
        responses, masks, merged = [], [], num_prompt < len(prompt)
        names = rendered.names
        for key, response in zip(names, rendered.responses, strict=True):
            # A token that spans the end of the prompt is scored in all responses.
            places = {len(rendered.prompt): _Place(num_prompt, False)}
            for end in set(response.places()) - places.keys():
                places[end] = _place(response.whole[:end], response.whole, ids)
            merged |= any(places[reply.scored].merged for reply in response.replies)
            tokens, scored = self._response(response, ids[response.whole], num_prompt, places)
            if len(tokens) < 2 or not scored.any():
                raise RecordFault(f"{key}: the response has no token")
            responses.append(tokens)
            masks.append(scored)
        longest = max(map(len, responses))
        kept = prompt[:num_prompt]
        if num_prompt + longest > config.max_length_tokens:
            budget = max(config.max_prompt_tokens, config.max_length_tokens - longest)
            kept = self._cut(kept, budget, config.prompt_truncation)
        budget = config.max_length_tokens - len(kept)
        cut = [len(ids) > budget for ids in responses]
        responses = [ids[:budget] for ids in responses]
        masks = [mask[:budget] for mask in masks]
        for key, mask in zip(names, masks, strict=True):
            if not mask.any():
                remedy = "raise data.max_length_tokens"
                raise RecordFault(f"{key}: no scored token is left once it is cut ({remedy})")
        for (one, first), (other, second) in combinations(zip(names, responses, strict=True), 2):
            if first == second:
                remedy = " once they are cut (raise data.max_length_tokens)" if any(cut) else ""
                raise RecordFault(f"{one} and {other} have the same tokens{remedy}")
        some = [None if mask.all() else mask for mask in masks]
        if len(responses) == 1:
            missing = 0 if names == ("rejected",) else 1
            responses.insert(missing, [])
            some.insert(missing, None)
            cut.insert(missing, False)
        pair = TokenizedPair.of(kept, *responses)
        pair = replace(pair, scored=tuple(some), scores=rendered.scores or None)
        prompt_cut, unreasoned = len(kept) < num_prompt, rendered.unreasoned
        return Tokenized(pair, merged, prompt_cut, cut[0], any(cut[1:]), unreasoned)

    def _response(
        self,
        response: RenderedResponse,
        whole: list[int],
        num_prompt: int,
        places: Mapping[int, _Place],
    ) -> tuple[list[int], np.ndarray]:
        """Ids of a response, and which of them are scored, bool [length].

        Args:
            whole: ids of the dialogue.
            places: for characters of the dialogue, where they are among its ids.
        """
        ended = [*whole, self.end_id]
        scored = np.zeros(len(ended), dtype=bool)
        for start, stop in response.marked or ():
            scored[places[start].at : places[stop].at + places[stop].merged] = True
        scored[len(whole) :] = scored[len(whole) - 1]
        end = 0
        for reply in response.replies:
            start = places[reply.scored].at
            if end > start:
                raise RecordFault(_ENDS_NO_REPLY)
            stop = self._end_of(reply, response.whole, ended, start)
            if response.marked is None:
                scored[start:stop] = True
            elif reply.scored > reply.start:
                scored[end:start] = False
            end = stop
        # Text that a template writes after the last reply is dropped.
        return ended[num_prompt:end], scored[num_prompt:end]

    def _end_of(self, reply: Reply, text: str, ended: list[int], start: int) -> int:
        """Index of the token after the one that ends a reply.

        That is the end token among the control tokens right behind the reply's text; without it the
        first of them, which may begin the next turn. The last reply gets an end token if the
        template writes none.

        Args:
            text: the dialogue.
            ended: its ids, and the end token.
            start: index of the first token of the reply.
        """
        first = self._marks.search(text, reply.said, reply.until)
        if first is None and reply.until == len(text):
            return len(ended)
        following = reply.next_text
        if first is None or (
            # The next turn is before that token, which then ends the next turn.
            following in text[reply.said : first.start()]
            and following not in text[first.end() : reply.until]
        ):
            raise RecordFault(_ENDS_NO_REPLY)
        run = self._run_of_marks.match(text, first.start(), reply.until)
        token = self._end if run and self._end in run[0] else first[0]
        token_id: Any = self.tokenizer.convert_tokens_to_ids(token)
        # A reply may hold that token, as gpt-oss writes it behind its reasoning.
        for _ in range(text.count(token, reply.scored, first.start()) + 1):
            start = ended.index(token_id, start) + 1
        return start

    def _cut(self, ids: list[int], budget: int, truncation: PromptTruncation) -> list[int]:
        if len(ids) <= budget:
            return ids
        if truncation is PromptTruncation.keep_start:
            return ids[:budget]
        head = ids[:1] if ids[0] == self._bos_id else []
        return head + ids[len(ids) - budget + len(head) :]


def _place(before: str, whole: str, ids: Mapping[str, list[int]]) -> _Place:
    """The place in the ids of a dialogue at which the text `before` ends."""
    at = _common_prefix(ids[before], ids[whole])
    return _Place(at, at < len(ids[before]))


def _common_prefix(*token_ids: list[int]) -> int:
    shortest = min(len(ids) for ids in token_ids)
    first = token_ids[0]
    if all(ids[:shortest] == first[:shortest] for ids in token_ids):
        return shortest
    return next((i for i in range(shortest) if any(r[i] != first[i] for r in token_ids)), shortest)

"""Turns the messages of a pair into the token ids of its prompt and responses, cut to length.

The prompt is what the chat template renders up to and including the generation prompt. The
response is the rest of the rendered dialogue, up to the token that ends the turn. So no header is
scored, and the prompt ids are exactly those that generation starts from:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n | Hello!<|im_end|>
    prompt ------------------------------------------------- | response ------

Of a response of several turns the replies of the assistant are scored, each from the end of its own
generation prompt to the token that ends its turn.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from simpo.config.choices import Compat, PromptTruncation
from simpo.config.data import DataConfig
from simpo.config.errors import ConfigError
from simpo.data.pairs import Message, Pair, Tokenized, TokenizedPair
from simpo.data.paper import paper_pair, paper_texts
from simpo.data.records import RecordFault
from simpo.data.template import Template, control_tokens

BATCH_PAIRS = 512


@dataclass(frozen=True)
class TokenReport:
    """How many pairs were tokenized, cut or left out.

    Attributes:
        pairs: pairs that were tokenized.
        merged_prompts: pairs in which one token spans the end of the prompt and the start of the
            response; their prompt ends at the longest common token prefix.
        cut_prompts, cut_chosen, cut_rejected: pairs in which this part was cut to its budget.
        bad: number of pairs left out, by fault.
    """

    pairs: int
    merged_prompts: int
    cut_prompts: int
    cut_chosen: int
    cut_rejected: int
    bad: dict[str, int]


@dataclass(frozen=True)
class TokenizedSet:
    """Pairs, their tokens in the same order, and the report of their tokenization.

    `notes` are lines for the user about the token cache.
    """

    pairs: list[Pair]
    tokens: list[TokenizedPair]
    report: TokenReport
    notes: tuple[str, ...] = ()

    def num_tokens(self, share_prefix: bool = True) -> np.ndarray:
        """Tokens computed for each pair, int64 [pairs]; without `share_prefix` its prompt twice."""
        return np.array([pair.num_tokens(share_prefix) for pair in self.tokens], dtype=np.int64)

    def fingerprint(self) -> str:
        """Hash of the token ids in order, 16 hex digits, stored with the run."""
        digest = hashlib.sha256()
        for pair in self.tokens:
            for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
                digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        return digest.hexdigest()[:16]


class Chat:
    """A tokenizer with its chat template, and the token that ends a response.

    Attributes:
        tokenizer: the tokenizer.
        template: its chat template.
        end_id: id of the first special token that the template writes after an assistant's text,
            or of the tokenizer's EOS if there is none. It ends every response.
        template_sha256: hash of the template, stored with the run.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, today: date | None = None) -> None:
        """
        Args:
            today: the date given to templates that ask for one; None is the current date.

        Raises:
            ConfigError: the template cannot be used, or there is no token that ends a response.
        """
        self.tokenizer = tokenizer
        self.template = Template(tokenizer, today or date.today())
        self.template_sha256 = self.template.sha256
        self._bos_id = tokenizer.bos_token_id
        self._adds_bos = self._bos_id is not None and tokenizer("x").input_ids[0] == self._bos_id
        question, answer = "2hv7", "8wq3"
        written = self.template.probe(question, answer)
        self.end_id = self._find_end_id(written[written.rindex(answer) + len(answer) :])
        marks = control_tokens(tokenizer, written)
        marks.add(str(tokenizer.convert_ids_to_tokens(self.end_id)))
        longest_first = sorted(marks, key=lambda mark: (-len(mark), mark))
        self._marks = re.compile("|".join(map(re.escape, longest_first)))

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The prompt as text, with the generation prompt at its end."""
        return self.template.render(messages, add_generation_prompt=True)

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
        render, join = self._texts, self._pair
        if config.compat is Compat.paper and all(pair.rejected is not None for pair in pairs):
            render = partial(paper_texts, self.template, self.tokenizer)
            join = partial(paper_pair, self.tokenizer)
        for start in range(0, len(pairs), BATCH_PAIRS):
            rendered: list[list[list[str]] | RecordFault] = []
            for pair in pairs[start : start + BATCH_PAIRS]:
                try:
                    rendered.append(render(pair))
                except RecordFault as fault:
                    rendered.append(fault)
            good = [parts for parts in rendered if not isinstance(parts, RecordFault)]
            texts = [text for parts in good for part in parts for text in part]
            ids = iter(self.encode(texts) if texts else [])
            for parts in rendered:
                if isinstance(parts, RecordFault):
                    yield parts
                    continue
                try:
                    yield join([[next(ids) for _ in part] for part in parts], config)
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

    def check_messages(self, messages: Sequence[Message]) -> None:
        """
        Raises:
            RecordFault: the text of a message contains a control token, which would be tokenized
                as that token.
        """
        for message in messages:
            if mark := self._marks.search(message["content"]):
                raise RecordFault(f"a message holds the token {mark[0]} as text")

    def _texts(self, pair: Pair) -> list[list[str]]:
        """Text of the prompt alone, then for each response the texts before its further replies
        and the text of the whole dialogue."""
        for part in (pair.prompt, *pair.responses):
            self.check_messages(part)
        prompt = self.prompt_text(pair.prompt)
        _check_whole(prompt, [turn for turn in pair.prompt if turn["role"] != "assistant"])
        parts = [[prompt]]
        for response in pair.responses:
            turns = [*pair.prompt, *response]
            replies = [
                i for i in range(len(pair.prompt), len(turns)) if turns[i]["role"] == "assistant"
            ]
            before = [prompt, *(self.prompt_text(turns[:i]) for i in replies[1:])]
            whole = self.template.render(turns)
            if not all(whole.startswith(text) for text in before):
                raise RecordFault(
                    "the chat template writes the prompt differently before a reply "
                    "(choose another model.chat_template)"
                )
            ends = [*map(len, before[1:]), len(whole)]
            for text, end, i in zip(before, ends, replies, strict=True):
                _check_whole(whole[len(text) : end], [turns[i]])
            parts.append([*before[1:], whole])
        return parts

    def _pair(self, token_ids: list[list[list[int]]], config: DataConfig) -> Tokenized:
        """Ids of a pair from those of the texts of `_texts`, cut to length."""
        (prompt,), *parts = token_ids
        num_prompt = _common_prefix(prompt, *(part[-1] for part in parts))
        if num_prompt == 0:
            raise RecordFault("prompt and dialogue share no token (check the chat template)")
        responses, masks, merged = [], [], num_prompt < len(prompt)
        for key, (*before, whole) in zip(("chosen", "rejected"), parts, strict=False):
            starts = [num_prompt, *(_common_prefix(text, whole) for text in before)]
            merged |= any(n < len(text) for n, text in zip(starts[1:], before, strict=True))
            ids, scored = self._response(whole, starts)
            if len(ids) < 2:
                raise RecordFault(f"{key}: the response has no token")
            responses.append(ids)
            masks.append(scored)
        longest = max(map(len, responses))
        kept = prompt[:num_prompt]
        if num_prompt + longest > config.max_length_tokens:
            budget = max(config.max_prompt_tokens, config.max_length_tokens - longest)
            kept = self._cut(kept, budget, config.prompt_truncation)
        budget = config.max_length_tokens - len(kept)
        cut = [len(ids) > budget for ids in responses]
        responses = [ids[:budget] for ids in responses]
        masks = [None if mask is None else mask[:budget] for mask in masks]
        if len(responses) == 2 and responses[0] == responses[1]:
            remedy = " once they are cut (raise data.max_length_tokens)" if any(cut) else ""
            raise RecordFault(f"chosen and rejected have the same tokens{remedy}")
        if len(responses) == 1:
            responses, masks, cut = [*responses, []], [*masks, None], [*cut, False]
        tokens = TokenizedPair.of(kept, *responses)
        pair = replace(tokens, chosen_scored=masks[0], rejected_scored=masks[1])
        return Tokenized(pair, merged, len(kept) < num_prompt, *cut)

    def _response(self, whole: list[int], starts: list[int]) -> tuple[list[int], np.ndarray | None]:
        """Ids of a response, and which of them are scored (None: all).

        Args:
            whole: ids of the dialogue.
            starts: index of the first token of each reply of the assistant.
        """
        ended = [*whole, self.end_id]
        scored = np.zeros(len(ended), dtype=bool)
        end = 0
        for start in starts:
            if end > start:
                raise RecordFault("the chat template ends no reply before the next turn")
            end = ended.index(self.end_id, start) + 1
            scored[start:end] = True
        # Text that a template writes after the last reply is dropped.
        mask = scored[starts[0] : end]
        return ended[starts[0] : end], None if mask.all() else mask

    def _cut(self, ids: list[int], budget: int, truncation: PromptTruncation) -> list[int]:
        if len(ids) <= budget:
            return ids
        if truncation is PromptTruncation.keep_start:
            return ids[:budget]
        head = ids[:1] if ids[0] == self._bos_id else []
        return head + ids[len(ids) - budget + len(head) :]


def pairs_fingerprint(pairs: Sequence[Pair]) -> str:
    """Hash of the text of pairs in order, 16 hex digits, stored with the run."""
    digest = hashlib.sha256()
    for pair in pairs:
        text = asdict(replace(pair, place="", held_out_set="", score_margin=None))
        digest.update(json.dumps(text, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _common_prefix(*token_ids: list[int]) -> int:
    shortest = min(len(ids) for ids in token_ids)
    first = token_ids[0]
    return next((i for i in range(shortest) if any(r[i] != first[i] for r in token_ids)), shortest)


def _check_whole(text: str, messages: Sequence[Message]) -> None:
    """Check that the rendered text contains each message, apart from white space around it.

    Callers leave out the assistant's earlier turns, from which some templates drop the reasoning
    on purpose.

    Raises:
        RecordFault: the template leaves out a part of a message.
    """
    for message in messages:
        if message["content"].strip() not in text:
            raise RecordFault(
                f"the chat template leaves out a part of what the {message['role']} says "
                "(choose another model.chat_template)"
            )

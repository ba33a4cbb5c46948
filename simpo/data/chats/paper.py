"""Reproduces the texts and token ids of the original SimPO trainer (`data.compat=paper`)."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from simpo.config.choices import PromptTruncation
from simpo.config.data import DataConfig
from simpo.data.chats.render import Rendered, RenderedResponse
from simpo.data.chats.template import Template
from simpo.data.pairs import Pair, Tokenized, TokenizedPair
from simpo.data.reading.records import RecordFault


def paper_texts(template: Template, tokenizer: PreTrainedTokenizerBase, pair: Pair) -> Rendered:
    """Texts of prompt, prompt + chosen and prompt + rejected, as the original trainer builds them.

    The prompt has no generation prompt; each reply is rendered as a dialogue of its own.

    Raises:
        RecordFault: the pair has what the original trainer does not know, or the template refuses
            it.
    """
    if pair.tools or any("tool_calls" in turn for turn in pair.turns):
        raise RecordFault("data.compat=paper has no tools")
    prompt = list(pair.prompt)
    if prompt[0]["role"] != "system" and template.speaks_of_system:
        prompt = [{"role": "system", "content": ""}, *prompt]
    text = template.render(prompt)
    responses = []
    for response in pair.responses:
        if len(response) > 1:
            raise RecordFault("data.compat=paper has responses of one turn only")
        reply = template.render(response).removeprefix(tokenizer.bos_token or "")
        responses.append(RenderedResponse(text + reply, (), None))
    return Rendered(text, tuple(responses), False)


def paper_pair(
    tokenizer: PreTrainedTokenizerBase,
    rendered: Rendered,
    ids: Mapping[str, list[int]],
    config: DataConfig,
) -> Tokenized:
    """Tokens of a pair as in the original trainer: BOS first, EOS last, both replies cut alike.

    Args:
        ids: token ids of the rendered texts.

    Source: `tokenize_row` of https://github.com/princeton-nlp/SimPO.

    Raises:
        RecordFault: the token boundary between prompt and response differs between the two
            responses, so the prompt cannot be shared.
    """
    prompt, (chosen, rejected) = ids[rendered.prompt], (ids[r.whole] for r in rendered.responses)
    starts = [
        len(prompt) if ids[: len(prompt)] == prompt else len(prompt) - 1
        for ids in (chosen, rejected)
    ]
    num_prompt = min(starts)
    responses = [chosen[starts[0] :], rejected[starts[1] :]]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # Ids of the joined text: a merge across the boundary may change several tokens of the prompt.
    kept = chosen[:num_prompt] if chosen[:1] == bos else bos + chosen[:num_prompt]
    shortest = min(len(chosen), len(rejected))
    if chosen[:num_prompt] != rejected[:num_prompt] or shortest < len(prompt):
        raise RecordFault("the tokenizer joins prompt and response differently for both responses")
    # The original trainer gives each response its own prompt; the two may differ by one token.
    if starts[0] != starts[1]:
        raise RecordFault("the tokenizer joins the prompt's end with one response only")
    eos_id = tokenizer.eos_token_id
    responses = [ids if ids[-1:] == [eos_id] else [*ids, eos_id] for ids in responses]
    longest = max(len(ids) for ids in responses)
    whole = len(kept)
    if whole + longest > config.max_length_tokens:
        keep = config.max_prompt_tokens
        keep_end = config.prompt_truncation is PromptTruncation.keep_end
        kept = kept[-keep:] if keep_end else kept[:keep]
    budget = longest
    if len(kept) + longest > config.max_length_tokens:
        budget = config.max_length_tokens - config.max_prompt_tokens
    return Tokenized(
        TokenizedPair.of(kept, *(ids[:budget] for ids in responses)),
        num_prompt < len(prompt),
        len(kept) < whole,
        len(responses[0]) > budget,
        len(responses[1]) > budget,
    )

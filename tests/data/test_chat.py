"""Tokens of pairs, compared with hand-written ones for each family and with the original trainer's.

Tokens are written as the tokenizer's pieces, separated by spaces.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from simpo.config.choices import Compat, PromptTruncation
from simpo.config.data import DataConfig
from simpo.config.errors import ConfigError
from simpo.config.models import ModelConfig
from simpo.config.paths import TEMPLATES
from simpo.data.chats.chat import Chat
from simpo.data.pairs import Message, Pair
from simpo.data.reading.records import RecordFault
from simpo.data.tokens import tokenize_set
from simpo.model.tokenizer import load_tokenizer
from tests.support.real_tokenizers import (
    as_lists,
    assistant,
    data_config,
    load_chat,
    make_pair,
    mistral_folder,
    pieces,
    system,
    tokenize_one,
    user,
)

KEEP_END, KEEP_START = PromptTruncation.keep_end, PromptTruncation.keep_start

# --- Templates -----------------------------------------------------------------------------------

ONE = [user(" Hi\n")]
TWO = [user("Hi"), assistant("Yes? "), user("Bye")]
WITH_SYSTEM = [system("Be kind. "), user("Hi")]
REPLY = [assistant("Yes?")]

# The generation prompt, then each of DIALOGUES without it. BOS is <s> and EOS </s> throughout.
DIALOGUES = (ONE, TWO, WITH_SYSTEM, REPLY)
RENDERED = {
    "mistral_paper": (
        "",
        "[INST] Hi [/INST]",
        "[INST] Hi [/INST] Yes? </s>[INST] Bye [/INST]",
        "[INST] Be kind.\n\nHi [/INST]",
        " Yes? </s>",
    ),
    "gemma_paper": (
        "<start_of_turn>model\n",
        "<s><start_of_turn>user\nHi<end_of_turn>\n",
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n",
        "<s><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n",
        "<s><start_of_turn>model\nYes?<end_of_turn>\n",
    ),
    "llama3": (
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
        "<s><|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>",
    ),
    "zephyr": (
        "<|assistant|>\n",
        "<|user|>\n Hi\n</s>\n",
        "<|user|>\nHi</s>\n<|assistant|>\nYes? </s>\n<|user|>\nBye</s>\n",
        "<|system|>\nBe kind. </s>\n<|user|>\nHi</s>\n",
        "<|assistant|>\nYes?</s>\n",
    ),
    "chatml": (
        "<|im_start|>assistant\n",
        "<|im_start|>user\n Hi\n<|im_end|>\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes? <|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n",
        "<|im_start|>system\nBe kind. <|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
        "<|im_start|>assistant\nYes?<|im_end|>\n",
    ),
}


@pytest.mark.parametrize("template", RENDERED)
def test_template_renders(template: str) -> None:
    text = (TEMPLATES / f"{template}.jinja").read_text()
    render = load_chat("mistral", text).tokenizer.apply_chat_template
    generation, *texts = RENDERED[template]
    for messages, text in zip(DIALOGUES, texts, strict=True):
        assert render(messages, tokenize=False) == text
        prompt = render(messages, tokenize=False, add_generation_prompt=True)
        assert prompt == text + generation


def test_every_shipped_template_is_rendered_here() -> None:
    assert {file.stem for file in TEMPLATES.glob("*.jinja")} == set(RENDERED)


# --- Written-out tokens --------------------------------------------------------------------------

USER = "<|begin_of_text|> <|start_header_id|> user <|end_header_id|> ĊĊ Hi Ġthere <|eot_id|>"
HEAD = "<|start_header_id|> assistant <|end_header_id|> ĊĊ"
CHATML = "<|im_start|> user Ċ Hi Ġthere <|im_end|> Ċ <|im_start|> ass istant Ċ"

# (family, template): prompt, chosen, rejected
TOKENS: dict[tuple[str, str | None], tuple[str, str, str]] = {
    ("mistral", "mistral_paper"): (
        "<s> ▁[ INST ] ▁Hi ▁there ▁[ / INST ]", "▁Hello ! ▁ </s>", "▁Go ▁away . ▁ </s>",
    ),
    ("mistral", "zephyr"): (
        "<s> ▁< | user | > <0x0A> Hi ▁there </s> ▁ <0x0A> < | ass istant | > <0x0A>",
        "Hello ! </s>", "Go ▁away . </s>",
    ),
    ("llama3", "llama3"): (f"{USER} {HEAD}", "Hello ! <|eot_id|>", "Go Ġaway . <|eot_id|>"),
    # Its own template opens a header behind every dialogue; nothing of that may be scored.
    ("llama3", None): (f"{USER} {HEAD}", "Hello ! <|eot_id|>", "Go Ġaway . <|eot_id|>"),
    ("gemma2", "gemma_paper"): (
        "<bos> <start_of_turn> user \n Hi ▁there <end_of_turn> \n <start_of_turn> model \n",
        "Hello ! <end_of_turn>", "Go ▁away . <end_of_turn>",
    ),
    ("smollm2", None): (
        "<|im_start|> system Ċ You Ġare Ġa Ġhelpful ĠAI Ġassistant Ġnamed ĠSm ol LM , Ġtrained "
        f"Ġby ĠH ugging ĠFace <|im_end|> Ċ {CHATML}", "Hello ! <|im_end|>", "Go Ġaway . <|im_end|>",
    ),
    ("smollm2", "chatml"): (CHATML, "Hello ! <|im_end|>", "Go Ġaway . <|im_end|>"),
}  # fmt: skip

# The original trainer: an empty system message where the template speaks of one, each reply
# rendered as a dialogue of its own (less its BOS), EOS behind whatever the template ends in.
PAPER_TOKENS: dict[tuple[str, str | None], tuple[str, str, str]] = {
    ("mistral", "mistral_paper"): TOKENS["mistral", "mistral_paper"],
    ("mistral", "zephyr"): (
        "<s> ▁< | system | > <0x0A> </s> ▁ <0x0A> < | user | > <0x0A> Hi ▁there </s> ▁ <0x0A>",
        "< | ass istant | > <0x0A> Hello ! </s> ▁ <0x0A> </s>",
        "< | ass istant | > <0x0A> Go ▁away . </s> ▁ <0x0A> </s>",
    ),
    ("llama3", "llama3"): (
        USER,
        f"{HEAD} Hello ! <|eot_id|> <|end_of_text|>",
        f"{HEAD} Go Ġaway . <|eot_id|> <|end_of_text|>",
    ),
    ("gemma2", "gemma_paper"): (
        "<bos> <start_of_turn> user \n Hi ▁there <end_of_turn> \n",
        "<start_of_turn> model \n Hello ! <end_of_turn> \n <eos>",
        "<start_of_turn> model \n Go ▁away . <end_of_turn> \n <eos>",
    ),
}


@pytest.mark.parametrize(
    ("compat", "family", "template"),
    [(Compat.none, *key) for key in TOKENS] + [(Compat.paper, *key) for key in PAPER_TOKENS],
)
def test_tokens(compat: Compat, family: str, template: str | None) -> None:
    chat = load_chat(family, template)
    tokens, *flags = tokenize_one(chat, make_pair(user("Hi there")), compat=compat)
    expected = TOKENS if compat is Compat.none else PAPER_TOKENS
    assert pieces(chat, tokens) == expected[family, template]
    assert flags == [False] * 5


@pytest.mark.parametrize(("family", "template"), TOKENS)
def test_scores_the_reply_and_one_end_token(family: str, template: str | None) -> None:
    chat = load_chat(family, template)
    replies = "One.\n\nTwo, three: 45 %?", "Grüße, 日本 🙂"
    prompt = system("Be kind."), user("Hi"), assistant("Yes?"), user("Bye\n\nnow")
    tokens, *_ = tokenize_one(chat, make_pair(*prompt, chosen=replies[0], rejected=replies[1]))
    for ids, reply in zip(as_lists(tokens)[1:], replies, strict=True):
        assert chat.tokenizer.decode(ids[:-1]).strip() == reply
        assert ids.count(chat.end_id) == 1
        assert ids[-1] == chat.end_id
        assert chat.tokenizer.bos_token_id not in ids
    head = tokens.prompt_ids[:2] == chat.tokenizer.bos_token_id
    assert head.tolist() == [True, False]


# --- Truncation ----------------------------------------------------------------------------------

# (max_length, max_prompt, which end of the prompt stays): prompt, chosen, rejected, flags.
# The prompt has 12 tokens, or 8 as the paper has it; the responses 3 and 4, or 8 and 9.
CUTS = [
    # The prompt may keep 6 although max_prompt is 5: that much fits beside 4 of a response.
    (10, 5, KEEP_END, f"<|begin_of_text|> <|eot_id|> {HEAD}", "Hello ! <|eot_id|>",
     "Go Ġaway . <|eot_id|>", [True, False, False]),
    (6, 4, KEEP_END, "<|begin_of_text|> assistant <|end_header_id|> ĊĊ", "Hello !", "Go Ġaway",
     [True, True, True]),
    (6, 3, KEEP_START, "<|begin_of_text|> <|start_header_id|> user", "Hello ! <|eot_id|>",
     "Go Ġaway .", [True, False, True]),
]  # fmt: skip
PAPER_CUTS = [
    # It just fits.
    (17, 3, KEEP_END, *PAPER_TOKENS["llama3", "llama3"], [False, False, False]),
    # Cutting the prompt is enough.
    (15, 6, KEEP_END, "user <|end_header_id|> ĊĊ Hi Ġthere <|eot_id|>",
     f"{HEAD} Hello ! <|eot_id|> <|end_of_text|>", f"{HEAD} Go Ġaway . <|eot_id|> <|end_of_text|>",
     [True, False, False]),
    # It is not: both responses are cut to 12 - 5. The prompt has lost its BOS.
    (12, 5, KEEP_END, "<|end_header_id|> ĊĊ Hi Ġthere <|eot_id|>", f"{HEAD} Hello ! <|eot_id|>",
     f"{HEAD} Go Ġaway .", [True, True, True]),
    (12, 5, KEEP_START, "<|begin_of_text|> <|start_header_id|> user <|end_header_id|> ĊĊ",
     f"{HEAD} Hello ! <|eot_id|>", f"{HEAD} Go Ġaway .", [True, True, True]),
    # Both are cut to 16 - 12 although the chosen one would fit.
    (16, 12, KEEP_END, USER, HEAD, HEAD, [False, True, True]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("compat", "cut"),
    [(Compat.none, cut) for cut in CUTS] + [(Compat.paper, cut) for cut in PAPER_CUTS],
)
def test_cuts(compat: Compat, cut: tuple[Any, ...]) -> None:
    max_length, max_prompt, truncation, prompt, chosen, rejected, flags = cut
    chat = load_chat("llama3", "llama3")
    tokens, merged, *was_cut, _ = tokenize_one(
        chat,
        make_pair(user("Hi there")),
        compat=compat,
        max_length_tokens=max_length,
        max_prompt_tokens=max_prompt,
        prompt_truncation=truncation,
    )
    assert pieces(chat, tokens) == (prompt, chosen, rejected)
    assert (merged, was_cut) == (False, flags)


lengths = st.integers(1, 40)


@settings(max_examples=150, deadline=None)
@given(st.data(), lengths, lengths, lengths, st.sampled_from(PromptTruncation))
def test_cut_properties(
    data: st.DataObject, prompt: int, chosen: int, rejected: int, truncation: PromptTruncation
) -> None:
    max_length = data.draw(st.integers(2, 90), label="max_length")
    max_prompt = data.draw(st.integers(1, max_length - 1), label="max_prompt")
    chat = load_chat("mistral", "mistral_paper")
    counting = [" ".join(str(n % 10) for n in range(num)) for num in (prompt, chosen, rejected)]
    pair = make_pair(user(counting[0]), chosen=counting[1], rejected=f"No {counting[2]}")
    whole = as_lists(tokenize_one(chat, pair, max_length_tokens=10_000)[0])
    tokens, _, *was_cut, _ = tokenize_one(
        chat,
        pair,
        max_length_tokens=max_length,
        max_prompt_tokens=max_prompt,
        prompt_truncation=truncation,
    )
    kept, *responses = as_lists(tokens)
    longest = max(len(ids) for ids in whole[1:])

    assert was_cut == [len(a) < len(b) for a, b in zip([kept, *responses], whole, strict=True)]
    room = max_length - len(kept)
    for ids, full in zip(responses, whole[1:], strict=True):
        assert ids == full[:room]
        assert ids
    if len(whole[0]) + longest <= max_length:
        assert kept == whole[0]
    else:
        # No more is cut off the prompt than the longer response needs, down to max_prompt.
        assert len(kept) == min(len(whole[0]), max(max_prompt, max_length - longest))
    if truncation is KEEP_START:
        assert kept == whole[0][: len(kept)]
    else:
        assert kept[0] == whole[0][0] == chat.tokenizer.bos_token_id
        assert kept[1:] == whole[0][len(whole[0]) - len(kept) + 1 :]


# --- The original trainer, restated --------------------------------------------------------------


def original_rows(chat: Chat, pair: Pair, config: DataConfig) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of chosen and of rejected as the original trainer makes them.

    Source: `apply_chat_template` and `tokenize_row` of https://github.com/princeton-nlp/SimPO.
    """
    tokenizer = chat.tokenizer
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def text_of(messages: list[Message]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    messages = list(pair.prompt)
    speaks_of_system = any(word in tokenizer.chat_template for word in ("system", "<|im_start|>"))
    if messages[0]["role"] != "system" and speaks_of_system:
        messages = [system(""), *messages]
    prompt_text = text_of(messages)
    alone = ids_of(prompt_text)
    rows = []
    for response in pair.responses:
        reply_text = text_of(list(response))
        if reply_text.startswith(tokenizer.bos_token):
            reply_text = reply_text[len(tokenizer.bos_token) :]
        joined = ids_of(prompt_text + reply_text)
        if len(joined) < len(alone):
            raise ValueError("shorter than its prompt")
        split = len(alone) - (joined[: len(alone)] != alone)
        rows.append((joined[:split], joined[split:]))
    rows = [(p if p[:1] == [bos] else [bos, *p], r) for p, r in rows]
    rows = [(p, r if r[-1:] == [eos] else [*r, eos]) for p, r in rows]

    longest = max(len(response) for _, response in rows)
    keep, room = config.max_prompt_tokens, config.max_length_tokens
    cut = slice(-keep, None) if config.prompt_truncation is KEEP_END else slice(keep)
    rows = [(p[cut] if len(p) + longest > room else p, r) for p, r in rows]
    return [(p, r[: room - keep] if len(p) + longest > room else r) for p, r in rows]


BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"
# The last two let the tokenizer join the prompt's end with the reply.
ORIGINAL_CASES = [
    *PAPER_TOKENS,
    ("smollm2", "chatml"),
    ("mistral", "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ ' ' }}{% endfor %}"),
    ("smollm2", BARE),
]


@pytest.mark.parametrize(("family", "template"), ORIGINAL_CASES)
def test_paper_equals_the_original(family: str, template: str) -> None:
    custom = "{" in template
    chat = load_chat(family, template)
    draw = random.Random(7)
    words = ["the", "owl", "un", "believ", "able", "Grüße", "日本", "12", "?", " ", "\n", "\n\n"]

    def text() -> str:
        return "".join(
            draw.choice(words) + draw.choice(("", " ")) for _ in range(draw.randint(1, 9))
        )

    num_equal = num_merged = 0
    for _ in range(60 if custom else 30):
        turns = [user(text()), assistant(text())] * draw.randint(0, 2)
        lead = [system(text())] if draw.random() < 0.3 else []
        # Replies that begin alike merge alike: else the prompt could not be shared.
        begin = text() if draw.random() < 0.7 else ""
        pair = make_pair(
            *lead, *turns, user(text()), chosen=begin + text(), rejected=begin + text()
        )
        max_length = draw.randint(10, 150)
        config = data_config(
            compat=Compat.paper,
            max_length_tokens=max_length,
            max_prompt_tokens=draw.randint(1, max_length - 1),
            prompt_truncation=draw.choice(list(PromptTruncation)),
        )
        rows: list[tuple[list[int], list[int]]] | None
        try:
            rows = original_rows(chat, pair, config)
            uncut = original_rows(chat, pair, data_config(max_length_tokens=10_000))
        except ValueError:
            rows = None
        (result,) = chat.tokenize([pair], config)
        if isinstance(result, RecordFault):
            assert custom
            assert "the tokenizer joins" in str(result)
            assert rows is None or uncut[0][0] != uncut[1][0]
            continue
        assert rows is not None
        prompt, chosen, rejected = as_lists(result[0])
        assert rows == [(prompt, chosen), (prompt, rejected)]
        num_equal += 1
        num_merged += result[1]
    assert num_equal >= 30
    assert (num_merged > 0) == custom


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "fault"),
    [
        # `internat` has two tokens, the whole word one: the original stops here.
        (" internat", "ional", "ional law", "prompt and response differently for both responses"),
        (" internat", "ional", " Hi", "prompt and response differently for both responses"),
        ("Hi\n", "\n\nHello", "Hello", "the prompt's end with one response only"),
    ],
)
def test_paper_faults(prompt: str, chosen: str, rejected: str, fault: str) -> None:
    pair = make_pair(user(prompt), chosen=chosen, rejected=rejected)
    with pytest.raises(RecordFault, match=f"the tokenizer joins {fault}"):
        tokenize_one(load_chat("smollm2", BARE), pair, compat=Compat.paper)


MISTRAL_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}

# --- Hazards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given_length", [10**30, 131072, 4096])
@pytest.mark.parametrize("side", ["left", "right"])
def test_tokenizer_is_settled(tmp_path: Path, given_length: int, side: str) -> None:
    """It gets a pad token, and stays as it is otherwise."""
    folder = shutil.copytree(mistral_folder(), tmp_path / "tokenizer")
    file = folder / "tokenizer_config.json"
    given = {"model_max_length": given_length, "truncation_side": side, "padding_side": side}
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    tokenizer = load_tokenizer(ModelConfig(name="test", path=str(folder)), tmp_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert {key: getattr(tokenizer, key) for key in given} == given


def test_mistral_ids_are_mistrals_own() -> None:
    ids = load_chat("mistral", "mistral_paper").encode(["[INST] Hi [/INST]"])
    # What mistral-common gives for this instruction.
    assert ids == [[1, 733, 16289, 28793, 15359, 733, 28748, 16289, 28793]]


@pytest.mark.parametrize("legacy", [True, False])
def test_paper_splits_text_as_the_file_says(tmp_path: Path, legacy: bool) -> None:
    """Mistral's checkpoints have a normalizer in tokenizer.json that transformers 5 leaves out."""
    load_chat("mistral", "zephyr").tokenizer.save_pretrained(tmp_path)
    for file, changes in (
        ("tokenizer_config.json", {"legacy": legacy, "add_bos_token": True}),
        ("tokenizer.json", {"normalizer": MISTRAL_NORMALIZER, "pre_tokenizer": None}),
    ):
        settings = json.loads((tmp_path / file).read_text()) | changes
        (tmp_path / file).write_text(json.dumps(settings))
    written = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    config = ModelConfig(name="test", path=str(tmp_path), chat_template="mistral_paper")
    texts = ["[INST] a</s> and [/INST]", "[INST] Hi [/INST] Yes? </s>[INST] Bye [/INST]", " a"]
    pieces = written.encode(texts[0], add_special_tokens=False).tokens
    assert pieces[3:7] == ["▁a", "</s>", "▁▁", "and"]
    original = [[1, *written.encode(text, add_special_tokens=False).ids] for text in texts]
    assert Chat(load_tokenizer(config, tmp_path, Compat.paper)).encode(texts) == original
    assert Chat(load_tokenizer(config, tmp_path)).encode(texts) != original


def test_no_template_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.chat_template: the tokenizer has no template"):
        load_chat("mistral", None)


# A prompt that ends in a space, and a reply whose own line breaks join the header's.
MERGING = [
    ("mistral", "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ eos_token }}{% endfor %}"
     "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
     "Hello!", "Go away.", "▁", ("▁Hello ! </s>", "▁Go ▁away . </s>")),
    ("smollm2", "chatml",
     "\n\nHello!", "Go away.", "Ċ", ("ĊĊ Ċ Hello ! <|im_end|>", "Ċ Go Ġaway . <|im_end|>")),
]  # fmt: skip


@pytest.mark.parametrize(("family", "template", "chosen", "rejected", "lost", "responses"), MERGING)
def test_merge_with_the_prompt(
    family: str, template: str, chosen: str, rejected: str, lost: str,
    responses: tuple[str, str], tmp_path: Path,
) -> None:  # fmt: skip
    chat = load_chat(family, template)
    pair = make_pair(user("Hi"), chosen=chosen, rejected=rejected)
    tokens, merged, *was_cut, _ = tokenize_one(chat, pair)
    assert (merged, was_cut) == (True, [False] * 3)
    assert pieces(chat, tokens)[1:] == responses
    (alone,) = chat.encode([chat.prompt_text(pair.prompt)])
    assert alone == [*tokens.prompt_ids, chat.tokenizer.convert_tokens_to_ids(lost)]
    for reply, ids in zip((chosen, rejected), as_lists(tokens)[1:], strict=True):
        text = chat.tokenizer.apply_chat_template([*pair.prompt, assistant(reply)], tokenize=False)
        (whole,) = chat.encode([text.rstrip("\n")])
        assert [*tokens.prompt_ids, *ids] == whole
    assert tokenize_set(chat, [pair], data_config(), tmp_path).report.merged_prompts == 1


NO_SYSTEM = """{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}
{%- for m in messages %}{{ m.content ~ eos_token }}{% endfor %}"""
OTHER_HEADER = """{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ 'bot: ' }}{% endif %}"""
FAULTS = [
    ("mistral", NO_SYSTEM, {"prompt": (system("Be kind."), user("Hi"))},
     "the chat template refuses it: no system"),
    ("mistral", OTHER_HEADER, {}, "the chat template writes the prompt differently before a reply"),
    # `internat` has two tokens, the whole word one, which has none in common with them.
    ("smollm2", BARE,
     {"prompt": (user(" internat"),), "chosen": (assistant("ional"),),
      "rejected": (assistant("ional law"),)},
     "prompt and dialogue share no token"),
    ("llama3", "llama3", {"rejected": (assistant(" \n"),)}, "rejected: the response has no token"),
    ("llama3", "llama3", {"chosen": (assistant("a<|eot_id|>b"),)},
     "a message holds the token <|eot_id|> as text"),
    ("mistral", "zephyr", {"rejected": (assistant("a </s>"),)},
     "a message holds the token </s> as text"),
    ("mistral", "zephyr", {"prompt": (user("what is <s>?"),)},
     "a message holds the token <s> as text"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "template", "changes", "fault"), FAULTS)
def test_faults(family: str, template: str, changes: dict[str, Any], fault: str) -> None:
    chat = load_chat(family, template)
    pair = make_pair(user("Hi"))
    if changes:
        tokenize_one(chat, pair)  # no fault without them
    with pytest.raises(RecordFault) as caught:
        tokenize_one(chat, replace(pair, **changes))
    assert fault in str(caught.value)

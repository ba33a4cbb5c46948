"""Supervised fine-tuning: tokens of dialogues, their loss, and a whole run."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo.config.compose import compose_run
from simpo.data.packing import pack
from simpo.data.pairs import Pair, TokenizedPair
from simpo.data.reading.records import RecordFault, to_dialogue
from simpo.data.tokens import tokenize_set
from simpo.loop.train import train
from simpo.loss import PairLogps, pair_losses
from simpo.loss.without_reference import SftConfig
from simpo.model.policy import Policy
from simpo.run.files import read_results
from tests.support.real_tokenizers import (
    assistant,
    data_config,
    load_chat,
    make_pair,
    system,
    tokenize_one,
    user,
)
from tests.support.tiny_models import gradients, random_pairs, tiny_model
from tests.support.whole_runs import metrics_of

TURNS = [user("Hi"), assistant("Yes?"), user("Bye"), assistant("See you.")]


def dialogue(*messages: dict[str, str]) -> Pair:
    return to_dialogue({"messages": list(messages)}, "data.jsonl record 1")


def test_a_dialogue_is_split_at_the_first_reply() -> None:
    pair = dialogue(system("Be kind."), *TURNS)
    assert pair.prompt == (system("Be kind."), user("Hi"))
    assert (pair.chosen, pair.rejected) == (tuple(TURNS[1:]), None)


def test_a_pair_is_imitated_by_its_chosen_reply() -> None:
    pair = to_dialogue({"prompt": "Hi", "chosen": "Yes?", "rejected": "No."}, "data.jsonl record 1")
    assert (pair.prompt, pair.responses) == ((user("Hi"),), ((assistant("Yes?"),),))


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (TURNS[:3], "messages: the last turn must be the assistant's, got user"),
        ([user("Hi"), assistant(" ")], "messages[1]: the response is empty"),
        ([assistant("Yes?")], "messages: begins with the assistant, whose reply answers nothing"),
        (
            [*TURNS[:2], system("x"), assistant("y")],
            "messages: a system message may only come first",
        ),
        ([], "messages: holds no message"),
        ("Hi", "messages: must be a list of messages, got text"),
    ],
)
def test_faults_of_rows(messages: object, fault: str) -> None:
    with pytest.raises(RecordFault) as caught:
        to_dialogue({"messages": messages}, "data.jsonl record 1")
    assert str(caught.value) == fault


@pytest.mark.parametrize(
    ("family", "template", "end"),
    [
        ("smollm2", None, "<|im_end|>"),
        ("llama3", None, "<|eot_id|>"),
        ("mistral", "mistral_paper", "</s>"),
        ("mistral", "zephyr", "</s>"),
        ("gemma2", "gemma_paper", "<end_of_turn>"),
    ],
)
def test_what_is_scored(family: str, template: str | None, end: str) -> None:
    """Both replies with the token that ends them, and nothing else; the ids are the template's."""
    chat = load_chat(family, template)
    tokens, *flags = tokenize_one(chat, dialogue(*TURNS))
    assert tokens.scored[0] is not None and not any(flags)
    decode = chat.tokenizer.decode
    scored = decode(tokens.chosen_ids[tokens.scored[0]])
    assert scored.replace(" ", "") == f"Yes?{end}Seeyou.{end}"
    between = decode(tokens.chosen_ids[~tokens.scored[0]])
    assert "Bye" in between and "Yes" not in between and "See" not in between
    whole = [*tokens.prompt_ids.tolist(), *tokens.chosen_ids.tolist()]
    rendered = str(chat.tokenizer.apply_chat_template(TURNS, tokenize=False))
    assert chat.encode([rendered])[0][: len(whole)] == whole
    assert len(tokens.rejected_ids) == 0


def test_a_template_that_ends_no_reply() -> None:
    """What the user says next would be scored as the reply's."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    with pytest.raises(RecordFault, match="the chat template ends no reply before the next turn"):
        tokenize_one(load_chat("smollm2", template), dialogue(*TURNS))


def test_one_reply_is_tokenized_as_that_of_a_pair() -> None:
    chat = load_chat("smollm2", None)
    pair = make_pair(system("Be kind."), user("Hi"))
    of_pair, *_ = tokenize_one(chat, pair)
    alone, *_ = tokenize_one(chat, replace(pair, rejected=None))
    assert alone.prompt_ids.tolist() == of_pair.prompt_ids.tolist()
    assert alone.chosen_ids.tolist() == of_pair.chosen_ids.tolist()
    assert alone.scored[0] is None


def test_a_long_dialogue_loses_its_end_and_an_endless_prompt_its_beginning() -> None:
    chat = load_chat("smollm2", None)
    long = dialogue(user("Hi"), assistant("Yes?"), user("More. " * 50), assistant("No."))
    tokens, _, cut_prompt, cut_reply, *_ = tokenize_one(
        chat, long, max_length_tokens=64, max_prompt_tokens=60
    )
    assert (cut_prompt, cut_reply) == (False, True)
    assert tokens.num_tokens() == 64 and tokens.scored[0].any()
    tokens, _, cut_prompt, *_ = tokenize_one(
        chat,
        dialogue(user("More. " * 50), assistant("Yes?")),
        max_length_tokens=64,
        max_prompt_tokens=32,
    )
    assert cut_prompt and tokens.num_tokens() <= 64 and tokens.scored[0] is None


def test_the_cache_keeps_what_is_scored(tmp_path: Path) -> None:
    chat = load_chat("smollm2", None)
    pairs = [dialogue(*TURNS), dialogue(*TURNS[:2])]
    direct = [tokenize_one(chat, pair)[0] for pair in pairs]
    for _ in range(2):  # written, then read
        stored = tokenize_set(chat, pairs, data_config(), tmp_path).tokens
        for one, other in zip(stored, direct, strict=True):
            mask = np.ones(len(other.chosen_ids), bool)
            wanted = mask if other.scored[0] is None else other.scored[0]
            assert one.scored[0].tolist() == wanted.tolist()
            assert one.chosen_ids.tolist() == other.chosen_ids.tolist()


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=15, deadline=None)
def test_packed_dialogues(seed: int, share_prefix: bool) -> None:
    """Loss and gradients against one padded float64 forward of each, masked by hand."""
    rng = np.random.default_rng(seed)
    dialogues = []
    for pair in random_pairs(rng, 4):
        scored = rng.random(len(pair.chosen_ids)) < 0.6
        scored[0] = True
        dialogues.append(
            TokenizedPair(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids[:0]), (scored, None))
        )
    model = tiny_model("gemma2" if share_prefix and seed % 2 else "llama")
    plain = copy.deepcopy(model).double()
    plain.set_attn_implementation("eager")
    nll, count = torch.zeros(()), 0
    for item in dialogues:
        ids = torch.tensor([[*item.prompt_ids.tolist(), *item.chosen_ids.tolist()]])
        logps = plain(input_ids=ids).logits[0, :-1].log_softmax(-1)
        own = logps.gather(-1, ids[0, 1:, None])[len(item.prompt_ids) - 1 :, 0]
        nll = nll - own[torch.from_numpy(item.scored[0])].sum()
        count += int(item.scored[0].sum())
    (nll / count).backward()

    row = pack(dialogues, range(4), share_prefix)
    assert (row.chosen_tokens, row.response_tokens[1::2]) == (count, (0, 0, 0, 0))
    assert row.input_ids.shape[1] == sum(item.num_tokens(share_prefix) for item in dialogues)

    def pair_loss(logps: PairLogps) -> torch.Tensor:
        return pair_losses(SftConfig(), logps) - logps.chosen / count

    policy = Policy(model, share_prefix=share_prefix)
    if not share_prefix:
        model.set_attn_implementation("sdpa")
    loss, _ = policy(row, pair_loss)
    loss.backward()
    assert loss.item() == pytest.approx((nll / count).item(), rel=1e-5)
    wanted = gradients(plain)
    size = sum(float(g.square().sum()) for g in wanted.values()) ** 0.5
    for name, gradient in gradients(model).items():
        assert (gradient - wanted[name]).norm() < 1e-5 * size, name


def test_a_whole_run(tiny_run: list[str], tmp_path: Path) -> None:
    """Dialogues in, a model out that makes them likelier; its metrics are of the replies only."""
    rows = [{"messages": [*TURNS, user(f"{n}?"), assistant(f"{n}!")]} for n in range(24)]
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text)
    folder = tmp_path / "run"
    run = compose_run([*tiny_run, "loss=sft", "train.learning_rate=1e-2", f"run_dir={folder}"])
    assert (run.monitor.metric, run.monitor.mode.value) == ("loss", "min")
    after = read_results(train(run))["eval_after"]
    before = metrics_of(folder)[0]
    assert after["loss"] < 0.9 * before["eval/loss"]
    assert not [key for key in after if "reward" in key or "rejected" in key]
    header = (folder / "held_out/step-000006.csv").read_text().splitlines()[0]
    assert header == "pair,preference_loss,logps/chosen,chosen_nll,chosen_tokens"

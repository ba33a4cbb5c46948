"""Measures how far a model has moved from another one, along the replies that it writes.

<folder>/
    drift.jsonl            hashes of a held-out reply with its prompt and of a model, the reply's
                           tokens, and their summed log-prob and entropy under the model
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from simpo.backend import Backend, build_backend
from simpo.config.choices import Checkpointing, Dtype
from simpo.config.errors import ConfigError
from simpo.config.models import ModelConfig
from simpo.config.schema import RunConfig
from simpo.data.chats.chat import Chat
from simpo.data.chats.checks import refuse_unknown_ids
from simpo.data.packing import pack
from simpo.data.pairs import TokenizedPair
from simpo.data.plan import rows_of_pairs
from simpo.loop.console import libraries_quiet
from simpo.model.check import check_packing
from simpo.model.load import decided_dtype, load_policy, weights_dtype, without_new_adapters
from simpo.model.policy import Policy
from simpo.model.pretrained import load_settings, num_embeddings
from simpo.model.saved import naming
from simpo.on_policy.files import (
    ADAPTER,
    append_lines,
    content_hash,
    damaged_line,
    on_policy_folder,
    read_lines,
    read_prompts,
    read_settings,
    read_stored_replies,
    refuse_other_settings,
    weights_content,
    working_in,
)
from simpo.on_policy.generate import folder_chat, model_settings
from simpo.on_policy.measures import read_measures, write_measures
from simpo.run.progress import bar, say

ROW_TOKENS = 4096
"""Of a packed row, which is one forward; a longer reply gets its own."""
DRIFT = ("entropy", "kl", "kl_reply")
"""Keys of measures.json."""


@dataclass(frozen=True)
class Drawn:
    """A reply as it was drawn.

    Attributes:
        reply_ids: with the token that ended it, if it was not cut off.
        name: hash of all ids.
    """

    prompt_ids: list[int]
    reply_ids: list[int]
    name: str


@dataclass(frozen=True)
class Sums:
    """Sums over the tokens of a reply under a model, in nats."""

    tokens: int
    logp: float
    entropy: float


@libraries_quiet()
def measure_drift(run: RunConfig, base: ModelConfig) -> None:
    """Measure the entropy of the run's model, and its divergence from `base`, on held-out replies.

    The replies to held-out prompts in `on_policy.folder` are scored under both models, one loaded
    after the other, at temperature 1. "test" of measures.json gets

        entropy    nats per token: mean over tokens of the exact entropy of the model's next token
        kl         nats per token: mean over tokens of logp_model - logp_base
        kl_reply   nats per reply: mean over replies of the sum of that

    A reply's tokens include the one that ended it. Since replies were drawn with
    `on_policy.temperature` and `top_p`, kl is the divergence along what the policy writes, and not
    exactly KL(model || base). It is the estimator k1 of http://joschu.net/blog/kl-approx.html,
    which may be below 0 by chance. What is computed is kept in drift.jsonl, by the content of reply
    and model, so that a stopped command continues. If both models have the same content, kl is 0
    and `base` is not loaded.

    Args:
        run: the run whose model wrote the replies.
        base: loads the model to compare with, such as the one before the first round.

    Raises:
        ConfigError: a model cannot be loaded, the replies are of another model, there are none to
            held-out prompts, or another process works in the folder.
        DamagedError: a file of the folder is not as it was written.
        RunError: it cannot be written.
    """
    folder, cache_dir = on_policy_folder(run), Path(run.cache_dir).expanduser()
    with working_in(folder):
        chat = folder_chat(run, folder)
        replies = _held_out_replies(run, chat, folder)
        backend = build_backend(run.backend, run.train.precision)
        if base.dtype is Dtype.auto:  # else rounding would count as drift
            base = replace(base, dtype=decided_dtype(run.model, backend.device))
        own = _content("model.path", run.model, cache_dir, backend)
        other = _content("base", base, cache_dir, backend)
        sums = _sums(run.model, own, chat, replies, folder, cache_dir, backend)
        with naming("base"):
            base_sums = _sums(base, other, chat, replies, folder, cache_dir, backend)
        tokens = sum(one.tokens for one in sums)
        kl = sum(one.logp - two.logp for one, two in zip(sums, base_sums, strict=True))
        drift = {
            "entropy": sum(one.entropy for one in sums) / tokens,
            "kl": kl / tokens,
            "kl_reply": kl / len(sums),
        }
        write_measures(folder, {**read_measures(folder), "test": drift}, DRIFT)


def _held_out_replies(run: RunConfig, chat: Chat, folder: Path) -> list[Drawn]:
    """The replies to held-out prompts, each as often as it was drawn.

    Raises:
        ConfigError: they are of another model, there are none, or their ids are not known.
    """
    prompts = {prompt.id: prompt for prompt in read_prompts(folder) if prompt.split == "test"}
    replies = [reply for reply in read_stored_replies(folder) if reply.id in prompts]
    if not replies:
        raise ConfigError(
            [f"on_policy.folder: no replies to held-out prompts in {folder} (run simpo.generate)"]
        )
    refuse_other_settings(folder, read_settings(folder), model_settings(run, chat))
    texts = [chat.prompt_text(prompt.prompt, prompt.tools) for prompt in prompts.values()]
    ids = dict(zip(prompts, chat.encode(texts), strict=True))
    drawn = []
    for reply in replies:
        if reply.ids is None:
            raise ConfigError(
                [
                    f"on_policy.folder: the replies in {folder} have no token ids, an earlier "
                    "version wrote them (generate into another on_policy.folder)"
                ]
            )
        prompt_ids, own = list(ids[reply.id]), list(reply.ids)
        own += [chat.end_id] if reply.ended else []
        drawn.append(Drawn(prompt_ids, own, content_hash([prompt_ids, own])))
    return drawn


def _content(key: str, model: ModelConfig, cache_dir: Path, backend: Backend) -> str:
    """Hash of what decides the log-probs of a model.

    Args:
        key: the setting that names it, for messages.
    """
    return content_hash(
        [
            *weights_content(key, model, cache_dir, ADAPTER),
            model.quantization.value,
            str(weights_dtype(model, backend.device)),
            backend.bf16,
        ]
    )


def _sums(
    model: ModelConfig,
    content: str,
    chat: Chat,
    replies: Sequence[Drawn],
    folder: Path,
    cache_dir: Path,
    backend: Backend,
) -> list[Sums]:
    """Sums of each reply under a model, which is loaded if drift.jsonl lacks some.

    Raises:
        ConfigError: it cannot be loaded, or does not support packed rows.
        DataError: it has no embedding of a token.
    """
    file = folder / "drift.jsonl"
    known = _read(file, content)
    todo = list({reply.name: reply for reply in replies if reply.name not in known}.values())
    if todo:
        for found in _compute(model, chat, todo, cache_dir, backend):
            append_lines(
                file,
                ({"reply": name, "model": content, **vars(s)} for name, s in found.items()),
            )
            known |= found
        gc.collect()
        if backend.device.type == "cuda":
            torch.cuda.empty_cache()
    return [known[reply.name] for reply in replies]


def _compute(
    model: ModelConfig, chat: Chat, replies: Sequence[Drawn], cache_dir: Path, backend: Backend
) -> Iterator[Mapping[str, Sums]]:
    """Load a model, and yield the sums of a row of replies after the other, by their names."""
    pairs = [TokenizedPair.of(reply.prompt_ids, reply.reply_ids, []) for reply in replies]
    named = (("a held-out reply", reply.prompt_ids + reply.reply_ids) for reply in replies)
    refuse_unknown_ids(chat, named, num_embeddings(load_settings(model, cache_dir)))
    say(f"loading the weights of {model.path} ...")
    as_it_is = without_new_adapters(model, backend.device)
    policy = load_policy(
        replace(as_it_is, gradient_checkpointing=Checkpointing.none),
        cache_dir,
        backend.device,
        seed=0,
        bf16=backend.bf16,
        share_prefix=False,
    )
    lengths = np.array([pair.num_tokens() for pair in pairs])
    check_packing(policy, backend.bf16, int(lengths.max()), ROW_TOKENS)
    with bar(f"log-probs of replies under {model.path}", len(pairs)) as shown:
        for row in rows_of_pairs(range(len(pairs)), lengths, ROW_TOKENS):
            found = _row_sums(policy, [pairs[i] for i in row], backend)
            yield {replies[i].name: sums for i, sums in zip(row, found, strict=True)}
            shown.advance(len(row))


@torch.no_grad()
def _row_sums(policy: Policy, pairs: Sequence[TokenizedPair], backend: Backend) -> list[Sums]:
    """Sums of the replies of a row."""
    policy.eval()
    row = pack(pairs, range(len(pairs)), share_prefix=False)
    with torch.autocast(backend.device.type, torch.bfloat16, enabled=backend.bf16):
        found = policy.token_scores(row.to(backend.device))
    counts = row.response_tokens[0 :: row.num_responses]
    logps, entropies = (scores.double().cpu().split(counts) for scores in found)
    return [
        Sums(count, float(logp.sum()), float(entropy.sum()))
        for count, logp, entropy in zip(counts, logps, entropies, strict=True)
    ]


def _read(file: Path, content: str) -> dict[str, Sums]:
    """What drift.jsonl holds of a model, by reply.

    Raises:
        DamagedError: a line is not as it was written.
    """
    found = {}
    for number, line in enumerate(read_lines(file), start=1):
        match line:
            case {
                "reply": str(name),
                "model": str(model),
                "tokens": int(tokens),
                "logp": float(logp),
                "entropy": float(entropy),
            }:
                if model == content:
                    found[name] = Sums(tokens, logp, entropy)
            case _:
                raise damaged_line(file, number, "no log-prob of a reply")
    return found

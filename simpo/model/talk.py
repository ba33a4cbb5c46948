"""Loads a trained model to talk to, with its base beside it, and streams its replies.

Prompts have the token ids of training, and a reply ends at the token that ends a response there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from simpo.config.choices import Checkpointing, Device, Dtype, Quantization
from simpo.config.errors import ConfigError, DataError
from simpo.config.models import LoraConfig, ModelConfig
from simpo.config.schema import RunConfig
from simpo.data.chats.chat import Chat
from simpo.data.chats.checks import refuse_unknown_ids
from simpo.data.pairs import Message, Pair
from simpo.data.reading.records import RecordFault
from simpo.model.export import model_folder
from simpo.model.generate import Reply, Sampling, decode_reply, generate_replies
from simpo.model.load import load_policy
from simpo.model.policy import Policy
from simpo.model.pretrained import load_settings, num_embeddings
from simpo.model.saved import checked_base, naming, saved_model


@dataclass(frozen=True)
class TalkingModel:
    """A model to talk to.

    Attributes:
        policy: the model, whose adapter can be switched off if it has one.
        base: the base of a whole model, if it is to answer too; an adapter is its own base.
        name, base_name: what to call them in messages; `base_name` is empty without a base.
        context_tokens: the longest prompt with its reply; None if the model names no limit.
    """

    policy: Policy
    base: Policy | None
    chat: Chat
    device: torch.device
    name: str
    base_name: str
    context_tokens: int | None

    @property
    def dtype(self) -> str:
        """Dtype of the weights."""
        return str(self.policy.base.dtype).removeprefix("torch.")

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a dialogue that ends with a question, with the generation prompt.

        Raises:
            DataError: a message holds a control token as text, or the chat template refuses the
                dialogue, or it fills the context.
        """
        for message in messages:
            try:
                self.chat.check_pair(Pair((message,), (), None, ""))
            except RecordFault as fault:
                mine = message is messages[-1] or message["role"] == "system"
                remedy = "leave it out" if mine else "/undo takes the reply back"
                raise DataError(f"{fault} ({remedy})") from fault
        try:
            text = self.chat.prompt_text(messages)
        except RecordFault as fault:
            has_system = messages[0]["role"] == "system"
            remedy = "leave the system prompt out" if has_system else "/clear begins a new dialogue"
            raise DataError(f"{fault} ({remedy})") from fault
        (ids,) = self.chat.encode([text])
        settings: Any = self.policy.base.config
        refuse_unknown_ids(self.chat, [("the dialogue", ids)], num_embeddings(settings))
        if self.context_tokens is not None and len(ids) >= self.context_tokens:
            raise DataError(
                f"the dialogue has {len(ids):,} tokens, which leaves no room for a reply in the "
                f"{self.context_tokens:,} that the model reads (shorten it, or begin a new one "
                "with /clear)"
            )
        return ids

    def reply(
        self,
        ids: list[int],
        sampling: Sampling,
        show: Callable[[str], None],
        *,
        of_base: bool = False,
    ) -> tuple[Reply, str]:
        """Generate a reply and show its text as it comes. Ctrl-C (KeyboardInterrupt) stops it.

        Args:
            ids: the prompt of `prompt_ids`.
            show: called with each part of the text.
            of_base: the base answers.

        Returns:
            The reply, and why it ended early; empty if it did not.
        """
        room = sampling.max_new_tokens
        if self.context_tokens is not None:
            room = min(room, self.context_tokens - len(ids))
        stream = _Stream(self.chat, show)
        policy: Policy = self.policy
        adapter: AbstractContextManager[None] = nullcontext()
        if of_base and self.base is not None:
            policy = self.base
        elif of_base:
            adapted: Any = policy.model
            adapter = adapted.disable_adapter()
        torch.manual_seed(sampling.seed)
        try:
            with adapter:
                (reply,) = generate_replies(
                    policy,
                    self.chat,
                    [ids],
                    replace(sampling, max_new_tokens=room),
                    self.device,
                    stream,
                )
        except KeyboardInterrupt:
            stream.end()
            return decode_reply(self.chat, stream.ids), "stopped"
        if reply.ended:
            return reply, ""
        if room < sampling.max_new_tokens:
            return reply, "the context is full: /clear begins a new dialogue"
        return reply, f"cut after max_new_tokens={room}"


class _Stream(TextStreamer):
    """Shows a reply word by word, and keeps its ids."""

    def __init__(self, chat: Chat, show: Callable[[str], None]) -> None:
        super().__init__(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ids: list[int] = []
        self._end_id, self._show = chat.end_id, show

    def put(self, value: Any) -> None:
        if self.next_tokens_are_prompt:
            super().put(value)
        elif (token := int(value)) != self._end_id:
            self.ids.append(token)
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._show(text)


def load_talking_model(source: str, base: str | None, dtype: Dtype, device: Device) -> TalkingModel:
    """Load what a run trained, or another model or adapter.

    What the run's files tell (chat template, its variables and date, the base) is used; nothing is
    written.

    Args:
        source: folder of a run, a model or an adapter, or a hub id.
        base: None: without a base; empty: with it; otherwise the base's folder or hub id, or the
            folder of a run whose model is the base.
        dtype: of the weights; auto is bfloat16 on a GPU, else that of the files.

    Raises:
        ConfigError: there is no model, it or its base cannot be loaded, or the base is not known.
        DamagedError: a file of the run cannot be read.
    """
    if base and Path(base).expanduser().is_dir():
        base = str(model_folder(Path(base).expanduser()))
    saved = saved_model(source, base)
    target = _device(device)
    origin = None
    if base is not None and not saved.adapted:
        origin = _base_of_whole(saved.where, saved.run, base)
    with naming("base" if saved.adapted else "RUN"):
        chat = saved.chat()
        policy = load_for_talk(saved.model, saved.cache_dir, target, dtype)
    settings: Any = policy.base.config
    base_name = "" if base is None else (origin or saved.model).path
    with naming("base"):
        loaded_base = (
            None if origin is None else load_for_talk(origin, saved.cache_dir, target, dtype)
        )
    return TalkingModel(
        policy, loaded_base, chat, target, saved.where, base_name, context_tokens(settings)
    )


def context_tokens(settings: Any) -> int | None:
    """The longest prompt with its reply; None if a model's config.json names no limit."""
    return getattr(settings.get_text_config(decoder=True), "max_position_embeddings", None)


def _base_of_whole(where: str, run: RunConfig | None, base: str) -> ModelConfig:
    """Settings that load the base of a whole model, without an adapter.

    Raises:
        ConfigError: it is not known, or not there.
    """
    if base:
        return checked_base(ModelConfig(name="base", path=base))
    if run is None:
        raise ConfigError([f"base: {where} does not name its base (base=FOLDER_OR_HUB_ID)"])
    return checked_base(
        replace(
            run.model,
            gradient_checkpointing=Checkpointing.none,
            quantization=Quantization.none,
            lora=LoraConfig(),
        )
    )


def load_for_talk(
    model: ModelConfig, cache_dir: Path, device: torch.device, dtype: Dtype
) -> Policy:
    """Load weights for generation, with transformers' own attention."""
    settings = load_settings(model, cache_dir)
    if dtype is Dtype.auto:
        saved = getattr(settings, "dtype", None)
        narrow = device.type == "cuda" or saved is torch.bfloat16
        dtype = Dtype.bfloat16 if narrow else Dtype.float32
    return load_policy(
        replace(model, dtype=dtype),
        cache_dir,
        device,
        seed=0,
        bf16=dtype is Dtype.bfloat16,
        share_prefix=False,
        settings=settings,
    )


def _device(wanted: Device) -> torch.device:
    """
    Raises:
        ConfigError: there is no GPU.
    """
    found = torch.cuda.is_available()
    if wanted is Device.cuda and not found:
        raise ConfigError(["device: no CUDA device found, got cuda (device=cpu)"])
    return torch.device("cuda" if found and wanted is not Device.cpu else "cpu")

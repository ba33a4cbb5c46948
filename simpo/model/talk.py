"""Loads a trained model to talk to, with its base beside it, and streams its replies.

Prompts have the token ids of training, and a reply ends at the token that ends a response there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer
from transformers.utils import cached_file

from simpo.config.check import load_run
from simpo.config.choices import Checkpointing, Compat, Device, Dtype, Quantization
from simpo.config.errors import ConfigError, DataError
from simpo.config.models import ADAPTER_FILE, LoraConfig, ModelConfig
from simpo.config.schema import RunConfig
from simpo.data import hub
from simpo.data.chats.chat import Chat
from simpo.data.chats.checks import refuse_unknown_ids
from simpo.data.pairs import Message, Pair
from simpo.data.reading.records import RecordFault
from simpo.model.export import model_folder
from simpo.model.generate import Reply, Sampling, decode_reply, generate_replies
from simpo.model.load import load_policy
from simpo.model.policy import Policy
from simpo.model.pretrained import load_settings, num_embeddings
from simpo.model.tokenizer import load_tokenizer
from simpo.run.files import read_status
from simpo.run.folder import template_date


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
        policy = self.base if of_base and self.base is not None else self.policy
        torch.manual_seed(sampling.seed)
        try:
            with self._adapter_off(of_base):
                (reply,) = generate_replies(
                    policy,
                    self.chat,
                    [ids],
                    room,
                    self.device,
                    sampling.temperature,
                    sampling.top_p,
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

    def _adapter_off(self, of_base: bool) -> AbstractContextManager[None]:
        if not of_base or self.base is not None:
            return nullcontext()
        model: Any = self.policy.model
        off: AbstractContextManager[None] = model.disable_adapter()
        return off


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
    where, run = _found(source)
    if base and Path(base).expanduser().is_dir():
        base = str(model_folder(Path(base).expanduser()))
    target = _device(device)
    adapted = _holds(where, ADAPTER_FILE)
    model = _adapted(where, run, base) if adapted else _whole(where, run)
    origin = None if adapted or base is None else _base_of_whole(where, run, base)
    cache_dir = Path(run.cache_dir if run else "~/.cache/simpo").expanduser()
    compat = run.data.compat if run else Compat.none
    with _naming("base" if adapted else "RUN"):
        chat = Chat(
            load_tokenizer(model, cache_dir, compat),
            template_date(run) if run else None,
            model.chat_template_kwargs,
        )
        policy = _loaded(model, cache_dir, target, dtype)
    settings: Any = policy.base.config
    base_name = "" if base is None else (origin or model).path
    with _naming("base"):
        loaded_base = None if origin is None else _loaded(origin, cache_dir, target, dtype)
    return TalkingModel(
        policy,
        loaded_base,
        chat,
        target,
        where,
        base_name,
        getattr(settings.get_text_config(decoder=True), "max_position_embeddings", None),
    )


def _found(source: str) -> tuple[str, RunConfig | None]:
    """The folder or hub id of a model, and the settings of its run if they lie with it.

    Raises:
        ConfigError: there is no model; for a run, with its state.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source, None
    where = model_folder(folder)
    files = ("config.json", ADAPTER_FILE)
    if not any((where / name).is_file() for name in files):
        if (folder / "run.yaml").is_file():
            status = read_status(folder)
            at = f"{status.get('state', 'begun')} at step {status.get('step', 0)}"
            if total := status.get("total_steps"):
                at += f" of {total}"
            raise ConfigError(
                [
                    f"RUN: the run in {folder} has no model yet, it is {at} (the model is saved "
                    f"at its end; {folder}/command.txt has the command that continues it)"
                ]
            )
        wanted = " or ".join(f"{where}/{name}" for name in files)
        raise ConfigError([f"RUN: must hold a run or a model, got {source} (no {wanted})"])
    run_dir = next((path for path in (folder, where.parent) if (path / "run.yaml").is_file()), None)
    if run_dir is None:
        return str(where), None
    return str(where), replace(load_run(run_dir / "run.yaml", check=False), run_dir=str(run_dir))


def _holds(where: str, name: str) -> bool:
    """Whether a folder or repository holds a file.

    Raises:
        ConfigError: the repository cannot be read.
    """
    if Path(where).is_dir():
        return (Path(where) / name).is_file()
    hub.go_offline_if_unreachable()
    try:
        return cached_file(where, name, _raise_exceptions_for_missing_entries=False) is not None
    except Exception as error:  # from the hub, its client or the network
        fault = hub.reason(error, where)
        raise ConfigError([f"RUN: {where} cannot be loaded: {fault}"]) from error


def _adapted(where: str, run: RunConfig | None, base: str | None) -> ModelConfig:
    """Settings that load an adapter on its base, quantised as in training.

    Raises:
        ConfigError: the adapter does not name its base, or the base is not there.
    """
    if run is not None:
        model = run.model
    else:
        from simpo.model.adapters import adapter_settings

        named = adapter_settings("RUN", where)
        path = base or named.base_model_name_or_path or ""
        model = ModelConfig(name="base", path=path, revision=named.revision)
    if base:
        model = replace(model, path=base, revision=None)
    model = replace(
        model,
        tokenizer=where if _holds(where, "tokenizer_config.json") else model.tokenizer,
        chat_template=None if _holds(where, "tokenizer_config.json") else model.chat_template,
        gradient_checkpointing=Checkpointing.none,
        lora=LoraConfig(adapter=where),
    )
    return _checked_base(model)


def _whole(where: str, run: RunConfig | None) -> ModelConfig:
    """Settings that load a whole model, with its own tokenizer and template."""
    if run is None:
        return ModelConfig(name="model", path=where)
    return ModelConfig(
        name="model",
        path=where,
        trust_remote_code=run.model.trust_remote_code,
        chat_template_kwargs=run.model.chat_template_kwargs,
    )


def _base_of_whole(where: str, run: RunConfig | None, base: str) -> ModelConfig:
    """Settings that load the base of a whole model, without an adapter.

    Raises:
        ConfigError: it is not known, or not there.
    """
    if base:
        return _checked_base(ModelConfig(name="base", path=base))
    if run is None:
        raise ConfigError([f"base: {where} does not name its base (base=FOLDER_OR_HUB_ID)"])
    return _checked_base(
        replace(
            run.model,
            gradient_checkpointing=Checkpointing.none,
            quantization=Quantization.none,
            lora=LoraConfig(),
        )
    )


def _checked_base(model: ModelConfig) -> ModelConfig:
    """
    Raises:
        ConfigError: the base is not named, or there is no such folder.
    """
    if not model.path:
        raise ConfigError(["base: the adapter does not name it (base=FOLDER_OR_HUB_ID)"])
    faults = [text for text in model.problems() if text.startswith("path: ")]
    if faults:
        raise ConfigError([f"base: {faults[0].removeprefix('path: ')} (base=FOLDER_OR_HUB_ID)"])
    return model


@contextmanager
def _naming(key: str) -> Iterator[None]:
    """Let errors of loading a model name it as the command line does.

    Raises:
        ConfigError: in place of one that names `model.path`.
    """
    try:
        yield
    except ConfigError as error:
        problems = [re.sub(r"^model\.path(?=: )", key, text) for text in error.problems]
        raise ConfigError(problems) from error


def _loaded(model: ModelConfig, cache_dir: Path, device: torch.device, dtype: Dtype) -> Policy:
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

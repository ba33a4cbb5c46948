"""Finds what a run saved, or another model or adapter, and how it is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from transformers.utils import cached_file

from simpo.config.check import load_run
from simpo.config.choices import Checkpointing, Compat
from simpo.config.errors import ConfigError
from simpo.config.models import ADAPTER_FILE, BUILTIN, LoraConfig, ModelConfig
from simpo.config.schema import RunConfig
from simpo.data import hub
from simpo.data.chats.chat import Chat
from simpo.model.export import model_folder
from simpo.model.tokenizer import load_tokenizer
from simpo.run.files import read_status
from simpo.run.folder import template_date


@dataclass(frozen=True)
class SavedModel:
    """What a run saved, or another model or adapter, before anything of it is loaded.

    Attributes:
        where: its folder or hub id.
        run: the settings of the run it lies with, if there is one.
        model: settings that load it.
        adapted: whether it is an adapter, which `model` loads on its base.
    """

    where: str
    run: RunConfig | None
    model: ModelConfig
    adapted: bool

    @property
    def cache_dir(self) -> Path:
        return Path(self.run.cache_dir if self.run else "~/.cache/simpo").expanduser()

    def chat(self) -> Chat:
        """Its tokenizer with the chat template, variables and date of its training.

        Raises:
            ConfigError: they cannot be loaded.
        """
        compat = self.run.data.compat if self.run else Compat.none
        return Chat(
            load_tokenizer(self.model, self.cache_dir, compat),
            template_date(self.run) if self.run else None,
            self.model.chat_template_kwargs,
        )


def saved_model(source: str, base: str | None = None) -> SavedModel:
    """Find what a run saved, or another model or adapter.

    Args:
        source: folder of a run, a model or an adapter, or a hub id.
        base: of an adapter, instead of the one that it names.

    Raises:
        ConfigError: there is no model, or its base is not known.
        DamagedError: a file of the run cannot be read.
    """
    where, run = _found(source)
    adapted = _holds(where, ADAPTER_FILE)
    return SavedModel(
        where, run, _adapted(where, run, base) if adapted else _whole(where, run), adapted
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
    if where == BUILTIN:
        return False
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
    if _holds(where, "tokenizer_config.json"):
        model = replace(model, tokenizer=where, chat_template=None)
    model = replace(
        model,
        gradient_checkpointing=Checkpointing.none,
        lora=LoraConfig(adapter=where),
    )
    return checked_base(model)


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


def checked_base(model: ModelConfig) -> ModelConfig:
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
def naming(key: str) -> Iterator[None]:
    """Let errors of loading a model name it as the command line does.

    Raises:
        ConfigError: in place of one that names `model.path` or RUN.
    """
    try:
        yield
    except ConfigError as error:
        problems = [re.sub(r"^(model\.path|RUN)(?=: )", key, text) for text in error.problems]
        raise ConfigError(problems) from error

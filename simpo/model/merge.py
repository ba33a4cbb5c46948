"""Merges an adapter into its base model and writes the whole model."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoModelForCausalLM

from simpo.config.choices import Dtype
from simpo.config.errors import ConfigError
from simpo.config.models import ADAPTER_FILE, ModelConfig
from simpo.data.chats.chat import Chat
from simpo.model.adapters import adapter_settings, load_adapter
from simpo.model.export import fetch_terms, model_folder, save_model
from simpo.model.policy import Policy
from simpo.model.pretrained import files_dtype, load_weights
from simpo.model.tokenizer import load_tokenizer


def merge(run_dir: Path, output: Path, dtype: Dtype, base: str | None) -> list[str]:
    """Merge an adapter into its unquantised base model (also after QLoRA) and write the result.

    Args:
        run_dir: folder of a run, or of an adapter.
        output: folder to write; must not exist.
        dtype: dtype in which weights are merged and written; auto is that of the base's files.
        base: folder or hub id of the base; None is the one that the adapter names.

    Returns:
        Lines to print.

    Raises:
        ConfigError: there is no adapter, adapter or base cannot be loaded, they do not fit, a
            merged weight is NaN or infinite, or `output` exists.
    """
    folder = model_folder(run_dir)
    if not (folder / ADAPTER_FILE).is_file():
        raise ConfigError(
            [f"RUN: must hold an adapter, got {run_dir} (no {folder}/{ADAPTER_FILE})"]
        )
    if output.exists():
        raise ConfigError([f"output: must not exist, got {output} (choose another)"])
    settings = adapter_settings("RUN", str(folder))
    source = os.path.expanduser(base or settings.base_model_name_or_path or "")
    if not source:
        raise ConfigError(["base: the adapter does not name it (base=FOLDER_OR_HUB_ID)"])
    revision = None if base else settings.revision
    tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    config = ModelConfig(path=source, revision=revision, tokenizer=tokenizer)
    chat = Chat(load_tokenizer(config, folder))
    wanted = files_dtype(source, revision) if dtype is Dtype.auto else None
    model = load_weights(
        "base", source, AutoModelForCausalLM, revision=revision, dtype=wanted or dtype.value
    )
    fetch_terms(model)
    adapted = load_adapter("RUN", model, str(folder))
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # peft found a merged weight that is not finite
        raise ConfigError(
            [
                f"RUN: {folder} merged into {source} gives NaN or infinite weights in "
                f"{str(model.dtype).removeprefix('torch.')} (dtype=float32, or an adapter with "
                "smaller weights)"
            ]
        ) from error
    return [*save_model(Policy(merged), None, chat, output), f"model  {output}"]

"""Writes a policy, its tokenizer and chat template as a folder that transformers can load."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from simpo.config.errors import RunError, first_line
from simpo.data.chats.chat import Chat
from simpo.model.policy import Policy


def save_model(
    policy: Policy, weights: dict[str, Tensor] | None, chat: Chat, folder: Path
) -> list[str]:
    """Write weights (or the adapter) as safetensors, with config, tokenizer and template.

    An existing folder is replaced once the new one is complete. In the saved config the KV cache is
    on and generation stops at the token that ended a response in training.

    Args:
        weights: gathered weights of the policy's model; None if the policy holds its whole weights,
            empty to write everything except the weights.

    Returns:
        Lines to print.

    Raises:
        RunError: the folder could not be written.
    """
    part, old = (folder.with_name(f".{folder.name}.{name}") for name in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    base, adapted = policy.base, policy.model is not policy.base
    # The frozen weights below an adapter on lm_head are in the base's files.
    alone = {"save_embedding_layers": False} if adapted else {}
    try:
        base.config.use_cache = True
        left_out = _make_generation_savable(base, chat)
        policy.model.save_pretrained(part, state_dict=weights, **alone)  # type: ignore[operator]
        for key in ("is_local", "local_files_only"):  # options of loading, not of the tokenizer
            chat.tokenizer.init_kwargs.pop(key, None)
        chat.tokenizer.save_pretrained(part)
        mode = (part / "tokenizer_config.json").stat().st_mode
        for file in part.rglob("*"):
            if file.is_file():  # safetensors makes its files readable by their owner only
                file.chmod(mode)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(part, folder)
    except Exception as error:  # several libraries write, each with its own errors
        shutil.rmtree(part, ignore_errors=True)
        raise RunError(
            f"{folder}: the model could not be written: {first_line(error)} (solve this and run "
            "the same command again)"
        ) from error
    shutil.rmtree(old, ignore_errors=True)
    if not left_out or adapted:
        return []
    return [
        f"note   generation_config.json is saved without {', '.join(left_out)}, which "
        "transformers refuses with the base model's other settings"
    ]


def _make_generation_savable(base: PreTrainedModel, chat: Chat) -> list[str]:
    """Set the end tokens of the model's generation config, and make it savable.

    Drops settings that transformers refuses to save, such as a temperature without do_sample.

    Returns:
        The names of the dropped settings.
    """
    if base.generation_config is None:
        return []
    config = copy.deepcopy(base.generation_config)
    ends = {chat.end_id, chat.tokenizer.eos_token_id} - {None}
    config.eos_token_id, config.pad_token_id = sorted(ends), chat.tokenizer.pad_token_id
    pending = config.to_diff_dict()
    kept: dict[str, Any] = {}
    # A setting may require another, so rejected ones are tried again after each accepted one.
    while key := next((k for k, v in pending.items() if _can_be_saved(kept | {k: v})), None):
        kept[key] = pending.pop(key)
    base.generation_config = GenerationConfig(**kept) if pending else config
    return sorted(pending)


def _can_be_saved(settings: dict[str, Any]) -> bool:
    try:
        GenerationConfig(**settings).validate(strict=True)
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def model_folder(run_dir: Path) -> Path:
    """The folder of a run's model; any other folder is taken as the model's folder itself."""
    return run_dir / "model" if (run_dir / "model").is_dir() else run_dir

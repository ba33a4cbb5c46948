"""Writes a policy as a folder that transformers loads: weights or adapter, tokenizer, template."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from simpo.config.errors import RunError, first_line
from simpo.data.chat import Chat
from simpo.model.policy import Policy


def save_model(
    policy: Policy, weights: dict[str, Tensor] | None, chat: Chat, folder: Path
) -> list[str]:
    """Write weights (or the adapter) as safetensors, with settings, tokenizer and template.

    A folder that is there is replaced when the new one is whole. The cache of keys and values is
    on, and generation stops where a response ended in training.

    Args:
        weights: those of the policy's model, whole; None where it holds them itself, empty to
            write everything but them.

    Returns:
        Lines to print.

    Raises:
        RunError: it could not be written.
    """
    part, old = (folder.with_name(f".{folder.name}.{name}") for name in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    base, adapted = policy.base, policy.model is not policy.base
    # The frozen weights below an adapter on lm_head lie with the base.
    alone = {"save_embedding_layers": False} if adapted else {}
    try:
        base.config.use_cache = True
        left_out = _make_generation_savable(base, chat)
        policy.model.save_pretrained(part, state_dict=weights, **alone)  # type: ignore[operator]
        for key in ("is_local", "local_files_only"):  # how it was loaded, and nothing of its own
            chat.tokenizer.init_kwargs.pop(key, None)
        chat.tokenizer.save_pretrained(part)
        mode = (part / "tokenizer_config.json").stat().st_mode
        for file in part.rglob("*"):
            if file.is_file():  # safetensors gives its own to the owner alone
                file.chmod(mode)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(part, folder)
    except Exception as error:  # of any library that has a part in it
        shutil.rmtree(part, ignore_errors=True)
        raise RunError(
            f"{folder}: the model could not be written: {first_line(error)} (mend it, and the same "
            "command writes it)"
        ) from error
    shutil.rmtree(old, ignore_errors=True)
    if not left_out or adapted:
        return []
    return [
        f"note   generation_config.json is saved without {', '.join(left_out)}: with the base's "
        "other settings transformers refuses it"
    ]


def _make_generation_savable(base: PreTrainedModel, chat: Chat) -> list[str]:
    """Give a model settings of generation that can be saved, with the tokens of its template.

    They are the base's but for what transformers refuses to save, such as a temperature without
    do_sample.

    Returns:
        The names of what is left out.
    """
    if base.generation_config is None:
        return []
    config = copy.deepcopy(base.generation_config)
    ends = {chat.end_id, chat.tokenizer.eos_token_id} - {None}
    config.eos_token_id, config.pad_token_id = sorted(ends), chat.tokenizer.pad_token_id
    pending = config.to_diff_dict()
    kept: dict[str, Any] = {}
    # One setting may need another, so each is tried again beside those that were taken.
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
    """The folder of the model of a run; a folder that is no run's is taken for the model's own."""
    return run_dir / "model" if (run_dir / "model").is_dir() else run_dir

"""Writes a policy, its tokenizer and chat template as a folder that transformers can load."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from simpo.config.errors import RunError, first_line
from simpo.data.chats.chat import Chat
from simpo.model.policy import Policy
from simpo.model.pretrained import model_files

LARGEST_FILE_BYTES = 5 * 10**9
"""Larger models are written as several files and an index, each of which is loaded by itself."""
LAYER = re.compile(r"^(.*?\.\d+)\..*")
"""A weight's name, with its layer as group 1."""
TERMS = re.compile(r"(LICEN[SC]E|NOTICE|COPYING|USE_POLICY)(?![a-z])", re.IGNORECASE)
"""Names of files that the licences of base models want passed on with models made of them."""


def save_model(
    policy: Policy,
    weights: Iterable[tuple[str, Tensor]] | None,
    chat: Chat,
    folder: Path,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Write weights (or the adapter) as safetensors, with config, tokenizer and template.

    An existing folder is replaced once the new one is complete. In the saved config the KV cache is
    on and generation stops at the token that ended a response in training. Of `weights` those of
    one file and of the layer after it are held at a time.

    Args:
        weights: the tensors of `Policy.saved`, whole and in host memory, in its order; None if the
            policy holds its whole weights, empty to write everything except the weights.
        dtype: dtype of the written weights; None writes them as they are.

    Returns:
        Lines to print.

    Raises:
        RunError: the folder could not be written, or a weight is too large for the dtype.
    """
    part, old = (folder.with_name(f".{folder.name}.{name}") for name in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    weights = policy.saved().items() if weights is None else weights
    try:
        left_out = _write(policy, weights, chat, part, dtype)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(part, folder)
    except RunError:
        raise
    except Exception as error:  # several libraries write, each with its own errors
        raise RunError(
            f"{folder}: the model could not be written: {first_line(error)} (solve this and run "
            "the same command again)"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    if not left_out or policy.model is not policy.base:
        return []
    return [
        f"note   generation_config.json is saved without {', '.join(left_out)}, which "
        "transformers refuses with the base model's other settings"
    ]


def fetch_terms(base: PreTrainedModel) -> None:
    """Fetch card and licence files of a model of the hub into the hub's cache, if it answers."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    source = base.name_or_path or ""
    if not source or os.path.isdir(source) or constants.HF_HUB_OFFLINE:
        return
    disable_progress_bars()
    revision = getattr(base.config, "_commit_hash", None)
    wanted = ["README.md", "LICEN[SC]E*", "NOTICE*", "COPYING*", "USE_POLICY*"]
    with suppress(Exception):  # the model was loaded without them
        snapshot_download(source, revision=revision, allow_patterns=wanted)


def _write(
    policy: Policy,
    weights: Iterable[tuple[str, Tensor]],
    chat: Chat,
    folder: Path,
    dtype: torch.dtype | None,
) -> list[str]:
    """Write all files of a model into a folder, with equal file modes.

    Returns:
        The settings that generation_config.json had to drop.
    """
    base, adapted = policy.base, policy.model is not policy.base
    base.config.use_cache = True
    left_out = _make_generation_savable(base, chat)
    weights = _cast(policy, weights, dtype)
    if adapted:
        # The frozen weights below an adapter on lm_head are in the base's files.
        options: Any = {"state_dict": dict(weights), "save_embedding_layers": False}
        policy.model.save_pretrained(folder, **options)  # type: ignore[operator]
    else:
        _write_files(base, weights, folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's, which names the base's folder
    if dtype is not None and not adapted:
        _write_dtype(folder / "config.json", dtype)
    for key in ("is_local", "local_files_only"):  # options of loading, not of the tokenizer
        chat.tokenizer.init_kwargs.pop(key, None)
    chat.tokenizer.save_pretrained(folder)
    source, revision = base.name_or_path, getattr(base.config, "_commit_hash", None)
    origin = model_files(source, revision) if source else None
    for file in origin.iterdir() if origin else ():
        if TERMS.match(file.name) and file.is_file():
            shutil.copyfile(file, folder / file.name)
    mode = (folder / "tokenizer_config.json").stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file():  # safetensors makes its files readable by their owner only
            file.chmod(mode)
    return left_out


def _cast(
    policy: Policy, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Weights with the trained ones in another dtype, on the CPU; None changes nothing.

    Buffers, and weights that the model always keeps in fp32, stay as they are.

    Raises:
        RunError: a weight would become infinite.
    """
    kept = policy.base._keep_in_fp32_modules_strict or ()
    trained = {name for name, weight in policy.saved().items() if weight.requires_grad}
    for name, weight in weights:
        if dtype is not None and name in trained and not any(part in name for part in kept):
            weight = weight.detach().to("cpu", dtype)
            if dtype is torch.float16 and not torch.isfinite(weight).all():
                raise RunError(
                    f"export.dtype: {name} has a weight too large for float16, the dtype of the "
                    "base model (the same command with export.dtype=float32 saves it)"
                )
        yield name, weight.detach()


def _write_files(
    base: PreTrainedModel, weights: Iterable[tuple[str, Tensor]], folder: Path
) -> None:
    """Write a model's settings, and its weights file by file.

    transformers writes each file, with the names and shapes that the original model's files have.
    """
    files: list[Path] = []
    total_bytes = 0
    for batch in _batches(weights):
        total_bytes += sum(weight.nbytes for weight in batch.values())
        base.save_pretrained(folder, state_dict=batch, max_shard_size=LARGEST_FILE_BYTES)
        batch.clear()  # it would be held while the next is gathered
        for file in sorted(folder.glob("model*.safetensors")):
            files.append(file.rename(folder / f"part-{len(files)}"))
    index = folder / "model.safetensors.index.json"
    index.unlink(missing_ok=True)
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with safe_open(file, "pt") as written:
            for weight in written.keys():  # noqa: SIM118 - not a dict
                places[weight] = name
        file.rename(folder / name)
    if files:
        content = {"metadata": {"total_size": total_bytes}, "weight_map": places}
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _batches(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Weights in dicts of at most `LARGEST_FILE_BYTES`, or of one layer if that is larger.

    A layer is not divided, since transformers may convert its weights together, such as experts.
    Without weights this is one empty dict.
    """
    batch: dict[str, Tensor] = {}
    size = 0
    for _, members in groupby(weights, lambda item: LAYER.sub(r"\1", item[0])):
        layer = dict(members)
        added = sum(weight.nbytes for weight in layer.values())
        if batch and size + added > LARGEST_FILE_BYTES:
            yield batch
            batch, size = {}, 0
        batch |= layer
        size += added
    yield batch


def _write_dtype(file: Path, dtype: torch.dtype) -> None:
    """Put the dtype of the written weights into a config.json, which has that of the policy."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    for part in (settings, *settings.values()):
        if isinstance(part, dict) and "dtype" in part:
            part["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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

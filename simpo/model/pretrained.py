"""Reads models from a folder or the hub, and refuses what is damaged or does not fit."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from simpo.config.errors import ConfigError
from simpo.config.inputs import ModelConfig
from simpo.data import hub
from simpo.model import attention
from simpo.model.smollm2 import smollm2_folder

NAMES_SHOWN = 4


HARMLESS = re.compile(
    r"inv_freq$|masked_bias$|attn\.bias$"
    r"|(^|\.)(vision|visual|audio|multi_modal|mm_|embed_vision|embed_audio)"
    r"|^(v_head|value_head|score|mtp)\.|^lm_head\.weight$"
)
"""Weights of a checkpoint that a text model may leave out: buffers of older versions, towers of
other media, heads of other tasks."""


def model_source(config: ModelConfig, cache_dir: Path) -> str:
    """Folder or hub id to load from; converts the built-in model on first use."""
    if config.path == "builtin:smollm2":
        return str(smollm2_folder(cache_dir))
    return os.path.expanduser(config.path)


def load_settings(config: ModelConfig, cache_dir: Path) -> PreTrainedConfig:
    """What config.json says of a model.

    Raises:
        ConfigError: it cannot be loaded.
    """
    settings: PreTrainedConfig = load_pretrained(
        "model.path",
        model_source(config, cache_dir),
        AutoConfig,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    return settings


def num_embeddings(settings: PreTrainedConfig) -> int:
    """Rows of the embedding of a model with these settings: token ids lie below."""
    return int(settings.get_text_config(decoder=True).vocab_size)


def load_weights(key: str, source: str, loader: Any, **options: Any) -> Any:
    """A whole model of a folder or hub id, every weight of it read from there.

    transformers gives a weight that the files lack, or have in another shape, random values.

    Raises:
        ConfigError: it cannot be loaded; the files lack weights of the model, hold others, or have
            them in another shape; a weight is NaN or infinite. `key` names the source.
    """
    model, report = load_pretrained(
        key, source, loader, **options, output_loading_info=True, ignore_mismatched_sizes=True
    )
    shapes = sorted(report["mismatched_keys"])
    odd = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(n for n in report["unexpected_keys"] if not HARMLESS.search(n)),
        "of another shape": [f"{n} {list(found)} for {list(own)}" for n, found, own in shapes],
    }
    if any(odd.values()):
        faults = "; ".join(f"{what} {_shortened(names)}" for what, names in odd.items() if names)
        raise ConfigError(
            [
                f"{key}: {source} does not fit {type(model).__name__}: {faults} (mend the files or "
                "config.json; loading and saving it with transformers drops what is unexpected)"
            ]
        )
    check_finite(key, source, model)
    return model


def check_finite(key: str, source: str, model: nn.Module) -> None:
    """Look at every weight.

    Raises:
        ConfigError: one is NaN or infinite.
    """
    bad = [
        name
        for name, weight in model.named_parameters()
        # The sum needs no memory; only a finite one that is too large needs a second look.
        if weight.is_floating_point()
        and not hasattr(weight, "quant_state")  # 4-bit ones lie packed in floats
        and not torch.isfinite(weight.detach().sum())
        and not torch.isfinite(weight.detach()).all()
    ]
    if bad:
        raise ConfigError(
            [f"{key}: {source} holds NaN or infinite weights in {_shortened(bad)} (mend the files)"]
        )


def _shortened(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def load_pretrained(key: str, source: str, loader: Any, **options: Any) -> Any:
    """What `loader.from_pretrained` makes of a folder or hub id.

    Raises:
        ConfigError: nothing; `key` is what names the source in the message.
        KeyError: the architecture takes its attention from a table of its own.
    """
    if not Path(source).is_dir():
        hub.go_offline_if_unreachable()
    try:
        return loader.from_pretrained(source, **options)
    # Damaged files end in errors of many libraries: safetensors, torch, tokenizers, json.
    except Exception as error:
        if isinstance(error, KeyError) and error.args[0] in attention.NAMES.values():
            raise
        fault = hub.reason(error, source)
        if loader is AutoTokenizer and "backend tokenizer" in fault:
            fault = "it holds no tokenizer (model.tokenizer=FOLDER_OR_HUB_ID, or fetch it anew)"
        if broken := _unreadable(Path(source)):
            fault += f" (mend {broken}, or fetch the model anew)"
        raise ConfigError([f"{key}: {source} cannot be loaded: {fault}"]) from error


def _unreadable(folder: Path) -> str:
    """The first file of a model's folder that is damaged; empty where there is none."""
    for file in sorted(folder.glob("*")):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    continue
            # Of the index of several files of weights an empty one is damaged as well.
            if file.suffix == ".json" and not json.loads(file.read_text()).get("weight_map", True):
                return str(file)
            if file.suffix == ".jinja":
                file.read_text(encoding="utf-8")
            if file.suffix == ".bin" and not zipfile.is_zipfile(file):
                return str(file)
        except (OSError, SafetensorError, ValueError, AttributeError):
            return str(file)
    return ""

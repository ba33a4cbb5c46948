"""Loads models from a folder or the hub, and refuses damaged or incomplete ones."""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from simpo.config.errors import ConfigError
from simpo.config.models import BUILTIN, ModelConfig
from simpo.data import hub
from simpo.model import attention
from simpo.model.smollm2 import smollm2_folder

NAMES_SHOWN = 4
FILE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Dtypes of weights by their names in safetensors files."""

HARMLESS = re.compile(
    r"inv_freq$|masked_bias$|attn\.bias$"
    r"|(^|\.)(vision|visual|audio|multi_modal|mm_|embed_vision|embed_audio)"
    r"|^(v_head|value_head|score|mtp)\.|^lm_head\.weight$"
)
"""Weights that a checkpoint may contain and a text model does not use: buffers of older versions,
vision and audio towers, heads of other tasks."""


def model_source(config: ModelConfig, cache_dir: Path) -> str:
    """Folder or hub id of the model; the built-in model is converted on first use."""
    if config.path == BUILTIN:
        return str(smollm2_folder(cache_dir))
    return os.path.expanduser(config.path)


def load_settings(config: ModelConfig, cache_dir: Path) -> PreTrainedConfig:
    """Load the config.json of a model.

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


def model_files(source: str, revision: str | None = None) -> Path | None:
    """The folder on this machine with the files of a model that was loaded; None if none is known.

    Args:
        source: folder or hub id; of a hub id the folder is a snapshot in the hub's cache.
    """
    from huggingface_hub import snapshot_download

    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def files_dtype(source: str, revision: str | None = None) -> torch.dtype | None:
    """The dtype that most weights have in the files of a model; None if they are not here.

    If they are no safetensors files, this is the dtype in config.json.

    Args:
        source: folder or hub id.
    """
    if (folder := model_files(source, revision)) is None:
        return None
    counts: Counter[str] = Counter()
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dict
                part = weights.get_slice(name)
                counts[part.get_dtype()] += math.prod(part.get_shape())
    for name, _ in counts.most_common():
        if name in FILE_DTYPES:
            return FILE_DTYPES[name]
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    written = getattr(torch, str(settings.get("dtype") or settings.get("torch_dtype")), None)
    return written if isinstance(written, torch.dtype) else None


def num_embeddings(settings: PreTrainedConfig) -> int:
    """Number of rows of the model's embedding; token ids must be below it."""
    return int(settings.get_text_config(decoder=True).vocab_size)


def load_weights(key: str, source: str, loader: Any, **options: Any) -> Any:
    """Load a model and check that every weight was read from its files.

    transformers initialises a weight that is missing, or has another shape, with random values.

    Args:
        key: name of the source in messages.
        source: folder or hub id.
        loader: class with `from_pretrained`, which gets `options`.

    Raises:
        ConfigError: the model cannot be loaded; weights are missing, unexpected or of another
            shape; a weight is NaN or infinite.
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
    check_finite(key, source, model.named_parameters())
    return model


def check_finite(key: str, source: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse NaN and infinite weights.

    Raises:
        ConfigError: a weight is NaN or infinite.
    """
    refuse_not_finite(key, source, not_finite(weights))


def refuse_not_finite(key: str, source: str, names: Sequence[str]) -> None:
    """Raise a ConfigError if there are names of weights that are NaN or infinite."""
    if names:
        raise ConfigError(
            [
                f"{key}: {source} holds NaN or infinite weights in {_shortened(names)} (mend the "
                "files)"
            ]
        )


def not_finite(weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of weights that are NaN or infinite somewhere."""
    return [
        name
        for name, weight in weights
        # The sum needs no memory; it may overflow, so then every weight is tested.
        if weight.is_floating_point()
        and not hasattr(weight, "quant_state")  # 4-bit weights are packed into floats
        and not torch.isfinite(weight.detach().sum())
        and not torch.isfinite(weight.detach()).all()
    ]


def _shortened(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def load_pretrained(key: str, source: str, loader: Any, **options: Any) -> Any:
    """Call `loader.from_pretrained` on a folder or hub id.

    Args:
        key: name of the source in messages.

    Raises:
        ConfigError: the source cannot be loaded.
        KeyError: the architecture has its own attention table, which lacks the kernel.
    """
    if not Path(source).is_dir():
        hub.go_offline_if_unreachable()
    try:
        return loader.from_pretrained(source, **options)
    # Damaged files raise errors of many libraries: safetensors, torch, tokenizers, json.
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
    """The first damaged file in a model's folder; empty if there is none."""
    for file in sorted(folder.glob("*")):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    continue
            # An index of weight files that lists no weight is damaged too.
            if file.suffix == ".json" and not json.loads(file.read_text()).get("weight_map", True):
                return str(file)
            if file.suffix == ".jinja":
                file.read_text(encoding="utf-8")
            if file.suffix == ".bin" and not zipfile.is_zipfile(file):
                return str(file)
        except (OSError, SafetensorError, ValueError, AttributeError):
            return str(file)
    return ""

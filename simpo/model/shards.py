"""Builds a model without its weights, of which each process of a sharding backend holds its part.

The memory of the weights is reserved and never touched, so it takes none. The wrapped policy holds
this process's shards, which the backend fills from the safetensors files.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from simpo.config.errors import ConfigError, first_line
from simpo.data import hub
from simpo.model.policy import Policy
from simpo.model.pretrained import HARMLESS

PROBE_LAYERS = 2
PROBE_VOCAB = 1024


def weight_files(source: str, revision: str | None) -> Path | None:
    """The folder with the safetensors files of a model, which are fetched if need be; or None."""
    from huggingface_hub import snapshot_download

    if Path(source).is_dir():
        return Path(source)
    hub.go_offline_if_unreachable()
    try:
        wanted = ["model*.safetensors"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError):
        return None


def empty_model(
    source: str,
    revision: str | None,
    settings: PreTrainedConfig,
    dtype: torch.dtype,
    kernel: str | None,
) -> tuple[PreTrainedModel | None, Path | None]:
    """A model whose weights are uninitialised, and can be read by their names in its files.

    Args:
        source: folder or hub id.
        dtype: dtype of the weights.
        kernel: name of the attention kernel in transformers.

    Returns:
        The model, and the folder of its safetensors files. None and None if the model must be
        loaded whole: there are no such files, they do not fit or are damaged, weights are converted
        on loading, tied weights are there twice, or its code comes with it. Loading it whole tells
        what is wrong.
    """
    revision = getattr(settings, "_commit_hash", None) or revision
    folder = weight_files(source, revision)
    model: Any = folder and _build(folder, settings, dtype, kernel)
    if model is None:
        return None, None
    model.config.name_or_path = model.name_or_path = source
    if model.can_generate():
        options: Any = {"revision": revision}
        with suppress(OSError):  # it has none
            model.generation_config = GenerationConfig.from_pretrained(source, **options)
    return model, folder


def _build(
    folder: Path, settings: PreTrainedConfig, dtype: torch.dtype, kernel: str | None
) -> Any | None:
    """The model, or None if its weights are not those of the files, one by one."""
    loader: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)
    if not hasattr(loader, "from_pretrained"):
        return None
    try:
        found = _found(folder)
        empty = {name: torch.empty(shape, dtype=dtype) for name, (_, shape) in found.items()}
        if not empty:
            return None
        model, report = loader.from_pretrained(
            None,
            config=copy.deepcopy(settings),
            state_dict=empty,
            dtype=dtype,
            attn_implementation=kernel,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception:  # loading it whole raises the same again
        return None
    weights = dict(model.named_parameters())
    unread = [n for n, w in weights.items() if n not in empty or not _same(w, empty[n])]
    buffers = set(model.state_dict()) - set(dict(model.named_parameters(remove_duplicate=False)))
    odd = {n for n in report["unexpected_keys"] if not HARMLESS.search(n)}
    odd |= report["missing_keys"] | report["mismatched_keys"]
    # transformers ties two weights of the files if they are equal; these here have no values yet.
    tied = model.get_expanded_tied_weights_keys(all_submodels=True).items()
    odd |= {name for name, first in tied if name in empty and first in empty}
    return None if unread or buffers or odd else model


def _same(weight: Tensor, empty: Tensor) -> bool:
    """Whether a model's weight is the very memory that it was given, neither converted nor cast."""
    return (weight.data_ptr(), weight.dtype) == (empty.data_ptr(), empty.dtype)


def _found(folder: Path) -> dict[str, tuple[Path, list[int]]]:
    """The file and the shape of every weight in a folder's files.

    Raises:
        SafetensorError, OSError, ValueError: a file is damaged; two hold the same weight.
    """
    found: dict[str, tuple[Path, list[int]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dict
                if name in found:
                    raise ValueError(f"{name} is in two files")
                found[name] = file, weights.get_slice(name).get_shape()
    return found


def files_by_weight(folder: Path) -> dict[str, Path]:
    """The file of every weight in a folder, by the weight's name.

    Raises:
        SafetensorError, OSError, ValueError: a file is damaged; two hold the same weight.
    """
    return {name: file for name, (file, _) in _found(folder).items()}


def read_weight(file: Path, name: str) -> Tensor:
    """A whole weight in host memory; it lies in the mapped file and takes no memory of its own."""
    with safe_open(file, "pt") as weights:
        return weights.get_tensor(name)


def not_loaded(source: str, error: BaseException | str) -> ConfigError:
    """The error for weights that cannot be read."""
    return ConfigError([f"model.path: {source} cannot be loaded: {first_line(error)}"])


def weights_in_files(policy: Policy) -> dict[str, Tensor]:
    """The weights of a policy that its files hold, by their names there: all but adapters."""
    return {
        name.replace(".base_layer.", "."): weight
        for name, weight in policy.base.named_parameters()
        if ".lora_" not in name
    }


def probe_settings(settings: PreTrainedConfig) -> PreTrainedConfig | None:
    """Settings of a model with the first layers of another and a small vocabulary.

    It has at least 2 layers, and every kind of layer that the other has. None if its layers are not
    known, or if more than half of them would be needed.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(settings))
    layers = getattr(model.get_decoder(), "layers", ())
    config: Any = copy.deepcopy(settings)
    text = config.get_text_config()
    total = len(layers)
    lists = {
        name: value
        for name, value in vars(text).items()
        if isinstance(value, list) and len(value) == total
    }
    kinds = [
        _kind(layer) + str([value[place] for value in lists.values()])
        for place, layer in enumerate(layers)
    ]
    count = max((kinds.index(kind) + 1 for kind in kinds), default=0)
    count = max(count, PROBE_LAYERS)
    if 2 * count > max(total, 2 * PROBE_LAYERS) or total != text.num_hidden_layers:
        return None
    text.num_hidden_layers = count
    for name, value in lists.items():
        setattr(text, name, value[:count])
    text.vocab_size = min(text.vocab_size, PROBE_VOCAB)
    if text.pad_token_id is not None:
        text.pad_token_id = 0
    return config


def _kind(layer: nn.Module) -> str:
    """What a layer computes with: its modules, their plain attributes, shapes of its weights."""
    parts = [str([(name, tuple(weight.shape)) for name, weight in layer.named_parameters()])]
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str, type(None)))
            and not key.startswith(("_", "layer_id"))
        }
        parts.append(f"{name} {type(module).__name__} {plain}")
    return "\n".join(parts)

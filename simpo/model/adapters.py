"""Adds new or saved LoRA adapters to a model.

peft keeps adapters in fp32 whatever the dtype of the base, so small updates are not rounded away.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
)
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from simpo.config.errors import ConfigError, first_line
from simpo.config.models import LoraConfig
from simpo.data import hub
from simpo.model.pretrained import check_finite

KINDS = {"attention": "Attention", "mlp": "MLP"}
"""Targets that name a kind of layer, with the ending of transformers' class names for it."""


def add_adapters(model: PreTrainedModel, config: LoraConfig, revision: str | None) -> PeftModel:
    """Freeze a model and add new adapters, or a saved one, to its layers.

    Args:
        revision: revision of the model, which is written into the saved adapter.

    Raises:
        ConfigError: a target matches no layer; the loss or a merge does not support an adapter on
            it; the saved adapter cannot be loaded or does not fit the model.
    """
    if config.adapter is not None:
        adapted = load_adapter("model.lora.adapter", model, config.adapter)
        _name_base(adapted, model, revision)
        _refuse_untrainable("model.lora.adapter", adapted)
        return adapted
    settings = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=_target_modules(model, config.targets),
        use_rslora=config.rslora,
        use_dora=config.dora,
        revision=revision,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError([f"model.lora.targets: {first_line(error)}"]) from error
    _name_base(adapted, model, revision)
    _refuse_tied("model.lora.targets", adapted)
    _refuse_untrainable("model.lora.targets", adapted)
    return adapted


def sketch_adapters(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Add adapters to a model of fake tensors; of a saved one only its settings are read.

    Raises:
        ConfigError: a target matches no layer; the saved adapter's settings cannot be loaded.
    """
    if config.adapter is None:
        return add_adapters(model, config, None)
    settings = adapter_settings("model.lora.adapter", config.adapter)
    settings.inference_mode = False
    adapted = get_peft_model(model, settings)
    assert isinstance(adapted, PeftModel)
    return adapted


def _name_base(adapted: PeftModel, model: PreTrainedModel, revision: str | None) -> None:
    """Name the base in an adapter's settings by its hub id or absolute folder.

    peft keeps the path as it was given, and in a saved adapter that of another machine.
    """
    source, settings = model.name_or_path or "", adapted.active_peft_config
    place = os.path.abspath(source) if os.path.isdir(source) else source
    settings.base_model_name_or_path, settings.revision = place, revision


def load_adapter(key: str, model: PreTrainedModel, adapter: str) -> PeftModel:
    """Add a saved LoRA adapter to its model, trainable.

    Args:
        key: name of the adapter in messages.
        adapter: folder or hub id.

    Raises:
        ConfigError: the adapter cannot be loaded, is not LoRA, does not fit the model, or holds
            NaN or infinite weights.
    """
    name, adapter = type(model).__name__, str(Path(adapter).expanduser())
    settings = adapter_settings(key, adapter)
    if settings.peft_type != PeftType.LORA:
        kind = getattr(settings.peft_type, "value", "none")
        raise ConfigError([f"{key}: must be a LoRA adapter, {adapter} is {kind}"])
    try:
        with warnings.catch_warnings():
            # Missing tensors are refused below.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, adapter, is_trainable=True)
        saved = load_peft_weights(adapter, device="cpu").keys()
    except SafetensorError as error:
        raise ConfigError(
            [f"{key}: {adapter} holds damaged weights: {first_line(error)}"]
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError([f"{key}: {adapter} does not fit {name}: {reason}"]) from error
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    # peft would initialise a layer that the file lacks anew, and ignore a tensor without a layer.
    if odd := sorted(key for key in saved ^ wanted if ".lora_" in key):
        raise ConfigError(
            [
                f"{key}: {adapter} does not fit {name}: {len(odd)} weights are in only one of the "
                f"two, such as {odd[0]}"
            ]
        )
    check_finite(key, adapter, ((n, p) for n, p in adapted.named_parameters() if p.requires_grad))
    _refuse_tied(key, adapted)
    return adapted


def adapter_settings(key: str, adapter: str) -> Any:
    """The peft configuration of a saved adapter, which names its base model.

    Raises:
        ConfigError: the adapter cannot be loaded.
    """
    folder = str(Path(adapter).expanduser())
    if not Path(folder).is_dir():
        hub.go_offline_if_unreachable()
    try:
        return PeftConfig.from_pretrained(folder)
    # A damaged file leads to errors of many types.
    except Exception as error:
        fault = hub.reason(error, adapter)
        raise ConfigError([f"{key}: {adapter} cannot be loaded: {fault}"]) from error


def _target_modules(model: PreTrainedModel, targets: list[str]) -> str | list[str]:
    """Targets for peft, with kinds of layers replaced by this model's names of them.

    Raises:
        ConfigError: a target matches no layer.
    """
    if targets == ["all-linear"]:
        return "all-linear"
    modules = dict(model.named_modules())
    names: list[str] = []
    for target in targets:
        found = _layers_in(modules, KINDS[target]) if target in KINDS else [target]
        if not any(f".{module}".endswith(f".{name}") for name in found for module in modules):
            linear = {n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, nn.Linear)}
            raise ConfigError(
                [
                    f"model.lora.targets: {type(model).__name__} has no {target} "
                    f"(its linear layers: {', '.join(sorted(linear))})"
                ]
            )
        names += found
    return names


def _layers_in(modules: dict[str, nn.Module], ending: str) -> list[str]:
    """Names of linear layers in modules whose class name ends with `ending`: `self_attn.q_proj`."""
    found = {
        f"{name.rpartition('.')[2]}.{inner}"
        for name, module in modules.items()
        if type(module).__name__.endswith(ending)
        for inner, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }
    return sorted(found)


def _refuse_untrainable(key: str, adapted: PeftModel) -> None:
    """Refuse adapters that this trainer would compute wrongly.

    Raises:
        ConfigError: the adapter trains whole modules; DoRA is on the head, whose weight the loss
            merges with LoRA only, or on 8-bit layers, whose scales peft would lose.
    """
    base: Any = adapted.get_base_model()
    settings: Any = adapted.active_peft_config
    head = base.get_output_embeddings()
    if settings.modules_to_save:
        fault = "trains whole modules besides adapters, which is not supported, got "
        fault += (
            f"{', '.join(settings.modules_to_save)} (python -m simpo.export ADAPTER merge=true)"
        )
    elif settings.use_dora and isinstance(head, LoraLayer):
        fault = "lm_head cannot have DoRA (leave it out, or lora.dora=false)"
    elif settings.use_dora and getattr(base, "is_loaded_in_8bit", False):
        fault = "DoRA cannot be on int8 layers (model.quantization=nf4)"
    else:
        return
    raise ConfigError([f"{key}: {fault}"])


def _refuse_tied(key: str, adapted: PeftModel) -> None:
    """Refuse an adapter on a tied embedding or head, since merging it would change both.

    Raises:
        ConfigError: head and embeddings are tied, and one of them has an adapter.
    """
    base: Any = adapted.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    if base.config.get_text_config().tie_word_embeddings and any(
        isinstance(end, LoraLayer) for end in ends
    ):
        raise ConfigError(
            [
                f"{key}: {type(base).__name__} has one weight for embeddings and lm_head, an "
                "adapter on one of them could not be merged (leave it out)"
            ]
        )

"""Loads the policy for training: dtype, attention kernel, quantisation, adapters, checkpointing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
)

from simpo.config.choices import Attention, Dtype, Quantization
from simpo.config.errors import ConfigError
from simpo.config.models import LoraConfig, ModelConfig
from simpo.model import attention, checkpointing
from simpo.model.policy import Policy
from simpo.model.pretrained import load_settings, load_weights, model_source
from simpo.model.shards import empty_model, probe_settings

# Attributes of modules: noise on the input of a router in training (Mixtral, PhiMoE, DBRX).
JITTER = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")

READ_AT_A_TIME = 4
"""`GLOBAL_WORKERS` of transformers: threads of a process that read weights."""


def load_policy(
    config: ModelConfig,
    cache_dir: Path,
    device: torch.device,
    seed: int,
    *,
    bf16: bool = False,
    share_prefix: bool = True,
    settings: PreTrainedConfig | None = None,
    sharded: bool = False,
) -> Policy:
    """Load the model for training, with its quantisation and adapters, and without noise.

    Args:
        seed: seeds all random generators, and so the initial values of adapters.
        bf16: whether the forward computes in bf16.
        share_prefix: False for rows that repeat the prompt; then the model may have attention of
            its own.
        settings: result of `load_settings`, if it is known already.
        sharded: leave the weights unread (`Policy.unread`) if their files can be read in parts.

    Raises:
        ConfigError: model or adapters cannot be loaded, or do not fit the settings.
    """
    attention.register()
    source = model_source(config, cache_dir)
    settings = settings or load_settings(config, cache_dir)
    _refuse_quantised(source, settings)
    dtype = weights_dtype(config, device)
    kernel = _kernel(config, settings, device, bf16)
    model: Any = None
    unread = None
    # DoRA begins with the norms of the weights.
    if sharded and config.quantization is Quantization.none and not config.lora.dora:
        model, unread = empty_model(source, config.revision, settings, dtype, kernel)
    _seed(seed)
    if model is None:
        load = partial(
            load_weights,
            "model.path",
            source,
            AutoModelForCausalLM,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            config=settings,
            dtype=dtype,
            quantization_config=_quantization(config, bf16),
            device_map={"": device},
        )
        model = with_attention(load, settings, kernel, share_prefix)
    if config.quantization is Quantization.nf4:
        _patch_nf4_on_cpu(model, device)
    checkpointing.enable(model, config.gradient_checkpointing)
    if config.lora.used:
        from simpo.model.adapters import add_adapters

        model = add_adapters(model, config.lora, config.revision)
    switch_noise_off(model)
    policy = Policy(model, share_prefix, unread)
    return policy if unread else policy.to(device)


def with_attention(
    build: Callable[..., Any], settings: PreTrainedConfig, kernel: str, share_prefix: bool
) -> Any:
    """Build a model with our attention, or with its own if it takes no other.

    Args:
        build: transformers' function that builds it, with all its other options.

    Raises:
        ConfigError: it takes no other, but is to share prompts.
    """
    try:
        return build(attn_implementation=kernel)
    except KeyError as error:  # the architecture has an attention table of its own
        if share_prefix:
            name = type(settings).__name__
            raise cannot_share(name, "its attention cannot be replaced") from error
        return build(attn_implementation=None)


def load_probe(
    config: ModelConfig,
    settings: PreTrainedConfig,
    device: torch.device,
    *,
    bf16: bool,
    share_prefix: bool,
) -> Policy | None:
    """A small random model of the same architecture, to check what does not depend on the weights.

    Args:
        settings: result of `load_settings`.
        bf16, share_prefix: as in `load_policy`.

    Returns:
        None if none can be made (see `probe_settings`).
    """
    _seed(0)
    attention.register()
    kernel = _kernel(config, settings, device, bf16)
    dtype = weights_dtype(config, device)
    try:
        small = probe_settings(settings)
        if small is None:
            return None
        model: Any = AutoModelForCausalLM.from_config(
            small, dtype=dtype, attn_implementation=kernel
        )
    except Exception:  # loading the whole model tells what is wrong
        return None
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            # So that attention differs from token to token, however narrow the layer is.
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    switch_noise_off(model)
    return Policy(model, share_prefix).to(device)


def _refuse_quantised(source: str, settings: PreTrainedConfig) -> None:
    if hasattr(settings, "quantization_config"):
        raise ConfigError(
            [
                f"model.path: {source} holds quantised weights (use the unquantised model; "
                "model.quantization quantises it on loading)"
            ]
        )


def _seed(seed: int) -> None:
    """Seed all random generators, like transformers' `set_seed`, whose module imports peft."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def switch_noise_off(model: nn.Module) -> None:
    """Remove all dropout, and the noise that some mixtures of experts put on the router's input."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Many models hold rates of dropout as numbers, such as OPT's `dropout` and `layerdrop`.
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or name in JITTER):
                setattr(module, name, 0.0)


def cannot_share(name: str, reason: str) -> ConfigError:
    """The error for a model that does not support shared prompts in packed rows."""
    return ConfigError(
        [
            f"model.path: {name} cannot share prompts in packed rows: {reason} "
            "(train.share_prefix=false computes a prompt for each response)"
        ]
    )


def _kernel(config: ModelConfig, settings: Any, device: torch.device, bf16: bool) -> str:
    """Name of the attention kernel in transformers.

    Raises:
        ConfigError: the kernel in the settings cannot be used.
    """
    softcap = getattr(settings.get_text_config(), "attn_logit_softcapping", None) is not None
    wanted = config.attention.value
    if config.attention is Attention.auto:
        wanted = attention.best(device, bf16, softcap)
    elif reason := attention.unusable(wanted, device, bf16, softcap):
        raise ConfigError([f"model.attention: {wanted} {reason}"])
    return attention.NAMES[wanted]


def weights_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    return torch.float32 if decided_dtype(config, device) is Dtype.float32 else torch.bfloat16


def decided_dtype(config: ModelConfig, device: torch.device) -> Dtype:
    """`model.dtype`, with auto decided."""
    if config.dtype is not Dtype.auto:
        return config.dtype
    frozen_on_gpu = config.lora.used and device.type == "cuda"
    return Dtype.bfloat16 if frozen_on_gpu else Dtype.float32


def without_new_adapters(config: ModelConfig, device: torch.device) -> ModelConfig:
    """The model in the dtype of `config`, to compute with and not to train.

    Adapters that training would add are left out: new ones change no output, and take time.
    """
    if config.lora.adapter is not None:
        return config
    return replace(config, lora=LoraConfig(), dtype=decided_dtype(config, device))


def _quantization(config: ModelConfig, bf16: bool) -> BitsAndBytesConfig | None:
    """The quantisation that transformers applies to linear layers on loading, except lm_head."""
    if config.quantization is Quantization.none:
        return None
    if config.quantization is Quantization.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    computed = torch.bfloat16 if bf16 else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed,
        # A sharding backend casts weights to this dtype, which must not change the packed ones.
        bnb_4bit_quant_storage=computed,
    )


def _patch_nf4_on_cpu(model: nn.Module, device: torch.device) -> None:
    """Prevent two silent errors of bitsandbytes on a CPU.

    Raises:
        ConfigError: the inputs of a layer are not a multiple of 64; bitsandbytes would mix up the
            scales of its blocks of 64 weights.
    """
    for name, layer in model.named_modules():
        # The first forward in eval mode would repack the weights permanently, with rounded scales
        # and without a gradient for the layer's input.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
            if device.type == "cpu" and layer.in_features % 64:
                raise ConfigError(
                    [
                        "model.quantization: nf4 on a CPU needs layers with a multiple of 64 "
                        f"inputs, got {layer.in_features} in {name} (int8, or a GPU)"
                    ]
                )

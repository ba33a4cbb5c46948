"""Settings in, the policy and its tokenizer out."""

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
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import cached_file

from simpo import attention
from simpo.config.choices import Attention, Compat, Dtype, Quantization
from simpo.config.errors import ConfigError
from simpo.config.inputs import ModelConfig
from simpo.data import hub
from simpo.data.pairs import PackedPairs, PairLogps
from simpo.data.template import use_template
from simpo.logps import Objective, fused_loss
from simpo.smollm2 import smollm2_folder

NAMES_SHOWN = 4

HARMLESS = re.compile(
    r"inv_freq$|masked_bias$|attn\.bias$"
    r"|(^|\.)(vision|visual|audio|multi_modal|mm_|embed_vision|embed_audio)"
    r"|^(v_head|value_head|score|mtp)\.|^lm_head\.weight$"
)
"""Weights of a checkpoint that a text model may leave out: buffers of older versions, towers of
other media, heads of other tasks."""


class Policy(nn.Module):
    """A causal language model whose forward gives the loss and the log-probabilities of pairs.

    The vocabulary is met in here, below whatever wraps the policy, so that sharded weights of the
    head are gathered by their own framework.
    """

    def __init__(self, model: nn.Module, share_prefix: bool = True) -> None:
        super().__init__()
        self.model = model
        self.share_prefix = share_prefix

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, under the adapters if there are any."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore[operator,return-value]

    def forward(self, row: PackedPairs, objective: Objective) -> tuple[Tensor, PairLogps]:
        """Sum of the objective over the pairs of a row, and their log-probabilities."""
        hidden = self.hidden(row)
        # Last: weights in shards are freed again behind the layer that needed them, and that of the
        # embeddings may be the head's too.
        weight, bias, softcap = self.head()
        return fused_loss(hidden, weight, bias, row, objective, softcap)

    def head(self) -> tuple[Tensor, Tensor | None, float | None]:
        """Weight [V, D], LoRA adapters on it included, bias [V] and soft-cap of the logits."""
        head: Any = self.base.get_output_embeddings()
        layer = head.get_base_layer() if hasattr(head, "get_base_layer") else head
        weight = layer.weight
        for name in getattr(head, "active_adapters", ()):
            weight = weight + head.get_delta_weight(name)
        return weight, layer.bias, getattr(self.base.config, "final_logit_softcapping", None)

    def hidden(self, row: PackedPairs) -> Tensor:
        """Last hidden states of a row, [T, D], normalised as the head wants them."""
        # Without a mask and a cache transformers itself tells packed sequences by their positions.
        output = self.base.get_decoder()(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            use_cache=False,
            **({"segments": row.segments, "keys": row.keys} if row.segments else {}),
        )
        return output.last_hidden_state[0]


def model_source(config: ModelConfig, cache_dir: Path) -> str:
    """Folder or hub id to load from; converts the built-in model on first use."""
    if config.path == "builtin:smollm2":
        return str(smollm2_folder(cache_dir))
    return os.path.expanduser(config.path)


def load_tokenizer(
    config: ModelConfig, cache_dir: Path, compat: Compat = Compat.none
) -> PreTrainedTokenizerBase:
    """Load the tokenizer and settle what checkpoints leave open.

    No pad token: EOS pads (padding is never scored). A template named in the settings replaces the
    tokenizer's own. It is exported so; its own lengths and sides are not used, and stay. For
    compat=paper, text is split as tokenizer.json says.

    Raises:
        ConfigError: the tokenizer cannot be loaded, lacks tokens of that template or, for
            compat=paper, an EOS.
    """
    source = os.path.expanduser(config.tokenizer or "") or model_source(config, cache_dir)
    revision = None if config.tokenizer else config.revision
    tokenizer = load_pretrained(
        "model.tokenizer" if config.tokenizer else "model.path",
        source,
        AutoTokenizer,
        revision=revision,
        trust_remote_code=config.trust_remote_code,
    )
    if compat is Compat.paper:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                [
                    f"model.tokenizer: {source} has no EOS token, with which data.compat=paper "
                    "ends responses (name one as eos_token in its tokenizer_config.json)"
                ]
            )
        _split_as_written(tokenizer, source, revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.chat_template is not None:
        use_template(tokenizer, config.chat_template)
    return tokenizer


def _split_as_written(
    tokenizer: PreTrainedTokenizerBase, source: str, revision: str | None
) -> None:
    """Split text as tokenizer.json says, and with it transformers 4.

    transformers 5 builds some tokenizers anew (Mistral's) and leaves out their normalizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    file = cached_file(
        source,
        "tokenizer.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if backend is not None and file is not None:
        written = Tokenizer.from_file(file)
        backend.normalizer = written.normalizer
        backend.pre_tokenizer = written.pre_tokenizer


def num_embeddings(config: ModelConfig, cache_dir: Path) -> int:
    """Rows of the model's embedding, from its settings: token ids lie below.

    Raises:
        ConfigError: the settings cannot be loaded.
    """
    settings = load_pretrained(
        "model.path",
        model_source(config, cache_dir),
        AutoConfig,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    return int(settings.get_text_config(decoder=True).vocab_size)


def load_policy(
    config: ModelConfig,
    cache_dir: Path,
    device: torch.device,
    seed: int,
    *,
    half: bool = False,
    share_prefix: bool = True,
) -> Policy:
    """Load the model for training: no dropout; quantised, with adapters, checkpointed as asked for.

    Args:
        seed: seeds all random generators, hence the initial values of adapters.
        half: the forward will compute in bf16.
        share_prefix: False leaves attention to transformers, which sees packed sequences by their
            positions.

    Raises:
        ConfigError: the model cannot be loaded, has no such attention or is quantised already, or
            the adapters do not fit it (`simpo.adapters.add_adapters`).
    """
    set_seed(seed)
    attention.register()
    source = model_source(config, cache_dir)
    common = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    settings = load_pretrained("model.path", source, AutoConfig, **common)
    if hasattr(settings, "quantization_config"):
        raise ConfigError(
            [
                f"model.path: {source} holds quantised weights (take those it was made of; "
                "model.quantization packs them on loading)"
            ]
        )
    packed = _quantization(config, half)
    try:
        model: Any = load_weights(
            "model.path",
            source,
            AutoModelForCausalLM,
            **common,
            config=settings,
            dtype=_weights_dtype(config, device),
            attn_implementation=_kernel(config, settings, device, half) if share_prefix else None,
            quantization_config=packed,
            device_map={"": device} if packed else None,
        )
    except KeyError as error:  # an architecture that looks attention up in a table of its own
        raise cannot_share(type(settings).__name__, "its attention cannot be replaced") from error
    if config.quantization is Quantization.nf4:
        _mend_nf4_on_a_cpu(model, device)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora.used:
        from simpo.adapters import add_adapters

        model = add_adapters(model, config.lora, config.revision)
        if config.lora.adapter is not None:
            check_finite("model.lora.adapter", config.lora.adapter, model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return Policy(model, share_prefix).to(device)


def cannot_share(name: str, reason: str) -> ConfigError:
    """The answer to an architecture that shared prompts do not fit."""
    return ConfigError(
        [
            f"model.path: {name} cannot share prompts in packed rows: {reason} "
            "(train.share_prefix=false computes a prompt for each response)"
        ]
    )


def _kernel(config: ModelConfig, settings: Any, device: torch.device, half: bool) -> str:
    """Name under which transformers knows the attention asked for."""
    softcap = getattr(settings, "attn_logit_softcapping", None) is not None
    wanted = config.attention.value
    if config.attention is Attention.auto:
        wanted = attention.best(device, half, softcap)
    elif reason := attention.unusable(wanted, device, half, softcap):
        raise ConfigError([f"model.attention: {wanted} {reason}"])
    return attention.NAMES[wanted]


def _weights_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype is Dtype.auto:
        frozen_on_gpu = config.lora.used and device.type == "cuda"
        return torch.bfloat16 if frozen_on_gpu else torch.float32
    return torch.float32 if config.dtype is Dtype.float32 else torch.bfloat16


def _quantization(config: ModelConfig, half: bool) -> BitsAndBytesConfig | None:
    """How transformers packs the linear layers on loading; it leaves lm_head out by itself."""
    if config.quantization is Quantization.none:
        return None
    if config.quantization is Quantization.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    computed = torch.bfloat16 if half else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed,
        # A backend that shards weights and casts them to this type leaves packed ones of it alone.
        bnb_4bit_quant_storage=computed,
    )


def _mend_nf4_on_a_cpu(model: nn.Module, device: torch.device) -> None:
    """Keep bitsandbytes from two things that it does wrong on a CPU, and says nothing of.

    Raises:
        ConfigError: it takes blocks of 64 weights row by row, so it mixes up the scales of a layer
            whose rows are no multiple of that.
    """
    for name, layer in model.named_modules():
        # In the first evaluation weights would be repacked for good: with rounded scales, and
        # without a gradient for the layer's input.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
            if device.type == "cpu" and layer.in_features % 64:
                raise ConfigError(
                    [
                        "model.quantization: nf4 on a CPU needs layers with a multiple of 64 "
                        f"inputs, got {layer.in_features} in {name} (int8, or a GPU)"
                    ]
                )


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
        faults = "; ".join(f"{what} {_first_of(names)}" for what, names in odd.items() if names)
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
            [f"{key}: {source} holds NaN or infinite weights in {_first_of(bad)} (mend the files)"]
        )


def _first_of(names: Sequence[str]) -> str:
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

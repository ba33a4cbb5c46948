"""Recomputes activations of the layers in the backward pass, instead of keeping them.

    full       keeps the input of each layer and computes the layer again
    selective  also keeps the outputs of matrix products and of attention, which take nearly all
               of a layer's time, and computes the rest again: norms, rotary embeddings, gates

Recomputed numbers are those of the forward pass, bit for bit. torch's own selective checkpointing
(`create_selective_checkpoint_contexts`) wants every operation of a layer to come again in the same
number, and ZeRO-3 gathers weights in a layer or ahead of it, as it happens.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

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
        options["context_fn"] = _contexts
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


class _Keep(TorchDispatchMode):
    """Keeps outputs in the forward pass of a layer."""

    def __init__(self, kept: deque[tuple[Any, Any]]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if is_kept(func, args):
            # Autograd attaches its graph to the output itself.
            self._kept.append((func, tree_map_only(Tensor, Tensor.detach, output)))
        return output


class _Take(_Keep):
    """Takes them, in the same order, when the layer is computed again."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not is_kept(func, args):
            return func(*args, **(kwargs or {}))
        kept, output = self._kept.popleft()
        if kept is not func:
            raise RuntimeError(f"a layer computed again calls {func} where it called {kept}")
        return output


def _contexts() -> tuple[_Keep, _Take]:
    kept: deque[tuple[Any, Any]] = deque()
    return _Keep(kept), _Take(kept)

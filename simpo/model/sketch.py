"""Builds the policy of a run without its weights, and follows the memory of a step on it.

The tensors are fake: they have shapes and dtypes, and storages that hold nothing. Two layers
compute a row forward and backward; each further layer keeps as much as the first of them. The
head is followed on its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig

from simpo.config.choices import Quantization
from simpo.config.models import ModelConfig
from simpo.data.packing import pack
from simpo.data.pairs import PackedPairs, TokenizedPair
from simpo.loss import PairLogps
from simpo.model import attention, checkpointing
from simpo.model.head import fused_loss
from simpo.model.load import switch_noise_off, weights_dtype, with_attention
from simpo.model.policy import Policy

FUSED = "simpo_sketch"
"""Name in transformers of attention with a variable-length kernel, for any model."""
FOLLOWED_PAIRS = 4


@dataclass(frozen=True)
class Sketch:
    """A policy of fake tensors.

    Attributes:
        mode: what the policy's tensors must be computed under.
        quantised: names of the weights that quantisation packs on loading.
    """

    policy: Policy
    mode: FakeTensorMode
    quantised: frozenset[str]

    def compute_in(self, dtype: torch.dtype) -> None:
        """Cast all weights, as the sharding backends do before they compute with them."""
        with self.mode:
            _make_fake(self.policy, dtype)


def sketch(
    config: ModelConfig,
    settings: PreTrainedConfig,
    device: torch.device,
    *,
    bf16: bool = False,
    share_prefix: bool = True,
) -> Sketch:
    """Build the policy that `load_policy` would load, with fake tensors.

    Weights that are quantised on loading stay as they are.

    Args:
        settings: result of `load_settings`.
        device: device that the policy would be loaded on; it need not be there.

    Raises:
        ConfigError: the adapters do not fit the model.
    """
    attention.register()
    AttentionInterface.register(FUSED, _variable_length_attention)
    kernel = FUSED if device.type == "cuda" and bf16 else attention.NAMES["sdpa"]
    with torch.device("meta"):
        build = partial(
            AutoModelForCausalLM.from_config,
            settings,
            dtype=weights_dtype(config, device),
            trust_remote_code=config.trust_remote_code,
        )
        model = with_attention(build, settings, kernel, share_prefix)
        packed = _quantised(model) if config.quantization is not Quantization.none else set()
        checkpointing.enable(model, config.gradient_checkpointing)
        if config.lora.used:
            from simpo.model.adapters import sketch_adapters

            model = sketch_adapters(model, config.lora)
    switch_noise_off(model)
    policy = Policy(model, share_prefix)
    names = frozenset(name for name, p in policy.named_parameters() if id(p) in packed)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _make_fake(policy)
    return Sketch(policy, mode, names)


def _quantised(model: Any) -> set[int]:
    """Ids of the weights that quantisation packs: those of linear layers but for the head."""
    head = model.get_output_embeddings()
    return {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}


def _make_fake(policy: Policy, dtype: torch.dtype | None = None) -> None:
    """Replace all tensors by fake ones on a CPU, which autocast knows; weights in `dtype`."""
    made: dict[int, Any] = {}  # tied weights stay one
    for module in policy.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    fake = torch.empty_like(tensor, device="cpu", requires_grad=False)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake.to(dtype), requires_grad=tensor.requires_grad)
                    own[name] = made.setdefault(id(tensor), fake)


@dataclass(frozen=True)
class Peaks:
    """Bytes above weights, gradients and optimizer state in a forward and backward of a row.

    Attributes:
        kept: what the backward pass of all layers needs, after the forward.
        forward: most in the forward of the layers.
        head: most in the head, above `kept`.
        backward: most in the backward pass of the layers.
    """

    kept: float
    forward: float
    head: float
    backward: float


def follow(drawn: Sketch, row: PackedPairs, bf16: bool, logits_bytes: int) -> Peaks:
    """Follow the memory of a forward and backward of a row.

    Args:
        row: the row; on fake tensors its size costs no time.
        bf16: whether autocast computes in bf16.
        logits_bytes: of logits up to which those of one pair are computed at once.
    """
    policy = drawn.policy
    decoder: Any = policy.base.get_decoder()
    layers = decoder.layers
    policy.train()
    # The last ones, as some models begin with layers of another kind.
    decoder.layers = layers[-2:]
    try:
        with drawn.mode:
            return Peaks(
                **_layers(policy, row, bf16, more=max(0, len(layers) - 2)),
                head=_head(policy, row, bf16, logits_bytes),
            )
    finally:
        decoder.layers = layers


def _layers(policy: Policy, row: PackedPairs, bf16: bool, more: int) -> dict[str, int]:
    """`Peaks` without the head, of the policy's two layers and `more` like the first of them."""
    # Capped scores are a table of queries and keys, which would be larger in longer pairs.
    config = policy.base.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    short = row if capped else _merged(row, policy.share_prefix)
    first, *others = policy.base.get_decoder().layers
    with _following(policy) as live:
        hooks = [
            # Its input needs a gradient, as that of the layers in the middle of adapted models.
            policy.base.get_input_embeddings().register_forward_hook(
                lambda module, args, output: output.requires_grad_()
            ),
            first.register_forward_pre_hook(lambda *_: live.mark(True)),
            *(layer.register_forward_pre_hook(lambda *_: live.mark(False)) for layer in others),
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = policy.hidden(short)
            for mask in short.keys.masks.values():
                live.unmark(mask)  # all layers have the same
            further = more * live.marked_bytes()
            kept, forward = live.bytes + further, live.peak + further
        for hook in hooks:
            hook.remove()
        # Autocast has dropped its copies of weights.
        further, live.peak = more * live.marked_bytes(), live.bytes
        total = hidden.sum()
        del hidden  # the head keeps none of it
        total.backward()
        return {"kept": kept, "forward": forward, "backward": live.peak + further}


def _merged(row: PackedPairs, share_prefix: bool) -> PackedPairs:
    """A row of as many tokens in at most `FOLLOWED_PAIRS` pairs, which takes less time."""
    number = row.num_responses
    count = min(len(row.response_tokens) // number, FOLLOWED_PAIRS)
    tokens = row.input_ids.shape[1] // count
    response = np.ones(max(1, tokens // (2 * number)), dtype=np.int32)
    prompts = tokens - number * len(response)
    prompt = np.ones(max(1, prompts if share_prefix else prompts // number), dtype=np.int32)
    pair = TokenizedPair.of(prompt, *[response] * number)
    return pack([pair] * count, range(count), share_prefix)


def _head(policy: Policy, row: PackedPairs, bf16: bool, logits_bytes: int) -> int:
    """Most bytes in the head's forward and backward, above hidden states and their gradient."""
    weight, bias, softcap = policy.head()
    hidden = torch.empty(row.input_ids.shape[1], weight.shape[1], requires_grad=True)
    hidden.grad = torch.empty_like(hidden)
    with _following(policy, hidden) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            # Adapters on the head are merged within.
            weight, bias, softcap = policy.head()
            loss, _ = fused_loss(hidden, weight, bias, row, _difference, softcap, logits_bytes)
        loss.backward()
        return live.peak


def _difference(logps: PairLogps) -> Tensor:
    return logps.rejected - logps.chosen


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and those of marked ones apart."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._marked: dict[int, int] = {}
        self._marking = False

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._grouped_mm.default:  # on fake tensors it takes bf16 only
            left, right = args[:2]
            offs = args[2] if len(args) > 2 else (kwargs or {})["offs"]
            groups = () if right.ndim == 3 else offs.shape
            return self._count(left.new_empty(*groups, left.shape[0], right.shape[-1]))
        return tree_map_only(Tensor, self._count, func(*args, **(kwargs or {})))

    def ignore(self, tensor: Tensor) -> None:
        """Do not count a tensor that is there already."""
        storage = tensor.untyped_storage()
        self._alive[storage._cdata] = weakref.ref(storage)

    def mark(self, marking: bool) -> None:
        """Begin or end to mark what is allocated."""
        self._marking = marking

    def unmark(self, tensor: Tensor) -> None:
        """Do not count a tensor among the marked ones."""
        self._marked.pop(tensor.untyped_storage()._cdata, None)

    def marked_bytes(self) -> int:
        """Bytes of the marked storages that are alive."""
        return sum(self._marked.values())

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Fake storages all have the address 0.
        key = storage._cdata
        if key not in self._alive:
            size = storage.nbytes()

            def free(_: Any) -> None:
                del self._alive[key]
                self._marked.pop(key, None)
                self.bytes -= size

            self._alive[key] = weakref.ref(storage, free)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            if self._marking:
                self._marked[key] = size
        return tensor


@contextmanager
def _following(policy: Policy, *others: Tensor) -> Iterator[_Live]:
    """Context that counts what is allocated above weights, their gradients and `others`."""
    live = _Live()
    parameters = list(policy.parameters())
    for parameter in parameters:
        # A row that is not the first of its step finds gradients there.
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    grads = [p.grad for p in (*parameters, *others) if p.grad is not None]
    for tensor in (*parameters, *policy.buffers(), *others, *grads):
        live.ignore(tensor)
    try:
        with live:
            yield live
    finally:
        for parameter in parameters:
            parameter.grad = None


def _variable_length_attention(
    *args: Any, softcap: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`simpo.model.attention.attend` with a variable-length kernel, in which a soft-cap takes no
    memory.
    """
    return attention.attend("varlen", *args, **kwargs)

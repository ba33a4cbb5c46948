"""Defines the policy, a causal language model whose forward returns the loss of packed pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from simpo.data.pairs import PackedPairs
from simpo.loss import LossConfig, PairLogps
from simpo.model import attention
from simpo.model.head import PairLoss, fused_loss, token_scores
from simpo.model.router import RouterLoss, experts_per_token, routing


class Policy(nn.Module):
    """A causal language model whose forward returns the loss and the log-probabilities of pairs.

    The loss is computed inside the module, so that a sharding framework that wraps the policy
    gathers the head's weights itself.

    Attributes:
        unread: folder with the files of the weights if they are not loaded; `Backend.prepare` then
            gives this process its part.
        left_to_transformers: the model has attention of its own; see
            `leave_attention_to_transformers`.
    """

    def __init__(
        self, model: nn.Module, share_prefix: bool = True, unread: Path | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.share_prefix = share_prefix
        self.unread = unread
        self.left_to_transformers = False

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, under the adapters if there are any."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore[operator,return-value]

    def saved(self) -> dict[str, Tensor]:
        """What a saved model consists of, by name: the trained weights of adapters, else all
        weights and the buffers that belong to a checkpoint. Tied weights come once, under the first
        of their names. A sharded weight is this process's handle on it.
        """
        if self.model is not self.base:
            return {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        state = self.model.state_dict(keep_vars=True)
        first = {id(weight): name for name, weight in reversed(state.items())}
        return {name: weight for name, weight in state.items() if first[id(weight)] == name}

    def leave_attention_to_transformers(self) -> None:
        """For a model that does not attend by our segments; prompts cannot be shared then."""
        assert not self.share_prefix
        if self._attends_by_segment:
            self.left_to_transformers = True
            self.base.set_attn_implementation("sdpa" if self.base._supports_sdpa else "eager")

    @property
    def _attends_by_segment(self) -> bool:
        decoder: Any = self.base.get_decoder()
        ours = decoder.config._attn_implementation in attention.NAMES.values()
        # Some models keep their own attention, whatever is set.
        return ours and not self.left_to_transformers

    def forward(
        self,
        row: PackedPairs,
        pair_loss: PairLoss,
        router_loss: RouterLoss | None = None,
        weigher: LossConfig | None = None,
    ) -> tuple[Tensor, PairLogps]:
        """Sum of the losses of a row's pairs, and their log-probabilities; see `fused_loss`.

        Args:
            router_loss: called with the routing of the row's tokens; its value is added to the sum.
            weigher: the loss, if it weighs tokens.
        """
        output = self._decode(row, output_router_logits=router_loss is not None)
        # Read after the layers: sharded embeddings, which may be tied to the head, are freed after
        # their layer.
        weight, bias, softcap = self.head()
        hidden = output.last_hidden_state[0]
        loss, logps = fused_loss(hidden, weight, bias, row, pair_loss, softcap, weigher=weigher)
        if router_loss is not None:
            chosen, _ = experts_per_token(self.base.config.get_text_config())
            loss = loss + router_loss(*routing(output.router_logits, chosen))
        return loss, logps

    def token_scores(self, row: PackedPairs) -> tuple[Tensor, Tensor]:
        """Log-prob of each scored token of a row, and entropy before it; see `token_scores`."""
        output = self._decode(row)
        weight, bias, softcap = self.head()
        return token_scores(output.last_hidden_state[0], weight, bias, row, softcap)

    def head(self) -> tuple[Tensor, Tensor | None, float | None]:
        """Weight [V, D] with its LoRA adapters merged, bias [V] and soft-cap of the logits."""
        head: Any = self.base.get_output_embeddings()
        layer = head.get_base_layer() if hasattr(head, "get_base_layer") else head
        weight = layer.weight
        for name in getattr(head, "active_adapters", ()):
            weight = weight + head.get_delta_weight(name)
        config = self.base.config.get_text_config()
        return weight, layer.bias, getattr(config, "final_logit_softcapping", None)

    def hidden(self, row: PackedPairs) -> Tensor:
        """Last hidden states of a row after the final norm, [T, D]."""
        return self._decode(row).last_hidden_state[0]

    def _decode(self, row: PackedPairs, output_router_logits: bool = False) -> Any:
        options: dict[str, Any] = {}
        if self._attends_by_segment:
            # A mask of four dimensions is passed on as it is, and our kernels do not look at it.
            # Without one transformers would look for packed sequences in the positions, and wait
            # for the device's answer.
            length = row.input_ids.shape[1]
            seen = row.input_ids.new_ones(1, dtype=torch.bool).expand(1, 1, length, length)
            options = {"segments": row.segments, "keys": row.keys, "attention_mask": seen}
        # Otherwise, without mask and cache, it separates packed sequences by their positions.
        return self.base.get_decoder()(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            use_cache=False,
            **options,
            # Only models with experts know the option.
            **({"output_router_logits": True} if output_router_logits else {}),
        )

"""The policy: a causal language model whose forward gives the loss of packed pairs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from simpo.data.pairs import PackedPairs
from simpo.loss import PairLogps
from simpo.model.head import PairLoss, fused_loss


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

    def forward(self, row: PackedPairs, pair_loss: PairLoss) -> tuple[Tensor, PairLogps]:
        """Sum of the losses of the pairs of a row, and their log-probabilities."""
        hidden = self.hidden(row)
        # Last: weights in shards are freed again behind the layer that needed them, and that of the
        # embeddings may be the head's too.
        weight, bias, softcap = self.head()
        return fused_loss(hidden, weight, bias, row, pair_loss, softcap)

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

"""Four implementations of the SimPO loss of the same pairs: ours and three others.

Each is a class with a `name` and its own copy of the model. `loss(pairs)` computes everything from
token ids to the scalar loss, on which the caller runs the backward pass.
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from simpo.config.choices import Checkpointing
from simpo.data.packing import pack
from simpo.data.pairs import TokenizedPair
from simpo.loss import pair_losses
from simpo.loss.simpo import SigmoidConfig
from simpo.model import attention, checkpointing
from simpo.model.policy import Policy

BETA, RATIO = 2.0, 0.5


class Ours:
    """simpo: packed rows, shared prompts, chunked logits."""

    name = "simpo"

    recomputed = Checkpointing.none

    def __init__(self, model: Any, kernel: str = "sdpa") -> None:
        checkpointing.enable(model, self.recomputed)
        model.train()
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.set_attn_implementation(attention.NAMES[kernel])
        self.model = Policy(model)
        self.config = SigmoidConfig(beta=BETA, gamma_beta_ratio=RATIO)

    def loss(self, pairs: list[TokenizedPair]) -> Tensor:
        device = next(self.model.parameters()).device
        row = pack(pairs, range(len(pairs))).to(device)
        loss, _ = self.model(row, lambda logps: pair_losses(self.config, logps) / len(pairs))
        return loss

    def num_tokens(self, pairs: list[TokenizedPair]) -> int:
        return sum(pair.num_tokens() for pair in pairs)


class OursSelective(Ours):
    """The same with model.gradient_checkpointing=selective."""

    name, recomputed = "simpo selective", Checkpointing.selective


class OursFull(Ours):
    """The same with model.gradient_checkpointing=full."""

    name, recomputed = "simpo full", Checkpointing.full


class Padded:
    """The published recipe: chosen and rejected concatenated, padded, full logits in float32."""

    name = "padded"

    def __init__(self, model: Any) -> None:
        self.model = model

    def loss(self, pairs: list[TokenizedPair]) -> Tensor:
        ids, mask, labels = padded_batch(pairs, self.model.device)
        logits = self.model(ids, attention_mask=mask, use_cache=False).logits.float()
        logits, labels = logits[:, :-1], labels[:, 1:]
        scored = labels != -100
        targets = labels.masked_fill(~scored, 0)
        logps = torch.gather(logits.log_softmax(-1), 2, targets.unsqueeze(2)).squeeze(2)
        average = (logps * scored).sum(-1) / scored.sum(-1)
        chosen, rejected = average.chunk(2)
        return -logsigmoid(BETA * (chosen - rejected - RATIO)).mean()

    def num_tokens(self, pairs: list[TokenizedPair]) -> int:
        return padded_batch(pairs, torch.device("cpu"))[0].numel()


class Liger(Padded):
    """Liger's chunked SimPO loss on padded hidden states, without its NLL term."""

    name = "liger"

    def __init__(self, model: Any) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

        super().__init__(model)
        compiled = model.device.type == "cuda"
        self.fused = LigerFusedLinearSimPOLoss(
            beta=BETA, gamma=BETA * RATIO, compute_nll_loss=False, compiled=compiled
        )

    def loss(self, pairs: list[TokenizedPair]) -> Tensor:
        ids, mask, labels = padded_batch(pairs, self.model.device)
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        hidden = base.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        output = self.fused(base.lm_head.weight, hidden[:, :-1], labels[:, 1:].contiguous())
        return output[0] if isinstance(output, tuple) else output


class Trl(Padded):
    """TRL's CPOTrainer with loss_type="simpo", on batches in the format of its collator."""

    name = "trl"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.trainer = _trl_trainer(model)

    def loss(self, pairs: list[TokenizedPair]) -> Tensor:
        ids, mask, labels = padded_batch(pairs, torch.device("cpu"))
        batch = {}
        for side, part in (("chosen", slice(0, len(pairs))), ("rejected", slice(len(pairs), None))):
            width = int(mask[part].sum(-1).max())
            batch[f"{side}_input_ids"] = ids[part, :width]
            batch[f"{side}_attention_mask"] = mask[part, :width]
            batch[f"{side}_labels"] = labels[part, :width]
        return self.trainer.get_batch_loss_metrics(self.model, batch)[0]


def padded_batch(pairs: list[TokenizedPair], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels [2P, longest], chosen first; a label of -100 is not scored."""
    responses = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    prompts = [p.prompt_ids for p in pairs] * 2
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        mask[i, :end] = 1
        labels[i, len(prompt) : end] = ids[i, len(prompt) : end]
    return ids.to(device), mask.to(device), labels.to(device)


def _trl_trainer(model: PreTrainedModel) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    words = {"[pad]": 0, "[bos]": 1, "[eos]": 2, "a": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[pad]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return CPOTrainer(
        model=model,
        args=CPOConfig(
            output_dir=tempfile.mkdtemp(),
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=BETA,
            simpo_gamma=BETA * RATIO,
            max_length=4096,
            use_cpu=model.device.type == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        ),
        # CPOTrainer requires a data set; the measured batches are made from token ids.
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " a", "rejected": " a"}]),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="[bos]", eos_token="[eos]", pad_token="[pad]"
        ),
    )


def contenders(model: PreTrainedModel, names: list[str]) -> list[Any]:
    """The contenders with these names, each with its own copy of the model."""
    attention.register()
    kinds = {kind.name: kind for kind in (Padded, Trl, Liger, Ours, OursSelective, OursFull)}
    return [kinds[name](copy.deepcopy(model)) for name in names]

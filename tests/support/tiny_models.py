"""Tiny real models, and an independent padded implementation to compare numbers with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from simpo.data.flat_tokens import Tokens
from simpo.data.pairs import TokenizedPair
from simpo.data.store import TokenizedSet, TokenReport
from simpo.loss.simpo import SimpoConfig
from simpo.model import attention

VOCAB = 128
SEGMENTS = attention.NAMES["sdpa"]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Rows of whole blocks of 64: what nf4 needs on a CPU.
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
FAMILIES = {
    "llama": LlamaConfig(),
    "llama_tied": LlamaConfig(tie_word_embeddings=True),
    "qwen2": Qwen2Config(),
    "qwen3": Qwen3Config(),
    "mistral_window": MistralConfig(sliding_window=8),
    "gemma2": Gemma2Config(
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        # Small, so that the caps bend the numbers of a tiny model.
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": Gemma3TextConfig(head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
}
EXPERTS = {
    "mixtral": MixtralConfig(num_local_experts=8, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(num_experts=8, num_experts_per_tok=3),
    # An expert that all tokens meet.
    "qwen2_moe": Qwen2MoeConfig(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
    ),
    # One layer without experts.
    "qwen3_moe": Qwen3MoeConfig(
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0]
    ),
}
"""Mixtures of experts."""


def tiny_reward_model(tiny_folder: Path, folder: Path) -> Any:
    """A classifier with one score, saved in a folder with the tokenizer of the tiny model."""
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(tiny_folder, num_labels=1, pad_token_id=0)
    model: Any = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return model


def tiny_model(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int
) -> PreTrainedModel:
    """A random two-layer model of a real architecture, with weights large enough to matter."""
    attention.register()
    origin = (FAMILIES | EXPERTS)[family]
    config = type(origin).from_dict(
        origin.to_dict()
        | SIZES
        | {
            "head_dim": 16 if family.startswith("gemma") else 8,
            "layer_types": None,
            "initializer_range": 0.2,
        }
        | sizes
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=SEGMENTS, dtype=dtype)


def tiny_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """A LoRA adapter of a model in a folder, with weights as large as after training.

    Args:
        settings: of peft's LoraConfig.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", **settings})
    adapted = get_peft_model(model, config)
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(str(folder))
    return folder


def random_pairs(
    rng: np.random.Generator, num_pairs: int, longest: int = 12, shortest_prompt: int = 1
) -> list[TokenizedPair]:
    """Pairs of random ids with lengths from 1 (prompts from `shortest_prompt`) to `longest`."""

    def ids(shortest: int) -> np.ndarray:
        return rng.integers(3, VOCAB, rng.integers(shortest, longest + 1)).astype(np.int32)

    shortest = 2 if shortest_prompt == 0 else 1
    return [
        TokenizedPair.of(ids(shortest_prompt), ids(shortest), ids(shortest))
        for _ in range(num_pairs)
    ]


def ranked_pairs(
    rng: np.random.Generator, num_pairs: int, longest: int = 12, shortest_prompt: int = 1
) -> list[TokenizedPair]:
    """Pairs of 2 to 5 responses each, whose scores fall from chosen over others to rejected."""
    pairs = []
    for pair in random_pairs(rng, num_pairs, longest, shortest_prompt):
        others = [one.chosen_ids for one in random_pairs(rng, int(rng.integers(0, 4)), longest, 0)]
        scores = np.sort(rng.integers(0, 5, 2 + len(others)))[::-1].astype(float)
        scores[0] += 1
        ranked = (scores[0], scores[-1], *scores[1:-1])
        responses = (*pair.responses, *others)
        pairs.append(
            replace(pair, responses=responses, scored=(None,) * len(responses), scores=ranked)
        )
    return pairs


def token_set(pairs: list[TokenizedPair]) -> TokenizedSet:
    """A set of pairs in memory."""
    tokens, digest = Tokens.of(pairs), hashlib.sha256()
    tokens.add_to(digest)
    report = TokenReport(len(pairs), 0, 0, 0, 0, {})
    places = [f"row {index}" for index in range(len(pairs))]
    largest = int(tokens.ids.max())
    return TokenizedSet(
        tokens, places, [], report, "texts", digest.hexdigest()[:16], largest, {}, {}
    )


def padded_logps(model: PreTrainedModel, pairs: Sequence[TokenizedPair]) -> tuple[Tensor, Tensor]:
    """Summed log-probs and lengths of all responses by the plain way, each [2P].

    Every response with a prompt of its own, padded to the longest, full logits, log_softmax,
    gather, mask; chosen ones first. transformers' own eager attention.
    """
    sequences = [(p.prompt_ids, p.chosen_ids) for p in pairs]
    sequences += [(p.prompt_ids, p.rejected_ids) for p in pairs]
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    scored = torch.zeros(len(sequences), width, dtype=torch.bool)
    for i, (prompt, response) in enumerate(sequences):
        length = len(prompt) + len(response)
        ids[i, :length] = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        scored[i, len(prompt) : length] = True
    model.set_attn_implementation("eager")
    try:
        # Padding is on the right, where causal attention never looks, so it needs no mask. (With
        # one, transformers' float64 window mask overflows to NaN.)
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        model.set_attn_implementation(SEGMENTS)
    logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    scored = scored[:, 1:]
    return (logps * scored).sum(-1), scored.sum(-1)


def simpo_by_hand(
    logps: Tensor, lengths: Tensor, beta: float, ratio: float, hinge: bool, smoothing: float
) -> Tensor:
    """Preference loss of each pair from the output of `padded_logps`, as the paper writes it."""
    chosen, rejected = (logps / lengths).chunk(2)
    z = beta * chosen - beta * rejected - beta * ratio
    if hinge:
        return torch.clamp(1 - z, min=0)
    right, wrong = 1 / (1 + torch.exp(-z)), 1 / (1 + torch.exp(z))
    return -(1 - smoothing) * torch.log(right) - smoothing * torch.log(wrong)


def loss_by_hand(
    model: PreTrainedModel, pairs: Sequence[TokenizedPair], loss: SimpoConfig
) -> Tensor:
    """The whole loss on pairs by the plain way: mean over pairs, sft term over tokens."""
    logps, lengths = padded_logps(model, pairs)
    preference = simpo_by_hand(
        logps,
        lengths,
        loss.beta,
        loss.gamma_beta_ratio,
        loss.name == "hinge",
        getattr(loss, "label_smoothing", 0.0),
    ).mean()
    chosen = len(pairs)
    return preference - loss.sft_weight * logps[:chosen].sum() / lengths[:chosen].sum()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name, in float64."""
    return {n: p.grad.double() for n, p in module.named_parameters() if p.grad is not None}

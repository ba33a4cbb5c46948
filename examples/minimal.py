"""SimPO without the training loop: two preference pairs, from text to gradient steps.

    python examples/minimal.py             the built-in model of 135M weights
    python examples/minimal.py MODEL       a folder or hub id of a causal language model

Prints the loss and the mean token log-probabilities of both responses, step by step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from simpo.config.data import DataConfig
from simpo.config.models import ModelConfig
from simpo.data.chats.chat import Chat
from simpo.data.packing import pack
from simpo.data.pairs import Tokenized
from simpo.data.reading.records import to_pair
from simpo.loss import PairLogps
from simpo.loss.simpo import SigmoidConfig
from simpo.model.load import load_policy
from simpo.model.tokenizer import load_tokenizer

CACHE = Path("~/.cache/simpo").expanduser()
RECORDS = [
    {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "I have always liked colours."},
    {"prompt": "What is 2 + 3?", "chosen": "5", "rejected": "Let me think about that for a while."},
]


def main(model: str, steps: int = 5) -> list[float]:
    """Train on the two pairs; the loss before each step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ModelConfig(name="example", path=model)
    loss = SigmoidConfig(beta=2.0, gamma_beta_ratio=0.5)
    print(loss.formula())

    # Text to tokens: the chat template says what is prompt and what is response.
    pairs = [to_pair(record, f"record {i}") for i, record in enumerate(RECORDS)]
    chat = Chat(load_tokenizer(config, CACHE))
    print(chat.prompt_text(pairs[0].prompt) + pairs[0].chosen[0]["content"])
    tokenized = [result for result in chat.tokenize(pairs, DataConfig())]
    tokens = [result.pair for result in tokenized if isinstance(result, Tokenized)]

    # All pairs in one row, each prompt once: [prompt chosen rejected][prompt chosen rejected].
    row = pack(tokens, range(len(tokens))).to(device)
    print(f"{row.input_ids.numel()} tokens, scored: {row.response_tokens}")

    policy = load_policy(config, CACHE, device, seed=42)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)

    def share(logps: PairLogps) -> torch.Tensor:
        """What each pair adds to the loss, [P]: its own loss over the number of all pairs."""
        return loss.preference(logps).losses / len(tokens)

    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        value, logps = policy(row, share)
        value.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        chosen, rejected = logps.average_chosen.mean(), logps.average_rejected.mean()
        print(f"step {step}  loss {value:.4f}  chosen {chosen:.3f}  rejected {rejected:.3f}")
        losses.append(value.item())
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "builtin:smollm2")

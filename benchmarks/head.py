"""`make bench-head`: measures five ways to compute loss and gradients from hidden states.

    plain        logits of all positions in float32, log_softmax, gather; autograd keeps them
    checkpoint   chunks of 512 response positions, logits recomputed in the backward pass
    liger        LigerFusedLinearSimPOLoss on padded sequences, prompts included
    cce          cut-cross-entropy's per-token loss on response positions (Triton on a GPU,
                 its torch.compile version on a CPU)
    simpo        simpo.model.head.fused_loss

Prints time and memory, and the relative error of loss and gradients to `plain` in float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bench import MIB, peak_bytes
from contenders import BETA, RATIO, padded_batch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint
from workloads import SHAPES, typical_batch

from simpo.data.packing import pack
from simpo.data.pairs import PackedPairs, TokenizedPair
from simpo.loss import pair_losses
from simpo.loss.simpo import SigmoidConfig
from simpo.model.head import fused_loss

Way = Callable[[Tensor, Tensor], Tensor]
CHUNK_TOKENS = 512


def main() -> None:
    """Measure all ways at the hidden size and vocabulary of a shape, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="smol8", choices=SHAPES)
    parser.add_argument("--profile", default="ultrafeedback")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocab, width = SHAPES[options.shape]["vocab_size"], SHAPES[options.shape]["hidden_size"]
    pairs = typical_batch(options.profile, options.pairs, vocab)
    row = pack(pairs, range(len(pairs)), share_prefix=False).to(device)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(row.input_ids.shape[1], width, device=device, dtype=dtype)
    weight = torch.randn(vocab, width, device=device, dtype=dtype) / width**0.5
    exact = gradients(plain(row, pairs), hidden.double(), weight.double())
    print("| way | s | peak MiB | loss off | gradient off |\n|---|---|---|---|---|")
    for name, make in WAYS.items():
        try:
            way = make(row, pairs)
            got = gradients(way, hidden, weight)
        except (ImportError, RuntimeError) as error:
            print(f"| {name} | left out: {str(error).splitlines()[0]} | | | |")
            continue
        off = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]
        peak = peak_mib(way, hidden, weight)
        seconds = [timed(way, hidden, weight) for _ in range(options.rounds)]
        print(
            f"| {name} | {statistics.median(seconds):.3f} | {peak:,.0f} | {off[0]:.1e} "
            f"| {max(off[1:]):.1e} |",
            flush=True,
        )


def plain(row: PackedPairs, _: list[TokenizedPair]) -> Way:
    def way(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        logits = logits if logits.dtype is torch.float64 else logits.float()
        logps = logits.log_softmax(-1)[row.predictors, row.targets]
        return simpo_of(logps, row)

    return way


def checkpointed(row: PackedPairs, _: list[TokenizedPair]) -> Way:
    def logps_of(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)

    def way(hidden: Tensor, weight: Tensor) -> Tensor:
        scored = hidden[row.predictors].split(CHUNK_TOKENS)
        parts = zip(scored, row.targets.split(CHUNK_TOKENS), strict=True)
        logps = [checkpoint(logps_of, h, weight, t, use_reentrant=False) for h, t in parts]
        return simpo_of(torch.cat(logps), row)

    return way


def cce(row: PackedPairs, _: list[TokenizedPair]) -> Way:
    from cut_cross_entropy import linear_cross_entropy

    def way(hidden: Tensor, weight: Tensor) -> Tensor:
        # The exact variant does not drop small gradients.
        impl = "cce_exact" if hidden.is_cuda else "torch_compile"
        losses = linear_cross_entropy(
            hidden[row.predictors], weight, row.targets, reduction="none", impl=impl
        )
        return simpo_of(-losses.float(), row)

    return way


def liger(row: PackedPairs, pairs: list[TokenizedPair]) -> Way:
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    device = row.input_ids.device
    fused = LigerFusedLinearSimPOLoss(
        beta=BETA, gamma=BETA * RATIO, compute_nll_loss=False, compiled=device.type == "cuda"
    )
    _, mask, labels = padded_batch(pairs, device)
    # Indices into `hidden` for each padded sequence, chosen ones first.
    lengths = [len(p.prompt_ids) + len(r) for p in pairs for r in (p.chosen_ids, p.rejected_ids)]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    order = [*range(0, len(lengths), 2), *range(1, len(lengths), 2)]
    index = torch.zeros_like(mask)
    for line, sequence in enumerate(order):
        length = lengths[sequence]
        index[line, :length] = torch.arange(length, device=device) + starts[sequence]

    def way(hidden: Tensor, weight: Tensor) -> Tensor:
        padded = hidden[index] * mask[..., None]
        output = fused(weight, padded[:, :-1], labels[:, 1:].contiguous())
        return output[0] if isinstance(output, tuple) else output

    return way


def ours(row: PackedPairs, _: list[TokenizedPair]) -> Way:
    config = SigmoidConfig(beta=BETA, gamma_beta_ratio=RATIO)
    count = len(row.pairs)

    def way(hidden: Tensor, weight: Tensor) -> Tensor:
        loss, _ = fused_loss(hidden, weight, None, row, lambda x: pair_losses(config, x) / count)
        return loss

    return way


WAYS: dict[str, Any] = {
    "plain": plain,
    "checkpoint": checkpointed,
    "liger": liger,
    "cce": cce,
    "simpo": ours,
}


def simpo_of(logps: Tensor, row: PackedPairs) -> Tensor:
    means = torch.stack([part.mean() for part in logps.split(row.response_tokens)])
    return -logsigmoid(BETA * (means[0::2] - means[1::2] - RATIO)).mean()


def gradients(way: Way, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """The loss and its gradients with respect to hidden states and weight."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = way(*leaves)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def timed(way: Way, hidden: Tensor, weight: Tensor) -> float:
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    synchronize = torch.cuda.synchronize if hidden.is_cuda else lambda: None
    synchronize()
    begin = time.perf_counter()
    way(*leaves).backward()
    synchronize()
    return time.perf_counter() - begin


def peak_mib(way: Way, hidden: Tensor, weight: Tensor) -> float:
    """Peak memory of one pass minus the memory in use before it, in MiB."""
    if hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed(way, hidden, weight)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    return peak_bytes(lambda: timed(way, hidden, weight)) / MIB


if __name__ == "__main__":
    main()

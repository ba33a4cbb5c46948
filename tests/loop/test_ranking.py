"""Compares losses of all responses to a prompt with numbers by hand, loops and padded forwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from torch import Tensor
from torch.optim import SGD
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from simpo.backend import Backend
from simpo.config.backends import SingleConfig
from simpo.config.choices import Device, Precision
from simpo.data.packing import pack
from simpo.data.pairs import TokenizedPair
from simpo.loop.score import columns, pair_sums, pair_table, summarise
from simpo.loop.step import update
from simpo.loss import Compare, LossConfig, PairLogps, ResponseLogps, pair_losses
from simpo.loss.simpo import HingeConfig, RepoConfig, SigmoidConfig
from simpo.loss.weighted_sum import MixConfig
from simpo.loss.with_log_ratios import NcaConfig
from simpo.loss.with_ranked_responses import (
    InfoNcaConfig,
    PlackettLuceConfig,
    SDpoConfig,
    SoftLabelsConfig,
)
from simpo.loss.with_reference import DpoConfig, DpoShiftConfig
from simpo.model.policy import Policy
from tests.support.tiny_models import gradients, ranked_pairs, tiny_model

NAN = math.nan
SIMPO = SigmoidConfig(beta=2.0, gamma_beta_ratio=0.5)

# A prompt with the scores 3, 1, 2 (chosen, rejected, another). Mean log-probs: -2, -4 and -3.
# Over the reference: 1, -1 and 0.
ONE = ResponseLogps(
    sums=torch.tensor([[-6.0, -8.0, -3.0]]),
    tokens=torch.tensor([[3, 2, 1]]),
    scores=torch.tensor([[3.0, 1.0, 2.0]]),
    reference=torch.tensor([[-7.0, -7.0, -3.0]]),
)


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log(1 + math.exp(x))


# SimPO's z = 2 * difference - 1: 1 of neighbours in the order, 3 of the outer two.
Z_LOG = math.log(math.exp(0.5) + math.exp(-0.5) + 1)
WORKED: list[tuple[LossConfig, float, str]] = [
    (replace(SIMPO, compare=Compare.all), (2 * softplus(-1) + softplus(-3)) / 3, "-log sigmoid("),
    (replace(SIMPO, compare=Compare.best_rest), (softplus(-1) + softplus(-3)) / 2, "-log sigmoid("),
    (
        # Score margins 1, 1 and 2.
        replace(SIMPO, compare=Compare.all, margin_weights=True),
        (2 * softplus(-1) + 2 * softplus(-3)) / 4,
        "-log sigmoid(2*(l_w - l_l) - 1),  l = mean token log-prob of a response; mean over each "
        "two responses to a prompt whose scores differ, weighted by their margin",
    ),
    (
        replace(SIMPO, compare=Compare.best_rest, margin_weights=True),
        (softplus(-1) + 2 * softplus(-3)) / 3,
        "-log sigmoid(2*(l_w - l_l) - 1),  l = mean token log-prob of a response; mean over the "
        "best response to a prompt with each of a lower score, weighted by their margin",
    ),
    (
        # r = -4, -8 and -6.
        PlackettLuceConfig(),
        math.log(1 + math.exp(-2) + math.exp(-4)) + softplus(-2),
        "-sum_i log sigmoid(r_i - log sum_j exp(r_j)),  r = 2*l, ",
    ),
    (
        PlackettLuceConfig(gamma_beta_ratio=0.5),
        math.log(1 + math.exp(-1) + math.exp(-3)) + softplus(-1),
        "-sum_i log sigmoid(r_i - log sum_j exp(r_j) - 1),  r = 2*l, ",
    ),
    # In the following r = 0.5, -0.5 and 0.
    (
        SDpoConfig(beta=0.5),
        math.log(1 + math.exp(-1) + math.exp(-0.5)),
        "-log sigmoid(-log sum_j exp(r_j - r_w)),  ",
    ),
    (
        # p = 2^3, 2^1, 2^2 over 14.
        InfoNcaConfig(beta=0.5, alpha=1 / math.log(2)),
        Z_LOG - (8 - 2) / 14 * 0.5,
        "-sum_i p_i*log softmax_i(r),  p = softmax(scores/1.4427), r = 0.5 * ",
    ),
    (
        NcaConfig(beta=0.5, alpha=1 / math.log(2)),
        (8 * softplus(-0.5) + 2 * softplus(0.5) + 4 * softplus(0)) / 14
        + (softplus(0.5) + softplus(-0.5) + softplus(0)) / 3,
        "-sum_i (p_i*log sigmoid(r_i) + log sigmoid(-r_i)/K),  p = softmax(scores/1.4427), r = ",
    ),
    (
        # p = 3/4 where scores differ by 1, and 9/10 by 2; z = 2, 2 and 4.
        SoftLabelsConfig(tau=math.log(3)),
        (1.5 * softplus(-2) + 0.5 * softplus(2) + 0.9 * softplus(-4) + 0.1 * softplus(4)) / 3,
        "-p*log sigmoid(z) - (1 - p)*log sigmoid(-z),  z = 2*(l_w - l_l), ",
    ),
    (
        MixConfig(
            compare=Compare.all,
            parts={"repo": {"weight": 2, "margin": 1.5}, "dpo": {"weight": 0.5, "beta": 0.5}},
        ),
        # Margins of l: 1, 1, 2; of r: 0.5, 0.5, 1.
        (2 * (0.5 + 0.5) + 0.5 * (2 * softplus(-0.5) + softplus(-1))) / 3,
        "2*(max(0, 1.5 - (l_w - l_l))) + 0.5*(",
    ),
]


@pytest.mark.parametrize(("loss", "expected", "text"), WORKED, ids=lambda x: getattr(x, "name", ""))
def test_by_hand(loss: LossConfig, expected: float, text: str) -> None:
    assert pair_losses(loss, ONE.pairs()).tolist() == pytest.approx([expected], rel=1e-6)
    assert loss.formula().startswith(f"loss = {text}")
    assert not list(loss.problems()) and loss.ranks


def test_metrics_by_hand() -> None:
    """Rewards -4, -8, -6 of scores 3, 1, 2 are in their order; best_rest has two of three pairs."""
    both = replace(ONE, scores=torch.tensor([[2.0, 1.0, 3.0]]))  # only two of three in their order
    all_pairs, rest = (replace(SIMPO, compare=compare) for compare in Compare)
    assert metrics(all_pairs, ONE) == {
        "chosen": (-4 - 4 - 6) / 3, "rejected": (-8 - 6 - 8) / 3, "margins": 8 / 3,
        "accuracies": 1, "rank_correlation": 1, "best_accuracies": 1,
    }  # fmt: skip
    assert metrics(rest, ONE) == {
        "chosen": -4, "rejected": -7, "margins": 3,
        "accuracies": 1, "rank_correlation": 1, "best_accuracies": 1,
    }  # fmt: skip
    assert metrics(all_pairs, both) == {
        "chosen": (-6 - 6 - 4) / 3, "rejected": (-4 - 8 - 8) / 3, "margins": 4 / 3,
        "accuracies": 2 / 3, "rank_correlation": 1 / 3, "best_accuracies": 0,
    }  # fmt: skip
    assert metrics(rest, both) == {
        "chosen": -6, "rejected": -6, "margins": 0,
        "accuracies": 0.5, "rank_correlation": 1 / 3, "best_accuracies": 0,
    }  # fmt: skip
    assert metrics(PlackettLuceConfig(), both) == metrics(all_pairs, both)


def metrics(loss: LossConfig, logps: ResponseLogps) -> dict[str, object]:
    found = summarise(loss, pair_sums(pair_table(loss, logps.pairs())))
    named = {k.removeprefix("rewards/"): v for k, v in found.items() if k.startswith("rewards/")}
    return {key: pytest.approx(value, rel=1e-6, abs=1e-6) for key, value in named.items()}


def test_rank_metrics_share_ties() -> None:
    """Equal rewards are half right, and the highest reward is shared."""
    tied = replace(ONE, sums=torch.tensor([[-6.0, -8.0, -2.0]]))  # l = -2, -4 and -2
    found = metrics(replace(SIMPO, compare=Compare.all), tied)
    assert found["accuracies"] == 2.5 / 3 and found["rank_correlation"] == 2 / 3
    assert found["best_accuracies"] == 0.5
    two_best = replace(tied, scores=torch.tensor([[3.0, 1.0, 3.0]]))
    assert metrics(replace(SIMPO, compare=Compare.all), two_best)["best_accuracies"] == 1


def test_losses_of_pairs_have_no_rank_metrics() -> None:
    assert not [name for name in columns(SIMPO) if "rank" in name or "best" in name]
    assert columns(replace(SIMPO, compare=Compare.all))[-2:] == (
        "rewards/rank_correlation",
        "rewards/best_accuracies",
    )


def test_correlation_is_kendalls() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        size = int(rng.integers(2, 7))
        logps = drawn(rng, [size])
        logps = replace(logps, scores=torch.tensor(rng.permutation(size)[None]).float())
        table = pair_table(replace(SIMPO, compare=Compare.all), logps.pairs())
        assert logps.scores is not None
        expected = kendalltau(logps.scores[0], (logps.sums / logps.tokens)[0]).statistic
        assert table[0, -2].item() == pytest.approx(expected)


# Brute force: the responses of a prompt as a list, and the papers' formulas in loops over it.


@dataclass
class Response:
    sum: Tensor
    tokens: int
    score: float
    reference: float

    @property
    def average(self) -> Tensor:
        return self.sum / self.tokens

    def ratio(self, beta: float) -> Tensor:
        return beta * (self.sum - self.reference)


def sigmoid(x: Tensor | float) -> Tensor:
    return 1 / (1 + torch.exp(-torch.as_tensor(x, dtype=torch.float64)))


def pairs_of(
    prompt: Sequence[Response], best_only: bool = False
) -> list[tuple[Response, Response]]:
    top = max(one.score for one in prompt)
    found = [(a, b) for a, b in permutations(prompt, 2) if a.score > b.score]
    return [(a, b) for a, b in found if not best_only or a.score == top]


def total(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()


def simpo_mean(prompt: Sequence[Response], best_only: bool, by_margin: bool) -> Tensor:
    pairs = pairs_of(prompt, best_only)
    weights = [a.score - b.score if by_margin else 1.0 for a, b in pairs]
    losses = [-torch.log(sigmoid(2 * (a.average - b.average) - 1)) for a, b in pairs]
    return total(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)


def dpo_mean(prompt: Sequence[Response]) -> Tensor:
    pairs = pairs_of(prompt)
    return total(-torch.log(sigmoid(a.ratio(0.3) - b.ratio(0.3))) for a, b in pairs) / len(pairs)


def plackett_luce(prompt: Sequence[Response], gamma: float) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for one in prompt:
        own, below = torch.exp(2 * one.average - gamma), torch.zeros((), dtype=torch.float64)
        for other in prompt:
            below = below + torch.exp(2 * other.average) * (other.score < one.score)
        loss = loss - torch.log(own / (own + below))
    return loss


def s_dpo(prompt: Sequence[Response]) -> Tensor:
    top = max(one.score for one in prompt)
    best = [one for one in prompt if one.score == top]
    rest = [one for one in prompt if one.score < top]
    losses = [
        -torch.log(sigmoid(-torch.log(total(torch.exp(b.ratio(0.3) - a.ratio(0.3)) for b in rest))))
        for a in best
    ]
    return total(losses) / len(best)


def shares(prompt: Sequence[Response], alpha: float) -> list[float]:
    powers = [math.exp(one.score / alpha) for one in prompt]
    return [power / sum(powers) for power in powers]


def infonca(prompt: Sequence[Response]) -> Tensor:
    """As torch has the cross-entropy with probabilities as targets."""
    ratios = torch.stack([one.ratio(0.3) for one in prompt])
    target = torch.tensor(shares(prompt, 0.7), dtype=torch.float64)
    return torch.nn.functional.cross_entropy(ratios, target)


def nca(prompt: Sequence[Response]) -> Tensor:
    each = zip(prompt, shares(prompt, 0.7), strict=True)
    data = total(share * torch.log(sigmoid(one.ratio(0.3))) for one, share in each)
    return -data - total(torch.log(sigmoid(-one.ratio(0.3))) for one in prompt) / len(prompt)


def soft_labels(prompt: Sequence[Response]) -> Tensor:
    losses = []
    for a, b in pairs_of(prompt):
        label, z = sigmoid(0.7 * (a.score - b.score)), 2 * (a.average - b.average) - 1
        losses.append(-label * torch.log(sigmoid(z)) - (1 - label) * torch.log(sigmoid(-z)))
    return total(losses) / len(losses)


FORMULAS: list[tuple[LossConfig, Callable[[Sequence[Response]], Tensor]]] = [
    (replace(SIMPO, compare=Compare.all), lambda prompt: simpo_mean(prompt, False, False)),
    (replace(SIMPO, compare=Compare.best_rest), lambda prompt: simpo_mean(prompt, True, False)),
    (
        replace(SIMPO, compare=Compare.all, margin_weights=True),
        lambda prompt: simpo_mean(prompt, False, True),
    ),
    (
        replace(SIMPO, compare=Compare.best_rest, margin_weights=True, sft_weight=0.7),
        lambda prompt: simpo_mean(prompt, True, True),
    ),
    (DpoConfig(beta=0.3, compare=Compare.all), dpo_mean),
    (PlackettLuceConfig(), lambda prompt: plackett_luce(prompt, 0.0)),
    (PlackettLuceConfig(gamma_beta_ratio=0.3), lambda prompt: plackett_luce(prompt, 0.6)),
    (SDpoConfig(beta=0.3), s_dpo),
    (InfoNcaConfig(beta=0.3, alpha=0.7), infonca),
    (NcaConfig(beta=0.3, alpha=0.7), nca),
    (SoftLabelsConfig(gamma_beta_ratio=0.5, tau=0.7), soft_labels),
]
EACH = pytest.mark.parametrize(("loss", "formula"), FORMULAS, ids=lambda x: getattr(x, "name", ""))


def drawn(rng: np.random.Generator, sizes: Sequence[int]) -> ResponseLogps:
    """Float64 log-probs of prompts with so many responses; scores of few values, so many tie."""
    shape = len(sizes), max(sizes)
    lacks = torch.arange(max(sizes)) >= torch.tensor(sizes)[:, None]
    scores = torch.tensor(rng.integers(0, 4, shape), dtype=torch.float32)
    # Never all are equal.
    scores[:, 0] = scores.where(~lacks, 0).amax(dim=1) + 1
    return ResponseLogps(
        torch.tensor(rng.uniform(-9, -1, shape)).masked_fill(lacks, 0),
        torch.tensor(rng.integers(1, 6, shape)).masked_fill(lacks, 0),
        scores.masked_fill(lacks, NAN),
        torch.tensor(rng.uniform(-9, -1, shape)).masked_fill(lacks, 0),
    )


def prompts_of(logps: ResponseLogps) -> list[list[Response]]:
    assert logps.scores is not None and logps.reference is not None
    return [
        [
            Response(logps.sums[p, k], int(logps.tokens[p, k]), float(logps.scores[p, k]),
                     float(logps.reference[p, k]))
            for k in range(logps.tokens.shape[1]) if logps.tokens[p, k]
        ]
        for p in range(len(logps.tokens))
    ]  # fmt: skip


@EACH
@pytest.mark.parametrize("seed", range(10))
def test_against_loops(
    seed: int, loss: LossConfig, formula: Callable[[Sequence[Response]], Tensor]
) -> None:
    """Losses and gradients at 1e-10, with prompts of 2 to 6 responses, many of equal scores."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 7, 5).tolist()
    logps = drawn(rng, sizes)
    logps.sums.requires_grad_()
    losses = pair_losses(loss, logps.pairs())
    expected = torch.stack([formula(prompt) for prompt in prompts_of(logps)])
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)
    weights = torch.tensor(rng.uniform(0, 1, 5))
    (ours,) = torch.autograd.grad(weights @ losses, logps.sums, retain_graph=True)
    (theirs,) = torch.autograd.grad(weights @ expected, logps.sums)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@EACH
def test_the_order_of_the_responses_changes_nothing(
    loss: LossConfig, formula: Callable[[Sequence[Response]], Tensor]
) -> None:
    rng = np.random.default_rng(3)
    logps = drawn(rng, [5, 5, 5])
    assert logps.scores is not None and logps.reference is not None
    logps.scores[0] = torch.tensor([4.0, 4.0, 2.0, 2.0, 1.0])  # two are the best
    table = pair_table(loss, logps.pairs())
    rewards = [columns(loss).index(name) for name in columns(loss) if name.startswith("rewards/")]
    for order in list(permutations(range(5)))[::7]:
        other = ResponseLogps(
            logps.sums[:, order], logps.tokens[:, order], logps.scores[:, order],
            logps.reference[:, order],
        )  # fmt: skip
        moved = pair_table(loss, other.pairs())
        torch.testing.assert_close(moved[:, [0, *rewards]], table[:, [0, *rewards]])


@EACH
def test_what_a_row_has_beside_a_prompt_changes_nothing(
    loss: LossConfig, formula: Callable[[Sequence[Response]], Tensor]
) -> None:
    """The table of a pair in a row of up to six responses, and in a row of its own, bit by bit."""
    logps = drawn(np.random.default_rng(4), [2, 6, 2])
    whole = pair_table(loss, logps.pairs())
    for index in (0, 2):
        own = ResponseLogps(
            *(x[index : index + 1, :2] for x in vars(logps).values() if x is not None)
        )
        assert torch.equal(pair_table(loss, own.pairs())[0], whole[index])


@pytest.mark.parametrize("with_scores", [True, False])
@pytest.mark.parametrize(
    ("ranked", "today"),
    [
        *((replace(loss, compare=compare, margin_weights=weigh), loss)
          for loss in (SIMPO, HingeConfig(), DpoConfig(beta=0.3), RepoConfig(), DpoShiftConfig())
          for compare in Compare for weigh in (False, True)),
        (PlackettLuceConfig(gamma_beta_ratio=0.5), SIMPO),
        (SDpoConfig(beta=0.3), DpoConfig(beta=0.3)),
    ],
    ids=lambda x: getattr(x, "name", ""),
)  # fmt: skip
def test_two_responses_are_a_pair(ranked: LossConfig, today: LossConfig, with_scores: bool) -> None:
    """Bit by bit in float32: losses, gradients and metrics."""
    drawn_ = drawn(np.random.default_rng(5), [2] * 33)
    logps = ResponseLogps(
        drawn_.sums.float().requires_grad_(), drawn_.tokens,
        drawn_.scores if with_scores else None, drawn_.reference.float(),  # type: ignore[union-attr]
    )  # fmt: skip
    ours, theirs = (pair_losses(loss, logps.pairs()) for loss in (ranked, today))
    assert torch.equal(ours, theirs)
    grads = [torch.autograd.grad(x.sum(), logps.sums)[0] for x in (ours, theirs)]
    assert torch.equal(*grads)
    tables = [pair_table(loss, logps.pairs()) for loss in (ranked, today)]
    shared = len(columns(today))
    rewards = columns(today).index("rewards/rejected")
    if not isinstance(ranked, (PlackettLuceConfig, SDpoConfig)):
        assert torch.equal(tables[0][:, :shared], tables[1])
    else:
        assert torch.equal(tables[0][:, : rewards + 1], tables[1][:, : rewards + 1])
    if not isinstance(ranked, DpoShiftConfig):  # which shifts the reward of the rejected one
        assert torch.equal(tables[0][:, -1], tables[1][:, rewards + 1])


def test_nca_with_all_for_the_best_is_that_of_pairs() -> None:
    logps = drawn(np.random.default_rng(6), [2] * 9)
    many, two = (pair_losses(NcaConfig(alpha=alpha), logps.pairs()) for alpha in (1e-4, None))
    torch.testing.assert_close(many, two, rtol=1e-12, atol=0)
    unscored = replace(logps, scores=None)
    torch.testing.assert_close(
        pair_losses(NcaConfig(alpha=1.0), unscored.pairs()), two, rtol=1e-12, atol=0
    )
    dpo, info = (
        pair_losses(loss, unscored.pairs()) for loss in (DpoConfig(beta=0.01), InfoNcaConfig())
    )
    torch.testing.assert_close(info, dpo, rtol=1e-12, atol=0)


def test_soft_labels_of_pairs() -> None:
    """The margin of two scores; without scores it is SimPO."""
    scored = replace(ONE, sums=ONE.sums[:, :2], tokens=ONE.tokens[:, :2], reference=None)
    scored = replace(scored, scores=torch.tensor([[3.0, 1.0]]))
    for compare in (None, *Compare):
        loss = SoftLabelsConfig(tau=math.log(3), gamma_beta_ratio=0.5, compare=compare)
        expected = 0.9 * softplus(-3) + 0.1 * softplus(3)
        assert pair_losses(loss, scored.pairs()).item() == pytest.approx(expected, rel=1e-6)
        for scores in (None, torch.full((1, 2), NAN)):
            pair = replace(scored, scores=scores).pairs()
            assert pair_losses(loss, pair).item() == pytest.approx(softplus(-3), rel=1e-6)


@EACH
def test_equal_scores_alone_teach_no_order(
    loss: LossConfig, formula: Callable[[Sequence[Response]], Tensor]
) -> None:
    """Where all scores are equal nothing is compared; numbers stay finite."""
    logps = replace(drawn(np.random.default_rng(7), [3]), scores=torch.full((1, 3), 2.0))
    logps.sums.requires_grad_()
    losses = pair_losses(loss, logps.pairs())
    (gradient,) = torch.autograd.grad(losses.sum(), logps.sums)
    if loss.name not in ("infonca", "nca"):  # these fit equal shares
        assert losses.item() == 0 and not gradient.any()
    table = dict(zip(columns(loss), pair_table(loss, logps.pairs())[0].tolist(), strict=True))
    assert all(map(math.isfinite, table.values()))
    assert table["rewards/accuracies"] == 0.5 and table["rewards/rank_correlation"] == 0
    assert table["rewards/best_accuracies"] == 1


@EACH
def test_scores_of_any_size(
    loss: LossConfig, formula: Callable[[Sequence[Response]], Tensor]
) -> None:
    """Scores of which float32 holds neither the sum of the differences nor a quotient by a small
    alpha: the loss is finite, and that of the same scores in other units where it has no unit."""
    given = drawn(np.random.default_rng(9), [4])
    assert given.reference is not None
    logps = replace(
        given,
        sums=given.sums.float().requires_grad_(),
        reference=given.reference.float(),
        scores=(scores := torch.tensor([[1, -1, 0.5, -0.5]])),
    )
    if isinstance(loss, (InfoNcaConfig, NcaConfig)):
        loss = replace(loss, alpha=1e-4)
    losses = pair_losses(loss, replace(logps, scores=2.0**126 * scores).pairs())
    (gradient,) = torch.autograd.grad(losses.sum(), logps.sums)
    assert losses.isfinite().all() and gradient.isfinite().all() and gradient.any()
    if loss.name != "soft_labels":
        torch.testing.assert_close(losses, pair_losses(loss, logps.pairs()), rtol=1e-6, atol=0)


def test_a_number_that_is_not_finite_stays_with_its_prompt() -> None:
    logps = drawn(np.random.default_rng(8), [3, 4])
    logps.sums[1, 2] = NAN
    for loss, _ in FORMULAS:
        finite = pair_table(loss, logps.pairs()).isfinite()
        assert finite[0].all() and not finite[1].all(), loss.name


# Packed rows of a model.


def in_own_dtype(norm: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    """The norm in the dtype of its input; transformers' own is in float32."""
    size = hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon
    return norm.weight * hidden * size.rsqrt()


@EACH
def test_packed_rows(
    loss: LossConfig,
    formula: Callable[[Sequence[Response]], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Float64: loss and gradients of rows of 2 to 5 responses at 1e-10 from a forward of each."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", in_own_dtype)
    model = tiny_model("llama", dtype=torch.float64)
    rng = np.random.default_rng(9)
    pairs = [
        replace(pair, reference_logps=tuple(rng.uniform(-9, -1, len(pair.responses)).astype(
            np.float32).tolist()))
        for pair in ranked_pairs(rng, 7)
    ]  # fmt: skip
    assert len({len(pair.responses) for pair in pairs}) > 2
    plain = copy.deepcopy(model)
    prompts = [prompt_by_hand(plain, pair) for pair in pairs]
    expected = torch.stack([formula(prompt) for prompt in prompts]).mean()
    tokens = sum(prompt[0].tokens for prompt in prompts)
    if loss.sft_weight:
        expected = expected - loss.sft_weight * sum(prompt[0].sum for prompt in prompts) / tokens
    expected.backward()

    def pair_loss(logps: PairLogps) -> Tensor:
        return pair_losses(loss, logps) / 7 - loss.sft_weight * logps.chosen / tokens

    policy, total = Policy(model), 0.0
    for row in (pack(pairs[:3], range(3)), pack(pairs[3:4], [3]), pack(pairs[4:], range(4, 7))):
        value, _ = policy(row, pair_loss)
        value.backward()
        total += value.item()
    assert total == pytest.approx(expected.item(), rel=1e-10)
    for name, gradient in gradients(plain).items():
        other = gradients(model)[name]
        assert (other - gradient).norm() < 1e-10 * max(1.0, float(gradient.norm())), name


@pytest.mark.parametrize(
    "loss",
    [replace(SIMPO, compare=Compare.all, margin_weights=True), PlackettLuceConfig(sft_weight=0.5)],
    ids=lambda x: x.name,
)
def test_any_rows_give_the_same_update(loss: LossConfig) -> None:
    """Prompts of 2 to 5 responses, one of them without scores, in one row, in two and in seven."""
    pairs = ranked_pairs(np.random.default_rng(10), 7)
    pairs[2] = replace(pairs[2], responses=pairs[2].responses[:2], scored=(None,) * 2, scores=None)
    backend = Backend(SingleConfig(device=Device.cpu), Precision.fp32)
    found = []
    for size in (7, 4, 1):
        policy = Policy(tiny_model("llama", dtype=torch.float64))
        rows = [pack(pairs[i : i + size], range(i, min(i + size, 7))) for i in range(0, 7, size)]
        sums, norm = update(policy, SGD(policy.parameters(), lr=1.0), rows, loss, backend)
        found.append((summarise(loss, sums) | {"norm": norm}, dict(policy.named_parameters())))
    (metrics_, weights), *others = found
    assert {"rewards/rank_correlation", "rewards/best_accuracies"} <= metrics_.keys()
    for other, moved in others:
        assert other == pytest.approx(metrics_, rel=1e-6)
        for name, weight in weights.items():
            torch.testing.assert_close(moved[name], weight, rtol=1e-6, atol=1e-8)


def prompt_by_hand(model: Any, pair: TokenizedPair) -> list[Response]:
    """The responses of a pair, each by a forward of its own, with full logits."""
    model.set_attn_implementation("sdpa")  # transformers' eager softmax is in float32
    assert pair.scores is not None and pair.reference_logps is not None
    found = []
    for ids, score, reference in zip(
        pair.responses, pair.scores, pair.reference_logps, strict=True
    ):
        sequence = torch.from_numpy(np.concatenate([pair.prompt_ids, ids]).astype(np.int64))
        logps = model(input_ids=sequence[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        own = logps.gather(-1, sequence[1:, None])[-len(ids) :].sum()
        found.append(Response(own, len(ids), score, reference))
    return found


# Settings.


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (
            PlackettLuceConfig(compare=Compare.all),
            "compare: loss=plackett_luce compares all responses at once (leave it out)",
        ),
        (
            NcaConfig(alpha=1.0, compare=Compare.all),
            "compare: with alpha all responses are compared at once (leave one out)",
        ),
        (NcaConfig(alpha=0.0), "alpha: must be above 0, got 0.0"),
        (InfoNcaConfig(alpha=-1.0), "alpha: must be above 0, got -1.0"),
        (SoftLabelsConfig(tau=0.0), "tau: must be above 0, got 0.0"),
        (
            SigmoidConfig(margin_weights=True),
            "margin_weights: weighs the comparisons of a prompt (set loss.compare=all)",
        ),
        (
            NcaConfig(alpha=1.0, margin_weights=True),
            "margin_weights: weighs the comparisons of a prompt, and loss=nca has none: it "
            "compares all at once (leave it out)",
        ),
        (
            SoftLabelsConfig(compare=None),
            "compare: loss=soft_labels takes labels from the scores of the responses that it "
            "compares (set loss.compare=all)",
        ),
        (
            MixConfig(parts={"sigmoid": 1, "soft_labels": 1}),
            "compare: loss=mix takes labels from the scores of the responses that it "
            "compares (set loss.compare=all)",
        ),
        (
            MixConfig(parts={"sigmoid": 1, "soft_labels": {"weight": 1, "tau": 0}}),
            "parts.soft_labels.tau: must be above 0, got 0",
        ),
        (
            MixConfig(compare=Compare.all, parts={"sigmoid": 1, "bco": {"beta": 1}}),
            "parts.bco: must have a weight above 0, got {'beta': 1}",
        ),
        (
            MixConfig(compare=Compare.all, parts={"sigmoid": 1, "bco": {"weight": 1, "tau": 1}}),
            "parts.bco.tau: no such key of bco (beta)",
        ),
        (
            MixConfig(parts={"sigmoid": 1, "infonca": 1}),
            "parts.infonca: cannot be mixed, as it compares all responses at once "
            "(mix losses of pairs, with loss.compare)",
        ),
        (
            MixConfig(parts={"sigmoid": 1, "nca": {"weight": 1, "alpha": 0.5}}),
            "parts.nca: cannot be mixed, as it compares all responses at once "
            "(mix losses of pairs, with loss.compare)",
        ),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_wrong_settings(loss: LossConfig, text: str) -> None:
    assert list(loss.problems()) == [text]


def test_soft_labels_can_be_mixed() -> None:
    mix = MixConfig(compare=Compare.all, parts={"sigmoid": 1, "soft_labels": {"weight": 0.5}})
    assert not list(mix.problems())
    parts = [SigmoidConfig(compare=Compare.all), SoftLabelsConfig()]
    own, other = (pair_losses(loss, ONE.pairs()) for loss in parts)
    torch.testing.assert_close(pair_losses(mix, ONE.pairs()), own + 0.5 * other)

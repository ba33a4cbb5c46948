"""Losses that weigh tokens or pairs: numbers by hand, and padded sequences in float64."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from transformers import PreTrainedModel

import simpo.model.head
from simpo.backend import Backend, build_backend
from simpo.config.backends import SingleConfig
from simpo.config.choices import Precision
from simpo.config.errors import ConfigError
from simpo.data.packing import pack
from simpo.data.pairs import TokenizedPair
from simpo.data.plan import rows_of_pairs
from simpo.loop import reference
from simpo.loop.score import check_loss, pair_sums, pair_table, summarise
from simpo.loop.step import update
from simpo.loss import (
    Compare,
    LossConfig,
    PairLogps,
    ResponseLogps,
    TokenLogps,
    compared,
    pair_losses,
)
from simpo.loss.token_weighted import (
    ConfpoConfig,
    LdDpoConfig,
    MadpoConfig,
    SampoConfig,
    WpoConfig,
    draw,
)
from simpo.loss.with_ranked_responses import PlackettLuceConfig
from simpo.loss.with_reference import DpoConfig
from simpo.model.policy import Policy
from tests.support.tiny_models import (
    SEGMENTS,
    VOCAB,
    gradients,
    padded_logps,
    random_pairs,
    tiny_model,
    token_set,
)
from tests.support.whole_runs import metrics_of, run

KINDS = (WpoConfig, LdDpoConfig, SampoConfig, ConfpoConfig, MadpoConfig)

# Two pairs: sums -6 of 3 tokens and -8 of 2, then -9 of 3 and -2 of 2.
SUMS = torch.tensor([[-6.0, -8.0], [-9.0, -2.0]])
TOKENS = torch.tensor([[3, 2], [3, 2]])
# h_w - h_l is 2, then -2.
REFERENCE = torch.tensor([[-7.0, -7.0], [-8.0, -3.0]])


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log(1 + math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def logps(**more: Tensor) -> PairLogps:
    return ResponseLogps(SUMS, TOKENS, reference=REFERENCE, **more).pairs()


def test_wpo_by_hand() -> None:
    """Means of log p - log sum p^2: (-6 + 4.5) / 3 and (-8 + 7) / 2; then above 0 together."""
    squares = torch.tensor([[-4.5, -7.0], [-9.0, -3.0]])
    loss = WpoConfig(beta=0.5)
    found = loss.preference(logps(log_squares=squares))
    expected = [math.exp(-0.5 - 0.5) * softplus(-1), softplus(1)]
    assert found.losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert found.chosen.tolist() == [0.5, -0.5]
    assert loss.formula() == (
        "loss = w*(-log sigmoid(0.5*(h_w - h_l))),  w = min(1, exp(a_w + a_l)), a = mean of log p "
        "- log(sum of p^2) over the tokens, h = summed token log-ratios of a response, of the "
        "policy over the model it starts from"
    )


def test_madpo_by_hand() -> None:
    """At m = tau the coefficient is 1; at m = ln 2 beyond it c = 0.5 + 1.5 / 5 with ratio 2."""
    loss = MadpoConfig(beta=0.5, tau=math.log(4), sharpness=1.0, score_scale=2.0)
    margins = [math.log(4), math.log(8), 0.0, -math.log(2), -math.log(4)]
    # c: 1; 0.5 + 1.5 / (1 + 2 * 2); not needed; 0.5 + 1.5 / (1 + 2 / 2); not needed.
    expected = [1, sigmoid(0.8 * math.log(8)) / (8 / 9), 1, sigmoid(-1.25 * math.log(2)) * 3, 1]
    weights = loss.pair_weights(torch.tensor(margins, dtype=torch.float64))
    assert weights.tolist() == pytest.approx(expected, rel=1e-12)
    # Scores half as large: score_scale doubles them.
    scores = torch.tensor([[3.0 + math.log(8) / 2, 3.0], [-1.0, -1 + math.log(2) / 2]])
    found = loss.preference(logps(scores=scores))
    assert found.losses.tolist() == pytest.approx(
        [expected[1] * softplus(-1), expected[3] * softplus(1)], rel=1e-5
    )
    assert loss.formula().startswith("loss = w*(-log sigmoid(0.5*(h_w - h_l))),  w = sigmoid(c*m)")


@pytest.mark.parametrize("largest", [2.0, 4.0])
def test_madpo_is_the_authors(largest: float) -> None:
    """Their coefficient as their code writes it, with its other settings."""
    loss = MadpoConfig(tau=math.log(0.999 / 0.001), largest=largest, smallest=1 / largest)
    m = torch.linspace(-12, 12, 97, dtype=torch.float64)
    c = 1 / largest + (largest - 1 / largest) / (
        1 + (largest - 1) / (1 - 1 / largest) * torch.exp(1.0 * (m.abs() - loss.tau))
    )
    theirs = torch.sigmoid(c * m) / torch.sigmoid(m) * (m > -loss.tau) + 1 * (m <= -loss.tau)
    torch.testing.assert_close(loss.pair_weights(m), theirs, rtol=1e-12, atol=0)


def test_madpo_of_far_margins() -> None:
    """Both sigmoids are 0 in float32. At |m| = tau / 2 = 120 c = 2, so w = exp(-120) / 1, which is
    0; just inside -tau c = 1.0075, so w = exp(-0.0075 * 239.98)."""
    loss = MadpoConfig(tau=240.0)
    weights = loss.pair_weights(torch.tensor([-120.0, -239.98, -240.0, 300.0]))
    c = 0.5 + 1.5 / (1 + 2 * math.exp(-0.02))
    assert weights.tolist() == pytest.approx([0, math.exp((1 - c) * 239.98), 1, 1], rel=1e-3)
    assert loss.pair_weights(torch.tensor([-120.0]).double()).item() == pytest.approx(
        math.exp(-120), rel=1e-6
    )


def test_token_weights_by_hand() -> None:
    """Two pairs: of 3 and 1 tokens, and of 2 and 4."""
    logps = torch.tensor([0.5, 0.25, 0.125, 0.5, 0.1, 0.2, 0.3, 0.3, 0.3, 0.3]).log()
    tokens = TokenLogps(logps, torch.arange(3, 13), (3, 1, 2, 4), 2)
    weights = LdDpoConfig(alpha=0.25).token_weights(tokens)
    assert weights.tolist() == [1, 0.25, 0.25, 1, 1, 1, 1, 1, 0.25, 0.25]
    # The first response's mean probability is 0.29; a token alone is not below its own.
    assert ConfpoConfig().token_weights(tokens).tolist() == [0, 1, 1, 0, 1, 0, 0, 0, 0, 0]
    drawn = SampoConfig().token_weights(tokens)
    assert [part.sum().item() for part in drawn.split(tokens.lengths)] == [1, 1, 2, 2]
    assert set(drawn.tolist()) == {0, 1}


def test_confpo_where_probabilities_vanish() -> None:
    """exp(-200) is 0 in float32; -210 is still less likely than the mean."""
    tokens = TokenLogps(torch.tensor([-200.0, -210.0, -201.0]), torch.zeros(3).long(), (3,), 1)
    assert ConfpoConfig().token_weights(tokens).tolist() == [0, 1, 1]


def test_confpo_of_a_response_without_unconfident_tokens() -> None:
    """Weighted sums -6 of 3 and -8 of 2 tokens: z = 2 * (-2 + 4) - 1; then a response has none."""
    weighted = torch.tensor([[-6.0, -8.0], [-9.0, 0.0]], requires_grad=True)
    weights = torch.tensor([[3.0, 2.0], [3.0, 0.0]])
    found = ResponseLogps(SUMS, TOKENS, weighted=weighted, weights=weights).pairs()
    losses = pair_losses(ConfpoConfig(), found)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([softplus(-3), 0])
    assert weighted.grad is not None and weighted.grad[1].tolist() == [0, 0]
    assert weighted.grad[0].tolist() == pytest.approx([-2 / 3 * sigmoid(-3), sigmoid(-3)])


def hashed(number: int) -> int:
    for _ in range(2):
        number = ((number >> 16) ^ number) * 0x45D9F3B % 2**32
    return (number >> 16) ^ number


def drawn_by_hand(ids: list[int], length: int, number: int, seed: int) -> list[int]:
    """The draw of SamPO in Python's integers."""
    key = sum(hashed((hashed((x + seed) % 2**32) + i) % 2**32) for i, x in enumerate(ids))
    ranks = [hashed((hashed(i) + key) % 2**32) for i in range(length)]
    return sorted(sorted(range(length), key=ranks.__getitem__)[:number])


def test_the_draw_is_uniform_and_of_the_pair() -> None:
    """Each position is drawn equally often over pairs, and each two; the seed changes the draw."""
    rng, number, together = np.random.default_rng(0), 1000, np.zeros((8, 8))
    changed = 0
    for _ in range(number):
        one, other = (torch.from_numpy(rng.integers(0, 50_000, n)) for n in (8, 3))
        found = draw((one, other), 8, 3, 0).tolist()
        assert sorted(found) == drawn_by_hand([*one.tolist(), *other.tolist()], 8, 3, 0)
        together[np.ix_(found, found)] += 1
        changed += set(found) != set(draw((one, other), 8, 3, 1).tolist())
    for share, expected in (
        (together.diagonal(), 3 / 8),
        (together[~np.eye(8, dtype=bool)], 6 / 56),
    ):
        deviation = math.sqrt(expected * (1 - expected) / number)
        assert np.abs(share / number - expected).max() < 4.5 * deviation
    # 56 draws are equally likely.
    assert abs(changed / number - 55 / 56) < 0.02


def exact_model() -> PreTrainedModel:
    """In float64 throughout: transformers' norm would compute in float32."""
    model = tiny_model("llama", dtype=torch.float64)
    norms = [(n, m) for n, m in model.named_modules() if n.endswith("norm")]
    for name, norm in norms:
        exact = torch.nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon, dtype=torch.float64)
        model.set_submodule(name, exact)
    return model


def padded_tokens(
    model: PreTrainedModel, pairs: list[TokenizedPair]
) -> list[list[tuple[Tensor, Tensor]]]:
    """Log-prob and log(sum of p^2) of each token of both responses of each pair, the plain way:
    each response with a prompt of its own, full logits."""
    model.set_attn_implementation("sdpa")  # eager has a softmax in float32
    found = []
    for pair in pairs:
        both = []
        for response in pair.responses:
            ids = torch.from_numpy(np.concatenate([pair.prompt_ids, response]).astype(np.int64))
            p = model(input_ids=ids[None], use_cache=False).logits[0].softmax(-1)
            p, targets = p[len(pair.prompt_ids) - 1 : -1], ids[len(pair.prompt_ids) :]
            both.append((p.gather(-1, targets[:, None])[:, 0].log(), (p**2).sum(-1).log()))
        found.append(both)
    model.set_attn_implementation(SEGMENTS)
    return found


def dpo_of(chosen: Tensor, rejected: Tensor, pair: TokenizedPair, beta: float) -> Tensor:
    assert pair.reference_logps is not None
    a, b = pair.reference_logps
    return torch.log(1 + torch.exp(beta * ((rejected - b) - (chosen - a))))


def wpo(c: Tensor, r: Tensor, c2: Tensor, r2: Tensor, pair: TokenizedPair) -> Tensor:
    weight = min(1.0, math.exp((c - c2).mean().item() + (r - r2).mean().item()))
    return weight * dpo_of(c.sum(), r.sum(), pair, 0.01)


def ld_dpo(c: Tensor, r: Tensor, c2: Tensor, r2: Tensor, pair: TokenizedPair) -> Tensor:
    n = min(len(c), len(r))
    # The paper: p(all)^alpha * p(the first n)^(1 - alpha).
    chosen, rejected = (0.5 * x.sum() + 0.5 * x[:n].sum() for x in (c, r))
    return dpo_of(chosen, rejected, pair, 0.01)


def sampo(c: Tensor, r: Tensor, c2: Tensor, r2: Tensor, pair: TokenizedPair) -> Tensor:
    n, both = min(len(c), len(r)), np.concatenate(pair.responses).tolist()
    chosen, rejected = (x[drawn_by_hand(both, len(x), n, 0)].sum() for x in (c, r))
    return dpo_of(chosen, rejected, pair, 0.1)


def confpo(c: Tensor, r: Tensor, c2: Tensor, r2: Tensor, pair: TokenizedPair) -> Tensor:
    chosen, rejected = (x[x.detach().exp() < x.detach().exp().mean()] for x in (c, r))
    if not len(chosen) or not len(rejected):
        return 0 * c.sum()
    return torch.log(1 + torch.exp(2 * rejected.mean() - 2 * chosen.mean() + 1))


def madpo(c: Tensor, r: Tensor, c2: Tensor, r2: Tensor, pair: TokenizedPair) -> Tensor:
    assert pair.scores is not None
    m = pair.scores[0] - pair.scores[1]
    coefficient = 0.5 + 1.5 / (1 + 2 * math.exp(abs(m) - 2))
    weight = sigmoid(coefficient * m) / sigmoid(m) if m > -2 else 1.0
    return weight * dpo_of(c.sum(), r.sum(), pair, 0.1)


PAPERS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (wpo, ld_dpo, sampo, confpo, madpo)
}


def known_pairs(number: int = 6) -> list[TokenizedPair]:
    """Pairs with scores and reference log-probs that float32 holds."""
    rng = np.random.default_rng(3)
    return [
        replace(
            pair,
            reference_logps=tuple(rng.integers(-72, -8, 2) / 8),
            scores=tuple(rng.integers(-24, 24, 2) / 8),
        )
        for pair in random_pairs(rng, number)
    ]


@pytest.mark.parametrize("tokens_at_once", [3, 20, 1000])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_packed_rows(
    kind: type[LossConfig], tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients in float64 on packed rows, whose logits are computed in parts of a pair, a
    pair or two at once, or all at once, against padded sequences and autograd."""
    monkeypatch.setattr(simpo.model.head, "LOGITS_BYTES", 4 * VOCAB * tokens_at_once)
    loss, pairs = kind(sft_weight=0.5), known_pairs()
    model = exact_model()
    plain = copy.deepcopy(model)
    found = padded_tokens(plain, pairs)
    losses = [
        PAPERS[loss.name](c, r, c2.detach(), r2.detach(), pair)
        for ((c, c2), (r, r2)), pair in zip(found, pairs, strict=True)
    ]
    chosen = [of_chosen for (of_chosen, _), _ in found]
    nll = -sum(x.sum() for x in chosen) / sum(map(len, chosen))
    expected = sum(losses) / 6 + 0.5 * nll
    assert isinstance(expected, Tensor)
    expected.backward()

    rows = [pack(pairs[:4], range(4)), pack(pairs[4:], range(4, 6))]
    policy, total, tables = Policy(model), 0.0, []
    num_chosen = sum(row.chosen_tokens for row in rows)

    def pair_loss(logps: PairLogps) -> Tensor:
        return pair_losses(loss, logps) / 6 - loss.sft_weight * logps.chosen / num_chosen

    for row in rows:
        value, logps = policy(row, pair_loss, None, loss)
        value.backward()
        total += value.item()
        tables.append(pair_table(loss, logps))
    assert total == pytest.approx(expected.item(), rel=1e-10)
    metrics = summarise(loss, pair_sums(torch.cat(tables)))
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-10)
    # What is not the loss's is not weighted.
    assert metrics["logps/chosen"] == pytest.approx(sum(x.mean().item() for x in chosen) / 6)
    assert metrics["chosen_tokens"] == sum(map(len, chosen)) / 6
    wanted = gradients(plain)
    size = math.sqrt(sum(float(g.square().sum()) for g in wanted.values()))
    for key, gradient in gradients(model).items():
        assert (gradient - wanted[key]).norm() < 1e-10 * size, key


@pytest.fixture(scope="module")
def backend() -> Backend:
    return build_backend(SingleConfig(), Precision.fp32, 1e9)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_any_factoring_gives_the_same_update(kind: type[LossConfig], backend: Backend) -> None:
    """7 pairs in one row, in seven, and in another order, in float64."""
    pairs = known_pairs(7)
    lengths = np.array([pair.num_tokens() for pair in pairs])

    def moved(budget: int, order: list[int]) -> tuple[list[Tensor], list[float]]:
        policy = Policy(exact_model())
        packed = rows_of_pairs(order, lengths, budget)
        rows = [pack([pairs[i] for i in row], row) for row in packed]
        assert (len(rows) > 1) is (budget < 1000)
        sums, norm = update(policy, SGD(policy.parameters(), lr=0.5), rows, kind(), backend)
        return [p.detach() for p in policy.parameters()], [*sums.tolist(), norm]

    weights, numbers = moved(10_000, list(range(7)))
    for budget, order in ((1, [*range(7)]), (45, [3, 1, 6, 0, 2, 5, 4])):
        others, same = moved(budget, order)
        assert same == pytest.approx(numbers, rel=1e-10)
        for one, other in zip(others, weights, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "like", "unlike"),
    [
        (LdDpoConfig(alpha=0.25), LdDpoConfig(alpha=0.25, beta=1.0), LdDpoConfig(alpha=0.5)),
        (SampoConfig(), SampoConfig(beta=1.0), SampoConfig(draw_seed=1)),
    ],
    ids=lambda loss: loss.name,
)
def test_the_reference_weighs_the_same_tokens(
    loss: LossConfig,
    like: LossConfig,
    unlike: LossConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: Backend,
) -> None:
    """Log-ratios are 0 at the reference; what decides the weights is in the name of the cache."""
    model, pairs = tiny_model("llama"), random_pairs(np.random.default_rng(0), 5)
    policy, rows = Policy(model), [pack(pairs[2:], range(2, 5)), pack(pairs[:2], range(2))]

    def sums(loss: LossConfig) -> list[float]:
        found = reference.with_reference(
            policy, token_set(pairs), rows, "origin", tmp_path, backend, loss
        )
        known = list(found.tokens)
        row = pack(known, range(5))
        with torch.no_grad():
            logps = policy(row, simpo.model.head.no_loss, None, loss)[1]
        _, chosen, rejected, *_ = compared(loss, logps)
        assert max(chosen.abs().max(), rejected.abs().max()) < 1e-4
        return [x for pair in known for x in pair.reference_logps or ()]

    weighted, plain = sums(loss), sums(DpoConfig())
    whole = torch.stack(padded_logps(copy.deepcopy(model).double(), pairs)[0].chunk(2), dim=1)
    assert plain == pytest.approx(whole.flatten().tolist(), rel=1e-5)
    shorter = [
        len(pair.responses[side]) <= len(pair.responses[1 - side])
        for pair in pairs
        for side in (0, 1)
    ]
    assert [abs(a - b) < 1e-4 for a, b in zip(weighted, plain, strict=True)] == shorter
    assert sums(unlike) != weighted
    monkeypatch.setattr(reference, "_score", lambda *_: pytest.fail("scored again"))
    assert sums(like) == weighted


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_loss_of_this_kind_may_be_a_users(kind: type[LossConfig]) -> None:
    """The made-up pairs of the check have what such losses need."""
    check_loss(kind(module="mine"))


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (LdDpoConfig(alpha=1.5), "alpha: must be from 0 to 1, got 1.5"),
        (MadpoConfig(largest=1.0), "largest: must be above 1, got 1.0"),
        (MadpoConfig(smallest=1.0), "smallest: must be from 0 to below 1, got 1.0"),
        (MadpoConfig(tau=0.0), "tau: must be above 0, got 0.0"),
        (ConfpoConfig(beta=0.0), "beta: must be above 0, got 0.0"),
        *(
            (
                kind(compare=Compare.all),
                f"compare: loss={kind.name} weighs pairs of two responses (leave it out)",
            )
            for kind in KINDS
        ),
    ],
    ids=str,
)
def test_wrong_settings(loss: LossConfig, text: str) -> None:
    assert list(loss.problems()) == [text]


@pytest.mark.matrix
def test_processes_change_nothing(tiny_run: list[str], tmp_path: Path) -> None:
    """Of SamPO, whose draw and reference must be the same in every process."""
    words = [*tiny_run, "loss=sampo", "loss.beta=0.5", "loss.sft_weight=0.3"]
    run([*words, f"run_dir={tmp_path / 'one'}"])
    shutil.rmtree(tmp_path / "cache" / "reference")
    two = ["backend=ddp", "backend.processes=2", "train.tokens_per_row=90"]
    run([*words, *two, f"run_dir={tmp_path / 'two'}"])
    lines = zip(metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one"), strict=True)
    for ours, theirs in lines:
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key


def test_a_mean_by_weights_that_add_up_to_less_than_one() -> None:
    """Weights of any size give the same mean; without any weight it is 0."""
    sums = torch.tensor([[-3.0, -0.3], [-0.5, 0.0]])
    weights = torch.tensor([[1.5, 0.15], [0.25, 0.0]])
    counts = torch.tensor([[3, 3], [2, 2]])
    logps = ResponseLogps(-counts.float(), counts, weighted=sums, weights=weights).weighted_pairs()
    assert logps.average_chosen.tolist() == [-2, -2]
    assert logps.average_rejected.tolist() == [pytest.approx(-2), 0]


@dataclass(kw_only=True)
class WeighedList(PlackettLuceConfig):
    weighs_tokens: ClassVar[bool] = True


def test_a_list_of_weighed_tokens_is_refused() -> None:
    """Its rewards would be of all tokens alike."""
    with pytest.raises(ConfigError) as error:
        check_loss(WeighedList(module="mine"))
    assert str(error.value) == (
        "loss.module: mine:WeighedList: weighs_tokens is for pairs, and the loss ranks all "
        "responses"
    )

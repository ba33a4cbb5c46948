"""Compares the other losses with numbers by hand, with padded sequences and with TRL."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from simpo.config.losses import LOSSES
from simpo.data.packing import pack
from simpo.loop.score import pair_sums, pair_table, summarise
from simpo.loss import LogisticLoss, LossConfig, PairLogps, pair_losses
from simpo.loss.simpo import AlphaPoConfig, RepoConfig, SigmoidConfig, SimperConfig
from simpo.loss.weighted_sum import MixConfig
from simpo.loss.with_log_ratios import (
    ApoDownConfig,
    ApoZeroConfig,
    BcoConfig,
    ExoConfig,
    NcaConfig,
    RobustConfig,
    SppoConfig,
)
from simpo.loss.with_ranked_responses import (
    InfoNcaConfig,
    PlackettLuceConfig,
    SDpoConfig,
    SoftLabelsConfig,
)
from simpo.loss.with_reference import (
    DpoConfig,
    DpoShiftConfig,
    IpoConfig,
    LnDpoConfig,
    RDpoConfig,
)
from simpo.loss.without_reference import (
    CpoConfig,
    IpoFreeConfig,
    OrpoConfig,
    RrhfConfig,
    SftConfig,
    SlicConfig,
)
from simpo.model.policy import Policy
from tests.support.tiny_models import VOCAB, gradients, padded_logps, random_pairs, tiny_model

# Two pairs. Sums -6 over 3 tokens and -8 over 2: means -2 and -4.
#            Sums -9 over 3 tokens and -2 over 2: means -3 and -1.
# Over the reference: +1 and -1 in sum, then -1 and +1.
LOGPS = PairLogps(
    chosen=torch.tensor([-6.0, -9.0]),
    rejected=torch.tensor([-8.0, -2.0]),
    chosen_tokens=torch.tensor([3, 3]),
    rejected_tokens=torch.tensor([2, 2]),
    reference=torch.tensor([-7.0, -7.0, -8.0, -3.0]),
)


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log(1 + math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(mean: float) -> float:
    return math.exp(mean) / (1 - math.exp(mean))


E2, E4, E3, E1 = (math.exp(-x) for x in (2, 4, 3, 1))
WORKED: list[tuple[LossConfig, list[float], str]] = [
    (
        AlphaPoConfig(beta=2.0, gamma_beta_ratio=0.5, alpha=1.0),
        # r = 1 - 1/p: 1 - e^2 and 1 - e^4, then 1 - e^3 and 1 - e; z = 2 (r_w - r_l) - 1.
        [softplus(-2 * (1 / E4 - 1 / E2) + 1), softplus(-2 * (1 / E1 - 1 / E3) + 1)],
        "-log sigmoid(2*(r_w - r_l) - 1)",
    ),
    (
        AlphaPoConfig(beta=2.0, gamma_beta_ratio=0.5, alpha=-1.0),
        # r = p - 1.
        [softplus(-2 * (E2 - E4) + 1), softplus(-2 * (E3 - E1) + 1)],
        "-log sigmoid(2*(r_w - r_l) - 1)",
    ),
    (
        AlphaPoConfig(beta=2.0, gamma_beta_ratio=0.5, alpha=0.0),
        [softplus(-3), softplus(5)],  # SimPO
        "-log sigmoid(2*(r_w - r_l) - 1)",
    ),
    (
        OrpoConfig(odds_weight=0.5),
        [
            0.5 * softplus(-math.log(odds(-2) / odds(-4))),
            0.5 * softplus(-math.log(odds(-3) / odds(-1))),
        ],
        "-0.5*log sigmoid(log odds_w - log odds_l) + 1 * NLL per chosen token",
    ),
    (
        CpoConfig(beta=0.5, sft_weight=0.5),
        [softplus(-1.0), softplus(3.5)],  # s_w - s_l: 2 and -7
        "-log sigmoid(0.5*(s_w - s_l)) + 0.5 * NLL per chosen token",
    ),
    (
        SlicConfig(delta=2.5),
        [0.5, 9.5],
        "max(0, 2.5 - (s_w - s_l)) + 1 * NLL per chosen token",
    ),
    (RrhfConfig(), [0.0, 2.0], "max(0, l_l - l_w) + 1 * NLL per chosen token"),
    (IpoFreeConfig(tau=0.25), [0.0, 16.0], "(l_w - l_l - 2)^2"),
    (SimperConfig(), [E4 - E2, E1 - E3], "exp(l_l) - exp(l_w)"),
    (RepoConfig(margin=0.5), [0.0, 2.5], "max(0, 0.5 - (l_w - l_l))"),
    (DpoConfig(beta=0.5), [softplus(-1), softplus(1)], "-log sigmoid(0.5*(h_w - h_l))"),
    (
        LnDpoConfig(beta=6.0),
        # 6 * (1/3 + 1/2) = 5
        [softplus(-5), softplus(5)],
        "-log sigmoid(6*(h_w - h_l))",
    ),
    (
        RDpoConfig(beta=0.5, alpha=0.25),
        # A token more in both chosen: 0.25 added to the margin.
        [softplus(-1.25), softplus(0.75)],
        "-log sigmoid(0.5*(h_w - h_l) + 0.25*(n_w - n_l))",
    ),
    (IpoConfig(tau=1.5), [0.25, (5 / 6 + 1 / 3) ** 2], "(h_w - h_l - 0.333333)^2"),
    (SftConfig(), [0.0, 0.0], "1 * NLL per chosen token"),
    (
        DpoShiftConfig(beta=0.5, shift=0.5),
        # h_w - h_l / 2: 1.5 and -1.5.
        [softplus(-0.75), softplus(0.75)],
        "-log sigmoid(0.5*(h_w - 0.5*h_l))",
    ),
    # In the following r is 0.5 and -0.5, then the other way round.
    (
        ApoZeroConfig(beta=0.5),
        [1 - sigmoid(0.5) + sigmoid(-0.5), 1 - sigmoid(-0.5) + sigmoid(0.5)],
        "1 - sigmoid(r_w) + sigmoid(r_l)",
    ),
    (
        ApoDownConfig(beta=0.5),
        [sigmoid(0.5) + 1 - sigmoid(1), sigmoid(-0.5) + 1 - sigmoid(-1)],
        "sigmoid(r_w) + 1 - sigmoid(r_w - r_l)",
    ),
    (
        NcaConfig(beta=0.5),
        [1.5 * softplus(-0.5) + 0.5 * softplus(0.5), 1.5 * softplus(0.5) + 0.5 * softplus(-0.5)],
        "-log sigmoid(r_w) - 0.5*(log sigmoid(-r_w) + log sigmoid(-r_l))",
    ),
    (
        BcoConfig(beta=0.5),
        [2 * softplus(-0.5), 2 * softplus(0.5)],
        "-log sigmoid(r_w) - log sigmoid(-r_l)",
    ),
    (
        ExoConfig(beta=0.5, label_smoothing=0.25),
        [
            sigmoid(1) * math.log(sigmoid(1) / 0.75) + sigmoid(-1) * math.log(sigmoid(-1) / 0.25),
            sigmoid(-1) * math.log(sigmoid(-1) / 0.75) + sigmoid(1) * math.log(sigmoid(1) / 0.25),
        ],
        "KL(sigmoid(r_w - r_l), 0.75)",
    ),
    (
        RobustConfig(beta=0.5, label_smoothing=0.1),
        [
            (0.9 * softplus(-1) - 0.1 * softplus(1)) / 0.8,
            (0.9 * softplus(1) - 0.1 * softplus(-1)) / 0.8,
        ],
        "-1.125*log sigmoid(r_w - r_l) + 0.125*log sigmoid(r_l - r_w)",
    ),
    # Losses of several responses, here of two without scores: tests/loop/test_ranking.py.
    (
        PlackettLuceConfig(beta=2.0),
        [softplus(-4), softplus(4)],
        "-sum_i log sigmoid(r_i - log sum_j exp(r_j))",
    ),
    (
        SoftLabelsConfig(beta=2.0, compare=None),
        [softplus(-4), softplus(4)],
        "-p*log sigmoid(z) - (1 - p)*log sigmoid(-z)",
    ),
    (
        SDpoConfig(beta=0.5),
        [softplus(-1), softplus(1)],
        "-log sigmoid(-log sum_j exp(r_j - r_w))",
    ),
    (InfoNcaConfig(beta=0.5), [softplus(-1), softplus(1)], "-sum_i p_i*log softmax_i(r)"),
    (SppoConfig(beta=0.25), [2.0, 18.0], "(h_w - 2)^2 + (h_l + 2)^2"),
    (
        MixConfig(
            parts={"repo": {"weight": 2, "margin": 0.5}, "bco": {"weight": 0.5, "beta": 0.5}}
        ),
        [0.0 + softplus(-0.5), 2 * 2.5 + softplus(0.5)],
        "2*(max(0, 0.5 - (l_w - l_l))) + 0.5*(-log sigmoid(r_w) - log sigmoid(-r_l))",
    ),
]


@pytest.mark.parametrize(("loss", "expected", "text"), WORKED, ids=lambda x: getattr(x, "name", ""))
def test_by_hand(loss: LossConfig, expected: list[float], text: str) -> None:
    assert pair_losses(loss, LOGPS).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert loss.formula().startswith(f"loss = {text},  ")


@pytest.mark.parametrize(
    ("loss", "z"),
    [
        (AlphaPoConfig(beta=2.0, gamma_beta_ratio=0.5, alpha=0.0), [3, -5]),
        (CpoConfig(beta=0.5), [1, -3.5]),
        (OrpoConfig(odds_weight=1), [math.log(odds(-2) / odds(-4)), math.log(odds(-3) / odds(-1))]),
        (DpoConfig(beta=0.5), [1, -1]),
        (LnDpoConfig(beta=6.0), [5, -5]),
        (RDpoConfig(beta=0.5, alpha=0.25), [1.25, -0.75]),
        (DpoShiftConfig(beta=0.5, shift=0.5), [0.75, -0.75]),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_label_smoothing(loss: LogisticLoss, z: list[float]) -> None:
    smooth = replace(loss, label_smoothing=0.2)
    expected = [0.8 * softplus(-x) + 0.2 * softplus(x) for x in z]
    assert pair_losses(smooth, LOGPS).tolist() == pytest.approx(expected, rel=1e-5)
    assert "-0.8*log sigmoid(" in smooth.formula() and " - 0.2*log sigmoid(-(" in smooth.formula()


def test_every_loss_is_worked() -> None:
    elsewhere = {  # test_coupled.py, test_token_weighted.py
        name
        for name, kind in LOSSES.items()
        if name != "mix"
        and (kind.couples_step or kind.weighs_tokens or kind.needs_squares or kind.needs_scores)
    }
    assert {loss.name for loss, *_ in WORKED} == set(LOSSES) - {"sigmoid", "hinge"} - elsewhere


def test_rewards_are_what_is_compared() -> None:
    for loss, *_ in WORKED:
        losses, chosen, rejected = loss.preference(LOGPS)
        if loss.name not in ("sft", "ipo", "ipo_free"):
            # The pair with the smaller margin has the greater loss.
            assert (chosen - rejected).argmin() == losses.argmax(), loss.name
    assert DpoConfig(beta=0.5).preference(LOGPS).chosen.tolist() == [0.5, -0.5]
    assert SimperConfig().preference(LOGPS).rejected.tolist() == pytest.approx([E4, E1])


def of_averages(chosen: float, rejected: float) -> tuple[PairLogps, Tensor]:
    """A pair with these mean log-probs, of one token each, and the leaf they come from."""
    leaf = torch.tensor([chosen, rejected], requires_grad=True)
    ones = torch.ones(1, dtype=torch.int64)
    return PairLogps(leaf[:1], leaf[1:], ones, ones), leaf


@pytest.mark.parametrize("alpha", [0.25, -0.25, 0.0])
def test_alphapo_where_probabilities_vanish(alpha: float) -> None:
    """At l = -200 and -210, p is 0 in float32; the loss is what float64 says of logarithms."""
    logps, leaf = of_averages(-200.0, -210.0)
    loss = pair_losses(AlphaPoConfig(beta=1e-20, alpha=alpha), logps)
    loss.sum().backward()
    low, high = ((1 - math.exp(alpha * x)) / alpha if alpha else -float(x) for x in (210, 200))
    assert loss.item() == pytest.approx(softplus(1e-20 * (low - high) + 1e-21), rel=1e-5)
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_alphapo_tends_to_simpo() -> None:
    almost = pair_losses(AlphaPoConfig(beta=2.0, gamma_beta_ratio=0.5, alpha=1e-5), LOGPS)
    simpo = pair_losses(SigmoidConfig(beta=2.0, gamma_beta_ratio=0.5), LOGPS)
    assert almost.tolist() == pytest.approx(simpo.tolist(), rel=1e-3)


def test_orpo_of_a_certain_response() -> None:
    """p = 1 has infinite odds; loss and gradient stay numbers."""
    logps, leaf = of_averages(0.0, -1.0)
    loss = pair_losses(OrpoConfig(), logps)
    loss.sum().backward()
    assert 0 <= loss.item() < 1e-6
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_sft_metrics_are_those_of_the_chosen() -> None:
    metrics = summarise(SftConfig(), pair_sums(pair_table(SftConfig(), LOGPS)))
    assert metrics == {
        "loss": pytest.approx(15 / 6),
        "logps/chosen": -2.5,
        "chosen_tokens": 3.0,
    }


# As the papers write them, with probabilities where they do: sums and lengths of both responses,
# sums under the reference.
PAPERS: dict[str, Callable[..., Tensor]] = {
    "alphapo": lambda c, r, n, m, a, b: torch.log(
        1
        + torch.exp(
            2.5 * 0.1
            - 2.5 / 0.25 * (1 - torch.exp(c / n) ** -0.25)
            + 2.5 / 0.25 * (1 - torch.exp(r / m) ** -0.25)
        )
    ),
    "orpo": lambda c, r, n, m, a, b: 0.1
    * torch.log(
        1
        + (torch.exp(r / m) / (1 - torch.exp(r / m)))
        / (torch.exp(c / n) / (1 - torch.exp(c / n)))
    ),
    "cpo": lambda c, r, n, m, a, b: torch.log(1 + torch.exp(0.1 * (r - c))),
    "slic": lambda c, r, n, m, a, b: torch.maximum(torch.zeros(()), 1 - c + r),
    "rrhf": lambda c, r, n, m, a, b: torch.maximum(torch.zeros(()), r / m - c / n),
    "ipo_free": lambda c, r, n, m, a, b: (c / n - r / m - 1) ** 2,
    "simper": lambda c, r, n, m, a, b: 1 / torch.exp(-r / m) - 1 / torch.exp(-c / n),
    "repo": lambda c, r, n, m, a, b: torch.maximum(torch.zeros(()), 0.5 - c / n + r / m),
    "dpo": lambda c, r, n, m, a, b: torch.log(1 + torch.exp(0.01 * ((r - b) - (c - a)))),
    "ln_dpo": lambda c, r, n, m, a, b: torch.log(1 + torch.exp(5 * ((r - b) / m - (c - a) / n))),
    "r_dpo": lambda c, r, n, m, a, b: torch.log(
        1 + torch.exp(0.01 * (r - b) - 0.01 * (c - a) + 0.05 * (m - n))
    ),
    "ipo": lambda c, r, n, m, a, b: ((c - a) / n - (r - b) / m - 5) ** 2,
    "sft": lambda c, r, n, m, a, b: 0 * c,
    "dpo_shift": lambda c, r, n, m, a, b: torch.log(
        1 + torch.exp(0.01 * (0.75 * (r - b) - (c - a)))
    ),
    "apo_zero": lambda c, r, n, m, a, b: 1
    - 1 / (1 + torch.exp(-0.1 * (c - a)))
    + 1 / (1 + torch.exp(-0.1 * (r - b))),
    "apo_down": lambda c, r, n, m, a, b: 1
    + 1 / (1 + torch.exp(-0.1 * (c - a)))
    - 1 / (1 + torch.exp(0.1 * ((r - b) - (c - a)))),
    "nca": lambda c, r, n, m, a, b: torch.log(1 + torch.exp(-0.01 * (c - a)))
    + torch.log(1 + torch.exp(0.01 * (c - a))) / 2
    + torch.log(1 + torch.exp(0.01 * (r - b))) / 2,
    "bco": lambda c, r, n, m, a, b: torch.log(1 + torch.exp(-0.1 * (c - a)))
    + torch.log(1 + torch.exp(0.1 * (r - b))),
    "exo": lambda c, r, n, m, a, b: torch.special.xlogy(
        p := 1 / (1 + torch.exp(0.1 * ((r - b) - (c - a)))), p / 0.999
    )
    + torch.special.xlogy(1 - p, (1 - p) / 0.001),
    "robust": lambda c, r, n, m, a, b: (
        0.9 * torch.log(1 + torch.exp(0.1 * ((r - b) - (c - a))))
        - 0.1 * torch.log(1 + torch.exp(0.1 * ((c - a) - (r - b))))
    )
    / 0.8,
    "sppo": lambda c, r, n, m, a, b: (c - a - 50) ** 2 + (r - b + 50) ** 2,
}  # fmt: skip


@pytest.mark.parametrize("name", PAPERS)
def test_packed_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients on packed, prefix-shared, chunked rows against the padded float64 path."""
    monkeypatch.setattr(
        "simpo.model.head.LOGITS_BYTES", 4 * VOCAB * 20
    )  # two pairs in a chunk, or one
    loss = LOSSES[name]()
    model = tiny_model("llama")
    rng = np.random.default_rng(3)
    pairs = [
        replace(pair, reference_logps=(float(x), float(y)))
        for pair, x, y in zip(random_pairs(rng, 6), *rng.uniform(-9, -1, (2, 6)), strict=True)
    ]
    plain = copy.deepcopy(model).double()
    sums, lengths = padded_logps(plain, pairs)
    reference = torch.tensor([pair.reference_logps for pair in pairs], dtype=torch.float64)
    expected = PAPERS[name](*sums.chunk(2), *lengths.chunk(2), *reference.unbind(1)).mean()
    expected = expected - loss.sft_weight * sums[:6].sum() / lengths[:6].sum()
    expected.backward()

    rows = [pack(pairs[:4], range(4)), pack(pairs[4:], range(4, 6))]
    policy, total, tables = Policy(model), 0.0, []
    tokens = sum(row.chosen_tokens for row in rows)

    def pair_loss(logps: PairLogps) -> Tensor:
        return pair_losses(loss, logps) / 6 - loss.sft_weight * logps.chosen / tokens

    for row in rows:
        value, logps = policy(row, pair_loss)
        value.backward()
        total += value.item()
        tables.append(pair_table(loss, logps))
    assert total == pytest.approx(expected.item(), rel=1e-5)
    metrics = summarise(loss, pair_sums(torch.cat(tables)))
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    wanted = gradients(plain)
    size = math.sqrt(sum(float(g.square().sum()) for g in wanted.values()))
    for key, gradient in gradients(model).items():
        assert (gradient - wanted[key]).norm() < 1e-5 * size, key


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (CpoConfig(beta=0.3), {"loss_type": "sigmoid", "beta": 0.3}),
        (IpoFreeConfig(tau=0.3), {"loss_type": "ipo", "beta": 0.3}),
        (
            AlphaPoConfig(beta=2.5, gamma_beta_ratio=0.3, alpha=0.25),
            {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 0.75, "alpha": 0.25},
        ),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_losses_of_trl(loss: LossConfig, settings: dict[str, object]) -> None:
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    scores = (
        (LOGPS.chosen, LOGPS.rejected)
        if loss.name == "cpo"
        else (LOGPS.average_chosen, LOGPS.average_rejected)
    )
    blank = {"alpha": 0.0, "label_smoothing": 0.0, "accelerator": SimpleNamespace(device="cpu")}
    theirs, chosen, _ = trainer.cpo_loss(SimpleNamespace(**blank | settings), *scores)
    assert pair_losses(loss, LOGPS).tolist() == pytest.approx(theirs.tolist(), rel=1e-5)
    if loss.name != "ipo_free":
        assert loss.preference(LOGPS).chosen.tolist() == pytest.approx(chosen.tolist(), rel=1e-5)


def test_odds_ratio_of_trl() -> None:
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    own = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    theirs = trainer.odds_ratio_loss(own, LOGPS.average_chosen, LOGPS.average_rejected)[0]
    # TRL subtracts it from the NLL.
    assert pair_losses(OrpoConfig(odds_weight=0.3), LOGPS).tolist() == pytest.approx(
        (-theirs).tolist(), rel=1e-5
    )

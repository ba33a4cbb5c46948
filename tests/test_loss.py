"""Compares the loss with numbers worked out by hand."""

import math

import pytest
import torch

from simpo.loop.score import COLUMNS, pair_sums, pair_table, summarise
from simpo.loss import PairLogps, pair_losses
from simpo.loss.simpo import HingeConfig, SigmoidConfig

# Two pairs. Sums -6 over 3 tokens and -8 over 2: averages -2 and -4, difference 2.
#            Sums -9 over 3 tokens and -2 over 2: averages -3 and -1, difference -2.
LOGPS = PairLogps(
    chosen=torch.tensor([-6.0, -9.0]),
    rejected=torch.tensor([-8.0, -2.0]),
    chosen_tokens=torch.tensor([3, 3]),
    rejected_tokens=torch.tensor([2, 2]),
)


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def test_sigmoid() -> None:
    """beta 2, ratio 0.5, gamma 1: z = 2*2 - 1 = 3 and 2*(-2) - 1 = -5; -log sigmoid(z)."""
    losses = pair_losses(SigmoidConfig(beta=2.0, gamma_beta_ratio=0.5), LOGPS)
    assert losses.tolist() == pytest.approx([softplus(-3), softplus(5)], rel=1e-6)


def test_label_smoothing() -> None:
    """With e = 0.1: 0.9 * -log sigmoid(z) + 0.1 * -log sigmoid(-z)."""
    config = SigmoidConfig(beta=2.0, gamma_beta_ratio=0.5, label_smoothing=0.1)
    expected = [0.9 * softplus(-3) + 0.1 * softplus(3), 0.9 * softplus(5) + 0.1 * softplus(-5)]
    assert pair_losses(config, LOGPS).tolist() == pytest.approx(expected, rel=1e-6)


def test_hinge() -> None:
    """max(0, 1 - z): 0 for z = 3, and 6 for z = -5."""
    losses = pair_losses(HingeConfig(beta=2.0, gamma_beta_ratio=0.5), LOGPS)
    assert losses.tolist() == [0.0, 6.0]


def test_without_length_normalisation() -> None:
    """Sums -6, -8 and -9, -2: z = 2*2 - 1 = 3 and 2*(-7) - 1 = -15; rewards -12, -16, -18, -4."""
    loss = SigmoidConfig(beta=2.0, gamma_beta_ratio=0.5, length_normalized=False)
    expected = [softplus(-3), softplus(15)]
    assert pair_losses(loss, LOGPS).tolist() == pytest.approx(expected, rel=1e-6)
    metrics = summarise(loss, pair_sums(pair_table(loss, LOGPS)))
    assert (metrics["rewards/chosen"], metrics["rewards/rejected"]) == (-15.0, -10.0)
    assert metrics["logps/chosen"] == -2.5  # still of a token
    assert loss.formula() == (
        "loss = -log sigmoid(2*(s_w - s_l) - 1),  s = summed token log-probs of a response"
    )


def test_margin_is_not_inside_the_scaling_twice() -> None:
    """gamma = beta * ratio, so at equal averages the loss is -log sigmoid(-gamma)."""
    logps, lengths = torch.tensor([-4.0]), torch.tensor([2])
    same = PairLogps(logps, logps, lengths, lengths)
    losses = pair_losses(SigmoidConfig(beta=10.0, gamma_beta_ratio=0.3), same)
    assert losses.item() == pytest.approx(softplus(3.0), rel=1e-6)


def test_metrics() -> None:
    """Rewards are beta * average: -4, -8 and -6, -2. One of two pairs is ranked rightly."""
    loss = SigmoidConfig(beta=2.0, gamma_beta_ratio=0.5, sft_weight=0.25)
    table = pair_table(loss, LOGPS)
    assert table.shape == (2, len(COLUMNS))
    metrics = summarise(loss, pair_sums(table))
    assert metrics["rewards/chosen"] == -5.0
    assert metrics["rewards/rejected"] == -5.0
    assert metrics["rewards/margins"] == 0.0
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["logps/chosen"] == -2.5
    assert metrics["logps/rejected"] == -2.5
    # The sft term is a mean over tokens, not over pairs: (6 + 9) / 6 tokens.
    expected = (softplus(-3) + softplus(5)) / 2 + 0.25 * 15 / 6
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_tie_is_half_right() -> None:
    logps, lengths = torch.tensor([-4.0]), torch.tensor([2])
    same = PairLogps(logps, logps, lengths, lengths)
    loss = SigmoidConfig()
    sums = pair_sums(pair_table(loss, same))
    assert summarise(loss, sums)["rewards/accuracies"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (SigmoidConfig(beta=2.0, gamma_beta_ratio=0.8), "loss = -log sigmoid(2*(l_w - l_l) - 1.6)"),
        (
            HingeConfig(beta=2.5, gamma_beta_ratio=0.1, sft_weight=0.5),
            "loss = max(0, 1 - (2.5*(l_w - l_l) - 0.25)) + 0.5 * NLL per chosen token",
        ),
        (
            SigmoidConfig(beta=1.0, gamma_beta_ratio=0.5, label_smoothing=0.1),
            "loss = -0.9*log sigmoid(1*(l_w - l_l) - 0.5)"
            " - 0.1*log sigmoid(-(1*(l_w - l_l) - 0.5))",
        ),
    ],
)
def test_formula(config: SigmoidConfig, text: str) -> None:
    assert config.formula() == text + ",  l = mean token log-prob of a response"

"""Average log-probabilities in, one loss per pair out: SimPO (https://arxiv.org/abs/2405.14734).

With l_w, l_l the mean token log-probability of the chosen and the rejected response (eq. 4 there
without its beta) and gamma = beta * gamma_beta_ratio:

    z        = beta * (l_w - l_l) - gamma
    sigmoid  = -log sigmoid(z)                                    (eq. 6)
    hinge    = max(0, 1 - z)                                      (the authors' code)

Without length normalisation, the paper's ablation, l_w and l_l are sums.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from simpo.config import HingeConfig, LossConfig, SigmoidConfig
from simpo.pairs import PairLogps


def rewards(config: LossConfig, logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Rewards of the chosen and the rejected responses, beta * l, float32 [P] each."""
    if config.length_normalized:
        return config.beta * logps.average_chosen, config.beta * logps.average_rejected
    return config.beta * logps.chosen, config.beta * logps.rejected


def pair_losses(config: LossConfig, logps: PairLogps) -> Tensor:
    """Preference loss of each pair, float32 [P]; the sft term is not in it.

    Label smoothing e of the sigmoid form assumes that a share e of the pairs is labelled the wrong
    way round: -(1 - e) log sigmoid(z) - e log sigmoid(-z)
    (https://ericmitchell.ai/cdpo.pdf).
    """
    chosen, rejected = rewards(config, logps)
    z = chosen - rejected - config.beta * config.gamma_beta_ratio
    match config:
        case SigmoidConfig(label_smoothing=smoothing):
            return -(1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)
        case HingeConfig():
            return relu(1 - z)
    raise TypeError(f"no loss for {type(config).__name__}")


def formula(config: LossConfig) -> str:
    """The composed objective as one line of text, with its numbers."""
    gamma = config.beta * config.gamma_beta_ratio
    z = f"{config.beta:g}*(l_w - l_l) - {gamma:g}"
    match config:
        case SigmoidConfig(label_smoothing=smoothing) if smoothing:
            text = f"-{1 - smoothing:g}*log sigmoid({z}) - {smoothing:g}*log sigmoid(-({z}))"
        case SigmoidConfig():
            text = f"-log sigmoid({z})"
        case _:
            text = f"max(0, 1 - ({z}))"
    sft = f" + {config.sft_weight:g} * NLL per chosen token" if config.sft_weight else ""
    kind = "mean token log-prob" if config.length_normalized else "summed token log-probs"
    return f"loss = {text}{sft},  l = {kind} of a response"

"""Log-probabilities in, a loss for each pair out: SimPO and the objectives it is measured against.

Throughout, of the chosen (w) and the rejected (l) response:

    s  summed token log-probabilities         n  tokens
    l  their mean, s / n                      h  s - that of the model before the first step

The term `loss.sft_weight` * NLL of the chosen is added by `simpo.loop.step`, to any of them.
"""

from __future__ import annotations

from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from simpo.config.losses import (
    AlphaPoConfig,
    CpoConfig,
    DpoConfig,
    HingeConfig,
    IpoConfig,
    IpoFreeConfig,
    LnDpoConfig,
    LossConfig,
    OrpoConfig,
    RDpoConfig,
    RepoConfig,
    RrhfConfig,
    SftConfig,
    SigmoidConfig,
    SimperConfig,
    SimpoConfig,
    SlicConfig,
)
from simpo.data.pairs import PairLogps


class Preference(NamedTuple):
    """What an objective makes of pairs, float32 [P] each.

    `chosen` and `rejected` are the rewards that it compares, `losses` what it makes of their
    difference.
    """

    losses: Tensor
    chosen: Tensor
    rejected: Tensor


def pair_losses(config: LossConfig, logps: PairLogps) -> Tensor:
    """Preference loss of each pair, float32 [P]; the sft term is not in it."""
    return preference(config, logps).losses


@singledispatch
def preference(config: LossConfig, logps: PairLogps) -> Preference:
    """Loss and rewards of each pair under any of the objectives below."""
    raise TypeError(f"no loss for {type(config).__name__}")


@preference.register
def simpo(config: SigmoidConfig, logps: PairLogps) -> Preference:
    """SimPO (https://arxiv.org/abs/2405.14734, eq. 4 and 6): -log sigmoid(z),
    z = beta * (l_w - l_l) - gamma, gamma = beta * gamma_beta_ratio.

    Label smoothing e assumes that a share e of the pairs is labelled the wrong way round:
    -(1 - e) log sigmoid(z) - e log sigmoid(-z) (https://ericmitchell.ai/cdpo.pdf).
    """
    chosen, rejected, z = _simpo_margin(config, logps)
    wrong = config.label_smoothing
    losses = -(1 - wrong) * logsigmoid(z) - wrong * logsigmoid(-z)
    return Preference(losses, chosen, rejected)


@preference.register
def simpo_hinge(config: HingeConfig, logps: PairLogps) -> Preference:
    """max(0, 1 - z) with SimPO's z (https://github.com/princeton-nlp/SimPO)."""
    chosen, rejected, z = _simpo_margin(config, logps)
    return Preference(relu(1 - z), chosen, rejected)


@preference.register
def alphapo(config: AlphaPoConfig, logps: PairLogps) -> Preference:
    """AlphaPO (https://arxiv.org/abs/2501.03884): -log sigmoid(r_w - r_l - gamma) with
    r = beta * (1 - p^-alpha) / alpha, p = exp(l); for alpha = 0 its limit, SimPO.

    In logarithms throughout: p itself is 0 in float32 from l = -104 on.
    """

    def reward(average: Tensor) -> Tensor:
        bent = -torch.expm1(-config.alpha * average) / config.alpha if config.alpha else average
        return config.beta * bent

    chosen, rejected = reward(logps.average_chosen), reward(logps.average_rejected)
    gamma = config.beta * config.gamma_beta_ratio
    return Preference(-logsigmoid(chosen - rejected - gamma), chosen, rejected)


@preference.register
def orpo(config: OrpoConfig, logps: PairLogps) -> Preference:
    """ORPO (https://arxiv.org/abs/2403.07691, eq. 6 and 7): lambda times -log sigmoid of the log
    odds ratio, log odds = log(p / (1 - p)), p = exp(l). The paper adds the NLL of the chosen.
    """

    def log_odds(average: Tensor) -> Tensor:
        # A response that is certain has no odds; the gradient would be 0 * infinity.
        certain = -torch.finfo(average.dtype).eps
        average = average.clamp(max=certain)
        return average - torch.log(-torch.expm1(average))

    chosen, rejected = log_odds(logps.average_chosen), log_odds(logps.average_rejected)
    return Preference(-config.odds_weight * logsigmoid(chosen - rejected), chosen, rejected)


@preference.register
def cpo(config: CpoConfig, logps: PairLogps) -> Preference:
    """CPO (https://arxiv.org/abs/2401.08417): -log sigmoid(beta * (s_w - s_l)). The
    paper adds the NLL of the chosen.
    """
    chosen, rejected = config.beta * logps.chosen, config.beta * logps.rejected
    return Preference(-logsigmoid(chosen - rejected), chosen, rejected)


@preference.register
def slic(config: SlicConfig, logps: PairLogps) -> Preference:
    """SLiC-HF (https://arxiv.org/abs/2305.10425, eq. 1): max(0, delta - (s_w - s_l)). The paper
    adds lambda times the NLL of a target, here the chosen.
    """
    return Preference(
        relu(config.delta - logps.chosen + logps.rejected), logps.chosen, logps.rejected
    )


@preference.register
def rrhf(config: RrhfConfig, logps: PairLogps) -> Preference:
    """RRHF (https://arxiv.org/abs/2304.05302, eq. 2 and 3, two responses): max(0, l_l - l_w). The
    paper adds the NLL of the chosen.
    """
    chosen, rejected = logps.average_chosen, logps.average_rejected
    return Preference(relu(rejected - chosen), chosen, rejected)


@preference.register
def ipo_free(config: IpoFreeConfig, logps: PairLogps) -> Preference:
    """IPO without its reference (https://arxiv.org/abs/2310.12036, eq. 17):
    (l_w - l_l - 1 / (2 tau))^2.
    """
    chosen, rejected = logps.average_chosen, logps.average_rejected
    return Preference((chosen - rejected - 1 / (2 * config.tau)).square(), chosen, rejected)


@preference.register
def simper(config: SimperConfig, logps: PairLogps) -> Preference:
    """SimPER (https://arxiv.org/abs/2502.00883): exp(l_l) - exp(l_w), the inverse
    perplexities of the responses.
    """
    chosen, rejected = logps.average_chosen.exp(), logps.average_rejected.exp()
    return Preference(rejected - chosen, chosen, rejected)


@preference.register
def repo(config: RepoConfig, logps: PairLogps) -> Preference:
    """RePO (https://arxiv.org/abs/2503.07426): max(0, gamma - (l_w - l_l)), the limit of
    SimPO for a large beta.
    """
    chosen, rejected = logps.average_chosen, logps.average_rejected
    return Preference(relu(config.margin - (chosen - rejected)), chosen, rejected)


@preference.register
def dpo(config: DpoConfig, logps: PairLogps) -> Preference:
    """DPO (https://arxiv.org/abs/2305.18290, eq. 7): -log sigmoid(beta * (h_w - h_l))."""
    chosen, rejected = (config.beta * ratio for ratio in logps.log_ratios())
    return Preference(-logsigmoid(chosen - rejected), chosen, rejected)


@preference.register
def ln_dpo(config: LnDpoConfig, logps: PairLogps) -> Preference:
    """DPO on means (https://arxiv.org/abs/2411.15124, Tulu 3; `sigmoid_norm` of TRL):
    -log sigmoid(beta * (h_w / n_w - h_l / n_l)).
    """
    chosen, rejected = (config.beta * ratio for ratio in logps.average_log_ratios())
    return Preference(-logsigmoid(chosen - rejected), chosen, rejected)


@preference.register
def r_dpo(config: RDpoConfig, logps: PairLogps) -> Preference:
    """R-DPO (https://arxiv.org/abs/2403.19159; written as in Table 3 of the SimPO paper):
    -log sigmoid(beta * (h_w - h_l) + alpha * (n_w - n_l)). A chosen response that is longer has
    that much of its margin for nothing, and is pushed less.
    """
    chosen, rejected = logps.log_ratios()
    chosen = config.beta * chosen + config.alpha * logps.chosen_tokens
    rejected = config.beta * rejected + config.alpha * logps.rejected_tokens
    return Preference(-logsigmoid(chosen - rejected), chosen, rejected)


@preference.register
def ipo(config: IpoConfig, logps: PairLogps) -> Preference:
    """IPO (https://arxiv.org/abs/2310.12036, eq. 17): (h_w / n_w - h_l / n_l - 1 / (2 tau))^2.

    On means, as its authors ran it (so TRL, which asked them).
    """
    chosen, rejected = logps.average_log_ratios()
    return Preference((chosen - rejected - 1 / (2 * config.tau)).square(), chosen, rejected)


@preference.register
def sft(config: SftConfig, logps: PairLogps) -> Preference:
    """Nothing but the sft term, which is not in it; rewards are the mean log-probabilities."""
    chosen, rejected = logps.average_chosen, logps.average_rejected
    return Preference(torch.zeros_like(logps.chosen), chosen, rejected)


def _simpo_margin(config: SimpoConfig, logps: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards of both responses, and their difference less gamma."""
    if config.length_normalized:
        chosen, rejected = config.beta * logps.average_chosen, config.beta * logps.average_rejected
    else:
        chosen, rejected = config.beta * logps.chosen, config.beta * logps.rejected
    return chosen, rejected, chosen - rejected - config.beta * config.gamma_beta_ratio

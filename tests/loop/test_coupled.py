"""Losses that couple the pairs of a step: numbers by hand, a padded float64 step, and TRL."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from transformers.models.llama import modeling_llama

from simpo.backend import Backend
from simpo.config.backends import SingleConfig
from simpo.config.choices import Device, Precision
from simpo.data.mismatched import with_mismatched
from simpo.data.packing import pack
from simpo.data.pairs import PackedPairs, Pair, TokenizedPair
from simpo.data.plan import rows_of_pairs
from simpo.loop.evaluate import metrics_of_sets
from simpo.loop.score import check_loss, evaluate, pair_sums, pair_table, summarise
from simpo.loop.step import NonFiniteError, update
from simpo.loss import Compare, LossConfig, PairLogps, ResponseLogps
from simpo.loss.simpo import SigmoidConfig
from simpo.loss.weighted_sum import MixConfig
from simpo.loss.with_coupled_steps import (
    AmapoConfig,
    AotConfig,
    BetaDpoConfig,
    GammaPoConfig,
    KtoConfig,
    nearest_the_mean,
    shared_margins,
)
from simpo.loss.with_ranked_responses import PlackettLuceConfig
from simpo.model.policy import Policy
from tests.support.tiny_models import SEGMENTS, gradients, random_pairs, tiny_model, token_set

F64 = torch.float64


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def logps_of(
    chosen: Sequence[float],
    rejected: Sequence[float],
    tokens: Sequence[tuple[int, ...]] | None = None,
    reference: Sequence[Sequence[float]] | None = None,
    mismatched: Sequence[float] | None = None,
) -> PairLogps:
    """Pairs with these sums, of one token each unless `tokens` says otherwise."""
    columns = [chosen, rejected, *([mismatched] if mismatched else [])]
    sums = torch.tensor(columns, dtype=F64).T
    lengths = torch.ones_like(sums).long() if tokens is None else torch.tensor(tokens)
    known = None if reference is None else torch.tensor(reference, dtype=F64)
    return ResponseLogps(sums, lengths, reference=known).pairs()


# By hand. The reference has both responses of a pair at these sums.
WORKED: dict[str, tuple[LossConfig, PairLogps, list[float], str]] = {
    # d is 2, -7 and 1, of rank 2, 0 and 1; that of the reference 0, 5 and -1, so t is 5, -1 and 0.
    "aot": (
        AotConfig(beta=0.5),
        logps_of([-6, -9, -3], [-8, -2, -4], None, [[-7.0, -7.0], [-3.0, -8.0], [-5.0, -4.0]]),
        [softplus(1.5), softplus(3), softplus(-0.5)],
        "-log sigmoid(0.5*(d - t))",
    ),
    # d is 1, 2, 3 and 6 of two tokens each: the mean is 3, the deviation sqrt((4 + 1 + 9) / 3).
    "amapo": (
        AmapoConfig(beta=0.5),
        logps_of([-4, -2, -8, -2], [-6, -6, -14, -14], [(2, 2)] * 4),
        [
            softplus(-0.5 * (1 - math.exp(2 / math.sqrt(14 / 3) * 3))),
            softplus(-0.5 * (2 - math.exp(1 / math.sqrt(14 / 3) * 3))),
            softplus(-1.5),
            softplus(-3),
        ],
        "-log sigmoid(0.5*(d - m))",
    ),
    # Margins 3 and 1 are shares 1.5 and 0.5 of the mean 2. There both slopes are equal:
    # tau * log(1.5 / 0.5) = 2 * (sigmoid(1 - 1) - sigmoid(3 - (3 + log 3))) = 2 * (1/2 - 1/4).
    "gamma_po": (
        GammaPoConfig(beta=0.5, gamma_beta_ratio=4, tau=0.5 / math.log(3)),
        logps_of([-1, -1], [-7 - 2 * math.log(3), -3]),
        [softplus(-math.log(3)), softplus(0)],
        "-log sigmoid(0.5*(l_w - l_l) - g)",
    ),
    # h_w - h_l is 1, 2, 3, 4 and 20, the mean 6; the last is dropped, and the mean left is 2.5.
    "beta_dpo": (
        BetaDpoConfig(beta=0.5, alpha=0.2, drop=0.2),
        logps_of([-1, -2, -3, -4, -5], [-2, -4, -6, -8, -25], None, [[-9.0, -9.0]] * 5),
        [*(1.25 * softplus(-0.5 * (1 - 0.2 * 3.5) * h) for h in (1, 2, 3, 4)), 0.0],
        "-log sigmoid(b*(h_w - h_l))",
    ),
    # h_w is 1 and -1, h_l -1 and 1; the mismatched ones are 3 and -1, so z is 1.
    "kto": (
        KtoConfig(beta=0.5, desirable_weight=3, undesirable_weight=2),
        logps_of([-6, -9], [-8, -2], None, [[-7, -7, -8], [-8, -3, -4]], mismatched=[-5, -5]),
        [(3 * 0.5 + 2 * sigmoid(-1)) / 2, (3 * sigmoid(1) + 2 * 0.5) / 2],
        "mean of 3*(1 - sigmoid(0.5*(h_w - z))) and 2*(1 - sigmoid(0.5*(z - h_l)))",
    ),
}


@pytest.mark.parametrize("name", WORKED)
def test_by_hand(name: str) -> None:
    loss, logps, expected, text = WORKED[name]
    assert loss.name == name and loss.couples_step
    assert loss.compared(logps).losses.tolist() == pytest.approx(expected, rel=1e-9)
    assert loss.formula().startswith(f"loss = {text},  ")


def test_rewards_by_hand() -> None:
    """They are those of the losses without a coupling."""
    for name, rewards in {"aot": [0.5, -3], "amapo": [-1, -0.5], "kto": [0.5, -0.5]}.items():
        loss, logps, *_ = WORKED[name]
        assert loss.compared(logps).chosen[:2, 0].tolist() == rewards


@pytest.mark.parametrize("loss", [AotConfig(beta=0.5), AmapoConfig(beta=0.5)])
def test_label_smoothing(loss: Any) -> None:
    _, logps, expected, _ = WORKED[loss.name]
    smooth = replace(loss, label_smoothing=0.2)
    # -log sigmoid(-z) = -log sigmoid(z) + z.
    z = [-math.log(math.expm1(value)) for value in expected]
    wanted = [0.8 * softplus(-x) + 0.2 * softplus(x) for x in z]
    assert smooth.compared(logps).losses.tolist() == pytest.approx(wanted, rel=1e-9)


def test_no_pair_of_equal_ones_is_below_the_mean() -> None:
    """AMaPO has no margin without a deviation, also where the mean is rounded; nor for one pair."""
    for count in (1, 3, 7):
        logps = logps_of([-0.3] * count, [-0.4] * count)
        losses = AmapoConfig(beta=2).compared(logps).losses
        assert losses.tolist() == pytest.approx([softplus(-0.2)] * count)


@pytest.mark.parametrize(("gamma", "tau"), [(4, 10), (0.375, 10), (3, 3), (5, 20), (4, 1)])
def test_margins_are_least_in_their_objective(gamma: float, tau: float) -> None:
    """With the authors' settings: no small change of two margins that keeps the mean is better."""
    rng = np.random.default_rng(0)
    differences = torch.tensor(rng.normal(gamma, 3, 50))
    margins = shared_margins(differences, gamma, tau)
    assert margins.mean().item() == pytest.approx(gamma)

    def objective(margins: Tensor) -> float:
        shares = margins / margins.sum()
        right = torch.log(1 + torch.exp(margins - differences)).mean()
        return float(right + tau * (shares * torch.log(len(shares) * shares)).sum())

    least = objective(margins)
    for _ in range(100):
        one, other = rng.choice(50, 2, replace=False)
        moved = margins.clone()
        moved[one] += 1e-3
        moved[other] -= 1e-3
        assert objective(moved) > least


def test_ranked_responses_are_not_compared() -> None:
    """KTO's third response is no other reply to the prompt."""
    said = "compare: loss=kto couples the pairs of a step (leave it out)"
    assert list(KtoConfig(compare=Compare.all).problems()) == [said]


def test_beta_is_never_below_the_authors_least() -> None:
    _, logps, _, _ = WORKED["beta_dpo"]
    losses = BetaDpoConfig(beta=0.5, alpha=0.6, drop=0.2).compared(logps).losses
    wanted = [1.25 * softplus(-0.001 * h) for h in (1, 2, 3, 4)]
    assert losses.tolist() == pytest.approx([*wanted, 0])
    whole = BetaDpoConfig(beta=0.5, drop=0).compared(logps).losses
    assert whole.tolist() == pytest.approx([softplus(-0.5 * h) for h in (1, 2, 3, 4, 20)])
    assert list(BetaDpoConfig(drop=1).problems()) == ["drop: must be below 1, got 1"]
    assert list(BetaDpoConfig(drop=-0.1).problems()) == ["drop: must be 0 or more, got -0.1"]


def test_kto_of_responses_without_a_partner() -> None:
    """A pair, a desirable and an undesirable response: the mean over the four; z is at least 0."""
    tokens = [(1, 1, 1), (1, 0, 1), (0, 1, 0)]
    reference = [[-7.0, -7.0, -4.0], [-8.0, 0.0, -4.0], [0.0, -3.0, 0.0]]
    logps = logps_of([-6, -9, 0], [-8, 0, -2], tokens, reference, [-5, -5, 0])
    losses = KtoConfig(beta=0.5).compared(logps).losses
    # z is max(0, -1): h_w is 1 and -1, h_l -1 and 1.
    each = [sigmoid(-0.5) + sigmoid(-0.5), sigmoid(0.5), sigmoid(0.5)]
    assert losses.tolist() == pytest.approx([3 / 4 * loss for loss in each])
    assert losses.mean().item() == pytest.approx(sum(each) / 4)
    table = pair_table(KtoConfig(beta=0.5), logps)
    assert summarise(KtoConfig(), pair_sums(table)) == {
        "loss": pytest.approx(sum(each) / 4),
        "rewards/chosen": 0.0,  # 0.5 and -0.5
        "rewards/rejected": 0.0,  # -0.5 and 0.5
        "rewards/accuracies": 1.0,  # of the pair alone
        "rewards/margins": 1.0,
        "logps/chosen": -7.5,
        "logps/rejected": -5.0,
        "chosen_tokens": 1.0,
        "rejected_tokens": 1.0,
    }
    alone = summarise(KtoConfig(), pair_sums(table[1:2]))
    assert alone.keys() == {"loss", "rewards/chosen", "logps/chosen", "chosen_tokens"}
    # Of a held-out set it is the mean over the set's own responses, with the z of all.
    turn = ({"role": "user", "content": "Hi"},)
    sets = [Pair(turn, (), None, "", held_out_set=name) for name in ("pairs", "single", "single")]
    found = metrics_of_sets(KtoConfig(), sets, dict(enumerate(table.tolist())))
    assert found["pairs/loss"] == pytest.approx(each[0] / 2)
    assert found["single/loss"] == pytest.approx((each[1] + each[2]) / 2)
    assert found["mean/loss"] == pytest.approx(sum(each) / 4)


@dataclass(kw_only=True)
class Weighing(BetaDpoConfig):
    weighs_tokens: ClassVar[bool] = True
    name: str = "weighing"


@dataclass(kw_only=True)
class Squares(BetaDpoConfig):
    needs_squares: ClassVar[bool] = True
    name: str = "squares"


@dataclass(kw_only=True)
class WeighingList(PlackettLuceConfig):
    weighs_tokens: ClassVar[bool] = True
    name: str = "weighing_list"


@dataclass(kw_only=True)
class MismatchedList(PlackettLuceConfig):
    needs_mismatched: ClassVar[bool] = True
    name: str = "mismatched_list"


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (Weighing(), "couples the pairs of a step, so it cannot weigh tokens"),
        (Squares(), "couples the pairs of a step, so it cannot weigh tokens"),
        (WeighingList(), "compares all responses, so it cannot weigh tokens"),
        (
            MismatchedList(),
            "compares all responses, so it cannot need a response to another prompt",
        ),
    ],
)
def test_what_a_users_loss_cannot_have_together(loss: LossConfig, text: str) -> None:
    """The weights would not count, and the response to another prompt would be ranked."""
    assert list(loss.problems()) == [f"name: loss={loss.name} {text}"]


@pytest.mark.parametrize("kind", [AotConfig, AmapoConfig, GammaPoConfig, BetaDpoConfig, KtoConfig])
def test_a_loss_of_this_kind_may_be_a_users(kind: type[LossConfig]) -> None:
    """The made-up pairs of the check have what such losses need."""
    check_loss(kind(module="mine"))


def test_the_number_of_pairs_that_are_left() -> None:
    """A tenth of 20 is 2 and not the 1 of 20 * (1 - 0.9) in floating-point numbers."""
    for percent in range(100):
        for number in (1, 3, 10, 20, 64, 100, 128):
            left = len(nearest_the_mean(torch.arange(number, dtype=F64), percent / 100))
            assert left == max(1, number * (100 - percent) // 100), (percent, number)


# Whole steps, against separate forwards in float64 with the formulas as the authors write them.


def separate_sums(model: Any, pairs: Sequence[TokenizedPair]) -> tuple[Tensor, Tensor]:
    """Summed log-probs and lengths of the responses, [pairs, K], each from a forward of its own."""
    model.set_attn_implementation("sdpa")
    sums, lengths = [], []
    for pair in pairs:
        for response in pair.responses:
            ids = torch.from_numpy(np.concatenate([pair.prompt_ids, response]).astype(np.int64))
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            logps = logits[:-1].log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
            sums.append(logps[len(pair.prompt_ids) - 1 :][: len(response)].sum())
            lengths.append(len(response))
    model.set_attn_implementation(SEGMENTS)
    count = len(pairs)
    return torch.stack(sums).view(count, -1), torch.tensor(lengths).view(count, -1)


def aot(s: Tensor, n: Tensor, reference: Tensor) -> Tensor:
    policy, known = (x[:, 0] - x[:, 1] for x in (s, reference))
    return -torch.log(torch.sigmoid(0.1 * (policy.sort()[0] - known.sort()[0]))).mean()


def amapo(s: Tensor, n: Tensor, reference: Tensor) -> Tensor:
    d = s[:, 0] / n[:, 0] - s[:, 1] / n[:, 1]
    mean, deviation = d.mean().detach(), d.std().detach()
    margin = torch.where(d < mean, torch.exp((mean - d.detach()) / deviation * mean), 0)
    return -torch.log(torch.sigmoid(2 * (d - margin))).mean()


def gamma_po(s: Tensor, n: Tensor, reference: Tensor) -> Tensor:
    """The authors' descent on the shares p of all margins, which sum to 1, in more rounds."""
    d = 10 * (s[:, 0] / n[:, 0] - s[:, 1] / n[:, 1])
    count, gaps = len(d), d.detach()
    p = torch.full_like(gaps, 1 / count)
    for _ in range(2000):
        margin = 4 * count * p
        slope = 10 * (1 + torch.log(count * p)) + 4 / (1 + torch.exp(gaps - margin))
        p = p * torch.exp(-0.05 * slope)
        p = p / p.sum()
    return -torch.log(torch.sigmoid(d - 4 * count * p)).mean()


def beta_dpo(s: Tensor, n: Tensor, reference: Tensor) -> Tensor:
    h = s - reference
    gaps = (h[:, 0] - h[:, 1]).tolist()
    mean = sum(gaps) / len(gaps)
    farthest = sorted(range(len(gaps)), key=lambda i: -abs(gaps[i] - mean))
    left = farthest[len(gaps) - int(0.8 * len(gaps)) :]
    beta = max(0.1 * (1 + 0.6 * (sum(gaps[i] for i in left) / len(left) - mean)), 0.001)
    losses = [-torch.log(torch.sigmoid(beta * (h[i, 0] - h[i, 1]))) for i in left]
    return torch.stack(losses).sum() / len(losses)


def kto(s: Tensor, n: Tensor, reference: Tensor) -> Tensor:
    h = s - reference
    z = h[:, 2].mean().item()
    assert z > 1, "it is not 0 instead"
    desirable = [1 - torch.sigmoid(0.1 * (x - z)) for x in h[:, 0]]
    undesirable = [1 - torch.sigmoid(0.1 * (z - x)) for x in h[:, 1]]
    return torch.stack([*desirable, *undesirable]).mean()


AUTHORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "aot": aot,
    "amapo": amapo,
    "gamma_po": gamma_po,
    "beta_dpo": beta_dpo,
    "kto": kto,
}
LOSSES: list[LossConfig] = [
    AotConfig(), AmapoConfig(), GammaPoConfig(), BetaDpoConfig(), KtoConfig(),
]  # fmt: skip
each = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)


def step_of(loss: LossConfig, count: int, seed: int = 3) -> list[TokenizedPair]:
    """Random pairs with what the loss needs; log-probs of the reference that float32 can hold."""
    rng = np.random.default_rng(seed)
    data = token_set(random_pairs(rng, count))
    if isinstance(loss, KtoConfig):
        data = with_mismatched(data, 18)
    pairs = list(data.tokens)
    if not loss.needs_reference:
        return pairs
    known = np.round(rng.uniform(-90, -20, (count, len(pairs[0].responses))) * 4) / 4
    return [
        replace(pair, reference_logps=tuple(line.tolist()))
        for pair, line in zip(pairs, known, strict=True)
    ]


def rows_of(pairs: Sequence[TokenizedPair], tokens_per_row: int) -> list[PackedPairs]:
    lengths = np.array([pair.num_tokens() for pair in pairs])
    rows = rows_of_pairs(range(len(pairs)), lengths, tokens_per_row)
    return [pack([pairs[i] for i in row], row) for row in rows]


@pytest.fixture
def backend() -> Backend:
    return Backend(SingleConfig(device=Device.cpu), Precision.fp32)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms in the dtype of their input; transformers computes them in float32."""

    def norm(self: Any, hidden: Tensor) -> Tensor:
        size = hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon
        return self.weight * hidden * torch.rsqrt(size)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)


class Recorder(SGD):
    """Keeps the gradients of a step, and the weights as they are."""

    def step(self) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        self.gradients = [None if p.grad is None else p.grad.clone() for p in parameters]


def step(
    policy: Policy, rows: list[PackedPairs], loss: LossConfig, backend: Backend, aux: float = 0.0
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients of one update by name of the weight, and its metrics."""
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    recorder = Recorder(trained.values(), lr=1.0)
    sums, _ = update(policy, recorder, rows, loss, backend, aux)
    found = zip(trained, recorder.gradients, strict=True)
    return {n: g for n, g in found if g is not None}, summarise(loss, sums, aux)


@each
@pytest.mark.parametrize("tokens_per_row", [40, 10_000])
def test_a_step(loss: LossConfig, tokens_per_row: int, exact: None, backend: Backend) -> None:
    """Loss and gradients of 11 pairs in one row, and in many, to 1e-10."""
    loss = replace(loss, sft_weight=0.3)
    model = tiny_model("llama", dtype=torch.float64)
    pairs = step_of(loss, 11)
    plain = copy.deepcopy(model)
    sums, lengths = separate_sums(plain, pairs)
    reference = torch.tensor([pair.reference_logps or (0.0, 0.0) for pair in pairs], dtype=F64)
    expected = AUTHORS[loss.name](sums, lengths, reference)
    expected = expected - 0.3 * sums[:, 0].sum() / lengths[:, 0].sum()
    expected.backward()  # type: ignore[no-untyped-call]
    rows = rows_of(pairs, tokens_per_row)
    assert (len(rows) > 5) is (tokens_per_row == 40)
    moved, metrics = step(Policy(model), rows, loss, backend)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-10)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(moved[f"model.{name}"], gradient, rtol=1e-10, atol=1e-12)


@each
def test_evaluation_is_over_all_pairs(loss: LossConfig, exact: None, backend: Backend) -> None:
    """The same number whatever the rows, and the authors' over all of them."""
    model = tiny_model("llama", dtype=torch.float64)
    pairs = step_of(loss, 9)
    with torch.no_grad():
        sums, lengths = separate_sums(copy.deepcopy(model), pairs)
    reference = torch.tensor([pair.reference_logps or (0.0, 0.0) for pair in pairs], dtype=F64)
    expected = AUTHORS[loss.name](sums, lengths, reference).item()
    for tokens_per_row in (1, 60, 1000):
        metrics, _ = evaluate(Policy(model), rows_of(pairs, tokens_per_row), loss, backend)
        assert metrics["loss"] == pytest.approx(expected, rel=1e-10)


def test_both_forwards_draw_the_same_dropout(backend: Backend) -> None:
    """A step of one row, against one forward whose loss sees all pairs, from the same seed."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear")
    model: Any = get_peft_model(tiny_model("llama", dtype=torch.float64), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    policy, loss = Policy(model), AmapoConfig()
    (row,) = rows_of(step_of(loss, 6), 10_000)
    torch.manual_seed(7)
    moved, _ = step(policy, [row], loss, backend)
    policy.zero_grad()
    torch.manual_seed(7)
    policy.train()
    value, _ = policy(row, lambda logps: loss.compared(logps).losses / 6)
    value.backward()
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(moved[name], gradient, rtol=1e-8, atol=1e-11)


def test_the_auxiliary_loss_of_a_router_counts(backend: Backend) -> None:
    """Its gradient is added: that of a step with its weight less that of one without."""
    model = tiny_model("mixtral")
    rows = rows_of(step_of(AmapoConfig(), 5), 40)
    added = []
    for loss in (AmapoConfig(), SigmoidConfig()):
        policy = Policy(copy.deepcopy(model))
        with_it, metrics = step(policy, rows, loss, backend, 0.5)
        without, _ = step(policy, rows, loss, backend)
        assert metrics["aux_loss"] > 0
        added.append({name: g - without[name] for name, g in with_it.items()})
    assert max(g.abs().max() for g in added[0].values()) > 1e-3
    for name, gradient in added[0].items():
        torch.testing.assert_close(gradient, added[1][name], rtol=1e-4, atol=1e-6)


def test_the_pair_that_spoils_a_step_is_named(backend: Backend) -> None:
    """Its log-probs make the loss of all pairs of the step NaN."""
    pairs = step_of(AmapoConfig(), 6)
    others = np.concatenate([ids for p in pairs[1:] for ids in (p.prompt_ids, *p.responses)])
    token = next(int(token) for token in pairs[0].prompt_ids if token not in others)
    policy = Policy(tiny_model("llama"))
    with torch.no_grad():
        policy.model.model.embed_tokens.weight[token] = math.nan
    for tokens_per_row in (30, 1000):
        with pytest.raises(NonFiniteError, match="the loss is not finite") as error:
            step(policy, rows_of(pairs, tokens_per_row), AmapoConfig(), backend)
        assert error.value.pairs == (0,)


def test_a_step_without_a_desirable_reply(backend: Backend) -> None:
    """There is nothing for the sft term, and nothing is said of chosen replies."""
    pairs = [
        replace(pair, responses=(pair.responses[0][:0], *pair.responses[1:]))
        for pair in step_of(KtoConfig(), 4)
    ]
    loss = KtoConfig(sft_weight=1)
    moved, metrics = step(Policy(tiny_model("llama")), rows_of(pairs, 40), loss, backend)
    assert 0 < metrics["loss"] < 1 and all(g.isfinite().all() for g in moved.values())
    assert not any("chosen" in name or "margins" in name for name in metrics)
    assert metrics["rewards/rejected"] > 0


def test_a_mix_of_them(backend: Backend) -> None:
    """The weighted sum of what each gives for the step."""
    mix = MixConfig(parts={"kto": 2, "sigmoid": 0.5})
    assert mix.couples_step and mix.needs_mismatched and not mix.reads_labels
    assert not MixConfig(parts={"bco": 2, "sigmoid": 0.5}).couples_step
    policy, rows = Policy(tiny_model("llama")), rows_of(step_of(KtoConfig(), 7), 40)
    parts = [step(policy, rows, loss, backend) for loss in (KtoConfig(), SigmoidConfig())]
    moved, metrics = step(policy, rows, mix, backend)
    assert metrics["loss"] == pytest.approx(2 * parts[0][1]["loss"] + 0.5 * parts[1][1]["loss"])
    for name, gradient in moved.items():
        expected = 2 * parts[0][0][name] + 0.5 * parts[1][0][name]
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)

"""Scores pairs without an update, and computes metrics from their log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simpo.backend import Backend
from simpo.config.errors import ConfigError
from simpo.config.own_code import RAISED, fault_of
from simpo.config.schema import RunConfig
from simpo.data.pairs import PackedPairs
from simpo.data.store import TokenizedSet
from simpo.loop.coupled import all_pairs, numbers_of
from simpo.loop.router import Routing
from simpo.loss import (
    LossConfig,
    PairLogps,
    Preference,
    ResponseLogps,
    TokenLogps,
    compared,
    pair_losses,
)
from simpo.loss.ranks import best_accuracy, rank_correlation
from simpo.model.head import PairLoss, no_loss
from simpo.run.progress import Bar

COLUMNS = (
    "preference_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "chosen_nll",
    "chosen_tokens",
    "rejected_tokens",
)
RANK_COLUMNS = ("rewards/rank_correlation", "rewards/best_accuracies")
CHOSEN_COLUMNS = ("preference_loss", "logps/chosen", "chosen_nll", "chosen_tokens")
OF_CHOSEN = ("rewards/chosen", "logps/chosen", "chosen_nll", "chosen_tokens")
OF_REJECTED = ("rewards/rejected", "logps/rejected", "rejected_tokens")
OF_BOTH = ("rewards/accuracies", "rewards/margins")
"""Columns of which a pair without a chosen, without a rejected, or without one of both has none."""


def columns(loss: LossConfig) -> tuple[str, ...]:
    """The columns of a loss: fewer if it has no rejected responses, more if it ranks responses."""
    if not loss.needs_rejected:
        return CHOSEN_COLUMNS
    return (*COLUMNS, *RANK_COLUMNS) if loss.ranks else COLUMNS


def pair_table(loss: LossConfig, logps: PairLogps) -> Tensor:
    """The numbers in `columns` for each pair, float64 [P, columns].

    Rewards are as the loss defines them, and means over the comparisons of a pair; a tie counts as
    half accurate, and so does a prompt whose scores are all equal.
    """
    losses, chosen, rejected, valid, rewards = compared(loss, logps)

    def mean(numbers: Tensor) -> Tensor:
        """Mean over the comparisons of each pair."""
        if valid is None:
            return numbers.mean(dim=1)
        return numbers.double().where(valid, 0).sum(dim=1) / valid.sum(dim=1).clamp(min=1)

    right = 0.5 * ((chosen > rejected).float() - (chosen < rejected).float())
    numbers = {
        "preference_loss": losses,
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/accuracies": 0.5 + mean(right),
        "rewards/margins": mean(chosen - rejected),
        "logps/chosen": logps.average_chosen,
        "logps/rejected": logps.average_rejected,
        "chosen_nll": -logps.chosen,
        "chosen_tokens": logps.chosen_tokens,
        "rejected_tokens": logps.rejected_tokens,
    }
    if loss.ranks and rewards is not None:
        ranks = logps.all_responses().ranks()
        numbers["rewards/rank_correlation"] = rank_correlation(ranks, rewards)
        numbers["rewards/best_accuracies"] = best_accuracy(ranks, rewards)
    return torch.stack([numbers[name].detach().double() for name in columns(loss)], dim=1)


def present(table: Tensor) -> Tensor:
    """Which numbers of a table there are, bool [P, columns]: a pair may lack a response."""
    if table.shape[1] != len(COLUMNS):
        return torch.ones_like(table, dtype=torch.bool)
    chosen, rejected = (
        table[:, COLUMNS.index(name)] > 0 for name in ("chosen_tokens", "rejected_tokens")
    )
    there = {
        **dict.fromkeys(OF_CHOSEN, chosen),
        **dict.fromkeys(OF_REJECTED, rejected),
        **dict.fromkeys(OF_BOTH, chosen & rejected),
    }
    always = torch.ones_like(chosen)
    return torch.stack([there.get(name, always) for name in COLUMNS], dim=1)


def pair_sums(table: Tensor) -> Tensor:
    """Sums of the columns of a table, then how many numbers there are in each."""
    there = present(table)
    return torch.cat([table.where(there, 0).sum(dim=0), there.sum(dim=0).to(table)])


def responses_per_pair(loss: LossConfig, lines: Sequence[Sequence[float]]) -> float:
    """Over how many responses a pair the loss is a mean: 1 if it is one over pairs.

    Args:
        lines: the numbers of pairs in the order of `columns`.
    """
    if not loss.mean_over_responses:
        return 1.0
    places = [COLUMNS.index(name) for name in ("chosen_tokens", "rejected_tokens")]
    return sum(line[place] > 0 for line in lines for place in places) / len(lines)


def summarise(loss: LossConfig, sums: Tensor, router_aux_weight: float = 0.0) -> dict[str, float]:
    """Means over pairs, of those columns that there are; the key `loss` includes the sft term and
    the router's auxiliary loss.

    Args:
        sums: `pair_sums`, and behind them the auxiliary loss if it has a weight.
    """
    names = columns(loss)
    both = sums[: 2 * len(names)].view(2, -1).T.tolist()
    means = {n: total / count for n, (total, count) in zip(names, both, strict=True) if count}
    nll = means.pop("chosen_nll", 0.0) / means.get("chosen_tokens", 1.0)
    value = means.pop("preference_loss") + loss.sft_weight * nll
    if router_aux_weight:
        means["aux_loss"] = float(sums[-1])
        value += router_aux_weight * means["aux_loss"]
    return {"loss": value, **means}


def metric_names(run: RunConfig, test: TokenizedSet) -> list[str]:
    """The keys that an evaluation of held-out pairs will have, in its order."""
    pairs, lengths = test.held_out, test.tokens.lengths()
    if not pairs:
        return []
    sets = np.array([pair.held_out_set for pair in pairs])
    of_set = _names_of_set(run.loss, lengths)
    names = [*of_set, *(["aux_loss"] if run.model.router_aux_weight else [])]
    if len(own_sets := dict.fromkeys(sets.tolist())) > 1:
        for name in own_sets:
            names += [f"{name}/{key}" for key in _names_of_set(run.loss, lengths[sets == name])]
        names += [f"mean/{key}" for key in of_set]
    if sampled := pairs[: run.sample.num_prompts]:
        names += ["reply_tokens", "reply_repetition"]
        names += ["rule_pass_rate"] if any(pair.rule is not None for pair in sampled) else []
    return names


def _names_of_set(loss: LossConfig, lengths: np.ndarray) -> list[str]:
    """The keys of pairs whose prompts and responses have these lengths."""
    left_out = {"preference_loss", "chosen_nll"}
    if loss.reads_labels:
        there = lengths[:, 1:3] > 0
        lacking = (
            (OF_CHOSEN, there[:, 0]),
            (OF_REJECTED, there[:, 1]),
            (OF_BOTH, there.all(axis=1)),
        )
        left_out.update(name for names, some in lacking if not some.any() for name in names)
    return ["loss", *(name for name in columns(loss) if name not in left_out)]


@torch.no_grad()
def score_pairs(
    policy: nn.Module,
    rows: Iterable[PackedPairs],
    pair_loss: PairLoss,
    table: Callable[[PairLogps], Tensor],
    backend: Backend,
    routing: Routing | None = None,
    weigher: LossConfig | None = None,
) -> dict[int, Any]:
    """Compute numbers of the pairs of all processes' rows, without an update.

    Args:
        policy: as `Backend.prepare` wrapped it.
        pair_loss: the loss that the policy's forward computes.
        table: maps log-probabilities to the numbers of a row's pairs, [P, ...].
        routing: the routing of this process's rows is added to it.
        weigher: the loss, if it weighs tokens.

    Returns:
        The numbers of each pair as lists, by its index.
    """
    policy.eval()
    scored: list[tuple[int, Any]] = []
    for row in rows:
        routed = routing and routing.of(row)
        logps = policy(row.to(backend.device), pair_loss, routed, weigher)[1]
        scored += zip(row.pairs, table(logps)[: len(row.pairs)].tolist(), strict=True)
    return dict(sorted(backend.gather(scored)))


def counted(rows: Iterable[PackedPairs], bar: Bar, processes: int) -> Iterator[PackedPairs]:
    """Yield this process's rows, and count the pairs of all processes once they are computed."""
    for row in rows:
        yield row
        bar.advance(len(row.pairs) * processes)


def evaluate(
    policy: nn.Module,
    rows: Iterable[PackedPairs],
    loss: LossConfig,
    backend: Backend,
    router_aux_weight: float = 0.0,
) -> tuple[dict[str, float], dict[int, list[float]]]:
    """Score the pairs of all processes' rows with a loss; arguments as `score_pairs`.

    Args:
        router_aux_weight: weight of the router's auxiliary loss, over the tokens of all rows.

    Returns:
        Metrics over all pairs, and the numbers of each pair in the order of `columns`.
    """
    routing = Routing() if router_aux_weight else None
    if loss.couples_step:
        known = score_pairs(policy, rows, no_loss, numbers_of, backend, routing, loss)
        lines = pair_table(loss, all_pairs(list(known.values()))).tolist()
        numbers = dict(zip(known, lines, strict=True))
    else:
        pair_loss, table = partial(pair_losses, loss), partial(pair_table, loss)
        numbers = score_pairs(policy, rows, pair_loss, table, backend, routing, loss)
    sums = pair_sums(torch.tensor(list(numbers.values()), dtype=torch.float64))
    if routing is not None:
        sums = torch.cat([sums, routing.aux_loss(backend)])
    return summarise(loss, sums, router_aux_weight), numbers


def _made_up(loss: LossConfig, place: str, taken: slice = slice(None)) -> PairLogps:
    """Two pairs with all that the loss needs; as it gets them, each two responses of both if it
    compares those of a prompt.

    Args:
        place: the user's class, for messages.
        taken: which of the two pairs.

    Raises:
        ConfigError: `LossConfig.token_weights` fails, or gives no weight for each token.
    """
    number = 3 if loss.needs_mismatched else 2
    sums = torch.tensor([[-5.0, -6.0, -7.0], [-4.0, -9.25, -8.0]])[:, :number].requires_grad_()
    tokens = torch.tensor([[3, 3, 4], [4, 5, 3]])[:, :number]
    reference = torch.tensor([[-5.0, -6.5, -6.0], [-4.0, -8.0, -8.5]])[:, :number]
    scores = torch.tensor([[2.0, 1.0, 1.5], [3.0, 1.0, 2.0]])[:, :number]
    weighted = weights = None
    if loss.weighs_tokens:
        lengths, logps = (3, 3, 4, 5), torch.full((15,), -1.0)
        own = TokenLogps(logps, torch.arange(15), lengths, 2)
        each: object = _called(f"{place}.token_weights", partial(loss.token_weights, own))
        if not (isinstance(each, Tensor) and each.shape == (15,) and each.is_floating_point()):
            got = (
                f"{each.dtype} {list(each.shape)}"
                if isinstance(each, Tensor)
                else type(each).__name__
            )
            wanted = "must return a weight for each token, float32 [15] for 15 of them"
            raise ConfigError([f"{place}.token_weights {wanted}, got {got}"])
        weights = torch.stack([own.sum() for own in each.split(lengths)]).view(2, 2)
        weighted = (-weights).requires_grad_()
    responses = ResponseLogps(
        sums[taken],
        tokens[taken],
        scores=scores[taken] if loss.needs_scores or loss.ranks else None,
        reference=reference[taken] if loss.needs_reference else None,
        weighted=None if weighted is None else weighted[taken],
        weights=None if weights is None else weights[taken],
        log_squares=-2.0 * tokens[taken] if loss.needs_squares else None,
    )
    return responses.each_two() if loss.compare is not None else responses.weighted_pairs()


def _called(place: str, method: partial[Any], unasked: Sequence[str] = ()) -> Any:
    """What a user's method returns.

    Args:
        unasked: what the loss does not ask for, told if None was used.

    Raises:
        ConfigError: it fails.
    """
    try:
        return method()
    except RAISED as error:
        fault = f"{place} fails: {fault_of(error, method.func.__module__)}"
        if unasked and (isinstance(error, AssertionError) or "None" in str(error)):
            fault += f"; {', '.join(unasked)} {'is' if len(unasked) == 1 else 'are'} False"
        raise ConfigError([fault]) from error


def check_loss(loss: LossConfig) -> None:
    """Compute a user's loss on two made-up pairs, before anything is loaded.

    Raises:
        ConfigError: it fails, or does not return what `LossConfig.preference` promises.
    """
    if loss.module is None:
        return
    own = f"loss.module: {loss.module}:{type(loss).__name__}"
    if loss.ranks and loss.weighs_tokens:
        raise ConfigError([f"{own}: weighs_tokens is for pairs, and the loss ranks all responses"])
    logps = _made_up(loss, own)
    needs = ("needs_reference", *(() if loss.ranks else ("needs_scores", "needs_squares")))
    unasked = [name for name in needs if not getattr(loss, name)]
    found = _called(f"{own}.preference", partial(loss.preference, logps), unasked)
    wanted = (
        f"{own}.preference must return a Preference of three differentiable float32 tensors [pairs]"
    )
    if fault := _wrong(found, logps.chosen.shape):
        raise ConfigError([f"{wanted}, got {fault}"])
    if loss.couples_step:
        return
    again = _called(f"{own}.preference", partial(loss.preference, _made_up(loss, own)))
    # A loss that draws random numbers differs without other pairs, too.
    if not torch.equal(torch.stack(again), torch.stack(found)):
        return
    for taken in slice(0, 1), slice(1, 2):
        alone = _called(f"{own}.preference", partial(loss.preference, _made_up(loss, own, taken)))
        both = torch.stack(found).view(3, 2, -1)[:, taken].flatten(1)
        if fault := _wrong(alone, both[0].shape):
            raise ConfigError([f"{wanted}, got of a single prompt {fault}"])
        if not torch.allclose(torch.stack(alone), both, equal_nan=True):
            raise ConfigError(
                [
                    f"{own}.preference: what it returns for a pair depends on the other pairs (set "
                    "couples_step: ClassVar[bool] = True in the class)"
                ]
            )


def _wrong(found: object, shape: torch.Size) -> str | None:
    """What of a returned value is no part of a `Preference` of so many pairs."""
    if not isinstance(found, Preference):
        return "None" if found is None else type(found).__name__
    for name, value in zip(found._fields, found, strict=True):
        if not isinstance(value, Tensor):
            return f"{name} of type {type(value).__name__}"
        if value.shape != shape:
            return f"{name} of shape {list(value.shape)} instead of {list(shape)}"
        if value.dtype != torch.float32:
            return f"{name} of {value.dtype}"
    return None if found.losses.requires_grad else "losses without a gradient"

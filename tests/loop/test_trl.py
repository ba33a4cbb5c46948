"""Compares numbers with TRL's CPOTrainer (loss_type="simpo") on the same weights and tokens."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast

from simpo.backend import Backend
from simpo.config.backends import SingleConfig
from simpo.config.choices import Device, Precision, Schedule
from simpo.config.schema import TrainConfig
from simpo.data.mismatched import with_mismatched
from simpo.data.packing import pack
from simpo.data.pairs import TokenizedPair
from simpo.data.plan import rows_of_pairs
from simpo.loop.optim import build_optimizer, set_learning_rate
from simpo.loop.rates import learning_rate
from simpo.loop.score import summarise
from simpo.loop.step import update
from simpo.loss import LossConfig, pair_losses
from simpo.loss.simpo import SigmoidConfig
from simpo.loss.token_weighted import LdDpoConfig, WpoConfig
from simpo.loss.weighted_sum import MixConfig
from simpo.loss.with_coupled_steps import AotConfig, KtoConfig
from simpo.loss.with_log_ratios import (
    ApoDownConfig,
    ApoZeroConfig,
    BcoConfig,
    ExoConfig,
    NcaConfig,
    RobustConfig,
    SppoConfig,
)
from simpo.loss.with_reference import DpoConfig, IpoConfig, LnDpoConfig
from simpo.model.head import no_loss
from simpo.model.policy import Policy
from tests.support.tiny_models import VOCAB, gradients, random_pairs, tiny_model, token_set

trl = pytest.importorskip("trl")
cpo = pytest.importorskip("trl.experimental.cpo")

BETA, RATIO, RATE = 2.5, 0.3, 3e-3
PAIRS_PER_STEP, NUM_STEPS = 8, 20


@pytest.fixture(scope="module")
def pairs() -> list[TokenizedPair]:
    """Pairs that begin with BOS (1) and whose responses end in EOS (2), as TRL makes them."""
    drawn = random_pairs(np.random.default_rng(0), PAIRS_PER_STEP * NUM_STEPS)
    return [
        TokenizedPair.of(
            np.append(1, p.prompt_ids).astype(np.int32),
            np.append(p.chosen_ids, 2).astype(np.int32),
            np.append(p.rejected_ids, 2).astype(np.int32),
        )
        for p in drawn
    ]


def as_text(pairs: list[TokenizedPair]) -> tuple[list[dict[str, str]], PreTrainedTokenizerFast]:
    """Rows of text, and a tokenizer that makes the pairs' ids of them."""
    words = {"[pad]": 0, "[bos]": 1, "[eos]": 2} | {f"t{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[pad]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = " ".join
    rows = [
        {
            "prompt": text(f"t{i}" for i in pair.prompt_ids[1:]),
            "chosen": " " + text(f"t{i}" for i in pair.chosen_ids[:-1]),
            "rejected": " " + text(f"t{i}" for i in pair.rejected_ids[:-1]),
        }
        for pair in pairs
    ]
    return rows, PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="[bos]", eos_token="[eos]", pad_token="[pad]"
    )


def trl_trainer(folder: Path, model: torch.nn.Module, pairs: list[TokenizedPair], **extra: object):  # type: ignore[no-untyped-def]
    """TRL's trainer on the pairs, in their order."""
    rows, tokenizer = as_text(pairs)

    class InOrder(cpo.CPOTrainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *args: object, **kwargs: object) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    return InOrder(
        model=model,
        args=cpo.CPOConfig(
            output_dir=str(folder),
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=BETA,
            simpo_gamma=BETA * RATIO,
            max_length=512,
            per_device_train_batch_size=PAIRS_PER_STEP // 2,
            gradient_accumulation_steps=2,
            max_steps=NUM_STEPS,
            learning_rate=RATE,
            lr_scheduler_type="linear",
            warmup_steps=2,
            optim="adamw_torch",
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            **extra,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def test_first_step_loss_and_gradients(tmp_path: Path, pairs: list[TokenizedPair]) -> None:
    theirs = tiny_model("llama")
    ours = copy.deepcopy(theirs)
    theirs.set_attn_implementation("sdpa")
    trainer = trl_trainer(tmp_path, theirs, pairs)
    batch = next(iter(trainer.get_train_dataloader()))
    num_pairs = len(batch["chosen_labels"])
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    loss.backward()

    config = SigmoidConfig(beta=BETA, gamma_beta_ratio=RATIO)
    own, logps = Policy(ours)(
        pack(pairs[:num_pairs], range(num_pairs)),
        lambda logps: pair_losses(config, logps) / num_pairs,
    )
    own.backward()
    assert own.item() == pytest.approx(loss.item(), rel=1e-5)
    assert BETA * logps.average_chosen.mean().item() == pytest.approx(
        metrics["rewards/chosen"], rel=1e-5
    )
    wanted = gradients(theirs)
    assert wanted.keys() == gradients(ours).keys()
    for name, gradient in gradients(ours).items():
        difference = (gradient - wanted[name]).norm() / wanted[name].norm()
        assert difference < 1e-5, name


@pytest.mark.parametrize(
    ("loss", "theirs"),
    [
        (DpoConfig(beta=0.3), {"loss_type": "sigmoid", "beta": 0.3}),
        (LnDpoConfig(beta=5.0), {"loss_type": "sigmoid_norm", "beta": 5.0}),
        (IpoConfig(tau=0.4), {"loss_type": "ipo", "beta": 0.4}),
        (BcoConfig(beta=0.3), {"loss_type": "bco_pair", "beta": 0.3}),
        (ApoZeroConfig(beta=0.3), {"loss_type": "apo_zero", "beta": 0.3}),
        (ApoDownConfig(beta=0.3), {"loss_type": "apo_down", "beta": 0.3}),
        (NcaConfig(beta=0.3), {"loss_type": "nca_pair", "beta": 0.3}),
        (
            ExoConfig(beta=0.3, label_smoothing=0.01),
            {"loss_type": "exo_pair", "beta": 0.3, "label_smoothing": 0.01},
        ),
        (
            RobustConfig(beta=0.3, label_smoothing=0.1),
            {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.1},
        ),
        (SppoConfig(beta=0.3), {"loss_type": "sppo_hard", "beta": 0.3}),
        (AotConfig(beta=0.3), {"loss_type": "aot", "beta": 0.3}),
        (
            MixConfig(
                parts={"dpo": {"weight": 0.8, "beta": 0.3}, "nca": {"weight": 0.5, "beta": 0.3}}
            ),
            {"loss_type": ["sigmoid", "nca_pair"], "loss_weights": [0.8, 0.5], "beta": 0.3},
        ),
        (WpoConfig(beta=0.3), {"loss_type": "sigmoid", "beta": 0.3, "use_weighting": True}),
        (LdDpoConfig(beta=0.3, alpha=0.2), {"loss_type": "sigmoid", "beta": 0.3, "ld_alpha": 0.2}),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_losses_with_a_reference(
    tmp_path: Path, pairs: list[TokenizedPair], loss: LossConfig, theirs: dict[str, Any]
) -> None:
    """Against DPOTrainer, whose reference is another model than the policy."""
    few = [
        replace(p, prompt_ids=p.prompt_ids[1:]) for p in pairs[:PAIRS_PER_STEP]
    ]  # it adds no BOS
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    policy, origin = Policy(copy.deepcopy(model)), Policy(copy.deepcopy(other))
    for each in (model, other):
        each.set_attn_implementation("sdpa")
    rows, tokenizer = as_text(pairs[:PAIRS_PER_STEP])
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=other,
        args=trl.DPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=len(few),
            use_cpu=True,
            bf16=False,
            report_to="none",
            **theirs,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    expected = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))

    scored = origin(pack(few, range(len(few))), no_loss, None, loss)[1].responses
    assert scored is not None
    sums = (scored.sums if scored.weighted is None else scored.weighted).tolist()
    known = [replace(p, reference_logps=(a, b)) for p, (a, b) in zip(few, sums, strict=True)]
    row = pack(known, range(len(few)))
    own, _ = policy(row, lambda logps: pair_losses(loss, logps) / len(few), None, loss)
    assert own.item() == pytest.approx(expected.item(), rel=1e-5)


def test_kto(tmp_path: Path, pairs: list[TokenizedPair]) -> None:
    """Single replies with labels against KTOTrainer, whose reference is another model.

    It takes the reply before for the mismatched one, and here it is the one behind: so it has the
    replies in the other order.
    """
    few = [replace(p, prompt_ids=p.prompt_ids[1:]) for p in pairs[:PAIRS_PER_STEP]]
    labels = [i % 3 != 1 for i in range(len(few))]
    nothing = np.zeros(0, np.int32)
    single = [
        TokenizedPair.of(p.prompt_ids, p.chosen_ids, nothing)
        if good
        else TokenizedPair.of(p.prompt_ids, nothing, p.chosen_ids)
        for p, good in zip(few, labels, strict=True)
    ]
    model, other = tiny_model("llama", seed=1), tiny_model("llama")
    policy, origin = Policy(copy.deepcopy(model)), Policy(copy.deepcopy(other))
    for each in (model, other):
        each.set_attn_implementation("sdpa")
    rows, tokenizer = as_text(pairs[:PAIRS_PER_STEP])
    records = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": good}
        for row, good in zip(rows, labels, strict=True)
    ]
    loss = KtoConfig(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    trainer = trl.KTOTrainer(
        model=model,
        ref_model=other,
        args=trl.KTOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=len(few),
            use_cpu=True,
            bf16=False,
            report_to="none",
            beta=0.3,
            desirable_weight=1.5,
            undesirable_weight=0.5,
        ),
        train_dataset=Dataset.from_list(records[::-1]),
        processing_class=tokenizer,
    )
    expected = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))

    data = with_mismatched(token_set(single), 1000)
    row = pack(list(data.tokens), range(len(few)))
    known = origin(row, lambda logps: 0.0 * logps.chosen)[1].responses
    assert known is not None
    row = replace(row, reference_logps=known.sums.flatten())
    own, logps = policy(row, lambda logps: pair_losses(loss, logps) / len(few))
    assert loss.reference_point(logps) > 1
    assert own.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.matrix
def test_trajectory_of_20_steps(tmp_path: Path, pairs: list[TokenizedPair]) -> None:
    theirs = tiny_model("llama")
    policy = Policy(copy.deepcopy(theirs))
    theirs.set_attn_implementation("sdpa")
    trainer = trl_trainer(tmp_path, theirs, pairs)
    their_losses: list[float] = []
    compute = trainer.get_batch_loss_metrics

    def recording(*args: object, **kwargs: object) -> object:
        loss, metrics = compute(*args, **kwargs)
        their_losses.append(loss.item())
        return loss, metrics

    trainer.get_batch_loss_metrics = recording
    trainer.train()

    config = TrainConfig(
        learning_rate=RATE, schedule=Schedule.linear, warmup_ratio=0.1, max_grad_norm=1.0
    )
    backend = Backend(SingleConfig(device=Device.cpu), Precision.fp32, config.max_grad_norm)
    optimizer = build_optimizer(policy, config)
    lengths = np.array([pair.num_tokens() for pair in pairs])
    loss = SigmoidConfig(beta=BETA, gamma_beta_ratio=RATIO)
    for step in range(NUM_STEPS):
        set_learning_rate(optimizer, learning_rate(config, step, NUM_STEPS))
        indices = range(step * PAIRS_PER_STEP, (step + 1) * PAIRS_PER_STEP)
        rows = [pack([pairs[i] for i in r], r) for r in rows_of_pairs(indices, lengths, 64)]
        metrics = summarise(loss, update(policy, optimizer, rows, loss, backend)[0])
        expected = sum(their_losses[2 * step : 2 * step + 2]) / 2
        assert metrics["loss"] == pytest.approx(expected, rel=1e-4), f"step {step}"
    weights = dict(policy.model.named_parameters())
    start = dict(tiny_model("llama").named_parameters())
    for name, weight in theirs.named_parameters():
        # The weights went a hundred times farther than the two runs may lie apart.
        assert (weight - start[name]).abs().max() > 0.01, name
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-4)

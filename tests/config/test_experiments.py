"""The settings of the released runs, compared with a table copied from the release."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpo.config.compose import compose_run
from simpo.config.flat import settings
from simpo.config.losses import LOSSES
from simpo.config.paths import config_dir
from simpo.loop.train import train
from simpo.loss import LossConfig
from simpo.loss.simpo import HingeConfig, SigmoidConfig
from simpo.loss.token_weighted import ConfpoConfig, WpoConfig
from simpo.loss.with_coupled_steps import AmapoConfig
from simpo.loss.without_reference import CpoConfig, OrpoConfig
from simpo.report import published
from simpo.run.files import read_results

# https://github.com/princeton-nlp/SimPO, training_configs: checkpoint, dataset, splits, template
# given there, beta, ratio, learning rate, lengths.
RELEASED = {
    "mistral_base": (
        "alignment-handbook/zephyr-7b-sft-full",
        ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs", "test_prefs"),
        None,
        (2.0, 0.8, 3e-7),
        (1024, 512),
    ),
    "mistral_instruct": (
        "mistralai/Mistral-7B-Instruct-v0.2",
        ("princeton-nlp/mistral-instruct-ultrafeedback", "train", "test"),
        "mistral_paper",
        (2.5, 0.1, 5e-7),
        (2048, 1800),
    ),
    "llama3_base": (
        "princeton-nlp/Llama-3-Base-8B-SFT",
        ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs", "test_prefs"),
        None,
        (2.0, 0.5, 6e-7),
        (2048, 1800),
    ),
    "llama3_instruct": (
        "meta-llama/Meta-Llama-3-8B-Instruct",
        ("princeton-nlp/llama3-ultrafeedback", "train", "test"),
        None,
        (2.5, 0.55, 1e-6),
        (2048, 1800),
    ),
    "llama3_instruct_v02": (
        "meta-llama/Meta-Llama-3-8B-Instruct",
        ("princeton-nlp/llama3-ultrafeedback-armorm", "train", "test"),
        None,
        (10.0, 0.3, 1e-6),
        (2048, 1800),
    ),
    "gemma2_it": (
        "google/gemma-2-9b-it",
        ("princeton-nlp/gemma2-ultrafeedback-armorm", "train", "test"),
        "gemma_paper",
        (10.0, 0.5, 8e-7),
        (2048, 1800),
    ),
}


def test_every_released_run_is_there() -> None:
    names = {path.stem for path in (config_dir("experiments") / "paper").glob("*.yaml")}
    assert names == {*RELEASED, "recipe", "llama3_base_sft"}


@pytest.mark.parametrize("name", RELEASED)
def test_every_setting_of_a_released_run(name: str) -> None:
    run = compose_run([f"experiments=paper/{name}"])
    path, source, template, numbers, lengths = RELEASED[name]
    (data,) = run.data.sources
    assert run.model.path == path
    assert (data.path, data.train_split, data.test_split) == source
    assert run.model.chat_template == template
    assert isinstance(run.loss, SigmoidConfig)
    assert (run.loss.beta, run.loss.gamma_beta_ratio, run.train.learning_rate) == numbers
    assert (run.data.max_length_tokens, run.data.max_prompt_tokens) == lengths
    # What all of them share.
    assert (run.loss.name, run.loss.sft_weight, run.loss.label_smoothing) == ("sigmoid", 0, 0)
    assert run.data.compat.value == "paper"
    train = run.train
    assert (train.pairs_per_step, train.epochs, train.max_steps, train.seed) == (128, 1, None, 42)
    assert (train.schedule.value, train.warmup_ratio) == ("cosine", 0.1)
    assert (train.adam_beta1, train.adam_beta2, train.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (train.weight_decay, train.max_grad_norm) == (0.0, 0.0)
    assert (train.precision.value, train.log_every, train.eval_every) == ("bf16", 5, 400)
    assert run.model.lora.rank == 0 and run.model.gradient_checkpointing.value == "full"
    assert run.name == f"{run.model.name}-{run.data.name}-sigmoid"


# AlpacaEval 2 LC, AlpacaEval 2, Arena-Hard of the released SimPO models and of what they started
# from, as https://github.com/princeton-nlp/SimPO gives them.
SCORES = {
    "mistral_base": ((21.4, 20.8, 16.6), (8.4, 6.2, 1.3)),
    "mistral_instruct": ((32.1, 34.8, 21.0), (17.1, 14.7, 12.6)),
    "llama3_base": ((22.0, 20.3, 23.4), (6.2, 4.6, 3.3)),
    "llama3_instruct": ((44.7, 40.5, 33.8), (26.0, 25.3, 22.3)),
    "llama3_instruct_v02": ((53.7, 47.5, 36.5), None),
    "gemma2_it": ((72.4, 65.9, 59.1), (51.1, 38.1, 40.8)),
}


@pytest.mark.parametrize("name", RELEASED)
def test_published_results(name: str) -> None:
    found = published.settings()[name]
    run = compose_run([f"experiments=paper/{name}"])
    assert (found.model, [found.data]) == (run.model.path, [s.path for s in run.data.sources])
    trained, start = SCORES[name]
    assert tuple(found.results["sigmoid"]) == trained
    assert found.results.get("start") == (None if start is None else list(start))
    assert set(found.results) <= {*LOSSES, "start"}
    assert all(len(values) == len(published.BENCHMARKS) for values in found.results.values())


def test_the_stage_before_llama3_base() -> None:
    """Section 3 of the paper: UltraChat-200k, 2e-5, 128, one epoch, 2048, cosine, 10 %."""
    run = compose_run(["experiments=paper/llama3_base_sft"])
    (data,) = run.data.sources
    assert (data.path, data.train_split, data.test_split) == (
        "HuggingFaceH4/ultrachat_200k",
        "train_sft",
        "test_sft",
    )
    assert run.model.path == "meta-llama/Meta-Llama-3-8B"
    train = run.train
    assert (train.learning_rate, train.pairs_per_step, train.epochs) == (2e-5, 128, 1)
    assert (train.schedule.value, train.warmup_ratio) == ("cosine", 0.1)
    assert run.data.max_length_tokens == 2048
    assert (run.loss.name, run.monitor.metric, run.monitor.mode.value) == ("sft", "loss", "min")


@pytest.mark.parametrize(
    "name",
    [
        "mistral_base",
        *(
            pytest.param(name, marks=pytest.mark.matrix)
            for name in RELEASED
            if name != "mistral_base"
        ),
    ],
)
def test_smoke_runs(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Each released run shrunk, here on a tiny model, keeps what makes it that run."""
    whole = compose_run([f"experiments=paper/{name}"])
    small = [f"experiments=smoke/{name}", f"model.path={tiny_folder}", "train.max_steps=2"]
    small += ["train.precision=fp32", "sample.max_new_tokens=4", f"run_dir={tmp_path}/run"]
    run = compose_run([*small, f"cache_dir={tmp_path}/cache", "train.tokens_per_row=2048"])
    assert (run.loss, run.data.compat) == (whole.loss, whole.data.compat)
    assert run.model.name == whole.model.name
    assert {"loss", "rewards/accuracies"} <= read_results(train(run))["eval_after"].keys()


@pytest.mark.parametrize("folder", ["paper", "smoke"])
@pytest.mark.parametrize("name", RELEASED)
def test_released_runs_do_not_clip(folder: str, name: str) -> None:
    """DeepSpeed's default, which the released configuration does not change, is 0."""
    assert compose_run([f"experiments={folder}/{name}"]).train.max_grad_norm == 0.0
    # The stage before them is of another trainer, whose clipping is not known.
    assert compose_run(["experiments=paper/llama3_base_sft"]).train.max_grad_norm == 1.0


def test_one_setting_of_a_released_run_can_differ() -> None:
    run = compose_run(
        ["experiments=paper/mistral_base", "loss.beta=3", "data.max_length_tokens=2048"]
    )
    assert isinstance(run.loss, SigmoidConfig)
    assert (run.loss.beta, run.data.max_length_tokens) == (3.0, 2048)


@pytest.mark.parametrize(
    ("name", "differing"),
    [
        ("no_length_norm", {"loss.length_normalized": False}),
        ("no_margin", {"loss.gamma_beta_ratio": 0.0}),
        ("sft_weight", {"loss.sft_weight": 1.0}),
        ("collapse", {"train.learning_rate": 1e-5, "watch.action": "stop"}),
        ("beta", {}),
        ("gamma", {}),
        ("learning_rate", {}),
    ],
)
def test_an_ablation_changes_what_it_names_and_nothing_else(name: str, differing: dict) -> None:
    whole = settings(compose_run(["experiments=paper/mistral_base"]))
    ablated = settings(compose_run([f"experiments=[paper/mistral_base,ablations/{name}]"]))
    assert {key: value for key, value in ablated.items() if value != whole[key]} == differing


def test_every_ablation_is_tested() -> None:
    names = {path.stem for path in (config_dir("experiments") / "ablations").glob("*.yaml")}
    assert names == {
        *("no_length_norm", "no_margin", "sft_weight", "collapse"),
        *("beta", "gamma", "learning_rate"),
    }


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("simpo", SigmoidConfig(sft_weight=1.0)),
        ("hinge", HingeConfig(sft_weight=1.0)),
        ("no_margin", SigmoidConfig(sft_weight=1.0, gamma_beta_ratio=0.0)),
        ("no_length_norm", SigmoidConfig(sft_weight=1.0, length_normalized=False)),
        ("orpo", OrpoConfig()),
        ("cpo", CpoConfig()),
        ("amapo", AmapoConfig(sft_weight=1.0)),
        ("confpo", ConfpoConfig(sft_weight=1.0)),
        ("wpo", WpoConfig(sft_weight=1.0)),
    ],
)
def test_members_of_the_demo_study(name: str, loss: LossConfig) -> None:
    """One differs from the other in its loss, and all have the demo's NLL term."""
    run = compose_run(["experiments=sweeps/demo_study", f"experiments/objectives={name}"])
    assert run.loss == loss
    first = settings(compose_run(["experiments=sweeps/demo_study"]))
    others = {k for k, v in settings(run).items() if first.get(k) != v}
    assert all(key == "name" or key.startswith("loss.") for key in others)


def test_a_search_of_a_released_run() -> None:
    """What a search sets stands; what it searches is the sweeper's, not the run's."""
    run = compose_run(["experiments=[paper/llama3_instruct,sweeps/lr_then_gamma]"])
    assert run.model.name == "llama3_instruct"
    assert isinstance(run.loss, SigmoidConfig)
    assert (run.loss.beta, run.loss.gamma_beta_ratio) == (10.0, 0.25)
    assert run.train.learning_rate == 1e-6

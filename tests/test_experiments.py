"""The released runs as files: every number against a table written from the release itself."""

from __future__ import annotations

import pytest

from simpo.compose import compose_run
from simpo.config import menu_dir, settings

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
    names = {path.stem for path in (menu_dir("experiments") / "paper").glob("*.yaml")}
    assert names == {*RELEASED, "recipe"}


@pytest.mark.parametrize("name", RELEASED)
def test_released_runs_to_the_digit(name: str) -> None:
    run = compose_run([f"experiments=paper/{name}"])
    path, source, template, numbers, lengths = RELEASED[name]
    (data,) = run.data.sources
    assert run.model.path == path
    assert (data.path, data.train_split, data.test_split) == source
    assert run.model.chat_template == template
    assert (run.loss.beta, run.loss.gamma_beta_ratio, run.train.learning_rate) == numbers
    assert (run.data.max_length_tokens, run.data.max_prompt_tokens) == lengths
    # What all of them share.
    assert (run.loss.name, run.loss.sft_weight, run.loss.label_smoothing) == ("sigmoid", 0, 0)
    assert run.data.compat.value == "paper"
    train = run.train
    assert (train.pairs_per_step, train.epochs, train.max_steps, train.seed) == (128, 1, None, 42)
    assert (train.schedule.value, train.warmup_ratio) == ("cosine", 0.1)
    assert (train.adam_beta1, train.adam_beta2, train.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (train.weight_decay, train.max_grad_norm) == (0.0, 1.0)
    assert (train.precision.value, train.log_every, train.eval_every) == ("bf16", 5, 400)
    assert run.model.lora.rank == 0 and run.model.gradient_checkpointing
    assert run.name == f"{run.model.name}-{run.data.name}-sigmoid"


def test_one_setting_of_a_released_run_can_differ() -> None:
    run = compose_run(
        ["experiments=paper/mistral_base", "loss.beta=3", "data.max_length_tokens=2048"]
    )
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
    names = {path.stem for path in (menu_dir("experiments") / "ablations").glob("*.yaml")}
    assert names == {
        *("no_length_norm", "no_margin", "sft_weight", "collapse"),
        *("beta", "gamma", "learning_rate"),
    }


def test_a_search_of_a_released_run() -> None:
    """What a search sets stands; what it searches is the sweeper's, not the run's."""
    run = compose_run(["experiments=[paper/llama3_instruct,sweeps/lr_then_gamma]"])
    assert run.model.name == "llama3_instruct"
    assert (run.loss.beta, run.loss.gamma_beta_ratio) == (10.0, 0.25)
    assert run.train.learning_rate == 1e-6

"""Names of settings that other trainers have are answered with ours, and never taken silently."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from simpo.__main__ import main
from simpo.config.compose import compose_run, refuse_options
from simpo.config.composer import CONF, Composer, NotComposedError
from simpo.config.errors import ConfigError
from simpo.config.explain import explain
from simpo.config.other_trainers import ANSWERS
from simpo.config.schema import RunConfig
from simpo.config.suggest import all_keys, unknown_key

BATCH = (
    "here train.pairs_per_step, the pairs of one update: batch per device x accumulation steps x "
    "devices; train.tokens_per_row bounds what one forward takes (such as train.pairs_per_step=128)"
)
SOURCES = (
    "here data.sources, a list; the share of one is its weight "
    "(write data=jsonl 'data.sources=[{path: NAME}]')"
)


def sentence(name: str) -> str:
    return ANSWERS[name] if " " in ANSWERS[name] else f"here {ANSWERS[name]}"


SETTING = re.compile(
    r"\b(?:(?:model|data|loss|train|monitor|export|backend|tracker)\.[\w.]*\w"
    r"|output_dir|cache_dir|run_dir)\b"
)
CHOICE = re.compile(r"\b(loss|backend|tracker|data)=(\w*)")


def test_answers_name_settings_that_there_are() -> None:
    base = CONF.compose(["backend=ddp", "tracker=wandb"])
    known = {*all_keys(base), *(item.name for item in fields(RunConfig))}
    for name in ANSWERS:
        text = sentence(name)
        named = {*SETTING.findall(text), *re.findall(r"^here (\w+)$", text)}
        choices = CHOICE.findall(text)
        assert named or choices or name == "lora_dropout", name
        assert named <= known, name
        assert all(not choice or choice in CONF.choices(group) for group, choice in choices), name
        # A name of ours is never answered, and an option of Hydra's is never taken for a setting.
        assert name not in {item.name for item in fields(RunConfig)}
        assert f"--{name}" not in get_args_parser()._option_string_actions


def test_what_an_answer_says_to_write_composes() -> None:
    found = [re.findall(r"\(write (\S+=[\w./\[\],-]+)", sentence(name)) for name in ANSWERS]
    words = sorted({word.replace("OWNER/NAME", "me/mine") for some in found for word in some})
    assert len(words) > 8
    compose_run([*words, "data.sources=[{path: me/pairs}]"])


@pytest.mark.parametrize(
    ("line", "answers"),
    [
        (
            "learning_rate=1e-6",
            ["learning_rate: here train.learning_rate (write train.learning_rate=1e-6)"],
        ),
        ("num_train_epochs=3", ["num_train_epochs: here train.epochs (write train.epochs=3)"]),
        ("train.batch_size=8", [f"train.batch_size: {BATCH}"]),
        ("gradient_accumulation_steps=16", [f"gradient_accumulation_steps: {BATCH}"]),
        ("train={lr:1}", ["train.lr: here train.learning_rate (write train.learning_rate=1)"]),
        ("model.lora.r=8", ["model.lora.r: here model.lora.rank (write model.lora.rank=8)"]),
        ("dataset=me/pairs", [f"dataset: {SOURCES}"]),
        (
            "lora_dropout=0.1",
            [
                "lora_dropout: no dropout here: the loss of a pair does not depend on chance "
                "(leave it out)"
            ],
        ),
        (
            "seed=1",
            [
                "seed: here train.seed, of adapters and of the order of pairs; data.seed decides "
                "which records are taken (write train.seed=1)"
            ],
        ),
        # gamma / beta = 0.5 / 0.1; at the run's own beta of 2: 0.25; of the experiment's 10: 0.05.
        (
            "pref_beta=0.1 simpo_gamma=0.5",
            [
                "pref_beta: here loss.beta (write loss.beta=0.1)",
                "simpo_gamma: here loss.gamma_beta_ratio, which is gamma / beta "
                "(write loss.gamma_beta_ratio=5, at loss.beta=0.1)",
            ],
        ),
        (
            "loss.gamma=0.5",
            [
                "loss.gamma: here loss.gamma_beta_ratio, which is gamma / beta "
                "(write loss.gamma_beta_ratio=0.25, at loss.beta=2)"
            ],
        ),
        (
            "gamma=0.5 experiments=paper/gemma2_it",
            [
                "gamma: here loss.gamma_beta_ratio, which is gamma / beta "
                "(write loss.gamma_beta_ratio=0.05, at loss.beta=10)"
            ],
        ),
        (
            "loss=simper gamma=half",
            [
                "gamma: here loss.gamma_beta_ratio, which is gamma / beta "
                "(write loss.gamma_beta_ratio=GAMMA/BETA)"
            ],
        ),
    ],
)
def test_answers(line: str, answers: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        compose_run(line.split(" "))
    assert error.value.problems == answers


def test_an_answer_within_a_sweep() -> None:
    assert explain(["lr=1e-6,2e-6"], multirun=True) == [
        f"lr: here train.learning_rate (write train.learning_rate={value})"
        for value in ("1e-6", "2e-6")
    ]


def test_our_keys_come_first() -> None:
    base = CONF.compose(["loss=hinge"])
    assert unknown_key(base, "loss.odds_weight", "0.1") == "only with loss=orpo"
    assert unknown_key(base, "label_smoothing", "0.1") == (
        "here loss.label_smoothing (write loss.label_smoothing=0.1)"
    )


@pytest.mark.parametrize("command", ["train", "train -m", "preview", "generate"])
def test_settings_that_are_typed_as_options(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        f"{command} --learning-rate 1e-6 --beta=2.5 loss=simpo --simpo_gamma 1 --load_in_4bit "
        "--loss.sft_weight=0 --model mistral_base --experiment paper/gemma2_it"
    )
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "--learning_rate: here train.learning_rate (write train.learning_rate=1e-6)",
        "--beta: here loss.beta (write loss.beta=2.5)",
        "--simpo_gamma: here loss.gamma_beta_ratio, which is gamma / beta "
        "(write loss.gamma_beta_ratio=0.4, at loss.beta=2.5)",
        "--load_in_4bit: here model.quantization (write model.quantization=nf4)",
        "--loss.sft_weight: settings have no dashes (write loss.sft_weight=0)",
        "--model: settings have no dashes (write model=mistral_base)",
        "--experiment: settings have no dashes (write experiment=paper/gemma2_it)",
    ]


@pytest.mark.parametrize("words", [[], ["loss=hinge"], ["--config-dir", "."], ["--foo", "beta"]])
def test_other_words_pass(words: list[str]) -> None:
    refuse_options(words)


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        (
            "experiments/mine",
            "# @package _global_\nlearning_rate: 1e-6\n",
            "learning_rate: here train.learning_rate",
        ),
        (
            "experiments/mine",
            "# @package _global_\ntrain:\n  batch_size: 8\n",
            f"train.batch_size: {BATCH}",
        ),
        (
            "experiments/mine",
            "# @package _global_\ndata:\n  sources:\n    - {path: x, wieght: 3}\n",
            "wieght: no such key (did you mean weight?)",
        ),
        (
            "loss/mine",
            "defaults: [sigmoid, _self_]\nbetaa: 3\n",
            "loss.betaa: no such key (did you mean loss.beta?)",
        ),
        (
            "experiments/mine",
            "model.lora.rank: 8\n",
            "model.lora.rank: dots are for the command line (write model: {lora: {rank: ...}})",
        ),
        (
            "experiments/mine",
            "train: {epochs: two}\n",
            "train.epochs: Value 'two' of type 'str' could not be converted to Integer",
        ),
    ],
)
def test_a_file_of_settings(file: str, text: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / f"{file}.yaml"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(NotComposedError) as error:
        Composer(str(tmp_path)).compose([file.replace("/", "=")])
    assert str(error.value) == f"In '{file}': {fault}"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("train:\n\tepochs: 3\n", "line 2: found character '\\t' that cannot start any token"),
        ("train:\n  epochs: 1\n  epochs: 2\n", "line 3: found duplicate key epochs"),
    ],
)
def test_a_file_that_is_no_yaml(text: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "experiments" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(NotComposedError) as error:
        Composer(str(tmp_path)).compose(["experiments=mine"])
    assert str(error.value) == f"{path}: {fault}"

"""The command `simpo` and its subcommands: help, exit codes, completion in a real shell."""

import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore

from simpo.__main__ import COMMANDS, PRINTERS, main
from simpo.config.check import GROUPS
from simpo.config.composer import CONF
from simpo.config.errors import exit_codes
from simpo.config.schema import RunConfig, TrainConfig
from simpo.launch.commands.chat import KEYS as CHAT_KEYS
from simpo.launch.commands.export import KEYS as EXPORT_KEYS
from simpo.launch.commands.train import _options_first
from simpo.launch.completion import candidates

ROOT = Path(__file__).resolve().parents[2]


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    main(words)
    return capsys.readouterr().out


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_overview(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"], ["help"]):
        text = printed(words, capsys)
        assert [line.split()[0] for line in text.splitlines() if line.startswith("  ")] == [
            *COMMANDS
        ]


def test_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(["trian"], capsys) == "trian: no such command (did you mean train?)\n"
    assert refused(["loss.beta=2"], capsys) == (
        "loss.beta=2: no such command (settings follow a command: simpo train loss.beta=2)\n"
    )
    assert refused(["x"], capsys) == f"x: no such command (one of {', '.join(COMMANDS)})\n"
    assert refused(["completion", "fish"], capsys) == (
        "completion: must be one of bash, zsh, got fish\n"
    )


@pytest.mark.parametrize("command", [*COMMANDS, *PRINTERS])
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed([command, "--help"], capsys)
    assert text.startswith(f"usage: simpo {command} ")


def test_help_tells_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(["train", "--help", "loss=dpo", "loss.beta=0.3"], capsys).splitlines()
    keys = {line.strip().partition("=")[0] for line in lines if line.startswith("  ")}
    assert {f"train.{field.name}" for field in fields(TrainConfig)} <= keys
    assert {"output_dir", "data.sources.0.path", "loss.beta"} <= keys
    assert "  loss.beta=0.3" in lines and "loss.gamma_beta_ratio" not in keys
    choices = " ".join(printed(["train", "--help"], capsys).partition("Settings")[0].split())
    for group in ("model", "data", "loss", "benchmark", "backend", "launcher", "tracker"):
        assert f" {group} {', '.join(CONF.choices(group))}" in choices
    section = printed(["train", "--help", "loss"], capsys)
    assert "  loss.beta=" in section and "train.epochs" not in section


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["los"], "los: no such setting (did you mean loss?)"),
        (["loss=nonsense", "loss"], "loss: no such choice, got nonsense (choose from "),
        (["train.epochs=abc"], "train.epochs: must be a whole number, got abc"),
        (["--config-dir", "nowhere"], "--config-dir: no such folder, got nowhere"),
        (["loss.module="], "loss.module: must name a Python module such as my_losses, got nothing"),
    ],
)
def test_help_that_cannot_be_given(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(["train", "--help", *words], capsys)
    assert error.startswith(answer) and error.count("\n") == 1


def test_help_of_a_folder_of_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loss").mkdir()
    text = "defaults: [sigmoid, _self_]\nbeta: 7.5\n"
    (tmp_path / "loss" / "mine.yaml").write_text(text)
    words = ["train", "--config-dir", str(tmp_path), "loss=mine", "--help", "loss.beta"]
    assert "  loss.beta=7.5\n" in printed(words, capsys)
    # An old name of a section.
    assert "  monitor.metric=loss\n" in printed(
        ["train", "--help", "objective", "objective.metric=loss"], capsys
    )


def test_a_reader_that_leaves() -> None:
    """`simpo train --help | head -1` says nothing more."""
    command = f"{sys.executable} -m simpo train --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stderr == ""


def test_a_crash_is_not_taken_for_a_mistake_in_the_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first value of a repeated key does not count, and would be refused."""

    def crash(run: RunConfig, own_process: bool) -> dict[str, float]:
        raise ValueError(f"after {run.train.max_steps} steps")

    monkeypatch.setattr("simpo.launch.commands.train.start", crash)
    with pytest.raises(SystemExit) as ended:
        main(["train", "train.max_steps=-5", "train.max_steps=2"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.endswith("\nValueError: after 2 steps\n")


@pytest.mark.parametrize("words", [["--version"], ["train", "--version"]])
def test_version(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(words)
    assert capsys.readouterr().out == f"simpo {version('simpo')}\n"


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), exit_codes():
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("simpo tr", ["train "]),
        ("python -m simpo re", ["report "]),
        ("python3 -m simpo.pre", ["simpo.preview "]),
        ("simpo sc", ["schema "]),
        ("simpo completion b", ["bash "]),
        # Keys that do not exist.
        *((f"simpo train {key}=", []) for key in ("lsos", "", ".", "loss.", "[0]", "loss@x", "ö")),
        ("simpo train data.sources[0].=", []),
        ("simpo train lo", ["loss.", "loss="]),
        ("simpo-train trac", ["tracker.", "tracker="]),
        (
            "simpo train loss=dpo loss.",
            [
                "loss.beta=",
                "loss.compare=",
                "loss.label_smoothing=",
                "loss.margin_weights=",
                "loss.module=",
                "loss.name=",
                "loss.sft_weight=",
            ],
        ),
        ("python -m simpo.train data=ultrac", ["data=ultrachat "]),
        (
            "simpo train train.precision=",
            [f"train.precision={w} " for w in ("auto", "fp32", "bf16")],
        ),
        ("simpo train data.drop_overlap=t", ["data.drop_overlap=true "]),
        ("simpo train experiments=paper/mistral_b", ["experiments=paper/mistral_base "]),
        ("simpo train experiment=paper/mistral_b", ["experiment=paper/mistral_base "]),
        ("simpo train experiment=objectives/cpo loss.b", ["loss.beta="]),
        ("simpo train objective.metric=loss monitor.metr", ["monitor.metric="]),
        ("simpo train loss=nonsense loss.", []),
        ("simpo ch", ["chat "]),
        ("simpo chat RUN t", ["temperature=", "top_p="]),
        ("python -m simpo.chat RUN base=", ["base=true "]),
        ("simpo-chat RUN dtype=b", ["dtype=bfloat16 "]),
        ("simpo chat RUN seed=1", []),
        ("simpo chat RUN ", [f"{key}=" for key in sorted(CHAT_KEYS)]),
        ("simpo train train.tokens_per_row=", ["train.tokens_per_row=auto "]),
        # Further values of a sweep, and items of a list.
        ("simpo train -m loss=dpo,orp", ["loss=dpo,orpo "]),
        ("simpo train -m train.precision=fp32,b", ["train.precision=fp32,bf16 "]),
        (
            "simpo train experiments=[paper/gemma2_it,demo",
            ["experiments=[paper/gemma2_it,demo_full"],
        ),
        ("simpo train experiments=[demo", ["experiments=[demo_full"]),
        ("simpo train loss.beta=2,", []),
        # Within a quote that is open, and behind one that is closed.
        ("simpo train 'data=ultrac", ["data=ultrachat"]),
        ('simpo train loss=dpo "loss.b', ["loss.beta="]),
        ("simpo train 'data.sources=[{path: tr", []),
        ("simpo train 'data.sources=[{path: x, test_path: y}]' data=ultrac", ["data=ultrachat "]),
        # Options and their values.
        ("simpo train --c", ["--cfg ", "--config-dir ", "--config-name "]),
        ("simpo train --cfg ", ["job ", "hydra ", "all "]),
        ("simpo train --help mon", ["monitor "]),
        ("simpo preview --", ["--config-dir ", "--help "]),
        ("simpo report --", ["--help ", "--serve "]),
        # Keys of commands without settings, and those beside settings.
        ("simpo report DIR o", ["over="]),
        ("simpo report DIR format=c", ["format=csv "]),
        ("simpo export RUN ", [f"{key}=" for key in sorted(EXPORT_KEYS)]),
        ("simpo export RUN dtype=b", ["dtype=bfloat16 "]),
        ("simpo preview pa", ["pairs="]),
        ("simpo preview cleaning=", ["cleaning=none "]),
        ("python other.py tr", []),
    ],
)
def test_completion(line: str, found: list[str]) -> None:
    assert candidates(line, [*COMMANDS]) == found


def test_completion_of_a_folder_of_choices(tmp_path: Path) -> None:
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text("defaults: [dpo, _self_]\n")
    words = f"simpo train --config-dir {tmp_path} loss="
    assert candidates(f"{words}min", [*COMMANDS]) == ["loss=mine "]
    assert candidates(f"{words}mine loss.b", [*COMMANDS]) == ["loss.beta="]


def test_completion_of_own_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "typed_losses.py").write_text(
        "from dataclasses import dataclass\nfrom simpo.loss.simpo import HingeConfig\n"
        "@dataclass(kw_only=True)\nclass Typed(HingeConfig):\n    name: str = 'typed'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = "simpo train loss.module=typed_losses loss=typ"
    try:
        assert candidates(words, list(COMMANDS)) == ["loss=typed "]
    finally:
        del GROUPS["loss"]["typed"]
        stored = ConfigStore.instance().repo
        del stored["loss"]["typed.yaml"], stored["schema"]["loss"]["typed.yaml"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        *(
            (f"{program} loss=si", "<sigmoid ><simper ><simpo ><simpo_hinge >")
            for program in ("python -m simpo.train", "python -m simpo train")
        ),
        ("python -m simpo.tr", "<simpo.train >"),
    ],
)
def test_completion_in_bash(line: str, found: str) -> None:
    script = f"""
    export PATH={Path(sys.executable).parent}:$PATH
    eval "$(python -m simpo completion bash)"
    COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=($COMP_LINE)
    _simpo_complete
    printf '<%s>' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == found


def test_settings_may_stand_before_and_after_options() -> None:
    words = ["loss.beta=2", "-m", "a.b=1,2", "--config-dir", "my=conf", "c=3", "--cfg=job", "d=4"]
    assert _options_first(get_args_parser(), words) == [
        *("-m", "--config-dir", "my=conf", "--cfg=job"),
        *("loss.beta=2", "a.b=1,2", "c=3", "d=4"),
    ]

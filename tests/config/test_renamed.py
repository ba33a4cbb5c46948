"""Settings under an old name are read as the new ones, and one line says so."""

import hashlib
import json
from pathlib import Path

import pytest

from simpo.config import renamed
from simpo.config.check import load_run, run_yaml
from simpo.config.choices import Checkpointing, OnBadRecord
from simpo.config.compose import compose_run
from simpo.config.composer import Composer
from simpo.config.errors import ConfigError
from simpo.config.flat import run_id, trajectory
from simpo.config.renamed import first_name, first_text, rename_overrides
from simpo.run.folder import FINGERPRINTS, refuse_other_settings
from tests.support.whole_runs import finish, start

NOTE = "note   objective.metric is now monitor.metric\n"
CHOICE = """\
# @package _global_
defaults:
  - /schema/loss/sigmoid@loss
  - _self_
objective:
  mode: min
"""


@pytest.fixture(autouse=True)
def nothing_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renamed, "_noted", set())


@pytest.fixture
def composer(tmp_path: Path) -> Composer:
    """With a file of a user's, written before the setting was renamed."""
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text(CHOICE)
    return Composer(str(tmp_path))


def test_an_old_name_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    new = compose_run(["monitor.metric=loss", "monitor.mode=min"])
    assert capsys.readouterr().err == ""
    old = compose_run(["objective.metric=loss", "objective.mode=min"])
    assert capsys.readouterr().err == (
        "note   objective.metric is now monitor.metric, objective.mode is now monitor.mode\n"
    )
    assert old == new == compose_run(["objective={metric: loss, mode: min}"])
    assert run_id(old) == run_id(new) == run_id(compose_run([]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("objective.metric=a,b", "monitor.metric=a,b"),
        ("++objective.mode=min", "++monitor.mode=min"),
        ("~objective.mode", "~monitor.mode"),
        ("objective={metric: loss}", "monitor={metric: loss}"),
        (
            "hydra.sweeper.params={loss.beta: '1,2', objective.metric: 'a,b'}",
            "hydra.sweeper.params={loss.beta: '1,2', monitor.metric: 'a,b'}",
        ),
        ("hydra.sweeper.stages=[{objective.mode: a}]", "hydra.sweeper.stages=[{monitor.mode: a}]"),
        ("model.gradient_checkpointing=true", "model.gradient_checkpointing=full"),
        ("++model.gradient_checkpointing=False", "++model.gradient_checkpointing=none"),
        ("model.gradient_checkpointing=true,false", "model.gradient_checkpointing=full,none"),
        (
            "hydra.sweeper.params={model.gradient_checkpointing: 'true,false', model.x: 'true'}",
            "hydra.sweeper.params={model.gradient_checkpointing: 'full,none', model.x: 'true'}",
        ),
        ("experiment=paper/gemma2_it", "experiments=paper/gemma2_it"),
        ("+experiment=[a,b]", "+experiments=[a,b]"),
        ("experiment/objectives=a,b", "experiments/objectives=a,b"),
        ("hydra.sweeper.params={experiment: 'a,b'}", "hydra.sweeper.params={experiments: 'a,b'}"),
    ],
)
def test_overrides(old: str, new: str) -> None:
    assert rename_overrides([old]) == rename_overrides([new]) == [new]


@pytest.mark.parametrize(
    "word", ["objective.d", "-m", "--cfg", "name=objective.metric", "name=experiment", "name="]
)
def test_other_words_stay(word: str) -> None:
    assert rename_overrides([word]) == [word]


def test_both_names_are_refused(tmp_path: Path, composer: Composer) -> None:
    fault = "objective.mode: is now monitor.mode, got both (leave out objective.mode)"
    with pytest.raises(ConfigError) as error:
        compose_run(["objective.mode=min", "monitor.mode=max"])
    assert str(error.value) == fault
    choice = tmp_path / "loss" / "mine.yaml"
    choice.write_text(f"{CHOICE}monitor:\n  mode: max\n")
    with pytest.raises(ConfigError) as error:
        compose_run(["loss=mine"], composer)
    assert str(error.value) == f"loss=mine: {fault}"
    assert finish(start(["objective.mode=min", "monitor.mode=max"]), code=2) == f"{fault}\n"


def test_the_name_of_a_group_in_other_projects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = compose_run(["experiments=paper/gemma2_it"])
    assert capsys.readouterr().err == ""
    assert compose_run(["experiment=paper/gemma2_it"]) == run
    assert capsys.readouterr().err == "note   experiment is read as experiments\n"
    with pytest.raises(ConfigError) as error:
        compose_run(["experiment=demo_full", "experiments=demo_full"])
    assert str(error.value) == (
        "experiment: is read as experiments, got both (leave out experiment)"
    )
    # Folders of sweeps are named by first names, and this never was one.
    assert first_name("experiments") == "experiments"


def test_an_old_name_in_a_file_of_settings(
    composer: Composer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compose_run(["loss=mine"], composer).monitor.mode.value == "min"
    # The command line wins over a file, whatever the name in either.
    for name in ("monitor", "objective"):
        run = compose_run(["loss=mine", f"{name}.mode=max"], composer)
        assert run.monitor.mode.value == "max"
    assert capsys.readouterr().err == "note   objective.mode is now monitor.mode\n"


def test_old_names_in_what_a_sweeper_tries(tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      objective.mode: min,max\n"
    )
    config = Composer(str(tmp_path)).compose(["experiments=mine"], with_hydra=True)
    assert config.hydra.sweeper.params == {"monitor.mode": "min,max"}


def test_an_old_key_in_a_file_of_its_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    choice = "defaults:\n  - /schema/data/base@_here_\n  - _self_\nname: own\non_bad_row: drop\n"
    (tmp_path / "data" / "own.yaml").write_text(choice)
    composed = Composer(str(tmp_path)).compose(["data=own"])
    assert composed.data.on_bad_record is OnBadRecord.drop
    assert capsys.readouterr().err == "note   data.on_bad_row is now data.on_bad_record\n"


def test_the_id_of_a_run_goes_by_the_first_names() -> None:
    """So a run that was begun under them is found again."""
    run = compose_run(["data.on_bad_record=drop"])
    before = trajectory(run)
    before["data.on_bad_row"] = before.pop("data.on_bad_record")
    before["model.gradient_checkpointing"] = False
    expected = hashlib.sha256(repr(sorted(before.items())).encode()).hexdigest()[:8]
    assert run_id(run) == expected != run_id(compose_run([]))


def test_old_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Recomputing activations was a switch: a run begun with it keeps its id and its settings."""
    for old, new in ((True, "full"), (False, "none")):
        word = str(old).lower()
        run = compose_run([f"model.gradient_checkpointing={word}"])
        assert run == compose_run([f"model.gradient_checkpointing={new}"])
        noted = f"note   model.gradient_checkpointing={word} is now {new}\n"
        assert capsys.readouterr().err == noted
        before = trajectory(run) | {"model.gradient_checkpointing": old}
        before["data.on_bad_row"] = before.pop("data.on_bad_record")
        expected = hashlib.sha256(repr(sorted(before.items())).encode()).hexdigest()[:8]
        assert run_id(run) == expected
        file = tmp_path / "run.yaml"
        text = run_yaml(run)
        file.write_text(text.replace(f"_checkpointing: {new}\n", f"_checkpointing: {word}\n"))
        assert file.read_text() != text and load_run(file) == run
        data = {"settings": json.loads(json.dumps(before)), **dict.fromkeys(FINGERPRINTS, "")}
        (tmp_path / "data.json").write_text(json.dumps(data))
        refuse_other_settings(run, tmp_path)
        with pytest.raises(ConfigError):
            refuse_other_settings(compose_run(["model.gradient_checkpointing=selective"]), tmp_path)
    assert first_text("model.gradient_checkpointing", "full,none") == "true,false"
    assert first_text("model.path", "full,none") == "full,none"


def test_an_old_value_in_a_file_of_settings(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "defaults:\n  - smollm2\n  - _self_\ngradient_checkpointing: true\n"
    )
    run = compose_run(["model=mine"], Composer(str(tmp_path)))
    assert run.model.gradient_checkpointing is Checkpointing.full


def test_an_old_run_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = compose_run(["monitor.metric=loss", "monitor.mode=min"])
    file = tmp_path / "run.yaml"
    text = run_yaml(run).replace("\nmonitor:\n", "\nobjective:\n")
    file.write_text(text.replace("  on_bad_record: ", "  on_bad_row: "))
    assert not {"monitor:", "on_bad_record:"} & set(file.read_text().split())
    assert load_run(file) == run
    assert capsys.readouterr().err == ""  # nobody is to edit the file of a run


def test_the_command_says_it_once() -> None:
    process = start(["objective.metric=loss", "--cfg", "job"])
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors == NOTE
    assert "monitor:\n  metric: loss\n" in output and "objective" not in output


def test_a_run_begun_under_the_old_names_has_the_same_settings(tmp_path: Path) -> None:
    run = compose_run(["data.on_bad_record=drop", "monitor.metric=loss"])
    text = run_yaml(run).replace("\nmonitor:\n", "\nobjective:\n")
    (tmp_path / "run.yaml").write_text(text.replace("  on_bad_record: ", "  on_bad_row: "))
    settings = json.loads(json.dumps(trajectory(run)))
    settings["data.on_bad_row"] = settings.pop("data.on_bad_record")
    data = {"settings": settings, **dict.fromkeys(FINGERPRINTS, "")}
    (tmp_path / "data.json").write_text(json.dumps(data))
    refuse_other_settings(run, tmp_path)
    with pytest.raises(ConfigError) as error:
        refuse_other_settings(compose_run([]), tmp_path)
    assert str(error.value) == (
        f"data.on_bad_record: the run in {tmp_path} has drop, got stop "
        "(restore it, or choose another folder)"
    )

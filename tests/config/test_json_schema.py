"""The JSON schema of the settings takes what OmegaConf takes, and every file that is shipped."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from simpo.__main__ import main
from simpo.config.check import GROUPS, run_yaml
from simpo.config.compose import compose_run
from simpo.config.json_schema import settings_schema
from simpo.config.losses import LOSSES
from simpo.config.paths import config_dir
from simpo.config.schema import RunConfig

SCHEMA = settings_schema()
DEFINITIONS = SCHEMA["definitions"]
FILES = sorted(
    path for folder in ("conf", "experiments") for path in config_dir(folder).rglob("*.yaml")
)
COMMENT = re.compile(
    r"^# yaml-language-server: \$schema=([\w./]+\.json)(?:#/definitions/(\S+))?$", re.M
)


def content(path: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(path))


def schema_of(path: Path) -> dict[str, Any]:
    """The schema that the comment of a file names."""
    (named,) = COMMENT.findall(path.read_text(encoding="utf-8"))
    file, definition = named
    schema = json.loads((path.parent / file).read_text(encoding="utf-8"))
    return schema["definitions"][definition] if definition else schema


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    return Draft7Validator(schema).is_valid(value)


def test_it_is_a_schema() -> None:
    Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_file(path: Path) -> None:
    schema, values = schema_of(path), content(path)
    assert [error.message for error in Draft7Validator(schema).iter_errors(values)] == []
    assert not is_valid(values | {"betaa": 1}, schema)
    for key in values:
        assert not is_valid(values | {key: [[1]]}, schema), key
    is_whole_run = "@package _global_" in path.read_text() or path.name == "train.yaml"
    assert ("train" in schema["properties"]) == is_whole_run


def test_the_comment_names_the_schema_of_the_choice() -> None:
    """The class is that of the defaults list: /schema/loss/dpo, or another choice."""
    for path in FILES:
        schema, group = schema_of(path), path.parent.name
        if "train" not in schema["properties"]:
            first = content(path)["defaults"][0]
            kind = first.removeprefix(f"/schema/{group}/").partition("@")[0]
            assert schema == DEFINITIONS[f"{group}.{kind}"], path


def test_keys_that_choices_have_with_other_types() -> None:
    """tracker=wandb has a list of tags, tracker=mlflow names them."""
    for tags in (["a"], {"a": "b"}):
        assert is_valid({"tracker": {"tags": tags}}, SCHEMA)
    assert not is_valid({"tracker": {"tags": 3}}, SCHEMA)


VALUES = (1, 1.5, "a", True, None, [1], ["a"], {"a": 1}, {"a": "b"}, [{"path": "x"}], [{"p": 1}])
# OmegaConf turns these into what is wanted; in a file they are rather a mistake.
CONVERTED = [("string", True), ("boolean", 1), ("boolean", 1.5), ("number", "1")]


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_it_takes_the_values_that_the_dataclass_takes(definition: str) -> None:
    group, name = definition.split(".")
    schema = DEFINITIONS[definition]
    config = OmegaConf.structured(GROUPS[group][name])
    assert {*schema["properties"]} == {*config, "defaults"}
    for key in config:
        assert is_valid({key: "${loss.beta}"}, schema) and is_valid({key: "???"}, schema)
        first = schema["properties"][key]["type"][0]
        for value in VALUES:
            converted = (first, value) in [(kind, one) for kind, one in CONVERTED if one is value]
            taken = accepts(config, key, value) and not converted
            assert is_valid({key: value}, schema) == taken, (key, value)


def accepts(config: Any, key: str, value: Any) -> bool:
    try:
        if key == "sources":
            OmegaConf.merge(config, {key: value})
        else:  # merging takes sections for items of an empty list of texts
            config.copy()[key] = value
    except OmegaConfBaseException:
        return False
    return True


def test_a_whole_run_has_all_sections_and_the_keys_of_all_choices() -> None:
    sections = {*OmegaConf.structured(RunConfig)}
    assert {*SCHEMA["properties"]} == {*sections, "defaults", "hydra"}
    loss = SCHEMA["properties"]["loss"]["properties"]
    assert {
        key for name in GROUPS["loss"] for key in OmegaConf.structured(GROUPS["loss"][name])
    } == {*loss}
    assert loss["label_smoothing"]["description"] == (
        "Assumed share of pairs whose labels are swapped; below 0.5. Only with loss="
        + " or ".join(name for name, kind in LOSSES.items() if hasattr(kind, "label_smoothing"))
        + "."
    )
    assert loss["margin"]["default"] == 0.5
    assert "default" not in loss["beta"], "it differs by loss"


def test_a_whole_number_or_a_word() -> None:
    for value, taken in ((512, 1), ("auto", 1), ("${x}", 1), ("most", 0), (1.5, 0), (True, 0)):
        assert is_valid({"train": {"tokens_per_row": value}}, SCHEMA) == taken, value


@pytest.mark.parametrize(
    "words", [[], ["loss=dpo", "backend=zero3"], ["launcher=slurm"]], ids=" ".join
)
def test_a_run_yaml(words: list[str]) -> None:
    values = OmegaConf.to_container(OmegaConf.create(run_yaml(compose_run(words))))
    assert isinstance(values, dict)
    assert [error.message for error in Draft7Validator(SCHEMA).iter_errors(values)] == []
    assert not is_valid(values | {"train": {"epochs": 1.5}}, SCHEMA)
    assert not is_valid(values | {"data": {"sources": [{"path": "x", "wieght": 2}]}}, SCHEMA)


def test_the_command_knows_a_loss_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "schema_losses.py").write_text(
        "from dataclasses import dataclass\n"
        "from simpo.loss.simpo import SigmoidConfig\n"
        "@dataclass(kw_only=True)\n"
        "class SteepConfig(SigmoidConfig):\n"
        "    name: str = 'steep'\n"
        "    power: int = 2\n"
        "    '''Power of the margin.'''\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(GROUPS, "loss", dict(GROUPS["loss"]))
    main(["schema", "loss.module=schema_losses"])
    schema = json.loads(capsys.readouterr().out)
    assert schema["definitions"]["loss.steep"]["properties"]["power"]["default"] == 2
    assert schema["properties"]["loss"]["properties"]["power"]["description"] == (
        "Power of the margin. Only with loss=steep."
    )
    assert is_valid({"loss": {"power": 3}}, schema) and not is_valid({"loss": {"power": 3}}, SCHEMA)
    with pytest.raises(SystemExit):
        main(["schema", "loss=dpo"])
    assert capsys.readouterr().err == "schema: takes only loss.module=MODULE, got loss=dpo\n"

"""A run.yaml as runs write it is read without OmegaConf, and just as OmegaConf reads it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from simpo.config.check import GROUPS, _merged_run, run_yaml
from simpo.config.compose import compose_run
from simpo.config.composer import CONF
from simpo.config.flat import settings
from simpo.config.plain import read_plain
from simpo.config.schema import RunConfig

base_run = cache(partial(compose_run, []))


def assert_read_alike(file: Path) -> RunConfig:
    """By both readers: the same values, of the same types, in the same order."""
    plain = read_plain(file, GROUPS)
    assert plain is not None
    merged = _merged_run(file, check=True)
    assert repr(plain) == repr(merged)
    assert repr(settings(plain)) == repr(settings(merged))
    return plain


@pytest.mark.parametrize("name", CONF.choices("experiments"))
def test_every_experiment(name: str, tmp_path: Path) -> None:
    run = compose_run([f"experiments={name}"])
    assert run_yaml(run) == OmegaConf.to_yaml(OmegaConf.structured(run))
    (tmp_path / "run.yaml").write_text(run_yaml(run))
    assert repr(assert_read_alike(tmp_path / "run.yaml")) == repr(run)


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group, kinds in GROUPS.items() for name in kinds]
)
def test_every_schema_of_a_group(group: str, name: str, tmp_path: Path) -> None:
    if group == "tracker":  # composed, since a default of mlflow's is made from another setting
        run = compose_run([f"tracker={name}"])
    else:
        run = base_run()
        run = run if name == "base" else replace(run, **{group: GROUPS[group][name]()})
    (tmp_path / "run.yaml").write_text(run_yaml(run))
    assert repr(assert_read_alike(tmp_path / "run.yaml")) == repr(run)


@pytest.fixture(scope="module")
def written() -> str:
    """A run.yaml with lists, mappings and text that looks like numbers."""
    source = "{path: a/b, columns: {prompt: p}, subset: '1e3'}"
    lists = ["model.lora.targets=[q_proj,'7']", "+model.chat_template_kwargs.think=false"]
    return run_yaml(compose_run([f"data.sources=[{source}]", *lists, "train.max_steps=3"]))


def test_texts_that_look_like_other_values(tmp_path: Path) -> None:
    texts = ["1e3", "0x1", "no", "null", "2024-01-31", " a ", "# b", "a: b", "[c", "", "d\te"]
    texts += ["\u65e5\u672c", "\U0001f600 " * 40, "'", '"', "\u2028", "word " * 40]
    mixed = {str(number): text for number, text in enumerate(texts)} | {"on": True, "two": 2.5}
    model = replace(base_run().model, chat_template_kwargs=mixed)
    run = replace(base_run(), model=model)
    (tmp_path / "run.yaml").write_text(run_yaml(run), encoding="utf-8")
    assert repr(assert_read_alike(tmp_path / "run.yaml")) == repr(run)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("  beta: 2.0", "  beta: 2"),
        ("  beta: 2.0", "  beta: 25e-1"),
        ("  beta: 2.0\n", ""),
        ("  beta: 2.0", "  beta: .nan"),
        ("  max_steps: 3", "  max_steps: null"),
        ("  max_steps: 3", "  max_steps: 1_000"),
        ("  tokens_per_row: 1024", "  tokens_per_row: auto"),
        ("  tokens_per_row: 1024", "  tokens_per_row: '512'"),
        ("  revision: null", "  revision: 2024-01-31"),
        ("    think: false", "    think: 2.5\n    other: text\n    more: true"),
    ],
)
def test_edited_files(old: str, new: str, written: str, tmp_path: Path) -> None:
    assert old in written
    file = tmp_path / "run.yaml"
    file.write_text(written.replace(old, new, 1))
    assert_read_alike(file)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  beta: 2.0", "  beta: ${train.learning_rate}"),
        ("  beta: 2.0", "  beta: true"),
        ("  beta: 2.0", "  beta: 2.0\n  beta: 3.0"),
        ("  beta: 2.0", "  betaa: 2.0"),
        ("  name: sigmoid", "  name: unheard"),
        ("  module: null", "  module: my_losses"),
        ("  schedule: cosine", "  schedule: COSINE"),
        ("  max_steps: 3", "  max_steps: 3.0"),
        ("  revision: null", "  revision: ???"),
        ("  revision: null", "  revision: 7"),
        ("  - q_proj", "  - ${name}"),
        ("    prompt: p", "    7: p"),
        ("    think: false", "    think: [${name}]"),
        ("monitor:\n", "objective:\n"),
        ("\nloss:\n", "\nlosses:\n"),
        ("  - path: a/b\n    ", "  - "),
        ("\nmodel:\n", "\nmodel: [\n"),
    ],
)
def test_what_is_left_to_omegaconf(old: str, new: str, written: str, tmp_path: Path) -> None:
    assert old in written
    file = tmp_path / "run.yaml"
    file.write_text(written.replace(old, new, 1))
    assert read_plain(file, GROUPS) is None
    assert read_plain(tmp_path / "missing.yaml", GROUPS) is None

"""Choices that were composed before are not composed again, and nobody can tell."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from simpo.config import composer
from simpo.config.check import _resolved, build_run
from simpo.config.compose import compose_run
from simpo.config.composer import CONF, NotComposedError
from simpo.config.paths import config_dir

SOURCE = "data.sources=[{path: builtin:demo, weight: 2}]"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["loss.beta=3"],
        ["loss.beta=3", "loss.beta=4", "train.seed=7"],
        # Values before choices, and of a section that a choice replaces.
        ["loss.beta=3", "loss=hinge"],
        ["loss={beta: 5}", "loss=dpo", "train={seed: 3, epochs: 2}"],
        # The later of two values stays.
        ["loss.beta=6", "loss={beta: 5}", "model={path: x}", "model.path=y"],
        ["experiments=objectives/cpo", "loss.beta=0.5", "+experiments=[]"],
        ["data=jsonl", SOURCE, "data.seed=${train.seed}", "name=${loss.name}-${train.seed}"],
        ["+model.chat_template_kwargs.think=false", "++train.seed=3", "model.lora.targets=[a,'7']"],
        ["output_dir=there", "backend=zero3", "launcher=slurm"],
        # What cannot be composed.
        ["loss.bta=3"],
        ["loss.beta=x"],
        ["loss=nothing", "loss.beta=3"],
        ["loss.beta=1,2"],
        ["+loss.beta=3"],
        ["~train.seed"],
        ["~loss"],
        ["loss@train=dpo"],
        ["train.seed@x=3"],
        ["nothing=3"],
        ["train=3"],
    ],
)
def test_as_hydra_composes_all_at_once(words: list[str]) -> None:
    def by_hydra() -> str:
        with initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
            return OmegaConf.to_yaml(compose("train", words))

    for _ in range(2):
        try:
            expected = by_hydra()
        except Exception as error:
            with pytest.raises(NotComposedError) as found:
                CONF.compose(words)
            assert repr(found.value.__cause__) == repr(error)
        else:
            config = CONF.compose(words)
            assert OmegaConf.to_yaml(config) == expected
            # The next one gets a copy of its own.
            OmegaConf.update(config, "train.seed", 99)


@pytest.mark.parametrize("words", [["tracker=mlflow"], ["data=jsonl", SOURCE], ["backend=zero2"]])
def test_a_run_is_as_omegaconf_builds_it(words: list[str]) -> None:
    config = CONF.compose(words)
    kinds = {group: OmegaConf.get_type(config, group) for group in composer.GROUPS}
    assert repr(build_run(config)) == repr(OmegaConf.to_object(_resolved(config, kinds)))


def test_a_file_that_is_edited_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {name: tmp_path / name for name in ("conf", "experiments")}
    for name, folder in folders.items():
        shutil.copytree(config_dir(name), folder)
    monkeypatch.setattr(composer, "config_dir", folders.__getitem__)
    file = folders["conf"] / "loss" / "hinge.yaml"
    text = file.read_text()
    for beta in (3.0, 4.0):
        file.write_text(f"{text}\nbeta: {beta}\n")
        assert compose_run(["loss=hinge"]).loss.beta == beta  # type: ignore[attr-defined]

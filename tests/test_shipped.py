"""Every file of experiments/ trains for two steps, with a tiny model and tiny data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from simpo.config.compose import compose_run
from simpo.config.paths import config_dir
from simpo.data.demo.records import demo_records
from simpo.loop.train import train
from simpo.run.files import read_results

EXPERIMENTS = config_dir("experiments")
FILES = sorted(path.relative_to(EXPERIMENTS) for path in EXPERIMENTS.rglob("*.yaml"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and the cache of their tokens."""
    folder = tmp_path_factory.mktemp("shipped")
    for split in ("train", "test"):
        rows = demo_records(0, split)[:4]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def first_member(file: Path) -> list[str]:
    """The first value of each setting that an experiment sweeps, the lowest of an interval."""
    content = yaml.safe_load((EXPERIMENTS / file).read_text())
    sweeper = content.get("hydra", {}).get("sweeper", {})
    swept = [sweeper.get("params", {}), *sweeper.get("stages", [])]
    return [
        f"{key}={str(values).rpartition('(')[2].split(',')[0]}"
        for settings in swept
        for key, values in settings.items()
    ]


@pytest.mark.matrix
@pytest.mark.parametrize("file", FILES, ids=str)
def test_shipped_experiments_train(
    file: Path, shared: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    run = compose_run(
        [
            f"experiments={file.with_suffix('').as_posix()}",
            *first_member(file),
            f"model.path={tiny_folder}",
            "model.tokenizer=null",
            # Those shipped are of tokens that the tiny tokenizer lacks.
            "model.chat_template=null",
            f"data.sources=[{{path: {shared}/train.jsonl, test_path: {shared}/test.jsonl}}]",
            "data.max_length_tokens=512",
            "data.max_prompt_tokens=400",
            "train.pairs_per_step=2",
            "train.tokens_per_row=2048",
            "train.max_steps=2",
            "train.precision=fp32",
            "sample.num_prompts=0",
            f"cache_dir={shared}",
            f"run_dir={tmp_path}/run",
            "backend.device=cpu",
        ]
    )
    assert "loss" in read_results(train(run))["eval_after"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2
    assert list((tmp_path / "run/model").glob("*.safetensors"))

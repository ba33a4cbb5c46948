"""Figures in a model's folder, as the hub's own reader takes them."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResultEntry, parse_eval_result_entries

from simpo.judging.hub_results import write_hub_result
from simpo.run.judged import Figure, Judged


def judged(benchmark: str, questions: int) -> Judged:
    figures = {"pass_rate": Figure(20.0), "pass_rate_loose": Figure(100 * 67 / 294, 18.0, 28.0)}
    return Judged(benchmark, benchmark, "m", "", "programs", figures, {}, questions, 0)


def test_the_hub_reads_what_was_written(tmp_path: Path) -> None:
    write_hub_result(judged("ifbench", 294), tmp_path)
    (file,) = (tmp_path / ".eval_results").iterdir()
    assert file.name == "ifbench.yaml"
    today = date.today().isoformat()
    assert parse_eval_result_entries(yaml.safe_load(file.read_text())) == [
        EvalResultEntry("allenai/IFBench_test", "prompt_level_loose", 22.79, date=today)
    ]


@pytest.mark.parametrize(("benchmark", "questions"), [("ifbench", 265), ("mt_bench", 80)])
def test_nothing_of_a_part_or_of_a_benchmark_that_the_hub_does_not_know(
    benchmark: str, questions: int, tmp_path: Path
) -> None:
    write_hub_result(judged(benchmark, questions), tmp_path)
    assert not list(tmp_path.iterdir())

"""Writes figures as the model hub shows them: `.eval_results/<benchmark>.yaml` in a model's folder.

See https://huggingface.co/docs/hub/eval-results.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path

import yaml

from simpo.report.hub_results import FOLDER
from simpo.run.atomic import make_folder, write_text
from simpo.run.judged import Judged


@dataclass(frozen=True)
class Task:
    """A figure that the hub has a leaderboard of.

    Attributes:
        dataset, task: the benchmark's data set on the hub, and the name of the figure there.
        figure: our key of it.
        questions: of the whole benchmark.
    """

    dataset: str
    task: str
    figure: str
    questions: int


TASKS = {"ifbench": Task("allenai/IFBench_test", "prompt_level_loose", "pass_rate_loose", 294)}
"""By `benchmark.name`. The data sets of the other benchmarks are not registered on the hub."""


def write_hub_result(judged: Judged, model: Path) -> None:
    """Write a figure into the folder of the model that it is of.

    Nothing is written if the hub does not know the benchmark, or of a part of its questions. Other
    files of the folder stay.

    Raises:
        RunError: it cannot be written.
    """
    task = TASKS.get(judged.benchmark)
    if task is None or judged.questions != task.questions:
        return
    entry = {
        "dataset": {"id": task.dataset, "task_id": task.task},
        "value": round(judged.figures[task.figure].value, 2),
        "date": date.today().isoformat(),
    }
    folder = model / FOLDER
    make_folder(folder)
    write_text(folder / f"{judged.benchmark}.yaml", yaml.safe_dump([entry], sort_keys=False))

"""simpo from Python: `from simpo import load_run_config, train, preview`. See docs/python.md."""

from __future__ import annotations

import gc
import html
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpo.config.compose import compose_run
from simpo.config.composer import Composer, written
from simpo.config.errors import ConfigError, DataError
from simpo.config.errors import SimpoError as SimpoError
from simpo.config.errors import Stopped as Stopped
from simpo.config.schema import RunConfig
from simpo.data.reading.own_records import write_records
from simpo.launch.start import start
from simpo.run.files import read_metrics, read_results
from simpo.run.tables import markdown_table, result_lines

Records = Iterable[Mapping[Any, Any]]
PAGE = '<iframe srcdoc="{}" style="width: 100%; height: 640px; border: 1px solid #8888"></iframe>'
"""A page inside a notebook, whose styles stay its own."""


def load_run_config(
    *overrides: str | Mapping[str, Any],
    pairs: Records | None = None,
    held_out_pairs: Records | None = None,
    config_dir: str | Path | None = None,
) -> RunConfig:
    """Compose and check the settings of a run.

    Args:
        overrides: words of a command line, such as `"model=mistral_base"`; or dicts, such as
            `{"loss.beta": 2.5}`, whose values need no quotes.
        pairs: records to train on, of any shape in docs/data.md. They are written to a file below
            `cache_dir`, which the settings name.
        held_out_pairs: records to evaluate on.
        config_dir: a folder with choices of your own, as `--config-dir`.

    Raises:
        ConfigError: with every fault of the settings.
        DataError: a record is not a dict, or cannot be written as JSON.
    """
    composer = Composer(None if config_dir is None else str(config_dir))
    words: list[str] = []
    for given in overrides:
        if not isinstance(given, str | Mapping):
            kind = type(given).__name__
            fault = f"settings: must be words or dicts, got {kind} (of a list: write * before it)"
            raise ConfigError([fault])
        words += [given] if isinstance(given, str) else [written(k, v) for k, v in given.items()]
    if pairs is None:
        if held_out_pairs is not None:
            raise ConfigError(["held_out_pairs: need pairs to train on (set pairs)"])
        return compose_run(words, composer)
    if own := [word for word in words if word.startswith(("data=", "data.sources="))]:
        raise ConfigError([f"pairs: are the data of the run, got {own[0]} too (leave it out)"])
    # The sources do not exist yet, and the folder of their files is a setting itself.
    drafted = compose_run(["data=jsonl", "data.sources=[{path: builtin:demo}]", *words], composer)
    folder = Path(drafted.cache_dir).expanduser().absolute() / "pairs"
    source = {"path": write_records(pairs, "pairs", folder)}
    if held_out_pairs is not None:
        source["test_path"] = write_records(held_out_pairs, "held_out_pairs", folder)
    return compose_run(["data=jsonl", *words, written("data.sources", [source])], composer)


@dataclass(frozen=True, repr=False)
class TrainedRun:
    """The result of a finished run.

    Attributes:
        folder: the run's folder (docs/run_folder.md).
        steps: updates done.
        model_step: updates done before the model was saved; fewer than `steps` if
            `train.keep_best` kept an earlier one.
        eval_before: held-out metrics before the first step; empty if nothing is held out.
        eval_after: those of the saved model.
    """

    folder: Path
    steps: int
    model_step: int
    eval_before: dict[str, float] = field(default_factory=dict)
    eval_after: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def read(folder: str | Path) -> TrainedRun:
        """Read the result of a run from its folder.

        Raises:
            DataError: the run has not finished, or its files are damaged.
        """
        path = Path(folder).expanduser()
        if not (results := read_results(path)):
            raise DataError(f"{path}: holds no finished run")
        return TrainedRun(
            path,
            results["train"]["steps"],
            results["train"]["model_step"],
            results["eval_before"],
            results["eval_after"],
        )

    @property
    def model(self) -> Path:
        """The folder of the trained model or adapter, which transformers loads."""
        return self.folder / "model"

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl: `step`, and keys that start with `train/` or `eval/`."""
        return read_metrics(self.folder / "metrics.jsonl")

    def __repr__(self) -> str:
        table = result_lines(self.eval_before, self.eval_after)
        lines = [f"model {self.model}, after step {self.model_step} of {self.steps}"]
        return "\n".join([*lines, *(markdown_table(table) if table else [])])


def train(run: RunConfig) -> TrainedRun:
    """Train, evaluate and save a run, or continue it where it stopped.

    Runs in this process, or starts the processes that `backend` asks for. Ctrl-C, or the interrupt
    of a notebook, saves after the current step.

    Raises:
        Stopped: a signal or Ctrl-C stopped the run, which has been saved: call `train` with the
            same settings to continue.
        SimpoError: the settings or the data cannot be used, or the run failed.
        KeyboardInterrupt: a Ctrl-C before the first step, or a second one.
    """
    _check(run)
    try:
        return TrainedRun.read(start(run))
    except BaseException as error:
        _let_go(error)
        raise
    finally:
        gc.collect()


def _check(run: object) -> None:
    if not isinstance(run, RunConfig):
        kind = type(run).__name__
        raise ConfigError([f"run: must be made by load_run_config, got {kind}"])


def _let_go(error: BaseException | None) -> None:
    """Clear the variables in the traceback of an error, which a notebook keeps.

    Model and optimizer would stay in memory, and the folder of the run locked.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@dataclass(frozen=True, repr=False)
class Preview:
    """What a run would be trained on; `text` for a terminal, `page` as HTML."""

    text: str
    page: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return PAGE.format(html.escape(self.page))


def preview(run: RunConfig, pairs: int = 3) -> Preview:
    """What a run would be trained on: messages, template text, tokens and packed rows.

    The weights of the model are not loaded. A notebook shows the page, `print` the text.

    Args:
        pairs: number of pairs shown.

    Raises:
        SimpoError: the settings or the data cannot be used.
    """
    _check(run)
    if not isinstance(pairs, int) or pairs < 1:
        raise ConfigError([f"pairs: must be 1 or more, got {pairs}"])
    from simpo.previewing.stages import Stages, page, text

    stages = Stages.of(run, pairs)
    return Preview(text(stages), page(stages))

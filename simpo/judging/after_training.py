"""Judges the model of a run at its end, and adds the figures to the run's results."""

from __future__ import annotations

import gc
from dataclasses import asdict, replace
from pathlib import Path

import torch

from simpo.config.errors import RunError, SimpoError, Stopped, first_line
from simpo.config.schema import RunConfig
from simpo.judging.judge import judge
from simpo.model.saved import saved_model
from simpo.run.files import read_results, read_status, status_or_none
from simpo.run.folder import RunFolder
from simpo.run.judged import Judged
from simpo.run.progress import say
from simpo.run.signals import stopping_at_once


def judge_trained(run: RunConfig, path: Path) -> None:
    """Judge the saved model of a run on `benchmark`, and finish the run.

    Each figure becomes a metric of `eval_after` in results.json, by its key.

    Raises:
        ConfigError: another process works in the folder.
        RunError: the model could not be judged; it stays saved.
        Stopped: a signal or Ctrl-C ended it; answers and verdicts so far are kept.
    """
    own, name = replace(run, run_dir=str(path)), run.benchmark.name
    folder, status = RunFolder(own), read_status(path)
    at = status.get("step", 0), status.get("total_steps", 0)
    with (
        folder.recording_failure(),
        stopping_at_once(f"trained, not yet judged, in {path}", run.train.stopped_exit_code),
    ):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        folder.write_status("running", *at, judging=name)
        say(f"judging the model on {name} ...")
        try:
            (judged,) = judge(own, [str(path)])
        except Stopped:
            raise
        except SimpoError as error:
            raise RunError(
                f"{path}: the model is saved, but not judged: {first_line(error)} (the same "
                f"command judges it without training again, and so does simpo judge {path} "
                f"benchmark={name} with a judge)"
            ) from error
        _finish(folder, judged)


def finish_trained(run: RunConfig, source: str, judged: Judged) -> None:
    """Finish a run that had yet to be judged, if this was done as its own settings ask.

    Any judge will do. If other settings of the benchmark differ, a line says so.

    Args:
        run: the settings of this command.
        source: what was judged; it need not be a run.

    Raises:
        ConfigError: another process works in the folder.
        RunError: the folder cannot be written.
    """
    if not Path(source).expanduser().is_dir():
        return
    own = saved_model(source).run
    if own is None or own.run_dir is None:
        return
    path = Path(own.run_dir)
    if status_or_none(path).get("judging") != judged.benchmark:
        return
    wanted, was = asdict(own.benchmark), asdict(run.benchmark)
    others = [f"benchmark.{key}={wanted[key]}" for key in wanted if wanted[key] != was[key]]
    if others:
        say(
            f"note   {path} is still to be judged with {' '.join(others)} (add that, and the run "
            "is finished)"
        )
        return
    folder = RunFolder(own)
    with folder.recording_failure():
        _finish(folder, judged)


def _finish(folder: RunFolder, judged: Judged) -> None:
    status, results = read_status(folder.path), read_results(folder.path)
    results["eval_after"] |= {key: figure.value for key, figure in judged.figures.items()}
    folder.write_json("results.json", results)
    folder.write_status("finished", status.get("step", 0), status.get("total_steps", 0))

"""simpo from Python: settings, own pairs, runs in this process and in others, notebooks."""

from __future__ import annotations

import gc
import html
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import simpo
from simpo import SimpoError, Stopped, TrainedRun, load_run_config, preview, train
from simpo.config.check import load_run
from simpo.config.composer import CONF, written
from simpo.config.errors import ConfigError, DataError
from simpo.config.flat import run_id
from simpo.data.demo.records import demo_records
from simpo.data.mixture import load_mixture
from simpo.launch.commands.preview import main as preview_command
from simpo.loop import train as loop
from tests.support.whole_runs import assert_same_run, finish, metrics_of, start, status_of, wait_for

ROOT = Path(__file__).resolve().parents[1]
PAIR = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}


def demo_pairs(split: str, count: int) -> list[dict[str, Any]]:
    return demo_records(0, split)[:count]


def tiny_settings(tiny_run: list[str]) -> list[str]:
    """The settings of a tiny run without its data, which a test gives as lists."""
    return [word for word in tiny_run if not word.startswith("data")]


def of_pairs(tiny_run: list[str], *more: str) -> simpo.RunConfig:
    pairs, held_out = demo_pairs("train", 24), demo_pairs("test", 16)
    words = [*tiny_settings(tiny_run), *more]
    return load_run_config(*words, pairs=pairs, held_out_pairs=held_out)


def test_importing_simpo_is_light() -> None:
    code = "import sys, simpo; print(sorted({'torch', 'hydra', 'omegaconf'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_the_names_are_functions_whatever_was_imported() -> None:
    for name in ("train", "preview"):
        importlib.import_module(f"simpo.launch.commands.{name}")
        message = rf"simpo\.{name} is a function \(from simpo import {name}\)"
        with pytest.raises(ImportError, match=f"^{message}$"):
            importlib.import_module(f"simpo.{name}")
        assert getattr(simpo, name).__module__ == "simpo.launch.api"
    assert set(simpo.__all__) == {name for name in simpo.__all__ if hasattr(simpo, name)}


# Text is read as in YAML files: ${...} is another setting, and ??? is missing.
TEXT = st.text().filter(lambda text: "${" not in text and text != "???")
NAME = st.from_regex(r"[A-Za-z_][\w .,:=()\[\]{}-]*", fullmatch=True).filter(str.isascii)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUE = st.recursive(
    SCALAR, lambda inner: st.lists(inner) | st.dictionaries(NAME, inner), max_leaves=8
)


@settings(max_examples=8, deadline=None, database=None)
@given(st.lists(VALUE, min_size=4, max_size=20))
def test_values_arrive_unchanged(values: list[Any]) -> None:
    key = "model.chat_template_kwargs.values"
    composed = CONF.compose([f"+{written(key, values)}"])
    found: Any = OmegaConf.to_container(composed.model.chat_template_kwargs)
    assert repr(found["values"]) == repr(values)


def test_values_of_other_types() -> None:
    assert written("a", (np.int64(3), np.float32(0.5), Path("x y"))) == "a=[3,0.5,'x y']"
    run = load_run_config("loss.sft_weight=0.1", {"loss.beta": 2.5, "train.max_steps": None})
    assert (run.loss.sft_weight, run.loss.beta, run.train.max_steps) == (0.1, 2.5, None)  # type: ignore[attr-defined]
    assert load_run_config({"name": "${model.name}-'it''s' \"x\", [y]"}).name == (
        "smollm2-'it''s' \"x\", [y]"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss.betaa": 2}, "loss.betaa: no such key (did you mean loss.beta?)"),
        (
            {"loss.beta": {1, 2}},
            "loss.beta: must be text, a number, true or false, None, a list or a dict, got {1, 2}",
        ),
        (
            {"data.sources": [{"path": "builtin:demo", "columns": {"früher": "prompt"}}]},
            "data.sources: the names in [{'path': 'builtin:demo', 'columns': {'früher': "
            "'prompt'}}] must be plain letters, digits and _ (use a file of config_dir)",
        ),
        (
            {"loss beta": 2},
            "loss beta: the key must be plain letters, digits and _ (use a file of config_dir)",
        ),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(given)
    assert str(caught.value) == message


def test_what_is_given_in_place_of_settings() -> None:
    message = "settings: must be words or dicts, got list (of a list: write * before it)"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load_run_config(["loss=dpo"])  # type: ignore[arg-type]
    for call in (train, preview):
        with pytest.raises(ConfigError, match=r"^run: must be made by load_run_config, got list$"):
            call([PAIR])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^pairs: must be 1 or more, got 0$"):
        preview(load_run_config(), pairs=0)


def test_choices_of_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    for line in ("# @package _global_\n", ""):
        (tmp_path / "experiments/mine.yaml").write_text(f"{line}loss: {{beta: 7}}\n")
        run = load_run_config("experiments=mine", config_dir=tmp_path)
        assert run.loss.beta == 7  # type: ignore[attr-defined]


def test_beside_a_program_that_uses_hydra(tmp_path: Path) -> None:
    """And in threads, although Hydra has one loader in a process."""
    (tmp_path / "own.yaml").write_text("colour: blue\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        with ThreadPoolExecutor(4) as pool:
            runs = pool.map(load_run_config, [f"loss.beta={beta}" for beta in range(1, 9)])
        assert [run.loss.beta for run in runs] == [*range(1, 9)]  # type: ignore[attr-defined]
        assert compose("own").colour == "blue"


def test_own_pairs(tmp_path: Path) -> None:
    """Lists, data sets and data frames give the same pairs, and the run of a file of them."""
    prompt = "\u2028\x85 ü 'quoted' \"x\"\n{["
    records: list[dict[str, Any]] = [
        PAIR | {"system": None},
        PAIR | {"prompt": prompt, "system": "Be kind."},
    ]
    cache = {"cache_dir": str(tmp_path / "cache dir")}
    forms: list[Any] = [
        records,
        (record for record in records),
        Dataset.from_list(records),
        pandas.DataFrame(records).to_dict("records"),
    ]
    runs = [load_run_config(cache, pairs=form, held_out_pairs=[PAIR]) for form in forms]
    mixtures = [load_mixture(run.data) for run in runs]
    first = mixtures[0].train
    assert sorted(pair.prompt[-1]["content"] for pair in first) == sorted(
        record["prompt"] for record in records
    )
    for mixture in mixtures:
        assert [(p.prompt, p.chosen, p.rejected) for p in mixture.train] == [
            (p.prompt, p.chosen, p.rejected) for p in first
        ]
        assert len(mixture.test) == 1
    again = load_run_config(cache, pairs=records, held_out_pairs=[PAIR])
    assert run_id(again) == run_id(runs[0]) and runs[0].train.pairs_per_step == 8
    assert run_id(load_run_config(cache, pairs=records[:1])) != run_id(runs[0])


def test_messages_in_arrays(tmp_path: Path) -> None:
    """As pandas reads them from parquet files."""
    turns = np.array([{"role": "user", "content": "Hi"}], dtype=object)
    frame = pandas.DataFrame([PAIR | {"prompt": turns, "score_chosen": np.float32(2)}])
    run = load_run_config(f"cache_dir={tmp_path}", pairs=frame.to_dict("records"))
    (pair,) = load_mixture(run.data).train
    assert pair.prompt == ({"role": "user", "content": "Hi"},)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pairs": pandas.DataFrame([PAIR])},
            "pairs[0]: must be a dict, got str (of a DataFrame take df.to_dict('records'))",
        ),
        (
            {"pairs": [PAIR, PAIR | {"when": {1}}]},
            "pairs[1]: cannot be written as JSON: set in it (make it text, numbers, lists and "
            "dicts)",
        ),
        (
            {"pairs": [PAIR], "held_out_pairs": [PAIR | {"score": [float("nan")]}]},
            "held_out_pairs[0]: cannot be written as JSON: Out of range float values are not JSON "
            "compliant: nan (make it text, numbers, lists and dicts)",
        ),
        ({"held_out_pairs": [PAIR]}, "held_out_pairs: need pairs to train on (set pairs)"),
        (
            {"pairs": "pairs.jsonl"},
            "pairs: must be a list of dicts, got str (name a file in data.sources)",
        ),
        ({"pairs": PAIR}, "pairs: must be a list of dicts, got dict (name a file in data.sources)"),
        (
            {"pairs": [PAIR], "held_out_pairs": iter(())},
            "held_out_pairs: no record in it (a generator can be read once)",
        ),
    ],
)
def test_own_pairs_that_cannot_be(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SimpoError) as caught:
        load_run_config(f"cache_dir={tmp_path}", **settings)
    assert str(caught.value).replace("compliant (", "compliant: nan (") == message


def test_missing_values_of_pandas(tmp_path: Path) -> None:
    """Of each kind of column, in records that need none of them."""
    missing = {"score": np.float32("nan"), "system": pandas.NA, "when": pandas.NaT}
    run = load_run_config(f"cache_dir={tmp_path}", pairs=[PAIR | missing, PAIR | {"id": 10**400}])
    lines = Path(run.data.sources[0].path).read_text().splitlines()
    assert json.loads(lines[0]) == PAIR | dict.fromkeys(missing)
    assert json.loads(lines[1]) == PAIR | {"id": 10**400}


def test_own_pairs_beside_other_data() -> None:
    message = "pairs: are the data of the run, got data='demo' too (leave it out)"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load_run_config({"data": "demo"}, pairs=[PAIR])


def test_a_bad_pair_has_its_place(tiny_run: list[str]) -> None:
    run = load_run_config(*tiny_settings(tiny_run), pairs=[PAIR, PAIR | {"chosen": " "}])
    with pytest.raises(DataError) as caught:
        train(run)
    path = run.data.sources[0].path
    assert str(caught.value).splitlines()[0] == (
        f"{path} train record 2: chosen: the response is empty"
    )


def state_of_process() -> dict[str, Any]:
    """What a run could leave changed in a user's process."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    return {
        "signals": [signal.getsignal(number) for number in numbers],
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "hidden modules": {name for name, module in sys.modules.items() if module is None},
        "verbosity": (logging.get_verbosity(), hub_logging.get_verbosity()),
        "bars": logging.is_progress_bar_enabled(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "words": list(sys.argv),
        "folder": os.getcwd(),
    }


def test_a_run_in_this_process(tiny_run: list[str]) -> None:
    """What it returns is what its files say; afterwards the process is as before."""
    run = of_pairs(tiny_run)
    before = state_of_process()
    train(of_pairs(tiny_run, "train.max_steps=2"))  # libraries keep a few tensors
    tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
    trained = train(run)
    assert state_of_process() == before
    gc.collect()
    assert sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()) <= tensors

    results = json.loads((trained.folder / "results.json").read_text())
    assert (trained.eval_before, trained.eval_after) == (
        results["eval_before"],
        results["eval_after"],
    )
    assert trained.eval_after["loss"] < trained.eval_before["loss"]
    assert (trained.steps, trained.model_step) == (6, 6)
    assert (trained.model / "model.safetensors").is_file()
    lines = [json.loads(line) for line in (trained.folder / "metrics.jsonl").open()]
    assert trained.metrics() == lines
    assert TrainedRun.read(str(trained.folder)) == trained
    first, header, _, loss, *_ = repr(trained).splitlines()
    assert first == f"model {trained.folder}/model, after step 6 of 6"
    assert header.split() == ["|", "held", "out", "|", "before", "|", "after", "|"]
    numbers = [f"{results[key]['loss']:.3f}" for key in ("eval_before", "eval_after")]
    assert loss.split() == ["|", "loss", "|", numbers[0], "|", numbers[1], "|"]


def test_a_run_that_has_not_finished(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^{tmp_path}: holds no finished run$"):
        TrainedRun.read(tmp_path)


def interrupting(step: int) -> Callable[..., Any]:
    """The loop's update, after which the step is interrupted as by Ctrl-C."""
    update = loop.finite_update

    def updating(run: Any, parts: Any, rows: Any, done: int) -> Any:
        if done + 1 == step:
            signal.raise_signal(signal.SIGINT)
        return update(run, parts, rows, done)

    return updating


def test_interrupt_and_continue(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is kept, as notebooks do; then the run goes on, here in a thread."""
    run = of_pairs(tiny_run)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(loop, "finite_update", interrupting(step=2))
    with pytest.raises(Stopped) as caught:
        train(run)
    (folder,) = (tmp_path / "outputs" / run.name).iterdir()
    assert str(caught.value) == (
        f"interrupted: saved after step 2 in {folder} (the same command continues)"
    )
    assert caught.value._render_traceback_() == [f"Stopped: {caught.value}"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    signal.signal(signal.SIGINT, handler)

    found: list[TrainedRun] = []
    thread = threading.Thread(target=lambda: found.append(train(run)))
    thread.start()
    thread.join()
    assert [trained.folder for trained in found] == [folder]
    whole = train(of_pairs(tiny_run, f"run_dir={tmp_path}/whole"))
    assert assert_same_run(whole.folder, folder, tmp_path) > 0
    assert found[0].eval_after == whole.eval_after


def test_the_preview_is_that_of_the_command(
    tiny_run: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shown = preview(load_run_config(*tiny_run), pairs=2)
    preview_command([*tiny_run, "pairs=2", "cleaning=none", f"html={tmp_path}/page.html"])
    output = capsys.readouterr().out
    assert output.endswith(ended := f"{shown}\npage   {tmp_path}/page.html\n")
    assert all(line.endswith(" ...") for line in output.removesuffix(ended).splitlines())
    page = (tmp_path / "page.html").read_text()
    (inside,) = re.findall(r'<iframe srcdoc="([^"]*)"', shown._repr_html_())
    assert html.unescape(inside) == page


SCRIPT = """
import json, sys
from simpo import Stopped, load_run_config, train

pairs, held_out = json.load(sys.stdin)
run = load_run_config(
    *sys.argv[1:], "backend=ddp", "backend.processes=2", pairs=pairs, held_out_pairs=held_out
)
try:
    print(train(run))
except Stopped as stopped:
    print("STOPPED", stopped)
"""


@pytest.mark.process
def test_a_script_that_starts_processes(tiny_run: list[str], tmp_path: Path) -> None:
    """Ctrl-C raises what the ranks say; the command in the folder continues the run."""
    script, given = tmp_path / "script.py", tmp_path / "pairs.json"
    script.write_text(SCRIPT)
    given.write_text(json.dumps([demo_pairs("train", 24), demo_pairs("test", 16)]))
    words = [*tiny_settings(tiny_run), f"run_dir={tmp_path}/run"]
    words += ["train.epochs=6", "train.eval_every=36"]
    with given.open() as stdin:
        process = subprocess.Popen(
            [sys.executable, script, *words],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    folder = tmp_path / "run"
    wait_for(lambda: (folder / "checkpoints/step-000002").is_dir(), process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    step = status_of(folder)["step"]
    assert 2 <= step < 36
    said = f"interrupted: saved after step {step} in {folder} (the same command continues)"
    assert f"STOPPED {said}\n" in output and errors.count(said) == 1

    command = shlex.split((folder / "command.txt").read_text())
    assert command == ["python", "-m", "simpo.launch.member", str(folder)]
    finish(start(command[3:], module=command[2], cwd=tmp_path))
    assert status_of(folder)["state"] == "finished"
    assert load_run(folder / "run.yaml").data.name == "jsonl"
    assert [line["step"] for line in metrics_of(folder) if "train/loss" in line] == [*range(1, 37)]

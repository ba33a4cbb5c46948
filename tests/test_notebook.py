"""In the kernel of a notebook: examples/notebook.ipynb, and the interrupt of a cell."""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient

from simpo import TrainedRun
from tests.support.whole_runs import status_of

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "notebook.ipynb"


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.process
def test_the_notebook(tiny_folder: Path, tmp_path: Path) -> None:
    """Every cell runs, here with a tiny model, and shows what it is there for."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = (cell for cell in notebook.cells if '"model=smollm2",' in cell.source)
    tiny = {"model.path": str(tiny_folder), "train.learning_rate": 1e-2, "cache_dir": "cache"}
    cell.source = cell.source.replace('"model=smollm2",', f'"model=smollm2", {tiny},')
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=200, resources=resources).execute()

    outputs = {
        cell.source: output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") != "stderr"
    }
    shown = outputs["preview(run, pairs=1)"].data
    assert "<iframe srcdoc=" in shown["text/html"]
    assert "Arr, matey!" in shown["text/plain"]
    (folder,) = (tmp_path / "outputs/smollm2-jsonl-sigmoid").iterdir()
    trained = TrainedRun.read(folder)
    assert trained.steps == 24
    assert trained.eval_after["loss"] < trained.eval_before["loss"]
    assert outputs["trained = train(run)\ntrained"].data["text/plain"] == repr(trained)
    (plot,) = (output for source, output in outputs.items() if "plt.plot" in source)
    assert "image/png" in plot.data
    chat = "".join(
        output.text for output in notebook.cells[-2].outputs if output.get("name") == "stdout"
    ).splitlines()
    assert [line[:9] for line in chat if line.startswith("  ")] == ["  before:", "  after: "] * 4


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    manager, client = start_new_kernel(cwd=str(tmp_path))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def reply(client: BlockingKernelClient, cell: str) -> dict[str, Any]:
    """What the kernel answers to a cell, with the text of its value."""
    return client.execute(cell, reply=True, timeout=200, user_expressions={"value": "value"})[
        "content"
    ]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="single", marks=pytest.mark.process),
        pytest.param(
            {"backend": "ddp", "backend.processes": 2}, id="ddp", marks=pytest.mark.matrix
        ),
    ],
)
def test_a_cell_is_interrupted(
    more: dict[str, Any],
    tiny_run: list[str],
    tmp_path: Path,
    kernel: tuple[KernelManager, BlockingKernelClient],
) -> None:
    """It saves, and the cell shows one line; run again, it goes on to the end."""
    manager, client = kernel
    folder = tmp_path / "run"
    words = [*tiny_run, f"run_dir={folder}", "train.epochs=2", "train.eval_every=0"]
    words += ["sample.num_prompts=0"]
    cell = f"import simpo\nrun = simpo.load_run_config(*{words!r}, {more!r})\nvalue = None"
    assert reply(client, cell)["status"] == "ok"
    # Without the option the kernel might refuse the cell after the one that fails.
    message = client.execute(
        "value = simpo.train(run).steps", user_expressions={"v": "value"}, stop_on_error=False
    )
    wait_until(lambda: (folder / "checkpoints/step-000002").is_dir())
    manager.interrupt_kernel()
    answer = client.get_shell_msg(timeout=200)
    assert answer["parent_header"]["msg_id"] == message
    found = answer["content"]
    step = status_of(folder)["step"]
    assert 2 <= step < 12
    said = f"interrupted: saved after step {step} in {folder} (the same command continues)"
    assert (found["ename"], found["evalue"]) == ("Stopped", said)
    assert found["traceback"] == [f"Stopped: {said}"]

    found = reply(client, "value = simpo.train(run).steps")
    assert found["status"] == "ok", found
    assert ast.literal_eval(found["user_expressions"]["value"]["data"]["text/plain"]) == 12
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "train/loss" in line] == [*range(1, 13)]
    # The run's processes have ended, the kernel has not.
    assert reply(client, "import os; value = os.getpid()")["status"] == "ok"

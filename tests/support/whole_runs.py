"""Starts real runs in their own processes, and compares everything that two runs wrote."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.support.forked import Forked

TIMING = ("train/pairs_per_s", "train/tokens_per_s", "train/gflops_per_s")
NOT_STATE = ("metrics_bytes", "ds_config", "ds_version", "buffer_names")
"""What a checkpoint holds that two equal runs need not share."""


Process = subprocess.Popen[str] | Forked
Ended = subprocess.CompletedProcess[str]


def tiny_model_and_data(tiny_folder: Path, folder: Path, train: int, test: int) -> list[str]:
    """Overrides that train the tiny model on so many of the demo's records, written to a folder."""
    for split, count in (("train", train), ("test", test)):
        (folder / f"{split}.jsonl").write_text("".join(_demo_lines(split)[:count]))
    return [
        f"model.path={tiny_folder}",
        "model.lora.rank=0",
        "data=jsonl",
        f"data.sources=[{{path: {folder}/train.jsonl, test_path: {folder}/test.jsonl}}]",
    ]


@cache
def _demo_lines(split: str) -> list[str]:
    from simpo.data.demo.records import demo_records

    return [json.dumps(record) + "\n" for record in demo_records(0, split)]


def tiny_overrides(tiny_folder: Path, folder: Path) -> list[str]:
    """Overrides of a whole run that takes seconds, with all that it writes below a folder.

    6 steps of 4 pairs; 16 pairs are held out. The memory of a step is not estimated, which would
    take as long as the steps.
    """
    return [
        *tiny_model_and_data(tiny_folder, folder, 24, 16),
        "train.pairs_per_step=4",
        "train.tokens_per_row=256",
        "train.learning_rate=1e-3",
        "train.precision=fp32",
        "train.check_memory=false",
        "train.eval_every=3",
        "train.checkpoint_every=2",
        "sample.num_prompts=3",
        "sample.max_new_tokens=8",
        f"output_dir={folder}/outputs",
        f"cache_dir={folder}/cache",
        "backend.device=cpu",
    ]


def start(
    words: list[str],
    *command: str,
    module: str = "simpo.train",
    fresh: bool = False,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> Process:
    """`python -m simpo.train`, or another module or command, with these words.

    Args:
        fresh: run the interpreter anew, as a user's command does, instead of forking a process that
            has imported everything. So does another command.
        env: variables that are added to this process's own.
    """
    if not (command or fresh):
        return Forked(["-m", module, *words], env, cwd)
    return subprocess.Popen(
        [*(command or (sys.executable, "-m", module)), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        cwd=cwd,
    )


def finish(process: Process, code: int = 0, timeout_s: float = 300) -> str:
    """Wait for a run that must end with a code; everything it printed."""
    output, errors = process.communicate(timeout=timeout_s)
    assert process.returncode == code, f"{process.returncode}\n{output[-2000:]}\n{errors[-4000:]}"
    return output + errors


def run(overrides: list[str], code: int = 0, fresh: bool = False) -> str:
    """A whole run; everything it printed."""
    return finish(start(overrides, fresh=fresh), code)


def run_command(module: str, *words: str, cwd: Path | None = None) -> Ended:
    """Run a module of ours to its end; its exit code and what it printed."""
    process = start(list(words), module=module, cwd=cwd)
    output, errors = process.communicate(timeout=300)
    assert process.returncode is not None
    return Ended(words, process.returncode, output, errors)


def wait_for(condition: Callable[[], bool], process: Process) -> None:
    """Wait for something that a run is to do before it ends."""
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def ranks_of(process: Process) -> dict[int, int]:
    """Process ids of the ranks that a run has started, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for child in children:
        # A forked rank shows the environment of what it was forked from, and its own name.
        environment = Path(f"/proc/{child}/environ").read_bytes()
        named = re.match(rb"rank-(\d+)", Path(f"/proc/{child}/comm").read_bytes())
        if match := named or re.search(rb"(?:^|\0)RANK=(\d+)", environment):
            found[int(match[1])] = int(child)
    return found


def logged(folder: Path, step: int) -> Callable[[], bool]:
    """Whether a run has logged a step."""
    lines = folder / "metrics.jsonl"
    return lambda: lines.is_file() and f'"step": {step},' in lines.read_text()


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without the timings, which no two runs share."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def status_of(run_dir: Path) -> dict[str, Any]:
    """What status.json says."""
    return json.loads((run_dir / "status.json").read_text())


def newest_checkpoint(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step-*"))


def state_of(run_dir: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Every tensor and number of the newest checkpoint, by file and path in it."""
    folder = newest_checkpoint(run_dir)
    files = [path for path in folder.rglob("*.pt")]
    if (folder / "state" / ".metadata").is_file():
        whole = scratch / f"{run_dir.name}-state.pt"
        dcp_to_torch_save(folder / "state", whole)
        files.append(whole)
    flat: dict[str, torch.Tensor] = {}
    for file in files:
        name = "state" if file.parent == scratch else file.relative_to(folder).as_posix()
        flat |= dict(_flat(name, torch.load(file, weights_only=False, map_location="cpu")))
    return flat


def _flat(key: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in NOT_STATE:
                yield from _flat(f"{key}.{name}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _flat(f"{key}.{index}", item)
    elif isinstance(value, torch.Tensor):
        yield key, value
    elif isinstance(value, (int, float)):
        yield key, torch.tensor(value)


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """The weights of the saved model, or of its adapter."""
    (file,) = (run_dir / "model").glob("*.safetensors")
    return load_file(file)


def assert_same_run(left: Path, right: Path, scratch: Path) -> int:
    """Bit for bit: weights, optimizer, step, random states, metrics, model file.

    Returns:
        How many bits of state were compared.
    """
    assert metrics_of(left) == metrics_of(right)
    one, other = state_of(left, scratch), state_of(right, scratch)
    assert one.keys() == other.keys() and one
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
    mine, theirs = weights_of(left), weights_of(right)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    return sum(8 * value.numel() * value.element_size() for value in one.values())

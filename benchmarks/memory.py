"""`make bench-memory`: the estimate of a step's memory beside the measured peak, on a CPU.

Each case is a real run of two steps of a random Llama of 31M weights, in processes of its
own. Measured is the anonymous resident memory (RssAnon) of rank 0: its highest value in an update
after the first, less its value before the weights were loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
BASE = ["train.check_memory=true", "train.precision=fp32"]
BF16 = ["train.precision=bf16"]
LORA = ["model.lora.rank=16", "train.learning_rate=1e-4"]
CASES: dict[str, tuple[int, list[str]]] = {
    "full fp32": (1, []),
    "full fp32, checkpointing": (1, ["model.gradient_checkpointing=true"]),
    "full bf16": (1, BF16),
    "full bf16, checkpointing": (1, [*BF16, "model.gradient_checkpointing=true"]),
    "LoRA fp32": (1, LORA),
    "LoRA fp32, checkpointing": (1, [*LORA, "model.gradient_checkpointing=true"]),
    "LoRA bf16": (1, [*LORA, *BF16]),
    "QLoRA nf4 fp32": (1, [*LORA, "model.quantization=nf4"]),
    "ddp, 2 processes": (2, ["backend=ddp"]),
    "fsdp, 2 processes": (2, ["backend=fsdp"]),
    "fsdp bf16, 2 processes": (2, ["backend=fsdp", *BF16]),
    "fsdp bf16 checkpointing, 2": (
        2,
        ["backend=fsdp", *BF16, "model.gradient_checkpointing=true"],
    ),
    "zero2, 2 processes": (2, ["backend=zero2"]),
    "zero2 bf16, 2 processes": (2, ["backend=zero2", *BF16]),
    "zero3, 2 processes": (2, ["backend=zero3"]),
    "zero3 bf16, 2 processes": (2, ["backend=zero3", *BF16]),
}


def main() -> None:
    """Measure each case; print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", help="parts of their names; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/memory.json")
    parser.add_argument("--rank", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.rank)
        return
    results = []
    print("| case | estimate GiB | measured GiB | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for name, (processes, words) in CASES.items():
            if options.cases and not any(part in name for part in options.cases):
                continue
            found = measure(Path(folder), processes, words)
            ratio = found["estimate"] / found["measured"]
            print(f"| {name} | {found['estimate']:.2f} | {found['measured']:.2f} | {ratio:.2f} |")
            sys.stdout.flush()
            results.append({"case": name, **found})
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


def make_model(folder: Path) -> None:
    """Write a random Llama, its tokenizer and pairs of about 900 tokens."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from simpo.model.smollm2 import smollm2_folder

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder(Path("~/.cache/simpo").expanduser()))
    config = LlamaConfig(
        vocab_size=49152, hidden_size=256, intermediate_size=768, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(50)]

    def text(length: int) -> str:
        return " ".join(rng.choice(words, length))

    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(8):
            pair = {"prompt": text(100), "chosen": text(100), "rejected": text(100)}
            file.write(json.dumps(pair) + "\n")


def measure(folder: Path, processes: int, words: list[str]) -> dict[str, Any]:
    """Run a case and return estimate and measured peak of rank 0, in GiB."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as run:
        settings = [
            f"model.path={folder}", "model.name=bench", "model.chat_template=chatml", "data=jsonl",
            f"data.sources=[{{path: {folder}/pairs.jsonl}}]", f"output_dir={run}",
            f"cache_dir={run}", "backend.device=cpu", "train.pairs_per_step=2",
            "train.tokens_per_row=2048", "train.max_steps=2", "model.lora.rank=0", *BASE, *words,
        ]  # fmt: skip
        ranks = []
        for number in range(processes):
            places = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": processes}
            places |= {"LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
            env = os.environ | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
            # Freed blocks go back to the system at once.
            env |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            if processes > 1:
                env |= {key: str(value) for key, value in places.items()}
            command = [sys.executable, __file__, "--rank", *settings]
            ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate()[0] for process in ranks]
        found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
        return found


def rank(words: list[str]) -> None:
    """Train as one process; print the peaks as the last line."""
    from workloads import resident

    import simpo.loop.setup as setup
    import simpo.loop.train as loop
    from simpo.config.compose import compose_run
    from simpo.model import memory

    if any("nf4" in word for word in words):
        import bitsandbytes  # noqa: F401
    if any("zero" in word for word in words):
        import deepspeed  # noqa: F401
    state: dict[str, Any] = {"base": 0, "load": 0, "step": 0, "save": 0, "now": "", "updates": 0}
    estimates: list[float] = []
    step, load, update = memory.Estimate.step, setup._load_policy, loop.finite_update

    def estimated(self: Any, row: Any) -> Any:
        found = step(self, row)
        estimates.append(found.total)
        print(found, file=sys.stderr)
        return found

    def loaded(*args: Any) -> Any:
        state["base"], state["now"] = resident("RssAnon"), "load"
        return load(*args)

    def updated(*args: Any) -> Any:
        state["updates"] += 1
        state["now"] = "step" if state["updates"] > 1 else "first"
        found = update(*args)
        state["now"] = "save"
        return found

    memory.Estimate.step = estimated  # type: ignore[method-assign]
    setup._load_policy = loaded  # type: ignore[assignment]
    loop.finite_update = updated  # type: ignore[assignment]

    def watch() -> None:
        while True:
            if state["now"] in ("load", "step", "save"):
                state[state["now"]] = max(state[state["now"]], resident("RssAnon"))
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()
    loop.train(compose_run(words))
    peaks = {key: (state[key] - state["base"]) / GIB for key in ("load", "step", "save")}
    print(json.dumps({"estimate": estimates[0], "measured": peaks.pop("step"), **peaks}))


if __name__ == "__main__":
    main()

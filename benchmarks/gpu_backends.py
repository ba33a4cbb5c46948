"""Compares the losses of each backend on one GPU with backend=single; part of `make gpu-check`.

A small random model is trained for five steps in fp32 with every installed backend, each in its own
process with one rank. The losses must equal those of backend=single, QLoRA's those of QLoRA with
backend=single. `--device cpu` runs the same on a CPU, to test the script.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from simpo.config.choices import Offload

STEPS = 5
TOLERANCE = 1e-4
CASES: dict[str, tuple[str, dict[str, Any], str, str | None]] = {
    "single": ("single", {}, "none", None),
    "fsdp": ("fsdp", {}, "none", "single"),
    "fsdp, cpu_offload": ("fsdp", {"cpu_offload": True}, "none", "single"),
    "zero2": ("zero2", {}, "none", "single"),
    "zero2, offload_optimizer": ("zero2", {"offload_optimizer": Offload.cpu}, "none", "single"),
    "zero3": ("zero3", {}, "none", "single"),
    "zero3, both offloaded": (
        "zero3",
        {"offload_optimizer": Offload.cpu, "offload_param": Offload.cpu},
        "none",
        "single",
    ),
    "single, nf4": ("single", {}, "nf4", None),
    "fsdp, nf4": ("fsdp", {}, "nf4", "single, nf4"),
    "zero3, nf4": ("zero3", {}, "nf4", "single, nf4"),
    "single, int8": ("single", {}, "int8", None),
}
"""name: backend, its settings, quantisation of the base, and the case with the expected losses."""


def main() -> None:
    """Run all cases, print a table, and exit with 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--case", help="run this one only, and print its losses as JSON")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(losses_of(options.case, options.device)))
        return
    found: dict[str, list[float]] = {}
    off = False
    print("| backend, one rank | losses | largest gap |\n|---|---|---|")
    for name, (backend, _, _, like) in CASES.items():
        command = [sys.executable, __file__, "--device", options.device, "--case", name]
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
        environment = os.environ | ({} if backend == "single" else rank | address)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
            print(f"| {name} | failed: {reason[:90]} | |", flush=True)
            off |= not reason.startswith(("ModuleNotFoundError", "simpo.config.errors.ConfigError"))
            continue
        found[name] = json.loads(done.stdout.splitlines()[-1])
        pairs = zip(found[name], found.get(like or name, [math.inf] * STEPS), strict=True)
        gap = max(abs(a - b) for a, b in pairs)
        off |= gap > TOLERANCE
        print(f"| {name} | {', '.join(f'{x:.4f}' for x in found[name])} | {gap:.1e} |", flush=True)
    sys.exit(int(off))


def losses_of(name: str, device: str) -> list[float]:
    """Run one case in this process and return the losses of its five steps."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from simpo.backend import build_backend
    from simpo.config.check import GROUPS
    from simpo.config.choices import Device, Dtype, Precision, Quantization
    from simpo.config.models import LoraConfig, ModelConfig
    from simpo.config.schema import TrainConfig
    from simpo.data.packing import pack
    from simpo.data.pairs import TokenizedPair
    from simpo.loop.optim import build_optimizer
    from simpo.loop.score import summarise
    from simpo.loop.step import update
    from simpo.loss.simpo import SigmoidConfig
    from simpo.model.load import load_policy

    kind, settings, bits, _ = CASES[name]
    config = GROUPS["backend"][kind](name=kind, device=Device(device), **settings)
    backend = build_backend(config, Precision.fp32, max_grad_norm=1.0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        small = LlamaConfig(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
        )  # fmt: skip
        LlamaForCausalLM(small).save_pretrained(folder)
        lora = LoraConfig(rank=0 if bits == "none" else 8)
        model = ModelConfig(
            name="small",
            path=folder,
            lora=lora,
            quantization=Quantization(bits),
            dtype=Dtype.float32,
        )
        policy = load_policy(model, Path(folder), backend.device, seed=0)
    optimizer = build_optimizer(policy, TrainConfig(learning_rate=1e-4 if bits == "none" else 1e-3))
    wrapped, optimizer = backend.prepare(policy, optimizer)
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, 512, length).astype(np.int32)

    pairs = [TokenizedPair.of(ids(12), ids(9), ids(11)) for _ in range(8)]
    losses = []
    for _ in range(STEPS):
        rows = [pack(pairs[:4], range(4)), pack(pairs[4:], range(4, 8))]
        loss = SigmoidConfig()
        sums, _ = update(wrapped, optimizer, rows, loss, backend)
        losses.append(summarise(loss, sums)["loss"])
    return losses


if __name__ == "__main__":
    main()

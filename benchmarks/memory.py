"""`make bench-memory`: the estimate of a step's memory beside what torch allocates, on a CPU.

Each case is a real run of two steps of a random Llama of 7M weights, in processes of its own.
Measured on rank 0: the bytes of all tensors when the optimizer begins (weights, gradients and its
state); and those at the beginning of the second update, with the most that torch's CPU allocator
hands out above them in that update, by torch's profiler. A GPU's allocator counts the same tensors.
What a thread of gloo frees within the update stays counted.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

# Processes are forked, which other threads would not survive.
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed  # noqa: F401  imported once for all processes
import torch
from torch.profiler import ProfilerActivity, profile

import simpo.loop.setup as setup
import simpo.loop.train as loop
from simpo.backend.base import Backend
from simpo.backend.zero import ZeroBackend
from simpo.config.compose import compose_run
from simpo.model import memory

Mark = tuple[int, str, int]
"""Nanoseconds, what begins, and bytes of all tensors if they were counted."""


ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
BF16 = ["train.precision=bf16"]
LORA = ["model.lora.rank=16", "train.learning_rate=1e-4"]
NF4 = [*LORA, "model.quantization=nf4"]
SELECTIVE = ["model.gradient_checkpointing=selective"]
FULL = ["model.gradient_checkpointing=full"]
# The model is small: so are the buffers, and no weight but those of norms counts as small.
ZERO2 = ["backend=zero2", "backend.reduce_bucket_size=1000000"]
ZERO3 = [
    "backend=zero3",
    "backend.reduce_bucket_size=1000000",
    "backend.stage3_param_persistence_threshold=1000",
]
CASES: dict[str, tuple[int, list[str]]] = {
    "full fp32": (1, []),
    "full fp32, selective": (1, SELECTIVE),
    "full fp32, full checkpointing": (1, FULL),
    "full bf16": (1, BF16),
    "full bf16, selective": (1, [*BF16, *SELECTIVE]),
    "full bf16, full checkpointing": (1, [*BF16, *FULL]),
    "LoRA fp32": (1, LORA),
    "LoRA fp32, full checkpointing": (1, [*LORA, *FULL]),
    "LoRA bf16": (1, [*LORA, *BF16]),
    "QLoRA nf4 fp32": (1, NF4),
    "QLoRA nf4 bf16, full checkpointing": (1, [*NF4, *BF16, *FULL]),
    "ddp fp32": (2, ["backend=ddp"]),
    "ddp bf16": (2, ["backend=ddp", *BF16]),
    "fsdp fp32": (2, ["backend=fsdp"]),
    "fsdp bf16": (2, ["backend=fsdp", *BF16]),
    "fsdp bf16, full checkpointing": (2, ["backend=fsdp", *BF16, *FULL]),
    "fsdp bf16, LoRA": (2, ["backend=fsdp", *BF16, *LORA]),
    "zero2 fp32": (2, ZERO2),
    "zero2 bf16": (2, [*ZERO2, *BF16]),
    "zero3 fp32": (2, ZERO3),
    "zero3 bf16": (2, [*ZERO3, *BF16]),
    "zero3 bf16, full checkpointing": (2, [*ZERO3, *BF16, *FULL]),
    "zero3 bf16, LoRA": (2, [*ZERO3, *BF16, *LORA]),
}


def main() -> None:
    """Measure each case; print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", help="parts of their names; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/memory.json")
    parser.add_argument("--moments", action="store_true", help="print the moments of a step")
    options = parser.parse_args()
    results = []
    print("| case | held: estimate MiB | measured | step: estimate MiB | measured | ratio |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for name, (processes, words) in CASES.items():
            if options.cases and not any(part in name for part in options.cases):
                continue
            found = {"case": name} | measure(Path(folder), processes, words)
            estimated, measured = found["estimate_mib"], found["measured_mib"]
            held = sum(estimated[part] for part in ("weights", "gradients", "optimizer"))
            total = sum(estimated.values())
            print(
                f"| {name} | {held:.1f} | {measured['held']:.1f} | {total:.1f} "
                f"| {measured['step']:.1f} | {total / measured['step']:.2f} |",
                flush=True,
            )
            if options.moments:
                print(estimated, *found["moments"], sep="\n", flush=True)
            results.append(found)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


def make_model(folder: Path) -> None:
    """Write a random Llama, a tokenizer of few words, and pairs of about 200 tokens."""
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    words = [f"word{i}" for i in range(50)]
    marks = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system"]
    vocabulary = {word: index for index, word in enumerate([*marks, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<unk>",
        additional_special_tokens=marks[1:2],
    ).save_pretrained(folder)  # fmt: skip
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    rng = np.random.default_rng(0)

    def text(length: int) -> str:
        return " ".join(rng.choice(words, length))

    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(24):
            pair = {"prompt": text(60), "chosen": text(60), "rejected": text(60)}
            file.write(json.dumps(pair) + "\n")


def measure(folder: Path, processes: int, words: list[str]) -> dict[str, Any]:
    """Run a case and return estimate and measured memory of rank 0, in MiB."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as run:
        settings = [
            f"model.path={folder}", "model.name=bench", "model.chat_template=chatml", "data=jsonl",
            f"data.sources=[{{path: {folder}/pairs.jsonl}}]", f"output_dir={run}",
            f"cache_dir={run}", "backend.device=cpu", f"train.pairs_per_step={4 * processes}",
            "train.tokens_per_row=512", "train.max_steps=2", "train.check_memory=true",
            "train.precision=fp32", "model.dtype=float32", "model.lora.rank=0", *words,
        ]  # fmt: skip
        forked = multiprocessing.get_context("fork")
        found, sent = forked.Pipe(duplex=False)
        ranks = []
        for number in range(processes):
            places = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": processes}
            places |= {"LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
            env = {key: str(value) for key, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
            one = forked.Process(target=rank, args=(settings, env if processes > 1 else {}, sent))
            one.start()
            ranks.append(one)
        sent.close()
        try:
            result: dict[str, Any] = found.recv()
        finally:
            for one in ranks:
                one.join()
        return result


def rank(words: list[str], env: dict[str, str], sent: Any) -> None:
    """Train as one process; rank 0 sends what it estimated and measured."""
    os.environ.update(env)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    marks: list[Mark] = []
    estimates: list[memory.Memory] = []
    allocations = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    estimated, load, update = memory.Estimate.step, setup._load_policy, loop.finite_update

    def step(self: Any, row: Any) -> memory.Memory:
        estimates.append(estimated(self, row))
        return estimates[-1]

    def loaded(*args: Any) -> Any:
        allocations.start()
        marks.append(_now("load"))
        policy, probe = load(*args)
        if policy.unread is None:
            for weight in policy.parameters():  # the loaded ones are pages of their files
                weight.data = weight.data.clone()
        marks.append(_now("prepare"))
        return policy, probe

    def updated(*args: Any) -> Any:
        marks.append(_now("update"))
        sums = update(*args)
        marks.append(_now("updated"))
        if sum(name == "updated" for _, name, _ in marks) == 2:
            allocations.stop()
            if os.environ.get("RANK", "0") == "0":
                parts = {name: gib * 1024 for name, gib in vars(estimates[0]).items()}
                sent.send({"estimate_mib": parts} | _measured(allocations, marks))
        return sums

    memory.Estimate.step = step  # type: ignore[method-assign]
    setup._load_policy = loaded  # type: ignore[assignment]
    loop.finite_update = updated  # type: ignore[assignment]
    for kind in (Backend, ZeroBackend):
        for name in ("backward", "step"):
            _mark(kind, name, marks)
    loop.train(compose_run(words))


def _now(name: str) -> Mark:
    counted = _tensor_bytes() if name in ("update", "step") else 0
    return time.time_ns(), name, counted


def _tensor_bytes() -> int:
    """Bytes of the storages of all tensors that Python knows, and of their gradients.

    DeepSpeed keeps a meta tensor for each weight, which has a size and no memory.
    """
    known = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not o.is_meta]
    tensors = [getattr(tensor, "_local_tensor", tensor) for tensor in known]
    tensors += [t.grad for t in known if t.is_leaf and t.requires_grad and t.grad is not None]
    tensors = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def _mark(kind: Any, name: str, marks: list[Mark]) -> None:
    """Note when a method begins and ends."""
    method = getattr(kind, name)

    def marked(*args: Any) -> Any:
        marks.append(_now(name))
        result = method(*args)
        marks.append(_now(f"after {name}"))
        return result

    setattr(kind, name, marked)


def _measured(allocations: Any, marks: list[Mark]) -> dict[str, Any]:
    """MiB at the second update's marks, and the most until the next one."""
    events = allocations.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    first = max(place for place, (_, name, _) in enumerate(marks) if name == "update")
    second, at, moments = marks[first:], 0, []
    while changes[at][0] < second[0][0]:
        at += 1
    live = second[0][2]
    for (_, name, counted), (end, _, _) in itertools.pairwise(second):
        begin = peak = live
        while at < len(changes) and changes[at][0] <= end:
            live += changes[at][1]
            peak = max(peak, live)
            at += 1
        mib = {"begin": begin / MIB, "peak": peak / MIB, "tensors": counted / MIB}
        moments.append({"moment": name} | {key: round(value, 2) for key, value in mib.items()})
    held = next(m["tensors"] for m in moments if m["moment"] == "step")
    return {
        "measured_mib": {"held": held, "step": max(m["peak"] for m in moments)},
        "moments": moments,
    }


if __name__ == "__main__":
    main()

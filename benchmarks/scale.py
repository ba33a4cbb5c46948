"""Measures how the cost of the data grows with its size, beside TRL's preparation of the same file.

    python benchmarks/scale.py [--pairs 1000 10000 60000] [--trl 1000 10000] [--results FILE]
                               [--picture FILE]

Pairs are made up with the lengths of UltraFeedback's (see `workloads`). Each figure comes from a
process of its own, which reads, checks, mixes and tokenizes a file for the built-in model as a run
does before its first step. The first start finds no cache and the second finds the first one's.
TRL's CPOTrainer prepares the same file with as many processes as the machine has cores. Private
memory (RssAnon) is what a start adds to that of its process: at the end, and at most, sampled in
the process and in its workers, which begin with all that it has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

BENCHMARKS = Path(__file__).parent
PAGE = BENCHMARKS.parent / "docs"
VOCABULARY = 50_000
PARTS = ("prompt", "chosen", "rejected")
TOKENS_PER_WORD = 1.6
"""Of the made-up words, in the built-in tokenizer; measured."""
SAMPLED_EVERY_S = 0.1


def main() -> None:
    if sys.argv[1:2] == ["start"]:
        print(json.dumps(STARTS[sys.argv[2]](Path(sys.argv[3]), Path(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description="cost of the data by its size")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000, 10_000, 60_000])
    parser.add_argument("--trl", type=int, nargs="*", default=[1_000, 10_000])
    parser.add_argument("--results", type=Path, default=BENCHMARKS / "results" / "scale.json")
    parser.add_argument("--picture", type=Path, default=PAGE / "scale.png")
    args = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for number in args.pairs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_pairs(folder / "pairs.jsonl", number)
            names = ["simpo", "simpo", *(["trl"] if number in args.trl else [])]
            for contender, start in zip(names, ("first", "second", "first"), strict=False):
                line = {"pairs": number, "contender": contender, "start": start}
                lines.append({**line, **measured(contender, folder)})
                print(json.dumps(lines[-1]), flush=True)
    print(*table(lines), sep="\n")
    machine = {"processor": platform.processor() or platform.machine(), "cores": cores()}
    args.results.write_text(json.dumps({"machine": machine, "results": lines}, indent=1) + "\n")
    plot(lines, args.picture)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def write_pairs(path: Path, number: int) -> None:
    """Write pairs of made-up words, drawn as often as in English text (Zipf)."""
    from workloads import PROFILES, drawn_lengths

    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, k)) for k in rng.integers(2, 8, VOCABULARY)])
    odds = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    prompt, response = PROFILES["ultrafeedback"]
    with path.open("w") as file:
        for _ in range(number):
            record = {}
            for part, shape in zip(PARTS, (prompt, response, response), strict=True):
                length = int(drawn_lengths(rng, shape, (1,))[0] / TOKENS_PER_WORD) + 1
                drawn = np.searchsorted(odds, rng.random(length) * odds[-1])
                role = "user" if part == "prompt" else "assistant"
                record[part] = [{"role": role, "content": " ".join(words[drawn])}]
            file.write(json.dumps(record) + "\n")


def measured(contender: str, folder: Path) -> dict[str, float]:
    """Figures of one start, in a process of its own."""
    words = [sys.executable, __file__, "start", contender, str(folder / "pairs.jsonl")]
    words.append(str(folder / f"{contender}-cache"))
    process_mib = worker_mib = 0.0
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                workers = psutil.Process(process.pid).children(recursive=True)
                process_mib = max(process_mib, private_mib(process.pid))
                worker_mib = max([worker_mib, *(private_mib(worker.pid) for worker in workers)])
            time.sleep(SAMPLED_EVERY_S)
        assert process.stdout is not None
        figures: dict[str, float] = json.loads(process.stdout.read().splitlines()[-1])
    before = figures.pop("private_mib_before")
    figures["peak_private_mib"] = process_mib - before
    figures["worker_peak_private_mib"] = max(0.0, worker_mib - before)
    return figures


def private_mib(pid: int) -> float:
    """Private memory of a process in MiB; 0 once it has ended."""
    from workloads import resident

    try:
        return resident("RssAnon", pid) / 2**20
    except (OSError, StopIteration):
        return 0.0


def start_simpo(file: Path, cache_dir: Path) -> dict[str, float]:
    """Read and tokenize a file as a run does before its first step."""
    from simpo import load_run_config
    from simpo.data.chats.chat import Chat
    from simpo.data.loader import load_data
    from simpo.model.smollm2 import smollm2_folder
    from simpo.model.tokenizer import load_tokenizer

    model = smollm2_folder(Path("~/.cache/simpo").expanduser())
    run = load_run_config(
        "data=jsonl", {"data.sources": [{"path": str(file)}], "model.path": str(model)}
    )
    chat = Chat(load_tokenizer(run.model, cache_dir, run.data.compat))
    before, begin = used(), time.perf_counter()
    data = load_data(run, chat, cache_dir)
    figures = since(before, begin, cache_dir)
    return figures | {"kept_pairs": float(len(data.train.tokens))}


def start_trl(file: Path, cache_dir: Path) -> dict[str, float]:
    """Prepare a file as TRL's CPOTrainer does before its first step."""
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from simpo.model.smollm2 import smollm2_folder

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder(Path("~/.cache/simpo").expanduser()))
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads))
    before, begin = used(), time.perf_counter()
    rows = load_dataset("json", data_files=str(file), cache_dir=str(cache_dir), split="train")
    trainer = CPOTrainer(
        model=model,
        args=CPOConfig(
            output_dir=tempfile.mkdtemp(), loss_type="simpo", cpo_alpha=0.0, max_length=2048,
            dataset_num_proc=cores(), use_cpu=True, bf16=False, report_to="none",
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    figures = since(before, begin, cache_dir)
    prepared: Any = trainer.train_dataset
    return figures | {"kept_pairs": float(len(prepared))}


STARTS = {"simpo": start_simpo, "trl": start_trl}


def used() -> tuple[float, float, float]:
    """CPU seconds of this process and of its children that ended; private memory in MiB."""
    own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own_s = own.ru_utime + own.ru_stime
    return own_s, children.ru_utime + children.ru_stime, private_mib(os.getpid())


def since(before: tuple[float, ...], begin: float, cache_dir: Path) -> dict[str, float]:
    """What was used since then, and the size of the cache."""
    wall_s = time.perf_counter() - begin
    own_s, children_s, mib = (now - then for now, then in zip(used(), before, strict=True))
    on_disk = sum(path.stat().st_size for path in cache_dir.rglob("*") if path.is_file())
    return {
        "wall_s": wall_s,
        "cpu_s": own_s + children_s,
        "own_cpu_s": own_s,
        "private_mib": mib,
        "private_mib_before": before[-1],
        "cache_mib": on_disk / 2**20,
    }


def table(lines: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table."""
    rows = [
        "| pairs | who | start | s | ms a pair | CPU s | without workers "
        "| private MiB, at most | in a worker | cache MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        rows.append(
            f"| {line['pairs']:,} | {line['contender']} | {line['start']} | {line['wall_s']:.1f} "
            f"| {line['wall_s'] / line['pairs'] * 1000:.2f} | {line['cpu_s']:.1f} "
            f"| {line['own_cpu_s']:.1f} | {line['peak_private_mib']:,.0f} "
            f"| {line['worker_peak_private_mib']:,.0f} | {line['cache_mib']:,.0f} |"
        )
    return rows


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Plot seconds and private memory against the number of pairs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    kinds = list(dict.fromkeys((line["contender"], line["start"]) for line in lines))
    for axis, keys, title in (
        (axes[0], ("wall_s",), "seconds"),
        (axes[1], ("peak_private_mib", "worker_peak_private_mib"), "MiB of a process, at most"),
    ):
        for kind in kinds:
            mine = [line for line in lines if (line["contender"], line["start"]) == kind]
            axis.plot(
                [line["pairs"] for line in mine],
                [max(line[key] for key in keys) for line in mine],
                marker="o",
                label=f"{kind[0]}, {kind[1]} start",
            )
        axis.set(xscale="log", xlabel="pairs", title=title)
    axes[0].set(yscale="log")
    axes[1].set(ylim=(0, None))
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

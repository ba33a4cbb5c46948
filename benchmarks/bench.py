"""`make bench`: measures loss and gradients of a micro-batch of 2 pairs on the CPU.

All contenders run in one process, alternately, in reverse order every other round; the first round
is not measured. Times are medians with their range, and ratios of medians to `padded`. Memory is
the peak resident set of a step minus that before the step, which includes weights and gradients.
What torch allocates at its peak is measured beside it: the C library keeps freed memory, a GPU's
allocator gives it to the next tensor.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from contenders import contenders
from torch import profiler
from transformers import AutoModelForCausalLM
from workloads import PROFILES, model_config, real_batches, resident, typical_batch

from simpo.data.pairs import TokenizedPair

PAIRS = 2
MIB = 2**20
RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "performance.png"
REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def main() -> None:
    """Measure the shapes and profiles of the command line; print a table, write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["tiny", "smol8"])
    parser.add_argument("--profiles", nargs="+", default=[*PROFILES])
    parser.add_argument("--contenders", nargs="+", default=["padded", "trl", "liger", "simpo"])
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds")
    parser.add_argument("--real", type=Path, default=REAL, help="folder of real pairs (JSON lines)")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    results = []
    for shape in options.shapes:
        config = model_config(shape)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        runners = contenders(model, options.contenders)
        del model
        work = {p: [typical_batch(p, PAIRS, config.vocab_size)] for p in options.profiles}
        if options.real.is_dir() and config.vocab_size == 49152:
            work["real"] = real_batches(options.real, 6, PAIRS)
        for profile, batches in work.items():
            found = measure(runners, batches, options.rounds)
            results += [{"shape": shape, "profile": profile, **line} for line in found]
            print("\n".join(table(results[-len(runners) :])), flush=True)
            save(options.out, results)
    plot(results, options.picture)


def measure(
    runners: list[Any], batches: list[list[TokenizedPair]], rounds: int
) -> list[dict[str, Any]]:
    """Measure each contender on the same micro-batches: seconds per round, peak MiB, pairs/s."""
    times: dict[str, list[float]] = {runner.name: [] for runner in runners}
    peaks, allocated, losses = {}, {}, {}
    for turn in range(rounds + 1):
        for runner in runners if turn % 2 == 0 else runners[::-1]:
            if turn == 0:  # memory is measured in the warm-up round
                losses[runner.name] = step(runner, batches[0])[1]
                largest = max(batches, key=runner.num_tokens)
                peaks[runner.name] = peak_bytes(partial(step, runner, largest))
                allocated[runner.name] = allocated_bytes(partial(step, runner, largest))
            else:
                times[runner.name].append(sum(step(runner, batch)[0] for batch in batches))
    gap = max(losses.values()) - min(losses.values())
    assert gap < 1e-4, f"the contenders do not compute the same loss: {losses}"
    pairs = sum(len(batch) for batch in batches)
    return [
        {
            "contender": runner.name,
            **spread(times[runner.name]),
            "pairs_per_s": pairs / statistics.median(times[runner.name]),
            "tokens": sum(runner.num_tokens(batch) for batch in batches),
            "peak_mib": peaks[runner.name] / MIB,
            "allocated_mib": allocated[runner.name] / MIB,
        }
        for runner in runners
    ]


def spread(seconds: list[float]) -> dict[str, float]:
    """The median and the range of some times."""
    return {
        "median_s": statistics.median(seconds),
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
    }


def step(runner: Any, pairs: list[TokenizedPair]) -> tuple[float, float]:
    """Compute loss and gradients; returns the seconds taken and the loss."""
    for parameter in runner.model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    begin = time.perf_counter()
    loss = runner.loss(pairs)
    loss.backward()
    return time.perf_counter() - begin, loss.item()


def peak_bytes(action: Callable[[], Any]) -> int:
    """Peak resident set during an action minus the resident set before it, in bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def allocated_bytes(action: Callable[[], Any]) -> int:
    """Peak of what torch allocates during an action and has not freed yet, in bytes."""
    cpu = profiler.ProfilerActivity.CPU
    with profiler.profile(activities=[cpu], profile_memory=True) as profiled:
        action()
    events: Any = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(size for _, size in changes))


def table(results: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table, with ratios to the padded contender if it was measured."""
    lines = [
        "| shape | data | contender | tokens | s (spread) | time | pairs/s | peak MiB | memory "
        "| allocated MiB | allocated |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    padded = {(x["shape"], x["profile"]): x for x in results if x["contender"] == "padded"}
    for line in results:
        base = padded.get((line["shape"], line["profile"]), line)
        lines.append(
            f"| {line['shape']} | {line['profile']} | {line['contender']} | {line['tokens']:,} "
            f"| {line['median_s']:.2f} ({line['fastest_s']:.2f}-{line['slowest_s']:.2f}) "
            f"| {line['median_s'] / base['median_s']:.2f} | {line['pairs_per_s']:.2f} "
            f"| {line['peak_mib']:,.0f} | {line['peak_mib'] / base['peak_mib']:.2f} "
            f"| {line['allocated_mib']:,.0f} "
            f"| {line['allocated_mib'] / base['allocated_mib']:.2f} |"
        )
    return lines


def save(path: Path, results: list[dict[str, Any]]) -> None:
    """Write the results with the machine and the versions they were measured with."""
    import transformers

    path.parent.mkdir(exist_ok=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Plot pairs per second and memory relative to the padded step, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys((line["shape"], line["profile"]) for line in results))
    names = list(dict.fromkeys(line["contender"] for line in results))
    by_key = {((x["shape"], x["profile"]), x["contender"]): x for x in results}
    figure, axes = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    for axis, key, title in (
        (axes[0], "pairs_per_s", "pairs per second, padded = 1"),
        (axes[1], "peak_mib", "step memory above weights and gradients, padded = 1"),
    ):
        for offset, name in enumerate(names):
            heights = [by_key[group, name][key] / by_key[group, names[0]][key] for group in groups]
            places = [i + 0.2 * offset for i in range(len(groups))]
            axis.bar(places, heights, width=0.19, label=name)
        axis.set_ylabel(title, fontsize=8)
        axis.axhline(1, color="grey", linewidth=0.5)
    axes[0].legend()
    axes[1].set_xticks(
        [i + 0.1 * (len(names) - 1) for i in range(len(groups))],
        ["\n".join(group) for group in groups],
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

"""Folders of many runs, as training leaves them, made in a moment: no model is trained."""

from __future__ import annotations

import csv
import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from simpo.config.check import run_yaml
from simpo.config.compose import compose_run
from simpo.run.judged import FOLDER, Figure, Judged

PROMPT = "Say <b>hi</b> in one sentence: <script>document.title = 'taken'</script> & no more."


@cache
def _settings(*overrides: str) -> str:
    return run_yaml(compose_run(list(overrides)))


def make(
    folder: Path,
    beta: float = 2.0,
    ratio: float = 0.5,
    seed: int = 42,
    steps: int = 40,
    state: str = "finished",
    held_out: bool = True,
    sft: bool = False,
    prompts: int = 4,
    pairs: int = 56,
    sets: tuple[str, ...] = (),
    overrides: tuple[str, ...] = (),
) -> Path:
    """A run whose curves and results follow from its settings.

    Args:
        held_out: whether there are held-out pairs and replies.
        sft: the run has no rejected responses.
        prompts, pairs: number of prompts with replies, and of held-out pairs.
        sets: names of several held-out sets, each with metrics of its own.
    """
    text = _settings(*overrides, *(("loss=sft",) if sft else ()))
    for key, value in (("beta", beta), ("gamma_beta_ratio", ratio)):
        text = re.sub(rf"(\n  {key}: ).*", rf"\g<1>{value}", text)
    text = re.sub(r"(\n  seed: )\d+(\n  log_every)", rf"\g<1>{seed}\g<2>", text)
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(text)
    done = steps if state == "finished" else steps // 2
    gain = 0.0 if sft else 0.1 + beta / (beta + 30) / 4 + ratio / 10 + (seed % 7) / 200

    def metrics(step: int) -> dict[str, float]:
        part = step / steps
        found = {"loss": 2.1 - gain * part, "logps/chosen": -1.5 + part / 5}
        if not sft:
            margin = 0.19 + 4 * gain * part + math.sin(step + seed) / 10
            found |= {
                "rewards/accuracies": min(1.0, 0.6 + gain * part),
                "rewards/margins": margin,
                "logps/rejected": -1.6 - part,
            }
        return found

    lines: list[dict[str, Any]] = []
    evaluations = [0, done // 2, done] if held_out else []
    for step in range(done + 1):
        if step:
            train = {f"train/{key}": value for key, value in metrics(step).items()}
            lines.append({"step": step, **train, "train/grad_norm": 1 + gain})
        if step in evaluations:
            found = evaluated(metrics(step), sets)
            lines.append({"step": step, **{f"eval/{key}": value for key, value in found.items()}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status = {"state": state, "step": done, "total_steps": steps, "error": ""}
    if state == "failed":
        status["error"] = "RunError: step 20: loss is not finite (pairs 3, 7 of demo <train>)"
    (folder / "status.json").write_text(json.dumps(status))
    if state == "finished":
        after = evaluated(metrics(steps), sets) if held_out else {}
        results = {"eval_before": {}, "eval_after": after, "train": {"model_step": steps}}
        (folder / "results.json").write_text(json.dumps(results))
    for step in {0, done} if held_out else ():
        _write_held_out(folder, step, steps, gain, sft, prompts, pairs)
    return folder


def evaluated(metrics: dict[str, float], sets: tuple[str, ...]) -> dict[str, float]:
    more = {f"{name}/{key}": value for name in sets for key, value in metrics.items()}
    return {**metrics, **more, "rule_pass_rate": 0.5, "reply_repetition": 0.01}


def _write_held_out(
    folder: Path, step: int, steps: int, gain: float, sft: bool, prompts: int, pairs: int
) -> None:
    for name in ("held_out", "samples"):
        (folder / name).mkdir(exist_ok=True)
    keys = ["chosen_tokens", *([] if sft else ["rejected_tokens", "rewards/margins"])]
    rows = [["pair", *keys]]
    for pair in range(pairs):
        margin = math.sin(pair) + 4 * gain * step / steps
        values = {
            "chosen_tokens": 20 + pair % 30,
            "rejected_tokens": 25 + pair % 40,
            "rewards/margins": round(margin, 4),
        }
        rows.append([f"p{pair}", *[str(values[key]) for key in keys]])
    table = "\n".join(",".join(row) for row in rows) + "\n"
    (folder / "held_out" / f"step-{step:06d}.csv").write_text(table)
    replies = [
        {
            "prompt": f"{PROMPT} ({number})",
            "reply": f"Hi <img src=x onerror=alert(1)> after {step} steps. " + "More words. " * 9,
            "tokens": 10 + number,
            "obeys": (number % 2 == 0) if step else None,
        }
        for number in range(prompts)
    ]
    (folder / "samples" / f"step-{step:06d}.json").write_text(json.dumps(replies))


def make_sweep(folder: Path, number: int) -> Path:
    """A sweep over beta, ratio and seed in folders as the launcher names them, with long names."""
    ratios, seeds = (0.3, 0.5, 0.8), (42, 1)
    for index in range(number):
        ratio, seed = ratios[index % 3], seeds[index // 3 % 2]
        beta = 1.0 + index // 6
        name = f"loss.beta={beta:g},loss.gamma_beta_ratio={ratio},train.seed={seed}"
        state = {7: "failed", 11: "running", 13: "stopped"}.get(index, "finished")
        make(folder / "smollm2-demo-simpo" / name, beta, ratio, seed, state=state)
    return folder


def judge(
    folder: Path, preferences: list[float], benchmark: str = "alpaca_eval_2", **more: Any
) -> Judged:
    """Judge a run: the preference for it in each question, from 0 to 1.

    Args:
        more: what differs in its judged.json.
    """
    rate = 100 * sum(preferences) / len(preferences)
    known: dict[str, Any] = {
        "kind": "alpaca_eval",
        "model": folder.name,
        "baseline": "gpt4_1106_preview",
        "judge": "gpt-4-1106-preview",
        "figures": {
            "lc_win_rate": Figure(rate + 3, rate, rate + 6),
            "win_rate": Figure(rate, rate - 3, rate + 3, rate - 1, rate + 1),
        },
        "by_question": {str(number): value for number, value in enumerate(preferences)},
        "questions": len(preferences),
        "asked": 2 * len(preferences) + 20,
        "malformed": 3,
        "position_bias": 0.12,
        "first_share": 0.56,
        "agreement": 0.95,
        "mean_chars": {"model": 1825.0, "baseline": 2049.0},
        "examples": [
            {"question": PROMPT, "model": f"{PROMPT} model", "baseline": "no", "preference": 1.0},
            {"question": "Why? " * 60, "model": "x" * 600, "baseline": "y " * 300, "preference": 0},
        ],
    }
    found = Judged(benchmark=benchmark, **{**known, **more})
    place = folder / FOLDER / benchmark
    place.mkdir(parents=True)
    found.write(place)
    return found


def study(folder: Path, right: dict[str, list[int]]) -> None:
    """Finished runs, each right on that many of 200 held-out pairs with each of its seeds."""
    for name, numbers in right.items():
        for seed, number in enumerate(numbers):
            run = make(folder / f"loss.beta={name},train.seed={seed}", float(name), seed=seed)
            order = np.random.default_rng(seed).permutation(200)
            file = run / "held_out" / "step-000040.csv"
            lines = [("pair", "rewards/accuracies")]
            lines += [(f"p{pair}", str(float(order[pair] < number))) for pair in range(200)]
            with file.open("w") as table:
                csv.writer(table).writerows(lines)
            (run / "data.json").write_text('{"test_fingerprint": "pairs"}')
            metrics = (run / "metrics.jsonl").read_text()
            accuracy = number / 200
            *others, last = metrics.splitlines()
            changed = json.loads(last) | {"eval/rewards/accuracies": accuracy}
            (run / "metrics.jsonl").write_text("\n".join([*others, json.dumps(changed), ""]))
            results = json.loads((run / "results.json").read_text())
            results["eval_after"]["rewards/accuracies"] = accuracy
            (run / "results.json").write_text(json.dumps(results))

"""The trained policy in; a folder that transformers loads, with its card and curves, out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from torch import Tensor

from simpo.config import ExportConfig, RunConfig, run_yaml
from simpo.console import SHOWN, Results, markdown_table, result_rows
from simpo.data.chat import Chat
from simpo.loss import formula
from simpo.model import Policy
from simpo.tracker import read_metrics


def save_model(policy: Policy, weights: dict[str, Tensor] | None, chat: Chat, folder: Path) -> None:
    """Write weights (or the adapter) as safetensors, with settings, tokenizer and template.

    Args:
        weights: those of the policy's model, whole; None where it holds them itself.

    The cache of keys and values is on, and generation stops where a response ended in training.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    base = policy.base
    base.config.use_cache = True
    settings = base.generation_config
    if settings is not None:
        settings.eos_token_id = sorted({chat.end_id, int(chat.tokenizer.eos_token_id)})
        settings.pad_token_id = chat.tokenizer.pad_token_id
    policy.model.save_pretrained(part, state_dict=weights)  # type: ignore[operator]
    chat.tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(part, folder)


def write_card(run: RunConfig, run_dir: Path, results: Results) -> None:
    """Write model/README.md and model/curves.png from what lies in the run's folder."""
    model_dir = run_dir / "model"
    draw_curves(run_dir / "metrics.jsonl", model_dir / "curves.png")
    data = json.loads((run_dir / "data.json").read_text())
    environment = json.loads((run_dir / "environment.json").read_text())
    command = (run_dir / "command.txt").read_text().strip()
    versions = ", ".join(f"{name} {number}" for name, number in environment["packages"].items())
    local = run.model.path.startswith("builtin:") or Path(run.model.path).expanduser().exists()
    header = ["---", "library_name: transformers", "tags:", "- simpo", "- preference-optimization"]
    if not local:
        header += [f"base_model: {run.model.path}"]
    hub_sources = sorted({s.path for s in run.data.sources if not s.is_file() and "/" in s.path})
    if hub_sources:
        header += ["datasets:", *(f"- {path}" for path in hub_sources)]
    lines = [
        *header,
        "---",
        f"# {run.name}",
        "",
        f"{run.model.path} after preference optimisation with "
        "[SimPO](https://arxiv.org/abs/2405.14734).",
        "",
        "## Objective",
        "",
        f"    {formula(run.loss)}",
        "",
        "## Data",
        "",
        *markdown_table(data["mixture"]),
        "",
        f"Fingerprints: train {data['train_fingerprint']}, test {data['test_fingerprint']}; "
        f"chat template sha256 {data['template_sha256']}.",
        "",
        "## Held-out results",
        "",
        *markdown_table(result_rows(results)),
        "",
        *[line for finding in results.findings for line in (f"Sign of collapse: {finding}.", "")],
        "![curves](curves.png)",
        "",
        "## Provenance",
        "",
        f"{versions}; Python {environment['python']}; {environment['device']}; "
        f"commit {environment['git_commit'] or 'unknown'}.",
        "",
        f"    {command}",
        "",
        "```yaml",
        run_yaml(run).strip(),
        "```",
        "",
    ]
    (model_dir / "README.md").write_text("\n".join(lines))


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draw loss, reward accuracy and margin over steps, train and held out, as a PNG."""
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (key, name) in zip(axes, SHOWN[:3], strict=True):
        for split, style in (("train", "-"), ("eval", "o--")):
            points = [(x["step"], x[f"{split}/{key}"]) for x in lines if f"{split}/{key}" in x]
            if points:
                label = "held out" if split == "eval" else split
                axis.plot(*zip(*points, strict=True), style, label=label)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(picture, dpi=110)


def push_to_hub(config: ExportConfig, model_dir: Path) -> str:
    """Upload the model's folder; the token is the one the hub's own tools have stored.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    assert config.push_to_hub is not None
    api = HfApi()
    api.create_repo(config.push_to_hub, private=config.private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=config.push_to_hub, folder_path=model_dir, commit_message="Model trained with simpo"
    )
    return str(commit.commit_url)

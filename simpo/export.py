"""The trained policy in; a folder that transformers loads, with its card and curves, out.

`python -m simpo.export RUN merge=true` writes the base of a run with its adapter merged in.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForCausalLM

from simpo import console
from simpo.config import ADAPTER_FILE, Dtype, ExportConfig, ModelConfig, RunConfig, run_yaml
from simpo.console import Results, result_rows
from simpo.data.chat import Chat
from simpo.errors import ConfigError
from simpo.model import Policy, load_pretrained, load_tokenizer
from simpo.tables import SHOWN, markdown_table
from simpo.tracker import read_metrics, series


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
    # The frozen weights below an adapter on lm_head lie with the base.
    alone = {"save_embedding_layers": False} if policy.model is not base else {}
    policy.model.save_pretrained(part, state_dict=weights, **alone)  # type: ignore[operator]
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
        f"    {run.loss.formula()}",
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
            if points := series(lines, f"{split}/{key}"):
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


def merge(run_dir: Path, output: Path, dtype: Dtype, base: str | None) -> None:
    """Write a whole model: the base unquantised, also after QLoRA, with the adapter added to it.

    Args:
        run_dir: folder of a run, or one that holds an adapter.
        output: folder to write; must not exist.
        dtype: of the sums and the written weights; auto is that of the base's files.
        base: folder or hub id of the base; None takes what the adapter names.

    Raises:
        ConfigError: there is no adapter, it does not fit its base, one of them cannot be loaded, or
            output exists.
    """
    from simpo.adapters import adapter_settings, load_adapter

    folder = run_dir / "model" if (run_dir / "model").is_dir() else run_dir
    if not (folder / ADAPTER_FILE).is_file():
        raise ConfigError(
            [f"RUN: must hold an adapter, got {run_dir} (no {folder}/{ADAPTER_FILE})"]
        )
    if output.exists():
        raise ConfigError([f"output: must not exist, got {output} (choose another)"])
    settings = adapter_settings("RUN", str(folder))
    source = base or settings.base_model_name_or_path
    if not source:
        raise ConfigError(["base: the adapter does not name it (base=FOLDER_OR_HUB_ID)"])
    revision = None if base else settings.revision
    tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    config = ModelConfig(path=source, revision=revision, tokenizer=tokenizer)
    chat = Chat(load_tokenizer(config, folder))
    model = load_pretrained(
        "base", source, AutoModelForCausalLM, revision=revision, dtype=dtype.value
    )
    merged = load_adapter("RUN", model, str(folder)).merge_and_unload(safe_merge=True)
    save_model(Policy(merged), None, chat, output)


KEYS = ("merge", "output", "dtype", "base")
USAGE = (
    "python -m simpo.export RUN merge=true [output=FOLDER] [dtype=float32] [base=FOLDER_OR_HUB_ID]"
)


def cli() -> None:
    """Entry of `python -m simpo.export`; exits with 2 where something cannot be merged."""
    console.quiet_libraries()
    try:
        run_dir, options = _arguments(sys.argv[1:])
        output = Path(options.get("output", run_dir / "model-merged")).expanduser()
        merge(run_dir, output, Dtype(options.get("dtype", "auto")), options.get("base"))
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"model  {output}")


def _arguments(words: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """The run's folder and the settings of a command line."""
    folders = [word for word in words if "=" not in word]
    options = dict(word.split("=", 1) for word in words if "=" in word)
    if len(folders) != 1:
        raise ConfigError([USAGE])
    problems = [
        f"{key}: no such key (export has {', '.join(KEYS)})" for key in options if key not in KEYS
    ]
    if options.get("merge") != "true":
        problems += [
            f"merge: must be true, got {options.get('merge', 'nothing')} (it is all there is)"
        ]
    if options.get("dtype", "auto") not in (names := [choice.value for choice in Dtype]):
        problems += [f"dtype: must be one of {', '.join(names)}, got {options['dtype']}"]
    run_dir = Path(folders[0]).expanduser()
    if not run_dir.is_dir():
        problems += [f"RUN: no such folder, got {run_dir}"]
    if problems:
        raise ConfigError(problems)
    return run_dir, options


if __name__ == "__main__":
    cli()

"""Writes the model card and the curves of a finished run.

A card is uploaded with its model, so it contains no folders or commands of this machine.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from simpo.config.check import trajectory
from simpo.config.data_path import is_hub_id, kind
from simpo.config.models import ADAPTER_FILE
from simpo.config.schema import RunConfig
from simpo.loop.console import Results, result_lines
from simpo.run.atomic import write_text
from simpo.run.files import read_metrics, series
from simpo.run.tables import SHOWN, markdown_table

BUILTIN = {"builtin:smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Names on the hub of built-in models."""


def write_card(run: RunConfig, run_dir: Path, results: Results, model_dir: Path) -> None:
    """Write model_dir/README.md from the files of the run's folder.

    The card shows curves.png if it is in model_dir.
    """
    data = json.loads((run_dir / "data.json").read_text())
    environment = json.loads((run_dir / "environment.json").read_text())
    versions = ", ".join(f"{name} {number}" for name, number in environment["packages"].items())
    curves = ["![curves](curves.png)", ""] if (model_dir / "curves.png").is_file() else []
    lines = [
        "---",
        _header(run),
        "---",
        f"# {public(run.name)}",
        "",
        f"{base_name(run.model.path)} after preference optimisation with "
        "[SimPO](https://arxiv.org/abs/2405.14734).",
        "",
        "## Loss",
        "",
        f"    {run.loss.formula()}",
        "",
        "## Data",
        "",
        *markdown_table([row | {"source": public(row["source"])} for row in data["mixture"]]),
        "",
        f"Fingerprints: train {data['train_fingerprint']}, test {data['test_fingerprint']}; "
        f"chat template sha256 {data['template_sha256']}.",
        "",
        "## Held-out results",
        "",
        *markdown_table(result_lines(results)),
        "",
        *[line for finding in results.findings for line in (f"Sign of collapse: {finding}.", "")],
        *curves,
        "## Provenance",
        "",
        f"{versions}; Python {environment['python']}; {environment['device']}; "
        f"commit {environment['git_commit'] or 'unknown'}.",
        "",
        "The settings that decide the numbers:",
        "",
        "```yaml",
        *(
            f"{key}: {json.dumps(public(value), ensure_ascii=False)}"
            for key, value in trajectory(run).items()
        ),
        "```",
        "",
    ]
    write_text(model_dir / "README.md", "\n".join(lines))


def write_merged_card(adapter: Path, output: Path) -> None:
    """Write output/README.md: the card of an adapter, saying that it is merged into its base.

    Args:
        adapter: its folder; if it has no card, the new one names only the base.
    """
    from huggingface_hub import ModelCard

    base = json.loads((adapter / ADAPTER_FILE).read_text()).get("base_model_name_or_path") or ""
    file = adapter / "README.md"
    named = "" if is_local(base) else f"base_model: {base}\n"
    plain = f"---\nlibrary_name: peft\n{named}---\n# {public(base)} with an adapter\n"
    card = ModelCard(file.read_text(encoding="utf-8") if file.is_file() else plain)
    data: Any = card.data
    data.library_name = "transformers"
    data.tags = [*(tag for tag in data.tags or [] if tag != "lora"), "merged"]
    heading, _, rest = card.text.lstrip().partition("\n")
    name = data.base_model or base_name(base)
    merged = f"The adapter described here is merged into the weights of {name}."
    card.text = f"{heading}\n\n{merged}\n{rest}"
    write_text(output / "README.md", str(card))
    if (adapter / "curves.png").is_file():
        shutil.copyfile(adapter / "curves.png", output / "curves.png")


def _header(run: RunConfig) -> str:
    """The metadata that the hub reads."""
    from huggingface_hub import ModelCardData

    base = run.model.path
    sources = {s.path for s in run.data.sources if "/" in s.path and is_hub_id(s.path)}
    header = ModelCardData(
        library_name="peft" if run.model.lora.used else "transformers",
        base_model=None if is_local(base) else base_name(base),
        datasets=sorted(sources) or None,
        tags=["simpo", "preference-optimization", *(["lora"] if run.model.lora.used else [])],
    )
    return header.to_yaml()


def base_name(path: str) -> str:
    """The hub's name of the model at a path; of a local folder its last part."""
    return BUILTIN.get(path) or str(public(path))


def public(value: Any) -> Any:
    """A setting without folders of this machine: a local path becomes its last part."""
    if isinstance(value, list):
        return [public(item) for item in value]
    return Path(value).name if isinstance(value, str) and is_local(value) else value


def is_local(text: str) -> bool:
    """Whether a setting is a local path, not a hub id or a word."""
    looks_local = text.startswith(("/", "./", "../", "~")) or text.count("/") > 1
    is_file = bool(kind(text)) or text.endswith((".jinja", ".safetensors"))
    return looks_local or is_file or os.path.exists(text)


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

"""Writes the model card and the curves of a finished run.

A card is uploaded with its model, so it contains no folders or commands of this machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo.config.data_path import HUB_FILE, is_hub_id, kind
from simpo.config.flat import trajectory
from simpo.config.models import ADAPTER_FILE
from simpo.config.paths import looks_local
from simpo.config.schema import RunConfig
from simpo.data.plan import build_plan
from simpo.loop.console import Results
from simpo.loss import LossConfig
from simpo.loss.simpo import SimpoConfig
from simpo.model.pretrained import model_files
from simpo.run.atomic import write_text
from simpo.run.files import read_metrics, series
from simpo.run.rounds import as_begun
from simpo.run.tables import markdown_table, result_lines, shown_metrics

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

BUILTIN = {"builtin:smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
"""Names on the hub and licences of built-in models."""
REPOSITORY = "OWNER/NAME"
"""Stands for the name of the repository in a card, until the card is uploaded."""
SHORT_STEPS = 100
"""A run that train.max_steps cuts before this step is called a test run."""
CITATION = """\
```bibtex
@inproceedings{meng2024simpo,
  title = {{SimPO}: Simple Preference Optimization with a Reference-Free Reward},
  author = {Meng, Yu and Xia, Mengzhou and Chen, Danqi},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024}
}
```"""
ADAPTER_LOADED = re.compile(
    r"^base = AutoModelForCausalLM\.from_pretrained\(.*?(, trust_remote_code=True)?\)(  #.*)?\n"
    r"model = PeftModel\.from_pretrained\(base, name\)$",
    re.MULTILINE,
)


def write_card(run: RunConfig, run_dir: Path, results: Results, model_dir: Path) -> None:
    """Write model_dir/README.md from the files of the run's folder.

    The card shows curves.png if it is in model_dir.
    """
    data = json.loads((run_dir / "data.json").read_text())
    environment = json.loads((run_dir / "environment.json").read_text())
    versions = ", ".join(f"{name} {number}" for name, number in environment["packages"].items())
    name, link = method(run.loss)
    trained = f"preference optimisation with [{name}]({link})" if link else f"training with {name}"
    pairs = {split: data[f"{split}_tokens"]["pairs"] for split in ("train", "test")}
    table = [row | {"source": plain(public(row["source"]))} for row in data["mixture"]]
    lines = result_lines(results.before, results.after)
    measured = [line | {"held out": plain(line["held out"])} for line in lines]
    # The model of a round began with the first one.
    begun = replace(run, model=as_begun(run).model)
    blocks = [
        f"# {plain(public(run.name))}",
        *_cut_short(run, pairs["train"]),
        f"{plain(base_name(begun.model.path))} after {trained}.",
        *_about_base(begun),
        "## Use",
        usage(begun),
        "## Loss",
        f"    {' '.join(run.loss.formula().split())}",
        "## Data",
        "\n".join(markdown_table(table)),
        f"{pairs['train']} pairs to train on, in steps of {run.train.pairs_per_step}, and "
        f"{pairs['test']} held-out pairs. Fingerprints: train {data['train_fingerprint']}, test "
        f"{data['test_fingerprint']}; chat template sha256 {data['template_sha256']}.",
        f"## Results on {pairs['test']} held-out pairs" if measured else "## Results",
        "\n".join(markdown_table(measured)) if measured else "No pairs were held out.",
        *_saved_dtype(model_dir),
        *(f"Sign of collapse: {plain(finding)}." for finding in results.findings),
        *(["![curves](curves.png)"] if (model_dir / "curves.png").is_file() else []),
        "## Provenance",
        f"{versions}; Python {environment['python']}; {environment['device']}; "
        f"commit {environment['git_commit'] or 'unknown'}.",
        "The settings that decide the numbers:",
        fenced("yaml", _settings(run)),
        *(["## Citation", CITATION] if isinstance(run.loss, SimpoConfig) else []),
    ]
    header = f"---\n{_header(begun).to_yaml()}\n---\n"
    write_text(model_dir / "README.md", header + "\n\n".join(blocks) + "\n")


def write_merged_card(adapter: Path, output: Path) -> None:
    """Write output/README.md: the card of an adapter, saying that it is merged into its base.

    Args:
        adapter: its folder; if it has no card, the new one names only the base.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base = json.loads((adapter / ADAPTER_FILE).read_text()).get("base_model_name_or_path") or ""
    file = adapter / "README.md"
    if file.is_file():
        card = ModelCard(file.read_text(encoding="utf-8"))
    else:
        header = ModelCardData(base_model=None if is_local(base) else base)
        card = ModelCard(f"---\n{header.to_yaml()}\n---\n# {plain(public(base))} with an adapter\n")
    data: Any = card.data
    data.library_name = "transformers"
    if data.base_model:
        data.base_model_relation = "finetune"  # the hub's "merge" is one of several models
    data.tags = [*(tag for tag in data.tags or [] if tag != "lora"), "merged"]
    heading, _, rest = card.text.lstrip().partition("\n")
    name = data.base_model or base_name(base)
    merged = f"The adapter described here is merged into the weights of {plain(name)}."
    rest = rest.replace("from peft import PeftModel\n", "")
    rest = ADAPTER_LOADED.sub(r"model = AutoModelForCausalLM.from_pretrained(name\1)", rest)
    card.text = f"{heading}\n\n{merged}\n{rest}"
    write_text(output / "README.md", str(card))
    if (adapter / "curves.png").is_file():
        shutil.copyfile(adapter / "curves.png", output / "curves.png")


def _header(run: RunConfig) -> ModelCardData:
    """The metadata that the hub reads."""
    from huggingface_hub import ModelCardData

    base, adapted = run.model.path, run.model.lora.used
    paths = [source.path for source in run.data.sources]
    sources = {path for path in paths if "/" in path and is_hub_id(path)}
    sources |= {address[1] for path in paths if (address := HUB_FILE.fullmatch(path))}
    more: dict[str, Any] = _licence(run)
    if not is_local(base):
        relation = "adapter" if adapted else "finetune"
        more |= {"base_model": base_name(base), "base_model_relation": relation}
    tags = ["simpo" if isinstance(run.loss, SimpoConfig) else run.loss.name.replace("_", "-")]
    tags += ["preference-optimization"] * run.loss.needs_rejected + ["lora"] * adapted
    return ModelCardData(
        library_name="peft" if adapted else "transformers",
        pipeline_tag="text-generation",
        datasets=sorted(sources) or None,
        tags=tags,
        **more,
    )


def _licence(run: RunConfig) -> dict[str, str]:
    """The licence that the base's card names, as metadata of a card; empty if it names none."""
    from huggingface_hub import ModelCard

    base = run.model.path
    if base in BUILTIN:
        return {"license": BUILTIN[base][1]}
    folder = model_files(os.path.expanduser(base), run.model.revision)
    if folder is None or not (folder / "README.md").is_file():
        return {}
    try:
        stated = ModelCard.load(folder / "README.md").data.to_dict()
    except Exception:  # the card of somebody else may be anything
        return {}
    keys = ("license", "license_name", "license_link")
    found = {key: stated[key] for key in keys if isinstance(stated.get(key), str)}
    link = found.get("license_link", "")
    if link and "://" not in link and not is_local(base):
        found["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
    elif link and "://" not in link and not (folder / link).is_file():
        del found["license_link"]
    return found if "license" in found else {}


def method(loss: LossConfig) -> tuple[str, str]:
    """The name of a loss and the address of its paper, which its docstring begins with.

    Without an address there, the name is that of the settings, and the address is empty.
    """
    text = " ".join((type(loss).__doc__ or "").split())
    found = re.match(r"([^.:(]+) \((https?://[^\s,;)]*[^\s,;:.)])", text)
    return (found[1], found[2]) if found else (f"the loss `{loss.name}`", "")


def _cut_short(run: RunConfig, num_pairs: int) -> list[str]:
    """A sentence about a run that train.max_steps ended before its epochs were over."""
    cfg, steps = run.train, run.train.max_steps
    whole = build_plan(num_pairs, cfg.pairs_per_step, cfg.epochs, None, cfg.seed).total_steps
    if steps is None or steps >= whole:
        return []
    if steps >= SHORT_STEPS:
        return [f"`train.max_steps` ended the training after {steps} of {whole} steps."]
    plural = "s" * (steps > 1)
    return [f"**This is a test run of {steps} step{plural}; the model is not meant for use.**"]


def _about_base(run: RunConfig) -> list[str]:
    """What a reader must know about the base besides its name."""
    if run.model.path in BUILTIN:
        return ["Training started from a 4-bit GGUF file of that model, converted to float32."]
    if is_local(run.model.path):
        return ["The base model is a folder of the author's, named here by its last part."]
    return []


def usage(run: RunConfig) -> str:
    """Python code that loads the model, or the adapter and its base, and answers a prompt."""
    config = run.model
    remote = ", trust_remote_code=True" if config.trust_remote_code else ""
    base = json.dumps(base_name(config.path), ensure_ascii=False)
    revision = comment = ""
    if is_local(config.path):
        comment = "  # put the folder or hub id of this base model here"
    elif config.revision:
        revision = f", revision={json.dumps(config.revision)}"
    adapter = [
        f"base = AutoModelForCausalLM.from_pretrained({base}{revision}{remote}){comment}",
        "model = PeftModel.from_pretrained(base, name)",
    ]
    variables = config.chat_template_kwargs
    lines = [
        *(["from peft import PeftModel"] if config.lora.used else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'name = "{REPOSITORY}"  # this repository, or a folder with its files',
        *(
            adapter
            if config.lora.used
            else [f"model = AutoModelForCausalLM.from_pretrained(name{remote})"]
        ),
        f"tokenizer = AutoTokenizer.from_pretrained(name{remote})",
        "prompt = tokenizer.apply_chat_template(",
        '    [{"role": "user", "content": "Name a bird."}],',
        "    add_generation_prompt=True,",
        "    return_dict=True,",
        '    return_tensors="pt",',
        *([f"    **{public(variables)!r},"] if variables else []),
        ")",
        "output = model.generate(**prompt, max_new_tokens=100)[0]",
        'print(tokenizer.decode(output[prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return fenced("python", "\n".join(lines))


def _saved_dtype(model_dir: Path) -> list[str]:
    """A sentence about a whole model that is saved in fewer digits than it was trained in."""
    file = model_dir / "config.json"
    dtype = json.loads(file.read_text())["dtype"] if file.is_file() else "float32"
    if dtype == "float32":
        return []
    return [f"The weights were trained in float32, where these results are from; saved in {dtype}."]


def _settings(run: RunConfig) -> str:
    """The settings that decide the numbers, as YAML."""
    from huggingface_hub.utils import yaml_dump

    shown = {key: public(value) for key, value in trajectory(run).items()}
    return yaml_dump(shown, width=float("inf")).rstrip("\n")


def fenced(language: str, text: str) -> str:
    """A Markdown code block, with a fence longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def plain(text: str) -> str:
    """Text on one line that Markdown shows as it is, in a table too."""
    escaped = re.sub(r"[\\`*\[\]<>|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
    return " ".join(escaped.split())


def base_name(path: str) -> str:
    """The hub's name of the model at a path; of a local folder its last part."""
    return BUILTIN[path][0] if path in BUILTIN else str(public(path))


def public(value: Any) -> Any:
    """A setting without folders of this machine: a local path becomes its last part."""
    if isinstance(value, list):
        return [public(item) for item in value]
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if not (isinstance(value, str) and is_local(value)):
        return value
    return os.path.basename(os.path.abspath(value))  # also of "." and "..", which have no name


def is_local(text: str) -> bool:
    """Whether a setting is a local path, not a hub id, an address of the hub or a word."""
    if HUB_FILE.fullmatch(text):
        return False
    is_file = bool(kind(text)) or text.endswith((".jinja", ".safetensors"))
    return looks_local(text) or is_file or os.path.exists(text)


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draw the first three of the metrics that tables show over steps, train and held out, as a
    PNG: of pairs loss, accuracy and margin."""
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    # Fixed margins: to find the best ones, Matplotlib draws everything several times.
    figure = Figure(figsize=(12, 3.4))
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.14, top=0.91, wspace=0.2)
    known = {key.partition("/")[2] for line in lines for key in line}
    shown = list(shown_metrics(known).items())[:3]
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (key, name) in zip(axes, shown, strict=True):
        for split, style in (("train", "-"), ("eval", "o--")):
            if points := series(lines, f"{split}/{key}"):
                label = "held out" if split == "eval" else split
                axis.plot(*zip(*points, strict=True), style, label=label)
        axis.set_title(name, y=1.0)  # else its place is searched for, at a quarter of the time
        axis.set_xlabel("step")
        axis.locator_params(nbins=5)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(picture, dpi=110)

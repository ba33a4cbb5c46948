"""The settings of a run.

Those of the loss are in `simpo.loss`, those of other groups in modules of this folder. No code
changes a `RunConfig`; it is not frozen because OmegaConf cannot compose frozen dataclasses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from simpo.config.backends import BackendConfig
from simpo.config.benchmarks import BenchmarkConfig, JudgeConfig
from simpo.config.choices import AUTO, Dtype, Mode, Precision, Schedule, WatchAction
from simpo.config.data import DataConfig
from simpo.config.errors import LOST, SAVED
from simpo.config.launchers import LauncherConfig
from simpo.config.models import ModelConfig
from simpo.config.on_policy import OnPolicyConfig
from simpo.config.ranges import above_zero, at_least
from simpo.config.rounds import RoundsConfig
from simpo.config.trackers import TrackerConfig
from simpo.loss import LossConfig

LONGEST_PART_BYTES = 255
"""Longest name of a file or folder that file systems allow."""


@dataclass(kw_only=True)
class TrainConfig:
    """The loop, the optimizer and what is kept."""

    pairs_per_step: int = 128
    """Pairs in one optimizer update, over all processes (the paper: 128; data=jsonl: 8)."""
    tokens_per_row: int | str = 4096
    """Tokens of a packed row, which is one forward. Changes memory and speed, not results. auto:
    what `simpo plan` finds best on the GPU, chosen when a run begins and kept when it continues."""
    share_prefix: bool = True
    """Compute a prompt once for its two responses; False for models that cannot."""
    check_memory: bool = True
    """Refuse, before weights are loaded, a run whose estimated memory exceeds the device's."""
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
    """Gradients are clipped to this norm; 0: not clipped."""
    precision: Precision = Precision.auto
    """Dtype of the forward; log-probs are always fp32. auto: bf16 if the device has instructions
    for it (GPUs, newer CPUs), else fp32."""
    seed: int = 42
    """Seed of the adapters' initialisation and of the order of the pairs."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations; 0: only before the first step and after the last."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: only one, after the last step."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints kept."""
    keep_best: bool = False
    """Also keep the checkpoint with the best `monitor.metric`; the saved model is that one."""
    patience_evals: int = 0
    """Stop after this many evaluations without a better `monitor.metric`; 0: never."""

    stopped_exit_code: int = 75
    """Exit code of a run that SIGTERM, SIGUSR1 or SIGUSR2 stopped, after saving. Not 0, so that
    scripts and schedulers see that the run is unfinished (75: EX_TEMPFAIL)."""

    def __post_init__(self) -> None:
        # A text is one of this setting's types, so nothing else makes a number of "2048".
        if isinstance(self.tokens_per_row, str) and self.tokens_per_row.isdecimal():
            self.tokens_per_row = int(self.tokens_per_row)

    def problems(self) -> Iterator[str]:
        if not isinstance(rows := self.tokens_per_row, str):
            yield from at_least(self, 1, "tokens_per_row")
        elif rows != AUTO:
            yield f"tokens_per_row: must be a whole number or {AUTO}, got {rows or repr(rows)}"
        yield from at_least(self, 1, "pairs_per_step", "epochs", "log_every", "keep_checkpoints")
        yield from at_least(self, 0, "eval_every", "checkpoint_every", zero="never in between")
        yield from at_least(self, 0, "patience_evals", zero="never stop early")
        for key in ("keep_best", "patience_evals"):
            if getattr(self, key) > 0 and not self.eval_every:
                yield f"{key}: needs evaluations during training (set train.eval_every)"
        yield from at_least(self, 1, "max_steps")
        yield from above_zero(self, "learning_rate", "adam_epsilon")
        if not 0 <= self.warmup_ratio < 1:
            yield f"warmup_ratio: must be from 0 to below 1, got {self.warmup_ratio}"
        for key in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, key) < 1:
                yield f"{key}: must be from 0 to below 1, got {getattr(self, key)}"
        yield from at_least(self, 0, "seed", "weight_decay", "max_grad_norm")
        if not 0 <= self.stopped_exit_code < 256:
            yield f"stopped_exit_code: must be from 0 to 255, got {self.stopped_exit_code}"
        elif (code := self.stopped_exit_code) in (LOST, SAVED):
            yield f"stopped_exit_code: {code} is in use within a run (choose another)"


@dataclass(kw_only=True)
class SampleConfig:
    """Greedy replies to held-out prompts, written at each evaluation."""

    num_prompts: int = 0
    """Number of held-out prompts answered; 0: none."""
    max_new_tokens: int = 96
    """Longest reply."""

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 0, "num_prompts", zero="none")
        yield from at_least(self, 1, "max_new_tokens")


@dataclass(kw_only=True)
class MonitorConfig:
    """The held-out metric that says which of two models is better."""

    metric: str = "rewards/accuracies"
    """Key of a held-out metric, as in metrics.jsonl without `eval/`."""
    mode: Mode = Mode.max
    """max: higher is better. min: lower is better."""

    def problems(self) -> Iterator[str]:
        if not self.metric or self.metric.startswith(("eval/", "train/")):
            yield f"metric: must be a held-out metric without its eval/, got {self.metric!r}"


@dataclass(kw_only=True)
class WatchConfig:
    """When a run counts as collapsing, compared with its own start, and what happens then."""

    action: WatchAction = WatchAction.warn
    """warn: print a warning and go on. stop: end the run with exit code 1; checkpoints stay."""
    chosen_drop: float = 1.0
    """Largest fall of the mean log-prob of a chosen token, in nats, in training or held out; 0: no
    limit. (1: a third as likely. The demo rises by 0.2; at 1e-3 without NLL it falls by 2.6.)"""
    repetition_rise: float = 0.15
    """Largest rise of the share of repeated 4-grams in replies; 0: no limit. (0.15: one reply in
    six became a loop. The demo stays within 0.02; collapsed, it rises by 0.24.)"""
    grad_norm_ratio: float = 10.0
    """Largest ratio of the gradient norm before clipping to its first value; 0: no limit. (10 finds
    explosions; the demo reaches 2, collapsed 5.)"""
    window: int = 8
    """Logged steps averaged into one value of a train metric; the first average is its start."""

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 0, "chosen_drop", "repetition_rise", zero="off")
        if self.grad_norm_ratio and self.grad_norm_ratio <= 1:
            yield f"grad_norm_ratio: must be 0 (off) or above 1, got {self.grad_norm_ratio}"
        yield from at_least(self, 1, "window")


@dataclass(kw_only=True)
class ExportConfig:
    """How the trained model is saved in the run's folder, and whether it is uploaded."""

    dtype: Dtype = Dtype.auto
    """Dtype of the saved weights; training does not depend on it. auto: that of the base model's
    files; float32 for an adapter."""
    push_to_hub: str | None = None
    """Hub repository (owner/name) to upload the model to, created before step 1; null: none."""
    private: bool = True
    """Whether a repository created for the upload is private."""

    def problems(self) -> Iterator[str]:
        parts = (self.push_to_hub or "owner/name").split("/")
        if len(parts) != 2 or not all(parts):
            yield f"push_to_hub: must be owner/name, got {self.push_to_hub}"
        elif self.push_to_hub is not None:
            from huggingface_hub.errors import HFValidationError
            from huggingface_hub.utils import validate_repo_id

            try:
                validate_repo_id(self.push_to_hub)
            except HFValidationError as error:
                rule = str(error).rpartition(":")[0]
                yield f"push_to_hub: not a valid name on the hub, got {self.push_to_hub} ({rule})"


@dataclass(kw_only=True)
class RunConfig:
    """All settings of a run."""

    name: str = MISSING
    """Name of the run's folder below output_dir; made of the names of model, data and loss."""
    output_dir: str = "outputs"
    """Folder all runs are kept in."""
    run_dir: str | None = None
    """The run's own folder. null: an unfinished run's with the same settings, else a new one."""
    cache_dir: str = "~/.cache/simpo"
    """Folder of converted models and tokenized data."""
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    loss: LossConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    backend: BackendConfig = MISSING
    launcher: LauncherConfig = MISSING
    tracker: TrackerConfig = MISSING

    def problems(self) -> Iterator[str]:
        for key in ("output_dir", "run_dir", "cache_dir"):
            value = getattr(self, key)
            if value is None:
                continue
            folder = Path(value).expanduser()
            above = (p for p in (folder, *folder.parents) if p.exists())
            if not value:
                yield f"{key}: must not be empty"
            elif max(len(part.encode()) for part in folder.parts or ("",)) > LONGEST_PART_BYTES:
                yield f"{key}: a folder's name is at most {LONGEST_PART_BYTES} bytes long"
            elif not (nearest := next(above, folder)).is_dir() and nearest.exists():
                yield f"{key}: must be a folder, but {nearest} is not one"

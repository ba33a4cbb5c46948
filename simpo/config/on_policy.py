"""Settings of `simpo generate` and `simpo annotate`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field

from simpo.config.choices import Engine, ReplyChoice
from simpo.config.ranges import at_least

JUDGE = "judge"
"""Names the reward that is the rating of the judge of `judge.endpoint` or `judge.local`."""


@dataclass(kw_only=True)
class OnPolicyConfig:
    """Pairs of the model's own replies: `simpo.generate` generates them, `simpo.annotate` scores
    them and pairs the best with the worst. Defaults are the paper's."""

    folder: str | None = None
    """Folder of replies, scores and pairs. null: <output_dir>/on_policy/<model>-<data>."""
    seeds: list[int] = field(default_factory=lambda: [13, 21, 42, 79, 100])
    """Sampling seeds; each gives one reply to each prompt."""
    temperature: float = 0.8
    """Sampling temperature; above 0."""
    temperatures: list[float] = field(default_factory=list)
    """One for each of the seeds, in their order, instead of `temperature`; []: that for all."""
    top_p: float = 0.95
    """Nucleus sampling: tokens come from the likeliest ones that sum to this probability."""
    max_new_tokens: int = 4096
    """Longest reply."""
    num_prompts: int | None = None
    """Number of prompts answered, from the start of each split; null: all."""
    slices: int = 1
    """Deal the train prompts (of `num_prompts`) into so many slices: prompt i, from 0, into slice
    i % slices + 1. The prompts of one slice are answered, and all held-out ones."""
    slice: int = 1
    """Which slice is answered, from 1."""
    held_out_only: bool = False
    """Answer no train prompt, only the held-out ones."""
    engine: Engine = Engine.auto
    """Library that generates. auto: vllm if installed and there is a GPU, else transformers."""
    batch_prompts: int = 32
    """Prompts answered together; replies are saved after each batch."""
    parts: int = 1
    """Number of `simpo generate` commands that share the batches, at the same time or not, in one
    folder; replies do not depend on it."""
    part: int = 1
    """Which part this command generates, from 1."""
    reward: str | None = None
    """What scores replies: a reward model (hub id or folder), `module:function`, `rules`, or
    `judge`: the judge of `judge.endpoint` or `judge.local` rates each reply from 1 to 10."""
    keep_cut: bool = False
    """Also use replies that max_new_tokens cut off."""
    pass_reward: float | None = None
    """Score from which a reply passes, for `pass_rate` of measures.json; null: not measured, but 1
    with reward=rules."""
    choice: ReplyChoice = ReplyChoice.best_worst
    """Pairs of a prompt's replies. best_random: the best with one of lower score, drawn by the
    prompt. margin: best_worst, without narrow margins. all: each two of different scores. ranked:
    one record with all replies, for losses that compare more than two (loss.compare)."""
    margin_quantile: float = 0.5
    """With choice=margin: pairs below this quantile of a split's margins are left out."""

    def temperature_of(self, seed: int) -> float:
        """The sampling temperature of the replies of a seed."""
        return dict(zip(self.seeds, self.temperatures, strict=False)).get(seed, self.temperature)

    def problems(self) -> Iterator[str]:
        if len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds):
            yield f"seeds: must be two or more different ones, got {self.seeds}"
        if min(self.seeds, default=0) < 0:
            yield f"seeds: must be 0 or more, got {self.seeds}"
        if self.folder == "":
            yield "folder: must not be empty (null takes one below output_dir)"
        if self.temperature <= 0:
            yield f"temperature: must be above 0, got {self.temperature} (0 makes replies equal)"
        if self.temperatures and len(self.temperatures) != len(self.seeds):
            yield f"temperatures: must be one a seed, {len(self.seeds)}, got {self.temperatures}"
        if min(self.temperatures, default=1) <= 0:
            yield f"temperatures: must be above 0, got {self.temperatures}"
        if not 0 < self.top_p <= 1:
            yield f"top_p: must be above 0 and at most 1, got {self.top_p}"
        yield from at_least(self, 1, "max_new_tokens", "batch_prompts", "num_prompts")
        yield from at_least(self, 1, "slices", "parts")
        for one, many in (("slice", "slices"), ("part", "parts")):
            index, count = getattr(self, one), getattr(self, many)
            if count >= 1 and not 1 <= index <= count:
                yield f"{one}: must be from 1 to {many}={count}, got {index}"
        if not 0 < self.margin_quantile < 1:
            yield f"margin_quantile: must be above 0 and below 1, got {self.margin_quantile}"
        if self.engine is Engine.vllm and importlib.util.find_spec("vllm") is None:
            yield "engine: vllm is not installed (pip install 'simpo[vllm]')"

"""Tiny real models and the independent path that numbers are compared with."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess

# Threads of several test processes would fight over the machine's cores; and no test may wait for a
# model hub that is not there.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from simpo.data.pairs import TokenizedPair
from simpo.loss.simpo import SimpoConfig
from simpo.model import attention

VOCAB = 128
SEGMENTS = attention.NAMES["sdpa"]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Rows of whole blocks of 64: what nf4 needs on a CPU.
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
FAMILIES = {
    "llama": LlamaConfig(),
    "llama_tied": LlamaConfig(tie_word_embeddings=True),
    "qwen2": Qwen2Config(),
    "qwen3": Qwen3Config(),
    "mistral_window": MistralConfig(sliding_window=8),
    "gemma2": Gemma2Config(
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        # Small, so that the caps bend the numbers of a tiny model.
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": Gemma3TextConfig(head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
}


MADE_ONCE = ("slurm", "alone", "adapters_alone", "undisturbed", "template")
"""Fixtures that take long: all tests that want the first of these run in the same process."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        wanted = getattr(item, "fixturenames", ())
        if group := next((name for name in MADE_ONCE if name in wanted), None):
            item.add_marker(pytest.mark.xdist_group(group))


UNIT_CPU_S = 10
"""What a test without a marker may take, whatever else the machine does."""


def cpu_s() -> float:
    """CPU seconds of this process, of its children that have ended, and of what was forked."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used) + forked.cpu_s()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    begin = cpu_s()
    yield
    spent = cpu_s() - begin
    if spent > UNIT_CPU_S and not any(map(item.get_closest_marker, ("process", "matrix"))):
        pytest.fail(
            f"{spent:.0f} CPU seconds: more than {UNIT_CPU_S} need the marker process or matrix",
            pytrace=False,
        )


def tiny_model(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int
) -> PreTrainedModel:
    """A random two-layer model of a real architecture, with weights large enough to matter."""
    attention.register()
    config = type(FAMILIES[family]).from_dict(
        FAMILIES[family].to_dict()
        | SIZES
        | {
            "head_dim": 16 if family.startswith("gemma") else 8,
            "layer_types": None,
            "initializer_range": 0.2,
        }
        | sizes
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=SEGMENTS, dtype=dtype)


def random_pairs(
    rng: np.random.Generator, num_pairs: int, longest: int = 12, shortest_prompt: int = 1
) -> list[TokenizedPair]:
    """Pairs of random ids with lengths from 1 (prompts from `shortest_prompt`) to `longest`."""

    def ids(shortest: int) -> np.ndarray:
        return rng.integers(3, VOCAB, rng.integers(shortest, longest + 1)).astype(np.int32)

    shortest = 2 if shortest_prompt == 0 else 1
    return [
        TokenizedPair(ids(shortest_prompt), ids(shortest), ids(shortest)) for _ in range(num_pairs)
    ]


def padded_logps(model: PreTrainedModel, pairs: Sequence[TokenizedPair]) -> tuple[Tensor, Tensor]:
    """Summed log-probs and lengths of all responses by the plain way, each [2P].

    Every response with a prompt of its own, padded to the longest, full logits, log_softmax,
    gather, mask; chosen ones first. transformers' own eager attention.
    """
    sequences = [(p.prompt_ids, p.chosen_ids) for p in pairs]
    sequences += [(p.prompt_ids, p.rejected_ids) for p in pairs]
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    scored = torch.zeros(len(sequences), width, dtype=torch.bool)
    for i, (prompt, response) in enumerate(sequences):
        length = len(prompt) + len(response)
        ids[i, :length] = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        scored[i, len(prompt) : length] = True
    model.set_attn_implementation("eager")
    try:
        # Padding is on the right, where causal attention never looks, so it needs no mask. (With
        # one, transformers' float64 window mask overflows to NaN.)
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        model.set_attn_implementation(SEGMENTS)
    logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    scored = scored[:, 1:]
    return (logps * scored).sum(-1), scored.sum(-1)


def simpo_by_hand(
    logps: Tensor, lengths: Tensor, beta: float, ratio: float, hinge: bool, smoothing: float
) -> Tensor:
    """Preference loss of each pair from the output of `padded_logps`, as the paper writes it."""
    chosen, rejected = (logps / lengths).chunk(2)
    z = beta * chosen - beta * rejected - beta * ratio
    if hinge:
        return torch.clamp(1 - z, min=0)
    right, wrong = 1 / (1 + torch.exp(-z)), 1 / (1 + torch.exp(z))
    return -(1 - smoothing) * torch.log(right) - smoothing * torch.log(wrong)


def loss_by_hand(
    model: PreTrainedModel, pairs: Sequence[TokenizedPair], loss: SimpoConfig
) -> Tensor:
    """The whole loss on pairs by the plain way: mean over pairs, sft term over tokens."""
    logps, lengths = padded_logps(model, pairs)
    preference = simpo_by_hand(
        logps,
        lengths,
        loss.beta,
        loss.gamma_beta_ratio,
        loss.name == "hinge",
        getattr(loss, "label_smoothing", 0.0),
    ).mean()
    chosen = len(pairs)
    return preference - loss.sft_weight * logps[:chosen].sum() / lengths[:chosen].sum()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name, in float64."""
    return {n: p.grad.double() for n, p in module.named_parameters() if p.grad is not None}


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real preference pairs that lie beside a development checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real pairs at {folder}")
    return folder


def skip_without(command: str, packages: str) -> None:
    """Skip a test whose program is not installed; under `.ci/run`, which installs it, fail."""
    if not shutil.which(command):
        reason = f"{command} is not installed (Debian: {packages})"
        (pytest.fail if os.environ.get("SIMPO_TESTS_SKIP_NOTHING") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A real Slurm of two nodes on this machine, for the commands and runs that tests start."""
    skip_without("slurmctld", "slurmctld slurmd slurm-client munge")
    skip_without("slurmdbd", "slurmdbd mariadb-server-core mariadb-client-core")
    script = Path(__file__).parent / "slurm" / "cluster.sh"
    root = tmp_path_factory.mktemp("slurm")
    os.environ["SLURM_CONF"] = str(root / "slurm.conf")
    try:
        subprocess.run(["bash", script, "up", root], check=True)
        yield root
    finally:
        subprocess.run(["bash", script, "down", root], check=True)
        del os.environ["SLURM_CONF"]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The converted built-in model; fetched on first use."""
    from simpo.model.smollm2 import smollm2_folder

    return smollm2_folder(Path("~/.cache/simpo").expanduser())


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk with a tokenizer trained on the demo's text: whole runs in seconds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from simpo.config.inputs import TEMPLATES
    from simpo.data.demo.records import demo_records

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    texts = (turn["content"] for row in demo_records(0, "train") for turn in row["prompt"])
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        chat_template=(TEMPLATES / "chatml.jinja").read_text(),
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the tokenizer of the other, and rows of whole blocks."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("wide") / "model")
    (folder / "model.safetensors").unlink()
    tiny_model("llama", **WIDE, vocab_size=384).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_run(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Overrides of a whole run that takes seconds: 6 steps of 4 pairs, 16 pairs held out."""
    return tiny_overrides(tiny_folder, tmp_path)


def tiny_overrides(tiny_folder: Path, folder: Path) -> list[str]:
    """Those of `tiny_run`, with everything that the run writes below a folder."""
    from simpo.data.demo.records import demo_records

    for split, count in (("train", 24), ("test", 16)):
        rows = demo_records(0, split)[:count]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return [
        f"model.path={tiny_folder}",
        "model.lora.rank=0",
        "data=jsonl",
        f"data.sources=[{{path: {folder}/train.jsonl, test_path: {folder}/test.jsonl}}]",
        "train.pairs_per_step=4",
        "train.tokens_per_row=256",
        "train.learning_rate=1e-3",
        "train.precision=fp32",
        "train.eval_every=3",
        "train.checkpoint_every=2",
        "sample.num_prompts=3",
        "sample.max_new_tokens=8",
        f"output_dir={folder}/outputs",
        f"cache_dir={folder}/cache",
        "backend.device=cpu",
    ]

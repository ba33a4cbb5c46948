"""Generates replies to batches of prompts, with transformers or with vLLM."""

from __future__ import annotations

import importlib.util
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from simpo.backend import build_backend
from simpo.config.choices import Dtype, Engine, Quantization
from simpo.config.errors import ConfigError, RunError
from simpo.config.models import ModelConfig
from simpo.config.schema import RunConfig
from simpo.data.chats.chat import Chat
from simpo.model.adapters import adapter_settings
from simpo.model.generate import Reply, Sampling, decode_reply, generate_replies
from simpo.model.load import load_policy, without_new_adapters
from simpo.model.policy import Policy
from simpo.model.pretrained import model_source
from simpo.model.saved import SavedModel
from simpo.model.talk import load_for_talk
from simpo.on_policy.files import ADAPTER, content_hash
from simpo.run.progress import say

SHOWN_CHARS = 300
"""Of an error of vLLM."""
WITHOUT = "on_policy.engine=transformers does without it"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 512)
"""Values of vLLM's `max_lora_rank` that all its versions take."""
Generate = Callable[[Sequence[list[int]], Sampling], list[Reply]]
"""Maps token ids of prompts to a reply to each prompt."""


def engine_of(wanted: Engine) -> Engine:
    """The library that generates: `on_policy.engine`, with auto decided."""
    if wanted is not Engine.auto:
        return wanted
    able = importlib.util.find_spec("vllm") is not None and torch.cuda.is_available()
    return Engine.vllm if able else Engine.transformers


def with_transformers(run: RunConfig, chat: Chat) -> Generate:
    """Generates with transformers, with the model that the run's training begins with."""
    backend = build_backend(run.backend, run.train.precision)
    cache_dir = Path(run.cache_dir).expanduser()
    say(f"loading the weights of {run.model.path} ...")
    model = without_new_adapters(run.model, backend.device)
    policy = load_policy(model, cache_dir, backend.device, seed=0, bf16=backend.bf16)
    generate = with_policy(policy, chat, backend.device)

    def generate_batch(prompts: Sequence[list[int]], sampling: Sampling) -> list[Reply]:
        with backend.unsharded(policy):
            return generate(prompts, sampling)

    return generate_batch


def with_saved(run: RunConfig, saved: SavedModel, chat: Chat) -> Generate:
    """Generates with a model that lies somewhere, by `on_policy.engine`.

    Raises:
        ConfigError: it cannot be loaded.
    """
    if engine_of(run.on_policy.engine) is Engine.vllm:
        return with_vllm(saved.model, saved.cache_dir, chat)
    device = build_backend(run.backend, run.train.precision).device
    return with_policy(
        load_for_talk(saved.model, saved.cache_dir, device, Dtype.auto), chat, device
    )


def with_policy(policy: Policy, chat: Chat, device: torch.device) -> Generate:
    """Generates with a model that is loaded; a batch depends on its prompts and its seed alone."""

    def generate_batch(prompts: Sequence[list[int]], sampling: Sampling) -> list[Reply]:
        torch.manual_seed(int(content_hash([sampling.seed, *prompts]), 16) % 2**63)
        return generate_replies(policy, chat, prompts, sampling, device)

    return generate_batch


def with_vllm(model: ModelConfig, cache_dir: Path, chat: Chat) -> Generate:
    """Generates with vLLM, with an adapter beside its base; each reply has its own seed.

    Raises:
        ConfigError: the model is quantised here, its adapter has what vLLM does not compute, or
            vLLM cannot load it.
    """
    if model.quantization is not Quantization.none:
        raise ConfigError(
            [
                f"model.quantization: vllm does not quantise here, got {model.quantization.value} "
                f"({WITHOUT})"
            ]
        )
    adapter = model.lora.adapter
    options = {} if adapter is None else _adapter_options(adapter)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # read when vllm is imported
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    request = adapter and LoRARequest("adapter", 1, str(Path(adapter).expanduser()))
    engine = _load_vllm(model, cache_dir, options)

    def generate_batch(prompts: Sequence[list[int]], sampling: Sampling) -> list[Reply]:
        asked = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=int(content_hash([sampling.seed, ids]), 16) % 2**31,
                stop_token_ids=[chat.end_id],
                ignore_eos=True,  # a reply ends where training ended it, and nowhere else
                logprobs=sampling.top_logprobs or None,
            )
            for ids in prompts
        ]
        tokens = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        try:
            outputs = engine.generate(tokens, asked, use_tqdm=False, lora_request=request)
        except Exception as error:  # its process may have ended
            raise RunError(
                f"vllm failed: {_in_a_line(error)} (the same command continues; {WITHOUT})"
            ) from error
        return [_reply(chat, output.outputs[0], sampling.top_logprobs) for output in outputs]

    return generate_batch


def _load_vllm(model: ModelConfig, cache_dir: Path, options: Mapping[str, Any]) -> Any:
    """An engine of vLLM.

    Raises:
        ConfigError: vLLM cannot load the model.
    """
    from vllm import LLM

    source = model_source(model, cache_dir)
    try:
        return LLM(
            model=source,
            tokenizer=os.path.expanduser(model.tokenizer or source),
            revision=model.revision,
            tokenizer_revision=None if model.tokenizer else model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=model.dtype.value,
            generation_config="vllm",  # not the model's own defaults
            **options,
        )
    except Exception as error:  # of pydantic, torch, the hub or a process of vLLM
        raise ConfigError(
            [f"model.path: vllm cannot load {source}: {_in_a_line(error)} ({WITHOUT})"]
        ) from error


def _adapter_options(adapter: str) -> dict[str, Any]:
    """What vLLM must be told of an adapter when it loads the base.

    Raises:
        ConfigError: it cannot be loaded, or has what vLLM refuses or silently leaves out.
    """
    settings = adapter_settings(ADAPTER, adapter)
    kind = getattr(settings.peft_type, "value", "none")
    if fault := f"adapters of type {kind}" if kind != "LORA" else _lora_fault(settings):
        remedy = "merge it with simpo export, or set on_policy.engine=transformers"
        raise ConfigError(
            [f"{ADAPTER}: vllm does not take {fault}, which {adapter} has ({remedy})"]
        )
    rank = next(rank for rank in VLLM_RANKS if rank >= settings.r)
    return {"enable_lora": True, "max_lora_rank": rank}


def _lora_fault(settings: Any) -> str:
    """What a LoRA adapter has that vLLM does not compute; empty if there is nothing.

    Args:
        settings: its peft configuration.
    """
    faults = {
        "DoRA": settings.use_dora,
        "whole modules beside an adapter": settings.modules_to_save,
        "single tokens beside an adapter": settings.trainable_token_indices,
        "biases": settings.bias != "none" or settings.lora_bias,
        "ranks or alphas of single layers": settings.rank_pattern or settings.alpha_pattern,
        f"ranks above {VLLM_RANKS[-1]}": settings.r > VLLM_RANKS[-1],
    }
    return next((fault for fault, there in faults.items() if there), "")


def _in_a_line(error: Exception) -> str:
    """An error of vLLM in short; the first line alone may only say how many errors there are."""
    return textwrap.shorten(str(error) or type(error).__name__, SHOWN_CHARS, placeholder=" ...")


def _reply(chat: Chat, output: Any, top_logprobs: int) -> Reply:
    ids = list(output.token_ids)
    if not top_logprobs:
        return decode_reply(chat, ids)
    # vLLM gives the drawn token too, whatever its rank.
    likeliest = sorted(output.logprobs[0].items(), key=lambda one: -one[1].logprob)
    return decode_reply(
        chat, ids, [(token, float(one.logprob)) for token, one in likeliest[:top_logprobs]]
    )

"""A stand-in for vLLM, for machines without a GPU: the signatures of vLLM 0.33, what it refuses,
where it stops and what it returns. A small model of transformers generates, token by token.

Parameters that no caller here could want are left out, so they fail like unknown ones.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

ENGINE_ARGS = {
    *("max_model_len", "max_logprobs", "logprobs_mode", "max_num_seqs", "max_num_batched_tokens"),
    *("generation_config", "load_format", "download_dir", "enable_lora", "max_lora_rank"),
    *("enable_prefix_caching", "disable_log_stats", "use_tqdm_on_load", "max_loras"),
}
"""What LLM passes on to EngineArgs."""
MAX_LOGPROBS = 20
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")


class VLLMValidationError(Exception):
    """A request that vLLM refuses."""


@dataclass
class SamplingParams:
    """A struct: unknown keywords are TypeErrors."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        assert self.n == 1 and self.stop is None and self.min_tokens == 0, "not in this stand-in"
        refused = {
            "temperature": not 0 <= self.temperature <= 2,
            "top_p": not 0 < self.top_p <= 1,
            "max_tokens": self.max_tokens is not None and self.max_tokens < 1,
            "logprobs": self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS,
        }
        for name in (name for name, wrong in refused.items() if wrong):
            raise VLLMValidationError(f"{name} got {getattr(self, name)}")


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        assert self.lora_path, "lora_path cannot be empty"


def TokensPrompt(*, prompt_token_ids: list[int]) -> dict[str, list[int]]:
    """A typed dict."""
    return {"prompt_token_ids": prompt_token_ids}


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class Asked:
    """What models were loaded and asked.

    Attributes:
        models: the keywords of each LLM.
        requests: ids of each prompt, and its sampling.
        eos_id: instead of the tokenizer's own.
        broken: message of the error that the next `generate` raises.
    """

    models: list[Mapping[str, Any]] = field(default_factory=list)
    requests: list[tuple[list[int], SamplingParams]] = field(default_factory=list)
    eos_id: int | None = None
    broken: str = ""


def install(patch: pytest.MonkeyPatch) -> Asked:
    """Let `import vllm` find the stand-in. As on one GPU, a second LLM beside one that is still
    alive finds no memory."""
    asked = Asked()
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class LLM:
        def __init__(
            self,
            model: str,
            *,
            tokenizer: str | None = None,
            skip_tokenizer_init: bool = False,
            trust_remote_code: bool = False,
            tensor_parallel_size: int = 1,
            dtype: str = "auto",
            quantization: str | None = None,
            revision: str | None = None,
            tokenizer_revision: str | None = None,
            seed: int = 0,
            gpu_memory_utilization: float = 0.92,
            enforce_eager: bool = False,
            hf_overrides: Mapping[str, Any] | None = None,
            **more: Any,
        ) -> None:
            if unknown := more.keys() - ENGINE_ARGS:
                raise TypeError(f"EngineArgs.__init__() got unexpected {unknown}")
            if dtype not in DTYPES:
                raise ValueError(f"Unknown dtype: {dtype!r}")
            if alive:
                raise ValueError("Free memory on device cuda:0 is less than desired")
            alive.add(self)
            asked.models.append({"model": model, "tokenizer": tokenizer, "dtype": dtype, **more})
            self._model: Any = AutoModelForCausalLM.from_pretrained(model, revision=revision)
            self._lora_rank = more.get("max_lora_rank", 16) if more.get("enable_lora") else 0
            if self._lora_rank and self._lora_rank not in LORA_RANKS:
                raise ValueError(f"max_lora_rank: Input should be one of {LORA_RANKS}")
            self._tokenizer = AutoTokenizer.from_pretrained(
                tokenizer or model, revision=tokenizer_revision
            )
            limit = self._model.config.max_position_embeddings
            self._max_model_len = more.get("max_model_len") or limit
            self._more_eos: set[int] = set()
            if more.get("generation_config", "auto") == "auto":
                eos = self._model.generation_config.eos_token_id
                self._more_eos = set(eos if isinstance(eos, list) else [eos])

        def generate(
            self,
            prompts: Sequence[Mapping[str, Any]],
            sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
            *,
            use_tqdm: bool = True,
            lora_request: LoRARequest | None = None,
        ) -> list[Any]:
            if asked.broken:
                raise RuntimeError(asked.broken)
            assert isinstance(sampling_params, Sequence), "vLLM's own defaults"
            if len(sampling_params) != len(prompts):
                raise ValueError("The lengths of prompts and sampling_params must be the same.")
            if lora_request is not None:
                self._adapt(lora_request)
            found = zip(prompts, sampling_params, strict=True)
            return [self._complete(prompt["prompt_token_ids"], how) for prompt, how in found]

        def _adapt(self, request: LoRARequest) -> None:
            """It is loaded with its first request."""
            if not self._lora_rank:
                raise ValueError(f"Got lora_request {request} but LoRA is not enabled!")
            if isinstance(self._model, PeftModel):
                return
            settings = PeftConfig.from_pretrained(request.lora_path)
            refused = {
                "vLLM only supports modules_to_save being None.": settings.modules_to_save,
                "vLLM does not yet support DoRA.": settings.use_dora,
                "Adapter bias is not supported.": settings.bias != "none",
                f"LoRA rank {settings.r} is greater than max_lora_rank {self._lora_rank}.": (
                    settings.r > self._lora_rank
                ),
            }
            if faults := [fault for fault, there in refused.items() if there]:
                raise ValueError(" ".join(faults))
            # What else the file says is not read.
            settings.rank_pattern, settings.alpha_pattern = {}, {}
            self._model = PeftModel.from_pretrained(
                self._model, request.lora_path, config=settings
            ).eval()

        @torch.no_grad()
        def _complete(self, prompt: list[int], how: SamplingParams) -> Any:
            asked.requests.append((prompt, how))
            if len(prompt) >= self._max_model_len:
                raise VLLMValidationError("The decoder prompt is longer than the maximum")
            eos = self._tokenizer.eos_token_id if asked.eos_id is None else asked.eos_id
            ends = {*(how.stop_token_ids or ())}
            ends |= set() if how.ignore_eos else {eos, *self._more_eos}
            random = torch.Generator().manual_seed(how.seed or 0)
            room = min(how.max_tokens or self._max_model_len, self._max_model_len - len(prompt))
            ids: list[int] = []
            logprobs: list[dict[int, Logprob]] = []
            while len(ids) < room and not (ids and ids[-1] in ends):
                logits = self._model(torch.tensor([prompt + ids])).logits[0, -1].float()
                token = int(logits.argmax())
                if how.temperature:
                    chances = (logits / how.temperature).softmax(-1)
                    token = int(torch.multinomial(chances, 1, generator=random))
                ids.append(token)
                raw = logits.log_softmax(-1)
                kept = [token, *raw.topk(how.logprobs or 0).indices.tolist()]
                logprobs.append({i: Logprob(raw[i].item()) for i in kept})
            # The token that ends a reply is among its ids.
            output = SimpleNamespace(
                token_ids=tuple(ids), logprobs=None if how.logprobs is None else logprobs
            )
            return SimpleNamespace(outputs=[output])

    module = ModuleType("vllm")
    module.__dict__.update(LLM=LLM, SamplingParams=SamplingParams, TokensPrompt=TokensPrompt)
    module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    lora, request = ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    request.__dict__.update(LoRARequest=LoRARequest)
    for one in (module, lora, request):
        patch.setitem(sys.modules, one.__name__, one)
    return asked

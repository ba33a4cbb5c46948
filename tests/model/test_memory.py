"""The memory estimated before a model is loaded, against torch's tracker and sums by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from itertools import accumulate, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, PreTrainedConfig

from simpo.config.choices import Checkpointing
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError
from simpo.data.packing import pack
from simpo.data.pairs import PackedPairs, TokenizedPair
from simpo.loss import PairLogps
from simpo.model import checkpointing, memory
from simpo.model.host import host_memory
from simpo.model.memory import GIB, Estimate, Memory, Place
from simpo.model.policy import Policy
from tests.support.tiny_models import EXPERTS, SIZES, tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
# Queries and output, keys and values, three of the MLP, two norms.
LAYER = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
TABLE = 128256 * 4096
WEIGHTS = 32 * LAYER + 2 * TABLE + 4096
# Rank 16 on all linear layers: 16 weights for each input and each output.
ADAPTERS = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))


def estimate(settings: PreTrainedConfig, place: Place, *words: str) -> Estimate:
    return Estimate(compose_run(["model.lora.rank=0", *words]), settings, place)


def row_of(pairs: int, tokens: int, responses: int = 2) -> PackedPairs:
    part = np.ones(tokens // 2 // responses, dtype=np.int32)
    pair = TokenizedPair.of(np.ones(tokens // 2, dtype=np.int32), *[part] * responses)
    return pack([pair] * pairs, range(pairs))


def difference(logps: PairLogps) -> torch.Tensor:
    return logps.rejected - logps.chosen


@pytest.mark.parametrize(
    ("family", "kind", "responses"),
    [
        *product(["llama_tied", "gemma2", "mixtral"], Checkpointing, [2]),
        ("llama_tied", Checkpointing.none, 6),
        ("llama_tied", Checkpointing.full, 6),
    ],
)
def test_peak_of_a_real_step(family: str, kind: Checkpointing, responses: int) -> None:
    """torch's tracker on real tensors, whole model and row, against two layers of fake ones."""
    model = tiny_model(family, num_hidden_layers=5)
    if family in EXPERTS:
        model.set_experts_implementation("grouped_mm")
    checkpointing.enable(model, kind)
    policy = Policy(model)
    policy.train()
    row = row_of(4, 256, responses)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tracker = MemTracker()
    tracker.track_external(policy)
    with tracker:
        loss, _ = policy(row, difference)
        loss.backward()
    peak = tracker.get_tracker_snapshot("peak")[CPU]["Total"]
    words = [f"model.gradient_checkpointing={kind.value}"]
    found = estimate(model.config, Place(CPU), *words).step(row)
    assert (found.total - found.optimizer) * GIB == pytest.approx(peak, rel=0.05)


@pytest.fixture
def four_processes() -> Iterator[DeviceMesh]:
    """Four of which only this one is there; the others' part of a collective stays unwritten."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("bf16", "kind", "row"),
    [
        (False, Checkpointing.none, row_of(1, 64)),
        (True, Checkpointing.none, row_of(2, 256)),
        (True, Checkpointing.full, row_of(2, 256)),
    ],
)
def test_peak_of_a_sharded_step(
    bf16: bool, kind: Checkpointing, row: PackedPairs, four_processes: DeviceMesh
) -> None:
    """What torch's allocator hands out to FSDP in a row, against the estimate."""
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 1024}
    model = tiny_model("llama", num_hidden_layers=5, **sizes)
    checkpointing.enable(model, kind)
    policy = Policy(model)
    policy.train()
    options: dict[str, Any] = {"mesh": four_processes}
    if bf16:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in (*model.get_decoder().layers, policy):
        fully_shard(layer, **options)
    for measured in (False, True):  # the second row finds gradients
        allocations = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with allocations if measured else nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss, _ = policy(row, difference)
            loss.backward()
    events: Any = allocations.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(accumulate(change for _, change in changes))
    held = sum(2 * cast(DTensor, p).to_local().nbytes for p in policy.parameters())
    words = ["backend=fsdp", f"model.gradient_checkpointing={kind.value}"]
    found = estimate(model.config, Place(CPU, 4, bf16), *words).step(row)
    assert (found.total - found.optimizer) * GIB == pytest.approx(held + peak, rel=0.15)


@pytest.mark.parametrize("family", ["qwen2", "mistral_window", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_other_families_are_drawn(family: str) -> None:
    found = estimate(tiny_model(family).config, Place(GPU, bf16=True)).step(row_of(1, 64))
    assert found.activations > 0


def test_states_by_hand() -> None:
    """Llama-3-8B with AdamW on 8 processes; nothing of it is allocated."""
    before = psutil.Process().memory_info().rss
    gib = WEIGHTS / GIB
    assert gib * GIB == 8_030_261_248
    cases = {
        "single": (4 * gib, 4 * gib, 8 * gib),
        "ddp": (4 * gib, 4 * gib, 8 * gib),
        "fsdp": (gib / 2, gib / 2, gib),
        # bf16 weights; gradients in fp32; fp32 weights and two means.
        "zero2": (2 * gib, gib / 2, 12 / 8 * gib),
        "zero3": (gib / 4, gib / 2, 12 / 8 * gib),
    }
    for backend, expected in cases.items():
        place = Place(GPU, 1 if backend == "single" else 8, bf16=True)
        found = estimate(LLAMA_3_8B, place, f"backend={backend}").between_steps()
        assert (found.weights, found.gradients, found.optimizer) == pytest.approx(expected)
    assert psutil.Process().memory_info().rss - before < 0.2 * GIB


def test_states_of_adapters_by_hand() -> None:
    """Those of the adapters come on top of the frozen weights in bf16, or packed."""
    place, words = Place(GPU, bf16=True), ["model.lora.rank=16"]
    found = estimate(LLAMA_3_8B, place, *words).between_steps()
    trained = 4 * ADAPTERS / GIB
    assert found.weights == pytest.approx(2 * WEIGHTS / GIB + trained)
    assert (found.gradients, found.optimizer) == pytest.approx((trained, 2 * trained))
    found = estimate(LLAMA_3_8B, place, *words, "model.quantization=nf4").between_steps()
    linear = 32 * (LAYER - 2 * 4096)
    plain = 2 * (2 * TABLE + 65 * 4096)
    # Half a byte a weight, a scale of a byte for 64, and four bytes for 256 of these.
    packed = linear * (1 / 2 + 1 / 64 + 4 / 64 / 256)
    assert found.weights == pytest.approx((packed + plain) / GIB + trained, rel=1e-4)


def test_buffers_of_fsdp_by_hand() -> None:
    """At the end of a long model's step: embeddings and head gathered, with their gradients in
    bf16, and in fp32 to be summed."""
    found = estimate(LLAMA_3_8B, Place(GPU, 64, bf16=True), "backend=fsdp").step(row_of(1, 64))
    root = 2 * TABLE + 4096
    assert found.communication == pytest.approx((2 + 2 + 4) * root / GIB)
    assert found.activations == 0


def test_activations_of_a_layer_by_hand() -> None:
    """Without checkpointing: what a Llama layer keeps for each token in fp32."""
    settings = LlamaConfig(**SIZES | {"num_hidden_layers": 2})
    deep = LlamaConfig(**SIZES | {"num_hidden_layers": 12})
    row, place = row_of(2, 512), Place(CPU)
    few, many = (estimate(config, place).step(row).activations for config in (settings, deep))
    # Two norms keep their input and what they scale; the sums of both residuals are such inputs.
    norms = 4 * 32 + 2
    # Rotated queries and keys, values, attention's output before and after it is joined, with the
    # log-sum-exp of four heads; keys and values of the prompt again, for the rejected response.
    attention = 32 + 16 + 16 + 32 + 32 + 4 + 2 * 16 * 3 / 4
    # Input, gate, its SiLU, up and their product.
    mlp = 4 * 48
    normed = 2 * 32
    expected = 4 * 1024 * (norms + normed + attention + mlp)
    assert (many - few) / 10 * GIB == pytest.approx(expected, rel=0.15)


def test_selective_checkpointing_keeps_what_a_gpu_kernel_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For each token and layer of Llama-3-8B: 4096 outputs in bf16, 32 log-sum-exps in fp32."""
    words = ["model.gradient_checkpointing=selective"]
    row, found = row_of(4, 1024), []
    for kept in (checkpointing.ATTENTION, set[str]()):
        monkeypatch.setattr(checkpointing, "ATTENTION", kept)
        own = estimate(LLAMA_3_8B, Place(GPU, bf16=True), *words)
        found.append(own.step(row).activations * GIB)
    assert found[0] - found[1] == pytest.approx(4096 * 32 * (2 * 4096 + 4 * 32), rel=1e-3)


@pytest.mark.parametrize(
    ("needed", "remedy"),
    [
        (
            Memory(weights=1, gradients=1, optimizer=2, activations=9, logits=0.5),
            "lower train.tokens_per_row, or model.gradient_checkpointing=selective or full",
        ),
        (
            Memory(weights=2, gradients=4, optimizer=8, activations=1, logits=0.5),
            "model.lora.rank=16 trains adapters only, or backend=fsdp on more GPUs",
        ),
        (
            Memory(weights=12, gradients=0.5, optimizer=0.25, activations=1, logits=0.5),
            "backend=fsdp on more GPUs, or model.quantization=nf4 with model.lora.rank=16",
        ),
    ],
)
def test_memory_that_is_not_there(
    needed: Memory, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(available=10 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(ConfigError) as error:
        memory.check_memory(needed, compose_run(["model.lora.rank=0"]), CPU)
    assert str(error.value) == (
        f"train.check_memory: a step needs about {needed.total:.2f} GiB (weights "
        f"{needed.weights:.2f}, gradients {needed.gradients:.2f}, optimizer "
        f"{needed.optimizer:.2f}, activations {needed.activations:.2f}, logits 0.50), there are "
        f"10.00 GiB ({remedy}; train.check_memory=false tries all the same)"
    )


WEIGHTS_FIRST = Memory(weights=12, gradients=0.1, optimizer=0.2, activations=1)
STATE_FIRST = Memory(weights=2, gradients=4, optimizer=8, activations=1)
ROWS_FIRST = Memory(weights=2, gradients=0.1, optimizer=0.2, activations=9)
GATHERED_FIRST = Memory(weights=2, activations=1, communication=5)
LORA = "model.lora.rank=16"


@pytest.mark.parametrize(
    ("words", "needed", "expected"),
    [
        ([LORA, "model.quantization=nf4"], WEIGHTS_FIRST, "backend=fsdp on more GPUs"),
        (
            [LORA, "backend=zero3"],
            WEIGHTS_FIRST,
            "more GPUs, or model.quantization=nf4 with model.lora.rank=16",
        ),
        ([LORA, "backend=fsdp", "model.quantization=nf4"], WEIGHTS_FIRST, "more GPUs"),
        (
            [LORA, "backend=fsdp", "backend.shard_processes=2"],
            STATE_FIRST,
            "a larger backend.shard_processes",
        ),
        (
            ["backend=fsdp", "model.lora.rank=0"],
            STATE_FIRST,
            "model.lora.rank=16 trains adapters only, or more GPUs",
        ),
        ([LORA, "backend=zero2"], STATE_FIRST, "backend=fsdp on more GPUs"),
        (
            ["model.gradient_checkpointing=selective"],
            ROWS_FIRST,
            "lower train.tokens_per_row, or model.gradient_checkpointing=full",
        ),
        (["model.gradient_checkpointing=full"], ROWS_FIRST, "lower train.tokens_per_row"),
        ([LORA, "backend=zero3"], GATHERED_FIRST, "lower backend.reduce_bucket_size"),
        (
            [LORA, "backend=fsdp"],
            GATHERED_FIRST,
            "GPUs with more memory: layers are gathered whole",
        ),
    ],
)
def test_a_remedy_is_not_what_the_run_does_already(
    words: list[str], needed: Memory, expected: str
) -> None:
    assert memory.remedy(needed, compose_run(words)) == expected


@pytest.mark.parametrize(
    ("words", "step", "save"),
    [
        # A file of the model and the layer after it.
        (["backend=fsdp"], 0, 5e9 + 4 * LAYER),
        # A copy of weights and two means, in fp32.
        (["backend=fsdp", "backend.async_save=true"], 0, 8 * 12 * WEIGHTS / 8),
        (["backend=fsdp", "backend.cpu_offload=true"], 16 * WEIGHTS / 8, 5e9 + 4 * LAYER),
        (["backend=zero3"], 0, 8 * 4 * 1e9),
        (["backend=zero2"], 0, 8 * 4 * WEIGHTS / 8),
        (["backend=ddp"], 0, 5e9 + 4 * LAYER),
        (
            ["backend=fsdp", LORA, "model.quantization=nf4", "model.dtype=float32"],
            0,
            4 * ADAPTERS,
        ),
    ],
)
def test_host_memory_by_hand(words: list[str], step: float, save: float) -> None:
    """Of 8 processes with Llama-3-8B, 2 GiB each beside."""
    run = compose_run(words if LORA in words else ["model.lora.rank=0", *words])
    found = host_memory(run, Estimate(run, LLAMA_3_8B, Place(GPU, 8, bf16=True)), 8)
    assert found.step == pytest.approx(8 * (2 + step / GIB))
    assert found.save - found.step == pytest.approx(save / GIB)


MLP = 4096 * 14336


@pytest.mark.parametrize(
    ("words", "load"),
    [
        # Four weights at a time become fp32 in each process: both tables, and two of the MLP.
        (["backend=ddp"], 8 * 4 * (2 * TABLE + 2 * MLP)),
        (["backend=zero2"], 8 * 4 * (2 * TABLE + 2 * MLP)),
        # With adapters all stay in bf16, and are copied from the files' pages.
        (["backend=ddp", LORA], 0),
        (["backend=ddp", LORA, "model.quantization=nf4"], 0),
        # One at a time is quantised.
        (["backend=ddp", LORA, "model.quantization=nf4", "model.dtype=float32"], 8 * 4 * TABLE),
        # Eighths of a table in each process, and a whole one in the first.
        (["backend=fsdp"], 4 * TABLE),
        (["backend=zero3"], 4 * TABLE),
        (["backend=fsdp", LORA], 2 * TABLE),
        # Two groups of four.
        (["backend=fsdp", "backend.shard_processes=4"], 2 * 4 * TABLE),
        # DoRA begins with the norms of whole weights.
        (
            ["backend=fsdp", LORA, "model.lora.dora=true", "model.dtype=float32"],
            8 * 4 * (2 * TABLE + 2 * MLP),
        ),
    ],
)
def test_host_memory_of_loading(words: list[str], load: float) -> None:
    """8 processes with Llama-3-8B, whose files hold bf16."""
    run = compose_run(words if LORA in words else ["model.lora.rank=0", *words])
    settings = deepcopy(LLAMA_3_8B)
    settings.dtype = torch.bfloat16
    found = host_memory(run, Estimate(run, settings, Place(GPU, 8, bf16=True)), 8)
    assert found.load == pytest.approx(8 * 2 + load / GIB)


def test_a_run_is_refused_before_its_weights_are_read(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from simpo.loop.train import train

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("simpo.loop.setup.load_policy", fail)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    with pytest.raises(ConfigError, match=r"^train\.check_memory: a step needs about 0\.\d\d GiB"):
        train(compose_run([*tiny_run, "train.check_memory=true", f"run_dir={tmp_path}"]))

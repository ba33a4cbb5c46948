"""Adapters on quantised bases: compared with layers of the dequantised weights; whole runs."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from simpo.config.choices import Quantization
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError
from simpo.config.models import LoraConfig
from simpo.data.packing import pack
from simpo.loop.train import train
from simpo.model import cost, memory
from simpo.model.check import check_packing
from simpo.model.policy import Policy
from simpo.model.pretrained import load_settings
from tests.model.test_peft import PAIRS, adapted, loaded, padded_step, saved, step, trained
from tests.support.tiny_models import WIDE
from tests.support.whole_runs import assert_same_run, logged, run, start, state_of, wait_for

BOTH = [Quantization.nf4, Quantization.int8]


def dequantised(policy: Policy) -> dict[str, Tensor]:
    """What the packed weights of a policy stand for, by their names in a plain model's adapters."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    weights = {}
    for name, layer in adapted(policy).items():
        base: Any = layer.base_layer
        if type(base.weight).__name__ == "Params4bit":
            weight = dequantize_4bit(base.weight.data, base.weight.quant_state)
        else:
            weight = int8_vectorwise_dequant(base.weight.data, base.state.SCB)
        weights[f"{name}.base_layer.weight"] = weight.float()
    return weights


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2"])
@pytest.mark.parametrize("quantization", BOTH)
def test_what_is_quantised(
    quantization: Quantization, family: str, bf16: bool, tmp_path: Path
) -> None:
    """The linear layers of the body, but not the head, which the loss reads, nor anything else."""
    policy = loaded(saved(family, tmp_path), quantization=quantization, bf16=bf16)
    assert type(policy.base.get_output_embeddings()) is nn.Linear
    assert policy.head()[0].dtype is torch.float32
    kinds = {"nf4": "Params4bit", "int8": "Int8Params"}
    for name, parameter in policy.named_parameters():
        packed = type(parameter).__name__ == kinds[quantization.value]
        assert packed is ("proj.base_layer" in name), name
        assert parameter.requires_grad is ("lora_" in name), name
        if packed and quantization is Quantization.nf4:
            # What FSDP casts to is what they are stored as, so that it does not cast them.
            assert parameter.dtype is (torch.bfloat16 if bf16 else torch.float32)
            state = cast(Any, parameter).quant_state
            assert state.nested and state.quant_type == "nf4"
        elif not packed:
            assert parameter.dtype is torch.float32, name
    check_packing(policy, bf16)


@pytest.mark.parametrize(
    ("quantization", "form", "tolerance"),
    [("nf4", {}, 1e-4), ("nf4", {"dora": True}, 1e-4), ("int8", {}, 0.05)],
)
def test_loss_and_gradients_of_a_quantised_base(
    quantization: str, form: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    """Against the padded path on plain layers of the dequantised weights; int8 rounds inputs too.

    An evaluation in between changes nothing: bitsandbytes repacks weights in one on some CPUs.
    """
    path = saved("llama", tmp_path)
    lora = LoraConfig(rank=4, alpha=8.0, **form)
    policy = trained(loaded(path, quantization=Quantization(quantization), lora=lora))
    first, before = step(policy)
    policy.eval()
    row = pack(PAIRS, range(len(PAIRS)))
    with torch.no_grad():
        policy(row, lambda logps: logps.chosen)
    loss, got = step(policy)
    assert torch.equal(loss, first)
    assert all(torch.equal(got[name], gradient) for name, gradient in before.items())

    plain = loaded(path, lora=lora)
    adapters = {n: p for n, p in policy.base.named_parameters() if p.requires_grad}
    weights = dequantised(policy)
    assert len(weights) == 2 * 7
    for name, weight in weights.items():
        exact = plain.base.get_parameter(name)
        assert 0 < (weight - exact).norm() < 0.12 * exact.norm(), name
    plain.base.load_state_dict(weights | adapters, strict=False)
    expected, wanted = padded_step(plain.model)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() < tolerance * gradient.norm() + 1e-6, name


def test_nf4_of_rows_that_a_cpu_mixes_up(tmp_path: Path) -> None:
    """A layer of 48 inputs: bitsandbytes would give weights 40 % off, without a word."""
    path = saved("llama", tmp_path, sizes=WIDE | {"intermediate_size": 48})
    with pytest.raises(ConfigError) as error:
        loaded(path, quantization=Quantization.nf4)
    assert str(error.value) == (
        "model.quantization: nf4 on a CPU needs layers with a multiple of 64 inputs, got 48 in "
        "model.layers.0.mlp.down_proj (int8, or a GPU)"
    )


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_gradient_checkpointing(quantization: str, tmp_path: Path) -> None:
    """The same loss and gradients, and each layer computed twice."""
    path = saved("llama", tmp_path)
    settings: dict[str, Any] = {"quantization": Quantization(quantization)}
    kept = trained(loaded(path, **settings))
    again = trained(loaded(path, **settings, gradient_checkpointing=True))
    calls: list[int] = []
    for policy in (kept, again):
        policy.base.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    expected, wanted = step(kept)
    assert len(calls) == 1
    loss, got = step(again)
    assert len(calls) == 3
    assert torch.equal(loss, expected)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-8)


def num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def scales_bytes(layer: torch.nn.Module) -> int:
    """Bytes of what bitsandbytes keeps beside the packed weights of a layer."""
    weight = getattr(layer, "weight", None)
    if getattr(weight, "SCB", None) is not None:
        return num_bytes(weight.SCB)
    state = getattr(weight, "quant_state", None)
    if state is None:
        return 0
    tensors = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum(num_bytes(tensor) for tensor in tensors)


def estimate(path: str, quantization: Quantization) -> memory.Estimate:
    """The estimate of a LoRA run on a model's folder."""
    run = compose_run(
        [
            *(f"model.path={path}", "model.name=tiny", "model.lora.rank=4"),
            f"model.quantization={quantization.value}",
        ]
    )
    settings = load_settings(run.model, Path("unused"))
    return memory.Estimate(run, settings, memory.Place(torch.device("cpu")))


def test_cost_of_a_quantised_base(tmp_path: Path) -> None:
    """Packed weights count as the weights they stand for, and as the bytes they lie in."""
    path = saved("llama", tmp_path)
    plain = loaded(path)
    row = pack(PAIRS, range(len(PAIRS)))
    body = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    for quantization, size in ((Quantization.nf4, 0.5), (Quantization.int8, 1)):
        policy = loaded(path, quantization=quantization)
        count = sum(cost.num_weights(p) for p in policy.parameters())
        assert count == sum(p.numel() for p in plain.parameters())
        assert cost.Flops(policy).of_row(row) == cost.Flops(plain).of_row(row)
        whole = estimate(path, quantization).model.whole
        packed = [p for p in policy.parameters() if num_bytes(p) != 4 * cost.num_weights(p)]
        assert whole.packed_bytes == sum(num_bytes(p) for p in packed) == size * body
        layers = [m for m in policy.modules() if type(m).__module__.startswith("bitsandbytes")]
        scales = sum(map(scales_bytes, layers))
        assert whole.scales_bytes == scales > 0
        assert whole.plain_bytes == sum(num_bytes(p) for p in policy.parameters()) - size * body


def test_a_checkpoint_that_is_quantised_already(tmp_path: Path) -> None:
    path = saved("llama", tmp_path)
    settings = Path(path) / "config.json"
    packed = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | packed))
    with pytest.raises(ConfigError) as error:
        loaded(path)
    assert str(error.value) == (
        f"model.path: {path} holds quantised weights (use the unquantised model; "
        "model.quantization quantises it on loading)"
    )


@pytest.mark.matrix
@pytest.mark.parametrize("settings", ["nf4", "nf4 dora", "int8 checkpointing"])
def test_a_whole_run(settings: str, tiny_run: list[str], wide_folder: Path, tmp_path: Path) -> None:
    """Trains, leaves the adapter alone, goes on bit-exactly after a crash, can be trained on."""
    quantization, *rest = settings.split()
    overrides = [
        *tiny_run,
        f"model.path={wide_folder}",
        "model.lora.rank=4",
        f"model.quantization={quantization}",
        f"model.lora.dora={str('dora' in rest).lower()}",
        f"model.gradient_checkpointing={str('checkpointing' in rest).lower()}",
        "train.learning_rate=1e-2",
        "train.epochs=2",
        "sample.max_new_tokens=2",
    ]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run([*overrides, f"run_dir={whole}"])
    results = json.loads((whole / "results.json").read_text())
    assert results["eval_after"]["loss"] < results["eval_before"]["loss"] - 0.02
    names = {p.name for p in (whole / "model").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    trained = [key for key in state_of(whole, tmp_path) if key.startswith("state.policy")]
    assert trained and all("lora_" in key for key in trained)

    process = start([*overrides, f"run_dir={stopped}"])
    wait_for(logged(stopped, 3), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "continued after step" in run([*overrides, f"run_dir={stopped}"])
    assert_same_run(whole, stopped, tmp_path)

    onward = tmp_path / "onward"
    goes_on = ["model.lora.rank=0", "model.lora.dora=false", f"model.lora.adapter={whole}/model"]
    train(compose_run([*overrides, *goes_on, "train.max_steps=2", f"run_dir={onward}"]))
    began = json.loads((onward / "results.json").read_text())["eval_before"]
    assert began == pytest.approx(results["eval_after"], rel=1e-6)

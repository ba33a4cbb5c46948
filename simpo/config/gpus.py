"""GPUs that a run can be planned for, by the figures of their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simpo.config.errors import ConfigError, did_you_mean

AS_LARGE = 0.05
"""GPUs whose memory differs by this share are of the same size."""


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        memory_gib: what a program can use, about what torch reports.
        bf16_tflops: dense bf16 peak.
        hbm_gb_s: bandwidth of its memory.
        link_gb_s: bandwidth to the others of its machine, in one direction.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    hbm_gb_s: float
    link_gb_s: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A10G-24GB", 22.0, 70, 600, 32),
        Gpu("RTX4090-24GB", 23.5, 165, 1008, 32),
        Gpu("L40S-48GB", 44.4, 362, 864, 32),
        Gpu("A100-40GB", 39.4, 312, 1555, 300),
        Gpu("A100-80GB", 79.1, 312, 2039, 300),
        Gpu("H100-80GB", 79.1, 989, 3350, 450),
        Gpu("H200-141GB", 139.7, 989, 4800, 450),
        Gpu("B200-180GB", 178.0, 2250, 8000, 900),
    )
}


def gpu_named(name: str) -> Gpu:
    """The GPU of a name in `GPUS`.

    Raises:
        ConfigError: there is none.
    """
    if name not in GPUS:
        hint = did_you_mean(name.upper(), GPUS, f"one of {', '.join(GPUS)}")
        raise ConfigError([f"gpu: no such GPU, got {name or repr(name)} ({hint})"])
    return GPUS[name]


def gpu_like(name: str, memory_gib: float) -> Gpu:
    """The GPU of `GPUS` that a device is; of another kind, the nearest in memory with its memory.

    Args:
        name: the device's, such as "NVIDIA H100 80GB HBM3".
    """
    words = name.replace(" ", "")
    kind = min(
        GPUS.values(),
        key=lambda gpu: (
            gpu.name.partition("-")[0] not in words,
            abs(gpu.memory_gib - memory_gib),
        ),
    )
    near = abs(kind.memory_gib - memory_gib) <= AS_LARGE * memory_gib
    return kind if near else replace(kind, name=name, memory_gib=memory_gib)

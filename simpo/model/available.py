"""Tells how much memory is free for a model."""

from __future__ import annotations

import psutil
import torch


def available_bytes(device: torch.device, processes: int = 1) -> float:
    """Memory that is free on a device, of a CPU's an equal share for so many processes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available / processes

"""Divides a machine among processes that run at the same time."""

from __future__ import annotations

import os


def share_of_machine(place: int, places: int) -> dict[str, str]:
    """Environment with the cores and GPUs of one of `places` members that run at the same time.

    If there are fewer GPUs than members, each member sees all.
    """
    if places == 1:
        return {}
    cores = str(max(1, (os.cpu_count() or 1) // places))
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", cores)}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        devices = [str(number) for number in range(torch.cuda.device_count())]
    else:
        devices = [name for name in visible.split(",") if name]
    if len(devices) >= places:
        share["CUDA_VISIBLE_DEVICES"] = ",".join(devices[place::places])
    return share

"""Keeps a run from importing installed packages that it does not use.

Other libraries import them if they are installed: peft imports bitsandbytes, and with it
torch's compiler; transformers imports DeepSpeed when it saves a model, and SciPy for the losses of
other tasks.
"""

from __future__ import annotations

import sys

from simpo.config.backends import ZeroConfig
from simpo.config.choices import BenchmarkKind, Quantization
from simpo.config.schema import RunConfig


def hide_unused(run: RunConfig) -> None:
    """Make packages that a run does not use look as if they were not installed.

    For a process that does nothing but this run. Modules already imported stay.
    """
    unused = []
    if not isinstance(run.backend, ZeroConfig):
        unused.append("deepspeed")
    if run.model.quantization is Quantization.none:
        unused.append("bitsandbytes")
    if run.benchmark.kind is not BenchmarkKind.alpaca_eval:
        unused.append("scipy")
    for name in unused:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]

"""Imports of libraries that take seconds, in a process that does nothing but a run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_imports() -> Iterator[None]:
    """Never search what exists on leaving for garbage, and search for none while entered.

    torch, transformers and what they import make 400,000 objects, all of which stay: searching them
    takes a sixth of the time until the first step.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

"""Chat templates as model families published them, out of packages that contain them.

They are under their authors' licences, so they are not part of this repository.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest

from tests.support.real_tokenizers import cached_folder, unpack_npm

OLLAMA_UTILS = "@huggingface/ollama-utils@0.0.18"


def trl_template(name: str) -> str:
    """A template that TRL keeps byte for byte, to recognise a model by it."""
    try:
        listed = files("trl") or []
    except PackageNotFoundError:
        pytest.skip("trl is not installed")
    found = [f.locate() for f in listed if f.parent.name == "chat_templates" and f.stem == name]
    if not found:
        pytest.skip(f"this trl holds no template {name}")
    return Path(str(found[0])).read_text(encoding="utf-8")


@cache
def gguf_template(model: str) -> str:
    """The template in the metadata of a published GGUF file, which ollama-utils lists by model."""
    listing = "src/chat-template-automap.ts"
    folder = cached_folder(
        "ollama-utils", lambda folder: unpack_npm(OLLAMA_UTILS, [listing], folder)
    )
    text = (folder / Path(listing).name).read_text(encoding="utf-8")
    pattern = rf'model: "library/{re.escape(model)}",\s*gguf:\s*(.*?),\n\s*ollama: '
    found = re.search(pattern, text, re.DOTALL)
    assert found, f"{OLLAMA_UTILS} lists no {model}"
    # A string of JavaScript in quotes, whose escapes are Python's as well.
    return str(ast.literal_eval(found[1]))

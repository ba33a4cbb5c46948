"""The trained policy in; a folder that transformers loads, with its card and curves, out.

`python -m simpo.export RUN merge=true` writes the base of a run with its adapter merged in, and
`python -m simpo.export RUN push_to_hub=OWNER/NAME` uploads the model of a run.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from simpo import console
from simpo.backend import Backend
from simpo.card import draw_curves, write_card
from simpo.config.choices import Dtype
from simpo.config.errors import ConfigError, RunError, SimpoError, first_line
from simpo.config.inputs import ADAPTER_FILE, ModelConfig
from simpo.config.schema import ExportConfig, RunConfig
from simpo.console import Results
from simpo.data.chat import Chat
from simpo.model.policy import Policy
from simpo.model.pretrained import load_weights
from simpo.model.tokenizer import load_tokenizer
from simpo.run.files import read_status
from simpo.run.folder import write_text
from simpo.upload import reach_repository, upload


def save_model(
    policy: Policy, weights: dict[str, Tensor] | None, chat: Chat, folder: Path
) -> list[str]:
    """Write weights (or the adapter) as safetensors, with settings, tokenizer and template.

    A folder that is there is replaced when the new one is whole. The cache of keys and values is
    on, and generation stops where a response ended in training.

    Args:
        weights: those of the policy's model, whole; None where it holds them itself, empty to
            write everything but them.

    Returns:
        Lines to tell.

    Raises:
        RunError: it could not be written.
    """
    part, old = (folder.with_name(f".{folder.name}.{name}") for name in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    base, adapted = policy.base, policy.model is not policy.base
    # The frozen weights below an adapter on lm_head lie with the base.
    alone = {"save_embedding_layers": False} if adapted else {}
    try:
        base.config.use_cache = True
        left_out = _settle_generation(base, chat)
        policy.model.save_pretrained(part, state_dict=weights, **alone)  # type: ignore[operator]
        for key in ("is_local", "local_files_only"):  # how it was loaded, and nothing of its own
            chat.tokenizer.init_kwargs.pop(key, None)
        chat.tokenizer.save_pretrained(part)
        mode = (part / "tokenizer_config.json").stat().st_mode
        for file in part.rglob("*"):
            if file.is_file():  # safetensors gives its own to the owner alone
                file.chmod(mode)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(part, folder)
    except Exception as error:  # of any library that has a part in it
        shutil.rmtree(part, ignore_errors=True)
        raise RunError(
            f"{folder}: the model could not be written: {first_line(error)} (mend it, and the same "
            "command writes it)"
        ) from error
    shutil.rmtree(old, ignore_errors=True)
    if not left_out or adapted:
        return []
    return [
        f"note   generation_config.json is saved without {', '.join(left_out)}: with the base's "
        "other settings transformers refuses it"
    ]


def _settle_generation(base: PreTrainedModel, chat: Chat) -> list[str]:
    """Give a model settings of generation that can be saved, with the tokens of its template.

    They are the base's but for what transformers refuses to save, such as a temperature without
    do_sample.

    Returns:
        The names of what is left out.
    """
    if base.generation_config is None:
        return []
    settled = copy.deepcopy(base.generation_config)
    ends = {chat.end_id, chat.tokenizer.eos_token_id} - {None}
    settled.eos_token_id, settled.pad_token_id = sorted(ends), chat.tokenizer.pad_token_id
    pending = settled.to_diff_dict()
    kept: dict[str, Any] = {}
    # One setting may need another, so each is tried again beside those that were taken.
    while key := next((k for k, v in pending.items() if _can_be_saved(kept | {k: v})), None):
        kept[key] = pending.pop(key)
    base.generation_config = GenerationConfig(**kept) if pending else settled
    return sorted(pending)


def _can_be_saved(settings: dict[str, Any]) -> bool:
    try:
        GenerationConfig(**settings).validate(strict=True)
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def check_end(
    run: RunConfig, backend: Backend, policy: Policy, chat: Chat, run_dir: Path
) -> list[str]:
    """Try before the first step what the last one can refuse; all processes call it.

    Settings, tokenizer and card are written into a scratch folder, the disk is asked for room for
    a model and a checkpoint, and the hub for the repository.

    Returns:
        Lines to tell.

    Raises:
        ConfigError: something is refused, in all processes.
    """
    said: list[str] = []
    problems: list[str] = []
    if backend.is_main:
        trial = run_dir / ".trial"
        try:
            if run.export.push_to_hub is not None:
                reach_repository(run.export)
            _refuse_full_disk(policy, run_dir)
            said = save_model(policy, {}, chat, trial)
            write_card(run, run_dir, Results({}, {}), trial)
        except ConfigError as error:
            problems = error.problems
        except Exception as error:  # of any library that has a part in it
            cause = error.__cause__ or error
            place = f"run_dir: {run_dir}" if isinstance(cause, OSError) else "model.path"
            problems = [f"{place}: a trained model cannot be saved: {first_line(cause)} (mend it)"]
        finally:
            shutil.rmtree(trial, ignore_errors=True)
    said, problems = backend.broadcast((said, problems))
    if problems:
        raise ConfigError(problems)
    return said


def _refuse_full_disk(policy: Policy, run_dir: Path) -> None:
    """Do nothing, unless a model and the first checkpoint cannot be written.

    Raises:
        ConfigError: there is no room for them.
    """
    weights = list(policy.parameters())
    trained = sum(p.numel() * p.element_size() for p in weights if p.requires_grad)
    adapted = policy.model is not policy.base
    needed = trained if adapted else sum(p.numel() * p.element_size() for p in weights)
    if not any((run_dir / "checkpoints").glob("step-*")):
        needed += 3 * trained  # with the two averages that AdamW keeps
    if (free := shutil.disk_usage(run_dir).free) < needed:
        raise ConfigError(
            [
                f"run_dir: the model and a checkpoint take {needed / 2**30:.2f} GiB, but {run_dir} "
                f"has {free / 2**30:.2f} GiB free (make room, or choose another output_dir)"
            ]
        )


def publish(run: RunConfig, run_dir: Path, results: Results) -> list[str]:
    """Add curves and card to a saved model, and upload it where that is asked for.

    Returns:
        Lines to tell; of a curve or card that could not be made, what stood in its way.

    Raises:
        RunError: the upload failed.
    """
    model_dir, said = run_dir / "model", []
    parts: tuple[tuple[str, Callable[..., None], Any], ...] = (
        ("curves", draw_curves, (run_dir / "metrics.jsonl", model_dir / "curves.png")),
        ("card", write_card, (run, run_dir, results, model_dir)),
    )
    for name, make, arguments in parts:
        try:
            make(*arguments)
        except Exception as error:  # of any library that has a part in it
            said.append(f"note   the model has no {name}: {first_line(error)}")
    if run.export.push_to_hub is not None:
        said += upload(run.export, model_dir)
    return said


def push(run_dir: Path, config: ExportConfig) -> list[str]:
    """Upload the model of a run that has finished, or failed in its upload.

    Args:
        run_dir: folder of a run, or one that holds a model.

    Returns:
        Lines to tell.

    Raises:
        ConfigError: there is no model, or the hub refuses name or token.
        RunError: the upload failed.
    """
    folder = _model_folder(run_dir)
    if not any(folder.glob("*.safetensors")):
        raise ConfigError([f"RUN: must hold a model, got {run_dir} (no {folder}/*.safetensors)"])
    reach_repository(config)
    said = upload(config, folder)
    status = read_status(run_dir)
    if status.get("state") == "failed" and (run_dir / "results.json").is_file():
        # Only the upload was missing.
        status |= {"state": "finished", "error": ""}
        write_text(run_dir / "status.json", json.dumps(status, indent=2) + "\n")
    return said


def _model_folder(run_dir: Path) -> Path:
    return run_dir / "model" if (run_dir / "model").is_dir() else run_dir


def merge(run_dir: Path, output: Path, dtype: Dtype, base: str | None) -> list[str]:
    """Write a whole model: the base unquantised, also after QLoRA, with the adapter added to it.

    Args:
        run_dir: folder of a run, or one that holds an adapter.
        output: folder to write; must not exist.
        dtype: of the sums and the written weights; auto is that of the base's files.
        base: folder or hub id of the base; None takes what the adapter names.

    Returns:
        Lines to tell.

    Raises:
        ConfigError: there is no adapter, it does not fit its base, one of them cannot be loaded, or
            output exists.
    """
    from simpo.model.adapters import adapter_settings, load_adapter

    folder = _model_folder(run_dir)
    if not (folder / ADAPTER_FILE).is_file():
        raise ConfigError(
            [f"RUN: must hold an adapter, got {run_dir} (no {folder}/{ADAPTER_FILE})"]
        )
    if output.exists():
        raise ConfigError([f"output: must not exist, got {output} (choose another)"])
    settings = adapter_settings("RUN", str(folder))
    source = base or settings.base_model_name_or_path
    if not source:
        raise ConfigError(["base: the adapter does not name it (base=FOLDER_OR_HUB_ID)"])
    revision = None if base else settings.revision
    tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    config = ModelConfig(path=source, revision=revision, tokenizer=tokenizer)
    chat = Chat(load_tokenizer(config, folder))
    model = load_weights("base", source, AutoModelForCausalLM, revision=revision, dtype=dtype.value)
    merged = load_adapter("RUN", model, str(folder)).merge_and_unload(safe_merge=True)
    return [*save_model(Policy(merged), None, chat, output), f"model  {output}"]


KEYS = ("merge", "output", "dtype", "base", "push_to_hub", "private")
USAGE = (
    "python -m simpo.export RUN "
    "(merge=true [output=FOLDER] [dtype=float32] [base=FOLDER_OR_HUB_ID] | "
    "push_to_hub=OWNER/NAME [private=false])"
)


def cli() -> None:
    """Entry of `python -m simpo.export`; exits with 2 where something cannot be done as asked."""
    console.quiet_libraries()
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(USAGE)
            return
        run_dir, options = _arguments(sys.argv[1:])
        if "merge" in options:
            output = Path(options.get("output", run_dir / "model-merged")).expanduser()
            said = merge(run_dir, output, Dtype(options.get("dtype", "auto")), options.get("base"))
        else:
            private = options.get("private", "true") == "true"
            said = push(run_dir, ExportConfig(push_to_hub=options["push_to_hub"], private=private))
    except SimpoError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print("\n".join(said))


def _arguments(words: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """The run's folder and the settings of a command line.

    Raises:
        ConfigError: they are not what can be done; the usage where nothing is asked for.
    """
    options: dict[str, str] = {}
    folders: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        # A folder's name may hold an = itself, as those of a sweep's members do: loss.beta=2.
        if equals and key.isidentifier() and not Path(word).is_dir():
            options[key] = value
        else:
            folders.append(word)
    if len(folders) != 1 or not options:
        raise ConfigError([USAGE])
    problems = [
        f"{key}: no such key (export has {', '.join(KEYS)})" for key in options if key not in KEYS
    ]
    if ("merge" in options) == ("push_to_hub" in options):
        problems += ["merge: one of merge and push_to_hub must be given"]
    if options.get("merge", "true") != "true":
        problems += [f"merge: must be true, got {options['merge']} (leave it out)"]
    if options.get("private", "true") not in ("true", "false"):
        problems += [f"private: must be true or false, got {options['private']}"]
    if options.get("dtype", "auto") not in (names := [choice.value for choice in Dtype]):
        problems += [f"dtype: must be one of {', '.join(names)}, got {options['dtype']}"]
    problems += ExportConfig(push_to_hub=options.get("push_to_hub")).problems()
    run_dir = Path(folders[0]).expanduser()
    if not run_dir.is_dir():
        problems += [f"RUN: no such folder, got {run_dir}"]
    if problems:
        raise ConfigError(problems)
    return run_dir, options


if __name__ == "__main__":
    cli()

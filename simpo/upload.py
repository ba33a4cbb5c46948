"""A model's folder in, a repository of the hub out; and whether it will be, before a run."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from simpo.card import is_local, public
from simpo.config.errors import ConfigError, RunError, first_line
from simpo.config.inputs import ADAPTER_FILE
from simpo.config.schema import ExportConfig


def reach_repository(config: ExportConfig) -> None:
    """Make the repository, unless it is there: the proof that name and token are good.

    Raises:
        ConfigError: it cannot be made or written to, or the hub is out of reach.
    """
    from huggingface_hub import HfApi

    name = str(config.push_to_hub)
    try:
        api = HfApi()
        token = (api.whoami().get("auth") or {}).get("accessToken") or {}
        if token.get("role") == "read":
            raise PermissionError("the token may only read")
        api.create_repo(name, private=config.private, exist_ok=True)
    except Exception as error:  # of the hub, its client or the network
        raise ConfigError(
            [
                f"export.push_to_hub: nothing can be uploaded to {name}: {first_line(error)} (mend "
                f"it, or upload later: python -m simpo.export RUN push_to_hub={name})"
            ]
        ) from error


def upload(config: ExportConfig, model_dir: Path) -> list[str]:
    """Upload a model's folder to the repository that `reach_repository` made.

    The token is the one that the hub's own tools have stored. An adapter of a local base names the
    base's folder in its settings; what is uploaded has the last part of that path.

    Returns:
        Lines to tell, with the address of the commit.

    Raises:
        RunError: it failed.
    """
    from huggingface_hub import HfApi

    name = str(config.push_to_hub)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder, said = _without_local_base(model_dir, Path(scratch))
            commit = HfApi().upload_folder(
                repo_id=name, folder_path=folder, commit_message="Model trained with simpo"
            )
        except Exception as error:  # of the hub, its client or the network
            raise RunError(
                f"export.push_to_hub: the upload to {name} failed: {first_line(error)} (the same "
                f"command tries again: the model is in {model_dir})"
            ) from error
    return [*said, f"hub    {commit.commit_url}"]


def _without_local_base(model_dir: Path, scratch: Path) -> tuple[Path, list[str]]:
    """A folder to upload, and lines to tell: the model's own, or one that links to its files."""
    file = model_dir / ADAPTER_FILE
    settings = json.loads(file.read_text()) if file.is_file() else {}
    base = settings.get("base_model_name_or_path") or ""
    if not is_local(base):
        return model_dir, []
    for path in model_dir.iterdir():
        (scratch / path.name).symlink_to(path.resolve())
    (scratch / ADAPTER_FILE).unlink()
    told = json.dumps(settings | {"base_model_name_or_path": public(base)}, indent=2)
    (scratch / ADAPTER_FILE).write_text(told + "\n")
    return scratch, [
        f"note   the adapter's base is a local folder; uploaded it is named {public(base)}"
    ]

"""Checks once whether the Hugging Face hub answers, and puts its errors into one line."""

from __future__ import annotations

import time
from functools import cache
from glob import glob
from pathlib import Path

from simpo.config.errors import first_line

ATTEMPTS = 3
ATTEMPT_S = 5


@cache
def go_offline_if_unreachable() -> None:
    """Make the Hugging Face libraries use only their caches if the hub does not answer.

    Otherwise each would retry for most of a minute, file by file. Call this before anything is
    loaded by a hub id; the hub is asked once per process.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    for attempt in range(ATTEMPTS):
        if constants.HF_HUB_OFFLINE:
            return
        try:
            get_session().head(constants.ENDPOINT, timeout=ATTEMPT_S)
            return
        except Exception:  # depends on the HTTP library; an HTTP error status raises nothing
            time.sleep(attempt)
    constants.HF_HUB_OFFLINE = True


def download(repo: str, revision: str | None, *paths: str) -> Path:
    """Fetch files, folders or what globs match out of a data set, or take them from the cache.

    Returns: the local folder that stands for the data set, of which all are of one commit.

    Raises:
        ValueError: the data set has nothing at one of `paths`.
        Exception: of the library's many types, if the hub refuses or does not answer.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    go_offline_if_unreachable()
    # In patterns of the hub * matches across folders.
    wanted = [pattern for path in paths for pattern in (path.replace("**/", "*"), f"{path}/*")]
    folder = snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=wanted)
    missing = [path for path in paths if not glob(path, root_dir=folder, recursive=True)]
    if missing:
        if constants.HF_HUB_OFFLINE:
            raise LocalEntryNotFoundError(missing[0])
        page = f"{constants.ENDPOINT}/datasets/{repo}/tree/{revision or 'main'}"
        raise ValueError(f"the data set has no {missing[0]} (look at {page})")
    return Path(folder)


def reason(error: BaseException, source: str) -> str:
    """Explain in one line why `source` could not be loaded, with a remedy if there is one.

    Args:
        error: what the library raised.
        source: folder or hub id.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    causes = [error]
    while following := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(following)
    page = f"{constants.ENDPOINT}/{source}"
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"it is gated (ask for access on {page}, then `hf auth login` or set HF_TOKEN)"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"{page} is not there, or private (`hf auth login` or set HF_TOKEN)"
    unreachable = LocalEntryNotFoundError | OfflineModeIsEnabled
    if any(isinstance(cause, unreachable) or "OfflineMode" in str(cause) for cause in causes):
        return (
            f"it is not in the cache, and {constants.ENDPOINT} does not answer or HF_HUB_OFFLINE "
            "is set (check the network, or name a local folder)"
        )
    if "CONVERSION" in str(error):
        return (
            "weights that are stacked into one tensor, such as those of experts, are missing or "
            "differ in shape"
        )
    # The message of any other type is often a bare word or number, so its type is named too.
    spoken = isinstance(error, OSError | ValueError | ImportError)
    return first_line(error) if spoken else f"{type(error).__name__}: {first_line(error)}"


def upload_reason(error: BaseException) -> str:
    """Why the hub did not take an upload: its answer, without the address and the request's id."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, httpx.TransportError | OfflineModeIsEnabled):
        return f"{constants.ENDPOINT} does not answer, or HF_HUB_OFFLINE is set"
    response = getattr(error, "response", None)
    if response is None:
        return first_line(error)
    status = f"{response.status_code} {response.reason_phrase}"
    message = getattr(error, "server_message", None)
    return f"{status}: {first_line(message)}" if message else status

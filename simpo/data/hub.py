"""The hub of models and data sets: asked once whether it answers, and its errors in one line."""

from __future__ import annotations

import time
from functools import cache

from simpo.config.errors import first_line

ATTEMPTS = 3
ATTEMPT_S = 5


@cache
def go_offline_if_unreachable() -> None:
    """Use what is in the libraries' caches, and nothing else, where the hub does not answer.

    They would each try for most of a minute, file by file. Call it before anything is loaded by a
    hub id; it asks once in a process.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    for attempt in range(ATTEMPTS):
        if constants.HF_HUB_OFFLINE:
            return
        try:
            get_session().head(constants.ENDPOINT, timeout=ATTEMPT_S)
            return
        except Exception:  # of whichever HTTP library it uses; any answer at all is none of them
            time.sleep(attempt)
    constants.HF_HUB_OFFLINE = True


def reason(error: BaseException, source: str) -> str:
    """What is wrong, in one line, with the remedy where the hub has one.

    Args:
        source: folder or hub id that could not be loaded.
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
            "weights that belong together, as those of experts do, are not all there or of "
            "different shapes"
        )
    # Others than these are raised with the bare word or number that a library stumbled over.
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

"""What goes wrong between here and the Hub, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..redaction import redacted_text

__all__ = ["explained"]

LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or pass token=…"
CONCURRENT = (409, 412)


@contextmanager
def explained(doing: str, repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn errors of the Hub's client into short ones.

    Args:
        doing: what was tried, such as "uploading to".

    Raises:
        PermissionError: no token, one that is not accepted, or one without the right.
        FileNotFoundError: no such repository or revision, or one that this token may not see.
        ConnectionError: the Hub cannot be reached, or the connection broke.
        RuntimeError: somebody else committed at the same time.
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PermissionError(
            f"{doing} {repo_id} needs a token for {endpoint}, and there is none: {LOG_IN}"
        ) from error
    except GatedRepoError as error:
        raise PermissionError(f"{repo_id} is gated: ask for access on {endpoint}/{repo_id}, then {LOG_IN}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"no repository {repo_id} on {endpoint}, or it is private and this token (or no token) may not see it: "
            f"check the name, or {LOG_IN}"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} has no such revision (branch, tag or commit)") from error
    except HfHubHTTPError as error:
        raise _of_status(error, doing, repo_id, endpoint) from error
    except Exception as error:
        # The client's transport library is its own affair, and changes; its errors are known by where they are from.
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests", "urllib3"):
            problem = f"{type(error).__name__}: {redacted_text(str(error))}"
            raise ConnectionError(
                f"{doing} {repo_id} failed: the connection to {endpoint} broke ({problem}). "
                "A push is one commit, so the repository is either as it was or wholly new: try again"
            ) from error
        raise


def _of_status(error: HfHubHTTPError, doing: str, repo_id: str, endpoint: str) -> Exception:
    status = error.response.status_code if error.response is not None else None
    if status == 401:
        return PermissionError(f"{doing} {repo_id}: {endpoint} does not accept this token; {LOG_IN}")
    if status == 403:
        owner = repo_id.partition("/")[0]
        return PermissionError(
            f"{doing} {repo_id}: this token may not write there. Give it the write permission for {owner!r} on "
            f"{endpoint}/settings/tokens, or choose a repository of your own"
        )
    if status in CONCURRENT:
        return RuntimeError(
            f"{doing} {repo_id}: somebody else changed the repository meanwhile. Nothing was written; look at their "
            "commit and push again"
        )
    return ConnectionError(f"{doing} {repo_id} failed, {endpoint} answered {status}: {redacted_text(str(error))}")

"""What produced a number: the commit, the command, the libraries."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

from ..redaction import redacted_command

LIBRARIES = ("torch", "transformers", "datasets", "numpy")


def commit() -> str | None:
    """The commit of the checkout this package runs from, with "+changes" where files differ; None if installed."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def command() -> str:
    """The command line, as it would be typed again, but for the secrets in it."""
    return redacted_command(sys.argv)


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a run that is finished is not lost for it
            found[name] = "not installed"
    return found


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()

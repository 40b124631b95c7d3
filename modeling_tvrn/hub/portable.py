"""Paths of one machine mean nothing elsewhere and tell where the author works: only their last part is published.

It is published as `./name`, so that nobody takes it for a name of the Hub.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

__all__ = ["is_hub_id", "portable", "portable_command"]

WINDOWS = re.compile(r"^[A-Za-z]:[\\/]")


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the Hub's and no path of this machine."""
    is_path = name.startswith((".", "~", "/")) or WINDOWS.match(name) is not None or Path(name).exists()
    return name.count("/") <= 1 and not is_path


def portable(value: Any) -> Any:
    """A JSON value with every absolute path, and every one that leaves its folder, cut to its last part."""
    if isinstance(value, dict):
        return {
            name: portable_command(item) if name == "command" and item else portable(item)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [portable(item) for item in value]
    return _last_part(value) if isinstance(value, str) else value


def portable_command(command: str) -> str:
    """A command line with the paths in its arguments, also those after `key=`, cut likewise."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    words = [f"examples/{word.rpartition('/examples/')[2]}" if "/examples/" in word else word for word in words]
    return shlex.join("=".join(_last_part(part) for part in word.split("=")) for word in words)


def _last_part(text: str) -> str:
    if WINDOWS.match(text):
        return f"./{PureWindowsPath(text).name}"
    return f"./{PurePosixPath(text).name}" if text.startswith(("/", "~", "../")) and "\n" not in text else text

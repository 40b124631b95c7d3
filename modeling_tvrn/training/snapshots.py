"""Checkpoints of a run on disk: written whole or not at all, checked before they are read, old ones removed.

A checkpoint is a folder `step-00000120` of safetensors files, `state.json` and `manifest.json`, which holds the size
and SHA-256 of the others. It is written aside, flushed to the disk and renamed: a run that is killed at any moment
leaves whole checkpoints only. What a file system breaks nevertheless is found by the manifest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..durable import flush

logger = logging.getLogger(__name__)

__all__ = ["Snapshot", "Snapshots", "read_snapshot"]

MANIFEST, STATE = "manifest.json", "state.json"
NAME = re.compile(r"step-(\d{8,})")
ASIDE, OLD = ".saving", ".removing-"
WRITING_FAILED = (OSError, SafetensorError)  # a full disk is the one or the other, by who writes


@dataclass
class Snapshot:
    """What one checkpoint holds.

    Attributes:
        path: its folder.
        state: counters and settings, plain JSON values.
        tensors: name of the file without suffix -> its tensors by name.
    """

    path: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


class Snapshots:
    """The checkpoints of one run in a folder.

    Args:
        folder: where they lie; made when the first is written.
        keep: how many of the newest stay; 0 writes none.

    Attributes:
        own: the steps of this run's whole checkpoints, oldest first; any other is removed at the next save.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self.own: list[int] = []

    def steps(self) -> list[int]:
        """The steps of which there is a folder, oldest first, checked or not."""
        if not self.folder.is_dir():
            return []
        found = (NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def newest(self) -> Snapshot | None:
        """The newest checkpoint that is whole; each broken one that is passed over is logged.

        This run then owns it and those before it.

        Raises:
            ValueError: there are checkpoints, but none is whole.
        """
        steps = self.steps()
        for number, step in reversed(list(enumerate(steps))):
            try:
                snapshot = read_snapshot(self.path(step))
            except ValueError as error:
                before = f"trying the one before it, of step {steps[number - 1]}" if number else "there is none before"
                logger.warning("%s; %s", error, before)
                continue
            self.own = steps[: number + 1]
            return snapshot
        if steps:
            raise ValueError(
                f"none of the {len(steps)} checkpoints in {self.folder} is whole (see the log); set resume=null to "
                "start anew, or give the path of another checkpoint"
            )
        return None

    def save(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Write a checkpoint, then remove those beyond `keep` and those of former runs.

        Returns:
            Whether it was written. Where it could not be (a full disk), the reason is logged and what was there stays.
        """
        if not self.keep:
            return False
        aside = self.folder / ASIDE
        try:
            self._sweep()
            aside.mkdir(parents=True)
            _write(aside, state, tensors)
            self._put(aside, self.path(step))
        except WRITING_FAILED as error:
            shutil.rmtree(aside, ignore_errors=True)
            kept = f"the one of step {self.own[-1]} stays" if self.own else "there is none yet"
            logger.error("the checkpoint of step %d could not be written (%s); %s", step, error, kept)
            return False
        self.own = [*(other for other in self.own if other != step), step][-self.keep :]
        self._remove([other for other in self.steps() if other not in self.own])
        return True

    def _put(self, aside: Path, target: Path) -> None:
        """Rename the finished folder into place."""
        if target.exists():  # of a former run, or broken: a folder with content can't be renamed over
            os.rename(target, target.with_name(OLD + target.name))
        os.rename(aside, target)
        flush(self.folder)

    def _remove(self, steps: list[int]) -> None:
        for step in steps:
            # Renamed first: a kill in the middle of deleting leaves no half checkpoint under a checkpoint's name.
            path = self.path(step)
            os.rename(path, path.with_name(OLD + path.name))
        self._sweep()

    def _sweep(self) -> None:
        """Delete what a killed run left half written or half removed."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name == ASIDE or path.name.startswith(OLD):
                    shutil.rmtree(path, ignore_errors=True)


def read_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """Check a checkpoint against its manifest and read it, onto the CPU.

    Raises:
        ValueError: it is not there, or not whole; the message names the file.
    """
    folder = Path(path)
    manifest = _read_json(folder / MANIFEST)
    for name, expected in manifest.get("files", {}).items():
        problem = _problem(folder / name, expected)
        if problem:
            raise ValueError(f"the checkpoint {folder} is broken: {name} {problem}")
    state = _read_json(folder / STATE)
    files = [name for name in manifest["files"] if name.endswith(".safetensors")]
    return Snapshot(folder, state, {name.removesuffix(".safetensors"): _read_tensors(folder / name) for name in files})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    # Copied: what load_file gives is the file itself in memory, and changes with it.
    return {name: value.clone() for name, value in load_file(path).items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path.parent} is no whole checkpoint: {path.name} can't be read ({error}); expected a folder such as "
            "output_dir/checkpoints/step-00000120"
        ) from error


def _problem(path: Path, expected: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"has {size} bytes instead of {expected['bytes']}"
    return None if _digest(path) == expected["sha256"] else "has another SHA-256 than when it was written"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """All files of a checkpoint, the manifest last, each flushed to the disk."""
    for name, named in tensors.items():
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in named.items()}, folder / f"{name}.safetensors"
        )
    (folder / STATE).write_text(json.dumps(state, indent=1, allow_nan=True), encoding="utf-8")
    files = sorted(folder.iterdir())
    listed = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": listed}, indent=1), encoding="utf-8")
    for path in [*files, folder / MANIFEST]:
        flush(path)
    flush(folder)

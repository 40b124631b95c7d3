"""Checkpoints of a run on disk: written whole or not at all, checked before they are read, old ones removed.

A checkpoint is a folder `step-00000120` of safetensors files and `manifest.json`, which holds their checksums and what
is no tensor. It is written aside, flushed to the disk and renamed: a run that is killed at any moment leaves whole
checkpoints only. What a file system breaks nevertheless is found by the checksums.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ..storage.files import FORMATS, OLD, StorageError, publish_folder, read_json, write_json
from ..storage.tensors import TensorFile, write_tensors

logger = logging.getLogger(__name__)

__all__ = ["Snapshot", "Snapshots", "read_snapshot"]

MANIFEST, FORMAT = "manifest.json", "tvrn-checkpoint"
NAME = re.compile(r"step-(\d{8,})")
ASIDE = ".saving"
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
            files = {
                f"{name}.safetensors": write_tensors(aside / f"{name}.safetensors", tensors[name]).entry
                for name in tensors
            }
            write_json(aside / MANIFEST, FORMAT, {"files": files, "state": dict(state)})
            publish_folder(aside, self.path(step))
        except WRITING_FAILED as error:
            shutil.rmtree(aside, ignore_errors=True)
            kept = f"the one of step {self.own[-1]} stays" if self.own else "there is none yet"
            logger.error("the checkpoint of step %d could not be written (%s); %s", step, error, kept)
            return False
        self.own = [*(other for other in self.own if other != step), step][-self.keep :]
        for path in (self.path(other) for other in self.steps() if other not in self.own):
            # Renamed first: a kill in the middle of deleting leaves no half checkpoint under a checkpoint's name.
            os.rename(path, path.with_name(OLD + path.name))
        self._sweep()
        return True

    def _sweep(self) -> None:
        """Delete what a killed run left half written or half removed."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name == ASIDE or path.name.startswith(OLD):
                    shutil.rmtree(path, ignore_errors=True)


def read_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """Read a checkpoint, onto the CPU, and check all of it.

    Raises:
        StorageError: it is not there, damaged, or of another format; the message names the file.
    """
    folder = Path(path)
    if not (folder / MANIFEST).exists():
        expected = "give a folder such as output_dir/checkpoints/step-00000120"
        raise StorageError(folder, f"no whole checkpoint: it has no {MANIFEST}", expected)
    manifest = read_json(folder / MANIFEST, FORMAT)
    if lacking := {"files", "state"} - {*manifest}:
        raise StorageError(folder / MANIFEST, f"damaged: it lacks {sorted(lacking)}", FORMATS[FORMAT][1])
    tensors = {}
    for name, entry in manifest["files"].items():
        file = TensorFile.open(folder / name, FORMATS[FORMAT][1])
        file.check(entry)
        tensors[name.removesuffix(".safetensors")] = file.read()
    return Snapshot(folder, manifest["state"], tensors)

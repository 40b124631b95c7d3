"""Everything in a folder compared with its checksums: caches, indexes, checkpoints, models, finished blocks."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from .files import FILES, FORMATS, StorageError, check_file, read_json
from .tensors import TensorFile

MANIFESTS = {"manifest.json", "current.json", FILES}


def verify(folder: str | os.PathLike[str]) -> tuple[list[Path], list[StorageError]]:
    """Compare all files that manifests in a folder, or below it, list with their checksums, and the manifests.

    Returns:
        The files that were compared, and what is wrong with each broken one.

    Raises:
        FileNotFoundError: There is no manifest of this package.
    """
    read: dict[Path, None] = {}  # in their order
    broken: dict[Path, StorageError] = {}
    for manifest in sorted(path for path in Path(folder).rglob("*.json") if path.name in MANIFESTS):
        text = manifest.read_text(encoding="utf-8", errors="replace")
        kind = next((name for name in FORMATS if f'"{name}"' in text), None)
        with contextlib.suppress(ValueError, TypeError):
            if kind is None and "sha256" not in json.loads(text):
                continue  # somebody else's
        read[manifest] = None
        try:
            if kind is None:
                raise StorageError(manifest, "damaged, or something else's")
            files = read_json(manifest, kind).get("files", {})
        except StorageError as error:
            broken[manifest] = error
            continue
        if kind == "tvrn-score-blocks":  # which nobody lists: they come in any order, from several processes
            files = {path.name: None for path in sorted(manifest.parent.glob("block-*.safetensors"))}
        for name, entry in files.items():
            path = Path(os.path.normpath(manifest.parent / name))
            if path in read:  # two versions of an index share segments
                continue
            read[path] = None
            try:
                _check(path, entry, FORMATS[kind][1])
            except StorageError as error:
                broken[path] = error
    if not read:
        raise FileNotFoundError(
            f"nothing in {os.fspath(folder)!r} has checksums; expected the folder of a cache, an index, a run, a "
            "checkpoint or finished blocks"
        )
    return list(read), list(broken.values())


def _check(path: Path, entry: dict | None, fix: str) -> None:
    if entry is not None and "sha256" in entry:
        return check_file(path, entry, fix)
    file = TensorFile.open(path, fix)
    if entry is not None:
        file.check(entry)
    file.verify()

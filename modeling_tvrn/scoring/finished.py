"""A folder of finished blocks, so that a long run goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..encoded_tvrn import ranking_state
from ..storage.fingerprints import digest, settings_fingerprint, weights_digest
from .models import AveragedGallery, AveragedModel, EmbeddingScore
from .plan import BlockPlan, gallery_tensors
from .ragged import RaggedTexts

logger = logging.getLogger(__name__)

FORMAT = {"format": "tvrn-score-blocks", "format_version": 1}


class FinishedBlocks:
    """Scores of blocks in files of their own, named by place; what they are scores of stands in `manifest.json`.

    A block is complete or absent: it is written beside its place and then moved there. Several processes, on one
    machine or on a common file system, may use a folder at once.

    Args:
        folder: Made where it is missing.
        fingerprint: What the scores come from, by name (`run_fingerprint`).
        plan: How the matrix would be cut; a folder that holds blocks already keeps to its own block size.

    Raises:
        ValueError: If the folder holds blocks of another model, other galleries or another precision: each
            difference is named.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, str], plan: BlockPlan):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "manifest.json"
        wanted = dict(fingerprint) | {"caption order": plan.order_digest}
        shape = {"block_images": plan.block_images, "block_captions": plan.block_captions}
        if not path.exists():
            _write(path, json.dumps(FORMAT | {"fingerprint": wanted, "plan": shape}, indent=2) + "\n")
        manifest = self._read(path)
        _check(manifest["fingerprint"], wanted, self.folder)
        self.plan = BlockPlan(plan.image_count, plan.order, **manifest["plan"])

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON ({error}); expected a folder of finished blocks, or none.") from error
        if {name: manifest.get(name) for name in FORMAT} != FORMAT:
            raise ValueError(f"{path} says {manifest.get('format')!r}; expected {FORMAT}: give another folder.")
        return manifest

    def load(self, block: tuple[int, int]) -> Tensor | None:
        """The scores of a block, None where they are still to be computed."""
        path = self._path(block)
        if not path.exists():
            return None
        shape = (len(self.plan.rows(block[0])), len(self.plan.columns(block[1])))
        try:
            scores = load_file(path)["scores"]
        except (SafetensorError, KeyError) as error:
            logger.warning("%s cannot be read (%s): the block is scored again", path, error)
            return None
        if tuple(scores.shape) != shape:
            logger.warning("%s has shape %s, not %s: the block is scored again", path, tuple(scores.shape), shape)
            return None
        return scores

    def save(self, block: tuple[int, int], scores: Tensor) -> None:
        """Keep a block's scores."""
        path = self._path(block)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file({"scores": scores.detach().cpu().contiguous()}, partial)
        os.replace(partial, path)

    def _path(self, block: tuple[int, int]) -> Path:
        return self.folder / f"block-{block[0]:06d}-{block[1]:06d}.safetensors"


def run_fingerprint(model: Any, images: Any, texts: Any, dtype: torch.dtype | None) -> dict[str, str]:
    """What decides the scores, hashed: the weights and every tensor of both galleries.

    Raises:
        ValueError: If the model is neither a module nor an average of such.
    """
    return {
        "model": model_digest(model),
        "images": f"{len(images)} {gallery_digest(images)}",
        "texts": f"{len(texts)} {gallery_digest(texts)}",
        "dtype": str(dtype),
    }


def model_digest(model: Any) -> str:
    """SHA-256 of a model's class, settings and weights.

    Raises:
        ValueError: If it has no weights to read.
    """
    if isinstance(model, AveragedModel):
        # Its scores are means of calibrated sigmoids.
        return digest([[model_digest(each), weights_digest(each)] for each in model.models])
    if isinstance(model, EmbeddingScore):
        return "cosine of the embeddings"
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"The weights of a {type(model).__name__} cannot be read, so its finished blocks could be taken for"
            " another model's; expected a torch module, or score without a folder."
        )
    config = getattr(model, "config", None)
    settings = settings_fingerprint(config.to_dict()) if config is not None else {}
    dtypes = sorted({str(value.dtype) for value in model.state_dict().values()})
    return digest([type(model).__name__, settings, dtypes, ranking_digest(model)])


def ranking_digest(model: torch.nn.Module) -> str:
    """SHA-256 of the weights that pair logits depend on; calibration is not among them."""
    weights: Any = SimpleNamespace(state_dict=lambda: ranking_state(model))
    return weights_digest(weights)


def gallery_digest(gallery: Any) -> str:
    """SHA-256 of an encoded gallery: names, shapes, types and values of its tensors.

    Raises:
        ValueError: If it has no tensors.
    """
    if isinstance(gallery, AveragedGallery):
        return digest([gallery_digest(part) for part in gallery.parts])
    if isinstance(gallery, RaggedTexts):
        places = hashlib.sha256(gallery._part_of.tobytes() + gallery._row_of.tobytes()).hexdigest()
        return digest([places, *(gallery_digest(part) for part in gallery.parts)])
    total = hashlib.sha256()
    tensors = gallery_tensors(gallery)
    if not tensors:
        raise ValueError(f"A {type(gallery).__name__} holds no tensors to tell it from another gallery.")
    for name, value in sorted(tensors.items()):
        total.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _check(stored: Mapping[str, str], wanted: Mapping[str, str], folder: Path) -> None:
    different = [name for name in wanted if stored.get(name) != wanted[name]]
    if different:
        lines = [f"  {name}: there {stored.get(name)}, here {wanted[name]}" for name in different]
        raise ValueError(
            f"The finished blocks in {str(folder)!r} are those of another run:\n"
            + "\n".join(lines)
            + "\nGive this run a folder of its own, or delete that one."
        )


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)

"""A folder of finished blocks, so that a long run goes on where it was stopped."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..storage.files import StorageError, locked, read_json, write_json
from ..storage.fingerprints import digest, module_fingerprint, weights_digest
from ..storage.tensors import TensorFile, write_tensors
from .models import AveragedGallery, AveragedModel, EmbeddingScore
from .plan import BlockPlan, gallery_tensors
from .ragged import RaggedTexts

logger = logging.getLogger(__name__)

FORMAT = "tvrn-score-blocks"


class FinishedBlocks:
    """Scores of blocks in files of their own, named by place; what they are scores of stands in `manifest.json`.

    A block is complete or absent. Several processes, on one machine or on a common file system, may use a folder at
    once.

    Args:
        folder: Made where it is missing.
        fingerprint: What the scores come from, by name (`run_fingerprint`).
        plan: How the matrix would be cut; a folder that holds blocks already keeps to its own block size.

    Raises:
        ValueError: If the folder holds blocks of another model, other galleries or another precision: each
            difference is named.
        StorageError: If its manifest is damaged, of something else, or of another format.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, str], plan: BlockPlan):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "manifest.json"
        wanted = dict(fingerprint) | {"caption order": plan.order_digest}
        with locked(self.folder / "manifest.lock", wait=True):
            if not path.exists():
                shape = {"block_images": plan.block_images, "block_captions": plan.block_captions}
                write_json(path, FORMAT, {"fingerprint": wanted, "plan": shape})
        manifest = read_json(path, FORMAT)
        stored = manifest["fingerprint"]
        different = [name for name in wanted if stored.get(name) != wanted[name]]
        if different:
            lines = [f"  {name}: there {stored.get(name)}, here {wanted[name]}" for name in different]
            raise ValueError(
                f"The finished blocks in {str(folder)!r} are those of another run:\n"
                + "\n".join(lines)
                + "\nGive this run a folder of its own, or delete that one."
            )
        self.plan = BlockPlan(plan.image_count, plan.order, **manifest["plan"])
        # In every block too: where a disk has no locks, two runs could start in one folder.
        self.stamp = {"run": digest(manifest)}

    def load(self, block: tuple[int, int]) -> Tensor | None:
        """The scores of a block, None where they are still to be computed."""
        path = self._path(block)
        if not path.exists():
            return None
        shape = (len(self.plan.rows(block[0])), len(self.plan.columns(block[1])))
        try:
            file = TensorFile.open(path)
            if file.about.get("run") != self.stamp["run"]:
                raise StorageError(path, "a block of another run")
            scores = file.read()["scores"]
            if tuple(scores.shape) != shape:
                raise StorageError(path, f"damaged: it has shape {tuple(scores.shape)}, not {shape}")
        except StorageError as error:
            logger.warning("%s is %s: the block is scored again", path, error.problem)
            return None
        return scores

    def save(self, block: tuple[int, int], scores: Tensor) -> None:
        """Keep a block's scores."""
        write_tensors(self._path(block), {"scores": scores}, self.stamp)

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
    """SHA-256 of what decides a model's scores: its fingerprint and the precision of its weights.

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
    dtypes = sorted({str(value.dtype) for value in model.state_dict().values()})
    return digest([module_fingerprint(model), dtypes])


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

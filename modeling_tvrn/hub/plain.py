"""The doctor on a plain dual encoder (CLIP, SigLIP, …): can it be searched with, and does it score as it should?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from ..front_door import load_model
from .files import check_no_pickle, weight_files
from .report import Check
from .weights import stored_tensors

__all__ = ["check_plain"]

REFETCH = "fetch the checkpoint again: it may have been cut short"
CAPTIONS = ("a photograph", "two dogs run through the snow", "the red circle above a blue square")
TOLERANCE = 1e-3  # of a logit, alone against in a batch, relative to the largest


def check_plain(folder: Path, names: list[str]) -> list[Check]:
    """Files, weights, the probe that accepts a first stage, and scores; no code of the folder is run.

    Args:
        folder: the checkpoint.
        names: its files, those not downloaded too.
    """
    pickles = check_no_pickle(folder, names)
    if pickles.status == "failed":  # another's repository, of which this package reads the safetensors alone
        pickles = Check(pickles.name, "warning", f"{pickles.detail}; none of them is read")
    missing = [path.name for path in weight_files(folder) if not path.is_file()]
    if missing:
        advice = "only safetensors are read: find a revision of the checkpoint that has them, or convert it"
        files = Check("files", "failed", f"missing: {', '.join(missing)}", advice)
        return [files, pickles, *(Check(name, "not run", "needs weights") for name in ("values", "first stage"))]
    files = Check("files", "ok", f"{len(weight_files(folder))} of weights, in safetensors")
    return [files, pickles, _check_values(folder), *_check_scores(folder)]


def _check_values(folder: Path) -> Check:
    try:
        tensors = [(name, bool(torch.isfinite(tensor).all())) for name, tensor in stored_tensors(folder)]
    except (OSError, ValueError, SafetensorError) as error:
        return Check("values", "failed", f"cannot be read: {error}", REFETCH)
    broken = [name for name, finite in tensors if not finite]
    if broken:
        return Check(
            "values", "failed", f"NaN or infinite values in {len(broken)} tensors, first {broken[0]}", REFETCH
        )
    return Check("values", "ok", f"{len(tensors)} tensors, all finite")


def _check_scores(folder: Path) -> list[Check]:
    """Whether it can be the first stage, and each pair's logit alone beside that in a batch."""
    try:
        model, processor = load_model(folder, device="cpu")
    except (OSError, ValueError) as error:
        unseen = Check("scores", "not run", "needs a model that loads")
        return [Check("first stage", "failed", str(error), "use another dual encoder, or mend this one"), unseen]
    detail = (
        f"{type(model.dual_encoder).__name__}, embeddings of {model.config.projection_size}, captions of up to "
        f"{processor.max_text_length} tokens; its logit is scale·cosine + bias"
    )
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in CAPTIONS]
    with torch.inference_mode():
        together = model(**processor(images=pictures, text=list(CAPTIONS))).logits_per_image.float()
        alone = torch.stack(
            [
                model(**processor(images=[picture], text=[caption])).logits_per_image.float()[0, 0]
                for picture, caption in zip(pictures, CAPTIONS, strict=True)
            ]
        )
    loads = Check("first stage", "ok", detail)
    if not torch.isfinite(together).all():
        return [loads, Check("scores", "failed", "logits are NaN or infinite", "load it in float32")]
    worst = float((together.diagonal() - alone).abs().max() / together.abs().max().clamp_min(1.0))
    tolerance = TOLERANCE if model.dtype == torch.float32 else 20 * TOLERANCE
    if worst > tolerance:
        advice = "its captions may be padded otherwise than the checkpoint was trained with"
        return [loads, Check("scores", "failed", f"a pair's logit depends on its batch, by {worst:.1e}", advice)]
    return [loads, Check("scores", "ok", f"finite, and the same alone and in a batch ({worst:.0e})")]

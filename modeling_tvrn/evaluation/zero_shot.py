"""Zero-shot classification: which label's prompt fits an image best (Radford et al., CLIP, 2021, section 3.1)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.image_folder import image_files
from ..data.images import ImageError, decode_image
from ..data.skipped import SkipReport
from ..scoring.models import evaluating

__all__ = ["PROMPT", "LabelledImages", "zero_shot_accuracy"]

PROMPT = "a photo of a {}."


@dataclass(frozen=True)
class LabelledImages:
    """Images by label: a folder with one folder a label, named as the label is said.

    Attributes:
        labels: L names.
        paths: N image files.
        rows: N, the label of each.
        skipped: files that were left out while an accuracy was measured, counted by reason.
    """

    labels: list[str]
    paths: list[Path]
    rows: list[int]
    skipped: SkipReport = field(default_factory=SkipReport)

    @classmethod
    def of_folder(cls, folder: str | os.PathLike[str]) -> LabelledImages:
        """Read which images there are; underscores in a folder's name are spaces.

        Raises:
            ValueError: it is no folder, or has images of fewer than two labels.
        """
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise ValueError(f"{str(folder)!r} is no folder; expected one with a folder of images a label")
        found: dict[str, list[Path]] = {}
        for path in sorted(image_files(root.resolve())):
            label, *rest = path.relative_to(root.resolve()).parts
            if rest:
                found.setdefault(label, []).append(path)
        if len(found) < 2:
            raise ValueError(
                f"{str(folder)!r} has images of {len(found)} labels ({', '.join(found) or 'none'}); expected at least "
                "two folders, named by their labels, with images in them"
            )
        labels = [name.replace("_", " ") for name in found]
        rows = [row for row, paths in enumerate(found.values()) for _ in paths]
        return cls(labels, [path for paths in found.values() for path in paths], rows)


@torch.no_grad()
def zero_shot_accuracy(
    model: Any,
    processor: Any,
    images: LabelledImages,
    prompt: str = PROMPT,
    batch_size: int = 64,
    progress: bool = True,
) -> float:
    """Percentage of the images whose own label's prompt has the highest logit of all; a tie counts as wrong.

    Args:
        model: A `TVRNModel`; its whole pair score decides.
        processor: Its processor, with an image processor.
        images: By label; one that cannot be read is left out, counted in `images.skipped` and reported.
        prompt: With `{}` where the label goes.
        batch_size: Images at a time.
        progress: Show a bar.

    Raises:
        ValueError: The prompt has no place for the label, or no image could be read.
    """
    if "{}" not in prompt:
        raise ValueError(f"prompt = {prompt!r} has no place for the label; write {{}} there, as in {PROMPT!r}")
    images.skipped.clear()
    right = seen = 0
    with evaluating(model), tqdm(total=len(images.paths), desc="zero-shot", disable=None if progress else True) as bar:
        prompts = [prompt.replace("{}", label) for label in images.labels]
        texts = model.encode_texts(**processor(text=prompts).to(model.device))
        for start in range(0, len(images.paths), batch_size):
            pictures, rows = _read(images, range(start, min(start + batch_size, len(images.paths))))
            bar.update(min(batch_size, len(images.paths) - start))
            if not pictures:
                continue
            encoded = model.encode_images(**processor(images=pictures).to(model.device))
            logits = model.match(encoded, texts).double()
            own = logits.gather(1, torch.tensor(rows, device=logits.device).unsqueeze(1))
            right += int(((logits >= own).sum(dim=1) == 1).sum())
            seen += len(rows)
    if not seen:
        raise ValueError(f"none of the {len(images.paths)} images could be read ({images.skipped})")
    images.skipped.warn("zero-shot")
    return 100.0 * right / seen


def _read(images: LabelledImages, places: range) -> tuple[list[Any], list[int]]:
    pictures, rows = [], []
    for place in places:
        try:
            pictures.append(decode_image(images.paths[place]))
            rows.append(images.rows[place])
        except ImageError as error:
            images.skipped.add(error.reason, f"{images.paths[place]}: {error.why}")
    return pictures, rows

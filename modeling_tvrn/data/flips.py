"""Images turned over with their captions: a mirrored picture fits its caption with left and right exchanged, and no
longer the caption as it was."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["FLIPS", "Flip", "FlippingCollator", "flip_of", "flipped"]


@dataclass(frozen=True)
class Flip:
    """One way to turn an image over.

    Attributes:
        transpose: of its pixels.
        axis: of its boxes: 0 is x.
        words: pairs that change places in a caption.
    """

    transpose: Image.Transpose
    axis: int
    words: tuple[tuple[str, str], ...]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Any of the words."""
        return re.compile(rf"\b({'|'.join(word for pair in self.words for word in pair)})\b", re.IGNORECASE)

    def caption(self, caption: str) -> str:
        """The caption with each of the words in the other one's place."""
        exchanged = {one: other for pair in self.words for one, other in (pair, pair[::-1])}

        def other(found: re.Match[str]) -> str:
            word = exchanged[found[0].lower()]
            return word.capitalize() if found[0][0].isupper() else word

        return self.pattern.sub(other, caption)


FLIPS = {
    "left/right": Flip(Image.Transpose.FLIP_LEFT_RIGHT, 0, (("left", "right"),)),
    "above/below": Flip(
        Image.Transpose.FLIP_TOP_BOTTOM, 1, (("above", "below"), ("over", "under"), ("top", "bottom"))
    ),
}


def flip_of(caption: str, kinds: Sequence[str]) -> str | None:
    """The first of these kinds whose words a caption has."""
    return next((kind for kind in kinds if FLIPS[kind].pattern.search(caption)), None)


def flipped(record: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A record's image turned over; of region features, which are taken to be so themselves, the boxes.

    Raises:
        ValueError: there are neither pixels nor boxes.
    """
    flip = FLIPS[kind]
    if "image" in record:
        return {**record, "image": record["image"].transpose(flip.transpose)}
    if "region_boxes" not in record:
        raise ValueError("a record holds region features without boxes, so that nothing of it can be turned over")
    boxes = np.array(record["region_boxes"])
    boxes[..., [flip.axis, flip.axis + 2]] = 1 - boxes[..., [flip.axis + 2, flip.axis]]
    return {**record, "region_boxes": boxes}


class FlippingCollator:
    """A collator that adds to a batch the flipped twin of each pair whose caption can be turned: hard negatives.

    Args:
        collator: what the pairs and their twins are given to.
        kinds: of flips, by name in `FLIPS`.
        image_count: images of the data set: a twin's image number is its image's, plus this for the first kind, twice
            this for the second.
    """

    def __init__(self, collator: Any, kinds: Sequence[str], image_count: int) -> None:
        self.collator, self.kinds, self.image_count = collator, kinds, image_count

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate items of a `CaptionDataset` with their twins behind them."""
        twins = []
        for item in items:
            if (kind := flip_of(item["caption"], self.kinds)) is not None:
                number = item["row"] + self.image_count * (1 + list(FLIPS).index(kind))
                caption = FLIPS[kind].caption(item["caption"])
                twins.append({**item, "record": flipped(item["record"], kind), "caption": caption, "row": number})
        batch: dict[str, Any] = self.collator([*items, *twins])
        return batch

"""The named protocols of this field: which gallery each is measured on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .captions import CaptionTable


@dataclass(frozen=True)
class Protocol:
    """A gallery's required size, and how it is cut.

    Attributes:
        name: What a report calls it.
        image_count: Images that the gallery must have; None for any.
        captions_per_image: Captions that every image must have; None for any.
        cut_captions: Whether an image may have more, of which the first are taken.
        folds: Equal consecutive parts that are ranked by themselves; the mean is reported.
        positives: Whose further positives judge the same ranking too: "eccv" or "cxc".
    """

    name: str
    image_count: int | None = None
    captions_per_image: int | None = None
    cut_captions: bool = False
    folds: int = 1
    positives: str | None = None

    def apply(self, table: CaptionTable) -> CaptionTable:
        """The gallery as the protocol takes it.

        Raises:
            ValueError: If it has another size; the message names both.
        """
        table.check()
        if self.image_count is not None and table.image_count != self.image_count:
            raise ValueError(self._refusal(table, ""))
        if self.captions_per_image is None:
            return table
        for image_id, captions in zip(table.image_ids, table.captions, strict=True):
            too_many = len(captions) > self.captions_per_image and not self.cut_captions
            if len(captions) < self.captions_per_image or too_many:
                raise ValueError(self._refusal(table, f" Image {image_id!r} has {len(captions)} captions."))
        return table.first_captions(self.captions_per_image)

    def _refusal(self, table: CaptionTable, detail: str) -> str:
        images, captions = self.image_count or 0, self.captions_per_image or 0
        form = f"the first {captions} captions of each" if self.cut_captions else f"{captions} captions each"
        return (
            f"Protocol {self.name!r} is measured on {images} images with {form} ({images * captions} captions); this"
            f" gallery has {table.image_count} images and {table.caption_count} captions.{detail} Give the split that"
            " the protocol names, whole, or use protocol='validation', which takes any size and says which."
        )

    def parts(self, table: CaptionTable) -> list[tuple[np.ndarray, np.ndarray]]:
        """Image rows and caption numbers of each fold, consecutive and unshuffled."""
        rows = table.caption_image_rows
        folds = np.array_split(np.arange(table.image_count), self.folds)
        return [(fold, np.flatnonzero((rows >= fold[0]) & (rows <= fold[-1]))) for fold in folds]


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("validation"),
        Protocol("flickr8k-1k", 1000, 5),
        Protocol("flickr30k-1k", 1000, 5),
        Protocol("coco-5k", 5000, 5, cut_captions=True),
        Protocol("coco-1k", 5000, 5, cut_captions=True, folds=5),
        Protocol("eccv-caption", 5000, 5, cut_captions=True, positives="eccv"),
        Protocol("cxc", 5000, 5, cut_captions=True, positives="cxc"),
    )
}


CONTRAST = "contrast"  # ranks no gallery


def find_protocol(name: str) -> Protocol:
    """A protocol by name.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in PROTOCOLS:
        known = ", ".join(map(repr, [*PROTOCOLS, CONTRAST]))
        raise ValueError(f"There is no protocol {name!r}; expected one of {known}.")
    return PROTOCOLS[name]

"""A fingerprint of a gallery: which images and captions, in which order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Protocol

from .schema import ItemId


class HasIds(Protocol):
    """Records whose ids are known without reading images."""

    @property
    def image_ids(self) -> Sequence[ItemId]: ...
    @property
    def caption_ids(self) -> Sequence[Sequence[ItemId]]: ...


def data_fingerprint(records: HasIds, with_captions: bool = True) -> str:
    """SHA-256 (hex) of image ids and caption ids in order (evaluation.md).

    `7` and `"7"` are the same id: copies of one data set keep their ids as numbers or as text.

    Args:
        with_captions: False for what depends on the images alone, such as a cache of their regions.

    Raises:
        ValueError: the records have no ids, as a stream does before it was read.
    """
    if not hasattr(records, "image_ids") or not hasattr(records, "caption_ids"):
        raise ValueError(
            f"a {type(records).__name__} has no image_ids and caption_ids to take a fingerprint of; load it with "
            "streaming=False"
        )
    digest = hashlib.sha256()
    for image_id, caption_ids in zip(records.image_ids, records.caption_ids, strict=True):
        names = [str(image_id), *([str(name) for name in caption_ids] if with_captions else [])]
        digest.update(json.dumps(names).encode() + b"\n")
    return digest.hexdigest()

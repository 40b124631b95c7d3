"""Generated scenes: coloured shapes with sizes, counts and relations, where only the whole caption tells images apart.

Each family holds a scene and look-alikes of it: the same colours and shapes with one attribute, count or relation
changed. A caption is true of one description only, and no description of one split occurs in another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from PIL.Image import Image

from .captions import paired_captions, write_captions
from .description import SPLITS, FamilyKey, Group, Scene, draw_description, look_alikes, split_keys, split_of
from .drawing import PlacedObject, draw_scene, place_objects

__all__ = [
    "Group",
    "PlacedObject",
    "Scene",
    "SceneRecords",
    "generate_scenes",
    "look_alikes",
    "paired_captions",
    "split_of",
]

DEFAULT_COUNTS = {"train": 4000, "validation": 250, "test": 250}
FAMILY_SIZE = 4
CAPTION_COUNTS = (2, 5)
MIN_IMAGE_SIZE = 32
KEPT_IMAGES = 2**27  # bytes: every epoch of a usual training set, drawn once
_FRUITLESS_FAMILIES = 2000  # in a row: the split is used up


class SceneRecords(Sequence[dict[str, Any]]):
    """Records of generated scenes; captions are there at once, a picture is drawn when its record is asked for.

    Attributes:
        scenes: the symbolic description of each record.
        families: the family number of each record; records of one family are look-alikes and stand together.
        image_ids: the id of each record.
        captions: the captions of each record.
    """

    def __init__(self, scenes: list[Scene], families: list[int], split: str, seed: int, image_size: int) -> None:
        self.scenes = scenes
        self.families = families
        self.split = split
        self.seed = seed
        self.image_size = image_size
        self.image_ids = [f"{split}-{seed}-{row:06d}" for row in range(len(scenes))]
        self.captions = [self._write(row) for row in range(len(scenes))]
        self._kept: dict[int, tuple[Image, np.ndarray, list[str]]] = {}

    def _rng(self, row: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), row, purpose])

    def _write(self, row: int) -> list[str]:
        rng = self._rng(row, 0)
        return write_captions(self.scenes[row], rng, int(rng.integers(CAPTION_COUNTS[0], CAPTION_COUNTS[1] + 1)))

    def objects(self, row: int) -> list[PlacedObject]:
        """The objects of one record where the picture shows them."""
        return place_objects(self.scenes[row], self._rng(row, 1))

    def _drawn(self, row: int) -> tuple[Image, np.ndarray, list[str]]:
        """Picture, boxes and labels of a record; made again only where the collection is too large to be kept."""
        if row in self._kept:
            return self._kept[row]
        objects = self.objects(row)
        picture = draw_scene(objects, self.image_size, self._rng(row, 2))
        boxes = np.array([item.box for item in objects], dtype=np.float32)
        drawn = picture, boxes, [f"{item.size} {item.colour} {item.shape}" for item in objects]
        if (len(self._kept) + 1) * 3 * self.image_size**2 <= KEPT_IMAGES:
            self._kept[row] = drawn
        return drawn

    def __len__(self) -> int:
        return len(self.scenes)

    @overload
    def __getitem__(self, row: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, row: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, row: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(row, slice):
            return [self[index] for index in range(len(self))[row]]
        row = range(len(self))[row]  # negative rows, and IndexError past the end
        picture, boxes, labels = self._drawn(row)
        image_id = self.image_ids[row]
        return {
            "image": picture.copy(),
            "captions": list(self.captions[row]),
            "image_id": image_id,
            "caption_ids": [f"{image_id}#{number}" for number in range(len(self.captions[row]))],
            "split": self.split,
            "filename": f"{image_id}.png",
            "boxes": boxes.copy(),
            "labels": list(labels),
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))


def generate_scenes(
    split: str = "train", count: int | None = None, seed: int = 0, image_size: int = 64
) -> SceneRecords:
    """Scenes with look-alikes and captions that need the relation, the counts and the sizes to be told apart.

    Deterministic: equal arguments give equal records, and a larger `count` only adds records at the end.

    Args:
        split: "train", "validation" or "test"; which colours and shapes meet in a picture decides the split, so that
            no description is in two splits even under different seeds.
        count: number of scenes; by default 4000 for training and 250 otherwise.
        seed: of descriptions, wording and pictures; not negative.
        image_size: side of the square pictures in pixels.

    Returns:
        A sequence of records (image, captions, image_id, caption_ids, split, filename) which also hold `boxes`, the
        true boxes (objects, 4) as xyxy in [0, 1], and `labels`, one a box, such as "small red circle".

    Raises:
        ValueError: for an unknown split, a count, seed or size out of range, or more scenes than the split holds.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not a split of the generated scenes; choose one of {', '.join(SPLITS)}")
    count = DEFAULT_COUNTS[split] if count is None else count
    for name, value, least in (("count", count, 1), ("seed", seed, 0), ("image_size", image_size, MIN_IMAGE_SIZE)):
        if not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name}={value!r} is not usable; give an integer of at least {least}")
    scenes, families = _describe(split, int(count), int(seed))
    return SceneRecords(scenes, families, split, int(seed), int(image_size))


def _describe(split: str, count: int, seed: int) -> tuple[list[Scene], list[int]]:
    """`count` different descriptions in families of look-alikes, and the family number of each."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    keys = split_keys(split)
    families: dict[Scene, int] = {}
    number = fruitless = 0
    while len(families) < count:
        family = _draw_family(rng, keys, families)
        families.update(dict.fromkeys(family, number))
        number += bool(family)
        fruitless = 0 if family else fruitless + 1
        if fruitless > _FRUITLESS_FAMILIES:
            raise ValueError(
                f"count={count} is more scenes than the {split} split holds ({len(families)} found); ask for fewer"
            )
    return list(families)[:count], list(families.values())[:count]


def _draw_family(rng: np.random.Generator, keys: list[FamilyKey], used: dict[Scene, int]) -> list[Scene]:
    """A new scene with its look-alikes, or nothing where fewer than two new look-alikes are left."""
    scene = draw_description(rng, keys)
    others = [other for other in look_alikes(scene) if other not in used]
    if scene in used or len(others) < 2:
        return []
    chosen = rng.permutation(len(others))[: FAMILY_SIZE - 1]
    return [scene, *(others[index] for index in chosen)]

"""What a generated scene shows, as symbols: two groups of shapes and a relation, its look-alikes, and its split."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

import numpy as np

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
RELATIONS = ("left of", "above", "inside", "between")
SPLITS = ("train", "validation", "test")
MAX_COUNT = 3
CONTAINER_SHAPES = ("circle", "square")  # the others leave no room for what is inside

FamilyKey = tuple[tuple[str, str], tuple[str, str]]  # the two colours and the two shapes, each sorted


@dataclass(frozen=True)
class Group:
    """`count` equal objects."""

    count: int
    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """The first group stands in `relation` to the second: "two small red circles" "left of" "a large blue square"."""

    relation: str
    first: Group
    second: Group

    @property
    def family_key(self) -> FamilyKey:
        """What every look-alike of this scene shares, so that a whole family lands in one split."""
        return (
            _sorted_pair(self.first.colour, self.second.colour),
            _sorted_pair(self.first.shape, self.second.shape),
        )

    @property
    def is_drawable(self) -> bool:
        """Whether the scene can be drawn so that nothing about it is open to argument."""
        first, second = self.first, self.second
        if (first.colour, first.shape) == (second.colour, second.shape):
            return False
        if self.relation == "between":
            return first.count == 1 and second.count == 2
        if self.relation == "inside":
            fits = first.size == "small" and second.size == "large" and second.shape in CONTAINER_SHAPES
            return fits and second.count == 1 and first.colour != second.colour
        return True

    def swapped(self, field: str) -> Scene:
        """The scene with one attribute of its two groups exchanged."""
        first, second = getattr(self.first, field), getattr(self.second, field)
        return Scene(self.relation, replace(self.first, **{field: second}), replace(self.second, **{field: first}))


def _sorted_pair(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one <= other else (other, one)


def look_alikes(scene: Scene) -> list[Scene]:
    """Every drawable scene of the same colours and shapes that differs by one swap, one count, or the relation."""
    first, second = scene.first, scene.second
    candidates = [replace(scene, first=second, second=first)]
    candidates += map(scene.swapped, ("count", "size", "colour", "shape"))
    candidates += [replace(scene, relation=relation) for relation in RELATIONS]
    for count in range(1, MAX_COUNT + 1):
        candidates.append(replace(scene, first=replace(first, count=count)))
        candidates.append(replace(scene, second=replace(second, count=count)))
    distinct = dict.fromkeys(candidates)
    return [candidate for candidate in distinct if candidate.is_drawable and candidate != scene]


def split_of(key: FamilyKey) -> str:
    """The split a family belongs to, by a hash of its key: no description is ever in two splits, whatever the seed."""
    bucket = hashlib.blake2s(repr(key).encode()).digest()[0] % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


def split_keys(split: str) -> list[FamilyKey]:
    """All family keys of one split, in a fixed order."""
    colour_pairs = [_sorted_pair(*pair) for pair in combinations_with_replacement(COLOURS, 2)]
    shape_pairs = [_sorted_pair(*pair) for pair in combinations_with_replacement(SHAPES, 2)]
    keys = [(colours, shapes) for colours in colour_pairs for shapes in shape_pairs]
    distinguishable = [key for key in keys if len(set(key[0])) + len(set(key[1])) > 2]
    return [key for key in distinguishable if split_of(key) == split]


def draw_description(rng: np.random.Generator, keys: list[FamilyKey]) -> Scene:
    """One drawable scene at random: a relation first, so that the rarer ones are seen as often as the others."""
    relation = RELATIONS[rng.integers(len(RELATIONS))]
    while True:
        colours, shapes = keys[rng.integers(len(keys))]
        flip_colours, flip_shapes, one_size, other_size = rng.integers(2, size=4)
        one_count, other_count = (int(count) for count in rng.integers(1, MAX_COUNT + 1, size=2))
        if relation == "between":
            one_count, other_count = 1, 2
        scene = Scene(
            relation,
            Group(one_count, SIZES[one_size], colours[flip_colours], shapes[flip_shapes]),
            Group(other_count, SIZES[other_size], colours[1 - flip_colours], shapes[1 - flip_shapes]),
        )
        if scene.is_drawable:
            return scene

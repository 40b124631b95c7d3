"""Generated scenes: captions are true of their picture and of no other, and splits never share a scene."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain, combinations

import numpy as np
import pytest

from modeling_tvrn.data.scenes import Scene, SceneRecords, generate_scenes, look_alikes, split_of
from modeling_tvrn.data.scenes.captions import write_caption
from modeling_tvrn.data.scenes.description import SPLITS, draw_description, split_keys

# --- an independent reader of captions: words -> claims -> checked against boxes and labels, never the relation field

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
SIZES = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large", "huge": "large"}
SHAPES = {
    "circle": "circle", "disc": "circle", "square": "square", "block": "square", "triangle": "triangle",
    "star": "star", "cross": "cross",
}  # fmt: skip
COLOURS = {name: name for name in ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")}
COLOURS["violet"] = "purple"
NOUN_PHRASE = re.compile(
    rf"\b({'|'.join(NUMBERS)}) (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(es|s)?\b"
)
# What is left of a caption once its two noun phrases are X and Y in the order of mention.
READINGS = {
    "left": r"X (?:(?:is|are) )?(?:to the )?left of Y|X on the left and Y on the right|on the left X, on the right Y",
    "right": r"X (?:(?:is|are) )?(?:to the )?right of Y|X on the right and Y on the left",
    "above": r"X (?:(?:is|are) )?(?:above|over) Y|X at the top and Y at the bottom|at the top X, at the bottom Y",
    "below": r"X (?:(?:is|are) )?(?:below|under) Y|X at the bottom and Y at the top",
    "inside": r"X (?:(?:is|are) )?(?:inside|within) Y",
    "around": r"X (?:(?:is|are) )?around Y|X with Y inside",
    "between": r"X (?:(?:is|are) )?(?:between|flanked by) Y",
    "beside": r"X (?:(?:is|are) )?on both sides of Y|X with Y in between",
}
MIRRORED = {"right": "left", "below": "above", "around": "inside", "beside": "between"}


def read_caption(caption: str) -> tuple[str, tuple[int, str], tuple[int, str]]:
    """(relation, first group, second group), each group as (count, "size colour shape")."""
    body, _, tail = caption.partition(", all ")
    body = re.sub(r"^(a picture of|an image with|we see) ", "", body)
    phrases = list(NOUN_PHRASE.finditer(body))
    assert len(phrases) == 2, caption
    groups = []
    for number, size, colour, shape, plural in (phrase.groups() for phrase in phrases):
        assert bool(size) != bool(tail), f"size said twice or never: {caption}"
        assert bool(plural) == (NUMBERS[number] > 1), f"number and noun disagree: {caption}"
        groups.append((NUMBERS[number], f"{SIZES[size or tail]} {COLOURS[colour]} {SHAPES[shape]}"))
    for match, name in zip(reversed(phrases), "YX", strict=True):
        body = body[: match.start()] + name + body[match.end() :]
    relation = next(name for name, pattern in READINGS.items() if re.fullmatch(pattern, body))
    if relation in MIRRORED:
        return MIRRORED[relation], groups[1], groups[0]
    return relation, groups[0], groups[1]


def holds(relation: str, first: np.ndarray, second: np.ndarray) -> bool:
    """Whether boxes (n,4) of the first group stand in a relation to those of the second."""
    middle = (first.reshape(-1, 2, 2).mean((0, 1)), second.reshape(-1, 2, 2).mean((0, 1)))
    dx, dy = np.abs(middle[0] - middle[1])
    if relation == "left":
        return bool(first[:, 2].max() < second[:, 0].min() and dx > dy)
    if relation == "above":
        return bool(first[:, 3].max() < second[:, 1].min() and dy > dx)
    if relation == "inside":
        return bool((first[:, :2] > second[:, :2]).all() and (first[:, 2:] < second[:, 2:]).all())
    assert relation == "between" and len(first) == 1 and len(second) == 2
    ends = [second[np.argsort(second[:, axis])] for axis in (0, 1)]
    return any(
        end[0, axis + 2] < first[0, axis] and first[0, axis + 2] < end[1, axis] for axis, end in enumerate(ends)
    )


def is_true(caption: str, boxes: np.ndarray, labels: list[str]) -> bool:
    """Whether a caption describes a picture with these objects, all of them and no more."""
    relation, (first_count, first), (second_count, second) = read_caption(caption)
    if Counter({first: first_count, second: second_count}) != Counter(labels):
        return False
    named = np.array(labels)
    groups = boxes[named == first], boxes[named == second]
    if relation == "between" and (len(groups[0]), len(groups[1])) != (1, 2):
        return False
    return holds(relation, *groups)


def truth_of(records: SceneRecords) -> list[tuple[np.ndarray, list[str]]]:
    found = [records.objects(row) for row in range(len(records))]
    return [
        (np.array([item.box for item in items]), [f"{item.size} {item.colour} {item.shape}" for item in items])
        for items in found
    ]


@pytest.fixture(scope="module")
def records() -> SceneRecords:
    return generate_scenes("validation", count=240, seed=3)


@pytest.mark.slow
def test_captions_are_true_of_their_scene_and_of_no_other(records: SceneRecords) -> None:
    """A caption that also fits a look-alike would make a right answer count as an error."""
    truth = truth_of(records)
    for row, captions in enumerate(records.captions):
        for caption in captions:
            fitting = [other for other, (boxes, labels) in enumerate(truth) if is_true(caption, boxes, labels)]
            assert fitting == [row], caption


def test_captions_are_false_for_every_possible_look_alike() -> None:
    """Look-alikes that the split did not happen to draw count as well: nothing in a caption may be optional."""
    rng = np.random.default_rng(5)
    for _ in range(60):
        scene = draw_description(rng, split_keys("train"))
        family = [scene, *look_alikes(scene)]
        truth = truth_of(SceneRecords(family, [0] * len(family), "train", 0, 64))
        caption = write_caption(scene, rng)
        assert [is_true(caption, *item) for item in truth] == [True] + [False] * (len(family) - 1), caption


def test_families_hold_look_alikes_that_differ_in_one_respect(records: SceneRecords) -> None:
    """Without look-alikes a bag of colours would do; each must be one change from the family's first scene."""
    families = Counter(records.families)
    assert len(records) / len(families) > 3.5 and min(list(families.values())[:-1]) >= 3
    first: dict[int, Scene] = {}
    for scene, family in zip(records.scenes, records.families, strict=True):
        base = first.setdefault(family, scene)
        assert scene.family_key == base.family_key
        fields = ("count", "size", "colour", "shape")
        changed = [
            name for name in fields
            if [getattr(base.first, name), getattr(base.second, name)]
            != [getattr(scene.first, name), getattr(scene.second, name)]
        ]  # fmt: skip
        exchanged = (scene.first, scene.second) == (base.second, base.first)
        assert exchanged or len(changed) + (scene.relation != base.relation) <= 1, (base, scene)


def test_the_same_words_describe_different_scenes() -> None:
    """Word order must matter: many scenes share their bag of content words with another scene of the gallery."""
    records = generate_scenes("validation", count=400)
    bags: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for scene in records.scenes:
        content = [str(value) for group in (scene.first, scene.second) for value in vars(group).values()]
        bags[(scene.relation, tuple(sorted(content)))] += 1
    ambiguous = sum(number for number in bags.values() if number > 1)
    assert ambiguous > 0.3 * len(records)


def test_all_colours_shapes_sizes_counts_and_relations_occur_in_every_split() -> None:
    for split in SPLITS:
        scenes = generate_scenes(split, count=400).scenes
        groups = [group for scene in scenes for group in (scene.first, scene.second)]
        assert {group.colour for group in groups} == set(COLOURS.values())
        assert {group.shape for group in groups} == set(SHAPES.values())
        sizes = ("small", "large")
        assert {(group.count, group.size) for group in groups} == {(n, size) for n in (1, 2, 3) for size in sizes}
        relations = Counter(scene.relation for scene in scenes)
        assert set(relations) == {"left of", "above", "inside", "between"} and min(relations.values()) > 20


@pytest.mark.slow
def test_splits_share_no_scene_and_no_caption_even_under_other_seeds() -> None:
    drawn = {(split, seed): generate_scenes(split, count=500, seed=seed) for split in SPLITS for seed in (0, 1)}
    for one, other in combinations(drawn, 2):
        if one[0] == other[0]:
            continue
        assert not set(drawn[one].scenes) & set(drawn[other].scenes)
        captions = [set(chain.from_iterable(drawn[key].captions)) for key in (one, other)]
        assert not captions[0] & captions[1]
    assert all(split_of(scene.family_key) == split for (split, _), found in drawn.items() for scene in found.scenes)


def test_no_description_and_no_caption_occurs_twice_within_a_split() -> None:
    records = generate_scenes("train", count=1500)
    assert len(set(records.scenes)) == len(records) == 1500
    captions = list(chain.from_iterable(records.captions))
    assert len(set(captions)) == len(captions)


def test_records_have_the_agreed_shape(records: SceneRecords) -> None:
    record = records[7]
    assert record["image"].size == (64, 64) and record["image"].mode == "RGB"
    assert 2 <= len(record["captions"]) <= 5 and record["captions"] == records.captions[7]
    assert record["image_id"] == records.image_ids[7] and record["split"] == "validation"
    assert len(set(record["caption_ids"])) == len(record["captions"])
    assert record["filename"].endswith(".png")
    assert record["boxes"].shape == (len(record["labels"]), 4) and record["boxes"].dtype == np.float32
    assert len(set(records.image_ids)) == len(records) == sum(1 for _ in records.image_ids)
    assert {len(captions) for captions in records.captions} == {2, 3, 4, 5}


def test_equal_arguments_give_equal_pictures_and_a_larger_count_only_appends() -> None:
    short, long = generate_scenes("train", count=9, seed=4), generate_scenes("train", count=40, seed=4)
    for one, other in zip(short, long, strict=False):
        assert one["captions"] == other["captions"] and one["image_id"] == other["image_id"]
        np.testing.assert_array_equal(np.asarray(one["image"]), np.asarray(other["image"]))
    np.testing.assert_array_equal(np.asarray(long[-1]["image"]), np.asarray(long[39]["image"]))
    assert generate_scenes("train", count=9, seed=5).captions != short.captions
    with pytest.raises(IndexError):
        short[9]


@pytest.mark.parametrize("size", [64, 97])
def test_boxes_are_where_the_colours_are(size: int) -> None:
    """Detector boxes come from this field: the shape's own colour must fill the middle of its box, not the corners."""
    palette = {
        "red": (205, 38, 38), "orange": (242, 138, 28), "yellow": (242, 222, 48), "green": (38, 150, 58),
        "blue": (42, 78, 205), "purple": (142, 56, 172), "white": (244, 244, 240), "black": (20, 20, 22),
    }  # fmt: skip
    names, colours = list(palette), np.array(list(palette.values()))
    for record in generate_scenes("train", count=80, seed=2, image_size=size):
        pixels = np.asarray(record["image"], dtype=float)
        assert (record["boxes"] >= 0).all() and (record["boxes"] <= 1).all()
        for box, label in zip(record["boxes"], record["labels"], strict=True):
            x1, y1, x2, y2 = box * size
            diameter = max(x2 - x1, y2 - y1) / size
            assert 0.1 < diameter < 0.18 if label.startswith("small") else 0.2 < diameter < 0.75
            if any(holds("inside", inner[None], box[None]) for inner in record["boxes"]):
                continue  # something else is painted in its middle
            row, column = int((y1 + y2) / 2), int((x1 + x2) / 2)
            centre = pixels[row - 1 : row + 2, column - 1 : column + 2].mean((0, 1))
            assert names[np.abs(colours - centre).sum(1).argmin()] == label.split()[1], (record["image_id"], label)


def test_drawing_is_lazy_and_quick_enough_for_thousands() -> None:
    """Descriptions and captions of thousands come at once; asking for one record draws one picture."""
    records = generate_scenes("train", count=3000)
    assert len(records) == 3000 and sum(map(len, records.captions)) > 9000
    assert records[2999]["image_id"] == "train-0-002999"
    assert [record["image_id"] for record in records[:3]] == records.image_ids[:3]


def test_arguments_that_cannot_work_are_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match="'val'.*train, validation, test"):
        generate_scenes("val")
    for arguments in ({"count": 0}, {"seed": -1}, {"image_size": 8}, {"count": 2.5}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            generate_scenes("train", **arguments)


@pytest.mark.slow
def test_more_scenes_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="validation split holds"):
        generate_scenes("validation", count=50_000)


def test_a_record_is_its_callers_own() -> None:
    """Pictures are kept for the next epoch: painting on one, as augmentation may, must not reach that epoch."""
    records = generate_scenes("train", count=3)
    record = records[1]
    before, boxes = np.asarray(record["image"]).copy(), record["boxes"].copy()
    record["image"].paste((1, 2, 3), (0, 0, 64, 64))
    record["boxes"] += 1
    record["captions"].clear()
    np.testing.assert_array_equal(np.asarray(records[1]["image"]), before)
    np.testing.assert_array_equal(records[1]["boxes"], boxes)
    assert records[1]["captions"] == records.captions[1] and records[1]["captions"]

"""Boxes of what the words of a caption name: of generated scenes, COCO's instances, Flickr30k Entities."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any
from xml.etree import ElementTree

import numpy as np

from modeling_tvrn.data.scenes.description import COLOURS
from modeling_tvrn.data.skipped import Unusable

Boxes = dict[tuple[int, int], np.ndarray]  # first character of a word and one past its last -> (n, 4) xyxy in [0, 1]
FindBoxes = Callable[[dict[str, Any]], tuple[str, Boxes]]  # of a record: a caption of it, and what its words name

NO_ANNOTATION = "image without annotations"
BROKEN_ANNOTATION = "broken annotations"

SCENE_NAMES = {"circle": ("circle", "disc"), "square": ("square", "block")}  # other shapes have one name
SCENE_COLOURS = {"violet": "purple"}
COCO_NAMES = {  # what captions call COCO's categories; a plural in s or es goes without saying
    "person": "people man men woman women boy girl child children kid guy lady baby player rider skier surfer "
    "snowboarder skateboarder",
    "bicycle": "bike", "motorcycle": "motorbike", "airplane": "plane jet", "boat": "sailboat ship canoe",
    "train": "locomotive", "traffic light": "stoplight", "fire hydrant": "hydrant", "bird": "seagull parrot pigeon",
    "cat": "kitten", "dog": "puppy puppies", "horse": "pony ponies", "sheep": "lamb", "cow": "cattle bull calf calves",
    "handbag": "purse", "tie": "necktie", "suitcase": "luggage", "sports ball": "ball", "baseball bat": "bat",
    "baseball glove": "glove mitt", "tennis racket": "racket racquet", "wine glass": "wineglass", "knife": "knives",
    "donut": "doughnut", "couch": "sofa", "potted plant": "plant", "dining table": "table", "tv": "television",
    "mouse": "mice", "cell phone": "phone cellphone", "refrigerator": "fridge", "hair drier": "hairdryer",
}  # fmt: skip
PHRASE = re.compile(r"\[/EN#(\d+)(?:/[^\s\]]+)* ([^\]]*[^\]\s])\s*\]")


def spellings(name: str) -> list[str]:
    """A name and its plurals."""
    return [name + end for end in ("", "s", "es")]


def scene_boxes(record: dict[str, Any]) -> tuple[str, Boxes]:
    """Of a scene's first caption: a shape's name, of the colour that the word before it says, if it is one."""
    caption, found, before = record["captions"][0], {}, ""
    for word in re.finditer(r"\w+", caption):
        colour = SCENE_COLOURS.get(before, before)
        boxes = [
            box
            for box, (_, its_colour, shape) in zip(record["boxes"], map(str.split, record["labels"]), strict=True)
            if any(word[0].lower() in spellings(name) for name in SCENE_NAMES.get(shape, (shape,)))
            and (colour not in COLOURS or colour == its_colour)
        ]
        if boxes:
            found[word.span()] = np.array(boxes)
        before = word[0]
    return caption, found


def coco_boxes(file: str) -> FindBoxes:
    """Of the first caption of COCO's images: words that name a category, by a file such as instances_val2017.json.

    An image is known by the twelve digits at the end of its file's name, else by its id.

    Raises:
        ValueError: the file is none of COCO's instances.
    """
    try:
        content = json.loads(Path(file).read_text("utf-8"))
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        names = {category["id"]: category["name"] for category in content["categories"]}
        of_image: dict[int, dict[str, list[np.ndarray]]] = {image_id: {} for image_id in sizes}
        for each in content["annotations"]:
            left, top, width, height = each["bbox"]
            box = np.array([left, top, left + width, top + height]) / (sizes[each["image_id"]] * 2)
            of_image[each["image_id"]].setdefault(names[each["category_id"]], []).append(box)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is no file of COCO's instances ({type(error).__name__}: {error}); expected images, categories "
            "and annotations with a bbox, as instances_val2017.json has them"
        ) from error
    categories = {
        spelling: name
        for name in names.values()
        for word in [name, *COCO_NAMES.get(name, "").split()]
        for spelling in spellings(word)
    }

    def find(record: dict[str, Any]) -> tuple[str, Boxes]:
        digits = re.search(r"\d{12}$", PurePath(record.get("filename") or "").stem)
        image_id = digits[0] if digits else record["image_id"]
        image_id = int(image_id) if str(image_id).isdecimal() else image_id
        if image_id not in of_image:
            raise Unusable(NO_ANNOTATION, f"{image_id!r} is not in {file}")
        caption = record["captions"][0]
        named = ((span, of_image[image_id].get(categories[name], [])) for span, name in _names(caption, categories))
        return caption, {span: np.array(boxes) for span, boxes in named if boxes}

    return find


def _names(caption: str, known: dict[str, str]) -> Iterator[tuple[tuple[int, int], str]]:
    """The known names in a caption, each at its last word: a hot dog is no dog, and a teddy bear no bear."""
    before = ""
    for word in re.finditer(r"\w+", caption.lower()):
        name = next((name for name in (f"{before} {word[0]}", word[0]) if name in known), None)
        if name is not None:
            yield word.span(), name
        before = word[0]


def entities_boxes(folder: str) -> FindBoxes:
    """Of the first caption of Flickr30k Entities, as it is written there: the last word of every phrase with boxes.

    An image is known by its file's name.

    Args:
        folder: With Annotations and Sentences, as the data set's annotations.zip holds them.

    Raises:
        ValueError: the folder holds something else.
    """
    annotations, sentences = Path(folder) / "Annotations", Path(folder) / "Sentences"
    if not annotations.is_dir() or not sentences.is_dir():
        raise ValueError(
            f"{folder!r} is no folder of Flickr30k Entities; expected the folders Annotations and Sentences in it, as "
            "the data set's annotations.zip holds them"
        )

    def find(record: dict[str, Any]) -> tuple[str, Boxes]:
        name = PurePath(record.get("filename") or "").stem
        try:
            line = (sentences / f"{name}.txt").read_text("utf-8").split("\n", 1)[0]
            boxes = _annotated(annotations / f"{name}.xml")
        except FileNotFoundError as error:
            raise Unusable(NO_ANNOTATION, f"there is no {error.filename}") from error
        except (ElementTree.ParseError, TypeError, ValueError) as error:
            raise Unusable(BROKEN_ANNOTATION, f"of {name}: {error}") from error
        caption, heads = _phrases(line)
        return caption, {span: np.array(boxes[entity]) for span, entity in heads.items() if entity in boxes}

    return find


def _phrases(line: str) -> tuple[str, dict[tuple[int, int], str]]:
    """A caption without its marks, and of each phrase the place of the last word and the entity's id."""
    caption, heads, end = "", {}, 0
    for match in PHRASE.finditer(line):
        caption += line[end : match.start()] + match[2]
        heads[len(caption) - len(match[2].split()[-1]), len(caption)] = match[1]
        end = match.end()
    return caption + line[end:], heads


class _Tree(ElementTree.TreeBuilder):
    def doctype(self, *_: Any) -> None:  # where entities that grow without end are declared
        raise ValueError("it has a DOCTYPE, which the data set's files have not")


def _annotated(path: Path) -> dict[str, list[np.ndarray]]:
    """The boxes of each entity; those that are the whole scene or not to be seen have none."""
    root = ElementTree.parse(path, ElementTree.XMLParser(target=_Tree())).getroot()
    size = [int(root.findtext(f"size/{side}") or 0) for side in ("width", "height")]
    if min(size) < 1:
        raise ValueError(f"width and height are {size}")
    found: dict[str, list[np.ndarray]] = {}
    for thing in root.iter("object"):
        if (box := thing.find("bndbox")) is None:
            continue
        left, top, right, bottom = (int(box.findtext(edge) or 0) for edge in ("xmin", "ymin", "xmax", "ymax"))
        for name in thing.findall("name"):  # pixels are counted from 1, and the last one is inside
            found.setdefault(name.text or "", []).append(np.array([left - 1, top - 1, right, bottom]) / (size * 2))
    return found

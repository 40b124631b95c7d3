"""The pointing game's boxes: what the words of a caption name in COCO's instances and in Flickr30k Entities."""

import json
from pathlib import Path
from typing import Any

import named_boxes
import pytest

from modeling_tvrn.data.skipped import Unusable

SENTENCE = (
    "[/EN#1/people/clothing Two young guys] by [/EN#2/scene a road] hold [/EN#3/clothing their T-shirts] "
    "; [/EN#0/notvisual it] .\n"
)
BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
OBJECTS = (
    f"<object><name>1</name>{BOX.format(1, 1, 100, 50)}</object>"
    f"<object><name>1</name><name>3</name>{BOX.format(101, 1, 200, 100)}</object>"
    "<object><name>2</name><scene>1</scene><nobndbox>0</nobndbox></object>"
    "<object><name>4</name><scene>0</scene><nobndbox>1</nobndbox></object>"
)
XML = "{}<annotation><size><width>{}</width><height>100</height></size>{}</annotation>"
DOCTYPE = '<!DOCTYPE a [<!ENTITY b "much"><!ENTITY c "&b;&b;">]>'


def words_and_boxes(found: tuple[str, dict[tuple[int, int], Any]]) -> dict[str, list[list[float]]]:
    caption, boxes = found
    return {caption[slice(*span)]: each.tolist() for span, each in boxes.items()}


def entities(folder: Path, xml: str | None) -> str:
    for name, content in (("Annotations/36.xml", xml), ("Sentences/36.txt", SENTENCE * 5)):
        (folder / name).parent.mkdir()
        if content is not None:
            (folder / name).write_text(content)
    return str(folder)


def test_the_last_word_of_a_phrase_has_the_boxes_of_its_entity(tmp_path: Path) -> None:
    find = named_boxes.entities_boxes(entities(tmp_path, XML.format("", 200, OBJECTS)))
    found = find({"filename": "flickr30k-images/36.jpg"})
    assert found[0] == "Two young guys by a road hold their T-shirts ; it ."
    assert words_and_boxes(found) == {"guys": [[0, 0, 0.5, 0.5], [0.5, 0, 1, 1]], "T-shirts": [[0.5, 0, 1, 1]]}


@pytest.mark.parametrize(
    ("xml", "complaint"),
    [
        (None, "image without annotations: there is no .*36.xml"),
        (XML.format("", 0, OBJECTS), r"broken annotations: of 36: width and height are \[0, 100\]"),
        (XML.format("", 200, "<object><bndbox/>"), "broken annotations: of 36: mismatched tag"),
        (XML.format(DOCTYPE, 200, "&c;"), "broken annotations: of 36: it has a DOCTYPE"),
    ],
)
def test_an_image_with_bad_annotations_can_be_left_out(tmp_path: Path, xml: str | None, complaint: str) -> None:
    find = named_boxes.entities_boxes(entities(tmp_path, xml))
    with pytest.raises(Unusable, match=complaint):
        find({"filename": "36.jpg"})


def test_words_name_categories_of_coco(tmp_path: Path) -> None:
    """By plurals, by other names, by names of two words, of which the second alone may be another thing."""
    names = ["person", "dog", "hot dog", "dining table", "knife", "skis", "sheep"]
    content = {
        "images": [{"id": 7, "width": 200, "height": 100}, {"id": 8, "width": 10, "height": 10}],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
        "annotations": [{"image_id": 7, "category_id": n, "bbox": [20 * n, 10, 20, 50]} for n in range(len(names))],
    }
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    find = named_boxes.coco_boxes(str(file))
    caption = "Two Women eat a hot dog and a sheep, with knives, at a table, by dogs on skis"
    found = words_and_boxes(find({"filename": "COCO_val2014_000000000007.jpg", "image_id": 0, "captions": [caption]}))
    categories = {word: names[round(10 * boxes[0][0])] for word, boxes in found.items()}
    others = {"knives": "knife", "table": "dining table", "dogs": "dog", "skis": "skis"}
    assert categories == {"Women": "person", "dog": "hot dog", "sheep": "sheep"} | others
    assert found["Women"] == [[0, 0.1, 0.1, 0.6]]
    assert find({"image_id": 8, "captions": [caption]}) == (caption, {})
    with pytest.raises(Unusable, match="image without annotations: 9 is not in"):
        find({"image_id": 9, "captions": [caption]})


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(ValueError, match=r"no file of COCO's instances \(KeyError: 'categories'\); expected images"):
        named_boxes.coco_boxes(str(tmp_path / "captions.json"))
    with pytest.raises(ValueError, match="no folder of Flickr30k Entities; expected the folders Annotations and"):
        named_boxes.entities_boxes(str(tmp_path))

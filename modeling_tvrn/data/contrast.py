"""Contrast rows: a caption with its image, and what has to score less: the caption with another image, or the image
with another caption. Out of generated scenes, of any data by mirroring images, or of a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np

from .delimited import read_delimited
from .flips import flip_of, flipped
from .images import ImageError, decode_image
from .named_files import NamedFiles
from .scenes import Scene, SceneRecords, paired_captions
from .scenes.description import MAX_COUNT
from .text_files import read_json_file, read_json_lines, text_of

__all__ = ["ContrastRow", "contrast_rows", "read_contrast_rows"]

SIDES = "left/right"
CAPTIONS_PER_SWAP = 2
COLUMNS = ("image", "caption", "other_image", "other_caption", "kind", "group")
# Columns of public sets, by what they are here: SugarCrepe, and ARO's two sets of Visual Genome.
PUBLIC_COLUMNS = {
    ("filename", "caption", "negative_caption"): ("image", "caption", "other_caption"),
    ("image_path", "true_caption", "false_caption"): ("image", "caption", "other_caption"),
}
WINOGROUND = ("image_0", "image_1", "caption_0", "caption_1")


@dataclass(frozen=True)
class ContrastRow:
    """A pair that fits, and one or two that do not.

    Attributes:
        image: A file, a picture, a record with region features, or a function without arguments that gives one.
        caption: What fits it.
        kind: What differs, by which accuracies are reported.
        other_image: An image that the caption does not fit.
        other_caption: A caption that does not fit the image.
        group: Rows that are right together only (Winoground's two).
        box: Pixels x1, y1, x2, y2 that the image, a file, is cut to.
    """

    image: Any
    caption: str
    kind: str
    other_image: Any = None
    other_caption: str | None = None
    group: str | None = None
    box: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        problem = None
        if not isinstance(self.caption, str) or not self.caption.strip():
            problem = f"caption is {self.caption!r}; expected words"
        elif self.other_image is None and not self.other_caption:
            problem = "there is neither other_image nor other_caption; expected at least one to compare with"
        elif self.other_caption == self.caption:
            problem = f"caption and other_caption are both {self.caption!r}; expected two that differ"
        elif self.other_image is not None and _same(self.image, self.other_image):
            problem = f"image and other_image are both {self.image!r}; expected two that differ"
        if problem is not None:
            raise ValueError(f"A contrast row of kind {self.kind!r} cannot be used: {problem}.")

    def images(self) -> Iterator[Mapping[str, Any]]:
        """Its one or two images as records: `{"image": PIL.Image}`, or region features.

        Raises:
            ImageError: One cannot be read.
        """
        yield _record(self.image, self.box)
        if self.other_image is not None:
            yield _record(self.other_image, None)

    def image_keys(self) -> list[Hashable]:
        """For each of `images` what tells it from others: a file's name, otherwise which object it is."""
        images = [(self.image, self.box), *([] if self.other_image is None else [(self.other_image, None)])]
        return [(str(image) if isinstance(image, str | os.PathLike) else id(image), box) for image, box in images]


def contrast_rows(records: Any) -> list[ContrastRow]:
    """What the captions of some records can be contrasted with.

    Of generated scenes: pictures that are mirrored (for "left of") or upside down (for "above"), and captions with
    colours, shapes or sizes swapped or a count changed. Of other data: every caption that says left or right, with its
    image mirrored; of region features, which are taken for mirrored themselves, the boxes.

    Args:
        records: Of `load_pairs`, map-style; or `SceneRecords`.

    Raises:
        ValueError: If no caption says left or right.
    """
    scenes = records if isinstance(records, SceneRecords) else getattr(records, "scenes", None)
    if scenes is not None:
        wanted = set(records.image_ids)
        rows = [row for row, image_id in enumerate(scenes.image_ids) if image_id in wanted]
        return [made for row in rows for made in _of_scene(scenes, row)]
    found = []
    for row, captions in enumerate(records.captions):
        picture, mirrored = partial(getitem, records, row), partial(_flipped, records, row, SIDES)
        found += [ContrastRow(picture, each, SIDES, mirrored) for each in captions if flip_of(each, [SIDES])]
    if not found:
        raise ValueError(
            f"no caption of the {len(records)} images of {getattr(records, 'name', 'the data')} says left or right: "
            "there is nothing to contrast; give other data, or a file of contrast rows"
        )
    return found


def read_contrast_rows(
    path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> list[ContrastRow]:
    """Contrast rows of a file: CSV, JSON (a list, or SugarCrepe's mapping) or JSON lines.

    Columns: image, caption, other_image or other_caption (or both), kind, group. Also read are SugarCrepe's files
    (Hsieh et al., 2023), ARO's visual_genome_relation.json and visual_genome_attribution.json (Yüksekgönül et al.,
    2023), cut to their boxes as its authors do, and Winoground's examples.jsonl (Thrush et al., 2022).

    Args:
        path: The file.
        images: Folder in which images are named; default: the file's own.

    Raises:
        ValueError: Another schema (the columns seen are named), a row without its counterpart or with two sides that
            are equal (the row is named), or a file that cannot be read as what it is called.
    """
    path = Path(path)
    files = NamedFiles(images if images is not None else path.parent, is_given=images is not None)
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"{path} is called {path.suffix or 'without a suffix'}; expected .csv, .tsv, .json or .jsonl")
    rows = [row for number, values in read(path) for row in _rows_of(values, files, f"{path}, {number}", path.stem)]
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


# -- scenes -----------------------------------------------------------------------------------------------------


def _of_scene(records: SceneRecords, row: int) -> Iterator[ContrastRow]:
    scene, picture = records.scenes[row], partial(getitem, records, row)
    kind = {"left of": "left/right", "above": "above/below"}.get(scene.relation)
    if kind is not None:
        turned = partial(_flipped, records, row, kind)
        for caption in records.captions[row]:
            yield ContrastRow(picture, caption, kind, other_image=turned)
    for kind, changed in _changed(scene):
        rng = np.random.default_rng([records.seed, row, len(kind)])
        for _ in range(CAPTIONS_PER_SWAP):
            right, wrong = paired_captions(scene, changed, int(rng.integers(2**31)))
            if right != wrong:
                yield ContrastRow(picture, right, kind, other_caption=wrong)


def _changed(scene: Scene) -> Iterator[tuple[str, Scene]]:
    """Scenes that differ by one thing, with its name; drawable ones, so that their captions sound like others."""
    first, second = scene.first, scene.second
    others = [(field, scene.swapped(field)) for field in ("colour", "shape", "size")]
    for step in (1, -1):
        others += [
            ("count", replace(scene, first=replace(first, count=first.count + step))),
            ("count", replace(scene, second=replace(second, count=second.count + step))),
        ]
    for kind, other in others:
        counts = other.first.count, other.second.count
        if all(1 <= count <= MAX_COUNT for count in counts) and other != scene and other.is_drawable:
            yield kind, other


# -- images -----------------------------------------------------------------------------------------------------


def _flipped(records: Any, row: int, kind: str) -> Mapping[str, Any]:
    return flipped(records[row], kind)


def _record(image: Any, box: tuple[float, float, float, float] | None) -> Mapping[str, Any]:
    found = image() if isinstance(image, Callable) else image  # type: ignore[arg-type]
    if isinstance(found, Mapping):
        return found
    picture = decode_image(found)
    return {"image": picture if box is None else picture.crop(box)}


def _same(image: Any, other: Any) -> bool:
    files = isinstance(image, str | Path) and isinstance(other, str | Path)
    return Path(image) == Path(other) if files else image is other


# -- files ------------------------------------------------------------------------------------------------------


def _rows_of(values: Mapping[str, Any], files: NamedFiles, place: str, stem: str) -> Iterable[ContrastRow]:
    """The rows of one entry of a file: one, or Winoground's two."""
    if all(name in values for name in WINOGROUND):
        names = [str(values[name]) for name in ("image_0", "image_1")]
        pictures = [_file(files, name if Path(name).suffix else f"{name}.png", place) for name in names]
        captions, group = [values["caption_0"], values["caption_1"]], str(values.get("id", place))
        kind = str(values.get("collapsed_tag") or values.get("tag") or stem)
        return [
            _row(place, image=pictures[k], caption=captions[k], kind=kind, group=group,
                 other_image=pictures[1 - k], other_caption=captions[1 - k])
            for k in (0, 1)
        ]  # fmt: skip
    for theirs, ours in PUBLIC_COLUMNS.items():
        if all(name in values for name in theirs):
            values = {**dict(zip(ours, (values[name] for name in theirs), strict=True)), **values}
    if "image" not in values or "caption" not in values or not ("other_image" in values or "other_caption" in values):
        raise ValueError(
            f"{place} has the columns {sorted(values)}; expected image, caption, other_image or other_caption, and "
            "kind (or a file of SugarCrepe, ARO or Winoground)"
        )
    given: dict[str, Any] = {"kind": stem}
    given |= {name: values[name] for name in COLUMNS if values.get(name) not in (None, "")}
    given |= {name: _file(files, str(given[name]), place) for name in ("image", "other_image") if name in given}
    if all(isinstance(values.get(f"bbox_{name}"), int | float) for name in "xywh"):
        x, y, width, height = (values[f"bbox_{name}"] for name in "xywh")
        given["box"] = (x, y, x + width, y + height)
    return [_row(place, **given)]


def _file(files: NamedFiles, name: str, place: str) -> Path:
    found = files.find(name)
    if isinstance(found, ImageError):
        raise ValueError(f"{place}: {found}")
    return found


def _row(place: str, **values: Any) -> ContrastRow:
    try:
        return ContrastRow(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


def _read_table(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    known = {*COLUMNS, *WINOGROUND, *(name for names in PUBLIC_COLUMNS for name in names)}
    for number, values in enumerate(read_delimited(path, text_of(path), known), start=1):
        yield f"row {number}", values


def _read_json(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    content = read_json_file(path)
    entries = content.items() if isinstance(content, Mapping) else enumerate(content)
    for number, values in entries:
        yield f"entry {number}", _mapping(values, f"{path}, entry {number}")


def _read_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, values in read_json_lines(path):
        yield f"line {number}", _mapping(values, f"{path}, line {number}")


def _mapping(values: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{place} is {values!r:.80}; expected a mapping of columns")
    return values


# By the suffix of a file's name.
READERS = {".csv": _read_table, ".tsv": _read_table, ".json": _read_json, ".jsonl": _read_lines}

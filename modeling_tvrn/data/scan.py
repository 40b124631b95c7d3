"""SCAN's precomputed data: `{split}_ims.npy` with region features, `{split}_caps.txt` with one caption a line.

Optional beside them: `{split}_boxes.npy` (or `_ims_bbx`) (n, regions, 4) xyxy in pixels or in [0, 1],
`{split}_img_sizes.npy` (or `_image_sizes`, `_ims_size`) (n, 2) as height, width in pixels, and `{split}_ids.txt` with
an image id a line.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .images import ImageError
from .schema import Layout, SourceRow
from .skipped import BAD_REGIONS
from .sources import Content, PairSource, joined
from .splits import SplitChoice, canonical_split, choose_splits

CAPTIONS_PER_IMAGE = 5
_IMAGES, _CAPTIONS = "_ims.npy", "_caps.txt"
_BOXES = ("_boxes.npy", "_ims_bbx.npy")
_SIZES = ("_img_sizes.npy", "_image_sizes.npy", "_ims_size.npy")
_BOX_SLACK = 1.0  # pixels by which detectors' boxes may leave the image
_ROUNDING = 1e-4  # the same of fractions


class ScanSource(PairSource):
    """Region features of one split, mapped into memory: a row is read from disk when it is asked for.

    Rows come once an image, or repeated once a caption; the ratio of the two files' lengths tells which.

    Args:
        folder: where the files lie.
        stem: the split's name in the file names, such as "dev".
        captions_per_image: how many lines belong to an image; five unless told otherwise.
    """

    def __init__(self, folder: Path, stem: str, captions_per_image: int = CAPTIONS_PER_IMAGE) -> None:
        self.name = str(folder / f"{stem}{_IMAGES}")
        self.split = canonical_split(stem)
        self.folder, self.stem = folder, stem
        features = self._features
        if features.ndim != 3:
            raise ValueError(f"{self.name} has the shape {features.shape}, expected (images, regions, features)")
        self.captions = self._lines(_CAPTIONS)
        self.per_image, self.step = self._spacing(captions_per_image)
        self.ids = self._read_ids()
        self.layout = Layout(captions=("captions",), regions=("region_features",), image_id="id" if self.ids else None)
        self._check_boxes()

    def __len__(self) -> int:
        return len(self._features) // self.step

    def rows(self) -> Iterator[SourceRow]:
        for row in range(len(self)):
            values: dict[str, Any] = {"captions": self.captions[row * self.per_image : (row + 1) * self.per_image]}
            if self.ids:
                values["id"] = self.ids[row]
            yield SourceRow(values, self.split, f"{self.split}/{row:06d}")

    def content(self, row: int) -> Content:
        if row in self._unusable:
            return {"image": ImageError(BAD_REGIONS, self._unusable[row])}
        content: Content = {"region_features": np.array(self._features[row * self.step])}
        if self._boxes is not None:
            content["region_boxes"] = self._relative_boxes(row)
        return content

    @cached_property
    def _features(self) -> np.ndarray:
        return _mapped(self.folder / f"{self.stem}{_IMAGES}")

    @cached_property
    def _boxes(self) -> np.ndarray | None:
        path = self._first(_BOXES)
        return None if path is None else _mapped(path)

    @cached_property
    def _sizes(self) -> np.ndarray | None:
        path = self._first(_SIZES)
        return None if path is None else np.asarray(_mapped(path), dtype=np.float32)

    def _first(self, endings: tuple[str, ...]) -> Path | None:
        """The first of several files that is there."""
        paths = [self.folder / f"{self.stem}{ending}" for ending in endings]
        return next((path for path in paths if path.exists()), None)

    def __getstate__(self) -> dict[str, Any]:
        # sent to a worker, a memory map would travel with all that it maps
        return {name: value for name, value in self.__dict__.items() if name not in ("_features", "_boxes", "_sizes")}

    def _lines(self, ending: str) -> list[str]:
        """Lines, cut at newlines only, empty ones kept: a line's number is what ties it to its image."""
        path = self.folder / f"{self.stem}{ending}"
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
        return text.removesuffix("\n").split("\n")

    def _spacing(self, expected: int) -> tuple[int, int]:
        """How many captions belong to an image, and how many rows of features lie from an image to the next."""
        images, captions = len(self._features), len(self.captions)
        if captions == images * expected:
            return expected, 1
        if captions == images:
            return (expected, expected) if self._is_repeated(expected) else (1, 1)
        raise ValueError(
            f"{self.name} holds {images} images and {self.stem}{_CAPTIONS} {captions} lines: expected {expected} "
            "lines an image, or one a row. Check that both are of the same split, or pass captions_per_image="
        )

    def _is_repeated(self, times: int) -> bool:
        """Whether each image's row is there `times` times, judged by its first region's features."""
        count = len(self._features)
        if times == 1 or count % times:
            return False
        first = self._features[:, 0]
        return all((first[start : start + times] == first[start]).all() for start in range(0, count, times))

    def _read_ids(self) -> list[int | str]:
        if not (self.folder / f"{self.stem}_ids.txt").exists():
            return []
        lines = [line.strip() for line in self._lines("_ids.txt")]
        if len(lines) not in (len(self), len(self.captions)):
            raise ValueError(
                f"{self.stem}_ids.txt has {len(lines)} lines, expected one an image ({len(self)}) or one a caption "
                f"({len(self.captions)}); correct or remove it"
            )
        ids = lines[:: len(lines) // len(self)]
        if len(set(ids)) < len(ids):
            raise ValueError(f"{self.stem}_ids.txt names some of its {len(ids)} images twice; correct or remove it")
        return [int(line) if line.isdecimal() else line for line in ids]

    def _check_boxes(self) -> None:
        """Note the images of which a box is none, or lies outside; refuse a file of another form, as which most do."""
        self._unusable: dict[int, str] = {}  # image -> why
        if self._boxes is None:
            return
        name, boxes = self._name_of(_BOXES), self._boxes
        expected = (*self._features.shape[:2], 4)
        if boxes.shape != expected or boxes.dtype.kind not in "uif":
            raise ValueError(f"{name} has the shape {boxes.shape} of {boxes.dtype}, expected {expected} of numbers")
        boxes = boxes[:: self.step]
        self._leave_out(~np.isfinite(boxes), "expected finite numbers")
        inverted = boxes[..., 2:] < boxes[..., :2]
        self._leave_out(inverted, "x2 < x1 or y2 < y1; expected corners x1, y1, x2, y2, not x, y, width, height")
        largest = boxes.max(axis=(1, 2))
        finite = largest[np.isfinite(largest)]
        self.in_pixels = bool(len(finite) and np.median(finite) > 1)  # whatever a few wrong boxes say
        slack = _BOX_SLACK if self.in_pixels else _ROUNDING
        self._leave_out(boxes < -slack, "outside the image, which begins at 0")
        if not self.in_pixels:
            self._leave_out(boxes > 1 + slack, "outside the image, which ends at 1")
            return
        if self._sizes is None:
            raise ValueError(
                f"{name} holds pixels (up to {largest.max():g}) and there is no {self._name_of(_SIZES)}: save one, "
                "(images, 2) with height and width in pixels, or divide the boxes by them"
            )
        sizes = self._image_sizes()
        self._leave_out(~((sizes > 0) & np.isfinite(sizes))[:, None], "expected a size above 0", sizes)
        swapped = (boxes <= sizes[:, None, [0, 1, 0, 1]] + slack).all()
        why = "outside the image" + (" (they fit once height and width are swapped)" if swapped else "")
        self._leave_out(boxes > sizes[:, None, [1, 0, 1, 0]] + slack, why, sizes)

    def _name_of(self, endings: tuple[str, ...]) -> str:
        """The file that is read, or the one to save."""
        found = self._first(endings)
        return f"{self.stem}{endings[0]}" if found is None else found.name

    def _leave_out(self, wrong: np.ndarray, why: str, sizes: np.ndarray | None = None) -> None:
        """Note the images of which a number, of (images, regions, numbers), is wrong.

        Raises:
            ValueError: they are more than one and, with those of other faults, a tenth: the file is of another form.
        """
        images = np.flatnonzero(wrong.any(axis=(1, 2))).tolist()
        for image in images:
            region = int(wrong[image].any(axis=1).argmax())
            place = f"row {image * self.step}, region {region}: {self._boxes[image * self.step, region].tolist()}"  # type: ignore[index]
            size = "" if sizes is None else f"; (height, width) in pixels is {sizes[image].tolist()}"
            found = f"{self._name_of(_BOXES)}, {place}: {why}{size}"
            self._unusable.setdefault(image, found)
            if max(len(images), len(self._unusable)) > max(1, len(self) // 10):
                wrong_ones = len({*images, *self._unusable})
                raise ValueError(f"{found} (wrong boxes in {wrong_ones} of {len(self)} images)")

    def _image_sizes(self) -> np.ndarray:
        """(images, 2) height and width; the file has them once an image or once a row of features."""
        sizes, images, rows = self._sizes, len(self), len(self._features)
        if sizes is None or sizes.ndim != 2 or sizes.shape[1] != 2 or len(sizes) not in (images, rows):
            found = None if sizes is None else sizes.shape
            name = self._name_of(_SIZES)
            raise ValueError(f"{name} has the shape {found}, expected ({images}, 2) as height, width")
        return sizes[:: len(sizes) // images]

    def _relative_boxes(self, image: int) -> np.ndarray:
        boxes = np.array(self._boxes[image * self.step], dtype=np.float32)  # type: ignore[index]
        if self.in_pixels:
            height, width = self._image_sizes()[image]
            boxes /= np.array([width, height, width, height], np.float32)
        return boxes.clip(0, 1)


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        again = ""
        if path.name.endswith("_ims_size.npy"):  # published as an array of dicts, which only pickle reads
            target = path.name.replace("_ims_size.npy", _SIZES[0])
            again = (
                f": if you trust it, python -c \"import numpy as np; np.save('{target}', [[size['image_h'], "
                f"size['image_w']] for size in np.load('{path.name}', allow_pickle=True)])\""
            )
        raise ValueError(
            f"{path} cannot be mapped ({error}); expected a plain .npy array. One of Python objects, which is code to "
            f"run and is not loaded, must first be saved again as numbers{again}"
        ) from error


def scan_stems(folder: Path) -> list[str]:
    """Splits of which a folder holds both images and captions."""
    stems = sorted(path.name.removesuffix(_IMAGES) for path in folder.glob(f"*{_IMAGES}"))
    return [stem for stem in stems if (folder / f"{stem}{_CAPTIONS}").exists()]


def open_scan(
    folder: Path, name: str, split: str | None, captions_per_image: int = CAPTIONS_PER_IMAGE
) -> tuple[PairSource, SplitChoice]:
    """A folder of SCAN's files.

    Args:
        captions_per_image: how many lines of `{split}_caps.txt` belong to an image.
    """
    choice = choose_splits(scan_stems(folder), split, name)
    return joined(name, [ScanSource(folder, str(stem), captions_per_image) for stem in choice.parts]), choice

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

from .schema import Layout, SourceRow
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
        place = row * self.step
        content: Content = {"region_features": np.array(self._features[place])}
        if self._boxes is not None:
            content["region_boxes"] = self._relative_boxes(place)
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
        """Refuse boxes that do not belong to the features or are none, and pixels that no size brings into [0, 1]."""
        if self._boxes is None:
            return
        name, boxes = self._name_of(_BOXES), self._boxes
        expected = (*self._features.shape[:2], 4)
        if boxes.shape != expected or boxes.dtype.kind not in "uif":
            raise ValueError(f"{name} has the shape {boxes.shape} of {boxes.dtype}, expected {expected} of numbers")
        self._refuse_boxes(~np.isfinite(boxes), "expected finite numbers")
        self._refuse_boxes(
            boxes[..., 2:] < boxes[..., :2],
            "x2 < x1 or y2 < y1; expected corners x1, y1, x2, y2, not x, y, width, height",
        )
        self.in_pixels = bool(boxes.max() > 1)
        slack = _BOX_SLACK if self.in_pixels else _ROUNDING
        self._refuse_boxes(boxes < -slack, "outside the image, which begins at 0")
        if not self.in_pixels:
            return
        largest = np.stack([boxes[..., 1::2].max(axis=(1, 2)), boxes[..., 0::2].max(axis=(1, 2))], axis=1)
        if self._sizes is None:
            raise ValueError(
                f"{name} holds pixels (up to {largest.max():g}) and there is no {self._name_of(_SIZES)}: save one, "
                "(images, 2) with height and width in pixels, or divide the boxes by them"
            )
        sizes = self._all_sizes(len(largest))
        if (largest > sizes + _BOX_SLACK).any():
            swapped = " (they fit once height and width are swapped)" if _fits(largest, sizes[:, ::-1]) else ""
            row = int((largest > sizes + _BOX_SLACK).any(axis=1).argmax())
            raise ValueError(
                f"{name}, row {row}: boxes reach (y, x) = {largest[row].tolist()} outside an image of "
                f"(height, width) {sizes[row].tolist()}{swapped}; the sizes must be (height, width) in pixels"
            )

    def _name_of(self, endings: tuple[str, ...]) -> str:
        """The file that is read, or the one to save."""
        found = self._first(endings)
        return f"{self.stem}{endings[0]}" if found is None else found.name

    def _refuse_boxes(self, wrong: np.ndarray, why: str) -> None:
        """Name the first box of which a number, of (rows, regions, numbers), is wrong."""
        if wrong.any() and self._boxes is not None:
            places = np.argwhere(wrong.any(axis=2))
            row, region = places[0]
            box = self._boxes[row, region].tolist()
            raise ValueError(
                f"{self._name_of(_BOXES)}, row {row}, region {region}: {box}: {why} ({len(places)} such boxes)"
            )

    def _all_sizes(self, rows: int) -> np.ndarray:
        """Sizes of each row of features, which are there once an image or once a row."""
        sizes = self._sizes
        if sizes is None or sizes.ndim != 2 or sizes.shape[1] != 2 or len(sizes) not in (rows, rows // self.step):
            found = None if sizes is None else sizes.shape
            name = self._name_of(_SIZES)
            raise ValueError(f"{name} has the shape {found}, expected ({rows}, 2) as height, width")
        if not (sizes > 0).all() or not np.isfinite(sizes).all():  # NaN is above nothing
            wrong = sizes[~((sizes > 0) & np.isfinite(sizes)).all(axis=1)][0].tolist()
            raise ValueError(f"{self._name_of(_SIZES)} holds the sizes {wrong}, expected pixels above 0")
        return sizes.repeat(rows // len(sizes), axis=0)

    def _relative_boxes(self, place: int) -> np.ndarray:
        boxes = np.array(self._boxes[place], dtype=np.float32)  # type: ignore[index]
        if self._sizes is None or not self.in_pixels:
            return boxes.clip(0, 1)
        row = place if len(self._sizes) == len(self._features) else place // self.step
        height, width = self._sizes[row]
        return (boxes / np.array([width, height, width, height], np.float32)).clip(0, 1)


def _fits(largest: np.ndarray, sizes: np.ndarray) -> bool:
    return bool((largest <= sizes + _BOX_SLACK).all())


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

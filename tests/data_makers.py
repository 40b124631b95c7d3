"""Small data sets in the exact layouts of public ones, for the tests of `load_pairs`."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image

SIZE = (13, 9)  # width, height: odd and unequal, so that a transpose shows


def colour(number: int) -> tuple[int, int, int]:
    """The colour of image `number`, far enough from the others' to survive JPEG."""
    return (20 * (number % 12), 250 - 20 * (number % 12), 17 * (number % 15))


def encoded(number: int, image_format: str = "PNG", **save: Any) -> bytes:
    """An image of one colour."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", SIZE, colour(number)).save(buffer, image_format, **save)
    return buffer.getvalue()


def noise(image_format: str, size: tuple[int, int] = (64, 48)) -> bytes:
    """An image whose data are long enough to be cut short."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    PIL.Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def shows(image: Any, number: int) -> bool:
    """Whether a record's image is image `number`."""
    mean = np.asarray(image, dtype=float).mean(axis=(0, 1))
    return image.mode == "RGB" and image.size == SIZE and bool(np.abs(mean - colour(number)).max() < 6)


def captions(number: int, count: int = 5) -> list[str]:
    """Captions of image `number`, all different."""
    return [f"caption {k} of image {number} ." for k in range(count)]


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]], image: str | None = "image") -> None:
    """A parquet file as the Hub has them: images as structs of bytes and path, typed by `datasets`' metadata."""
    table = dict(columns)
    if image is not None:
        table[image] = [{"bytes": content, "path": None} for content in columns[image]]
    dataset = datasets.Dataset.from_dict(table)
    if image is not None:
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
        dataset = dataset.cast(datasets.Features({**dataset.features, image: datasets.Image()}))
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(path)


def write_tar(path: Path, members: Mapping[str, bytes | str | dict[str, Any]], mode: Any = "w") -> None:
    """A tar file of the given members, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            text = json.dumps(content) if isinstance(content, dict) else content
            raw = text.encode() if isinstance(text, str) else text
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


def write_images(folder: Path, names: Sequence[str]) -> None:
    """Image files; the n-th is image n."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(number))


def write_row_groups(path: Path, numbers: Sequence[int], group: int) -> None:
    """A parquet file of images and captions, so many rows in a group; caption count differs from image to image."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "image": [{"bytes": encoded(number), "path": None} for number in numbers],
        "caption": [captions(number, 1 + number % 3) for number in numbers],
        "img_id": list(numbers),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=group)

"""Scores of a table's image–caption pairs, row by row, in memory that does not grow with the table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..data.delimited import read_delimited
from ..data.images import ImageError, decode_image
from ..data.named_files import NamedFiles
from ..data.text_files import text_of
from ..data.worded import unusable_captions

__all__ = ["ScoredPair", "read_pairs", "score_pairs"]


@dataclass(frozen=True)
class ScoredPair:
    """One row of the table.

    Attributes:
        row: its columns as they were.
        score: as `TVRNModel.readable_scores`; None where the row cannot be scored.
        problem: why not.
    """

    row: dict[str, str]
    score: float | None
    problem: str = ""


def read_pairs(path: Path, image_column: str, caption_column: str) -> Iterator[dict[str, str]]:
    """The rows of a CSV or TSV file with a header, read as `load_pairs` reads them.

    Raises:
        ValueError: a column is missing (those seen are named), there is no row, or as `read_delimited` and `text_of`.
    """
    wanted = (image_column, caption_column)
    row = None
    for row in read_delimited(path, text_of(path), wanted):
        missing = [name for name in wanted if name not in row]
        if missing:
            raise ValueError(
                f"{path} has the columns {list(row)}, and none called {' or '.join(map(repr, missing))}; give a "
                "header line image,caption, or name the columns with --image-column and --caption-column"
            )
        yield {name: value or "" for name, value in row.items()}
    if row is None:
        raise ValueError(f"{path} holds no rows; expected a header line image,caption and a pair a row")


def score_pairs(
    model: Any,
    processor: Any,
    rows: Iterable[dict[str, str]],
    folder: Path,
    image_column: str = "image",
    caption_column: str = "caption",
    batch_size: int = 64,
    images: Path | None = None,
) -> Iterator[ScoredPair]:
    """Score the rows in their order, a batch at a time; an image or caption that a batch repeats is encoded once.

    Args:
        model: a `TVRNModel` with a vision tower, in evaluation mode.
        processor: its processor.
        rows: of the table.
        folder: of the table: relative paths of images begin there, and none leaves it.
        image_column, caption_column: their names.
        batch_size: rows at a time.
        images: a folder in place of the table's, below which absolute paths are followed too.

    Yields:
        Every row: with its score, or with the reason why it has none: an image that cannot be read, a caption without
        a word.

    Raises:
        ValueError: the model reads region features and not pictures.
    """
    if processor.image_processor is None:
        raise ValueError("this model reads region features of a detector and no pictures; score needs one that does")
    files = NamedFiles(folder) if images is None else NamedFiles(images, is_given=True)
    remaining = iter(rows)
    while batch := list(islice(remaining, batch_size)):
        pairs = [(row[image_column], row[caption_column].strip()) for row in batch]
        captions = [caption for _, caption in pairs]
        found = unusable_captions([processor], captions)
        unusable = {captions[place]: f"the caption {why}" for place, why in found.items()} | {"": "empty caption"}
        usable = [pair for pair in pairs if pair[1] not in unusable]
        pictures, problems = _pictures(files, usable)
        scores = _scores(model, processor, pictures, usable)
        for row, pair in zip(batch, pairs, strict=True):
            problem = problems.get(pair[0]) or unusable.get(pair[1], "")
            yield ScoredPair(row, scores.get(pair), problem)


def _pictures(files: NamedFiles, pairs: list[tuple[str, str]]) -> tuple[dict[str, Any], dict[str, str]]:
    """The images that can be read, and why the others cannot."""
    pictures, problems = {}, {}
    for name in dict.fromkeys(name for name, _ in pairs):
        found = files.find(name)
        try:
            if isinstance(found, ImageError):
                raise found
            pictures[name] = decode_image(found)
        except ImageError as error:
            problems[name] = str(error)
    return pictures, problems


@torch.inference_mode()
def _scores(
    model: Any, processor: Any, pictures: dict[str, Any], pairs: list[tuple[str, str]]
) -> dict[tuple[str, str], float]:
    wanted: dict[str, list[str]] = {name: [] for name in pictures}
    for name, caption in dict.fromkeys(pairs):
        if name in wanted:
            wanted[name].append(caption)
    if not wanted:
        return {}
    captions = list(dict.fromkeys(caption for own in wanted.values() for caption in own))
    images = model.encode_images(**processor(images=list(pictures.values())).to(model.device))
    texts = model.encode_texts(**processor(text=captions).to(model.device))
    found: dict[tuple[str, str], float] = {}
    for i, (name, own) in enumerate(wanted.items()):
        logits = model.match(images.select([i]), texts.select([captions.index(caption) for caption in own]))[0]
        scores = model.readable_scores(logits).tolist()
        found |= {(name, caption): score for caption, score in zip(own, scores, strict=True)}
    return found

"""The protocol `graded`: pair scores against human grades of image–caption pairs, as in Flickr8k-Expert."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..data import unusable_captions
from ..metrics.graded import GradedMetrics, graded_metrics
from ..scoring import EmbeddingScore
from ..scoring.gathered import ChosenPairs, score_pairs
from ..scoring.models import evaluating
from ..scoring.processes import Processes
from .captions import CaptionTable
from .encoding import encode_captions, encode_images

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GradedPairs:
    """Image–caption pairs with human grades.

    Attributes:
        images: (n) image file names or ids.
        captions: (n) caption ids: `<image>#<number>`.
        grades: (n) grades of each pair, higher is better.
    """

    images: list[str]
    captions: list[str]
    grades: list[list[float]]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> GradedPairs:
        """From a file in the form of Flickr8k's `ExpertAnnotations.txt`: image, caption id and grades between tabs.

        Raises:
            ValueError: Naming the first line that has another form.
        """
        images: list[str] = []
        captions: list[str] = []
        grades: list[list[float]] = []
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            fields = line.split("\t")
            try:
                values = [float(each) for each in fields[2:]]
            except ValueError:
                values = []
            if len(fields) < 3 or "#" not in fields[1] or not values or not np.isfinite(values).all():
                raise ValueError(
                    f"Line {number} of {path} is {line!r}; expected an image, <image>#<number of a caption> and one or"
                    " more grades, separated by tabs."
                )
            images.append(fields[0].strip())
            captions.append(fields[1].strip())
            grades.append(values)
        if not images:
            raise ValueError(f"{path} holds no graded pair; expected lines as in Flickr8k's ExpertAnnotations.txt.")
        return cls(images, captions, grades)


@dataclass(frozen=True)
class GradedReport:
    """What `evaluate_graded` found; correlations are ×100.

    Attributes:
        metrics: Of the pair score.
        embedding_metrics: Of the cosine of the embeddings.
        own_captions_left_out: Graded pairs of an image with a caption that was written for it: every model knows them.
        image_count: Images among the pairs.
        caption_count: Captions among the pairs.
        model: Its name.
    """

    metrics: GradedMetrics
    embedding_metrics: GradedMetrics
    own_captions_left_out: int
    image_count: int
    caption_count: int
    model: str = field(default="")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        mine = {"metrics": self.metrics.as_dict(), "embedding_metrics": self.embedding_metrics.as_dict()}
        return {"protocol": "graded", **vars(self), **mine}

    def table(self) -> str:
        """Everything in words."""
        lines = [
            f"Protocol graded: {self.metrics.pair_count} pairs of {self.image_count} images and {self.caption_count}"
            f" captions, {self.metrics.judgement_count} judgements"
            f" ({self.own_captions_left_out} pairs of an image with its own caption left out)",
            "",
            "| ×100 | Spearman | Kendall τ_c | Spearman, mean grade | Kendall τ_c, mean grade |",
            "|---|---:|---:|---:|---:|",
        ]
        for name, found in (("pair score", self.metrics), ("embeddings alone", self.embedding_metrics)):
            values = found.spearman, found.kendall_tau_c, found.spearman_of_mean, found.kendall_tau_c_of_mean
            lines.append(f"| {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
        return "\n".join(lines)


def evaluate_graded(
    model: Any,
    processor: Any,
    dataset: Any,
    pairs: GradedPairs,
    batch_size: int = 64,
    keep_own_captions: bool = False,
    progress: bool = True,
) -> GradedReport:
    """Score the graded pairs alone and correlate with their grades.

    Args:
        model: A `TVRNModel`.
        processor: Its processor.
        dataset: Records of `load_pairs` that hold the images and the captions, found by file name or id.
        pairs: Of `GradedPairs.read`.
        batch_size: Images, and captions, encoded at a time.
        keep_own_captions: Also grade an image with captions written for it, which the field leaves out.
        progress: Show progress bars.

    Raises:
        ValueError: If an image or a caption of the pairs is not in the data set (counted, the first one named).
    """
    images, table, names = _encoded_images(model, processor, dataset, batch_size, progress)
    rows = _places("image", pairs.images, names)
    numbers, owners = _caption_places(table, names)
    columns = _places("caption", pairs.captions, numbers)
    own = owners[columns] == rows
    kept = np.ones(len(rows), dtype=bool) if keep_own_captions else ~own
    flat = table.flat_captions
    kept &= _readable(processor, flat, columns)
    captions, local = np.unique(columns[kept], return_inverse=True)
    texts = encode_captions(model, processor, [flat[number] for number in captions], batch_size, progress)
    order = np.argsort(rows[kept], kind="stable")
    chosen = ChosenPairs(rows[kept][order], local[order])
    grades = [grade for grade, keep in zip(pairs.grades, kept, strict=True) if keep]
    grades = [grades[place] for place in order]
    with evaluating(model), tqdm(disable=True) as bar:
        alone = (chosen, None, None, Processes(share=False), bar)
        scores = score_pairs(model, images, texts, *alone).numpy()
        cosines = score_pairs(EmbeddingScore(), images, texts, *alone).numpy()
    return GradedReport(
        metrics=graded_metrics(scores, grades),
        embedding_metrics=graded_metrics(cosines, grades),
        own_captions_left_out=0 if keep_own_captions else int(own.sum()),
        image_count=len(np.unique(chosen.rows)),
        caption_count=len(captions),
        model=str(getattr(model.config, "name_or_path", "")),
    )


def _readable(processor: Any, captions: Sequence[str], columns: np.ndarray) -> np.ndarray:
    """(pairs,) whether the model finds a word in each pair's caption."""
    graded = np.unique(columns)
    problems = unusable_captions([processor], [captions[column] for column in graded])
    kept = ~np.isin(columns, graded[list(problems)])
    if problems:
        logger.warning("left out %d graded pairs (such as: %s)", (~kept).sum(), next(iter(problems.values())))
    return kept


def _encoded_images(
    model: Any, processor: Any, dataset: Any, batch_size: int, progress: bool
) -> tuple[Any, CaptionTable, dict[str, int]]:
    """The images, their captions, and the row of each by its file name and by its id."""
    images, table = encode_images(model, processor, dataset, batch_size, progress=progress)
    names = {str(image_id): row for row, image_id in enumerate(table.image_ids)}
    filenames = getattr(dataset, "filenames", None)
    if filenames is None and isinstance(dataset, list):
        filenames = [record.get("filename", "") for record in dataset]
    names |= {Path(name).name: row for row, name in enumerate(filenames or []) if name}
    return images, table, names


def _caption_places(table: CaptionTable, names: dict[str, int]) -> tuple[dict[str, int], np.ndarray]:
    """The number of each caption by `<image>#<number>` for every name of its image, and the row of its image."""
    starts = np.concatenate([[0], np.cumsum([len(captions) for captions in table.captions])])
    places: dict[str, int] = {}
    for name, row in names.items():
        places |= {f"{name}#{number}": int(starts[row]) + number for number in range(len(table.captions[row]))}
    return places, table.caption_image_rows


def _places(what: str, wanted: list[str], known: dict[str, int]) -> np.ndarray:
    missing = [name for name in wanted if name not in known]
    if missing:
        some = next(iter(known), "none")
        raise ValueError(
            f"{len(set(missing))} graded {what}s are not in the data set, the first is {missing[0]!r} (it has names"
            f" such as {some!r}); give the records that were graded, with their file names."
        )
    return np.array([known[name] for name in wanted], dtype=np.int64)

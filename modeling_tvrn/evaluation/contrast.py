"""Protocol `contrast`: does the pair that fits score above the one that does not, by what differs between them?"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.contrast import ContrastRow, contrast_rows
from ..data.file_kinds import is_unicode
from ..data.images import ImageError
from ..data.skipped import BROKEN_CAPTION, WORDLESS_CAPTION, SkipReport
from ..data.training_pairs import image_inputs
from ..data.worded import unusable_captions
from ..metrics import Accuracy, accuracy_table
from ..scoring.models import evaluating
from ..storage.fingerprints import CALIBRATION, weights_digest
from .provenance import command, commit, versions
from .report import JsonReport

__all__ = ["ContrastReport", "evaluate_contrast"]

SCORES = ("pair score", "embeddings")
Record = dict[str, Any]
Outcome = dict[str, np.ndarray]  # by score: whether the right pair was above, for each wrong side of a row


@dataclass(frozen=True)
class ContrastReport(JsonReport):
    """What `evaluate(…, protocol="contrast")` found; accuracies in percent, chance is 50.

    Attributes:
        data: What the rows are called.
        kinds: By kind, and by score ("pair score", "embeddings"), how often the pair that fits scored above the one
            that does not; a tie counts as wrong. Of a row with two wrong sides both have to be below.
        groups: Of rows in groups, where all rows of a group have to be right: "text" (the other captions), "image"
            (the other images) and "group" (both), as Winoground's authors define them. Empty without groups.
        model: Name of the checkpoint.
        sha256: Hash of its weights, as in other reports.
        skipped: Reason → count of rows that were left out.
        commit, command, versions: Where the numbers come from.
    """

    data: str
    kinds: dict[str, dict[str, Accuracy]]
    groups: dict[str, dict[str, Accuracy]] = field(default_factory=dict)
    model: str = ""
    sha256: str = ""
    skipped: dict[str, int] = field(default_factory=dict)
    commit: str | None = None
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    protocol: str = "contrast"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("kinds", "groups"):
            found[name] = {
                kind: {score: share.as_dict() for score, share in shares.items()}
                for kind, shares in found[name].items()
            }
        return found

    def table(self) -> str:
        """Everything in words."""
        groups = {f"whole groups, {name}": measured for name, measured in self.groups.items()}
        accuracies = accuracy_table(self.kinds | groups, "what differs")
        lines = [f"Protocol contrast: data {self.data or 'unnamed'}; chance 50, ties are wrong", "", accuracies, ""]
        lines += [f"Left out of the data: {reason}: {count}" for reason, count in self.skipped.items()]
        lines.append(f"Model {self.model or 'unnamed'} {self.sha256}; commit {self.commit or 'unknown'}")
        return "\n".join([*lines, f"Command: {self.command}"])


def evaluate_contrast(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    batch_size: int = 64,
    data: str | None = None,
    progress: bool = True,
) -> ContrastReport:
    """Score each row's pair that fits against the one or two that do not, by the pair score and by the embeddings.

    Args:
        model: A `TVRNModel`; of a dual encoder both scores are its own.
        processor: Its processor.
        dataset: `ContrastRow`s or mappings of their fields; or map-style records, see `contrast_rows`.
        batch_size: Rows at a time; those of one image stay together, so that it is encoded once.
        data: What the report calls them.
        progress: Show a bar with the time left.

    Raises:
        ValueError: If a row cannot be used, there are none, or every one had to be left out.
    """
    rows = _as_rows(dataset)
    skipped, outcomes, kept = SkipReport(), [], []
    with (
        evaluating(model),
        tqdm(total=len(rows), desc="contrast", delay=2.0, leave=False, disable=not progress) as bar,
    ):
        for batch in _batches(rows, batch_size):
            usable, images = _usable(batch, processor, skipped)
            if usable:
                outcomes += _outcomes(model, processor, usable, images)
                kept += usable
            bar.update(len(batch))
    if not kept:
        raise ValueError(f"none of the {len(rows)} contrast rows could be used ({skipped})")
    skipped.warn("contrast")
    return ContrastReport(
        data=data if data is not None else str(getattr(dataset, "name", "")),
        kinds=_by_kind(kept, outcomes),
        groups=_by_group(kept, outcomes),
        model=str(getattr(model.config, "name_or_path", "")),
        sha256=weights_digest(model, (CALIBRATION,)),
        skipped=dict(skipped),
        commit=commit(),
        command=command(),
        versions=versions(),
    )


def _as_rows(dataset: Any) -> list[ContrastRow]:
    if hasattr(dataset, "captions"):
        return contrast_rows(dataset)
    rows = [row if isinstance(row, ContrastRow) else ContrastRow(**row) for row in dataset]
    if not rows:
        raise ValueError("there are no contrast rows; expected at least one")
    return rows


def _batches(rows: Sequence[ContrastRow], batch_size: int) -> Iterator[list[ContrastRow]]:
    """All rows of an image in one batch, of `batch_size` rows unless an image has more."""
    by_image: dict[Hashable, list[ContrastRow]] = {}
    for row in rows:
        by_image.setdefault(row.image_keys()[0], []).append(row)
    batch: list[ContrastRow] = []
    for own in by_image.values():
        if batch and len(batch) + len(own) > batch_size:
            yield batch
            batch = []
        batch += own
    yield batch


def _usable(
    rows: Sequence[ContrastRow], processor: Any, skipped: SkipReport
) -> tuple[list[ContrastRow], dict[Hashable, Record]]:
    """Rows but for those with an image or caption that cannot be used, and their images by key."""
    usable: list[ContrastRow] = []
    images: dict[Hashable, Record] = {}
    for row in rows:
        captions = [caption for caption in (row.caption, row.other_caption) if caption is not None]
        if not all(map(is_unicode, captions)):
            skipped.add(BROKEN_CAPTION, row.kind)
            continue
        if problems := unusable_captions([processor], captions):
            skipped.add(WORDLESS_CAPTION, next(iter(problems.values())))
            continue
        try:
            if not images.keys() >= set(row.image_keys()):
                images |= dict(zip(row.image_keys(), map(dict, row.images()), strict=True))
        except ImageError as error:
            skipped.add(error.reason, error.detail)
            continue
        usable.append(row)
    return usable, images


def _outcomes(
    model: Any, processor: Any, rows: Sequence[ContrastRow], images: dict[Hashable, Record]
) -> list[Outcome]:
    """Each row's outcomes: against the other image, then against the other caption, as far as it has them."""
    place = {key: number for number, key in enumerate(images)}
    captions: list[str | None] = []
    pairs = []
    for row in rows:
        (image, *others), caption = [place[key] for key in row.image_keys()], len(captions)
        captions += [row.caption] + [row.other_caption] * (row.other_caption is not None)
        wrong = [(other, caption) for other in others]
        wrong += [(image, caption + 1)] * (row.other_caption is not None)
        pairs.append([(image, caption), *wrong])
    inputs = processor(**image_inputs(list(images.values())), return_tensors="pt").to(model.device)
    encoded = model.encode_images(**inputs)
    texts = model.encode_texts(**processor(text=captions, return_tensors="pt").to(model.device))
    flat = torch.tensor([pair for own in pairs for pair in own])
    aligned, texts = encoded.select(flat[:, 0]), texts.select(flat[:, 1])
    scores = {
        "pair score": model.match_aligned(aligned, texts),
        "embeddings": model.pair.cosines(aligned.embeds, texts.embeds.unsqueeze(1)),
    }
    values = {name: score.squeeze(1).double().cpu().numpy() for name, score in scores.items()}
    starts = np.cumsum([0, *map(len, pairs)])
    return [
        {name: value[start] > value[start + 1 : end] for name, value in values.items()}
        for start, end in pairwise(starts)
    ]


def _by_kind(rows: Sequence[ContrastRow], outcomes: Sequence[Outcome]) -> dict[str, dict[str, Accuracy]]:
    found = {}
    for kind in dict.fromkeys(row.kind for row in rows):
        own = [outcome for row, outcome in zip(rows, outcomes, strict=True) if row.kind == kind]
        found[kind] = {name: _accuracy(outcome[name].all() for outcome in own) for name in SCORES}
    return found


def _by_group(rows: Sequence[ContrastRow], outcomes: Sequence[Outcome]) -> dict[str, dict[str, Accuracy]]:
    """Over groups of rows that have both sides: the image's outcome comes first."""
    groups: dict[str, list[Outcome]] = {}
    for row, outcome in zip(rows, outcomes, strict=True):
        if row.group is not None and row.other_image is not None and row.other_caption is not None:
            groups.setdefault(row.group, []).append(outcome)
    sides = {"text": [1], "image": [0], "group": [0, 1]}
    return {
        side: {
            name: _accuracy(all(row[name][which].all() for row in own) for own in groups.values()) for name in SCORES
        }
        for side, which in sides.items()
        if groups
    }


def _accuracy(right: Iterable[Any]) -> Accuracy:
    found = [bool(each) for each in right]
    return Accuracy(sum(found), len(found))

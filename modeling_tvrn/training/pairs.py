"""The records of a run: the splits that the data have, or a validation part set aside; never one image in both."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data import PairDataset, PairStream, SkipReport, load_pairs
from ..data.hub_tables import name_of
from ..data.same_images import equal_content, shared_images
from ..data.splits import EVERY_SPLIT, NoSuchSplit, canonical_split

if TYPE_CHECKING:
    from .config import TrainingConfig

logger = logging.getLogger(__name__)

__all__ = ["TrainingPairs", "data_hash", "load_training_pairs", "named_data"]

SHARE = 0.1  # of the images, set aside where the data have no validation split
LEAST = 2  # images on either side: one alone has no negatives


@dataclass(frozen=True)
class TrainingPairs:
    """What a run trains on and what chooses its checkpoint.

    Attributes:
        train, validation: records; the training ones may be a stream.
        about: what results.json says of both: `set_aside` (`share`, `seed`, `of` so many images) where the data have
            no validation split, `overlap` (`images`, an `example`) where both hold the same and that is allowed.
    """

    train: Any
    validation: Any
    about: dict[str, Any] = field(default_factory=dict)


def named_data(config: TrainingConfig, data: Any) -> TrainingConfig:
    """The configuration with what stands for data that were given as an object, in `data`."""
    if data is None:
        return config
    name = data.name if isinstance(data, PairDataset | PairStream) else name_of(data)
    return config.model_copy(update={"data": name})


def load_training_pairs(config: TrainingConfig, data: Any = None) -> TrainingPairs:
    """Read both splits, or one and set a part of its images aside.

    Args:
        config: names the data and the splits.
        data: in place of `config.data`: records of `load_pairs`, a `datasets.Dataset`, or several by split.

    Raises:
        ValueError: a split is missing that was asked for, there are too few images to set some aside, or training and
            validation hold the same images and `allow_overlap` is not set.
    """
    if config.streaming:
        return _streamed(config, data)
    train = _read_train(config, data)
    about: dict[str, Any] = {}
    try:
        validation = _read(config, data, config.validation_split)
    except NoSuchSplit as error:
        if canonical_split(config.validation_split) != _default(config, "validation_split"):  # one that is meant
            raise ValueError(
                f"validation_split = {config.validation_split!r}, but {config.data} has {_listed(error.available)}; "
                f"name one that is not trained on, or leave validation_split out: {100 * SHARE:.0f} % of the training "
                "images are then set aside"
            ) from error
        about["set_aside"] = {"share": SHARE, "seed": config.seed, "of": len(train)}
        train, validation = _set_aside(train, config.seed)
    if config.max_train_images is not None:
        train = train.select(range(min(config.max_train_images, len(train))))
    if "set_aside" not in about and (overlap := _overlap(config, train, validation)):
        about["overlap"] = overlap
    for name, records in ((config.train_split, train), (config.validation_split, validation)):
        logger.info("%s, split %s: %d images, %d captions", config.data, name, len(records), caption_count(records))
    return TrainingPairs(train, validation, about)


def caption_count(records: Any) -> int:
    """Captions of all records, without decoding an image."""
    return sum(len(captions) for captions in records.captions)


def data_hash(records: Any) -> str:
    """Of the ids and captions of records, which decide what a row number means; of a stream its shards' names."""
    seen = hashlib.sha256()
    if isinstance(records, PairStream):
        seen.update(json.dumps([shard.name for shard in records.shards()]).encode())
        return seen.hexdigest()
    for image_id, captions in zip(records.image_ids, records.captions, strict=True):
        seen.update(json.dumps([image_id, list(captions)]).encode())
    return seen.hexdigest()


def _streamed(config: TrainingConfig, data: Any) -> TrainingPairs:
    """A stream to train on; whether it holds the validation images nobody knows before it was read."""
    try:
        validation = _read(config, data, config.validation_split)
    except NoSuchSplit as error:
        raise ValueError(
            f"streaming = True needs a validation split, and {config.data} has no {config.validation_split!r} (it has "
            f"{_listed(error.available)}): of a stream nothing can be set aside. Set streaming=false, or give data "
            "with both splits"
        ) from error
    logger.info("%s, split %s: read as a stream", config.data, config.train_split)
    return TrainingPairs(_read(config, data, config.train_split, streaming=True), validation)


def _read_train(config: TrainingConfig, data: Any) -> Any:
    """The training split; everything, of data that name no splits."""
    try:
        return _read(config, data, config.train_split)
    except NoSuchSplit as error:
        if error.available == [EVERY_SPLIT] and config.train_split == _default(config, "train_split"):
            return _read(config, data, None)
        advice = "leave it out" if error.available == [EVERY_SPLIT] else "name the one to train on"
        raise ValueError(
            f"train_split = {config.train_split!r}, but {config.data} has {_listed(error.available)}; {advice}"
        ) from error


def _read(config: TrainingConfig, data: Any, split: str | None, streaming: bool = False) -> Any:
    if isinstance(data, PairDataset):
        return _of_split(data, split)
    source: Any = config.data if data is None else data
    if streaming:
        return load_pairs(source, split=split, streaming=True, **config.data_options)
    return load_pairs(source, split=split, **config.data_options)


def _of_split(records: PairDataset, split: str | None) -> PairDataset:
    """The records of one split, or of several joined by `+`.

    Raises:
        NoSuchSplit: there are none.
    """
    if split in (None, EVERY_SPLIT):
        return records
    wanted = {canonical_split(part) for part in str(split).split("+")}
    rows = [row for row, name in enumerate(records.splits) if name in wanted]
    if not rows:
        raise NoSuchSplit(f"{records.name} has no record of the split {split!r}", records.splits)
    return records.select(rows)


def _default(config: TrainingConfig, name: str) -> Any:
    return type(config).model_fields[name].default


def _set_aside(records: PairDataset, seed: int) -> tuple[PairDataset, PairDataset]:
    """Records to train on and a share of the images to validate on, drawn by the seed; copies of a file stay together.

    Raises:
        ValueError: there are too few images.
    """
    # Rows that must not be parted: those of the same image, each other one alone.
    units = [[row for _, row in group] for group in equal_content((records, row) for row in range(len(records)))]
    bound = {row for rows in units for row in rows}
    units += [[row] for row in range(len(records)) if row not in bound]
    count = max(LEAST, round(SHARE * len(records)))
    chosen: set[int] = set()
    for number in np.random.default_rng([seed, len(units)]).permutation(len(units)):
        if len(chosen) >= count:
            break
        chosen.update(units[number])
    parts = [[row for row in range(len(records)) if (row in chosen) is aside] for aside in (False, True)]
    if min(map(len, parts)) < LEAST:
        raise ValueError(
            f"{records.name} has {len(records)} images, {len(units)} of them different, and no validation split: "
            f"expected at least {2 * LEAST} different ones, to set {LEAST} aside and train on the others"
        )
    train, validation = (records.select(rows) for rows in parts)
    validation.skipped = SkipReport()  # what was left out counts once
    logger.info(
        "%s has no validation split: %d of %d images set aside (drawn by seed %d), %d to train on",
        records.name, len(validation), len(records), seed, len(train),
    )  # fmt: skip
    return train, validation


def _overlap(config: TrainingConfig, train: Any, validation: Any) -> dict[str, Any] | None:
    """How many validation images are trained on, and one of them.

    Raises:
        ValueError: there are some, and `allow_overlap` is not set.
    """
    shared = shared_images(train, validation)
    if not shared:
        return None
    example = {"train": train.filenames[shared[0][0]], "validation": validation.filenames[shared[0][1]]}
    found = f"{len(shared)} of {len(validation)} validation images are training images too, such as {_shown(example)}"
    if not config.allow_overlap:
        raise ValueError(
            f"{found}: recalls on them say nothing of images that were not seen. Give splits that share none (without "
            f"a validation split {100 * SHARE:.0f} % of the images are set aside), or set allow_overlap=true, which "
            "results.json and the card then say"
        )
    logger.warning("%s: %s (allow_overlap=true)", config.data, found)
    return {"images": len(shared), "example": example}


def _shown(example: Mapping[str, str]) -> str:
    names = example["validation"], example["train"]
    return repr(names[0]) if names[0] == names[1] else f"{names[0]!r}, the same image as {names[1]!r}"


def _listed(splits: Sequence[str]) -> str:
    return "no splits" if list(splits) == [EVERY_SPLIT] else f"the splits {', '.join(map(repr, splits))}"

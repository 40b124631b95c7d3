"""The protocol `unimodal`: captions against captions, images against images, and sentence pairs with human grades."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import unusable_captions, with_words
from ..metrics import RECALL_AT, UnimodalMetrics, spearman, unimodal_metrics
from ..scoring.models import evaluating
from .captions import CaptionTable
from .encoding import encode_captions, encode_images

logger = logging.getLogger(__name__)

ItemId = int | str
STS_COLUMNS = ("sentence1", "sentence2", "score")


@dataclass(frozen=True)
class SentencePairs:
    """Pairs of sentences with human grades of how much they mean the same.

    Attributes:
        first, second: The sentences.
        scores: The grades; only their order counts.
        name: What a report calls them.
    """

    first: list[str]
    second: list[str]
    scores: np.ndarray
    name: str = ""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> SentencePairs:
        """From a parquet or CSV file with the columns sentence1, sentence2 and score (the STS benchmark's).

        Raises:
            ValueError: If a column is missing or there are fewer than two pairs.
        """
        file = Path(path)
        if file.suffix == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(file)
            columns = {name: table[name].to_pylist() for name in table.column_names}
        else:
            with file.open(newline="", encoding="utf-8") as lines:
                rows = list(csv.DictReader(lines))
            columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}
        if missing := [name for name in STS_COLUMNS if name not in columns]:
            raise ValueError(f"{file} has the columns {sorted(columns)}; expected {STS_COLUMNS}, missing {missing}.")
        first, second, scores = (columns[name] for name in STS_COLUMNS)
        if len(scores) < 2:
            raise ValueError(f"{file} holds {len(scores)} pairs; a rank correlation needs at least two.")
        return cls(first, second, np.array([float(score) for score in scores]), file.stem)


@dataclass(frozen=True)
class UnimodalReport:
    """What a model's embeddings say within one modality; by the kind of embedding.

    Attributes:
        text_to_text: Kind → recall of captions of the same image; every caption is a query.
        image_to_image: Kind → recall of images of the same label.
        sts: Kind → Spearman's correlation ×100 of cosines with human grades.
        sts_known_words: The same over the pairs all of whose words the tokenizer knows; empty where it knows all.
        unknown_words: The share of the sentences' words that it does not know.
        texts, images, pairs, known_pairs: How many were compared.
        model: Its name.
    """

    text_to_text: dict[str, UnimodalMetrics] = field(default_factory=dict)
    image_to_image: dict[str, UnimodalMetrics] = field(default_factory=dict)
    sts: dict[str, float] = field(default_factory=dict)
    sts_known_words: dict[str, float] = field(default_factory=dict)
    unknown_words: float = 0.0
    texts: int = 0
    images: int = 0
    pairs: int = 0
    known_pairs: int = 0
    model: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        recalls = {name: getattr(self, name) for name in ("text_to_text", "image_to_image")}
        found: dict[str, Any] = {
            name: {kind: metrics.as_dict() for kind, metrics in kinds.items()} for name, kinds in recalls.items()
        }
        return found | {each.name: getattr(self, each.name) for each in fields(self) if each.name not in found}

    def table(self) -> str:
        """A Markdown table: a row for each measure and kind of embedding, recalls in percent."""
        lines = [f"| {self.model or 'model'} | R@1 | R@5 | R@10 | Spearman ×100 |", "|---|--:|--:|--:|--:|"]
        measured = (("text→text", self.texts, self.text_to_text), ("image→image", self.images, self.image_to_image))
        for name, count, kinds in measured:
            for kind, metrics in kinds.items():
                recalls = " | ".join(f"{metrics.recall[k]:.1f}" for k in RECALL_AT)
                lines.append(f"| {name} ({count}), {kind} | {recalls} | |")
        lines += [f"| sentence pairs ({self.pairs}), {kind} | | | | {value:.1f} |" for kind, value in self.sts.items()]
        if self.sts_known_words:
            name = (
                f"of them those without unknown words ({self.known_pairs}; {self.unknown_words:.1%} of words unknown)"
            )
            lines += [f"| {name}, {kind} | | | | {value:.1f} |" for kind, value in self.sts_known_words.items()]
        return "\n".join(lines)


def evaluate_unimodal(
    model: Any,
    processor: Any,
    dataset: Any = None,
    image_labels: Mapping[ItemId, ItemId] | None = None,
    sentence_pairs: SentencePairs | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> UnimodalReport:
    """Measure a model's embeddings within one modality; of a model with uni-modal heads, theirs too.

    Args:
        model: A `TVRNModel`.
        processor: Its processor.
        dataset: Records of `load_pairs`; their captions are compared by the image that they share.
        image_labels: Image id → label; images of the same one are each other's answers. None: images are not compared.
        sentence_pairs: Pairs with human grades; None: not measured.
        batch_size: Items encoded at a time.
        progress: Show progress bars.

    Raises:
        ValueError: If nothing is given to measure, an image has no label, or nothing shares a label.
    """
    if dataset is None and sentence_pairs is None:
        raise ValueError("evaluate_unimodal got neither records nor sentence pairs; give at least one of them.")
    if image_labels is not None and dataset is None:
        raise ValueError(f"There are {len(image_labels)} image labels but no records with the images; give both.")
    found: dict[str, Any] = {}
    with evaluating(model):
        if dataset is not None:
            dataset = with_words(dataset, processor)
            found |= _recalls(model, processor, dataset, image_labels, batch_size, progress)
        if sentence_pairs is not None:
            found |= _sts(model, processor, _with_words(sentence_pairs, processor), batch_size, progress)
    return UnimodalReport(**found, model=str(getattr(model.config, "name_or_path", "")))


def read_image_labels(path: str | os.PathLike[str]) -> dict[ItemId, ItemId]:
    """Image id → label from a JSON object, or a CSV file with columns image_id and label; ids of digits are ints."""
    file = Path(path)
    if file.suffix == ".json":
        pairs = list(json.loads(file.read_text(encoding="utf-8")).items())
    else:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        if rows and not {"image_id", "label"} <= rows[0].keys():
            raise ValueError(f"{file} has the columns {sorted(rows[0])}; expected image_id and label.")
        pairs = [(row["image_id"], row["label"]) for row in rows]
    return {int(image_id) if str(image_id).isdigit() else image_id: label for image_id, label in pairs}


def _recalls(
    model: Any,
    processor: Any,
    dataset: Any,
    image_labels: Mapping[ItemId, ItemId] | None,
    batch_size: int,
    progress: bool,
) -> dict[str, Any]:
    table, images = CaptionTable.of(dataset), None
    if image_labels is not None or table is None:
        images, table = encode_images(model, processor, dataset, batch_size, progress=progress)
    texts = encode_captions(model, processor, table.flat_captions, batch_size, progress).embeds
    rows = table.caption_image_rows.tolist()
    kinds = _kinds(model, "text", texts)
    found: dict[str, Any] = {
        "text_to_text": {kind: unimodal_metrics(embeds, rows) for kind, embeds in kinds.items()},
        "texts": len(texts),
    }
    if image_labels is None or images is None:
        return found
    if unlabelled := [image_id for image_id in table.image_ids if image_id not in image_labels]:
        raise ValueError(
            f"{len(unlabelled)} of {len(table.image_ids)} images have no label, the first is {unlabelled[0]!r}; give "
            "a label for each image of the split."
        )
    labels = [image_labels[image_id] for image_id in table.image_ids]
    by_kind = {kind: unimodal_metrics(each, labels) for kind, each in _kinds(model, "image", images.embeds).items()}
    return found | {"image_to_image": by_kind, "images": len(labels)}


def _with_words(pairs: SentencePairs, processor: Any) -> SentencePairs:
    """The pairs in both of whose sentences the model finds a word."""
    count = len(pairs.first)
    problems = unusable_captions([processor], [*pairs.first, *pairs.second])
    left_out = {place % count for place in problems}
    if not left_out:
        return pairs
    place, why = next(iter(problems.items()))
    logger.warning("%s: left out %d pairs (such as %d: %s)", pairs.name, len(left_out), place % count, why)
    kept = [place for place in range(count) if place not in left_out]
    first, second = ([part[place] for place in kept] for part in (pairs.first, pairs.second))
    if len(kept) < 2:
        raise ValueError(f"{pairs.name}: {len(kept)} usable pairs are left; a rank correlation needs at least two.")
    return SentencePairs(first, second, pairs.scores[kept], pairs.name)


def _sts(model: Any, processor: Any, pairs: SentencePairs, batch_size: int, progress: bool) -> dict[str, Any]:
    sentences = [*pairs.first, *pairs.second]
    embeds = encode_captions(model, processor, sentences, batch_size, progress).embeds
    unknown, words = _unknown_words(processor.tokenizer, sentences)
    known = (unknown == 0).reshape(2, -1).all(axis=0)
    # Words that a vocabulary from the training captions lacks bound what any training can reach.
    is_apart = unknown.any() and known.sum() > 2 and np.ptp(pairs.scores[known]) > 0
    correlations, of_known = {}, {}
    for kind, vectors in _kinds(model, "text", embeds).items():
        first, second = vectors.split(len(pairs.first))
        cosines = torch.cosine_similarity(first.double(), second.double()).cpu().numpy()
        correlations[kind] = spearman(cosines, pairs.scores)
        if is_apart:
            of_known[kind] = spearman(cosines[known], pairs.scores[known])
    return {
        "sts": correlations, "sts_known_words": of_known, "unknown_words": float(unknown.sum() / words.sum()),
        "pairs": len(known), "known_pairs": int(known.sum()),
    }  # fmt: skip


def _unknown_words(tokenizer: Any, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(sentences,) how many tokens of each the tokenizer does not know, and how many there are."""
    tokens = tokenizer(list(sentences), add_special_tokens=False)["input_ids"]
    unknown = [sum(token == tokenizer.unk_token_id for token in each) for each in tokens]
    return np.array(unknown), np.array([len(each) for each in tokens])


@torch.inference_mode()
def _kinds(model: Any, side: str, embeds: Tensor) -> dict[str, Tensor]:
    """The embeddings that the pair of towers compares across, and those of the uni-modal heads where there are."""
    kinds = {"cross-modal embeddings": embeds}
    if model.config.use_unimodal_heads:
        kinds["uni-modal heads"] = getattr(model, f"unimodal_{side}_embeds")(embeds)
    return kinds

"""Captions encoded without padding: a gallery whose size follows its words, not its longest caption."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..encoded_tvrn import EncodedTexts, common_fingerprint


class RaggedTexts:
    """T encoded texts, those of one length together, in an order of their own choice.

    `EncodedTexts` pads every caption to the longest: 25,000 captions of COCO, the longest of 60 words, would take
    15 GB at the paper's sizes, and take 4 here. It is for `score_matrix`, `rank` and `search_then_rerank`, which
    `select` a block at a time.

    Args:
        parts: Encoded texts; each text of a part has as many words as the part is wide.
        places: For each part, the numbers of its texts in the gallery.

    Raises:
        ValueError: If there is none, the places do not cover 0 … T − 1 once each, or two models encoded them.
    """

    def __init__(self, parts: Sequence[EncodedTexts], places: Sequence[np.ndarray]):
        numbers = np.concatenate([np.asarray(each, dtype=np.int64) for each in places]) if places else np.empty(0)
        count = sum(len(part) for part in parts)
        if not parts or sorted(numbers.tolist()) != list(range(count)):
            raise ValueError(
                f"places holds {len(numbers)} numbers for {count} texts; expected 0 to {count - 1}, once each."
            )
        self.parts = list(parts)
        self.model_fingerprint = common_fingerprint(*parts)
        sizes = [len(part) for part in parts]
        self._part_of, self._row_of = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        self._part_of[numbers] = np.repeat(np.arange(len(parts)), sizes)
        self._row_of[numbers] = np.concatenate([np.arange(size) for size in sizes])
        embeds = torch.cat([part.embeds for part in self.parts])
        self.embeds = embeds[torch.from_numpy(np.argsort(numbers)).to(embeds.device)]

    @classmethod
    def collect(cls, batches: Iterable[tuple[EncodedTexts, Sequence[int]]]) -> RaggedTexts:
        """From encoded batches, each with its texts' numbers in the gallery; a batch may be freed once it was taken.

        Raises:
            ValueError: As the constructor.
        """
        pieces: dict[int, list[EncodedTexts]] = {}
        places: dict[int, list[np.ndarray]] = {}
        for texts, numbers in batches:
            assert texts.word_mask is not None
            lengths = texts.word_mask.sum(dim=1).cpu().numpy()
            for length in np.unique(lengths).tolist():
                rows = np.flatnonzero(lengths == length)
                pieces.setdefault(length, []).append(texts.select(torch.from_numpy(rows)).trim())
                places.setdefault(length, []).append(np.asarray(numbers, dtype=np.int64)[rows])
        widths = sorted(pieces)
        # One length after the other: at no time do all of them exist twice.
        parts = [EncodedTexts.cat(pieces.pop(width)) for width in widths]
        return cls(parts, [np.concatenate(places[width]) for width in widths])

    @classmethod
    def of(cls, texts: EncodedTexts) -> RaggedTexts:
        """A padded gallery without its padding."""
        return cls.collect([(texts, range(len(texts)))])

    def __len__(self) -> int:
        return len(self._part_of)

    @property
    def lengths(self) -> np.ndarray:
        """(T,) words of each text."""
        widths = [0 if part.word_mask is None else part.word_mask.shape[1] for part in self.parts]
        return np.array(widths)[self._part_of]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (value for part in self.parts for value in part.tensors().values())
        return sum(value.numel() * value.element_size() for value in tensors)

    def select(self, indices: slice | Sequence[int] | Tensor | np.ndarray) -> EncodedTexts:
        """The texts at `indices`, in that order, padded to the longest among them."""
        if not isinstance(indices, slice):
            indices = np.asarray(indices)
            indices = indices if indices.size else indices.astype(np.int64)
        numbers = np.arange(len(self))[indices]
        part_of = self._part_of[numbers]
        chosen, asked = [], []
        for number in np.unique(part_of).tolist():
            asked.append(np.flatnonzero(part_of == number))
            chosen.append(self.parts[number].select(torch.from_numpy(self._row_of[numbers[asked[-1]]])))
        if not chosen:
            return self.parts[0].select([])
        order = np.argsort(np.concatenate(asked))
        together = EncodedTexts.cat(chosen)
        return together if (np.diff(order) == 1).all() else together.select(torch.from_numpy(order))

    def to(self, *args: Any, **kwargs: Any) -> RaggedTexts:
        """As `EncodedTexts.to`, part by part."""
        ragged = object.__new__(RaggedTexts)
        ragged.__dict__ |= self.__dict__
        ragged.parts = [part.to(*args, **kwargs) for part in self.parts]
        ragged.embeds = self.embeds.to(ragged.parts[0].embeds.device)
        return ragged

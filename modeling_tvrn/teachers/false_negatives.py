"""Training pairs that count as negatives though a teacher calls them near-duplicates.

A photograph with another photograph's caption is a negative. It is a wrong one where the photographs are nearly the
same, or where the caption says what one of the photograph's own captions says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .teacher_cache import TeacherCache


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs of items of different groups, the most alike first.

    Attributes:
        first, second: (n,) rows of the items, first < second.
        cosines: (n,) by the teacher.
        count: Pairs at or above the threshold, also those beyond the limit.
        compared: Pairs of different groups.
    """

    first: np.ndarray
    second: np.ndarray
    cosines: np.ndarray
    count: int
    compared: int


def near_duplicates(
    cache: TeacherCache,
    ids: Sequence[int | str],
    groups: Sequence[int] | np.ndarray,
    threshold: float,
    limit: int = 1000,
    block_size: int = 2048,
) -> NearDuplicates:
    """All pairs of items of different groups whose cosine reaches a threshold, counted; the first `limit` of them.

    Args:
        cache: of the teacher.
        ids: (N,) of the items.
        groups: (N,) what does not count as a pair: the image of each caption, or row numbers.
        threshold: of the cosine, in (-1, 1].
        limit: pairs that are kept.
        block_size: items compared with as many others at once; memory is O(block_size²).

    Raises:
        KeyError: an id is not in the cache.
        ValueError: other lengths, fewer than two items, or a setting out of range.
    """
    labels = np.asarray(groups)
    if len(ids) != len(labels) or len(ids) < 2:
        raise ValueError(f"there are {len(ids)} ids and {len(labels)} groups; expected as many, and at least two")
    if not -1 < threshold <= 1 or limit < 1 or block_size < 1:
        raise ValueError(
            f"threshold is {threshold}, limit {limit}, block_size {block_size}; expected a cosine in (-1, 1] and at "
            "least 1"
        )
    rows = cache.store.rows(ids)
    blocks = [slice(start, start + block_size) for start in range(0, len(rows), block_size)]
    best, count = _Best(limit), 0
    for number, block in enumerate(blocks):
        vectors = _read(cache, rows[block])
        for other in blocks[number:]:
            cosines = vectors @ (vectors if other == block else _read(cache, rows[other])).T
            wanted = (cosines >= threshold) & (labels[block][:, None] != labels[other][None, :])
            if other == block:
                wanted = np.triu(wanted, 1)
            first, second = np.nonzero(wanted)
            count += len(first)
            best.add(first + block.start, second + other.start, cosines[first, second])
    sizes = np.unique(labels, return_counts=True)[1]
    compared = (len(labels) ** 2 - int((sizes.astype(np.int64) ** 2).sum())) // 2
    return NearDuplicates(*best.sorted(), count, compared)


class _Best:
    """The pairs with the highest cosines so far."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._parts = np.zeros((3, 0))

    def add(self, first: np.ndarray, second: np.ndarray, cosines: np.ndarray) -> None:
        self._parts = np.concatenate([self._parts, np.stack([first, second, cosines])], axis=1)
        if self._parts.shape[1] > 4 * self.limit:
            self._parts = self._cut()

    def _cut(self) -> np.ndarray:
        # Stable, so that equal cosines stay in the order of their rows whatever the blocks.
        order = np.lexsort((self._parts[1], self._parts[0], -self._parts[2]))
        return self._parts[:, order[: self.limit]]

    def sorted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        first, second, cosines = self._cut()
        return first.astype(np.int64), second.astype(np.int64), cosines.astype(np.float32)


def _read(cache: TeacherCache, rows: np.ndarray) -> np.ndarray:
    vectors: np.ndarray = cache.store.read(rows, ["teacher_embeds"])["teacher_embeds"].astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)  # half precision moves a norm in the fourth digit


def false_negatives(
    records: Any,
    image_teacher: TeacherCache | None = None,
    text_teacher: TeacherCache | None = None,
    image_threshold: float = 0.9,
    text_threshold: float = 0.9,
    limit: int = 1000,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Pairs of photographs whose captions are each other's negatives, though a teacher calls them near-duplicates.

    Args:
        records: map-style records, of which neither image is decoded.
        image_teacher, text_teacher: caches of their images and captions; at least one.
        image_threshold, text_threshold: cosines from which on a teacher says so.
        limit: pairs of photographs for each teacher.

    Returns:
        Rows, the most alike first (by the larger of the two cosines), each a pair of photographs once:
        `first_image_id`, `second_image_id`, `first_row`, `second_row`, `first_caption`, `second_caption` and their ids
        (the captions most alike), `image_cosine`, `text_cosine` (None without that teacher), `found_by`. And for each
        teacher how many pairs it found (`pairs`, of captions for the text teacher), of how many `compared`, and the
        `wrong_negatives` to expect in a batch of 128 (image, caption) pairs, both directions.

    Raises:
        ValueError: there is no teacher.
        StaleStoreError: a cache is of other data.
    """
    if image_teacher is None and text_teacher is None:
        raise ValueError("false_negatives got no teacher; give image_teacher, text_teacher, or both")
    pairs: dict[tuple[int, int], set[str]] = {}
    counts = {}
    if image_teacher is not None:
        image_teacher.check(records)
        found = near_duplicates(
            image_teacher,
            records.image_ids,
            range(len(records)),
            image_threshold,
            limit,
        )
        counts["image"] = _counts(found)
        for pair in zip(found.first.tolist(), found.second.tolist(), strict=True):
            pairs.setdefault(pair, set()).add("image")
    if text_teacher is not None:
        text_teacher.check(records)
        ids = [caption_id for of_image in records.caption_ids for caption_id in of_image]
        rows = np.repeat(np.arange(len(records)), [len(of_image) for of_image in records.captions])
        # The same two photographs may be found by each pair of their captions.
        found = near_duplicates(text_teacher, ids, rows, text_threshold, 25 * limit)
        counts["text"] = _counts(found)
        by_image = dict.fromkeys(zip(rows[found.first].tolist(), rows[found.second].tolist(), strict=True))
        for pair in list(by_image)[:limit]:
            pairs.setdefault(pair, set()).add("text")
    table = [_row(records, *pair, by, image_teacher, text_teacher) for pair, by in pairs.items()]
    table.sort(key=lambda row: -max(row["image_cosine"] or -1.0, row["text_cosine"] or -1.0))
    return table, counts


def _counts(found: NearDuplicates, batch: int = 128) -> dict[str, float]:
    share = found.count / max(found.compared, 1)
    return {"pairs": found.count, "compared": found.compared, "wrong_negatives": share * batch * (batch - 1)}


def _row(
    records: Any,
    first: int,
    second: int,
    found_by: set[str],
    image_teacher: TeacherCache | None,
    text_teacher: TeacherCache | None,
) -> dict[str, Any]:
    """One pair of photographs with the captions most alike, or their first ones."""
    image_ids = records.image_ids[first], records.image_ids[second]
    image_cosine = text_cosine = None
    if image_teacher is not None:
        one, other = _read(image_teacher, image_teacher.store.rows(image_ids))
        image_cosine = float(one @ other)
    places = (0, 0)
    if text_teacher is not None:
        ids = records.caption_ids[first], records.caption_ids[second]
        ours, theirs = (_read(text_teacher, text_teacher.store.rows(own)) for own in ids)
        cosines = ours @ theirs.T
        at = np.unravel_index(int(cosines.argmax()), cosines.shape)
        places = (int(at[0]), int(at[1]))
        text_cosine = float(cosines[places])
    row: dict[str, Any] = {}
    for name, number, place in (("first", first, places[0]), ("second", second, places[1])):
        row |= {
            f"{name}_image_id": records.image_ids[number],
            f"{name}_row": number,
            f"{name}_caption": records.captions[number][place],
            f"{name}_caption_id": records.caption_ids[number][place],
        }
    return row | {"image_cosine": image_cosine, "text_cosine": text_cosine, "found_by": "+".join(sorted(found_by))}

"""Rows of ids in 16 bytes an id: a dictionary of a million ids would take more memory than a batch ever reads."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from .fingerprints import ItemId


class IdIndex:
    """Finds the rows of ids, which are all different.

    Integers are looked up as they are; if there are strings, every id by 64 bits of its hash, which two of a million
    ids share with a probability of 3e-8.

    Args:
        ids: (N,) in the order of their rows.

    Raises:
        ValueError: two ids are equal, or share their hash.
    """

    def __init__(self, ids: Sequence[ItemId]) -> None:
        self._are_numbers = all(_fits(item_id) for item_id in ids)
        keys = self._keys(ids)
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]
        if twice := np.flatnonzero(self._sorted[1:] == self._sorted[:-1]).tolist():
            one, other = self._order[twice[0]], self._order[twice[0] + 1]
            raise ValueError(f"the ids {ids[one]!r} and {ids[other]!r} cannot be told apart; rename one of them")

    def __len__(self) -> int:
        return len(self._order)

    def find(self, ids: Sequence[ItemId]) -> np.ndarray:
        """Rows of some ids, int64 (n,); −1 for an id that is not there."""
        known = np.array([not self._are_numbers or _fits(item_id) for item_id in ids], dtype=bool)
        rows = np.full(len(ids), -1, dtype=np.int64)
        if not len(self) or not known.any():
            return rows
        keys = self._keys([item_id for item_id, asked in zip(ids, known, strict=True) if asked])
        places = np.minimum(np.searchsorted(self._sorted, keys), len(self) - 1)
        rows[known] = np.where(self._sorted[places] == keys, self._order[places], -1)
        return rows

    def _keys(self, ids: Sequence[ItemId]) -> np.ndarray:
        if self._are_numbers:
            return np.fromiter(ids, np.int64, len(ids))
        digests = (hashlib.blake2b(json.dumps(item_id).encode(), digest_size=8).digest() for item_id in ids)
        return np.frombuffer(b"".join(digests), np.int64)


def _fits(item_id: ItemId) -> bool:
    return isinstance(item_id, int) and -(2**63) <= item_id < 2**63

"""Teacher caches without teachers: any vectors under the ids of records, for tests of what reads them."""

from pathlib import Path
from typing import Any

import numpy as np

from modeling_tvrn.teachers import StoreWriter, TeacherCache
from modeling_tvrn.teachers.teacher_items import contents_of, digests_of, item_ids


def write_cache(folder: Path, modality: str, records: Any, vectors: np.ndarray, shard_size: int = 5) -> TeacherCache:
    """A cache of these vectors (n, D), made unit-norm, in the order of the records' images or captions."""
    fingerprint = {"teacher": {"modality": modality, "class": "Made", "weights_sha256": "0f" * 32}, "pooling": "mean"}
    writer = StoreWriter(folder, fingerprint, shard_size)
    firsts, seconds = contents_of(records, modality)
    writer.append(
        item_ids(records, modality) or [],
        {
            "teacher_embeds": (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16),
            "first_digest": digests_of(firsts),
            "second_digest": digests_of(seconds),
        },
    )
    writer.finish()
    return TeacherCache.load(folder)


def write_caches(folder: Path, records: Any, seed: int = 0) -> dict[str, str]:
    """Caches of both modalities with random vectors; the training keys that name them."""
    random = np.random.default_rng(seed)
    captions = sum(map(len, records.captions))
    write_cache(folder / "image", "image", records, random.normal(size=(len(records), 6)))
    write_cache(folder / "text", "text", records, random.normal(size=(captions, 4)))
    return {"cusa_image_teacher": str(folder / "image"), "cusa_text_teacher": str(folder / "text")}

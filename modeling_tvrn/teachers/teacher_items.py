"""What of a record a teacher reads, under which id, and how the vectors of all records come into a store."""

import hashlib
import importlib.metadata
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..engines import used
from ..storage.arrays import ArrayStore, StoreWriter
from ..storage.fingerprints import ItemId, StaleStoreError, plain_id
from .regions import PreparedBatches, RegionCache, image_ids_of
from .teacher import Teacher, TextPreparation

logger = logging.getLogger(__name__)

BATCHES_AT_ONCE = 16  # captions sorted by length among that many batches: little padding, and memory stays bounded
REGIONS_AT_ONCE = 256
DIGEST_BYTES = 8
Item = tuple[ItemId, Any, str, str]  # id, photograph or text, what its contents are told apart by: two names
Digests = dict[str, np.ndarray]


def item_ids(dataset: Any, modality: str) -> list[ItemId] | None:
    """Ids of all items of map-style records, without decoding an image; None for a stream."""
    ids = image_ids_of(dataset)
    if modality == "image" or ids is None:
        return ids
    return [plain_id(caption_id) for ids in dataset.caption_ids for caption_id in ids]


def items_of(record: Mapping[str, Any], modality: str) -> list[Item]:
    """A record's photograph, or its captions, as items.

    Raises:
        ValueError: the record has no photograph.
    """
    if modality == "text":
        pairs = zip(record["caption_ids"], record["captions"], strict=True)
        return [(plain_id(caption_id), caption, caption, caption) for caption_id, caption in pairs]
    if "image" not in record:
        raise ValueError(
            f"the record of image {record['image_id']!r} has no image but {sorted(record)}: an image teacher needs "
            "the photographs; load the data without a region cache"
        )
    first = record["captions"][0] if record.get("captions") else ""
    return [(plain_id(record["image_id"]), record["image"], str(record.get("filename", "")), first)]


def contents_of(dataset: Any, modality: str) -> tuple[list[str], list[str]]:
    """The two names by which the contents of map-style records' items are told apart (see `items_of`)."""
    if modality == "text":
        captions = [caption for captions in dataset.captions for caption in captions]
        return captions, captions
    return list(map(str, dataset.filenames)), [captions[0] if captions else "" for captions in dataset.captions]


def digests_of(names: Sequence[str]) -> np.ndarray:
    """(n, 8) uint8: enough to tell that an id has come to mean something else."""
    joined = b"".join(hashlib.blake2b(name.encode(), digest_size=DIGEST_BYTES).digest() for name in names)
    return np.frombuffer(joined, dtype=np.uint8).reshape(len(names), DIGEST_BYTES)


def check_contents(store: ArrayStore, dataset: Any, modality: str) -> None:
    """Refuse a store in which an id of these records stands for something else, or for nothing.

    Raises:
        KeyError: an id is not there.
        StaleStoreError: an id stands for another caption; or for another photograph, by its file's name and its first
            caption both (either may change where the photograph stays).
    """
    ids = item_ids(dataset, modality)
    if ids is None:
        raise ValueError(f"a {type(dataset).__name__} is a stream: its items are checked as they come, not before")
    compare_contents(store, ids, *contents_of(dataset, modality), modality)


def compare_contents(
    store: ArrayStore, ids: Sequence[ItemId], firsts: Sequence[str], seconds: Sequence[str], modality: str
) -> None:
    """As `check_contents`, of some items: their ids and the two names of what each stands for."""
    stored = store.read(store.rows(ids), ["first_digest", "second_digest"])
    same = (stored["first_digest"] == digests_of(firsts)).all(axis=1)
    same |= (stored["second_digest"] == digests_of(seconds)).all(axis=1)
    if same.all():
        return
    row = int(np.flatnonzero(~same)[0])
    was = stored["second_digest"][row].tobytes().hex()
    now = digests_of([seconds[row]])[0].tobytes().hex()
    what = "the caption" if modality == "text" else f"the image (file {firsts[row]!r}) with the caption"
    raise StaleStoreError(
        f"the teacher cache in {str(store.directory)!r} is of other data: for {(~same).sum()} of {len(ids)} ids, the "
        f"first {ids[row]!r}, it holds something else (stored digest {was}) than {what} {seconds[row]!r} (digest "
        f"{now}): build a cache of these data"
    )


def fill(
    writer: StoreWriter,
    teacher: Teacher,
    dataset: Any,
    batch_size: int,
    dtype: str,
    num_workers: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Compute what the writer lacks; returns facts about it.

    Raises:
        ValueError: the stored items are not those that the data begin with, or a vector has no direction.
    """
    started, done = time.monotonic(), list(writer.ids)
    ids = item_ids(dataset, teacher.modality)
    if ids is not None:
        writer.check_resumable(ids)
    noun = "image" if teacher.modality == "image" else "caption"
    total = None if ids is None else len(ids)
    bar = tqdm(total=total, initial=len(done), unit=noun, desc="teacher", disable=None if progress else True)
    cut = 0
    with bar:
        for block, vectors, long in _blocks(teacher, dataset, ids is None, batch_size, num_workers, writer):
            names = [name for name, *_ in block], [first for *_, first, _ in block], [second for *_, second in block]
            writer.append(names[0], _checked(vectors, names[0], dtype, repr(teacher)) | _digests(names[1], names[2]))
            cut += long
            bar.update(len(block))
    if cut:
        logger.warning("%d captions are longer than the teacher's limit of tokens and were cut", cut)
    return {
        "teacher": teacher.name,
        "revision": teacher.revision,
        "device": str(teacher.device),
        "tower_engine": used(teacher.model),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")},
        "resumed_after": len(done),
        "captions_cut": cut,
        "seconds": round(time.monotonic() - started, 1),
    }


def fill_from_regions(
    writer: StoreWriter, regions: RegionCache, dataset: Any, ids: Sequence[ItemId], dtype: str, progress: bool = True
) -> None:
    """Write the mean of each image's regions, for those that the writer lacks."""
    done = list(writer.ids)
    writer.check_resumable(ids)
    firsts, seconds = contents_of(dataset, "image")
    bar = tqdm(total=len(ids), initial=len(done), unit="image", desc="teacher", disable=None if progress else True)
    with bar:
        for start in range(len(done), len(ids), REGIONS_AT_ONCE):
            rows = slice(start, start + REGIONS_AT_ONCE)
            found = regions[ids[rows]]
            mask = found["region_mask"].unsqueeze(-1)
            means = (found["region_features"].float() * mask).sum(dim=1) / mask.sum(dim=1)
            embeds = _checked(means, ids[rows], dtype, "the mean of its regions")
            writer.append(ids[rows], embeds | _digests(firsts[rows], seconds[rows]))
            bar.update(len(ids[rows]))


def _digests(firsts: Sequence[str], seconds: Sequence[str]) -> Digests:
    return {"first_digest": digests_of(firsts), "second_digest": digests_of(seconds)}


def _checked(vectors: Tensor, ids: Sequence[ItemId], dtype: str, teacher: str) -> dict[str, np.ndarray]:
    """Unit-norm vectors ready to be stored."""
    norms = vectors.norm(dim=1, keepdim=True)
    wrong = ~(norms.isfinite() & (norms > 0)).flatten()
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"the vector of item {ids[row]!r} has the norm {norms[row].item()} by {teacher}, expected "
            "a finite one above 0: look at that item, and at the teacher's dtype and pooling"
        )
    return {"teacher_embeds": (vectors / norms).to(getattr(torch, dtype)).cpu().numpy()}


def _blocks(
    teacher: Teacher,
    dataset: Any,
    stream: bool,
    batch_size: int,
    workers: int,
    writer: StoreWriter,
) -> Iterator[tuple[list[Item], Tensor, int]]:
    """Items that the writer lacks, their vectors, and how many of them were cut."""
    done = len(writer.ids)
    if stream:
        if workers:
            raise ValueError(f"num_workers is {workers}, but a stream is read here: use 0, or map-style records")
        passing = (item for record in dataset for item in items_of(record, teacher.modality))
        writer.check_resumable([item[0] for item in itertools.islice(passing, done)])
        yield from _embedded(teacher, passing, batch_size)
    elif teacher.modality == "image":
        batches = PreparedBatches(partial(_prepared, teacher.prepare), dataset, done, batch_size)
        for items, inputs in DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=_as_is):
            yield items, teacher.embed(inputs), 0
    else:
        pairs = zip(item_ids(dataset, "text") or (), contents_of(dataset, "text")[0], strict=True)
        texts: Iterator[Item] = ((caption_id, caption, caption, caption) for caption_id, caption in pairs)
        yield from _embedded(teacher, itertools.islice(texts, done, None), batch_size)


def _embedded(teacher: Teacher, items: Iterator[Item], batch_size: int) -> Iterator[tuple[list[Item], Tensor, int]]:
    several = BATCHES_AT_ONCE if teacher.modality == "text" else 1
    while block := list(itertools.islice(items, several * batch_size)):
        contents = [content for _, content, *_ in block]
        cut = count_cut(teacher.prepare, contents) if isinstance(teacher.prepare, TextPreparation) else 0
        yield block, teacher(contents, batch_size), cut


def count_cut(prepare: TextPreparation, texts: Sequence[str]) -> int:
    """Texts longer than the limit; only those that may be are tokenized a second time."""
    # A token has one character at least.
    suspects = [text for text in texts if len(text) + 8 > prepare.max_length]
    if not suspects:
        return 0
    tokens = prepare.tokenizer(suspects, truncation=False, padding=False, verbose=False)["input_ids"]
    return sum(len(ids) > prepare.max_length for ids in tokens)


def _prepared(prepare: Callable[[Sequence[Any]], Any], records: Sequence[Mapping[str, Any]]) -> Any:
    """Items of some records, without the photographs, and an image teacher's input."""
    found = [item for record in records for item in items_of(record, "image")]
    inputs = prepare([image for _, image, *_ in found])
    return [(item_id, None, first, second) for item_id, _, first, second in found], inputs


def _as_is(batch: Any) -> Any:
    return batch

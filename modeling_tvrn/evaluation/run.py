"""`evaluate`: a named protocol from records to a report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import with_words
from ..metrics import RetrievalMetrics, chance_level, mean_metrics
from ..scoring import (
    BestCandidates,
    EmbeddingScore,
    ScoringOptions,
    SearchMetrics,
    average,
    mean_search,
    rank,
    rank_and_list,
    search_then_rerank,
)
from ..scoring.plan import DEFAULT_MEMORY_BUDGET
from ..storage.fingerprints import CALIBRATION, weights_digest
from .captions import CaptionTable
from .coco_positives import LIST_SIZE, coco_ids, cxc_metrics, cxc_within_modalities, eccv_metrics, load_eccv
from .contrast import evaluate_contrast
from .encoding import encode_captions, encode_images
from .protocols import CONTRAST, Protocol, find_protocol
from .provenance import command, commit, versions
from .report import EvaluatedModel, EvaluationReport

System = tuple[Any, Any, Any]  # model, encoded images, encoded texts


def evaluate(
    model: Any,
    processor: Any,
    dataset: Any,
    protocol: str = "validation",
    *,
    batch_size: int = 64,
    chunk_size: int | None = None,
    shortlist_size: int | None = None,
    exhaustive: bool | None = None,
    embeddings: bool = True,
    data: str | None = None,
    split: str | None = None,
    seeds: Sequence[int] = (),
    num_workers: int = 0,
    progress: bool = True,
    memory_budget: float = DEFAULT_MEMORY_BUDGET,
    dtype: torch.dtype | None = None,
    folder: str | os.PathLike[str] | None = None,
    share: bool = True,
    cxc_folder: str | os.PathLike[str] | None = None,
) -> Any:
    """Encode a gallery, rank it both ways and report it, by a named protocol (evaluation.md).

    Args:
        model: A `TVRNModel`, or a list of them whose matching scores are averaged.
        processor: Its processor, or a list with one for each model.
        dataset: Records of `load_pairs`, map-style or a stream; or a list of records. For several models with inputs
            of their own (regions of different towers) a tuple with one data set for each, of the same images.
        protocol: `validation` (any size), `flickr8k-1k`, `flickr30k-1k`, `coco-5k`, `coco-1k`, with more positives of
            COCO's test split `eccv-caption` or `cxc`; or `contrast`, pairs that fit against pairs that do not.
        batch_size: Images, and captions, encoded at a time.
        chunk_size: Pairs scored at a time (default: the model's own choice).
        shortlist_size: Also, or only, search this many candidates a query by embeddings and rerank them.
        exhaustive: Whether to score every pair; default: unless there is a shortlist.
        embeddings: Whether to report the recalls of `image_embeds` and `text_embeds` alone.
        data: What the report calls the data set; default: the name it has.
        split: What the report calls the split; default: what the records say.
        seeds: The report's seeds of the checkpoints.
        num_workers: Processes that decode pictures (of map-style records).
        progress: Show progress bars with the time left.
        memory_budget: Gigabytes for blocks of scores, beyond the encoded gallery.
        dtype: Of the scores: `torch.float32`, `torch.bfloat16` (autocast), or None for the model's own.
        folder: Where finished blocks are kept (exhaustive scoring, one protocol a folder): the same call goes on after
            a crash.
        share: Whether the processes of torch.distributed, where it is initialised, share the scoring out (each
            encodes the gallery); False where one of them evaluates alone.
        cxc_folder: With CxC's `sis_test.csv` and `sts_test.csv`: images among images and captions among captions too.

    Returns:
        An `EvaluationReport`: `metrics`, `embedding_metrics`, `search`; `table()`, `to_json(path)`. Of the protocol
        `contrast` a `ContrastReport`, see `evaluate_contrast`.

    Raises:
        ValueError: If the gallery is not of the protocol's size (both are named), has repeated ids, or there is an
            unknown protocol; and whatever encoding and scoring refuse.
    """
    if protocol == CONTRAST:
        if shortlist_size is not None or folder is not None or isinstance(model, list | tuple):
            raise ValueError(
                "Protocol 'contrast' scores given pairs of one model; leave out shortlist_size, folder, other models."
            )
        return evaluate_contrast(model, processor, dataset, batch_size=batch_size, data=data, progress=progress)
    chosen = find_protocol(protocol)
    inputs = pair_up(model, processor, dataset)
    started = time.perf_counter()
    gallery, systems, truncated = encode_galleries(inputs, chosen, batch_size, num_workers, progress)
    encoded = time.perf_counter()
    options = ScoringOptions(chunk_size, memory_budget, dtype, folder, share, progress)
    judge = _Positives(chosen.positives, gallery, cxc_folder) if chosen.positives else None
    measure = Measure(chosen, gallery, options, judge)
    exact = measure.ranked(average(systems)) if exhaustive or (exhaustive is None and shortlist_size is None) else None
    search = measure.searched(average(systems), shortlist_size) if shortlist_size is not None else None
    metrics = exact or search
    if metrics is None:
        raise ValueError("exhaustive=False leaves nothing to measure; give a shortlist_size, or let it be exhaustive.")
    several = exact is not None and len(systems) > 1
    singles = [measure.ranked(each, f"model-{n}") if several else None for n, each in enumerate(systems, start=1)]
    own = measure.embeddings(average(systems)) if embeddings else None
    found = zip(inputs, singles, strict=True)
    return EvaluationReport(
        **origin(chosen, gallery, inputs, truncated, data, split),
        fold_count=chosen.folds,
        metrics=metrics,
        embedding_metrics=own,
        caption_image_rows=gallery.caption_image_rows,
        search=search,
        extended=judge.found if judge is not None else {},
        chance=measure.chance(),
        models=[describe_model(each, single) for (each, _, _), single in found],
        seeds=list(seeds),
        seconds={"encoding": encoded - started, "scoring": time.perf_counter() - encoded},
    )


def origin(
    protocol: Protocol,
    gallery: CaptionTable,
    inputs: list[tuple[Any, Any, Any]],
    truncated: int,
    data: str | None,
    split: str | None,
) -> dict[str, Any]:
    """What every report of a gallery says of where its numbers come from."""
    model, _, records = inputs[0]
    device = next(model.parameters()).device
    return {
        "protocol": protocol.name,
        "data": data if data is not None else str(getattr(records, "name", "")),
        "split": split if split is not None else "+".join(dict.fromkeys(gallery.splits)),
        "image_count": gallery.image_count,
        "caption_count": gallery.caption_count,
        "gallery_fingerprint": gallery.fingerprint,
        "skipped": dict(getattr(records, "skipped", {})),
        "truncated_captions": truncated,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "commit": commit(),
        "command": command(),
        "versions": versions(),
    }


def pair_up(model: Any, processor: Any, dataset: Any) -> list[tuple[Any, Any, Any]]:
    """(model, processor, data set) of each system."""
    models = list(model) if isinstance(model, list | tuple) else [model]
    processors = list(processor) if isinstance(processor, list | tuple) else [processor] * len(models)
    several = isinstance(dataset, tuple) and bool(dataset) and not isinstance(dataset[0], Mapping)
    datasets = list(dataset) if several else [dataset] * len(models)
    if not models or len({len(models), len(processors), len(datasets)}) != 1:
        raise ValueError(
            f"evaluate got {len(models)} models, {len(processors)} processors and {len(datasets)} data sets; expected"
            " at least one model, a processor for each, and one data set for all or for each."
        )
    # what one of the models cannot read is left out for all, so that they are measured on the same captions
    different = {id(each): each for each in datasets}
    worded = {key: with_words(each, *processors) for key, each in different.items()}
    return [(*each, worded[id(own)]) for *each, own in zip(models, processors, datasets, strict=True)]


def encode_galleries(
    inputs: list[tuple[Any, Any, Any]], protocol: Protocol, batch_size: int, num_workers: int, progress: bool
) -> tuple[CaptionTable, list[System], int]:
    """The gallery, each model with its encoding of it, and how many captions the length limits cut."""
    galleries: list[CaptionTable] = []
    systems: list[System] = []
    truncated = 0
    for model, processor, dataset in inputs:
        known = CaptionTable.of(dataset)
        table = protocol.apply(known) if known is not None else None  # refused before hours of encoding
        images, read = encode_images(model, processor, dataset, batch_size, num_workers, progress)
        table = table if table is not None else protocol.apply(read)
        before = _truncated(processor)
        texts = encode_captions(model, processor, table.flat_captions, batch_size, progress)
        truncated = max(truncated, _truncated(processor) - before)
        galleries.append(table)
        systems.append((model, images, texts))
    prints = {table.fingerprint: table for table in galleries}
    if len(prints) != 1:
        sizes = [(table.image_count, table.caption_count) for table in galleries]
        raise ValueError(
            f"The models' data sets differ: fingerprints {[name[:12] for name in prints]}, images and captions"
            f" {sizes}; expected the same images and captions in the same order."
        )
    return galleries[0], systems, truncated


class _Positives:
    """Further positives of COCO's test split, and what they say of a ranking."""

    def __init__(self, name: str, gallery: CaptionTable, cxc_folder: str | os.PathLike[str] | None):
        self.name, self.cxc_folder, self.rows = name, cxc_folder, gallery.caption_image_rows
        self.eccv = load_eccv()
        self.ids = coco_ids(gallery, self.eccv)
        self.found: dict[str, float] = {}

    def look(self, best: BestCandidates, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> None:
        """Judge the best candidates of every query."""
        judged = eccv_metrics if self.name == "eccv" else cxc_metrics
        self.found = judged(self.ids, best.captions, best.images, self.eccv)
        if self.name == "cxc" and self.cxc_folder is not None:
            self.found |= cxc_within_modalities(self.ids, image_embeds, text_embeds, self.rows, self.cxc_folder)


@dataclass
class Measure:
    """One gallery, cut as the protocol says."""

    protocol: Protocol
    gallery: CaptionTable
    options: ScoringOptions
    judge: _Positives | None = None

    def ranked(self, system: System, part: str = "mean") -> RetrievalMetrics:
        """Exact metrics of the pair score; `part` names its finished blocks."""

        def measured(model: Any, images: Any, texts: Any, rows: np.ndarray, fold: str) -> RetrievalMetrics:
            folder = Path(self.options.folder) / part / fold if self.options.folder is not None else None
            options = replace(self.options, folder=folder)
            if self.judge is None or part != "mean":
                return rank(model, images, texts, rows, **vars(options))
            metrics, best = rank_and_list(model, images, texts, rows, LIST_SIZE, options)
            self.judge.look(best, images.embeds, texts.embeds)
            return metrics

        return mean_metrics(self._by_fold(system, measured))

    def searched(self, system: System, shortlist_size: int) -> SearchMetrics:
        """Metrics and costs of search and rerank."""
        options = {name: value for name, value in vars(self.options).items() if name != "folder"}
        return mean_search(
            self._by_fold(
                system, lambda m, i, t, rows, _: search_then_rerank(m, i, t, rows, shortlist_size, **options)
            )
        )

    def embeddings(self, system: System) -> RetrievalMetrics:
        """Exact metrics of the embeddings' cosine."""
        alone = Measure(self.protocol, self.gallery, replace(self.options, folder=None))
        return alone.ranked((EmbeddingScore(), *system[1:]))

    def chance(self) -> Any:
        """The expectation of a random order; folds are of one size, so the first stands for all."""
        images, captions = self.protocol.parts(self.gallery)[0]
        return chance_level(len(images), len(captions), self.gallery.caption_image_rows[captions] - images[0])

    def _by_fold(self, system: System, measure: Callable[[Any, Any, Any, np.ndarray, str], Any]) -> list[Any]:
        model, images, texts = system
        rows = self.gallery.caption_image_rows
        found: list[Any] = []
        for image_rows, captions in self.protocol.parts(self.gallery):
            if len(image_rows) == len(images):
                return [measure(model, images, texts, rows, "whole")]  # no copy of a whole gallery
            part = images.select(torch.from_numpy(image_rows)), texts.select(torch.from_numpy(captions))
            found.append(measure(model, *part, rows[captions] - image_rows[0], f"fold-{len(found)}"))
        return found


def describe_model(model: Any, metrics: RetrievalMetrics | None) -> EvaluatedModel:
    config = getattr(model, "config", None)
    name = str(getattr(config, "name_or_path", "") or "")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return EvaluatedModel(name, weights_digest(model, (CALIBRATION,)), dtype, metrics)


def _truncated(processor: Any) -> int:
    return int(getattr(processor, "truncated_captions", 0))

"""What an evaluation found, and everything needed to find it again."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics import BootstrapComparison, Recalls, RetrievalMetrics, paired_bootstrap, recall_table
from ..redaction import redacted
from ..scoring import SearchMetrics

RESAMPLES = 2000  # of the interval of pair score over embeddings: its ends move by a tenth of a point


@dataclass(frozen=True)
class EvaluatedModel:
    """One checkpoint of an evaluation.

    Attributes:
        name: Folder or Hub id it came from; may be empty.
        sha256: Hash of its weights' names, shapes and values, read as float32; its calibration is none of them.
        dtype: It was evaluated in.
        metrics: Its own result, where several are averaged.
    """

    name: str
    sha256: str
    dtype: str
    metrics: RetrievalMetrics | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found: dict[str, Any] = {"name": self.name, "sha256": self.sha256, "dtype": self.dtype}
        return found | ({"metrics": self.metrics.as_dict()} if self.metrics is not None else {})


class JsonReport:
    """What can be kept as JSON."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        raise NotImplementedError

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text, also written to `path` where one is given."""
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text


@dataclass(frozen=True)
class EvaluationReport(JsonReport):
    """The result of `evaluate`; recalls are in percent.

    Attributes:
        protocol: Name of the protocol.
        data: What the data set is called.
        split: Its split or splits.
        image_count: Images ranked (of all folds together).
        caption_count: Captions ranked.
        fold_count: Parts ranked by themselves and averaged; 1 for the whole gallery.
        gallery_fingerprint: SHA-256 of image ids and caption ids in order.
        metrics: Of the pair score: exhaustive, or of the two-stage search where exhaustive scoring was not asked for.
        embedding_metrics: Of the cosine of the embeddings alone.
        search: Of the two-stage search, with its costs.
        extended: By name, what further positives say of the same ranking (ECCV Caption, CxC), percent.
        chance: What a random order is expected to reach.
        models: The checkpoints, averaged where there are several.
        seeds: That the checkpoints were trained with, as far as they are known.
        skipped: Reason → count of what was left out of the data while reading.
        truncated_captions: Captions cut at the processor's length limit.
        seconds: Wall time of `encoding` and of `scoring`.
        device: Where the first model ran.
        commit: Of the checkout, None if installed.
        command: The command line.
        versions: Of Python and libraries.
        unit: Of the recalls.
        caption_image_rows: (T,) row of each caption's image, for `gain`.
    """

    protocol: str
    data: str
    split: str
    image_count: int
    caption_count: int
    fold_count: int
    gallery_fingerprint: str
    metrics: RetrievalMetrics
    chance: Recalls
    models: list[EvaluatedModel]
    embedding_metrics: RetrievalMetrics | None = None
    search: SearchMetrics | None = None
    extended: dict[str, float] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    truncated_captions: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    device: str = ""
    commit: str | None = None
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    unit: str = "percent"
    caption_image_rows: np.ndarray | None = field(default=None, repr=False, compare=False)

    @cached_property
    def gain(self) -> BootstrapComparison | None:
        """Of the pair score over the embeddings, where both are reported: paired bootstrap over images."""
        # Not before somebody asks: a run evaluates many times, and shows this once.
        if self.embedding_metrics is None:
            return None
        rows = self.caption_image_rows
        return paired_bootstrap(self.metrics, self.embedding_metrics, RESAMPLES, caption_image_rows=rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, without secrets; metrics by their flat names."""
        found: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            found[name] = value.as_dict() if isinstance(value, Recalls) else value
        del found["caption_image_rows"]
        found["gain"] = None if self.gain is None else self.gain.as_dict()
        found["models"] = [model.as_dict() for model in self.models]
        return dict(redacted(found))

    def systems(self) -> dict[str, Recalls]:
        """The rows of the table: pair score, each checkpoint, search, embeddings, chance."""
        several = len(self.models) > 1
        rows: dict[str, Recalls] = {}
        if not isinstance(self.metrics, SearchMetrics):
            rows[f"mean of {len(self.models)} models" if several else "pair score"] = self.metrics
        if self.search is not None:
            rows[f"search {self.search.costs.shortlist_size}, rerank"] = self.search
        for number, model in enumerate(self.models, start=1):
            if model.metrics is not None:
                rows[f"model {number}"] = model.metrics
        if self.embedding_metrics is not None:
            rows["embeddings alone"] = self.embedding_metrics
        return rows | {"chance": self.chance}

    def table(self) -> str:
        """Everything in words: what was measured on what, the recalls, the costs, and where the numbers come from."""
        return "\n".join([*self._gallery_lines(), "", recall_table(self.systems(), self.unit), "", *self._lines()])

    def _gallery_lines(self) -> list[str]:
        folds = f", {self.fold_count} consecutive folds, averaged" if self.fold_count > 1 else ""
        return [
            f"Protocol {self.protocol}: data {self.data or 'unnamed'}, split {self.split or 'unnamed'},"
            f" {self.image_count} images, {self.caption_count} captions{folds}",
            f"Gallery {self.gallery_fingerprint}",
        ]

    def _lines(self) -> list[str]:
        metrics = self.metrics
        by_image = f"{metrics.image_to_text_median_rank:g}, {metrics.image_to_text_mean_rank:.1f}"
        by_caption = f"{metrics.text_to_image_median_rank:g}, {metrics.text_to_image_mean_rank:.1f}"
        lines = [
            f"Ranks (median, mean): image→text {by_image}; text→image {by_caption}."
            f" Ties, counted against the query: {metrics.ties}."
        ]
        if self.gain is not None:
            lines.insert(
                0, f"Pair score over its embeddings, rSum: {self.gain.in_words()}, paired bootstrap by image."
            )
        if self.extended:
            named = ", ".join(f"{name} {value:.1f}" for name, value in self.extended.items())
            lines.insert(0, f"With the positives of {self.protocol}: {named}")
        lines += [_costs(self.search)] if self.search is not None else []
        lines += [f"Left out of the data: {reason}: {count}" for reason, count in self.skipped.items()]
        lines += [f"Captions cut at the length limit: {self.truncated_captions}"] if self.truncated_captions else []
        lines += [f"Model {model.name or 'unnamed'} ({model.dtype}) {model.sha256}" for model in self.models]
        seeds = ", ".join(map(str, self.seeds)) or "unknown"
        times = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
        lines.append(f"Seeds {seeds}; commit {self.commit or 'unknown'}; {times} on {self.device}")
        return [*lines, f"Command: {self.command}"]


def _costs(search: SearchMetrics) -> str:
    costs = search.costs
    recalls = costs.image_to_text_shortlist_recall, costs.text_to_image_shortlist_recall
    return (
        f"Shortlist of {costs.shortlist_size}: holds a right answer for {recalls[0]:.1f} % of images and"
        f" {recalls[1]:.1f} % of captions; {costs.pairs_scored} of {costs.pairs_total} pairs scored;"
        f" search {costs.shortlist_seconds:.2f} s, rerank {costs.rerank_seconds:.2f} s."
    )

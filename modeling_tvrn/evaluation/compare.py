"""`compare`: several models on one gallery: recalls with paired intervals, and what a query, an image, a pair cost."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from ..data.training_pairs import image_inputs
from ..metrics import BootstrapComparison, Recalls, RetrievalMetrics, paired_bootstrap, recall_table
from ..redaction import redacted
from ..scoring import EmbeddingScore, ScoringOptions
from ..scoring.models import evaluating, match
from .captions import CaptionTable
from .encoding import to_device
from .protocols import find_protocol
from .report import RESAMPLES, EvaluatedModel, JsonReport
from .run import Measure, System, describe_model, encode_galleries, origin, pair_up

logger = logging.getLogger(__name__)

TIMED_QUERIES = 20
COUNTED_IMAGES, COUNTED_CAPTIONS = 4, 32  # few enough for the plain path: no counter sees into a fused program


@dataclass(frozen=True)
class ComparedScore:
    """One score of one model.

    Attributes:
        model: Its name.
        score: "pair score" or "embeddings" (their cosine alone).
        metrics: Recalls of the whole gallery in percent; with a shortlist, of search and rerank.
        milliseconds_a_query: Median wall time of one caption, encoded and scored against every image, or with a
            shortlist against the images of that.
        kilobytes_an_image: What is kept of an encoded image for this score (1000 bytes).
        operations_a_pair: Multiplications and additions in matrix products, counted while captions of the gallery's
            median length are scored.
        gain: Over the first score of the comparison, paired bootstrap over images; None of that score itself.
    """

    model: str
    score: str
    metrics: RetrievalMetrics
    milliseconds_a_query: float
    kilobytes_an_image: float
    operations_a_pair: float
    gain: BootstrapComparison | None = None

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{self.model}, {self.score}"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return found | {"metrics": self.metrics.as_dict(), "gain": None if self.gain is None else self.gain.as_dict()}


@dataclass(frozen=True)
class ComparisonReport(JsonReport):
    """The result of `compare`: `scores`, two of a model (one where it has embeddings alone), in the models' order.

    The other attributes are those of `EvaluationReport`.
    """

    protocol: str
    data: str
    split: str
    image_count: int
    caption_count: int
    gallery_fingerprint: str
    scores: list[ComparedScore]
    models: list[EvaluatedModel]
    shortlist_size: int | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    truncated_captions: int = 0
    device: str = ""
    commit: str | None = None
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    unit: str = "percent"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, without secrets; metrics and gains by their flat names."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        lists = {name: [each.as_dict() for each in found[name]] for name in ("scores", "models")}
        return dict(redacted(found | lists))

    def table(self) -> str:
        """Everything in words: recalls, then gains and costs, row by row of the same scores."""
        recalls: dict[str, Recalls] = {each.name: each.metrics for each in self.scores}
        reach = "every pair" if self.shortlist_size is None else f"shortlists of {self.shortlist_size}, reranked"
        left_out = [f"Left out of the data: {reason}: {count}" for reason, count in self.skipped.items()]
        cut = [f"Captions cut at the length limit: {self.truncated_captions}"] if self.truncated_captions else []
        return "\n".join([
            f"Protocol {self.protocol}: data {self.data or 'unnamed'}, split {self.split or 'unnamed'},"
            f" {self.image_count} images, {self.caption_count} captions, {reach}",
            f"Gallery {self.gallery_fingerprint}",
            "",
            recall_table(recalls, self.unit),
            "",
            *self._cost_table(),
            "",
            f"A query is one caption, encoded and scored alone: the median of {TIMED_QUERIES}, on {self.device}.",
            *left_out,
            *cut,
            *(f"Model {model.name or 'unnamed'} ({model.dtype}) {model.sha256}" for model in self.models),
            f"Commit {self.commit or 'unknown'}",
            f"Command: {self.command}",
        ])  # fmt: skip

    def _cost_table(self) -> list[str]:
        width = max(len(each.name) for each in self.scores)
        lines = [
            f"| {'':{width}} | {'rSum beside the first row':25} | ms a query | kB an image | kFLOP a pair |",
            f"|{'-' * (width + 2)}|{'-' * 27}|{'-' * 11}:|{'-' * 12}:|{'-' * 13}:|",
        ]
        for each in self.scores:
            gain = "" if each.gain is None else each.gain.in_words()
            costs = f"{each.milliseconds_a_query:10.2f} | {each.kilobytes_an_image:11.2f}"
            lines.append(f"| {each.name:{width}} | {gain:25} | {costs} | {each.operations_a_pair / 1000:12.1f} |")
        return lines


def compare(
    models: Sequence[Any],
    processors: Sequence[Any],
    dataset: Any,
    names: Sequence[str],
    protocol: str = "validation",
    *,
    shortlist_size: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    data: str | None = None,
    split: str | None = None,
    progress: bool = True,
) -> ComparisonReport:
    """Measure several models on one gallery, each by its embeddings and by its pair score.

    Args:
        models: At least two, as `load_model` gives them: TVRNs and dual encoders alike.
        processors: One for each.
        dataset: As of `evaluate`: one data set for all, or a tuple with one for each, of the same images.
        names: What to call the models; all different, see `check_names`.
        protocol: A named gallery with its own positives alone, as of `evaluate`.
        shortlist_size: Pair scores rerank this many candidates a query by embeddings; None: they score every pair.
        batch_size: Images, and captions, encoded at a time.
        num_workers: Processes that decode pictures.
        data, split: What the report calls them; default: as the records do.
        progress: Show progress bars with the time left.

    Returns:
        A `ComparisonReport`: `scores`, `table()`, `to_json(path)`.

    Raises:
        ValueError: If a name comes twice, a model cannot read these images, the models' data sets differ, or as
            `evaluate`.
    """
    check_names(names)
    chosen = find_protocol(protocol)
    if chosen.positives is not None:
        raise ValueError(
            f"protocol is {protocol!r}, whose further positives `compare` does not judge; expected a gallery with its "
            "own captions alone, such as 'coco-5k'. `evaluate` measures one model by it."
        )
    inputs = pair_up(list(models), list(processors), dataset)
    described = [describe_model(model, None) for model in models]
    for digest in dict.fromkeys(each.sha256 for each in described):
        same = [name for name, each in zip(names, described, strict=True) if each.sha256 == digest]
        if len(same) > 1:
            logger.warning("%s have the same weights; is one of them another model's name?", " and ".join(same))
    for name, each in zip(names, inputs, strict=True):
        _check_reads(name, *each)
    gallery: CaptionTable | None = None
    scores: list[ComparedScore] = []
    truncated = 0
    for name, each in zip(names, inputs, strict=True):
        own, [system], cut = encode_galleries([each], chosen, batch_size, num_workers, progress)
        gallery, truncated = gallery or own, max(truncated, cut)
        if own.fingerprint != gallery.fingerprint:
            raise ValueError(
                f"{names[0]!r} and {name!r} have different galleries: {gallery.image_count} images with fingerprint "
                f"{gallery.fingerprint[:12]}, {own.image_count} with {own.fingerprint[:12]}; expected the same images "
                "and captions in the same order. Give one data set for all."
            )
        measure = Measure(chosen, gallery, ScoringOptions(progress=progress))
        alone = each[0].config.components == ["first_stage"]  # a plain dual encoder's pair score is its cosine
        for score in ["embeddings"] if alone else ["pair score", "embeddings"]:
            metrics = _metrics(measure, system, score, shortlist_size)
            rows, gain = gallery.caption_image_rows, None
            if scores:
                gain = paired_bootstrap(metrics, scores[0].metrics, RESAMPLES, caption_image_rows=rows)
            with evaluating(each[0]):
                costs = _costs(system, each[1], gallery.flat_captions, score, shortlist_size)
            scores.append(ComparedScore(name, score, metrics, *costs, gain))
        del system  # one encoded gallery in memory, not this one beside the next
    assert gallery is not None
    return ComparisonReport(
        **origin(chosen, gallery, inputs, truncated, data, split),
        scores=scores,
        models=described,
        shortlist_size=shortlist_size,
    )


def check_names(names: Sequence[str]) -> None:
    """Refuse fewer than two models, and one that comes twice, under its name or another path to its folder.

    Raises:
        ValueError: says which.
    """
    places = [os.path.realpath(name) for name in names]
    repeated = [name for number, name in enumerate(names) if places[number] in places[:number]]
    if repeated:
        raise ValueError(f"{repeated[0]!r} comes twice; a model beside itself differs by nothing: name each once")
    if len(names) < 2:
        raise ValueError(
            f"compare got {len(names)} model ({', '.join(map(repr, names))}); expected at least two. `tvrn evaluate` "
            "measures one"
        )


def _check_reads(name: str, model: Any, processor: Any, dataset: Any) -> None:
    """Refuse a model that cannot read the first image, before the others are measured."""
    first = next(iter(dataset))
    try:
        with evaluating(model):
            model.encode_images(**to_device(processor(**image_inputs([first]), return_tensors="pt"), model))
    except ValueError as error:
        held = "region features" if "region_features" in first else "pictures"
        raise ValueError(
            f"{name!r} cannot read this gallery, which holds {held}: {str(error).rstrip('.')}. All models of a "
            "comparison read the same images; leave this one out, or give regions of its own for them (--regions)"
        ) from error


def _metrics(measure: Measure, system: System, score: str, shortlist_size: int | None) -> RetrievalMetrics:
    if score == "embeddings":
        return measure.embeddings(system)
    return measure.ranked(system) if shortlist_size is None else measure.searched(system, shortlist_size)


def _costs(
    system: System, processor: Any, captions: Sequence[str], score: str, shortlist_size: int | None
) -> tuple[float, float, float]:
    """Milliseconds a query, kilobytes an image, operations a pair."""
    model, images, texts = system
    embeddings = EmbeddingScore()
    scorer, level = (embeddings, "embeddings") if score == "embeddings" else (model, "full")
    seconds = []
    # The first one warms up.
    for number in [0, *np.linspace(0, len(captions) - 1, TIMED_QUERIES).astype(int)]:
        started = time.perf_counter()
        query = model.encode_texts(
            **to_device(processor(text=[captions[number]], return_tensors="pt"), model), level=level
        )
        found = images
        if scorer is model and shortlist_size is not None:
            nearest = embeddings.match(images, query)[:, 0].topk(min(shortlist_size, len(images))).indices
            found = images.select(nearest)
        match(scorer, found, query, None).argmax().item()  # which waits for a GPU
        seconds.append(time.perf_counter() - started)
    kept = sum(value.nbytes for value in images.at_level(level).tensors().values()) / len(images)
    # Captions of like length, as a block has them: padding would count as well.
    middle = max((len(texts) - COUNTED_CAPTIONS) // 2, 0)
    chosen = np.argsort(texts.lengths, kind="stable")[middle : middle + COUNTED_CAPTIONS]
    some = images.select(slice(COUNTED_IMAGES)), texts.select(chosen)
    with FlopCounterMode(display=False) as counter:
        match(scorer, *some, None)
    pairs = len(some[0]) * len(some[1])
    return 1000 * statistics.median(seconds[1:]), kept / 1000, counter.get_total_flops() / pairs

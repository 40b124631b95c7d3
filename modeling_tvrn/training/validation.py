"""Validation while training: the report that chooses the model, and the one that is published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..evaluation import evaluate
from ..metrics import Recalls, RetrievalMetrics, chance_level

if TYPE_CHECKING:
    from .config import TrainingConfig

__all__ = ["Validated", "Validation"]


@dataclass(frozen=True)
class Validated:
    """What one evaluation found."""

    pair: RetrievalMetrics
    embeddings: RetrievalMetrics | None
    chance: Recalls
    details: dict[str, Any]

    @property
    def rsum(self) -> float:
        """Of the pair score, percent of 600: what the model is chosen by."""
        return self.pair.rsum

    @property
    def metrics(self) -> dict[str, float]:
        """Of the pair score, by name."""
        return self.pair.as_dict()

    @property
    def embedding_metrics(self) -> dict[str, float] | None:
        """Of the embeddings' cosine, by name; None where it was not asked for."""
        return self.embeddings.as_dict() if self.embeddings is not None else None

    def history(self) -> dict[str, float]:
        """Recalls for the history and the trackers; the embeddings' with a prefix."""
        found = dict(Recalls.as_dict(self.pair))
        if self.embeddings is not None:
            found |= {f"embeddings_{name}": value for name, value in Recalls.as_dict(self.embeddings).items()}
        return found

    def summary(self) -> str:
        """One line for the log."""
        first = self.pair.image_to_text[1], self.pair.text_to_image[1]
        text = f"rSum {self.pair.rsum:.1f}, R@1 image→text {first[0]:.1f}, text→image {first[1]:.1f}"
        return text + (f", embeddings alone {self.embeddings.rsum:.1f}" if self.embeddings is not None else "")

    def systems(self) -> dict[str, Recalls]:
        """Rows of the table of results."""
        rows: dict[str, Recalls] = {"TVRN": self.pair}
        if self.embeddings is not None:
            rows["its embeddings alone"] = self.embeddings
        return rows | {"chance": self.chance}


class Validation:
    def __init__(self, config: TrainingConfig, records: Any, processor: Any) -> None:
        self.config = config
        self.processor = processor
        self.records = records
        few = config.evaluation_images
        self.subset = records if few is None or few >= len(records) else records.select(range(few))
        self._latest: tuple[int, Validated] | None = None

    def run(self, model: Any) -> Validated:
        return self._evaluate(model, self.subset)

    def final(self, model: Any, step: int) -> Validated:
        return self._evaluate(model, self.records)

    def _evaluate(self, model: Any, records: Any) -> Validated:
        report = evaluate(
            model, self.processor, records, protocol="validation",
            batch_size=self.config.evaluation_batch_size, chunk_size=self.config.evaluation_chunk_size,
        )  # fmt: skip
        rows = [row for row, captions in enumerate(records.captions) for _ in captions]
        return Validated(report.metrics, report.embedding_metrics, chance_level(len(records), len(rows), rows), {})

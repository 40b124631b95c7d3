"""What a dual encoder finds: across modalities, and among the captions alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...metrics import RetrievalMetrics, retrieval_metrics, unimodal_metrics
from .data import DualEncoderCollator
from .model import UnimodalHeads, features

__all__ = ["evaluate_dual_encoder"]


@torch.no_grad()
def evaluate_dual_encoder(
    model: Any, collator: DualEncoderCollator, records: Any, heads: UnimodalHeads | None = None, batch_size: int = 64
) -> dict[str, float]:
    """Recalls across modalities, and of captions of the same image, in percent.

    Returns:
        The names of `RetrievalMetrics.as_dict`, `text_R@1` of the embeddings and, with heads, `text_heads_R@1`.
    """
    training = model.training
    model.eval()
    captions = [caption for of_image in records.captions for caption in of_image]
    rows = np.repeat(np.arange(len(records)), [len(of_image) for of_image in records.captions])
    images = torch.cat(
        [
            features(model, "image", collator.images([records[row]["image"] for row in part]))
            for part in _parts(len(records), batch_size)
        ]
    )
    texts = torch.cat(
        [
            features(model, "text", collator.texts([captions[row] for row in part]))
            for part in _parts(len(captions), batch_size)
        ]
    )
    metrics: RetrievalMetrics = retrieval_metrics(images @ texts.T, rows)
    found = {**metrics.as_dict(), "text_R@1": unimodal_metrics(texts, rows.tolist()).recall[1]}
    if heads is not None:
        device = next(heads.parameters()).device
        found["text_heads_R@1"] = unimodal_metrics(heads.text(texts.to(device)).cpu(), rows.tolist()).recall[1]
    model.train(training)
    return {name: float(value) for name, value in found.items()}


def _parts(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]

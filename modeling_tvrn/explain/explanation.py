"""What an explanation says, as numbers: what computes them and what draws them both read this."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image


@dataclass(frozen=True)
class WordExplanation:
    """What one word of the caption says about the image.

    Attributes:
        text: The word as written.
        span: Its characters in the caption; None where the tokenizer keeps no offsets.
        contribution: Its part of the logit, `reasoning` + `late_interaction`; all parts add up to the logit. None for
            an SGR head, whose nodes mix.
        reasoning: Its part of the reasoning's weighted mean, with the reasoning's weight in the logit; None for SGR.
        late_interaction: Its part of late interaction, likewise weighted; None for a model without that component.
        weight: Its share of the weighted mean, 0 to 1; the words' shares and the global one's sum to 1. None for SGR.
        saliency: ω, how much the image as a whole calls for this word; the mean over a caption's tokens is 1.
        without: Logit of the caption minus logit of the caption without this word: above 0 the word speaks for the
            pair, below 0 it costs. None for a caption of one word, or where it was not asked for.
        attention: (R,) where it looks, summing to 1 over the regions.
    """

    text: str
    span: tuple[int, int] | None
    contribution: float | None
    reasoning: float | None
    late_interaction: float | None
    weight: float | None
    saliency: float
    without: float | None
    attention: np.ndarray


@dataclass(frozen=True)
class ExplanationData:
    """One pair's score, taken apart.

    Attributes:
        caption: The caption.
        picture: What the model saw of the photograph; None for bare features.
        words: The caption's words.
        boxes: (R, 4) xyxy in [0, 1] of the picture; None where the model was given none.
        grid: (rows, columns) where the regions are a grid.
        region_saliency: (R,) a^v, what the global image vector holds important; sums to 1.
        region_without: (R,) what the logit loses without each region, at most above 0 for those it rests on; None for
            one region, or where it was not asked for.
        logit: The pair logit, as `model.match` gives it.
        parts: Name -> number, adding up to `logit`: for SAF "words" (the sum of their reasoning), "global", "head
            bias"; for SGR "graph", which does not come apart; and, where the model has the component, "late
            interaction" (a sum over the words) and "first stage" (a scaled cosine).
        cosine: Of the two embeddings.
        head: "saf" or "sgr".
        calibration: Scale and shift that the model's score applies to the logit.
        score_kind: What `score` is called, as `model.score_kind`.
    """

    caption: str
    picture: PIL.Image.Image | None
    words: tuple[WordExplanation, ...]
    boxes: np.ndarray | None
    grid: tuple[int, int] | None
    region_saliency: np.ndarray
    region_without: np.ndarray | None
    logit: float
    parts: dict[str, float]
    cosine: float
    head: str
    calibration: tuple[float, float] = (1.0, 0.0)
    score_kind: str = "matching score"

    @property
    def score(self) -> float:
        """Matching score: the sigmoid of the calibrated logit, as `model.scores` gives it."""
        scale, shift = self.calibration
        logit = scale * self.logit + shift
        return 1 / (1 + math.exp(-logit)) if logit >= 0 else 1 - 1 / (1 + math.exp(logit))

    @property
    def attention(self) -> np.ndarray:
        """(W, R) of all words; rows sum to 1."""
        return np.stack([word.attention for word in self.words])

    @property
    def region_weight(self) -> np.ndarray:
        """(R,) where the caption as a whole looks: the words' attention, weighted as the score does; sums to 1."""
        weights = np.array([word.saliency if word.weight is None else word.weight for word in self.words])
        return weights @ self.attention / weights.sum()

    @property
    def region(self) -> int:
        """The region that the score rests on most; where that was not asked for, the one the caption looks at most."""
        return int((self.region_weight if self.region_without is None else self.region_without).argmax())

    def as_dict(self) -> dict[str, Any]:
        """Everything but the picture, as JSON values."""
        words = [dataclasses.asdict(word) | {"attention": word.attention.tolist()} for word in self.words]
        return {
            "caption": self.caption,
            "logit": self.logit,
            "score": self.score,
            "score_kind": self.score_kind,
            "head": self.head,
            "cosine": self.cosine,
            "parts": self.parts,
            "words": words,
            "boxes": None if self.boxes is None else self.boxes.tolist(),
            "grid": self.grid,
            "region_saliency": self.region_saliency.tolist(),
            "region_weight": self.region_weight.tolist(),
            "region_without": None if self.region_without is None else self.region_without.tolist(),
        }

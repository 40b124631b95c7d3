"""What an explanation says, as numbers: what computes them and what draws them both read this."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

TOGETHER = "(together)"
ROUNDING = 1e-3  # of the logit: what float32, or a score that reads no regions, may leave
FAINT = 0.1  # of the most that a region does for any word: below that nothing is shown


@dataclass(frozen=True)
class WordExplanation:
    """What one word of the caption says about the image.

    Attributes:
        text: The word as written.
        span: Its characters in the caption; None where the tokenizer keeps no offsets.
        contribution: Logit of the caption minus logit of the caption without this word: above 0 the word speaks for
            the pair, below 0 against it. Of a caption's only word, the whole logit.
        by_region: (R,) what of `contribution` is lost with each region; None where that was not asked for, there is
            one region, or the score reads none.
        attention: (R,) the reasoning's weights, summing to 1; None of a model without reasoning.
        saliency: ω, how much the reasoning says that the image calls for this word: 1 on average over a caption's
            tokens; None without reasoning.
    """

    text: str
    span: tuple[int, int] | None
    contribution: float
    by_region: np.ndarray | None
    attention: np.ndarray | None
    saliency: float | None


@dataclass(frozen=True)
class ExplanationData:
    """One pair's score, taken apart.

    Attributes:
        caption: The caption.
        picture: The photograph, as it was given; None for bare features.
        words: The caption's words.
        boxes: (R, 4) xyxy in [0, 1] of the picture; None where the model was given none.
        grid: (rows, columns) where the regions are a grid.
        by_region: (R,) logit minus logit without each region, as a word's `by_region`; None as there.
        region_saliency: (R,) a^v, what the global image vector holds important, summing to 1; None without reasoning.
        logit: The pair logit, as `model.match` gives it.
        components: Name -> number as `model.score_components` gives them, adding up to `logit`.
        score: What the model makes of the logit to be read.
        score_kind: What `score` is called, as `model.score_kind`.
    """

    caption: str
    picture: PIL.Image.Image | None
    words: tuple[WordExplanation, ...]
    boxes: np.ndarray | None
    grid: tuple[int, int] | None
    by_region: np.ndarray | None
    region_saliency: np.ndarray | None
    logit: float
    components: dict[str, float]
    score: float
    score_kind: str

    @property
    def together(self) -> float:
        """What of the logit no single word has: they share it, or have it only jointly."""
        return self.logit - sum(word.contribution for word in self.words)

    @property
    def summands(self) -> list[tuple[str, float]]:
        """(name, number) of each word and of what they have together, to two decimals, which add up to `total`."""
        words = [(word.text, round(word.contribution, 2)) for word in self.words]
        return [*words, (TOGETHER, round(self.total - sum(number for _, number in words), 2))]

    @property
    def total(self) -> float:
        """The logit to two decimals."""
        return round(self.logit, 2)

    @property
    def cells(self) -> np.ndarray | None:
        """(R, 4) xyxy in [0, 1] of the picture: the cells of a grid, whose boxes overlap, or the boxes."""
        if self.grid is None or self.boxes is None:
            return self.boxes
        rows, columns = self.grid
        low, high = self.boxes[:, :2].min(axis=0), self.boxes[:, 2:].max(axis=0)
        down, across = (each.flatten() for each in np.mgrid[:rows, :columns])
        unit = np.stack([across / columns, down / rows, (across + 1) / columns, (down + 1) / rows], axis=1)
        return np.tile(low, 2) + unit * np.tile(high - low, 2)

    def strength(self, by_region: np.ndarray | None) -> np.ndarray | None:
        """(R,) how strongly to show each region, from 0 to 1 for the one that speaks for a word most.

        None where none speaks for it as it would for other words: there is nothing to show then.

        Args:
            by_region: (R,) of a word, or of the whole.
        """
        if by_region is None:
            return None
        most = float(by_region.max())
        of_words = [float(word.by_region.max()) for word in self.words if word.by_region is not None]
        least = max(FAINT * max(most, *of_words), ROUNDING * max(1.0, abs(self.logit)))
        return by_region.clip(min=0) / most if most > least else None

    @property
    def attention(self) -> np.ndarray | None:
        """(W, R) of all words; rows sum to 1."""
        rows = [word.attention for word in self.words if word.attention is not None]
        return np.stack(rows) if rows else None

    def as_dict(self) -> dict[str, Any]:
        """Everything but the picture, as JSON values."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "picture"}
        values["words"] = [vars(word) for word in self.words]
        return _plain(values | {"together": self.together})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.tolist() if isinstance(value, np.ndarray) else value

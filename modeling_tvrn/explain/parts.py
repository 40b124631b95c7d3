"""`explain`: one pair's score taken apart, by leaving words and regions out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..encoded_tvrn import EncodedImages, EncodedTexts
from .caption import CaptionWord, caption_words, without_each_word
from .explanation import ExplanationData, WordExplanation
from .scene import grid_shape, on_photograph, read_scene

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES_AT_ONCE = 64  # of those without one region


class Explanation(ExplanationData):
    """One pair's score, taken apart: the numbers of `ExplanationData`, and what shows them."""

    def table(self) -> str:
        """The numbers as lines of text."""
        from .page import text_table

        return text_table(self)

    def figure(self, **options: Any) -> Figure:
        """A matplotlib figure: the words as bars, and what in the picture they rest on; see `picture.draw`."""
        from .picture import draw

        return draw(self, **options)

    def save_picture(self, path: str | Path, **options: Any) -> Path:
        """Write `figure` as a PNG."""
        from ..plots import save_figure

        return save_figure(self.figure(**options), path)

    def to_html(self) -> str:
        """One self-contained page: click on a word to see what in the picture it rests on."""
        from .page import html_page

        return html_page(self)

    def save_html(self, path: str | Path) -> Path:
        """Write `to_html` to a file."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.to_html(), encoding="utf-8")
        return target


def explain(model: Any, processor: Any, image: Any, text: str, *, leave_out_regions: bool = True) -> Explanation:
    """Take one pair's score apart: what every word adds to the logit or costs, and on which regions that rests.

    A word's number is the logit minus that of the caption without the word, exactly what the model says, whatever its
    components; what no single word has stands beside them as `together`, so that all add up to the logit. One text a
    word is scored. The sums that late interaction and reasoning take over words would be free, but say something else:
    a word that does not fit adds less there than others, and still adds. In captions of generated scenes with one
    colour made wrong, that word had the lowest number in 83 % by leaving out, in 14 % by those sums, and in 57 % by
    Shapley values of 64 orders (examples/benchmarks/explanations.py has the first). Likewise for regions: what of a
    word's number is lost with each, of every word and region by one block of pairs.

    Args:
        model: A `TVRNModel`, or a dual encoder as `load_model` gives it; dropout is off meanwhile.
        processor: Its processor.
        image: A PIL image, path, encoded bytes or uint8 array; or a record with `region_features` (R, F),
            `region_boxes` (R, 4) and perhaps `image`, to draw on.
        text: The caption.
        leave_out_regions: Also score the image without each of its regions (as many images more).

    Raises:
        ValueError: On an image or a caption that the processor or the model refuses.
    """
    if not isinstance(text, str):
        raise ValueError(f"text is a {type(text).__name__}; explain takes one caption, a string")
    with _evaluating(model):
        scene = read_scene(model, processor, image)
        images = model.encode_images(**scene.inputs)
        inputs = {name: value.to(images.embeds.device) for name, value in processor(text=[text]).items()}
        texts = model.encode_texts(**inputs)
        words = caption_words(processor.tokenizer, text, inputs["input_ids"][0], inputs["word_mask"][0])
        captions = [texts]  # and without each of its words; without its only word it would be empty
        if len(words) > 1:
            captions.append(model.encode_texts(**without_each_word(inputs, words, processor.tokenizer.pad_token_id)))
        logits = _logits(model, images, captions)  # (1, 1 + W)
        contributions = _contributions(logits)[0]
        mask = scene.inputs["region_mask"][0].bool()
        by_region = words_by_region = None
        if leave_out_regions and mask.sum() > 1:
            without = [_logits(model, each, captions) for each in _images_without_a_region(model, scene.inputs)]
            lost = np.concatenate([_contributions(each) for each in without])  # (R, W)
            words_by_region = (contributions - lost).T
            by_region = logits[0, 0] - np.concatenate(without)[:, 0]
        components = {name: float(value) for name, value in model.score_components(images, texts).items()}
        reasoning = _Reasoning(model, images, texts) if model.config.use_reasoning else None
    boxes = _plain(scene.inputs["region_boxes"][0][mask]) if "region_boxes" in scene.inputs else None
    grid = None if boxes is None else grid_shape(boxes)
    if boxes is not None and scene.picture is not None and scene.resized:
        boxes = on_photograph(boxes, processor, scene.picture)
    return Explanation(
        caption=text,
        picture=scene.picture,
        words=tuple(
            WordExplanation(
                text=word.text,
                span=word.span,
                contribution=float(contributions[k]),
                by_region=None if words_by_region is None else words_by_region[k],
                **({"attention": None, "saliency": None} if reasoning is None else reasoning.of(word)),
            )
            for k, word in enumerate(words)
        ),
        boxes=boxes,
        grid=grid,
        by_region=by_region,
        region_saliency=None if reasoning is None else reasoning.region_saliency,
        logit=float(logits[0, 0]),
        components=components,
        score=float(model.readable_scores(torch.tensor(logits[0, 0]))),
        score_kind=model.score_kind,
    )


def _logits(model: Any, images: EncodedImages, captions: list[EncodedTexts]) -> np.ndarray:
    """(I, 1 + W): of the caption, and of it without each word."""
    return np.concatenate([_plain(model.match(images, each)) for each in captions], axis=1)


def _contributions(logits: np.ndarray) -> np.ndarray:
    """(I, 1 + W) -> (I, W): what each word adds; the only word of a caption has the whole logit."""
    return logits[:, :1] - logits[:, 1:] if logits.shape[1] > 1 else logits


def _images_without_a_region(model: Any, inputs: dict[str, Tensor]) -> Iterator[EncodedImages]:
    """The image without each of its regions, some at a time."""
    mask = inputs["region_mask"].bool()
    valid = mask[0].nonzero().flatten()
    masks = mask.repeat(len(valid), 1)
    masks[torch.arange(len(valid), device=masks.device), valid] = False
    for part in masks.split(IMAGES_AT_ONCE):
        repeated = {name: value.expand(len(part), *value.shape[1:]) for name, value in inputs.items()}
        yield model.encode_images(**repeated | {"region_mask": part})


class _Reasoning:
    """What the reasoning weighs in one pair: regions for each word, words, regions."""

    # Any: at the full level no field is None that a model with reasoning has.
    def __init__(self, model: Any, images: Any, texts: Any):
        stage = model.pair
        refined, norm = stage.refine(images, texts, model.attention, model.textual_refinement)
        attention, saliency = stage.attend(images, refined, norm, stage.text_tokens(texts)[0])
        self._attention, self._saliency = _plain(attention[0, 0]), _plain(saliency[0, 0])
        self._positions = texts.word_positions[0].tolist()
        self._doubled = texts.recurrent_words is not None
        self._regions, self._valid = images.region_mask.shape[1], int(images.region_mask[0].sum())
        mask = _plain(images.refined_region_mask[0]) > 0
        self.region_saliency = self._by_region(np.where(mask, np.exp(_plain(images.refined_region_saliency[0])), 0.0))

    def of(self, word: CaptionWord) -> dict[str, Any]:
        """`attention` (R,) and `saliency` of a word: of its tokens, and with `refinement="gru"` their expansions."""
        columns = [self._positions.index(position) for position in word.positions]
        if self._doubled:
            columns += [len(self._positions) + column for column in columns]
        saliency = self._saliency[columns]
        attention = np.average(self._attention[columns], axis=0, weights=saliency if saliency.sum() > 0 else None)
        return {"attention": self._by_region(attention), "saliency": float(saliency.mean())}

    def _by_region(self, tokens: np.ndarray) -> np.ndarray:
        """(N,) numbers of the image's tokens -> (R,) of its valid regions; a region and its context are one."""
        return tokens.reshape(-1, self._regions).sum(axis=0)[: self._valid]


def _plain(value: Tensor) -> np.ndarray:
    return value.detach().double().cpu().numpy()


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No gradients and no dropout meanwhile."""
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        model.train(training)

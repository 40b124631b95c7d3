"""`explain`: one pair's score taken apart, through the model's own pair stage."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..encoded_tvrn import EncodedImages, EncodedTexts
from .caption import CaptionWord, caption_words, without_each_word
from .explanation import ExplanationData, WordExplanation
from .scene import grid_shape, read_scene

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What float32 leaves of a sum of a few dozen numbers, relative to the logit.
TOLERANCE = 1e-4
IMAGES_AT_ONCE = 64  # of those without one region


class Explanation(ExplanationData):
    """One pair's score, taken apart: the numbers of `ExplanationData`, and what shows them."""

    def table(self) -> str:
        """The numbers as lines of text."""
        from .page import text_table

        return text_table(self)

    def figure(self, **options: Any) -> Figure:
        """A matplotlib figure: the parts as bars, and where each word looks; see `picture.draw`."""
        from .picture import draw

        return draw(self, **options)

    def save_picture(self, path: str | Path, **options: Any) -> Path:
        """Write `figure` as a PNG."""
        from ..plots import save_figure

        return save_figure(self.figure(**options), path)

    def to_html(self) -> str:
        """One self-contained page: click on a word to see where it looks."""
        from .page import html_page

        return html_page(self)

    def save_html(self, path: str | Path) -> Path:
        """Write `to_html` to a file."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.to_html(), encoding="utf-8")
        return target


def explain(model: Any, processor: Any, image: Any, text: str, *, leave_out: bool = True) -> Explanation:
    """Take one pair's score apart: which word looks where, and what it adds to the score.

    With a SAF head the reasoning is a weighted mean of one number a word and a global one, plus a bias; late
    interaction is a sum over words, and the first stage one number: all of it comes apart exactly. An SGR head passes
    its nodes through three ReLU layers: its part of the logit stays whole, and what a word matters is the difference
    that leaving it out makes (`WordExplanation.without`).

    Args:
        model: A `TVRNModel`; dropout is off meanwhile.
        processor: Its processor.
        image: A PIL image, path, encoded bytes or uint8 array; or a record with `region_features` (R, F),
            `region_boxes` (R, 4) and perhaps `image`, to draw on.
        text: The caption.
        leave_out: Also score the caption without each of its words, and the image without each of its regions (as many
            texts and images more). Where a word looks is not what the score rests on; this tells.

    Raises:
        ValueError: On an image or a caption that the processor or the model refuses, or a model without reasoning.
        RuntimeError: If the parts do not give the score: it has a component that is not known here.
    """
    if not model.config.use_reasoning:
        raise ValueError(
            f"this model's score has the components {model.config.components} and no reasoning, so there is nothing "
            "to take apart by words; explain a model with use_reasoning=True (of a dual encoder: one whose heads were "
            "trained, tvrn train dual_encoder=…)"
        )
    if not isinstance(text, str):
        raise ValueError(f"text is a {type(text).__name__}; explain takes one caption, a string")
    with _evaluating(model):
        scene = read_scene(model, processor, image)
        images = model.encode_images(**scene.inputs)
        device = images.refined_regions.device
        inputs = {name: value.to(device) for name, value in processor(text=[text], return_tensors="pt").items()}
        texts = model.encode_texts(**inputs)
        pair = _Pair(model, images, texts)
        words = caption_words(processor.tokenizer, text, inputs["input_ids"][0], inputs["word_mask"][0])
        parts = pair.parts()
        without = None
        if leave_out and len(words) > 1:
            shorter = without_each_word(inputs, words, processor.tokenizer.pad_token_id)
            without = _left_out(model, images, shorter, pair.logit)
        regions = _regions_left_out(model, scene.inputs, texts, pair.logit) if leave_out else None
    boxes = _valid(images.region_boxes, images.region_mask)
    return Explanation(
        caption=text,
        picture=scene.picture,
        words=tuple(pair.word(word, None if without is None else without[k]) for k, word in enumerate(words)),
        boxes=boxes,
        grid=grid_shape(boxes),
        region_saliency=pair.region_saliency(),
        region_without=regions,
        logit=pair.logit,
        parts=parts,
        cosine=float(images.embeds[0].double() @ texts.embeds[0].double()),
        head=str(model.config.similarity_head),
        calibration=(float(model.calibration_scale), float(model.calibration_shift)),
        score_kind=model.score_kind,
    )


class _Pair:
    """One image against one text: the pair stage's inner numbers, in float64 on the CPU from here on."""

    # Any: at the full level no field is None that a model with reasoning has.
    def __init__(self, model: Any, images: Any, texts: Any):
        stage = model.pair
        self.images, self.texts, self.stage = images, texts, stage
        self.logit = model.match(images, texts).item()
        self.components = {name: value.item() for name, value in model.score_components(images, texts).items()}
        refined, scale = stage.refine(images, texts, model.attention, model.textual_refinement)
        mask, _ = stage.text_tokens(texts)
        attention, saliency = stage.attend(images, refined, scale, mask)
        self.attention, self.saliency = _plain(attention[0, 0]), _plain(saliency[0, 0])
        self.mixing = self.reasoning = None
        nodes, weights = stage.nodes(images, texts, model.attention, model.textual_refinement)
        if hasattr(stage.head, "parts"):
            mixing, votes = (_plain(part[0]) for part in stage.head.parts(nodes, weights))
            self.mixing, self.reasoning = mixing, votes * self.weight("reasoning")
        self.late = self._late_interaction_parts() if "late_interaction" in self.components else None
        self.positions = self.texts.word_positions[0].tolist()

    def weight(self, name: str) -> float:
        """The learned weight of a component."""
        return float(self.stage.weight(name))

    def _late_interaction_parts(self) -> np.ndarray:
        """(W,) the words' parts of late interaction: linear in their weights, so taken one word at a time."""
        width = self.texts.word_weights.shape[1]
        alone = self.texts.select([0] * width)
        alone = dataclasses.replace(alone, word_weights=torch.diag_embed(self.texts.word_weights[0]))
        return _plain(self.stage.late_interaction(self.images, alone)[0]) * self.weight("late_interaction")

    def parts(self) -> dict[str, float]:
        """The logit's parts.

        Raises:
            RuntimeError: If they do not add up to it.
        """
        parts = self._reasoning_parts()
        if self.late is not None:
            parts["late interaction"] = float(self.late.sum())
        if "first_stage" in self.components:
            parts["first stage"] = self.components["first_stage"]
        total = sum(parts.values())
        if abs(total - self.logit) > TOLERANCE * max(1.0, abs(self.logit)):
            raise RuntimeError(
                f"the parts {parts} add up to {total}, but the model's logit is {self.logit}: its score has a "
                "component that explain does not know; update modeling_tvrn, or report this"
            )
        return parts

    def _reasoning_parts(self) -> dict[str, float]:
        if self.mixing is None or self.reasoning is None:
            return {"graph": self.components["reasoning"]}
        shares = self.mixing / self.mixing.sum() * self.reasoning
        bias = self.stage.head.logit.bias.item() * self.weight("reasoning")
        return {"words": float(shares[1:].sum()), "global": float(shares[0]), "head bias": bias}

    def word(self, word: CaptionWord, without: float | None) -> WordExplanation:
        """What a word says: its tokens, and with `refinement="gru"` their expansions too."""
        columns = [self.positions.index(position) for position in word.positions]
        late = None if self.late is None else float(self.late[columns].sum())
        if self.texts.recurrent_words is not None:
            columns += [len(self.positions) + column for column in columns]
        saliency = self.saliency[columns]
        weights, reasoning, weight = saliency, None, None
        if self.mixing is not None and self.reasoning is not None:
            nodes = [1 + column for column in columns]  # node 0 is the global one
            weights = self.mixing[nodes]
            weight = float(weights.sum() / self.mixing.sum())
            reasoning = float((weights * self.reasoning[nodes]).sum() / self.mixing.sum())
        attention = np.average(self.attention[columns], axis=0, weights=weights if weights.sum() > 0 else None)
        return WordExplanation(
            text=word.text,
            span=word.span,
            contribution=None if reasoning is None else reasoning + (late or 0.0),
            reasoning=reasoning,
            late_interaction=late,
            weight=weight,
            saliency=float(saliency.mean()),
            without=without,
            attention=self._by_region(attention),
        )

    def region_saliency(self) -> np.ndarray:
        """a^v (R,) of the valid regions."""
        mask = _plain(self.images.refined_region_mask[0]) > 0
        return self._by_region(np.where(mask, np.exp(_plain(self.images.refined_region_saliency[0])), 0.0))

    def _by_region(self, tokens: np.ndarray) -> np.ndarray:
        """(N,) numbers of the image's tokens -> (R,) of its valid regions; a region and its context are one."""
        regions = self.images.region_mask.shape[1]
        by_region = tokens.reshape(-1, regions).sum(axis=0)
        return by_region[: int(self.images.region_mask[0].sum())]


def _left_out(model: Any, images: EncodedImages, inputs: dict[str, Tensor], logit: float) -> list[float]:
    """What the logit loses with each of the texts in the caption's place."""
    texts = model.encode_texts(**inputs)
    return [logit - float(other) for other in model.match(images, texts)[0]]


def _regions_left_out(model: Any, inputs: dict[str, Tensor], texts: EncodedTexts, logit: float) -> np.ndarray | None:
    """(R,) of the valid regions; None where there is only one."""
    features = inputs["region_features"]
    mask = inputs.get("region_mask", features.new_ones(features.shape[:2])).bool()
    valid = mask[0].nonzero().flatten()
    if len(valid) < 2:
        return None
    masks = mask.repeat(len(valid), 1)
    masks[torch.arange(len(valid), device=masks.device), valid] = False
    logits = []
    for part in masks.split(IMAGES_AT_ONCE):
        repeated = {name: value.expand(len(part), *value.shape[1:]) for name, value in inputs.items()}
        logits.append(model.match(model.encode_images(**repeated | {"region_mask": part}), texts)[:, 0])
    return logit - _plain(torch.cat(logits))


def _valid(boxes: Tensor | None, mask: Tensor) -> np.ndarray | None:
    return None if boxes is None else _plain(boxes[0])[: int(mask[0].sum())]


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

"""One training step's loss: what is left out of the batch, what the processes exchange, and which losses enter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..configuration_tvrn import PIXEL_INPUTS
from ..encoded_tvrn import EncodedItems
from ..losses import matching_loss_floor
from .cusa import CUSATerms, labelled_similarities, take_teachers, unimodal_embeds
from .distributed import gather_counts, gather_items, gather_rows
from .phases import ALL, LEVELS, PhaseConfig, learning_in

__all__ = ["Objective", "drop_valid"]


def drop_valid(mask: Tensor, probability: float) -> Tensor:
    """A mask (N, L) without a random share of its valid positions; one valid position of each row at least stays."""
    draws = torch.rand(mask.shape, device=mask.device)
    valid = mask.bool()
    keep = valid & (draws >= probability)
    certain = draws.masked_fill(~valid, -1.0).argmax(dim=1, keepdim=True)
    keep = keep.scatter(1, certain, True) & valid
    return keep.to(mask.dtype)


@dataclass
class Sides:
    """A batch taken apart: what the image side, the text side and the losses read.

    Attributes:
        images, texts: the model's inputs, the item first in each.
        image_ids, text_image_ids: (I,) and (T,) what decides positives.
        is_padding: whether this process has no share of the global batch, and the items are there to keep it in step.
        teachers: vectors of CUSA's teachers, one row a caption; empty without CUSA.
    """

    images: dict[str, Tensor]
    texts: dict[str, Tensor]
    image_ids: Tensor
    text_image_ids: Tensor
    is_padding: bool = False
    teachers: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: dict[str, Any]) -> Sides:
        """From what the collator makes."""
        rest = {name: value for name, value in batch.items() if name != "return_loss"}
        ids = rest.pop("image_ids"), rest.pop("text_image_ids")
        is_padding, teachers = bool(rest.pop("is_padding", False)), take_teachers(rest)
        images = {
            name: rest.pop(name)
            for name in list(rest)
            if name in PIXEL_INPUTS or name.startswith(("region", "image_"))
        }
        return cls(images, rest, *ids, is_padding, teachers)


class Objective(nn.Module):
    """A model with its training loss: what accelerate prepares and calls.

    Among several processes each encodes its share of the batch and scores its images against the captions of all;
    every process then computes the loss of the whole global batch (`distributed` says why the gradients are right).

    Args:
        model: a TVRNModel.
        word_dropout, region_dropout: probability that a word or region is left out of a step.
        cusa: soft labels of teachers beside the model's own loss; the batches then carry the teachers' vectors.

    Attributes:
        learning: what a step computes and learns; of a new objective everything, see `enter`.
    """

    def __init__(
        self, model: Any, word_dropout: float = 0.0, region_dropout: float = 0.0, cusa: CUSATerms | None = None
    ) -> None:
        super().__init__()
        self.cusa = cusa
        self.model = model
        self.word_dropout = word_dropout
        self.region_dropout = region_dropout
        self.learning = learning_in([ALL])

    def enter(self, phase: PhaseConfig) -> None:
        """Compute and lose what this phase's steps do from here on."""
        self.learning = phase.learning
        self.word_dropout, self.region_dropout = phase.word_dropout, phase.region_dropout

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Loss, its parts and, where pairs are scored, the logits.

        Args:
            batch: the model's inputs with `image_ids` and `text_image_ids`, as the collator makes them.

        Returns:
            `loss` scalar; `parts` name -> detached scalar, the matching loss above its floor; `logits` (I, T) or
            None; `image_ids (I,)` and `text_image_ids (T,)`; all of the global batch.
        """
        sides = Sides.of(batch)
        return self.score(self.encode_images(sides.images), self.encode_texts(sides.texts), sides)

    def encode_images(self, inputs: dict[str, Tensor]) -> EncodedItems:
        """The image side without the regions that this step leaves out, as far as its phase needs it."""
        inputs = given = dict(inputs)
        if self.training and self.region_dropout:
            if "pixel_values" in given:
                pixels = {name: given.pop(name) for name in PIXEL_INPUTS if name in given}
                given |= self.model.extract_image_features(**pixels)
            inputs = {**given, "region_mask": drop_valid(given["region_mask"], self.region_dropout)}
        if self.learning.distils:
            return self._with_source(self.model.encode_images, given, inputs)
        return cast(EncodedItems, self.model.encode_images(**inputs, level=self.learning.computes))

    def encode_texts(self, inputs: dict[str, Tensor]) -> EncodedItems:
        """The text side without the words that this step leaves out, as far as its phase needs it."""
        given = inputs
        if self.training and self.word_dropout:
            inputs = {**given, "word_mask": drop_valid(given["word_mask"], self.word_dropout)}
        if self.learning.distils:
            return self._with_source(self.model.encode_texts, given, inputs)
        return cast(EncodedItems, self.model.encode_texts(**inputs, level=self.learning.computes))

    def _with_source(
        self, encode: Callable[..., EncodedItems], whole: dict[str, Tensor], inputs: dict[str, Tensor]
    ) -> EncodedItems:
        """Embeddings that learn beside the words or regions that they learn from: these whole, without dropout."""
        embeds = encode(**inputs, level="embeddings").tensors()["embeds"]
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return replace(encode(**whole, level="late_interaction"), embeds=embeds)  # type: ignore[call-arg]
        finally:
            self.model.train(training)

    def score(self, images: Any, texts: Any, sides: Sides) -> dict[str, Any]:
        """The loss of the global batch from this process's encoded share; returns what `forward` does."""
        own = slice(0, 0) if sides.is_padding else slice(None)
        image_ids, text_ids = sides.image_ids[own], sides.text_image_ids[own]
        image_counts, text_counts = gather_counts(len(image_ids), len(text_ids), device=image_ids.device)
        ids = gather_rows(image_ids, image_counts), gather_rows(text_ids, text_counts)
        embeds = gather_rows(images.embeds[own], image_counts), gather_rows(texts.embeds[own], text_counts)
        model, learning, logits = self.model, self.learning, None
        terms: dict[str, Tensor] = {}
        if learning.computes != LEVELS[0]:
            captions = gather_items(texts.select(own), text_counts)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not learning.distils):
                terms = model.unweighted_components(images, captions, level=learning.computes)
            terms = {name: gather_rows(term[own], image_counts) for name, term in terms.items()}
            with torch.no_grad():
                logits = model.pair_logits(model.weigh_components(terms))
        loss, parts = model.training_loss(terms, *embeds, *ids, losses=learning.losses)
        if "matching" in parts:  # what is left to gain: the floor depends on the batch's size alone
            parts["matching"] = parts["matching"] - matching_loss_floor(*ids)
        if self.cusa is not None:
            teachers = {name: gather_rows(value[own], text_counts) for name, value in sides.teachers.items()}
            extra, extra_parts = self._soft_labels(teachers, embeds, ids, terms)
            loss, parts = loss + extra, parts | extra_parts
        return {"loss": loss, "parts": parts, "logits": logits, "image_ids": ids[0], "text_image_ids": ids[1]}

    def _soft_labels(
        self,
        teachers: dict[str, Tensor],
        embeds: tuple[Tensor, Tensor],
        ids: tuple[Tensor, Tensor],
        terms: dict[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """CUSA's term, for the similarities that learn."""
        assert self.cusa is not None
        if "embeddings" not in self.learning.labelled:
            embeds = embeds[0].detach(), embeds[1].detach()
        found = labelled_similarities(self.model, terms, self.cusa.embeddings.on_logits)
        labelled = {name: value for name, value in found.items() if name in self.learning.labelled}
        unimodal = unimodal_embeds(self.model, *embeds)
        result = self.cusa(teachers, *embeds, *ids, unimodal, labelled, self.model.logit_scale)
        return cast(tuple[Tensor, dict[str, Tensor]], result)

    # -- bounded memory -------------------------------------------------------------------------------------------

    def cached_backward(self, batch: dict[str, Any], size: int, backward: Callable[[Tensor], None]) -> dict[str, Any]:
        """Forward and backward with the towers running over `size` items at a time, twice.

        First without gradients, to get every item's features; the losses' gradient with respect to these is kept; then
        once more, a few items at a time, to carry it on into the towers (Gao et al., "Scaling deep contrastive
        learning batch size under memory limited setup", 2021). Towers need the memory of `size` items, whatever the
        batch. The gradients are those of `forward`, on each process its own part: they have to be averaged afterwards.

        Args:
            batch: as in `forward`.
            size: items a pass of the towers, images and captions alike.
            backward: called with the loss, such as `accelerator.backward`.

        Returns:
            As `forward`.
        """
        sides = Sides.of(batch)
        images = _Cached(self.encode_images, sides.images, size)
        texts = _Cached(self.encode_texts, sides.texts, size)
        output = self.score(images.items, texts.items, sides)
        backward(output["loss"])
        images.backward()
        texts.backward()
        return output


@dataclass
class _Cached:
    """One side of a batch, encoded without gradients, to be encoded again with them.

    Attributes:
        encode: makes encoded items of inputs.
        inputs: of all items.
        size: items at a time.
        items: all of them; their tensors are leaves that collect gradients.
    """

    encode: Callable[[dict[str, Tensor]], EncodedItems]
    inputs: dict[str, Tensor]
    size: int
    items: Any = field(init=False)

    def __post_init__(self) -> None:
        self.device = next(iter(self.inputs.values())).device
        self._states: list[list[Tensor]] = []  # of the random generators: dropout must be the same both times
        parts = []
        with torch.no_grad():
            for rows in self._slices():
                states = [torch.get_rng_state()]
                if self.device.type == "cuda":
                    states.append(torch.cuda.get_rng_state(self.device))
                self._states.append(states)
                parts.append(self.encode(self._rows(rows)))
        joined = type(parts[0]).cat(parts)
        self.items = joined._map(lambda value: value.detach().requires_grad_() if value.is_floating_point() else value)

    def backward(self) -> None:
        """Carry the gradients that the items collected on into the weights."""
        devices = [self.device] if self.device.type == "cuda" else []
        gradients = {name: value.grad for name, value in self.items.tensors().items() if value.grad is not None}
        with torch.random.fork_rng(devices):
            for rows, states in zip(self._slices(), self._states, strict=True):
                torch.set_rng_state(states[0])
                if self.device.type == "cuda":
                    torch.cuda.set_rng_state(states[1], self.device)
                tensors = self.encode(self._rows(rows)).tensors()
                chosen = [name for name in gradients if tensors[name].requires_grad]
                if chosen:
                    torch.autograd.backward(
                        [tensors[name] for name in chosen],
                        [_part(gradients[name][rows], tensors[name].shape) for name in chosen],
                    )

    def _slices(self) -> Iterator[slice]:
        count = len(next(iter(self.inputs.values())))
        return (slice(start, start + self.size) for start in range(0, count, self.size))

    def _rows(self, rows: slice) -> dict[str, Tensor]:
        return {name: value[rows] for name, value in self.inputs.items()}


def _part(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Without the padding that a part got when it was joined with longer ones."""
    return gradient[tuple(slice(0, size) for size in shape)]

"""One training step's loss: what is left out of the batch, and which losses enter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..losses import contrastive_loss, matching_loss_floor

__all__ = ["Objective", "drop_valid"]


def drop_valid(mask: Tensor, probability: float) -> Tensor:
    """A mask (N, L) without a random share of its valid positions; one valid position of each row at least stays."""
    draws = torch.rand(mask.shape, device=mask.device)
    valid = mask.bool()
    keep = valid & (draws >= probability)
    certain = draws.masked_fill(~valid, -1.0).argmax(dim=1, keepdim=True)
    keep = keep.scatter(1, certain, True) & valid
    return keep.to(mask.dtype)


class Objective(nn.Module):
    """A model with its training loss: what accelerate prepares and calls.

    Args:
        model: a TVRNModel.
        word_dropout, region_dropout: probability that a word or region is left out of a step.
    """

    def __init__(self, model: Any, word_dropout: float = 0.0, region_dropout: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.word_dropout = word_dropout
        self.region_dropout = region_dropout

    def forward(self, batch: dict[str, Tensor], with_pairs: bool = True) -> dict[str, Any]:
        """Loss, its parts and, where pairs are scored, the logits.

        Args:
            batch: the model's inputs with `image_ids` and `text_image_ids`, as the collator makes them.
            with_pairs: False trains the embeddings alone, by the contrastive loss, and scores no pair.

        Returns:
            `loss` scalar; `parts` name -> detached scalar, the matching loss above its floor; `logits` (I, T) or
            None.
        """
        inputs = self._thinned(dict(batch))
        inputs.pop("return_loss", None)
        if not with_pairs:
            return self._embeddings_alone(inputs)
        output = self.model(**inputs, return_loss=True)
        parts = dict(output.loss_parts)
        if "matching" in parts:  # what is left to gain: the floor depends on the batch's size alone
            parts["matching"] = parts["matching"] - matching_loss_floor(inputs["image_ids"], inputs["text_image_ids"])
        return {"loss": output.loss, "parts": parts, "logits": output.logits_per_image.detach()}

    def _embeddings_alone(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        ids = inputs.pop("image_ids"), inputs.pop("text_image_ids")
        image_inputs = {name: value for name, value in inputs.items() if name == "pixel_values" or "region" in name}
        text_inputs = {name: value for name, value in inputs.items() if name not in image_inputs}
        images = self.model.embed_images(**image_inputs)
        texts = self.model.embed_texts(**text_inputs)
        smoothing = self.model.config.label_smoothing
        loss = contrastive_loss(images, texts, self.model.logit_scale, *ids, label_smoothing=smoothing)
        return {"loss": loss, "parts": {"contrastive": loss.detach()}, "logits": None}

    def _thinned(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs without the words and regions that this step leaves out."""
        if not self.training:
            return inputs
        if self.word_dropout:
            inputs["word_mask"] = drop_valid(inputs["word_mask"], self.word_dropout)
        if self.region_dropout:
            if "pixel_values" in inputs:
                regions = self.model.extract_regions(inputs.pop("pixel_values"))
                inputs |= dict(zip(("region_features", "region_boxes", "region_mask"), regions, strict=True))
            inputs["region_mask"] = drop_valid(inputs["region_mask"], self.region_dropout)
        return inputs

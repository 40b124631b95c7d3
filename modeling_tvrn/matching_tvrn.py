"""Pairs in blocks, memory bounded by a chunk; the components of their logits, and the losses of these. Shipped."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checks_tvrn import check_level, check_sides
from .configuration_tvrn import TVRNConfig
from .encoded_tvrn import Encoded, EncodedImages, EncodedTexts
from .layers_tvrn import FragmentAttention, Gate, Recurrence, product_dtype
from .losses import (
    contrastive_loss,
    distillation_loss,
    hardest_negative_loss,
    matching_loss,
    positives_cross_entropy,
    sigmoid_contrastive_loss,
)
from .pair_tvrn import PairStage

# Captions of one chunk share their padded length: sorted by length, this many at a time waste little.
CAPTIONS_PER_CHUNK = 32
# One (pairs, words, D) tensor of a chunk. On a CPU, tensors that leave the cache cost the pair stage half its speed.
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
# Each has its weight in the configuration.
LOSSES = ("matching", "pair_contrastive", "hardest_negative", "contrastive", "late_interaction", "distillation")


class PairMatching:
    """The part of [`TVRNModel`] that scores encoded images against encoded texts.

    Attributes:
        config, pair, attention, textual_refinement, logit_scale, logit_bias, gradient_checkpointing: The model's.
        calibration_scale, calibration_shift: (1,) of the score, see `scores`.
    """

    config: TVRNConfig
    pair: PairStage
    attention: FragmentAttention
    textual_refinement: Gate | Recurrence | None
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None
    calibration_scale: Tensor
    calibration_shift: Tensor
    gradient_checkpointing: bool

    def match(
        self, images: EncodedImages, texts: EncodedTexts, chunk_size: int | None = None, level: str = "full"
    ) -> Tensor:
        """Pair logits (I, T) in float32 (float64 for a float64 model), what pairs are ranked by; see also `scores`.

        Args:
            images, texts: As `encode_images` and `encode_texts` give them, of that level or a higher one.
            chunk_size: Pairs scored at once (default `config.pair_chunk_size`); bounds memory, does not change scores.
            level: "embeddings" (the first stage), "late_interaction" (this added), or "full" (the reasoning, too).

        Raises:
            ValueError: If a side is empty, another model's or of a lower level, or `chunk_size` is below 1.
        """
        return self.pair_logits(self.score_components(images, texts, chunk_size, level))

    @staticmethod
    def pair_logits(components: dict[str, Tensor]) -> Tensor:
        """The pair logits (I, T) of weighted components: their sum."""
        return torch.stack(list(components.values())).sum(dim=0)

    def scores(self, logits: Tensor) -> Tensor:
        """Matching scores in (0, 1) of pair logits: the sigmoid, scaled and shifted where the model is calibrated.

        Calibration changes no logit and no rank. An uncalibrated dual encoder's scores are 1 for nearly every pair
        (`is_calibrated`): its logits rank, they don't decide.
        """
        scale, shift = (value.to(logits) for value in (self.calibration_scale, self.calibration_shift))
        return torch.sigmoid(scale * logits + shift)

    @property
    def score_kind(self) -> str:
        """What `readable_scores` are: "matching score" of a calibrated model; else "cosine" of a first stage alone, or
        "matching score (uncalibrated)", which ranks and decides nothing."""
        if self.is_calibrated:
            return "matching score"
        return "cosine" if self.config.components == ["first_stage"] else "matching score (uncalibrated)"

    def readable_scores(self, logits: Tensor) -> Tensor:
        """Pair logits as numbers to show, in the same order: see `score_kind`.

        100·cosine saturates a sigmoid, so that of an uncalibrated dual encoder alone the cosine is shown.
        """
        if self.score_kind != "cosine":
            return self.scores(logits)
        bias = 0.0 if self.logit_bias is None else self.logit_bias.detach().to(logits)
        return (logits - bias) / self.logit_scale.detach().to(logits).exp()

    @property
    def is_calibrated(self) -> bool:
        """Whether 0.5 is where a match begins; a model that learned by losses on sigmoids alone is so by itself."""
        moved = bool((self.calibration_scale != 1).any() or (self.calibration_shift != 0).any())
        return moved or not self.config.use_first_stage

    def score_components(
        self, images: EncodedImages, texts: EncodedTexts, chunk_size: int | None = None, level: str = "full"
    ) -> dict[str, Tensor]:
        """The weighted summands of `match`, each (I, T), those that the model has up to that level.

        "first_stage", "late_interaction", "reasoning"; arguments and errors are those of `match`.
        """
        return self.weigh_components(self.unweighted_components(images, texts, chunk_size, level))

    def weigh_components(self, components: dict[str, Tensor]) -> dict[str, Tensor]:
        """Components as `unweighted_components` gives them, times their learned weights."""
        return {name: self.pair.weight(name) * value for name, value in components.items()}

    def unweighted_components(
        self, images: EncodedImages, texts: EncodedTexts, chunk_size: int | None = None, level: str = "full"
    ) -> dict[str, Tensor]:
        """The components before their weights, what each one's own losses see; as `score_components`."""
        if not len(images) or not len(texts) or (chunk_size is not None and chunk_size < 1):
            raise ValueError(
                f"match got {len(images)} images, {len(texts)} texts, chunk_size {chunk_size}; expected at least 1 of "
                "each."
            )
        check_sides(images, texts, self.config, check_level(level))
        images, texts = self._as_computed(images), self._as_computed(texts)
        components = self._first_component(images, texts) | self._match_chunks(images, texts, chunk_size, level)
        if not components:
            raise ValueError(f"This model's score has the component {self.config.components} alone; use level='full'.")
        return components

    def first_stage(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """exp(logit_scale)·cosine + logit_bias, a dual encoder's logit: (i, P), (t, P) or (i, t, P) -> (i, t)."""
        cosine = self.pair.cosines(image_embeds, text_embeds)
        logits = self.logit_scale.to(cosine.dtype).exp() * cosine
        return logits if self.logit_bias is None else logits + self.logit_bias.to(cosine.dtype)

    def match_aligned(self, images: EncodedImages, texts: EncodedTexts) -> Tensor:
        """Pair logits (I, n) of each image with n texts of its own, all at once: dense arithmetic for a shortlist.

        Args:
            images: I encoded images.
            texts: I·n encoded texts, those of image 0 first; `pairs_at_once` says how many keep memory small.

        Raises:
            ValueError: If a side is empty or another model's, or the texts do not divide among the images.
        """
        if not len(images) or not len(texts) or len(texts) % len(images):
            raise ValueError(
                f"match_aligned got {len(images)} images and {len(texts)} texts; expected at least 1 of each, "
                "and the same number of texts for each image."
            )
        check_sides(images, texts, self.config)
        return self._block_logits(self._as_computed(images), self._as_computed(texts).trim().grouped(len(images)))

    def _as_computed(self, items: Encoded) -> Encoded:
        """Items in the dtype of autocast, where it is on, else of the weights: a gallery may be stored in another."""
        return items.to(product_dtype(self.logit_scale))

    def _block_logits(self, images: EncodedImages, texts: EncodedTexts) -> Tensor:
        """The pair logits (i, t) of one block, nothing checked or cut."""
        components = self._first_component(images, texts)
        names = self._fragment_components("full")
        if names:
            components |= dict(zip(names, self._score_block(images, texts, "full"), strict=True))
        return self.pair_logits(self.weigh_components(components))

    def _first_component(self, images: EncodedImages, texts: EncodedTexts) -> dict[str, Tensor]:
        """The first stage by its name, of a model that has it."""
        if not self.config.use_first_stage:
            return {}
        return {"first_stage": self.first_stage(images.embeds, texts.embeds)}

    def pairs_at_once(self, texts: EncodedTexts) -> int:
        """Pairs of such texts that are best scored together: `config.pair_chunk_size`, or what suits the device."""
        width = texts.embeds.shape[-1] if texts.words is None else texts.words.shape[-1]
        return self.config.pair_chunk_size or _auto_chunk_size(texts, width)

    def _fragment_components(self, level: str) -> list[str]:
        """The components of a level that see fragments, in the order of `_score_block`."""
        found = {
            "late_interaction": self.config.use_late_interaction and level != "embeddings",
            "reasoning": self.config.use_reasoning and level == "full",
        }
        return [name for name, wanted in found.items() if wanted]

    def _match_chunks(
        self, images: EncodedImages, texts: EncodedTexts, chunk_size: int | None, level: str
    ) -> dict[str, Tensor]:
        """The components that see fragments, block by block; captions of one length share a chunk."""
        names = self._fragment_components(level)
        if not names:
            return {}
        assert texts.word_mask is not None and texts.words is not None and images.region_mask is not None
        order = torch.argsort(texts.word_mask.sum(dim=1), stable=True)
        width = texts.words.shape[-1] if "reasoning" in names else images.region_mask.shape[1]
        chunk_size = chunk_size or self.config.pair_chunk_size or _auto_chunk_size(texts, width)
        captions = min(CAPTIONS_PER_CHUNK, chunk_size, len(texts))
        image_blocks = [images.select(rows) for rows in _slices(len(images), chunk_size // captions)]
        whole = len(image_blocks) == 1 and len(texts) == captions
        score = self._score_block if whole and not self.gradient_checkpointing else self._score_block_checkpointed
        columns = []
        for rows in _slices(len(texts), captions):
            block = texts.select(order[rows]).trim()
            scored = [score(image_block, block, level) for image_block in image_blocks]
            columns.append(torch.cat(scored, dim=1))
        matrices = torch.cat(columns, dim=2).index_select(2, torch.argsort(order))
        return dict(zip(names, matrices, strict=True))

    def _score_block(self, images: EncodedImages, texts: EncodedTexts, level: str) -> Tensor:
        """Late interaction and reasoning of a block, those that are wanted: (1 or 2, i, t)."""
        score = {
            "late_interaction": lambda: self.pair.late_interaction(images, texts),
            "reasoning": lambda: self.pair(images, texts, self.attention, self.textual_refinement),
        }
        return torch.stack([score[name]() for name in self._fragment_components(level)])

    def _score_block_checkpointed(self, images: EncodedImages, texts: EncodedTexts, level: str) -> Tensor:
        """Recompute the block in the backward pass: training memory is then bounded by the chunk, not the batch."""
        if not torch.is_grad_enabled() or not (self.config.checkpoint_pair_chunks or self.gradient_checkpointing):
            return self._score_block(images, texts, level)
        return checkpoint(self._score_block, images, texts, level, use_reentrant=False, preserve_rng_state=False)

    def training_loss(
        self,
        components: dict[str, Tensor],
        image_embeds: Tensor,
        text_embeds: Tensor,
        image_ids: Tensor,
        text_image_ids: Tensor,
        losses: Collection[str] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses in use, and each of them, detached.

        Args:
            components: (I, T) each, as `unweighted_components` gives them.
            image_embeds, text_embeds: (I, P) and (T, P) unit norm.
            image_ids, text_image_ids: (I,) and (T,), what decides positives.
            losses: Names of those that may enter, such as "contrastive"; default: all.

        Raises:
            ValueError: If no loss with a weight above 0 applies to these components.
        """
        config, weights = self.config, self._loss_weights(losses)
        ids = (image_ids, text_image_ids)
        parts = self._pair_losses(components["reasoning"], ids, weights) if "reasoning" in components else {}
        learns = image_embeds.requires_grad or text_embeds.requires_grad or self.logit_scale.requires_grad
        if weights["contrastive"] and (learns or not torch.is_grad_enabled()):
            parts["contrastive"] = self._contrastive_loss(image_embeds, text_embeds, ids)
        if weights["late_interaction"] and "late_interaction" in components:
            parts["late_interaction"] = positives_cross_entropy(
                components["late_interaction"], *ids, config.label_smoothing
            )
        detached = {name: value.detach() for name, value in components.items()}
        if weights["distillation"] and components:
            source = self.pair_logits(self.weigh_components(detached))
            parts["distillation"] = distillation_loss(
                image_embeds, text_embeds, self.logit_scale, source, config.distillation_temperature
            )
        if not parts:
            raise ValueError(
                "return_loss=True but no loss is left: every *_loss_weight that could apply is 0; set one above 0."
            )
        loss = sum(weights[name] * part for name, part in parts.items())
        if len(components) > 1 and self._learned_weights(components):
            # A component that learned from the sum would learn only what the others leave of the training set.
            parts["component_weights"] = positives_cross_entropy(
                self.pair_logits(self.weigh_components(detached)), *ids
            )
            loss = loss + parts["component_weights"]
        return loss, {name: part.detach() for name, part in parts.items()}

    def _contrastive_loss(self, image_embeds: Tensor, text_embeds: Tensor, ids: tuple[Tensor, Tensor]) -> Tensor:
        """Of the first stage: the sigmoid loss where its logit has a bias, as SigLIP's, else InfoNCE."""
        if self.logit_bias is not None:
            return sigmoid_contrastive_loss(image_embeds, text_embeds, self.logit_scale, self.logit_bias, *ids)
        return contrastive_loss(image_embeds, text_embeds, self.logit_scale, *ids, self.config.label_smoothing)

    def _learned_weights(self, components: dict[str, Tensor]) -> bool:
        weights = [getattr(self.pair, f"{name}_weight", None) for name in components]
        return any(weight is not None and weight.requires_grad for weight in weights)

    def _loss_weights(self, losses: Collection[str] | None) -> dict[str, Any]:
        """The configured weights by the losses' names; 0 for those that may not enter."""
        found = {name: getattr(self.config, f"{name}_loss_weight") for name in LOSSES}
        return {name: weight if losses is None or name in losses else 0.0 for name, weight in found.items()}

    def _pair_losses(self, logits: Tensor, ids: tuple[Tensor, Tensor], weights: dict[str, Any]) -> dict[str, Tensor]:
        """The losses of the reasoning."""
        config, parts = self.config, {}
        if weights["matching"]:
            parts["matching"] = matching_loss(
                logits.sigmoid(), *ids, margin=config.margin, temperature=config.matching_temperature
            )
        if weights["pair_contrastive"]:
            parts["pair_contrastive"] = positives_cross_entropy(logits, *ids, config.label_smoothing)
        if weights["hardest_negative"]:
            parts["hardest_negative"] = hardest_negative_loss(logits.sigmoid(), *ids, margin=config.margin)
        return parts


def _auto_chunk_size(texts: EncodedTexts, width: int) -> int:
    """Pairs whose (pairs, words, width) tensor stays in a CPU's cache, or is large enough to fill a GPU."""
    budget = CHUNK_BYTES.get(texts.embeds.device.type, CHUNK_BYTES["cuda"])
    if texts.words is None or texts.word_mask is None:
        return max(budget // (width * texts.embeds.element_size()), 1)
    words = max(int(texts.word_mask.sum(dim=1).float().mean()), 1) * (
        1 if getattr(texts, "recurrent_words", None) is None else 2
    )
    return max(budget // (words * width * texts.words.element_size()), 1)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]

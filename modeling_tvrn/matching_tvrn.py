"""Pairs in blocks, memory bounded by a chunk; their terms, and the losses of these. Shipped."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checks_tvrn import check_sides
from .configuration_tvrn import TVRNConfig
from .encoded_tvrn import CoarseImages, CoarseTexts, Encoded, EncodedImages, EncodedTexts
from .layers_tvrn import FragmentAttention, Gate, Recurrence, product_dtype
from .losses import (
    contrastive_loss,
    distillation_loss,
    hardest_negative_loss,
    matching_loss,
    positives_cross_entropy,
)
from .pair_tvrn import PairStage

# Captions of one chunk share their padded length: sorted by length, this many at a time waste little.
CAPTIONS_PER_CHUNK = 32
# One (pairs, words, D) tensor of a chunk. On a CPU, tensors that leave the cache cost the pair stage half its speed.
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
# Each has its weight in the configuration.
LOSSES = ("matching", "pair_contrastive", "hardest_negative", "contrastive", "token_contrastive", "distillation")


class PairMatching:
    """The part of [`TVRNModel`] that scores encoded images against encoded texts.

    Attributes:
        config, pair, attention, textual_refinement, logit_scale, gradient_checkpointing: The model's.
    """

    config: TVRNConfig
    pair: PairStage
    attention: FragmentAttention
    textual_refinement: Gate | Recurrence | None
    logit_scale: nn.Parameter
    gradient_checkpointing: bool

    def match(
        self,
        images: EncodedImages | CoarseImages,
        texts: EncodedTexts | CoarseTexts,
        chunk_size: int | None = None,
        with_evidence: bool = True,
    ) -> Tensor:
        """Pair logits (I, T) in float32 (float64 for a float64 model); the sigmoid is the matching score (§4).

        Args:
            images, texts: As `encode_images` and `encode_texts` give them.
            chunk_size: Pairs scored at once (default `config.pair_chunk_size`); bounds memory, does not change scores.
            with_evidence: False leaves the pair stage out: the sum of the coarse terms alone.

        Raises:
            ValueError: If a side is empty, another model's, or `chunk_size` is below 1.
        """
        return self.pair_logits(self.match_terms(images, texts, chunk_size, with_evidence))

    @staticmethod
    def pair_logits(terms: dict[str, Tensor]) -> Tensor:
        """The pair logits (I, T) of terms as `match_terms` gives them: their sum."""
        return torch.stack(list(terms.values())).sum(dim=0)

    def trained_logits(self, terms: dict[str, Tensor]) -> Tensor:
        """What the pair losses see (I, T): the sum of the terms, or with `train_evidence_alone` the plain evidence."""
        if self.config.train_evidence_alone:
            return terms["evidence"] / self.config.evidence_scale
        return self.pair_logits(terms)

    def match_terms(
        self,
        images: EncodedImages | CoarseImages,
        texts: EncodedTexts | CoarseTexts,
        chunk_size: int | None = None,
        with_evidence: bool = True,
    ) -> dict[str, Tensor]:
        """The summands of `match`, each (I, T): "evidence", "tokens", "embeddings", those that the model has.

        Arguments and errors are those of `match`.
        """
        if not len(images) or not len(texts) or (chunk_size is not None and chunk_size < 1):
            raise ValueError(
                f"match got {len(images)} images, {len(texts)} texts, chunk_size {chunk_size}; expected at least 1 of "
                "each."
            )
        check_sides(images, texts, self.config, with_evidence)
        images, texts = self._as_computed(images), self._as_computed(texts)
        terms = self._match_chunks(images, texts, chunk_size, with_evidence)
        if self.config.use_embedding_similarity:
            terms["embeddings"] = self.pair.embedding_similarity(images.embeds, texts.embeds)
        if not terms:
            raise ValueError(
                "This model has neither an embedding nor a token similarity: without the evidence nothing is left."
            )
        return terms

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
        return items.to(product_dtype(self.pair.local_similarity.weight))

    def _block_logits(self, images: EncodedImages, texts: EncodedTexts) -> Tensor:
        """The pair logits (i, t) of one block, nothing checked or cut."""
        terms = dict(zip(self._fragment_terms(True), self._score_block(images, texts, True), strict=True))
        if self.config.use_embedding_similarity:
            terms["embeddings"] = self.pair.embedding_similarity(images.embeds, texts.embeds)
        return self.pair_logits(terms)

    def pairs_at_once(self, texts: EncodedTexts) -> int:
        """Pairs of such texts that are best scored together: `config.pair_chunk_size`, or what suits the device."""
        return self.config.pair_chunk_size or _auto_chunk_size(texts, texts.words.shape[-1])

    def _fragment_terms(self, with_evidence: bool) -> list[str]:
        """The terms that see fragments, in the order of `_score_block`."""
        return [*["evidence"] * with_evidence, *["tokens"] * self.config.use_token_similarity]

    def _match_chunks(
        self,
        images: EncodedImages | CoarseImages,
        texts: EncodedTexts | CoarseTexts,
        chunk_size: int | None,
        with_evidence: bool,
    ) -> dict[str, Tensor]:
        """The terms that see fragments, block by block; captions of one length share a chunk: little is padding."""
        names = self._fragment_terms(with_evidence)
        if not names:
            return {}
        order = torch.argsort(texts.word_mask.sum(dim=1), stable=True)
        width = texts.words.shape[-1] if with_evidence else images.region_mask.shape[1]
        chunk_size = chunk_size or self.config.pair_chunk_size or _auto_chunk_size(texts, width)
        captions = min(CAPTIONS_PER_CHUNK, chunk_size, len(texts))
        image_blocks = [images.select(rows) for rows in _slices(len(images), chunk_size // captions)]
        whole = len(image_blocks) == 1 and len(texts) == captions
        score = self._score_block if whole and not self.gradient_checkpointing else self._score_block_checkpointed
        columns = []
        for rows in _slices(len(texts), captions):
            block = texts.select(order[rows]).trim()
            scored = [score(image_block, block, with_evidence) for image_block in image_blocks]
            columns.append(torch.cat(scored, dim=1))
        matrices = torch.cat(columns, dim=2).index_select(2, torch.argsort(order))
        return dict(zip(names, matrices, strict=True))

    def _score_block(
        self, images: EncodedImages | CoarseImages, texts: EncodedTexts | CoarseTexts, with_evidence: bool
    ) -> Tensor:
        """Evidence and token similarity of a block, those that are wanted: (1 or 2, i, t)."""
        terms = []
        if with_evidence:
            assert isinstance(images, EncodedImages) and isinstance(texts, EncodedTexts)
            evidence = self.pair(images, texts, self.attention, self.textual_refinement)
            terms.append(self.config.evidence_scale * evidence)
        if self.config.use_token_similarity:
            terms.append(self.pair.token_similarity(images, texts))
        return torch.stack(terms)

    def _score_block_checkpointed(
        self, images: EncodedImages | CoarseImages, texts: EncodedTexts | CoarseTexts, with_evidence: bool
    ) -> Tensor:
        """Recompute the block in the backward pass: training memory is then bounded by the chunk, not the batch."""
        if not torch.is_grad_enabled() or not (self.config.checkpoint_pair_chunks or self.gradient_checkpointing):
            return self._score_block(images, texts, with_evidence)
        return checkpoint(
            self._score_block, images, texts, with_evidence, use_reentrant=False, preserve_rng_state=False
        )

    def training_loss(
        self,
        terms: dict[str, Tensor],
        image_embeds: Tensor,
        text_embeds: Tensor,
        image_ids: Tensor,
        text_image_ids: Tensor,
        losses: Collection[str] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses in use, and each of them, detached.

        Args:
            terms: (I, T) each, as `match_terms` gives them.
            image_embeds, text_embeds: (I, P) and (T, P) unit norm.
            image_ids, text_image_ids: (I,) and (T,), what decides positives.
            losses: Names of those that may enter, such as "contrastive"; default: all.

        Raises:
            ValueError: If no loss with a weight above 0 applies to these terms.
        """
        config, weights = self.config, self._loss_weights(losses)
        ids = (image_ids, text_image_ids)
        parts = self._pair_losses(terms, ids, weights) if "evidence" in terms else {}
        if weights["contrastive"]:
            parts["contrastive"] = contrastive_loss(
                image_embeds, text_embeds, self.logit_scale, *ids, config.label_smoothing
            )
        if weights["token_contrastive"] and "tokens" in terms:
            parts["token_contrastive"] = positives_cross_entropy(terms["tokens"], *ids, config.label_smoothing)
        if weights["distillation"] and terms:
            parts["distillation"] = distillation_loss(
                image_embeds, text_embeds, self.logit_scale, self.pair_logits(terms), config.distillation_temperature
            )
        if not parts:
            raise ValueError(
                "return_loss=True but no loss is left: every *_loss_weight that could apply is 0; set one above 0."
            )
        loss = sum(weights[name] * part for name, part in parts.items())
        return loss, {name: part.detach() for name, part in parts.items()}

    def _loss_weights(self, losses: Collection[str] | None) -> dict[str, Any]:
        """The configured weights by the losses' names; 0 for those that may not enter."""
        found = {name: getattr(self.config, f"{name}_loss_weight") for name in LOSSES}
        return {name: weight if losses is None or name in losses else 0.0 for name, weight in found.items()}

    def _pair_losses(
        self, terms: dict[str, Tensor], ids: tuple[Tensor, Tensor], weights: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The losses of the pair score, or of the evidence alone."""
        config, parts, logits = self.config, {}, self.trained_logits(terms)
        if weights["matching"]:
            parts["matching"] = matching_loss(
                logits.sigmoid(), *ids, margin=config.margin, temperature=config.matching_temperature
            )
        if weights["pair_contrastive"]:
            parts["pair_contrastive"] = positives_cross_entropy(logits, *ids, config.label_smoothing)
        if weights["hardest_negative"]:
            parts["hardest_negative"] = hardest_negative_loss(logits.sigmoid(), *ids, margin=config.margin)
        return parts


def _auto_chunk_size(texts: EncodedTexts | CoarseTexts, width: int) -> int:
    """Pairs whose (pairs, words, width) tensor stays in a CPU's cache, or is large enough to fill a GPU."""
    budget = CHUNK_BYTES.get(texts.words.device.type, CHUNK_BYTES["cuda"])
    words = max(int(texts.word_mask.sum(dim=1).float().mean()), 1) * (
        1 if getattr(texts, "recurrent_words", None) is None else 2
    )
    return max(budget // (words * width * texts.words.element_size()), 1)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]

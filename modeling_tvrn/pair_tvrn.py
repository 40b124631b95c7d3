"""The pair stage: every image of a block against every caption of a block, without a loop over either; pairs cut into
such blocks, the components of their logits, and the losses of these. Shipped.

No weight matrix is applied per pair before the similarity transform (with `refinement="gate"`): what depends on one
side only was computed when the item was encoded, linear maps were moved in front of the attention they commute with,
and a Gram matrix gives a context's norm.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .checks_tvrn import check_level, check_sides
from .configuration_tvrn import TVRNConfig
from .encoded_tvrn import Encoded, EncodedImages, EncodedTexts
from .layers_tvrn import FragmentAttention, Gate, Recurrence, masked_softmax, normalize, product_dtype, wide
from .losses import (
    contrastive_loss,
    distillation_loss,
    hardest_negative_loss,
    matching_loss,
    positives_cross_entropy,
    sigmoid_contrastive_loss,
)

# Captions of one chunk share their padded length: sorted by length, this many at a time waste little.
CAPTIONS_PER_CHUNK = 32
# One (pairs, words, D) tensor of a chunk. On a CPU, tensors that leave the cache cost the pair stage half its speed.
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
# Each has its weight in the configuration.
LOSSES = ("matching", "pair_contrastive", "hardest_negative", "contrastive", "late_interaction", "distillation")


# -- one block -------------------------------------------------------------------------------------------------------


class SimilarityAttention(nn.Module):
    """SAF: gated, saliency-weighted mean of the similarity vectors, then one logit."""

    def __init__(self, config: TVRNConfig):
        super().__init__()
        self.gate = nn.Linear(config.similarity_size, 1)
        self.logit = nn.Linear(config.similarity_size, 1)

    def forward(self, nodes: Tensor, weights: Tensor) -> Tensor:
        """(n, M, S) nodes, (n, M) weights ω (0 = padding) -> (n,) logits."""
        mixing, votes = self.parts(nodes, weights)
        return (mixing * votes).sum(dim=-1) / mixing.sum(dim=-1) + self.logit.bias

    def parts(self, nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Each node's weight ωβ in the mean and its vote w·s: (n, M) both; the logit is their weighted mean + b.

        w·(Σ ωβ s / Σ ωβ) = Σ ωβ (w·s) / Σ ωβ: only two numbers a node are needed.
        """
        # One product with (2, S), so that the nodes are read once.
        projected = F.linear(nodes, torch.cat([self.gate.weight, self.logit.weight])).to(weights.dtype)
        return weights * torch.sigmoid(projected[..., 0] + self.gate.bias), projected[..., 1]


class GraphReasoningStep(nn.Module):
    """One step of SGR: s_p ← ReLU(W_r Σ_q edge_pq s_q), edges weighted by saliency."""

    def __init__(self, size: int):
        super().__init__()
        self.source = nn.Linear(size, size, bias=False)
        self.target = nn.Linear(size, size, bias=False)
        self.update = nn.Linear(size, size, bias=False)

    def forward(self, nodes: Tensor, log_weights: Tensor) -> Tensor:
        """(n, M, S), (n, M) with −inf (the dtype's minimum) at padding -> (n, M, S)."""
        # (n, M, S) @ (n, S, M). Log ω is added before the softmax: an edge then counts by its far node's saliency, and
        # one to padding not at all.
        scores = self.source(nodes) @ self.target(nodes).transpose(1, 2)
        edges = (scores.to(log_weights.dtype) + log_weights.unsqueeze(1)).softmax(dim=-1).to(nodes.dtype)
        return F.relu(self.update(edges @ nodes))


class SimilarityGraph(nn.Module):
    """SGR: three steps over the similarity vectors as a graph, read at the global node."""

    def __init__(self, config: TVRNConfig, steps: int = 3):
        super().__init__()
        self.steps = nn.ModuleList(GraphReasoningStep(config.similarity_size) for _ in range(steps))
        self.logit = nn.Linear(config.similarity_size, 1)

    def forward(self, nodes: Tensor, weights: Tensor) -> Tensor:
        """(n, M, S) nodes, (n, M) weights ω (0 = padding) -> (n,) logits."""
        floor = torch.finfo(weights.dtype).min
        # Clamped as well: `where` sends a gradient of 0 into the other branch, and 0 · ∞ of log 0 is NaN.
        log_weights = torch.where(weights > 0, weights.clamp_min(torch.finfo(weights.dtype).tiny).log(), floor)
        for step in self.steps:
            nodes = step(nodes, log_weights)
        return self.logit(nodes[:, 0]).squeeze(-1).to(weights.dtype)  # the global node comes first


def weighted_components(config: TVRNConfig) -> list[str]:
    """The components whose weight in the pair logit is learned: those beside the first of several."""
    return [name for name in config.components[1:] if name != "first_stage"]


HEADS = {"saf": SimilarityAttention, "sgr": SimilarityGraph}


class PairStage(nn.Module):
    """Textual refinement, semantic alignment and similarity reasoning. Shapes: i images, t captions, W words.

    `attention` and `refinement` are shared with the one-sided layers and handed in at call time by the model, so that
    each parameter has one owner.

    Attributes:
        fused: What is asked first for a block's scores: `modeling_tvrn.kernels.enable` sets it, shipped files do not.
    """

    fused: Any = None

    def __init__(self, config: TVRNConfig):
        super().__init__()
        self.config = config
        if config.use_reasoning:
            self.local_similarity = nn.Linear(config.hidden_size, config.similarity_size, bias=False)
            self.global_similarity = nn.Linear(config.hidden_size, config.similarity_size, bias=False)
            self.head = HEADS[config.similarity_head](config)
        if config.use_late_interaction:
            self.late_interaction_scale = nn.Parameter(
                torch.full((1,), float(config.late_interaction_scale_init_value))
            )
        # A component alone needs no weight, and the first stage is what the others are weighed against.
        for name in weighted_components(config):
            setattr(
                self, f"{name}_weight", nn.Parameter(torch.full((1,), float(config.component_weight_init_value or 0)))
            )

    def forward(
        self,
        images: EncodedImages,
        texts: EncodedTexts,
        attention: FragmentAttention,
        refinement: Gate | Recurrence | None,
    ) -> Tensor:
        """Reasoning (i, t) of every image of the block against every caption of the block: the published logit.

        Where the captions' tensors have one more dimension in front, (i, t, W, …), each image has its own t captions.
        """
        found = None if self.fused is None else self.fused.reasoning(self, images, texts, attention, refinement)
        if found is not None:
            return found
        nodes, weights = self.nodes(images, texts, attention, refinement)
        assert images.refined_regions is not None and texts.word_mask is not None
        # (i·t,) -> (i, t). The captions are the mask's last axis but one in either form, (t, W) or (i, t, W).
        return self.head(nodes, weights).view(images.refined_regions.shape[0], texts.word_mask.shape[-2])

    def weight(self, name: str) -> Tensor | float:
        """The weight of a component of the logit, not negative; 1 where the model learns none for it."""
        learned = getattr(self, f"{name}_weight", None)
        if learned is None:
            return 1.0
        # The bound holds forwards alone: below it a plain clamp would have no gradient, and never come back.
        return learned + (learned.clamp_min(0.0) - learned).detach()

    def nodes(
        self,
        images: EncodedImages,
        texts: EncodedTexts,
        attention: FragmentAttention,
        refinement: Gate | Recurrence | None,
    ) -> tuple[Tensor, Tensor]:
        """What the head reads: similarity vectors (i·t, 1 + M, S), the global one first, and their weights ω."""
        refined, norm = self.refine(images, texts, attention, refinement)
        mask, weights = self.text_tokens(texts)
        global_text = self.global_text(refined, norm, weights)
        differences, saliency = self.align(images, refined, norm, mask)
        # In place: nothing else reads the differences (i, t, M, D), and such a tensor is most of a block's memory.
        local = self.local_similarity(differences.square_())
        assert images.global_vector is not None
        overall = self.global_similarity((images.global_vector.unsqueeze(1) - global_text).square())
        # (i, t, 1, S) before (i, t, M, S), then pairs as one axis. The global node counts fully: ω = 1.
        nodes = torch.cat([overall.unsqueeze(2), local], dim=2).flatten(0, 1)
        ones = torch.ones_like(saliency[..., :1])
        return normalize(nodes), torch.cat([ones, saliency], dim=-1).flatten(0, 1)

    @staticmethod
    def cosines(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Of every image's embedding with every text's: (i, P), (t, P) -> (i, t), float32 or better.

        With its own texts, (i, t, P), an image is compared with these alone.
        """
        dtype = wide(image_embeds)
        with torch.autocast(image_embeds.device.type, enabled=False):  # a cosine in bfloat16 moves ranks
            if text_embeds.ndim == 3:  # (i, t, P) @ (i, P, 1)
                return (text_embeds.to(dtype) @ image_embeds.to(dtype).unsqueeze(-1)).squeeze(-1)
            return image_embeds.to(dtype) @ text_embeds.to(dtype).T

    def late_interaction(self, images: EncodedImages, texts: EncodedTexts) -> Tensor:
        """e^c Σ_j w_j (1/λ) log (1/R) Σ_i exp(λ⟨t_j, v_i⟩): the words' mean soft maximum over regions, (i, t).

        Words and regions as they are before any refinement: refined regions learn the training set faster than what
        holds beyond it. Neither side sees the other before the product, so this costs a tenth of the reasoning.
        """
        found = None if self.fused is None else self.fused.late_interaction(self, images, texts)
        if found is not None:
            return found
        assert images.regions is not None and images.region_mask is not None
        assert texts.words is not None and texts.word_mask is not None and texts.word_weights is not None
        captions, words = texts.word_mask.shape[-2:]
        if texts.words.ndim == 4:
            # (i, t·W, D) @ (i, D, R), then (t·W, i, R) as below.
            cosine = (texts.words.flatten(1, 2) @ images.regions.transpose(1, 2)).transpose(0, 1)
        else:
            # (t·W, D) @ (D, i·R): one large product, where a product an image would be i small ones.
            cosine = texts.words.flatten(0, 1) @ images.regions.flatten(0, 1).T
        cosine = cosine.reshape(-1, *images.region_mask.shape).to(wide(cosine))
        scale = self.config.attention_scale
        masked = (scale * cosine).masked_fill(~images.region_mask, torch.finfo(cosine.dtype).min)
        # The soft maximum over regions, less log R: otherwise an image would gain by having many.
        counts = images.region_mask.sum(dim=1).to(cosine.dtype)
        best = (masked.logsumexp(dim=-1) - counts.log()) / scale
        with torch.autocast(best.device.type, enabled=False):
            weights = texts.word_weights.to(best.dtype)
            # (i, t, W) -> (t, W, i), or (t, W) -> (t, W, 1): images come last here.
            weights = weights.movedim(0, -1) if weights.ndim == 3 else weights.unsqueeze(-1)
            weighted = best.view(captions, words, -1) * weights
        return self.late_interaction_scale.to(best.dtype).exp() * weighted.sum(dim=1).T

    def text_tokens(self, texts: EncodedTexts) -> tuple[Tensor, Tensor]:
        """Mask and global weights of the refined tokens: words, or words and their expansions."""
        assert texts.word_mask is not None and texts.word_weights is not None
        doubled = texts.recurrent_words is not None
        mask, weights = texts.word_mask, texts.word_weights
        return (torch.cat([mask, mask], dim=-1), torch.cat([weights, weights], dim=-1)) if doubled else (mask, weights)

    def expand(self, images: EncodedImages, texts: EncodedTexts, attention: FragmentAttention) -> Tensor:
        """The regions' weights in each word's expansion e = att(c^t, c^v) = Σ α c^v, which has unit norm: (i, t·W, R).

        The sum is never formed: M e = Σ α (M c^v) for any matrix M, and ‖Σ α c^v‖ = √(αᵀ G α).
        """
        assert texts.context_queries is not None and images.context_keys is not None
        assert images.context_values is not None and images.context_gram is not None
        assert images.region_mask is not None and texts.word_mask is not None
        captions, words = texts.context_queries.shape[-3:-1]
        regions = images.context_keys.shape[1]
        if texts.context_queries.ndim == 4:
            # (i, R, D) @ (i, D, t·W): each image with its own captions.
            scores = images.context_keys @ texts.context_queries.flatten(1, 2).transpose(1, 2)
        else:
            # (i·R, D) @ (D, t·W): every image with every caption by one product.
            scores = images.context_keys.flatten(0, 1) @ texts.context_queries.flatten(0, 1).T
        # (i, R, t, W) -> (i, t, R, W): sources in rows, queries in columns.
        # Not len(images): that is an int, and an exported graph would keep this one.
        scores = scores.view(images.context_keys.shape[0], regions, captions, words).transpose(1, 2)
        alpha = attention.weights(scores, texts.word_mask, images.region_mask.unsqueeze(1))
        # (i, t, R, W) -> (i, R, t·W) -> (i, t·W, R): one row of weights a word.
        alpha = alpha.transpose(1, 2).flatten(2).transpose(1, 2)
        inverse = inverse_norm(alpha, images.context_gram, product_dtype(images.context_values))
        return (alpha * inverse).to(images.context_values.dtype)

    def refine(
        self,
        images: EncodedImages,
        texts: EncodedTexts,
        attention: FragmentAttention,
        refinement: Gate | Recurrence | None,
    ) -> tuple[Tensor, Tensor]:
        """Refined words T̃ (i, t, W or 2W, D) before normalisation, and their norms (i, t, W or 2W, 1)."""
        assert images.refined_regions is not None and texts.words is not None
        shape = (images.refined_regions.shape[0], *texts.words.shape[-3:])
        if isinstance(refinement, Gate):
            assert texts.gates is not None and images.context_values is not None
            alpha = self.expand(images, texts, attention)
            gate, carried = images.context_values.chunk(2, dim=-1)
            # (t·W, D) or (i, t·W, D), expanded without a copy.
            own = texts.gates.flatten(-3, -2).expand(shape[0], -1, -1)
            # The sum belongs to the product, the sigmoid is in place: a pass over memory costs as much as a product.
            gate = torch.baddbmm(own, alpha, gate).sigmoid_()
            refined = torch.addcmul(texts.words.flatten(-3, -2), gate, alpha @ carried).view(shape)
        elif isinstance(refinement, Recurrence):
            assert texts.recurrent_state is not None and texts.recurrent_words is not None
            assert images.context_values is not None
            # (i, t·W, R) @ (i, R, 3D) -> (i·t, W, 3D): each pair is a sequence of its own, from its caption's state.
            gates = (self.expand(images, texts, attention) @ images.context_values).view(-1, shape[2], 3 * shape[3])
            state = texts.recurrent_state.expand(shape[0], -1, -1).flatten(0, 1)
            expanded = refinement.steps(gates, state).view(shape) + texts.words
            refined = torch.cat([texts.recurrent_words.expand(shape), expanded], dim=2)
        else:
            refined = texts.words.expand(shape)
        norm = torch.linalg.vector_norm(refined, dim=-1, keepdim=True, dtype=wide(refined))
        return refined, norm.clamp_min(1e-8)

    @staticmethod
    def global_text(refined: Tensor, norm: Tensor, weights: Tensor) -> Tensor:
        """g^t = n(Σ_j w_j T_j): (i, t, D)."""
        # The norms divide the weights: to divide the words would be one more tensor (i, t, M, D).
        weights = (weights / norm.squeeze(-1)).to(refined.dtype)
        # (i, t, 1, M) @ (i, t, M, D).
        return normalize((weights.unsqueeze(-2) @ refined).squeeze(-2))

    def align(self, images: EncodedImages, refined: Tensor, norm: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Semantic alignment enhancement: ‖T̃‖ (ctx − T) (i, t, M, D), the words' weights ω = n_tokens·a^t (i, t, M).

        The factor saves a pass over the refined words; a similarity vector, which is normalised, does not feel it.
        """
        assert images.refined_regions is not None and images.refined_region_gram is not None
        beta, saliency = self.attend(images, refined, norm, mask)
        beta = beta.flatten(1, 2)  # (i, t·M, N)
        # The context has unit norm, the words have not: scaled by both, β gives ‖T̃‖ ctx without forming the context.
        beta = beta * (inverse_norm(beta, images.refined_region_gram, product_dtype(refined)) * norm.flatten(1, 2))
        # β U − T̃ by the product itself (`beta=-1`), in place of a pass of its own.
        differences = torch.baddbmm(refined.flatten(1, 2), beta.to(refined.dtype), images.refined_regions, beta=-1)
        return differences.view(refined.shape), saliency

    def attend(self, images: EncodedImages, refined: Tensor, norm: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Where each word looks: weights of the regions (i, t, M, N), summing to 1; and the words' weights ω."""
        assert images.refined_regions is not None and images.global_vector is not None
        assert images.refined_region_saliency is not None and images.refined_region_mask is not None
        block = refined.shape[:3]
        flat = refined.flatten(1, 2)
        # The global image vector rides along as one more source: its cosines are the words' saliencies.
        sources = torch.cat([images.refined_regions, images.global_vector.unsqueeze(1)], dim=1)
        # (i, N + 1, D) @ (i, D, t·M) -> (i, t·M, N + 1). In this order of the factors it is a third faster.
        # The words are not normalised; their cosines are, which are D / N times fewer numbers.
        cosine = (sources @ flat.transpose(1, 2)).transpose(1, 2).reshape(*block, -1).to(norm.dtype) / norm
        affinity = F.leaky_relu(cosine[..., :-1], self.config.leaky_slope)
        # Along the words, dim 2, each region's affinities (i, t, M, N) have unit norm; padding must not add to it.
        affinity = normalize(affinity.masked_fill(~mask[..., None], 0.0), dim=2)
        affinity = self.config.attention_scale * affinity + images.refined_region_saliency[:, None, None, :].to(
            norm.dtype
        )
        beta = masked_softmax(affinity, images.refined_region_mask[:, None, None, :], dim=-1)
        return beta, self.word_saliency(cosine[..., -1], mask)

    def word_saliency(self, cosine: Tensor, mask: Tensor) -> Tensor:
        """ω (i, t, M): mean 1 over the valid tokens, 0 at padding."""
        if not self.config.use_semantic_alignment:
            cosine = torch.zeros_like(cosine)
        saliency = masked_softmax(self.config.attention_scale * cosine, mask, dim=-1)
        return saliency * mask.sum(dim=-1, keepdim=True)


def inverse_norm(weights: Tensor, gram: Tensor, dtype: torch.dtype) -> Tensor:
    """1/‖Σ_i w_i x_i‖ from the Gram matrix x xᵀ, without the sum: (B, N, R), (B, R, R) -> (B, N, 1).

    `dtype` is what the vectors x are multiplied in: its range holds the result, where a sum of 0 were infinite in
    float16.
    """
    with torch.autocast(weights.device.type, enabled=False):
        # wᵀ G w of each row: O(R²) where the sum of the vectors itself would be O(R D).
        squared = (weights * (weights @ gram.to(weights.dtype))).sum(dim=-1, keepdim=True)
    # Rounding can leave a square of nearly 0 below it.
    return squared.clamp_min(1e-8 if dtype == torch.float16 else 1e-16).rsqrt()


# -- all pairs, block by block ---------------------------------------------------------------------------------------


class PairMatching:
    """The part of [`TVRNModel`] that scores encoded images against encoded texts.

    Attributes:
        config, pair, attention, textual_refinement, logit_scale, logit_bias, gradient_checkpointing: The model's.
        calibration_scale, calibration_shift: (1,) of the score, see `scores`.
        calibration_query: (P + 1,) weights and bias of a text's embedding, see `fits`.
    """

    config: TVRNConfig
    pair: PairStage
    attention: FragmentAttention
    textual_refinement: Gate | Recurrence | None
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None
    calibration_scale: Tensor
    calibration_shift: Tensor
    calibration_query: Tensor
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

    def fits(self, logits: Tensor, gallery_size: int, texts: EncodedTexts | None = None) -> Tensor:
        """Probabilities that an image fits a text (or a text an image), of pair logits of a calibrated model.

        The odds of `scores`, which are those of a gallery of one, divided by the gallery's size, of which one item is
        looked for; times the probability that each text is one that the model can read. They depend on the pair and
        the size alone.

        Args:
            logits: (I, T).
            gallery_size: Items searched.
            texts: T encoded texts, where texts are the queries.
        """
        scale, shift = (value.to(logits) for value in (self.calibration_scale, self.calibration_shift))
        found = torch.sigmoid(scale * logits + shift - math.log(gallery_size))
        if texts is None:
            return found
        query = self.calibration_query.to(logits)
        return found * torch.sigmoid(texts.embeds.to(logits) @ query[:-1] + query[-1])

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
        return self.has_probabilities or not self.config.use_first_stage

    @property
    def has_probabilities(self) -> bool:
        """Whether scale and shift were fitted, so that `fits` gives probabilities."""
        return bool((self.calibration_scale != 1).any() or (self.calibration_shift != 0).any())

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
        # By length, so that a chunk is as wide as its captions; columns go back to their places at the end.
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
        # (components, I, T); the argsort of an order is its inverse.
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
        # A block has no dropout, so no random state is kept. Not reentrant: that form sees no tensors inside a
        # dataclass, and their gradients would be lost.
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
        config = self.config
        weights = {name: getattr(config, f"{name}_loss_weight") for name in LOSSES}
        weights = {name: weight if losses is None or name in losses else 0.0 for name, weight in weights.items()}
        ids = (image_ids, text_image_ids)
        parts = self._pair_losses(components["reasoning"], ids, weights) if "reasoning" in components else {}
        # A loss of frozen embeddings has no gradient, and alone would fail in the backward pass; without gradients, as
        # in evaluation, it is reported all the same.
        learns = image_embeds.requires_grad or text_embeds.requires_grad or self.logit_scale.requires_grad
        if weights["contrastive"] and (learns or not torch.is_grad_enabled()):
            parts["contrastive"] = self._contrastive_loss(image_embeds, text_embeds, ids)
        if weights["late_interaction"] and "late_interaction" in components:
            parts["late_interaction"] = positives_cross_entropy(
                components["late_interaction"], *ids, config.label_smoothing
            )
        # The better score teaches, or is weighed: in neither does it learn itself.
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
        learned = [getattr(self.pair, f"{name}_weight", None) for name in components]
        if len(components) > 1 and any(weight is not None and weight.requires_grad for weight in learned):
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
    words = max(int(texts.word_mask.sum(dim=1).float().mean()), 1)
    if texts.recurrent_words is not None:  # words and their expansions: M = 2W
        words *= 2
    return max(budget // (words * width * texts.words.element_size()), 1)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]

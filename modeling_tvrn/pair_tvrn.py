"""The pair stage: every image of a block against every caption of a block, without a loop over either. Shipped.

No weight matrix is applied per pair before the similarity transform (with `refinement="gate"`): what depends on one
side only was computed when the item was encoded, linear maps were moved in front of the attention they commute with,
and a Gram matrix gives a context's norm.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_tvrn import TVRNConfig
from .encoded_tvrn import EncodedImages, EncodedTexts
from .layers_tvrn import FragmentAttention, Gate, Recurrence, masked_softmax, normalize, product_dtype, wide


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
        log_weights = torch.where(weights > 0, weights.clamp_min(torch.finfo(weights.dtype).tiny).log(), floor)
        for step in self.steps:
            nodes = step(nodes, log_weights)
        return self.logit(nodes[:, 0]).squeeze(-1).to(weights.dtype)


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
        local = self.local_similarity(differences.square_())
        assert images.global_vector is not None
        overall = self.global_similarity((images.global_vector.unsqueeze(1) - global_text).square())
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
            if text_embeds.ndim == 3:
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
            cosine = (texts.words.flatten(1, 2) @ images.regions.transpose(1, 2)).transpose(0, 1)
        else:
            cosine = texts.words.flatten(0, 1) @ images.regions.flatten(0, 1).T
        cosine = cosine.reshape(-1, *images.region_mask.shape).to(wide(cosine))
        scale = self.config.attention_scale
        masked = (scale * cosine).masked_fill(~images.region_mask, torch.finfo(cosine.dtype).min)
        counts = images.region_mask.sum(dim=1).to(cosine.dtype)
        best = (masked.logsumexp(dim=-1) - counts.log()) / scale
        with torch.autocast(best.device.type, enabled=False):
            weights = texts.word_weights.to(best.dtype)
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
            scores = images.context_keys @ texts.context_queries.flatten(1, 2).transpose(1, 2)
        else:
            scores = images.context_keys.flatten(0, 1) @ texts.context_queries.flatten(0, 1).T
        # Not len(images): that is an int, and an exported graph would keep this one.
        scores = scores.view(images.context_keys.shape[0], regions, captions, words).transpose(1, 2)
        alpha = attention.weights(scores, texts.word_mask, images.region_mask.unsqueeze(1))
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
            own = texts.gates.flatten(-3, -2).expand(shape[0], -1, -1)
            # The sum belongs to the product, the sigmoid is in place: a pass over memory costs as much as a product.
            gate = torch.baddbmm(own, alpha, gate).sigmoid_()
            refined = torch.addcmul(texts.words.flatten(-3, -2), gate, alpha @ carried).view(shape)
        elif isinstance(refinement, Recurrence):
            assert texts.recurrent_state is not None and texts.recurrent_words is not None
            assert images.context_values is not None
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
        weights = (weights / norm.squeeze(-1)).to(refined.dtype)
        return normalize((weights.unsqueeze(-2) @ refined).squeeze(-2))

    def align(self, images: EncodedImages, refined: Tensor, norm: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Semantic alignment enhancement: ‖T̃‖ (ctx − T) (i, t, M, D), the words' weights ω = n_tokens·a^t (i, t, M).

        The factor saves a pass over the refined words; a similarity vector, which is normalised, does not feel it.
        """
        assert images.refined_regions is not None and images.refined_region_gram is not None
        beta, saliency = self.attend(images, refined, norm, mask)
        beta = beta.flatten(1, 2)
        beta = beta * (inverse_norm(beta, images.refined_region_gram, product_dtype(refined)) * norm.flatten(1, 2))
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
        # In this order of the factors the product is a third faster.
        cosine = (sources @ flat.transpose(1, 2)).transpose(1, 2).reshape(*block, -1).to(norm.dtype) / norm
        affinity = F.leaky_relu(cosine[..., :-1], self.config.leaky_slope)
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
        squared = (weights * (weights @ gram.to(weights.dtype))).sum(dim=-1, keepdim=True)
    return squared.clamp_min(1e-8 if dtype == torch.float16 else 1e-16).rsqrt()

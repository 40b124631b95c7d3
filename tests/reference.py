"""The pair score of TVRN in float64 NumPy, one image and one caption at a time, written from the model's equations.

This is the oracle of test_modeling_reference: no torch, no batch, no padding, no mask. An image *is* its valid
regions and a caption *is* its words, so nothing here could depend on a neighbour. Loops follow the formulas; nothing
is rearranged for speed. "§" numbers are those of the equations the modeling files cite.

Where the equations leave a form open, this is what was chosen (and is documented in the config and the layers):

* attention pooling (§4b): LayerNorm stands between the linear layer and its tanh, where SGRAF has BatchNorm; both
  linear layers have a bias, the score has none. The mean x̄ is that of the tokens which are pooled: U for images, t for
  texts.
* no weights but those of the region, word, pooling and pooled-feature projections and of the two logits have a bias.
* embeddings (§5): with `use_pooled_features` the mean of the *input* features (valid regions; embeddings of the words;
  outputs of a Hub text tower at the attended tokens, special ones too) is added before n(·), through a linear layer
  and, unless `pooled_hidden_size=0`, a perceptron with one hidden GELU layer beside it. Without `use_refined_features`
  that is all the embeddings see.
* text embedding (§5): the mean of t, and of n(GRU(t) + t) with `refinement="gru"`, but of t again where
  `use_text_refinement=False` leaves no GRU on that side.
* the IoU of two boxes without area is 0 (a region still sees itself).
* `word_embeddings + BiGRU` (§3a) reads the words to match alone: masked tokens are not part of its sequence.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

IOU_SLACK = 1e-4


def unit(x: Array) -> Array:
    """n(x) of one vector."""
    return x / np.sqrt(np.sum(x * x))


def softmax(x: Array) -> Array:
    exponentials = np.exp(x - np.max(x))
    return exponentials / exponentials.sum()


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    """x Φ(x)."""
    return np.array([0.5 * y * (1 + math.erf(y / math.sqrt(2))) for y in x])


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weight + bias


def iou(a: Array, b: Array) -> float:
    """Intersection over union of two boxes x1 y1 x2 y2."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def place(box: Array) -> Array:
    """A box's corners, centre and size."""
    x1, y1, x2, y2 = box
    return np.array([x1, y1, x2, y2, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])


def relation(box: Array, other: Array) -> Array:
    """Where the other box lies, in sizes of this one, and how much larger it is; logarithms."""
    numbers = []
    for low, high in ((0, 2), (1, 3)):
        size = max(box[high] - box[low], 1e-3)
        offset = ((other[low] + other[high]) - (box[low] + box[high])) / 2 / size
        numbers.append(math.copysign(math.log(1 + abs(offset)), offset))
    for low, high in ((0, 2), (1, 3)):
        numbers.append(math.log(max(other[high] - other[low], 1e-3) / max(box[high] - box[low], 1e-3)))
    return np.array(numbers)


@dataclass
class Image:
    """One image: regions v, contexts c^v (R, D), regions U (N, D), g^v (D,), saliencies a^v (N,), embedding (P,)."""

    regions: Array
    contexts: Array
    tokens: Array
    overall: Array
    saliency: Array
    embedding: Array


@dataclass
class Text:
    """One caption: words t (W, D), contexts c^t (W, D), pooling weights w (W,), embedding (P,)."""

    words: Array
    contexts: Array
    weights: Array
    embedding: Array


class Reference:
    """The equations with one model's weights.

    Args:
        weights: The model's `state_dict` as NumPy arrays.
        config: The model's config.
    """

    def __init__(self, weights: dict[str, NDArray[Any]], config: Any):
        self.weights = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
        self.config = config

    def score(self, features: Array, boxes: Array | None, **words: Any) -> float:
        """The logit of one image's regions (R, F) and boxes (R, 4) with one caption's words (see `text`)."""
        return self.pair(self.image(features, boxes), self.text(**words))

    # -- shared pieces ------------------------------------------------------------------------------------------------

    def linear(self, name: str, x: Array) -> Array:
        """W x, + b where the layer has one."""
        y = self.weights[f"{name}.weight"] @ x
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def leaky(self, x: Array) -> Array:
        return np.where(x > 0, x, self.config.leaky_slope * x)

    def attend(self, queries: Array, sources: Array) -> Array:
        """att(q, c), §2: one context for each query."""
        affinity = np.empty((len(sources), len(queries)))
        for i, source in enumerate(sources):
            for j, query in enumerate(queries):
                affinity[i, j] = self.linear("attention.key", source) @ self.linear("attention.query", query)
            affinity[i] = unit(self.leaky(affinity[i]))
        contexts = []
        for j in range(len(queries)):
            alpha = softmax(self.config.attention_scale * affinity[:, j])
            contexts.append(unit(sum(a * source for a, source in zip(alpha, sources, strict=True))))
        return np.array(contexts)

    def gru(self, name: str, inputs: Array, state: Array | None = None, suffix: str = "l0") -> Array:
        """Outputs of a GRU, its state starting at 0."""
        w = {k: self.weights[f"{name}.{k}_{suffix}"] for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        size = w["weight_hh"].shape[1]
        reset, update, new = slice(0, size), slice(size, 2 * size), slice(2 * size, 3 * size)
        state = np.zeros(size) if state is None else state
        outputs = []
        for x in inputs:
            a, b = w["weight_ih"] @ x + w["bias_ih"], w["weight_hh"] @ state + w["bias_hh"]
            r, z = sigmoid(a[reset] + b[reset]), sigmoid(a[update] + b[update])
            candidate = np.tanh(a[new] + r * b[new])
            state = (1 - z) * candidate + z * state
            outputs.append(state)
        return np.array(outputs)

    def refine(self, name: str, fragments: Array, contexts: Array) -> Array:
        """Fragments refined by their contexts, §2 and §4: N tokens with "gate", 2N with "gru"."""
        if self.config.refinement == "gru":
            sequence = np.concatenate([fragments, contexts])
            outputs = self.gru(f"{name}.gru", sequence)
            return np.array([unit(x) for x in outputs + np.concatenate([fragments, fragments])])
        a = self.weights[f"{name}.own.weight"]
        b, c = np.split(self.weights[f"{name}.context.weight"], 2)
        tokens = [x + sigmoid(a @ x + b @ y) * (c @ y) for x, y in zip(fragments, contexts, strict=True)]
        return np.array([unit(x) for x in tokens])

    def pooling_weights(self, name: str, tokens: Array) -> Array:
        """Attention of tokens against their mean, §4b."""
        branches = {}
        for branch, rows in (("local", tokens), ("overall", [tokens.mean(axis=0)])):
            norm = self.weights[f"{name}.{branch}.1.weight"], self.weights[f"{name}.{branch}.1.bias"]
            branches[branch] = [np.tanh(layer_norm(self.linear(f"{name}.{branch}.0", x), *norm)) for x in rows]
        mean = branches["overall"][0]
        return softmax(np.array([(self.linear(f"{name}.score", x * mean)).item() for x in branches["local"]]))

    def embedding(self, side: str, summary: Array, mean_feature: Array) -> Array:
        """image_embeds or text_embeds of one item, §5."""
        embedding = np.zeros(self.config.projection_size)
        if self.config.use_refined_features:
            embedding = embedding + self.linear(f"{side}_embedding", summary)
        if self.config.use_pooled_features:
            name = f"pooled_{side}_embedding"
            embedding = embedding + self.linear(f"{name}.linear", mean_feature)
            if self.config.pooled_hidden_size:
                hidden = gelu(self.linear(f"{name}.perceptron.0", mean_feature))
                embedding = embedding + self.linear(f"{name}.perceptron.3", hidden)
        return unit(embedding)

    # -- one side -----------------------------------------------------------------------------------------------------

    def image(self, features: Array, boxes: Array | None) -> Image:
        """§2 and §5 of one image: region features (R, F), boxes (R, 4)."""
        config = self.config
        regions = [self.linear("region_projection", x) for x in features]
        if config.use_box_positions:
            assert boxes is not None
            regions = [
                v + self.box_perceptron("box_embedding", place(box)) for v, box in zip(regions, boxes, strict=True)
            ]
        regions = np.array([unit(v) for v in regions])
        contexts = self.attend(regions, regions)
        if config.use_geometric_context:
            assert boxes is not None
            contexts = np.array(
                [unit((c + g) / 2) for c, g in zip(contexts, self.geometry(regions, boxes), strict=True)]
            )
        joint = np.array([unit(self.leaky(v * c)) for v, c in zip(regions, contexts, strict=True)])
        tokens = self.refine("visual_refinement", regions, joint)
        overall = unit(self.pooling_weights("image_pooling", tokens) @ tokens)
        saliency = np.full(len(tokens), 1 / len(tokens))
        if config.use_semantic_alignment:
            saliency = softmax(config.attention_scale * np.array([u @ overall for u in tokens]))
        summary = np.concatenate([overall, tokens.mean(axis=0)])
        embedding = self.embedding("image", summary, features.mean(axis=0))
        return Image(regions, contexts, tokens, overall, saliency, embedding)

    def box_perceptron(self, name: str, numbers: Array) -> Array:
        return self.linear(f"{name}.2", gelu(self.linear(f"{name}.0", numbers)))

    def geometry(self, regions: Array, boxes: Array) -> Array:
        """n(P v), §2: contexts of regions whose boxes overlap."""
        queries = [unit(self.linear("geometry.query", v)) for v in regions]
        keys = [unit(self.linear("geometry.key", v)) for v in regions]
        contexts = []
        for i, query in enumerate(queries):
            overlaps = [iou(boxes[i], box) for box in boxes]
            near = [j for j, x in enumerate(overlaps) if j == i or x >= self.config.iou_threshold - IOU_SLACK]
            cosines = [query @ keys[j] for j in near]
            if self.config.use_relative_geometry:
                seen = [self.box_perceptron("geometry.relation", relation(boxes[i], boxes[j])).item() for j in near]
                cosines = np.add(cosines, seen)
            p = softmax(self.config.attention_scale * np.array(cosines))
            contexts.append(unit(p @ regions[near]))
        return np.array(contexts)

    def text(
        self,
        ids: list[int] | None = None,
        features: Array | None = None,
        is_word: list[bool] | None = None,
    ) -> Text:
        """§3 and §5 of one caption.

        Args:
            ids: Token ids of the words, without a Hub text tower.
            features: (tokens, F) outputs of the tower at the attended tokens.
            is_word: Which of those are words to match; `None`: all.
        """
        if features is None:
            assert ids is not None
            embedded = self.weights["word_encoder.embeddings.weight"][ids]
            forward = self.gru("word_encoder.gru", embedded)
            backward = self.gru("word_encoder.gru", embedded[::-1], suffix="l0_reverse")[::-1]
            projected, seen = (forward + backward) / 2, embedded
        else:
            kept = features if is_word is None else features[np.array(is_word)]
            projected, seen = np.array([self.word(x) for x in kept]), features
        words = np.array([unit(x) for x in projected])
        summary = words
        if self.config.use_text_refinement and self.config.refinement == "gru":
            summary = np.array([unit(x) for x in self.gru("textual_refinement.gru", words) + words])
        embedding = self.embedding("text", summary.mean(axis=0), seen.mean(axis=0))
        return Text(words, self.attend(words, words), self.pooling_weights("text_pooling", words), embedding)

    def word(self, feature: Array) -> Array:
        """Projection of one output of a text tower, with the perceptron beside it where there is one."""
        projected = self.linear("word_projection", feature)
        if not self.config.word_hidden_size:
            return projected
        return projected + self.linear("word_perceptron.3", gelu(self.linear("word_perceptron.0", feature)))

    # -- pair ---------------------------------------------------------------------------------------------------------

    def pair(self, image: Image, text: Text) -> float:
        """§4: the logit of one image and one caption."""
        config = self.config
        tokens, weights = text.words, text.weights
        if config.use_text_refinement:
            expansion = self.attend(text.contexts, image.contexts)
            tokens = self.refine("textual_refinement", text.words, expansion)
            weights = np.tile(weights, len(tokens) // len(weights)) * len(weights) / len(tokens)
        overall = unit(weights @ tokens)
        refined_regions = self.align(image, tokens)
        local = [self.similarity("local", c, t) for c, t in zip(refined_regions, tokens, strict=True)]
        nodes = np.array([self.similarity("global", image.overall, overall), *local])
        parts = {"reasoning": self.reason(nodes, np.array([1.0, *self.word_weights(image, tokens)]))}
        if config.use_late_interaction:
            scale = math.exp(self.weights["pair.late_interaction_scale"].item())
            parts["late_interaction"] = scale * self.late_interaction(image, text)
        if config.use_first_stage:
            parts["first_stage"] = math.exp(self.weights["logit_scale"].item()) * (image.embedding @ text.embedding)
        return sum(max(self.weight(name), 0.0) * value for name, value in parts.items())

    def weight(self, name: str) -> float:
        """A component's learned weight; the first stage, and what is alone, have none."""
        learned = self.weights.get(f"pair.{name}_weight")
        return 1.0 if learned is None else learned.item()

    def late_interaction(self, image: Image, text: Text) -> float:
        """The words' weighted mean of the soft maximum of their cosines with the regions."""
        scale, total = self.config.attention_scale, 0.0
        for weight, word in zip(text.weights, text.words, strict=True):
            likelihood = [math.exp(scale * (word @ region)) for region in image.regions]
            total += weight * math.log(sum(likelihood) / len(likelihood)) / scale
        return float(total)

    def align(self, image: Image, tokens: Array) -> Array:
        """ctx, the refined region for each word."""
        affinity = np.array([[self.leaky(t @ u) for u in image.tokens] for t in tokens])
        for i in range(len(image.tokens)):
            affinity[:, i] = unit(affinity[:, i])
        contexts = []
        for row in affinity:
            beta = softmax(self.config.attention_scale * row + np.log(image.saliency))
            contexts.append(unit(beta @ image.tokens))
        return np.array(contexts)

    def word_weights(self, image: Image, tokens: Array) -> Array:
        """ω_p = n_tokens · a^t_p."""
        if not self.config.use_semantic_alignment:
            return np.ones(len(tokens))
        saliency = softmax(self.config.attention_scale * np.array([t @ image.overall for t in tokens]))
        return len(tokens) * saliency

    def similarity(self, level: str, a: Array, b: Array) -> Array:
        return unit(self.linear(f"pair.{level}_similarity", (a - b) ** 2))

    def reason(self, nodes: Array, omega: Array) -> float:
        """SAF or SGR, §4b."""
        if self.config.similarity_head == "saf":
            beta = np.array([sigmoid(self.linear("pair.head.gate", s)).item() for s in nodes])
            mixed = sum(w * b * s for w, b, s in zip(omega, beta, nodes, strict=True)) / np.sum(omega * beta)
            return self.linear("pair.head.logit", mixed).item()
        for step in range(3):
            nodes = self.graph_step(f"pair.head.steps.{step}", nodes, omega)
        return self.linear("pair.head.logit", nodes[0]).item()

    def graph_step(self, name: str, nodes: Array, omega: Array) -> Array:
        updated = []
        for p in nodes:
            scores = [self.linear(f"{name}.source", p) @ self.linear(f"{name}.target", q) for q in nodes]
            edges = softmax(np.array(scores) + np.log(omega))
            updated.append(np.maximum(self.linear(f"{name}.update", edges @ nodes), 0))
        return np.array(updated)

"""Sizes and switches of a TVRN model. Shipped with every checkpoint."""

import difflib
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .trust_tvrn import without_code

# Unknown keywords are refused when a config is written by hand, and let through when one is read from a checkpoint:
# a file saved by a newer release must still load.
_LOADING: ContextVar[bool] = ContextVar("tvrn_config_loading", default=False)

REFINEMENTS = ("gate", "gru")
SIMILARITY_HEADS = ("saf", "sgr")
POSITIVE = (
    "region_feature_size",
    "vocab_size",
    "word_embedding_size",
    "hidden_size",
    "projection_size",
    "similarity_size",
    "attention_scale",
    "evidence_scale",
    "matching_temperature",
    "distillation_temperature",
)


class TVRNConfig(PreTrainedConfig):
    r"""
    Configuration of a [`TVRNModel`]. The default sizes are the paper's.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Vision tower that turns `pixel_values` into regions. `None`: the model reads `region_features`.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Text tower. `None`: word embeddings and a bidirectional GRU.
        freeze_vision, freeze_text (`bool`, defaults to `False`):
            Frozen towers run without gradient and in evaluation mode.
        freeze_word_embeddings (`bool`, defaults to `False`):
            Keep the word embeddings that `TVRNModel.from_backbones(word_embeddings=…)` took over; the GRU learns.
        vision_grid_size (`int`, *optional*):
            Average-pool the tower's map to this many rows and columns of regions. `None` keeps the map as it is.
        region_feature_size (`int`, defaults to 2048): Size of one region feature.
        vocab_size (`int`, defaults to 10000): Number of words (only without `text_config`).
        word_embedding_size (`int`, defaults to 300): Size of a word's embedding (only without `text_config`).
        pad_token_id (`int`, *optional*, defaults to 0): The word that fills up captions; its embedding stays 0.
        hidden_size (`int`, defaults to 1024): D, the size of regions and words.
        projection_size (`int`, defaults to 1024): P, the size of `image_embeds` and `text_embeds`.
        similarity_size (`int`, defaults to 256): S, the size of one similarity vector.
        attention_scale (`float`, defaults to 9.0): λ, inverse temperature of every attention over fragments.
        leaky_slope (`float`, defaults to 0.1): Negative slope of the LeakyReLUs.
        iou_threshold (`float`, defaults to 0.2):
            Regions whose boxes overlap at least this much are geometric neighbours.
        refinement (`"gate"` or `"gru"`, defaults to `"gate"`):
            How contexts refine words and regions, on both sides; `"gru"` is the published form.
        similarity_head (`"saf"` or `"sgr"`, defaults to `"saf"`): How similarity vectors become one logit.
        use_geometric_context (`bool`, defaults to `True`):
            A region's context holds its geometric neighbours too; needs boxes. The first of the paper's three ablation
            switches.
        use_text_refinement (`bool`, defaults to `True`):
            The contexts of the image that is scored refine the words.
        use_semantic_alignment (`bool`, defaults to `True`):
            Regions and words count by their agreement with the global image vector; without it all count alike.
        use_embedding_similarity (`bool`, defaults to `True`):
            Add the (scaled) cosine of the two embeddings to the pair logit. The published form leaves it out.
        embedding_scale_init_value (`float`, defaults to 10.0): Start of that cosine's learned scale.
        use_token_similarity (`bool`, defaults to `True`):
            Add the (scaled) token similarity to the pair logit: the words' weighted mean of the soft maximum of their
            cosines with the regions. The published form leaves it out.
        token_logit_scale_init_value (`float`, defaults to 3.0):
            Log of its scale's start; the scale is learned, and is the scale of its contrastive loss as well.
        evidence_scale (`float`, defaults to 1.0):
            What the evidence, the published logit, is multiplied by in the pair logit; not learned.
        train_evidence_alone (`bool`, defaults to `False`):
            Let the losses of the pair score see the evidence, before its scale and without those two terms, which are
            added in the score alone.
            Trained on the sum, the evidence learns only what they leave of the training set, and that generalises
            worse.
        use_refined_features (`bool`, defaults to `True`):
            Let the embeddings see the refined regions (their attention pooling and mean) and words.
        use_pooled_features (`bool`, defaults to `True`):
            Let the embeddings also see the mean of the input features (region features, word embeddings or the text
            tower's outputs), through a linear layer and a two-layer perceptron side by side.
        pooled_hidden_size (`int`, defaults to 1024): Hidden units of those perceptrons; 0: the linear layer alone.
        word_hidden_size (`int`, defaults to 0):
            Hidden units of a perceptron beside the linear projection of a text tower's tokens; 0: the linear layer
            alone.
        use_unimodal_heads (`bool`, defaults to `False`):
            A head on each side whose embeddings compare images with images and texts with texts; trained by CUSA's
            uni-modal part, see `get_image_features(…, unimodal=True)`.
        dropout (`float`, defaults to 0.4): Inside the attention pooling and the perceptrons of both sides.
        pooled_dropout (`float`, *optional*): Inside the perceptrons of the pooled features; `None`: `dropout`.
        image_dropout (`float`, defaults to 0.0): On region features.
        text_dropout (`float`, defaults to 0.0): On word embeddings and text tower features.
        margin (`float`, defaults to 0.2): Of the hinge losses: how far a pair must be above its negatives.
        matching_temperature (`float`, defaults to 0.05): Divides the pair scores in the matching loss.
        matching_loss_weight (`float`, defaults to 1.0): Weight of the matching loss of the pair scores.
        pair_contrastive_loss_weight (`float`, defaults to 0.0): Weight of InfoNCE of the pair logits.
        contrastive_loss_weight (`float`, defaults to 1.0): Weight of InfoNCE of the embeddings.
        token_contrastive_loss_weight (`float`, defaults to 1.0): Weight of InfoNCE of the token similarities.
        distillation_loss_weight (`float`, defaults to 0.0):
            Weight of what the embeddings learn from the pair logits of the same batch: the divergence of the two
            softmaxes, in steps that compute both.
        distillation_temperature (`float`, defaults to 2.0): Divides the pair logits there.
        hardest_negative_loss_weight (`float`, defaults to 0.0):
            Weight of the hinge on the hardest negatives of the pair scores.
        label_smoothing (`float`, defaults to 0.0): Of the three cross-entropies.
        logit_scale_init_value (`float`, defaults to 2.6592): Log of the contrastive loss's first scale, as in CLIP.
        pair_chunk_size (`int`, *optional*):
            Image–caption pairs scored at once, which bounds the memory of the pair stage. `None`: as many as keep one
            (pairs, words, D) tensor in a CPU's cache (4 MiB), or within 256 MiB of a GPU.
        checkpoint_pair_chunks (`bool`, defaults to `True`):
            In training, recompute each chunk in the backward pass, so that memory is bounded by the chunk and not by
            the batch. `False` saves a third of the pair stage's time where a batch's pairs fit in memory.
        initializer_range (`float`, defaults to 0.02): Of embeddings; linear layers are Xavier-initialised.

    Raises:
        ValueError: On an unknown keyword, or a value outside its range.
    """

    model_type = "tvrn"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    freeze_vision: bool = False
    freeze_text: bool = False
    freeze_word_embeddings: bool = False
    vision_grid_size: int | None = None
    region_feature_size: int = 2048
    vocab_size: int = 10000
    word_embedding_size: int = 300
    pad_token_id: int | None = 0
    hidden_size: int = 1024
    projection_size: int = 1024
    similarity_size: int = 256
    attention_scale: float | int = 9.0
    leaky_slope: float | int = 0.1
    iou_threshold: float | int = 0.2
    refinement: str = "gate"
    similarity_head: str = "saf"
    use_geometric_context: bool = True
    use_text_refinement: bool = True
    use_semantic_alignment: bool = True
    use_embedding_similarity: bool = True
    embedding_scale_init_value: float | int = 10.0
    use_token_similarity: bool = True
    token_logit_scale_init_value: float | int = 3.0
    evidence_scale: float | int = 1.0
    train_evidence_alone: bool = False
    use_refined_features: bool = True
    use_pooled_features: bool = True
    pooled_hidden_size: int = 1024
    word_hidden_size: int = 0
    use_unimodal_heads: bool = False
    dropout: float | int = 0.4
    pooled_dropout: float | int | None = None
    image_dropout: float | int = 0.0
    text_dropout: float | int = 0.0
    margin: float | int = 0.2
    matching_temperature: float | int = 0.05
    matching_loss_weight: float | int = 1.0
    pair_contrastive_loss_weight: float | int = 0.0
    contrastive_loss_weight: float | int = 1.0
    token_contrastive_loss_weight: float | int = 1.0
    distillation_loss_weight: float | int = 0.0
    distillation_temperature: float = 2.0
    hardest_negative_loss_weight: float | int = 0.0
    label_smoothing: float | int = 0.0
    logit_scale_init_value: float | int = 2.6592
    pair_chunk_size: int | None = None
    checkpoint_pair_chunks: bool = True
    initializer_range: float | int = 0.02

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        token = _LOADING.set(True)
        try:
            return super().from_dict(config_dict, **kwargs)
        finally:
            _LOADING.reset(token)

    def __post_init__(self, **kwargs: Any) -> None:
        if not _LOADING.get():
            self._refuse_unknown(kwargs)
        self.vision_config = self._sub_config("vision_config", self.vision_config)
        self.text_config = self._sub_config("text_config", self.text_config)
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise a `ValueError` for a value outside its range (also run by the model: attributes can be set later)."""
        for name, choices in (("refinement", REFINEMENTS), ("similarity_head", SIMILARITY_HEADS)):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}.")
        for name in POSITIVE:
            if not (_is_number(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number above 0.")
        fractions = ("iou_threshold", "dropout", "image_dropout", "text_dropout", "label_smoothing", "margin")
        for name in (*fractions, "leaky_slope"):
            if not (_is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number in [0, 1).")
        if self.pooled_dropout is not None and not (_is_number(self.pooled_dropout) and 0 <= self.pooled_dropout < 1):
            raise ValueError(f"pooled_dropout is {self.pooled_dropout!r}; expected None or a number in [0, 1).")
        if not (self.use_refined_features or self.use_pooled_features):
            raise ValueError(
                "use_refined_features and use_pooled_features are both False; the embeddings need at least one."
            )
        for name in ("pooled_hidden_size", "word_hidden_size"):
            if not (_is_number(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected 0 (linear) or more.")
        for name in ("vision_grid_size", "pair_chunk_size"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value >= 1):
                raise ValueError(f"{name} is {value!r}; expected None or at least 1.")
        self._check_by_kind()
        self._check_words()

    def _check_by_kind(self) -> None:
        """Switches, starts of learned scales, and weights of losses, which their types and names tell apart."""
        for name, field in type(self).__dataclass_fields__.items():
            if name in PreTrainedConfig.__dataclass_fields__:
                continue
            value = getattr(self, name)
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; expected True or False.")
            if name.endswith("_init_value") and not _is_number(value):
                raise ValueError(f"{name} is {value!r}; expected a number, such as {field.default}.")
            if name.endswith("_loss_weight") and not (_is_number(value) and value >= 0):
                raise ValueError(f"{name} is {value!r}; expected 0 (off) or more.")

    def _check_words(self) -> None:
        if self.text_config is not None and self.freeze_word_embeddings:
            raise ValueError("freeze_word_embeddings is True, but there is a text tower; use freeze_text.")
        pad = self.pad_token_id
        if self.text_config is None and pad is not None and not 0 <= pad < self.vocab_size:
            raise ValueError(
                f"pad_token_id is {pad}, with a vocab_size of {self.vocab_size}; expected a word's number from 0 to "
                f"{self.vocab_size - 1}, or None."
            )

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        known = set(type(self).__dataclass_fields__)
        for key in kwargs:
            if key.startswith("_") or key in _BASE_KEYWORDS or _is_base_attribute(key):
                continue
            close = difflib.get_close_matches(key, known, n=3)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see help(TVRNConfig)."
            raise ValueError(f"TVRNConfig got an unknown keyword {key!r} (value {kwargs[key]!r}); {hint}")

    @staticmethod
    def _sub_config(name: str, value: Any) -> PreTrainedConfig | None:
        if value is None or isinstance(value, PreTrainedConfig):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{name} is {value!r}; expected a configuration or a dict of its fields. For towers of the Hub by id "
                "or path use TVRNModel.from_backbones."
            )
        model_type = value.get("model_type")
        if model_type not in CONFIG_MAPPING and "auto_map" in value:
            raise ValueError(
                f"{name} names code of its own (auto_map) for its model_type {model_type!r}, which transformers does "
                "not know; a tower inside a TVRN checkpoint is built by transformers' classes alone."
            )
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"{name} has model_type {model_type!r}; expected a type that transformers knows "
                "(for example 'vit' or 'bert'), or a config object."
            )
        return CONFIG_MAPPING[model_type].from_dict(without_code(value))


def _is_base_attribute(name: str) -> bool:
    """Whether every configuration has it without a field of its own (`name_or_path`, …); methods are none."""
    return hasattr(PreTrainedConfig, name) and not callable(getattr(PreTrainedConfig, name))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_BASE_KEYWORDS = frozenset(
    {"attn_implementation", "experts_implementation", "torch_dtype", "model_type", "auto_map", "per_layer_config"}
)

TVRNConfig.register_for_auto_class()

__all__ = ["TVRNConfig"]

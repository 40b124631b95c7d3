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
REGION_SOURCES = ("hidden_state", "pooled_map")
# What the processor makes of a picture, as arguments of `encode_images`.
PIXEL_INPUTS = ("pixel_values", "detector_pixel_values", "pixel_extents")
# Detectors by model_type: what a query's score is made of. Softmax: the last class is "no object".
DETECTORS = {
    **dict.fromkeys(("d_fine", "rt_detr", "rt_detr_v2", "deimv2", "deformable_detr"), "sigmoid"),
    **dict.fromkeys(("detr", "yolos"), "softmax"),
    "owlv2": "objectness",
}
# Others that transformers calls detectors, and why they can't be one here.
NO_DETECTORS = {
    "rf_detr": "its image processor needs torchvision",
    "owlvit": "without a text nothing says which of its boxes hold an object; OWLv2 does",
}
# What a field is where it is not given: without a pretrained dual encoder, and with one.
BY_FIRST_STAGE: dict[str, tuple[Any, Any]] = {
    "freeze_vision": (False, True),
    "freeze_text": (False, True),
    "component_weight_init_value": (1.0, 0.0),
    "matching_loss_weight": (1.0, 0.0),
    "pair_contrastive_loss_weight": (0.0, 1.0),
}
POSITIVE = (
    "region_feature_size",
    "vocab_size",
    "word_embedding_size",
    "hidden_size",
    "projection_size",
    "similarity_size",
    "attention_scale",
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
        dual_encoder_config (`PreTrainedConfig` or `dict`, *optional*):
            A dual encoder (CLIP, SigLIP, …) that is both towers and the first stage of the score, in place of
            `vision_config` and `text_config`: `image_embeds`, `text_embeds` and their logit are its own. See
            `TVRNModel.from_dual_encoder`.
        detector_config (`PreTrainedConfig` or `dict`, *optional*):
            An object detector (D-FINE, RT-DETR, DETR, YOLOS, OWLv2, …) whose boxes are the regions, in place of the
            vision tower's grid; beside `vision_config` or `dual_encoder_config`, or alone.
        freeze_detector (`bool`, defaults to `True`): The detector runs without gradient and in evaluation mode.
        max_regions (`int`, defaults to 36): Boxes kept of an image, the ones that the detector is surest of.
        region_source (`"hidden_state"` or `"pooled_map"`, defaults to `"hidden_state"`):
            What a box's feature is: the detector's own, of the query that found it, or the mean inside the box of the
            map of the vision tower or dual encoder.
        nms_iou (`float`, *optional*):
            Of boxes that overlap more than this the surer one stays. `None`: 0.7 for OWLv2, none for detectors that
            are trained to find each object once.
        freeze_vision, freeze_text (`bool`, *optional*):
            Frozen towers run without gradient and in evaluation mode. `None`: those of a dual encoder are frozen,
            others are not.
        freeze_first_stage (`bool`, defaults to `True`):
            Of a dual encoder: keep its projections, scale and bias as they are (the towers have their own switches).
        freeze_word_embeddings (`bool`, defaults to `False`):
            Keep the word embeddings that `TVRNModel.from_backbones(word_embeddings=…)` took over; the GRU learns.
        vision_grid_size (`int`, *optional*):
            Average-pool the tower's map to this many rows and columns of regions. `None` keeps the map as it is.
        region_feature_size (`int`, defaults to 2048): Size of one region feature.
        vocab_size (`int`, defaults to 10000): Number of words (only without `text_config`).
        word_embedding_size (`int`, defaults to 300): Size of a word's embedding (only without `text_config`).
        pad_token_id (`int`, *optional*, defaults to 0): The word that fills up captions; its embedding stays 0.
        special_token_ids (`list[int]`, *optional*):
            Ids of the tokenizer that are no words to match, such as [CLS] and [SEP]: what `word_mask` follows from
            where it is not given, as by transformers' pipelines. `None`: every attended position is a word then.
        hidden_size (`int`, defaults to 1024): D, the size of regions and words.
        projection_size (`int`, defaults to 1024):
            P, the size of `image_embeds` and `text_embeds`; a dual encoder's is its own.
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
        use_box_positions (`bool`, defaults to `False`):
            Add an embedding of each box (corners, centre, size) to its region, which otherwise knows no place:
            mirroring all boxes would change no score. Starts at 0; needs boxes.
        use_relative_geometry (`bool`, defaults to `False`):
            Where the geometric context looks also depends on how its two boxes lie to each other (offsets, ratios of
            their sizes), not on their overlap alone. Starts at 0.
        use_text_refinement (`bool`, defaults to `True`):
            The contexts of the image that is scored refine the words.
        use_semantic_alignment (`bool`, defaults to `True`):
            Regions and words count by their agreement with the global image vector; without it all count alike.
        use_first_stage (`bool`, defaults to `True`):
            Add the first stage, exp(logit_scale)·cosine of the two embeddings, to the pair logit. The published form
            leaves it out; a dual encoder's is always in.
        use_late_interaction (`bool`, defaults to `True`):
            Add late interaction to the pair logit: the (scaled) words' weighted mean of the soft maximum of their
            cosines with the regions. The published form leaves it out.
        late_interaction_scale_init_value (`float`, defaults to 3.0):
            Log of its scale's start; the scale is learned, and is the scale of its contrastive loss as well.
        use_reasoning (`bool`, defaults to `True`):
            Add the reasoning, the paper's published logit, to the pair logit.
        component_weight_init_value (`float`, *optional*):
            Start of the learned non-negative weights of late interaction and reasoning in a logit of several
            components. Each component learns by losses of its own; its weight by InfoNCE of the sum. `None`: 0 over a
            dual encoder, whose logit is then the pair logit at first, and 1 elsewhere.
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
        matching_loss_weight (`float`, *optional*):
            Weight of the matching loss of the reasoning's sigmoids. `None`: 1, and 0 over a dual encoder.
        pair_contrastive_loss_weight (`float`, *optional*):
            Weight of InfoNCE of the reasoning. `None`: 0, and 1 over a dual encoder.
        contrastive_loss_weight (`float`, defaults to 1.0): Weight of InfoNCE of the embeddings.
        late_interaction_loss_weight (`float`, defaults to 1.0): Weight of InfoNCE of the late interaction.
        distillation_loss_weight (`float`, defaults to 0.0):
            Weight of what the embeddings learn from the pair logits of the same batch: the divergence of the two
            softmaxes, in steps that compute both.
        distillation_temperature (`float`, defaults to 2.0): Divides the pair logits there.
        hardest_negative_loss_weight (`float`, defaults to 0.0):
            Weight of the hinge on the hardest negatives of the reasoning's sigmoids.
        label_smoothing (`float`, defaults to 0.0): Of the three cross-entropies.
        logit_scale_init_value (`float`, defaults to 2.6592):
            Log of the first stage's scale at the start, as in CLIP; it is learned by the contrastive loss.
        use_logit_bias (`bool`, defaults to `False`): The first stage has a learned bias (SigLIP).
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
    attribute_map: ClassVar[dict[str, str]] = {"projection_dim": "projection_size"}  # as CLIP's, for who reads that
    # Matrices of one batch's pairs: those of several batches are none of all pairs, and Trainer would join them.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["logits_per_image", "logits_per_text", "loss_parts"]
    sub_configs: ClassVar[dict[str, Any]] = {
        "vision_config": AutoConfig,
        "text_config": AutoConfig,
        "dual_encoder_config": AutoConfig,
        "detector_config": AutoConfig,
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    dual_encoder_config: dict | PreTrainedConfig | None = None
    detector_config: dict | PreTrainedConfig | None = None
    freeze_detector: bool = True
    max_regions: int = 36
    region_source: str = "hidden_state"
    nms_iou: float | int | None = None
    freeze_vision: bool | None = None
    freeze_text: bool | None = None
    freeze_first_stage: bool = True
    freeze_word_embeddings: bool = False
    vision_grid_size: int | None = None
    region_feature_size: int = 2048
    vocab_size: int = 10000
    word_embedding_size: int = 300
    pad_token_id: int | None = 0
    special_token_ids: list[int] | None = None
    hidden_size: int = 1024
    projection_size: int = 1024
    similarity_size: int = 256
    attention_scale: float | int = 9.0
    leaky_slope: float | int = 0.1
    iou_threshold: float | int = 0.2
    refinement: str = "gate"
    similarity_head: str = "saf"
    use_geometric_context: bool = True
    use_box_positions: bool = False
    use_relative_geometry: bool = False
    use_text_refinement: bool = True
    use_semantic_alignment: bool = True
    use_first_stage: bool = True
    use_late_interaction: bool = True
    late_interaction_scale_init_value: float | int = 3.0
    use_reasoning: bool = True
    component_weight_init_value: float | int | None = None
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
    matching_loss_weight: float | int | None = None
    pair_contrastive_loss_weight: float | int | None = None
    contrastive_loss_weight: float | int = 1.0
    late_interaction_loss_weight: float | int = 1.0
    distillation_loss_weight: float | int = 0.0
    distillation_temperature: float = 2.0
    hardest_negative_loss_weight: float | int = 0.0
    label_smoothing: float | int = 0.0
    logit_scale_init_value: float | int = 2.6592
    use_logit_bias: bool = False
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
        for name in self.sub_configs:
            setattr(self, name, self._sub_config(name, getattr(self, name)))
        for name, defaults in BY_FIRST_STAGE.items():
            if getattr(self, name) is None:
                setattr(self, name, defaults[self.dual_encoder_config is not None])
        if self.dual_encoder_config is not None:  # the embeddings are the dual encoder's own
            self.use_refined_features = self.use_pooled_features = False
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise a `ValueError` for a value outside its range (also run by the model: attributes can be set later)."""
        for name, choices in (
            ("refinement", REFINEMENTS),
            ("similarity_head", SIMILARITY_HEADS),
            ("region_source", REGION_SOURCES),
        ):
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
        if self.dual_encoder_config is None and not (self.use_refined_features or self.use_pooled_features):
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
        if not (self.use_first_stage or self.use_late_interaction or self.use_reasoning):
            raise ValueError(
                "use_first_stage, use_late_interaction and use_reasoning are all False; the score needs at least one."
            )
        if self.use_relative_geometry and not self.use_geometric_context:
            raise ValueError(
                "use_relative_geometry is True, but use_geometric_context, which it belongs to, is False; set both."
            )
        self._check_by_kind()
        self._check_words()
        if self.dual_encoder_config is not None:
            self._check_dual_encoder()
        self._check_detector()

    def _check_detector(self) -> None:
        if not (isinstance(self.max_regions, int) and _is_number(self.max_regions) and self.max_regions >= 1):
            raise ValueError(f"max_regions is {self.max_regions!r}; expected a whole number of at least 1.")
        if self.nms_iou is not None and not (_is_number(self.nms_iou) and 0 < self.nms_iou <= 1):
            raise ValueError(f"nms_iou is {self.nms_iou!r}; expected None or a number above 0 and up to 1.")
        pools, tower = self.region_source == "pooled_map", self.vision_tower_config
        if self.detector_config is None:
            if pools:
                raise ValueError("region_source is 'pooled_map', but there is no detector; set detector_config.")
            return
        detector: Any = self.detector_config
        check_detector(detector)
        queries, size = detector_sizes(detector)
        kind = detector.model_type
        if self.max_regions > queries:
            raise ValueError(
                f"max_regions is {self.max_regions}, but the detector ({kind!r}) finds {queries} boxes in an image; "
                f"set max_regions to at most {queries}."
            )
        if pools and tower is None:
            raise ValueError(
                "region_source is 'pooled_map', but there is no vision tower or dual encoder with a map to pool in "
                "the detector's boxes; give one, or use region_source='hidden_state'."
            )
        if not pools and tower is not None:
            raise ValueError(
                f"region_source is 'hidden_state', so nothing reads the vision tower ({tower.model_type!r}) beside "
                "the detector; use region_source='pooled_map', or leave the tower out."
            )
        if not pools and self.region_feature_size != size:
            raise ValueError(
                f"region_feature_size is {self.region_feature_size}, but the hidden size of the detector ({kind!r}), "
                f"whose regions it describes, is {size}; set it to {size} (from_backbones does)."
            )
        if self.vision_grid_size is not None:
            raise ValueError(
                f"vision_grid_size is {self.vision_grid_size}, but the regions are the detector's boxes; leave it out."
            )
        if pools and not self.freeze_detector:
            raise ValueError(
                "freeze_detector is False, but with region_source='pooled_map' only its boxes are read, from which it "
                "learns nothing; leave it True."
            )

    def _check_dual_encoder(self) -> None:
        own: Any = self.dual_encoder_config
        for name in ("vision_config", "text_config"):
            if (tower := getattr(self, name)) is not None:
                raise ValueError(
                    f"dual_encoder_config ({own.model_type!r}) came beside {name} ({tower.model_type!r}); a dual "
                    f"encoder has both towers: leave {name} out."
                )
        if not self.use_first_stage:
            raise ValueError("use_first_stage is False, but a dual encoder's logit is always part of the score.")
        if self.freeze_word_embeddings:
            raise ValueError(
                "freeze_word_embeddings is True, but the words come from a dual encoder; use freeze_text."
            )
        for name in ("matching_loss_weight", "hardest_negative_loss_weight"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: margins on sigmoids, which a dual encoder's logits drive to "
                    "1 for every pair; set it to 0 and use pair_contrastive_loss_weight."
                )

    @property
    def vision_tower_config(self) -> Any:
        """The vision tower's configuration, alone or half of a dual encoder; None where regions come as features."""
        return getattr(self.dual_encoder_config, "vision_config", None) or self.vision_config

    @property
    def looks(self) -> bool:
        """Whether the model reads pixels, by a vision tower or a detector."""
        return self.vision_tower_config is not None or self.detector_config is not None

    @property
    def text_tower_config(self) -> Any:
        """The text tower's configuration, alone or half of a dual encoder; None with word embeddings and a BiGRU."""
        return getattr(self.dual_encoder_config, "text_config", None) or self.text_config

    def keeps(self, side: str) -> bool:
        """Whether what comes of a side, "vision" or "text", stays as it is in training: its tower is frozen, and of a
        dual encoder all the rest as well."""
        frozen = bool(getattr(self, f"freeze_{side}"))
        if side == "vision" and self.detector_config is not None and self.region_source == "hidden_state":
            return self.freeze_detector  # which is all that looks
        return frozen and (self.dual_encoder_config is None or self.freeze_first_stage)

    @property
    def needs_boxes(self) -> bool:
        """Whether the model reads where its regions are."""
        return self.use_geometric_context or self.use_box_positions

    @property
    def components(self) -> list[str]:
        """The components of the pair logit that this model has, in the order of `score_components`."""
        names = ("first_stage", "late_interaction", "reasoning")
        return [name for name in names if getattr(self, f"use_{name}")]

    def _check_by_kind(self) -> None:
        """Switches, starts of learned scales, and weights of losses, which their types and names tell apart."""
        for name, field in type(self).__dataclass_fields__.items():
            if name in PreTrainedConfig.__dataclass_fields__:
                continue
            value = getattr(self, name)
            if field.type in (bool, bool | None) and not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; expected True or False.")
            if name.endswith("_init_value") and not _is_number(value):
                raise ValueError(f"{name} is {value!r}; expected a number, such as {field.default}.")
            if name.endswith("_loss_weight") and not (_is_number(value) and value >= 0):
                raise ValueError(f"{name} is {value!r}; expected 0 (off) or more.")

    def _check_words(self) -> None:
        if self.text_config is not None and self.freeze_word_embeddings:
            raise ValueError("freeze_word_embeddings is True, but there is a text tower; use freeze_text.")
        pad = self.pad_token_id
        if self.text_tower_config is None and pad is not None and not 0 <= pad < self.vocab_size:
            raise ValueError(
                f"pad_token_id is {pad}, with a vocab_size of {self.vocab_size}; expected a word's number from 0 to "
                f"{self.vocab_size - 1}, or None."
            )

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        known = set(type(self).__dataclass_fields__)
        for key in kwargs:
            # Also what every configuration has without a field of its own (`name_or_path`, …); methods are none.
            attribute = hasattr(PreTrainedConfig, key) and not callable(getattr(PreTrainedConfig, key))
            if key.startswith("_") or key in _BASE_KEYWORDS or attribute:
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
                f"{name} is {value!r}; expected a configuration or a dict of its fields. For models of the Hub by id "
                "or path use TVRNModel.from_backbones or from_dual_encoder."
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


def check_detector(config: Any) -> None:
    """Raise a `ValueError` that says why, if a config is of no detector that can be one here."""
    kind = config.model_type
    if kind not in DETECTORS:
        reason = NO_DETECTORS.get(kind, "no detector; a vision model goes to vision=…")
        raise ValueError(f"{kind!r} can't be the detector: {reason}. Expected one of {', '.join(DETECTORS)}.")
    if getattr(getattr(config, "backbone_config", None), "model_type", None) == "timm_backbone":
        raise ValueError(
            f"this {kind!r} can't be the detector: its backbone is one of timm. Expected a checkpoint with a backbone "
            "of transformers (on the Hub often the revision 'no_timm')."
        )


def detector_sizes(config: Any) -> tuple[int, int]:
    """How many boxes a detector finds in an image, and the size of the feature of each."""
    if config.model_type == "owlv2":  # one a patch, with a feature beside the texts'
        vision = config.vision_config
        return (vision.image_size // vision.patch_size) ** 2, config.text_config.hidden_size
    if config.model_type == "yolos":
        return config.num_detection_tokens, config.hidden_size
    two_stage = getattr(config, "two_stage", False)
    return config.two_stage_num_proposals if two_stage else config.num_queries, config.d_model


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_BASE_KEYWORDS = frozenset(
    {"attn_implementation", "experts_implementation", "torch_dtype", "model_type", "auto_map", "per_layer_config"}
)

TVRNConfig.register_for_auto_class()

__all__ = ["TVRNConfig"]

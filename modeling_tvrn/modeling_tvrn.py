"""TVRN: a mutually textual and visual refinement network for image–text matching. Shipped with every checkpoint.

S. Pang, Y. Zeng, J. Zhao, J. Xue, "A Mutually Textual and Visual Refinement Network for Image-Text Matching", IEEE
Transactions on Multimedia 26, 2024. A pair's score depends on that image and that caption alone.
"""

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import ModelOutput, can_return_tuple

from .checks_tvrn import (
    check_embeds,
    check_extents,
    check_ids,
    check_level,
    check_own_layers,
    check_padded,
    check_pixels,
    check_regions,
    check_row_ids,
    check_segments,
    check_text_features,
    check_weights,
    check_words,
    in_dtype,
    row_ids,
)
from .configuration_tvrn import TVRNConfig, detector_sizes
from .detectors_tvrn import build_detector, detect, freeze_heads, load_detector
from .encoded_tvrn import EncodedImages, EncodedTexts, model_fingerprint, share_weights
from .layers_tvrn import (
    AttentionPooling,
    BoxPerceptron,
    FeatureDropout,
    FragmentAttention,
    Gate,
    GeometricAttention,
    PooledEmbedding,
    Recurrence,
    UnimodalHead,
    WordEncoder,
    ZeroLinear,
    box_geometry,
    gram,
    grid_boxes,
    masked_mean,
    normalize,
    perceptron,
    pool_boxes,
    take,
    valid_first,
    wide,
)
from .pair_tvrn import PairMatching, PairStage, weighted_components
from .towers_tvrn import (
    build_dual_encoder,
    build_tower,
    float_dtype,
    freeze_unused,
    load_dual_encoder,
    load_tower,
    load_word_embeddings,
    look,
    plain_dual_encoder,
    probe,
    region_feature_size,
    region_map,
    without_scale,
)

TOWERS = ("vision_model", "text_model", "dual_encoder", "detector")


@dataclass
class TVRNOutput(ModelOutput):
    """What [`TVRNModel`] returns.

    Attributes:
        loss: Scalar, with `return_loss=True`.
        logits_per_image: (I, T) pair logits; `TVRNModel.scores` makes matching scores of them.
        logits_per_text: (T, I), its transpose.
        image_embeds: (I, P) unit norm.
        text_embeds: (T, P) unit norm.
        loss_parts: The loss's unweighted parts by name, detached.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    loss_parts: dict[str, Tensor] | None = None


class TVRNPreTrainedModel(PreTrainedModel):
    """Weights: initialisation, loading with nothing missing and nothing left over."""

    config_class = TVRNConfig
    base_model_prefix = "tvrn"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules: ClassVar[list[str]] = []
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = ["^calibration_query$"]  # older checkpoints lack it

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # By transformers' `init`, which leaves alone what loading has filled; torch's would start it again.
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.GRU):
            for name, parameter in module.named_parameters():
                if "bias" in name:
                    init.zeros_(parameter)
                else:
                    init.xavier_uniform_(parameter)
        elif isinstance(module, PairStage):
            if module.config.use_late_interaction:
                init.constant_(module.late_interaction_scale, module.config.late_interaction_scale_init_value)
            for name in weighted_components(module.config):
                init.constant_(getattr(module, f"{name}_weight"), module.config.component_weight_init_value)
        elif isinstance(module, TVRNModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.zeros_(module.logit_bias)
            init.ones_(module.calibration_scale)
            init.zeros_(module.calibration_shift)
            init.copy_(module.calibration_query, _reading_all(self.config.projection_size))
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a missing, unexpected or misshapen weight is an error, not a report; so is a NaN.

        A `quantization_config` is for the towers: TVRN's own layers stay as they are.
        """
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _for_towers(kwargs["quantization_config"])
        wanted = kwargs.pop("output_loading_info", False)
        tolerant = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"the weights of {str(pretrained_model_name_or_path)!r} don't load ({error}); expected whole "
                "safetensors files, not a part of one or a pointer of Git LFS. Save the model again, or fetch it again"
            ) from error
        # transformers starts what a checkpoint lacks at random and only reports it.
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        wrong = {kind: sorted(map(str, info[kind])) for kind in kinds if info.get(kind)}
        if wrong and not tolerant:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not hold this model: {wrong}. Expected every weight of the "
                "config and no other; was the config changed after training?"
            )
        if kwargs.get("quantization_config") is not None and not list(model.towers()):
            raise ValueError(
                f"quantization_config came for {pretrained_model_name_or_path}, which has no tower to quantise; leave "
                "it out. TVRN's own layers stay as they are: dtype=torch.bfloat16 halves them."
            )
        check_weights(model, str(pretrained_model_name_or_path))
        model._freeze()  # loading replaced the parameters that __init__ froze
        return (model, info) if wanted else model


class TVRNModel(PairMatching, TVRNPreTrainedModel):
    """Scores images against captions from their regions and words.

    Inputs are either `pixel_values` (with a vision tower) or region features, and token ids. See [`TVRNConfig`].
    """

    def __init__(self, config: TVRNConfig):
        super().__init__(config)
        config.check()
        size = config.hidden_size
        self.dual_encoder: Any = None
        if config.dual_encoder_config is not None:
            self.dual_encoder = build_dual_encoder(config.dual_encoder_config)
        self.vision_model = build_tower(config.vision_config) if config.vision_config is not None else None
        self.text_model = build_tower(config.text_config) if config.text_config is not None else None
        self.detector = build_detector(config.detector_config) if config.detector_config is not None else None
        self.word_encoder = WordEncoder(config) if config.text_tower_config is None else None
        self.image_dropout = FeatureDropout(config.image_dropout)
        self.text_dropout = FeatureDropout(config.text_dropout)
        # Without late interaction and reasoning nothing reads single regions and words.
        self.uses_fragments = config.use_late_interaction or config.use_reasoning or config.use_refined_features
        if self.uses_fragments:
            self.region_projection = nn.Linear(config.region_feature_size, size)
            self.box_embedding = BoxPerceptron(8, size) if config.use_box_positions else None
        if self.uses_fragments and config.text_tower_config is not None:
            self.word_projection = nn.Linear(_width(config), size)
            self.word_perceptron = perceptron(_width(config), config.word_hidden_size, size, config.dropout)
        self.refines = config.use_reasoning or config.use_refined_features
        self.geometry = self.textual_refinement = None
        if self.refines:
            self.attention = FragmentAttention(config)
            self.geometry = GeometricAttention(config) if config.use_geometric_context else None
            self.visual_refinement = _refinement(config)
            self.textual_refinement = _refinement(config) if config.use_text_refinement else None
            self.image_pooling = AttentionPooling(config)
        if self.uses_fragments:
            self.text_pooling = AttentionPooling(config)  # here: the order of the parts is that of their random starts
        if config.use_refined_features:
            self.image_embedding = nn.Linear(2 * size, config.projection_size, bias=False)
            self.text_embedding = nn.Linear(size, config.projection_size, bias=False)
        if config.use_pooled_features:
            self.pooled_image_embedding = PooledEmbedding(config.region_feature_size, config.image_dropout, config)
            self.pooled_text_embedding = PooledEmbedding(_width(config), config.text_dropout, config)
        if config.use_unimodal_heads:
            self.unimodal_image_head = UnimodalHead(config.projection_size)
            self.unimodal_text_head = UnimodalHead(config.projection_size)
        self.pair = PairStage(config)
        # Shape [1]: 0-d parameters break fully_shard.
        self.logit_scale = nn.Parameter(torch.full((1,), float(config.logit_scale_init_value)))
        self.logit_bias = nn.Parameter(torch.zeros(1)) if config.use_logit_bias else None
        # Buffers: saved with the weights, but no optimizer moves them.
        self.register_buffer("calibration_scale", torch.ones(1))
        self.register_buffer("calibration_shift", torch.zeros(1))
        self.register_buffer("calibration_query", _reading_all(config.projection_size))
        self.gradient_checkpointing = False
        self._freeze()
        self.post_init()

    @classmethod
    def from_backbones(
        cls,
        vision: str | os.PathLike | None = None,
        text: str | os.PathLike | None = None,
        *,
        detector: str | os.PathLike | None = None,
        word_embeddings: str | os.PathLike | None = None,
        trust_remote_code: bool = False,
        **config: Any,
    ) -> "TVRNModel":
        """A new TVRN on pretrained towers from the Hub or a folder.

        Args:
            vision: Vision model id or path (or the vision half of a CLIP-like one); `None` reads region features.
            text: Text model id or path; `None` trains word embeddings and a BiGRU.
            detector: Object detector id or path (D-FINE, RT-DETR, DEIMv2, DETR, Deformable DETR, YOLOS, OWLv2), whose
                boxes are the regions: with its own features, or beside `vision` with those of that map inside each
                box (`region_source`). Code of its repository is never run.
            word_embeddings: Text model id or path whose vocabulary and input embeddings the BiGRU starts from, brought
                to variance 1 (they cost a lookup a word, where the tower would be run). The processor is
                `TVRNProcessor.from_backbones(vision, word_embeddings)`. See `freeze_word_embeddings`.
            trust_remote_code: Run code from the towers' repositories.
            **config: Fields of [`TVRNConfig`], such as `freeze_vision=True`.

        Raises:
            ValueError: If a tower can't be found or has no spatial (vision) or token (text) output, the detector is
                none or of a kind that is not known, a tower is named by id and by configuration, or both `text` and
                `word_embeddings` are given.
        """
        for name, given in {"vision": vision, "text": text, "detector": detector}.items():
            _check_named_once(name, given, config)
        towers: dict[str, Any] = {}
        if vision is not None:
            tower = towers["vision_model"] = load_tower(vision, "vision_config", trust_remote_code)
            config["vision_config"] = tower.config
            config.setdefault("region_feature_size", region_feature_size(tower))
        if text is not None:
            tower = towers["text_model"] = load_tower(text, "text_config", trust_remote_code)
            config["text_config"] = tower.config
        if detector is not None:
            tower = towers["detector"] = load_detector(detector)
            config["detector_config"] = tower.config
            if vision is not None or config.get("vision_config") is not None:
                config.setdefault("region_source", "pooled_map")
            else:
                config.setdefault("region_feature_size", detector_sizes(tower.config)[1])
        table = None
        if word_embeddings is not None:
            table, sizes = load_word_embeddings(word_embeddings, trust_remote_code)
            _check_words(word_embeddings, sizes, config)
            config |= sizes
        model = cls(TVRNConfig(**config))
        # Their random twins, which the config asked for, give way.
        for name, tower in towers.items():
            setattr(model, name, tower)
        if model.word_encoder is not None and table is not None:
            model.word_encoder.embeddings.weight.data.copy_(table)
        model._freeze()
        return model

    @classmethod
    def from_dual_encoder(
        cls,
        dual_encoder: str | os.PathLike | nn.Module,
        *,
        detector: str | os.PathLike | None = None,
        dtype: Any = torch.float32,
        hub: dict[str, Any] | None = None,
        **config: Any,
    ) -> "TVRNModel":
        """A TVRN over a pretrained dual encoder (CLIP, SigLIP, …), whose embeddings and logits are at first its own.

        Args:
            dual_encoder: Hub id or path, or a model of transformers (which is then nested, not copied).
            detector: As in `from_backbones`: its boxes are the regions, with the features of the dual encoder's map.
            dtype: What the weights are loaded in; `"auto"` is the checkpoint's own.
            hub: Further keywords of `from_pretrained`, such as `{"revision": …}`.
            **config: Fields of [`TVRNConfig`], such as `vision_grid_size=7`. Late interaction and reasoning are built
                with weights that start at 0; `use_late_interaction=False, use_reasoning=False` leaves them out.

        Raises:
            ValueError: If it is no dual encoder, names the test that it failed, or a field contradicts it.
        """
        model = dual_encoder
        if not isinstance(model, nn.Module):
            model = load_dual_encoder(model, dtype=dtype, **hub or {})
        sizes = probe(model.eval())
        for name, size in sizes.config().items():
            if config.setdefault(name, size) != size:
                raise ValueError(
                    f"{name} is {config[name]!r}, but that of the dual encoder is {size!r}; leave it out."
                )
        _check_named_once("detector", detector, config)
        detects = None if detector is None else load_detector(detector)
        if detects is not None:
            config |= {"detector_config": detects.config, "region_source": "pooled_map"}
        # Built with a dual encoder of random weights, which gives way to the pretrained one: as loading does it.
        tvrn = cls(TVRNConfig(dual_encoder_config=model.config, **config)).to(float_dtype(model))
        tvrn.dual_encoder = without_scale(model)
        tvrn.detector = detects.to(float_dtype(model)) if detects is not None else None
        tvrn.logit_scale.data.fill_(sizes.logit_scale)
        if tvrn.logit_bias is not None and sizes.logit_bias is not None:
            tvrn.logit_bias.data.fill_(sizes.logit_bias)
        tvrn._freeze()
        tvrn.config.name_or_path = tvrn.config.dual_encoder_config.name_or_path
        return tvrn

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As of every model of transformers; the weights are as readable for others as the other files."""
        # `register_for_auto_class` below knows one Auto class; pipelines load by a second one.
        code = {"AutoModelForZeroShotImageClassification": "modeling_tvrn.TVRNModel"}
        self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | code
        super().save_pretrained(save_directory, *args, **kwargs)
        share_weights(save_directory)

    def save_dual_encoder(self, folder: str | os.PathLike, processor: Any = None) -> None:
        """Write the first stage as a plain checkpoint of its original class, with its processor.

        Args:
            folder: Where; loads with `AutoModel.from_pretrained`, without this package or any remote code.
            processor: The `TVRNProcessor` of this model; without one the checkpoint has weights and config alone.

        Raises:
            ValueError: If this model has no dual encoder.
        """
        if self.dual_encoder is None:
            raise ValueError("This model has no dual encoder to save; build it with TVRNModel.from_dual_encoder.")
        plain = plain_dual_encoder(
            self.config.dual_encoder_config, self.dual_encoder, self.logit_scale, self.logit_bias
        )
        plain.save_pretrained(folder)
        share_weights(folder)
        if processor is not None:
            processor.save_dual_encoder(folder)

    # -- towers -------------------------------------------------------------------------------------------------

    def _freeze(self) -> None:
        if self.dual_encoder is not None and self.config.freeze_first_stage:
            # Its projections and the logit's scale; its towers have switches of their own, below.
            towers = {id(weight) for tower, _ in self.towers() for weight in tower.parameters()}
            for weight in (*self.dual_encoder.parameters(), self.logit_scale, self.logit_bias):
                if weight is not None and id(weight) not in towers:
                    weight.requires_grad_(False)
        if self.word_encoder is not None and self.config.freeze_word_embeddings:
            self.word_encoder.embeddings.requires_grad_(False)
        for tower, frozen in self.towers():
            if frozen:
                tower.requires_grad_(False)
            elif tower is self.detector:
                freeze_heads(tower)
            elif self.dual_encoder is None:  # whose poolers make its embeddings
                freeze_unused(tower)
        self.train(self.training)  # a model trained without a call of train() keeps to its rules as well

    def towers(self) -> Iterator[tuple[nn.Module, bool]]:
        """The towers that this model has, detector, vision, text, each with whether it is frozen."""
        if self.detector is not None:
            yield self.detector, self.config.freeze_detector
        for side in ("vision", "text"):
            if (tower := self.tower(side)) is not None:
                yield tower, bool(getattr(self.config, f"freeze_{side}"))

    def tower(self, side: str) -> nn.Module | None:
        """The tower of a side, "vision" or "text", alone or half of the dual encoder; None where there is none."""
        found: nn.Module | None = getattr(self if self.dual_encoder is None else self.dual_encoder, f"{side}_model")
        return found

    def get_input_embeddings(self) -> nn.Module:
        """The words' embeddings: of the BiGRU, or the text tower's own."""
        if self.word_encoder is not None:
            return self.word_encoder.embeddings
        embeddings: nn.Module = cast(Any, self.tower("text")).get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace them."""
        if self.word_encoder is not None:
            self.word_encoder.embeddings = cast(nn.Embedding, value)
        else:
            cast(Any, self.tower("text")).set_input_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """As in transformers, of a model whose words come from a BiGRU.

        Raises:
            ValueError: If there is a text tower.
        """
        if self.tower("text") is not None and (new_num_tokens is not None or args or kwargs):
            raise ValueError(
                f"resize_token_embeddings({new_num_tokens}) was asked of a model whose words come from a text tower, "
                "which was trained with its own tokenizer; resize the tower before TVRNModel.from_backbones."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def train(self, mode: bool = True) -> "TVRNModel":
        """As `nn.Module.train`; frozen towers, and every BatchNorm of a tower, stay in evaluation mode.

        Batch statistics would make an image's regions depend on the other images of its batch.
        """
        super().train(mode)
        for tower, frozen in self.towers():
            if frozen:  # no dropout either: a cache of its features is what training sees
                tower.eval()
            for module in tower.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        if self.dual_encoder is not None and self.config.freeze_first_stage:
            # What a dual encoder has beside its towers: projections, in some also a pooling head.
            for name, module in self.dual_encoder.named_children():
                if name not in ("vision_model", "text_model"):
                    module.eval()
        return self

    def extract_regions(self, pixel_values: Tensor, **detection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The vision tower and detector alone, what a region cache stores: features (B, R, F), boxes (B, R, 4), mask
        (B, R). `detection` is what the processor gives beside pixels for a detector, as in `encode_images`."""
        return self._look(pixel_values, **detection)[:3]

    def extract_image_features(self, pixel_values: Tensor, **detection: Tensor) -> dict[str, Tensor]:
        """`extract_regions` by the names of `encode_images`; of a dual encoder also its `image_embeds` (B, P)."""
        features, boxes, mask, embeds = self._look(pixel_values, **detection)
        found = {"region_features": features, "region_boxes": boxes, "region_mask": mask}
        return found if embeds is None else {**found, "image_embeds": embeds}

    def _look(
        self, pixel_values: Tensor, detector_pixel_values: Tensor | None = None, pixel_extents: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Regions, boxes and mask, of the vision tower or the detector, and a dual encoder's embeddings."""
        config, padded = self.config, pixel_values
        if config.region_source == "pooled_map":
            if detector_pixel_values is None:
                raise ValueError(
                    "pixel_values came without detector_pixel_values, which the detector of this model reads; the "
                    "processor of this checkpoint makes both."
                )
            check_pixels(detector_pixel_values, 3, "detector_pixel_values")
            padded = detector_pixel_values
        elif detector_pixel_values is not None:
            raise ValueError(
                "detector_pixel_values came, but only a model with region_source='pooled_map' reads them."
            )
        if pixel_extents is not None and self.detector is None:
            raise ValueError("pixel_extents came, but this model has no detector, whose pixels they describe.")
        check_extents(pixel_extents, len(padded))
        with self._looking(pixel_values):
            return self._seen_regions(pixel_values, detector_pixel_values, pixel_extents)

    def _looking(self, pixel_values: Tensor) -> contextlib.AbstractContextManager:
        """Checks pixels for the vision tower, and runs it without gradients where it is frozen."""
        config = self.config
        if not config.looks:
            raise ValueError(
                "This model has no vision tower and no detector; give it region_features, or build it with vision=… "
                "or detector=…."
            )
        check_pixels(pixel_values, getattr(config.vision_tower_config, "num_channels", 3) or 3)
        return torch.no_grad() if config.keeps("vision") else contextlib.nullcontext()

    def _run_vision(self, pixel_values: Tensor) -> tuple[Any, Tensor | None]:
        """The vision tower's output, and a dual encoder's embeddings."""
        tower = self.tower("vision")
        assert tower is not None
        # Not every tower casts its pixels itself: a bfloat16 CNN refuses the processor's float32.
        pixels = pixel_values.to(float_dtype(tower))
        if self.dual_encoder is None:
            return look(tower, self.config.vision_tower_config, pixels), None
        output = look(self.dual_encoder.get_image_features, self.config.vision_tower_config, pixels)
        return output, normalize(output.pooler_output.to(self.logit_scale.dtype))

    def _detect(self, pixels: Tensor, extents: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The detector's regions; see `detect`."""
        config = self.config
        with torch.no_grad() if config.freeze_detector else contextlib.nullcontext():
            return detect(self.detector, pixels, extents, config.max_regions, config.nms_iou)

    def _seen_regions(
        self, pixel_values: Tensor, detector_pixel_values: Tensor | None = None, pixel_extents: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`_look` without its checks."""
        if self.detector is not None and detector_pixel_values is None:
            return *self._detect(pixel_values, pixel_extents), None
        output, embeds = self._run_vision(pixel_values)
        grid = region_map(output, pixel_values, self.config.vision_tower_config)
        if detector_pixel_values is not None:
            _, boxes, mask = self._detect(detector_pixel_values, pixel_extents)
            return pool_boxes(grid, boxes), boxes, mask, embeds
        if self.config.vision_grid_size is not None:
            grid = F.adaptive_avg_pool2d(grid, self.config.vision_grid_size)
        rows, columns = grid.shape[-2:]
        # (B, C, h, w) -> (B, C, h·w) -> (B, h·w, C), row by row as `grid_boxes` numbers the cells.
        features = grid.flatten(2).transpose(1, 2)
        boxes = grid_boxes(rows, columns, device=grid.device).expand(grid.shape[0], -1, -1)
        mask = torch.ones(features.shape[:2], dtype=torch.bool, device=grid.device)
        return features, boxes, mask, embeds

    def extract_words(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The text tower alone: last hidden states (T, W, F)."""
        return self._read(input_ids, attention_mask)[0]

    def extract_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """`extract_words` by the name of `encode_texts`; of a dual encoder also its `text_embeds` (T, P)."""
        hidden, embeds = self._read(input_ids, attention_mask)
        return {"text_features": hidden} if embeds is None else {"text_features": hidden, "text_embeds": embeds}

    def _read(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The text tower's last hidden states, and a dual encoder's embeddings."""
        if self.text_model is None and self.dual_encoder is None:
            raise ValueError("This model has no text tower: its words come from embeddings and a GRU.")
        with torch.no_grad() if self.config.keeps("text") else contextlib.nullcontext():
            if self.text_model is not None:
                return self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state, None
            output = self.dual_encoder.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
            return output.last_hidden_state, normalize(output.pooler_output.to(self.logit_scale.dtype))

    # -- one side at a time ---------------------------------------------------------------------------------------

    def encode_images(
        self,
        pixel_values: Tensor | None = None,
        region_features: Tensor | None = None,
        region_boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
        image_embeds: Tensor | None = None,
        level: str = "full",
        detector_pixel_values: Tensor | None = None,
        pixel_extents: Tensor | None = None,
    ) -> EncodedImages:
        """What the pair score needs of images, without any text.

        Args:
            pixel_values: (I, 3, H, W), for a model with a vision tower, or with a detector alone.
            region_features: (I, R, F) instead.
            region_boxes: (I, R, 4) xyxy in [0, 1]; required with region features by models that read them
                (`use_geometric_context`, `use_box_positions`).
            region_mask: (I, R), 1 = keep.
            image_embeds: (I, P) beside region features of a dual encoder, as `extract_image_features` gives them.
            level: What `match(…, level=…)` will read: "embeddings", "late_interaction" or "full". What a level leaves
                out is `None`, and is not computed.
            detector_pixel_values: (I, 3, H', W') the detector's, where a vision tower reads `pixel_values`.
            pixel_extents: (I, 2) height and width of each picture as fractions of the detector's pixels, where these
                are padded.

        Raises:
            ValueError: On wrong shapes, NaN, boxes outside [0, 1], or an image without a valid region.
        """
        check_level(level)
        check_own_layers(self, TOWERS)
        if self._only_embeds(level) and self.dual_encoder is not None:
            others = (region_features, region_boxes, region_mask, image_embeds)
            if pixel_values is not None and all(value is None for value in others):
                # Embeddings alone: the patches are neither arranged nor pooled.
                with self._looking(pixel_values):
                    image_embeds, pixel_values = self._run_vision(pixel_values)[1], None
            if pixel_values is None and image_embeds is not None:
                embeds = check_embeds("image_embeds", image_embeds, None, self.config.projection_size)
                return EncodedImages(normalize(embeds), model_fingerprint=self.fingerprint())
        detection = (detector_pixel_values, pixel_extents)
        given = self._regions(pixel_values, region_features, region_boxes, region_mask, image_embeds, detection)
        return self._encode_regions(*given, level=level)

    def _only_embeds(self, level: str) -> bool:
        """Whether the embeddings are all that this model computes at that level."""
        return (level == "embeddings" and not self.config.use_refined_features) or not self.uses_fragments

    def _encode_regions(
        self, features: Tensor, boxes: Tensor | None, mask: Tensor, embeds: Tensor | None, level: str = "full"
    ) -> EncodedImages:
        """`encode_images` of what `_regions` gives."""
        name = self.fingerprint()
        if self._only_embeds(level):
            return EncodedImages(self._image_embeds(None, features, mask, embeds), model_fingerprint=name)
        regions = self.region_projection(self.image_dropout(features))
        if self.box_embedding is not None and boxes is not None:
            regions = regions + self.box_embedding(box_geometry(self.box_embedding.exact(boxes)))
        regions = normalize(regions)
        # Embeddings that see no refined regions, and no reasoning wanted: nothing that follows is read.
        if not self.config.use_refined_features and (level != "full" or not self.config.use_reasoning):
            embeds = self._image_embeds(None, features, mask, embeds)
            encoded = EncodedImages(embeds, mask, boxes, regions, model_fingerprint=name)
            return encoded.at_level(level)
        refined, refined_mask, overall, contexts = self._refined(regions, boxes, mask)
        # Before the rest: gradients are summed in the reverse of this order, on which a run's last bits depend.
        summary = torch.cat([overall, masked_mean(refined, refined_mask)], dim=-1)
        encoded = EncodedImages(
            embeds=self._image_embeds(summary, features, mask, embeds),
            region_mask=mask,
            region_boxes=boxes,
            regions=regions if self.config.use_late_interaction or level == "late_interaction" else None,
            **self._reasoned(refined, refined_mask, overall, contexts),
            model_fingerprint=name,
        )
        return encoded.at_level(level)

    def complete_images(self, images: EncodedImages) -> EncodedImages:
        """Level "full" of images of level "late_interaction": the reasoning's part, which their regions determine.

        With it a gallery may keep the regions alone, a fraction of what the reasoning reads.
        """
        if images.regions is None or images.region_mask is None or not self.config.use_reasoning:
            return images
        regions = images.regions.to(self.logit_scale.dtype)
        reasoned = self._reasoned(*self._refined(regions, images.region_boxes, images.region_mask))
        kept = regions if self.config.use_late_interaction else None
        return replace(images, regions=kept, **reasoned)  # type: ignore[arg-type]

    def _refined(self, regions: Tensor, boxes: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of unit-norm regions (I, R, D): refined ones, their mask, their global vector, and the regions' contexts."""
        contexts = self.attention(regions, mask)
        if self.geometry is not None and boxes is not None:
            contexts = normalize((contexts + self.geometry(regions, boxes, mask)) / 2)
        # Element by element, regions with their contexts: what both agree on.
        joint = normalize(F.leaky_relu(regions * contexts, self.config.leaky_slope))
        if isinstance(self.visual_refinement, Gate):
            refined, refined_mask = self.visual_refinement(regions, joint), mask
        else:  # regions, then their expansions: (I, 2R, D)
            refined, refined_mask = self.visual_refinement(regions, joint, mask), torch.cat([mask, mask], dim=1)
        weights = self.image_pooling(refined, refined_mask)
        # (I, 1, N) @ (I, N, D).
        overall = normalize((weights.unsqueeze(1).to(refined.dtype) @ refined).squeeze(1))
        return refined, refined_mask, overall, contexts

    def _reasoned(self, refined: Tensor, refined_mask: Tensor, overall: Tensor, contexts: Tensor) -> dict[str, Tensor]:
        """What the reasoning reads of an image, by its field."""
        return {
            "refined_regions": refined,
            "refined_region_mask": refined_mask,
            "global_vector": overall,
            "refined_region_saliency": self._region_saliency(refined, overall, refined_mask),
            "refined_region_gram": gram(refined),
            **self._expansion_sources(contexts),
        }

    def _regions(
        self,
        pixel_values: Tensor | None,
        region_features: Tensor | None,
        region_boxes: Tensor | None,
        region_mask: Tensor | None,
        image_embeds: Tensor | None,
        detection: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Checked region features, boxes and mask, the valid regions first; a dual encoder's embeddings."""
        if (pixel_values is None) == (region_features is None):
            raise ValueError("encode_images takes either pixel_values or region_features, exactly one of them.")
        if pixel_values is not None:
            if region_boxes is not None or region_mask is not None or image_embeds is not None:
                raise ValueError(
                    "encode_images got region_boxes, region_mask or image_embeds beside pixel_values, whose regions "
                    "are the tower's own grid or the detector's boxes; leave them out, or give region_features."
                )
            region_features, region_boxes, region_mask, image_embeds = self._look(pixel_values, *detection)
        assert region_features is not None
        if self.dual_encoder is not None:
            image_embeds = check_embeds(
                "image_embeds", image_embeds, len(region_features), self.config.projection_size
            )
        features, boxes, mask = check_regions(
            region_features, region_boxes, region_mask, self.config.region_feature_size, self.config.needs_boxes
        )
        if not mask.all():
            # A mask may have holes; from here on valid fragments are a prefix, as GRUs and chunks want it.
            order = valid_first(mask)
            features, mask = take(features, order), take(mask, order)
            boxes = take(boxes, order) if boxes is not None else None
        features = in_dtype(features, self.logit_scale.dtype, "Region features")
        return features, boxes, mask, image_embeds

    def _image_embeds(self, refined: Tensor | None, features: Tensor, mask: Tensor, embeds: Tensor | None) -> Tensor:
        """Unit-norm embeddings (I, P): a dual encoder's, or from the refined regions' summary and the mean feature."""
        if embeds is not None:
            return normalize(embeds.to(self.logit_scale.dtype))
        parts = []
        if self.config.use_refined_features:
            parts.append(self.image_embedding(refined))
        if self.config.use_pooled_features:
            parts.append(self.pooled_image_embedding(masked_mean(features, mask)))
        return normalize(torch.stack(parts).sum(dim=0).to(self.logit_scale.dtype))

    def _region_saliency(self, tokens: Tensor, overall: Tensor, mask: Tensor) -> Tensor:
        """log a^v (I, N): log-softmax over the valid tokens of λ⟨U_i, g^v⟩; 0 (uniform) without semantic alignment."""
        # (I, N, D) @ (I, D, 1). Kept as a logarithm: the pair stage adds it to its affinities.
        scores = self.config.attention_scale * (tokens @ overall.unsqueeze(-1)).squeeze(-1)
        if not self.config.use_semantic_alignment:
            scores = torch.zeros_like(scores)
        scores = scores.to(wide(scores))
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).log_softmax(dim=-1)
        return scores.masked_fill(~mask, 0.0)  # finite in any dtype that a gallery is stored in

    def _expansion_sources(self, contexts: Tensor) -> dict[str, Tensor]:
        """What the textual refinement reads of an image: keys, transformed contexts and their Gram matrix."""
        if self.textual_refinement is None:
            return {}
        # Linear maps, so they commute with the attention's sum: once an image here, not once a pair and word.
        if isinstance(self.textual_refinement, Gate):
            values = self.textual_refinement.context(contexts)
        else:
            values = self.textual_refinement.input_gates(contexts)
        return {"context_keys": self.attention.key(contexts), "context_values": values, "context_gram": gram(contexts)}

    def encode_texts(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        word_mask: Tensor | None = None,
        text_features: Tensor | None = None,
        text_embeds: Tensor | None = None,
        level: str = "full",
        token_type_ids: Tensor | None = None,
    ) -> EncodedTexts:
        """What the pair score needs of texts, without any image.

        Args:
            input_ids: (T, W) token ids.
            attention_mask: (T, W), 1 = keep.
            word_mask: (T, W), 1 = a word to match, 0 = padding or a special token; default: every attended position.
            text_features: (T, W, F) outputs of the text tower instead of ids, as `extract_words` gives them.
            text_embeds: (T, P) beside text features of a dual encoder, as `extract_text_features` gives them.
            level: As in `encode_images`.
            token_type_ids: (T, W) of zeros, as BERT's tokenizer gives them; not needed.

        Raises:
            ValueError: On wrong shapes, or a text without a word to match.
        """
        check_level(level)
        check_own_layers(self, TOWERS)
        check_segments(token_type_ids)
        alone = self._only_embeds(level)
        given, mask, positions, pooled = self._text_inputs(
            input_ids, attention_mask, word_mask, text_features, text_embeds, words=not alone
        )
        if alone:
            embeds, name = self._text_embeds(None, mask, pooled), self.fingerprint()
            return EncodedTexts(embeds, word_mask=None if level == "embeddings" else mask, model_fingerprint=name)
        return self._encode_words(self._words(given, mask), mask, positions, pooled, level)

    def _encode_words(
        self, words: Tensor, mask: Tensor, positions: Tensor, pooled: Tensor, level: str = "full"
    ) -> EncodedTexts:
        """`encode_texts` of words (T, W, D), and what `_text_inputs` gives beside them."""
        # What depends on the words alone is computed here, once a caption; the pair stage adds what an image brings.
        extras: dict[str, Tensor] = {}
        summary = words
        refines = self.config.use_refined_features or level == "full"
        if refines and self.textual_refinement is not None:
            extras["context_queries"] = self.attention.query(self.attention(words, mask))
        if refines and isinstance(self.textual_refinement, Gate):
            extras["gates"] = self.textual_refinement.own(words)
        elif refines and isinstance(self.textual_refinement, Recurrence):
            summary, state = self.textual_refinement.read(words, mask)
            extras |= {"recurrent_words": summary, "recurrent_state": state}
        encoded = EncodedTexts(
            embeds=self._text_embeds(summary, mask, pooled),
            words=words,
            word_mask=mask,
            word_positions=positions,
            word_weights=self.text_pooling(words, mask),
            **extras,
            model_fingerprint=self.fingerprint(),
        )
        return encoded.at_level(level)

    def _text_inputs(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        word_mask: Tensor | None,
        text_features: Tensor | None,
        text_embeds: Tensor | None,
        words: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Checked ids (BiGRU) or tower outputs; the words' mask and positions, valid words first; and their mean, or a
        dual encoder's embeddings, whose tower outputs stay as they are where no `words` are wanted."""
        given = self._check_texts(input_ids, text_features)
        special = self.config.special_token_ids
        if word_mask is None and input_ids is not None and special is not None:
            word_mask = ~torch.isin(given, torch.tensor(special, device=given.device))
        attended, mask = check_words(given, attention_mask, word_mask)
        # Words to match come first, and only as many columns as the longest caption has of them.
        positions = valid_first(mask)[:, : int(mask.sum(dim=1).max())]
        mask = take(mask, positions)
        if self.word_encoder is not None:
            # The GRU reads the words to match alone; a text tower, below, every attended token.
            given = take(given, positions)
            return given, mask, positions, masked_mean(self.word_encoder.embeddings(given), mask)
        hidden = given
        if text_features is None:
            # A dual encoder reads its captions as its own processor masks them: SigLIP's are not.
            keep = attended.long() if self.dual_encoder is None else attention_mask
            hidden, text_embeds = self._read(given, keep)
        if self.dual_encoder is not None and not words:
            embeds = check_embeds("text_embeds", text_embeds, len(given), self.config.projection_size)
            return hidden, mask, positions, embeds
        hidden = in_dtype(hidden, self.logit_scale.dtype, "text_features")
        if self.dual_encoder is None:
            # The mean is over all that the tower attended to, [CLS] and [SEP] too.
            return take(hidden, positions), mask, positions, masked_mean(hidden, attended)
        embeds = check_embeds("text_embeds", text_embeds, len(given), self.config.projection_size)
        return take(hidden, positions), mask, positions, embeds

    def _words(self, given: Tensor, mask: Tensor) -> Tensor:
        """Words t (T, W, D) from what `_text_inputs` gives."""
        if self.word_encoder is not None:
            return normalize(self.word_encoder(given, mask))
        hidden = self.text_dropout(given)
        words = self.word_projection(hidden)
        return normalize(words + self.word_perceptron(hidden) if self.word_perceptron is not None else words)

    def _text_embeds(self, summary: Tensor | None, mask: Tensor, pooled: Tensor) -> Tensor:
        """Unit-norm embeddings (T, P): a dual encoder's, or from the mean word and the mean input feature."""
        if self.dual_encoder is not None:
            return normalize(pooled.to(self.logit_scale.dtype))
        # Maps of each part, added up: with a part more or fewer the others keep their shapes.
        parts = []
        if self.config.use_refined_features:
            assert summary is not None
            parts.append(self.text_embedding(masked_mean(summary, mask)))
        if self.config.use_pooled_features:
            parts.append(self.pooled_text_embedding(pooled))
        return normalize(torch.stack(parts).sum(dim=0).to(self.logit_scale.dtype))

    def _check_texts(self, input_ids: Tensor | None, text_features: Tensor | None) -> Tensor:
        """The one that is given, checked."""
        tower: Any = self.config.text_tower_config
        if text_features is not None and tower is None:
            raise ValueError("text_features came, but this model has no text tower to give such; give it input_ids.")
        if text_features is not None and input_ids is None:
            return check_text_features(text_features, _width(self.config))
        if input_ids is None or text_features is not None:
            raise ValueError("encode_texts takes either input_ids or text_features, exactly one of them.")
        if self.dual_encoder is not None and str(tower.model_type).startswith("siglip"):
            check_padded(input_ids, tower.max_position_embeddings)
        return check_ids(input_ids, self.config.vocab_size if tower is None else getattr(tower, "vocab_size", None))

    def fingerprint(self) -> str | None:
        """What encoded galleries carry to tell whose they are; None in training, or where weights are not at hand."""
        # In training weights change at every step, and both sides are encoded in one anyway.
        return None if self.training and torch.is_grad_enabled() else model_fingerprint(self)

    # -- both sides -------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        region_features: Tensor | None = None,
        region_boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
        word_mask: Tensor | None = None,
        text_features: Tensor | None = None,
        image_ids: Tensor | None = None,
        text_image_ids: Tensor | None = None,
        return_loss: bool = False,
        level: str = "full",
        image_embeds: Tensor | None = None,
        text_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        detector_pixel_values: Tensor | None = None,
        pixel_extents: Tensor | None = None,
    ) -> TVRNOutput:
        """Score I images against T texts; with `return_loss=True` also the weighted loss.

        Args:
            image_ids: (I,) int64, what decides positives; default: row numbers.
            text_image_ids: (T,) int64, each text's image; default: text k belongs to image k (needs I = T).
            level: "embeddings" or "late_interaction" leave the components after it out, of logits and loss.
            others: As in `encode_images` and `encode_texts`; `return_dict=False` gives a tuple, as in transformers.
        """
        regions = (pixel_values, region_features, region_boxes, region_mask, image_embeds)
        images = self.encode_images(*regions, level, detector_pixel_values, pixel_extents)
        texts = self.encode_texts(
            input_ids, attention_mask, word_mask, text_features, text_embeds, level, token_type_ids
        )
        # Before the pairs are scored, which is most of a step's time.
        check_row_ids(len(images), len(texts), image_ids, text_image_ids)
        # Unweighted for the losses: each component learns by its own, its weight by that of the sum.
        components = self.unweighted_components(images, texts, level=level)
        logits = self.pair_logits(self.weigh_components(components))
        loss, parts = None, None
        if return_loss:
            image_ids, text_image_ids = row_ids(len(images), len(texts), image_ids, text_image_ids, logits.device)
            loss, parts = self.training_loss(components, images.embeds, texts.embeds, image_ids, text_image_ids)
        return TVRNOutput(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=logits.T,
            image_embeds=images.embeds,
            text_embeds=texts.embeds,
            loss_parts=parts,
        )

    @torch.no_grad()
    def rank(
        self, query: str, images: Any, processor: Any, top_k: int | None = None, batch_size: int = 32
    ) -> list[dict[str, int | float]]:
        """Images by how well they fit a sentence, best first, as Sentence Transformers' `CrossEncoder.rank` has it.

        The model is put into evaluation mode.

        Args:
            query: The sentence.
            images: A list of what the processor reads (PIL images, paths, …), of which each is encoded once; or
                `EncodedImages`, so that a further query costs the pair score alone.
            processor: This model's.
            top_k: Images to give; default: all.
            batch_size: Images encoded at a time.

        Returns:
            For each image `{"corpus_id": place in images, "score": see readable_scores}`.

        Raises:
            ValueError: If the query has no word, there are no images, or one of them can't be read.
        """
        if not len(images):
            raise ValueError("rank got no images; expected at least one.")
        self.eval()
        texts = self.encode_texts(**processor(text=[query]).to(self.device))
        if not isinstance(images, EncodedImages):
            batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
            parts = [self.encode_images(**processor(images=batch).to(self.device)) for batch in batches]
            images = EncodedImages.cat(parts)
        logits = self.match(images.to(self.device), texts)[:, 0]
        scores = self.readable_scores(logits)
        order = logits.argsort(descending=True, stable=True)[:top_k].tolist()
        return [{"corpus_id": place, "score": scores[place].item()} for place in order]

    # Every argument is named: Sentence Transformers passes those alone that a signature names.
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        region_features: Tensor | None = None,
        region_boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
        image_embeds: Tensor | None = None,
        level: str = "embeddings",
        detector_pixel_values: Tensor | None = None,
        pixel_extents: Tensor | None = None,
        unimodal: bool = False,
    ) -> BaseModelOutputWithPooling:
        """Unit-norm image embeddings (I, P) as `.pooler_output`; with `level="full"` refined regions as
        `.last_hidden_state`.

        Args:
            others: As in `encode_images`.
            unimodal: Give the embeddings for comparing images with images, of a model with `use_unimodal_heads`.
        """
        regions = (pixel_values, region_features, region_boxes, region_mask, image_embeds)
        images = self.encode_images(*regions, level, detector_pixel_values, pixel_extents)
        embeds = self.unimodal_image_embeds(images.embeds) if unimodal else images.embeds
        return BaseModelOutputWithPooling(last_hidden_state=images.refined_regions, pooler_output=embeds)

    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        word_mask: Tensor | None = None,
        text_features: Tensor | None = None,
        text_embeds: Tensor | None = None,
        level: str = "embeddings",
        token_type_ids: Tensor | None = None,
        unimodal: bool = False,
    ) -> BaseModelOutputWithPooling:
        """Unit-norm text embeddings (T, P) as `.pooler_output`; with `level="full"` words as `.last_hidden_state`.

        Args:
            others: As in `encode_texts`.
            unimodal: Give the embeddings for comparing texts with texts, of a model with `use_unimodal_heads`.
        """
        texts = self.encode_texts(
            input_ids, attention_mask, word_mask, text_features, text_embeds, level, token_type_ids
        )
        embeds = self.unimodal_text_embeds(texts.embeds) if unimodal else texts.embeds
        return BaseModelOutputWithPooling(last_hidden_state=texts.words, pooler_output=embeds)

    def unimodal_image_embeds(self, image_embeds: Tensor) -> Tensor:
        """Embeddings for comparing images with images, from `image_embeds`: (I, P) -> (I, P), unit norm.

        Raises:
            ValueError: If the model has no such heads.
        """
        self._check_heads()
        embeds: Tensor = self.unimodal_image_head(image_embeds)
        return embeds

    def unimodal_text_embeds(self, text_embeds: Tensor) -> Tensor:
        """Embeddings for comparing texts with texts, from `text_embeds`: (T, P) -> (T, P), unit norm.

        Raises:
            ValueError: If the model has no such heads.
        """
        self._check_heads()
        embeds: Tensor = self.unimodal_text_head(text_embeds)
        return embeds

    def _check_heads(self) -> None:
        if not self.config.use_unimodal_heads:
            raise ValueError(
                "This model has no uni-modal heads (use_unimodal_heads=False); use its image_embeds and text_embeds, "
                "or train one with use_unimodal_heads=True and cusa=true."
            )


def _refinement(config: TVRNConfig) -> Gate | Recurrence:
    return Gate(config) if config.refinement == "gate" else Recurrence(config)


def _reading_all(size: int) -> Tensor:
    """`calibration_query` of a model that nobody has calibrated: the sigmoid of its bias is 1, whatever the text."""
    return torch.tensor([0.0] * size + [100.0])


def _for_towers(quantization: Any) -> Any:
    """The quantization config with everything beside the towers left out of it."""
    from_dict = AutoQuantizationConfig.from_dict
    config = copy.copy(from_dict(quantization) if isinstance(quantization, dict) else quantization)
    names = ("llm_int8_skip_modules", "modules_to_not_convert")
    skipped = next((name for name in names if hasattr(config, name)), None)
    if skipped is None:
        raise ValueError(
            f"quantization_config is a {type(config).__name__}, which cannot leave layers out; TVRN's own have to "
            "stay as they are. Take one with modules_to_not_convert, such as TorchAoConfig or BitsAndBytesConfig."
        )
    # transformers reads each as a regular expression that ends where a module's name does.
    own_parts = rf"(?!(?:{'|'.join(TOWERS)})\.)[^.]+"
    setattr(config, skipped, [*(getattr(config, skipped) or []), own_parts])
    return config


def _check_named_once(name: str, path: str | os.PathLike | None, config: dict[str, Any]) -> None:
    if path is not None and config.get(f"{name}_config") is not None:
        raise ValueError(
            f"{name} is {os.fspath(path)!r}, whose configuration is its own, but {name}_config came too; give one of "
            "them: a pretrained model, or a configuration to start from scratch."
        )


def _check_words(path: str | os.PathLike, sizes: dict[str, Any], config: dict[str, Any]) -> None:
    if config.get("text_config") is not None:
        raise ValueError(
            f"word_embeddings is {str(path)!r}, but there is a text tower, which has its own; give one of them."
        )
    for name, size in sizes.items():
        if config.get(name, size) != size:
            raise ValueError(f"{name} is {config[name]!r}, but that of {str(path)!r} is {size}; leave it out.")


def _width(config: TVRNConfig) -> int:
    """Size of an input word: the text tower's, or the word embeddings' (of a dual encoder, what a probe found)."""
    return int(getattr(config.text_config, "hidden_size", config.word_embedding_size))


# Saving then puts this file beside the weights, with every file that it imports.
TVRNModel.register_for_auto_class("AutoModel")
# By this table of names a pipeline decides whether to say that it does not support a model, though it runs.
MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES["tvrn"] = TVRNModel.__name__

__all__ = ["TVRNModel", "TVRNOutput", "TVRNPreTrainedModel"]

"""From a configuration to what is trained: the processor and the model."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import PIL.Image
from transformers import ViTImageProcessorPil

from ..configuration_tvrn import PIXEL_INPUTS, TVRNConfig
from ..modeling_tvrn import TVRNModel
from ..processing_tvrn import TVRNProcessor, build_word_tokenizer, special_ids
from ..scoring.models import evaluating
from ..teachers import RegionCache, with_checked_regions
from ..towers_tvrn import build_tower, region_feature_size
from .continuing import check_finished, continued
from .lora import add_adapters

if TYPE_CHECKING:
    from .config import TrainingConfig

logger = logging.getLogger(__name__)

__all__ = ["build_model", "build_processor", "check_boxes", "with_cached_regions"]


def with_cached_regions(config: TrainingConfig, split: str, records: Any, model: TVRNModel, processor: Any) -> Any:
    """The records with regions from the configured cache in place of pictures; as they are where none is configured.

    Raises:
        ValueError: there is no cache, or it is stale: made by another tower, preprocessing or grid than this model's.
    """
    if config.regions is None:
        return records
    try:
        return with_checked_regions(records, _regions_folder(config, split), model, processor)
    except FileNotFoundError as error:
        raise _no_cache(config, split) from error


def _regions_folder(config: TrainingConfig, split: str) -> str:
    return str(config.regions).replace("{split}", split)


def _no_cache(config: TrainingConfig, split: str) -> ValueError:
    folder = _regions_folder(config, split)
    tower = config.dual_encoder or config.start_from or config.vision
    named = {"detector": config.detector, "features": tower or ("" if config.detector else "MODEL")}
    options = " ".join(f"--{option} {name}" for option, name in named.items() if name)
    return ValueError(
        f"regions = {config.regions!r}: no region cache in {folder!r}; build it with `tvrn regions {config.data} "
        f"{options}{_grid_option(config)} --split {split} --output {folder}`, or drop regions to read the pictures"
    )


def _grid_option(config: TrainingConfig) -> str:
    size = config.model.get("vision_grid_size")
    return "" if size is None else f" --grid-size {size}"


def build_processor(config: TrainingConfig, train_records: Any) -> TVRNProcessor:
    """The towers' own processor; words from the training captions where no text model brings them."""
    if config.dual_encoder is not None:
        return TVRNProcessor.from_dual_encoder(config.dual_encoder, detector=config.detector)
    if config.start_from is not None:
        check_finished(config.start_from)
        return TVRNProcessor.from_pretrained(config.start_from, trust_remote_code=config.trust_remote_code)
    tokens_of = config.text or config.word_embeddings
    processor = TVRNProcessor.from_backbones(
        config.vision,
        tokens_of,
        image_size=None if config.model.get("vision_config") is not None else config.image_size,
        max_text_length=config.max_text_length,
        trust_remote_code=config.trust_remote_code,
        detector=config.detector,
    )
    if config.model.get("vision_config") is not None:
        if config.detector is not None:  # alone, it was taken for what makes pixel_values
            processor.detector_image_processor = processor.image_processor
        processor.image_processor = _plain_image_processor(config)
    if tokens_of is None:
        captions = (caption for captions in train_records.captions for caption in captions)
        processor.tokenizer = build_word_tokenizer(captions, config.min_word_frequency)
    return processor


def _plain_image_processor(config: TrainingConfig) -> ViTImageProcessorPil:
    """For a vision tower from scratch: a square of `image_size` pixels, values in [-1, 1]."""
    tower = TVRNConfig(vision_config=config.model["vision_config"]).vision_config
    side = config.image_size or getattr(tower, "image_size", None) or 224
    return ViTImageProcessorPil(size={"height": side, "width": side})


def build_model(
    config: TrainingConfig, processor: TVRNProcessor, train_records: Any, model_class: type[TVRNModel] = TVRNModel
) -> TVRNModel:
    """The model that a run starts with, with the sizes that follow from processor and data filled in.

    Raises:
        ValueError: there is no such model, or the run's keys contradict it.
    """
    fields = copy.deepcopy(config.model)
    if config.cusa and config.cusa_beta:
        fields.setdefault("use_unimodal_heads", True)
    if config.dual_encoder is not None:
        model = model_class.from_dual_encoder(config.dual_encoder, detector=config.detector, **fields)
    elif config.start_from is not None:
        model = continued(config.start_from, fields, config.trust_remote_code, model_class)
        config.check_with_model(model.config)
    else:
        model = _on_backbones(config, fields, processor, train_records, model_class)
    model.config.special_token_ids = special_ids(processor.tokenizer)
    if config.vision_lora_rank is not None or config.text_lora_rank is not None:
        logger.info("adapters in %d layers of the towers", add_adapters(model, config))
    return model


def _on_backbones(
    config: TrainingConfig,
    fields: dict[str, Any],
    processor: TVRNProcessor,
    train_records: Any,
    model_class: type[TVRNModel],
) -> TVRNModel:
    if config.text is None and config.word_embeddings is None:
        _size_words(fields, processor)
    if config.vision is None and config.detector is None and "region_feature_size" not in fields:
        fields["region_feature_size"] = _region_feature_size(config, fields, train_records)
    towers = {name: getattr(config, name) for name in ("vision", "text", "detector", "word_embeddings")}
    model = model_class.from_backbones(**towers, trust_remote_code=config.trust_remote_code, **fields)
    _check_classes(model)
    if model.vision_model is not None and config.regions is None:
        with evaluating(model):  # a size that the tower refuses is found before the work
            made = processor(images=PIL.Image.new("RGB", (64, 64)))
            model.extract_regions(**{name: made[name] for name in PIXEL_INPUTS if name in made})
    return model


def check_boxes(config: TrainingConfig, model: TVRNModel, train_records: Any) -> None:
    """Refuse region features without the boxes that the model reads, before the first step does."""
    if not model.config.needs_boxes or model.tower("vision") is not None:
        return
    record = next(iter(train_records))
    if "region_features" in record and "region_boxes" not in record:
        reads = [name for name in ("use_geometric_context", "use_box_positions") if getattr(model.config, name)]
        raise ValueError(
            f"{config.data} has region features without boxes, which the model reads ({', '.join(reads)}). Give them "
            "(a column region_boxes; of SCAN's files {split}_boxes.npy, or {split}_ims_bbx.npy with sizes), or make "
            f"regions of the images (tvrn regions), or train without them: "
            + " ".join(f"model.{name}=false" for name in reads)
        )


def _check_classes(model: TVRNModel) -> None:
    """Refuse now what could not be read back after the training."""
    for key, tower in (("vision", model.vision_model), ("text", model.text_model)):
        if tower is not None and not type(tower).__module__.startswith("transformers."):
            raise ValueError(
                f"{key} is a {type(tower).__name__} of its repository's own code, and a saved TVRN is built by "
                "transformers' classes alone; train on its cached features (regions=…, `tvrn regions "
                "--trust-remote-code`), or take another tower"
            )


def _size_words(fields: dict[str, Any], processor: TVRNProcessor) -> None:
    target = fields if fields.get("text_config") is None else fields["text_config"]
    target.setdefault("vocab_size", len(processor.tokenizer))
    target.setdefault("pad_token_id", processor.tokenizer.pad_token_id)


def _region_feature_size(config: TrainingConfig, fields: dict[str, Any], train_records: Any) -> int:
    vision_config = fields.get("vision_config")
    if vision_config is not None:
        return region_feature_size(build_tower(TVRNConfig(vision_config=vision_config).vision_config))
    if config.regions is not None:  # of any tower, which the model then does not need
        try:
            cache = RegionCache.load(_regions_folder(config, config.train_split))
        except FileNotFoundError as error:
            raise _no_cache(config, config.train_split) from error
        return int(cache.store.layout["region_features"][1][-1])
    record = next(iter(train_records))
    if "region_features" not in record:
        raise ValueError(
            "the data holds pictures but there is no vision tower; name one with vision=… (Hub id or path) or "
            "model.vision_config, give a cache of regions (regions=…), or data with region_features"
        )
    return int(record["region_features"].shape[-1])

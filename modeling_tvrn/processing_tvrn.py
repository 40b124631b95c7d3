"""TVRNProcessor: photographs, region features and captions in, checked and padded model inputs out.

The class comes first; what it does with regions (`pad_regions`) and captions (`tokenize`) stands below it.
"""

from __future__ import annotations

import copy
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import custom_object_save
from transformers.feature_extraction_utils import BatchFeature

# From its module: the name that transformers 5.17 exports asks for torchvision, though the PIL backend needs none.
from transformers.models.auto.image_processing_auto import AutoImageProcessor, get_image_processor_class_from_name
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin
from transformers.utils import PROCESSOR_NAME

from .configuration_tvrn import check_detector
from .pixels_tvrn import (
    PixelTable,
    hub_pixels,
    padded_pixels,
    pads,
    pixel_table,
    resize_only,
    rgb_images,
    with_image_size,
)
from .trust_tvrn import HUB_ARGUMENTS, MODEL_CODE, PICTURE_CODE, TOKENIZER_CODE, explained, read_json

logger = logging.getLogger(__name__)

BOX_SLACK = 1e-4  # a box divided by its image's size in float32 may end a rounding above 1
PIXEL_SLACK = 1.0  # detectors disagree by one pixel on where an image ends
PAD, UNKNOWN = "<pad>", "<unk>"
_LETTER = re.compile("[A-Za-z0-9]")
_TEXT_SETTINGS = ("padding", "truncation", "max_length")
PADDINGS = {True: "longest", "longest": "longest", "max_length": "max_length", False: "none", "do_not_pad": "none"}
# Further arguments of transformers' tokenizers that a call may hold: with these values, which are what it does anyway.
DONE_ANYWAY = {
    "add_special_tokens": True, "padding_side": "right", "return_attention_mask": True, "return_token_type_ids": False,
}  # fmt: skip


class TVRNProcessor(ProcessorMixin):
    """Prepare any subset of a model's inputs; both sides are padded and masked.

    Args:
        image_processor: a Hub image processor, of a vision tower or, where there is none, of a detector; None for
            models that read region features.
        tokenizer: a Hub tokenizer, or the word tokenizer of `from_captions`; None for image-only use.
        max_text_length: longest caption in tokens, special tokens included; longer ones are cut, reported once, and
            counted in `truncated_captions` (of this object: a data loader's workers each count their own); not where
            `truncation=True` asks for that.
        text_padding: "longest" of a batch, or "max_length", see `tokenize`.
        dual_encoder_processor: class of transformers that a dual encoder's own processor has.
        detector_image_processor: a detector's, where `image_processor` is a vision tower's.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        max_text_length: int = 64,
        text_padding: str = "longest",
        dual_encoder_processor: str | None = None,
        detector_image_processor: Any = None,
    ):
        if text_padding not in ("longest", "max_length"):
            raise ValueError(f"text_padding={text_padding!r}: expected 'longest' or 'max_length'")
        parts = {
            "image_processor": image_processor,
            "tokenizer": tokenizer,
            "detector_image_processor": detector_image_processor,
        }
        for name, part in parts.items():
            if part is not None:
                self.check_argument_for_proper_class(name, part)
        check_length(max_text_length, tokenizer)
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.max_text_length = max_text_length
        self.text_padding = text_padding
        self.dual_encoder_processor = dual_encoder_processor
        self.detector_image_processor = detector_image_processor
        self.chat_template = None
        self.truncated_captions = 0
        self._pixel_tables: dict[str, PixelTable | None] = {}

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        region_features: Any = None,
        region_boxes: Any = None,
        region_mask: Any = None,
        image_sizes: Any = None,
        image_embeds: Any = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs of B images and/or T captions.

        Args:
            images: a PIL image, path, http(s) address, encoded bytes, array or tensor `(H, W)`, `(H, W, C)` or
                `(C, H, W)`, several of these, or a batch array; see `rgb_images` and `to_rgb` for what they look like.
            text: a caption or a list of captions.
            region_features, region_boxes, region_mask, image_sizes: see `pad_regions`; lists of different lengths are
                padded. Whether boxes are needed is the model's decision.
            image_embeds: `(B, P)` beside region features of a dual encoder, as its cache holds them.
            return_tensors: "pt", "np", or None for NumPy arrays.
            **kwargs: as transformers' processors have them, flat or in `text_kwargs`, `images_kwargs`,
                `common_kwargs` (those of audio and videos are not read). Of text `padding`, `truncation` and
                `max_length` (in place of `max_text_length`); captions for a SigLIP are padded to the length it
                learned with, whatever is asked. Of images the image processor's settings; `do_rescale` has no say,
                since pictures of any range become bytes first.

        Returns:
            `pixel_values (B, 3, H, W)`, beside a detector also `detector_pixel_values (B, 3, H', W')` and, where its
            pixels are padded, `pixel_extents (B, 2)`, see `padded_pixels`; or `region_features (B, R, F)`,
            `region_mask (B, R)` bool and, where given, `region_boxes (B, R, 4)`; `input_ids`, `attention_mask` and
            `word_mask (T, W)`, 1 for words to match.

        Raises:
            ValueError: nothing given, a part that this processor lacks, or bad input (the message names the item).
        """
        if images is None and text is None and region_features is None:
            raise ValueError("nothing to process: pass images, region_features or text")
        if images is not None and region_features is not None:
            raise ValueError("images and region_features are two forms of the same input: pass one of them")
        if region_features is None and any(value is not None for value in (region_boxes, region_mask, image_sizes)):
            raise ValueError("region_boxes, region_mask and image_sizes describe region_features: pass these too")
        text_settings, image_settings, return_tensors = self._settings(kwargs, return_tensors)
        inputs: dict[str, np.ndarray] = {}
        if images is not None:
            inputs.update(self._pixels(images, image_settings))
        if region_features is not None:
            inputs.update(pad_regions(region_features, region_boxes, region_mask, image_sizes))
            if image_embeds is not None:
                inputs["image_embeds"] = np.stack([np.asarray(each, dtype=np.float32) for each in image_embeds])
        if text is not None:
            inputs.update(self._tokens(text, **text_settings))
        return BatchFeature(inputs, tensor_type=return_tensors)

    def _settings(
        self, given: dict[str, Any], return_tensors: str | None
    ) -> tuple[dict[str, Any], dict[str, Any], str | None]:
        """What a call's further arguments set for the text and for the images, and the kind of tensors.

        Raises:
            ValueError: on one that this processor does not take.
        """
        for kind in ("audio", "videos"):  # settings of what nothing is given of: Sentence Transformers always has them
            given.pop(f"{kind}_kwargs", None)
        named = {kind: dict(given.pop(f"{kind}_kwargs", None) or {}) for kind in ("text", "images", "common")}
        for name, value in (named.pop("common") | given).items():
            of_images = name not in _TEXT_SETTINGS and hasattr(self.image_processor, name)
            named["images" if of_images else "text"].setdefault(name, value)
        tensors = [settings.pop("return_tensors", None) for settings in named.values()]
        named["images"].pop("do_rescale", None)
        for name, value in list(named["text"].items()):
            if name in _TEXT_SETTINGS:
                continue
            if value is not None and (name not in DONE_ANYWAY or value != DONE_ANYWAY[name]):
                raise ValueError(
                    f"{name}={value!r:.80} is no argument of this processor: it takes {', '.join(_TEXT_SETTINGS)} "
                    "and its image processor's settings"
                )
            del named["text"][name]
        if named["images"].get("input_data_format") is not None:
            raise ValueError("input_data_format is not taken: pass arrays (H, W, C), or tensors (C, H, W)")
        return named["text"], named["images"], next((kind for kind in tensors if kind), return_tensors)

    def _pixels(self, images: Any, settings_of_call: dict[str, Any]) -> dict[str, np.ndarray]:
        parts = {"pixel_values": self._need("image_processor", "images")}
        if self.detector_image_processor is not None:
            parts["detector_pixel_values"] = self.detector_image_processor
        batch = rgb_images(images, files=True, web=True)
        inputs: dict[str, np.ndarray] = {}
        for name, image_processor in parts.items():
            if pads(image_processor):
                inputs[name], extents = padded_pixels(image_processor, batch, **settings_of_call)
                inputs |= {} if extents is None else {"pixel_extents": extents}
                continue
            if settings_of_call:
                inputs[name] = hub_pixels(image_processor, batch, **settings_of_call)
                continue
            settings = repr(vars(image_processor))  # a setting changed since then makes a new table
            if settings not in self._pixel_tables:
                self._pixel_tables[settings] = pixel_table(image_processor)
            table = self._pixel_tables[settings]
            pixels = table.pixels(batch) if table is not None else None
            inputs[name] = hub_pixels(image_processor, batch) if pixels is None else pixels
        return inputs

    def _tokens(
        self,
        text: str | Sequence[str],
        padding: Any = None,
        truncation: Any = None,
        max_length: int | None = None,
    ) -> dict[str, np.ndarray]:
        tokenizer = self._need("tokenizer", "text")
        captions = check_captions(text)
        limit = check_length(self.max_text_length if max_length is None else max_length, tokenizer)
        if self.dual_encoder_processor is not None:  # which reads no more than it learned with
            limit = min(limit, self.max_text_length)
        if self.text_padding == "max_length" and limit != check_length(self.max_text_length, tokenizer):
            raise ValueError(
                f"max_length={max_length}: this text side reads captions of {self.max_text_length} tokens"
            )
        inputs, lengths = tokenize(tokenizer, captions, limit, self.text_padding)
        cut = np.flatnonzero(lengths > limit)
        truncation = getattr(truncation, "value", truncation)
        if cut.size and truncation in (False, "do_not_truncate"):
            raise ValueError(
                f"text[{cut[0]}] has {lengths[cut[0]]} tokens, over {limit}, and truncation={truncation!r}: "
                "shorten it, or let it be cut"
            )
        if padding is not None and self.text_padding == "longest":
            inputs = _padded_as_asked(inputs, padding, limit, tokenizer.pad_token_id)
        if truncation is not None:  # whoever asks for it knows
            return inputs
        if cut.size and not self.truncated_captions:
            more = (
                "the model reads no more"
                if self.dual_encoder_processor
                else "raise max_text_length to keep them whole"
            )
            logger.warning(
                f"{cut.size} of {len(captions)} captions are cut to {limit} tokens (the first has {lengths[cut[0]]}: "
                f"{captions[cut[0]]!r:.80}): {more}. Said once; processor.truncated_captions goes on counting."
            )
        self.truncated_captions += cut.size
        return inputs

    def caption_problems(self, captions: Sequence[Any]) -> dict[int, str]:
        """Why captions cannot be processed, such as one without a word: their places and reasons; good ones are not in
        it. To leave them out of many, where a call would refuse them all."""
        tokenizer = self._need("tokenizer", "text")
        return caption_problems(tokenizer, captions, check_length(self.max_text_length, tokenizer))

    def _need(self, name: str, given: str) -> Any:
        part = getattr(self, name)
        if part is None:
            ready = ", or give a model of regions what it reads: region_features (--regions)"
            raise ValueError(
                f"{given} given, but this processor has no {name}: build it with TVRNProcessor({name}=...), "
                f"from_backbones(...) or from_captions(...){ready if name == 'image_processor' else ''}"
            )
        return part

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything a call can return."""
        images = ["region_features", "region_boxes", "region_mask"]
        text = ["input_ids", "attention_mask", "word_mask"]
        pixels = ["pixel_values"] * (self.image_processor is not None)
        pixels += ["detector_pixel_values"] * (self.detector_image_processor is not None)
        pixels += ["pixel_extents"] * (pads(self.detector_image_processor or self.image_processor))
        return pixels + images + text * (self.tokenizer is not None)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """The tokenizer's `decode`."""
        return self._need("tokenizer", "token ids").decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's `batch_decode`."""
        return self._need("tokenizer", "token ids").batch_decode(*args, **kwargs)

    @classmethod
    def from_backbones(
        cls,
        vision: str | os.PathLike[str] | None = None,
        text: str | os.PathLike[str] | None = None,
        image_size: int | None = None,
        max_text_length: int = 64,
        trust_remote_code: bool = False,
        detector: str | os.PathLike[str] | None = None,
    ) -> TVRNProcessor:
        """The processor of pretrained towers: their image processor and tokenizer.

        Args:
            vision, text: Hub id or folder of each tower; None leaves that part out.
            image_size: side in pixels of the square that images are brought to, instead of the tower's own.
            trust_remote_code: run code of the towers' folders or repositories, where their files ask for it.
            detector: Hub id or folder of a detector, whose own image processor prepares its pixels; `vision`'s then
                squeezes the whole picture into its size, so that the detector's boxes fit its map.

        Raises:
            ValueError: a tower that cannot be found, or that has no image processor or tokenizer; a detector whose
                image processor crops.
        """
        image_processor = tokenizer = None
        if vision is not None:
            image_processor = _load_image_processor(vision, trust_remote_code=trust_remote_code)
            if image_size is not None:
                image_processor = with_image_size(image_processor, image_size)
        if text is not None:
            tokenizer = _load_tokenizer(text, trust_remote_code=trust_remote_code)
        detects = None
        if detector is not None:
            detects = _load_detector_image_processor(detector)
            if vision is None and image_size is not None:
                raise ValueError(f"image_size={image_size}: a detector reads pixels of its own size; leave it out")
            if vision is None:
                image_processor, detects = detects, None
            else:
                resize_only(image_processor)
        return cls(image_processor, tokenizer, max_text_length, detector_image_processor=detects)

    @classmethod
    def from_dual_encoder(
        cls,
        dual_encoder: str | os.PathLike[str],
        max_text_length: int | None = None,
        detector: str | os.PathLike[str] | None = None,
        **hub: Any,
    ) -> TVRNProcessor:
        """The processor of a dual encoder (CLIP, SigLIP, …): images and captions as its own makes them.

        Args:
            dual_encoder: Hub id or folder, which holds the image processor and the tokenizer.
            max_text_length: shorter than what the text side was trained with; None: just that.
            detector: as in `from_backbones`.

        Raises:
            ValueError: it cannot be found, or has no image processor or tokenizer; it crops pictures, which a
                detector's boxes would not fit.
        """
        hub = {"trust_remote_code": False, **hub}
        text, kind = _text_side(dual_encoder, hub)
        image_processor = _load_image_processor(dual_encoder, **hub)
        detects = None if detector is None else _load_detector_image_processor(detector)
        if detects is not None and resize_only(copy.deepcopy(image_processor)).to_dict() != image_processor.to_dict():
            raise ValueError(
                f"{os.fspath(dual_encoder)!r} crops or pads pictures, so its map and a detector's boxes would see "
                "different pixels: take a dual encoder that only resizes (SigLIP), or leave the detector out"
            )
        tokenizer = _load_tokenizer(dual_encoder, **hub)
        longest = min(getattr(text, "max_position_embeddings", None) or 512, tokenizer.model_max_length)
        # SigLIP pools the last position, which has to be where it was in training.
        padding = "max_length" if str(text.model_type).startswith("siglip") else "longest"
        length = longest if max_text_length is None else max_text_length
        if padding == "max_length" and length != longest:
            raise ValueError(f"max_text_length={length}: this text side reads captions of exactly {longest} tokens")
        return cls(image_processor, tokenizer, min(length, longest), padding, kind, detects)

    def save_dual_encoder(self, folder: str | os.PathLike[str]) -> None:
        """Write the processor of the dual encoder's own class, which `AutoProcessor` loads without this package.

        Raises:
            ValueError: this is not the processor of a dual encoder.
        """
        if self.dual_encoder_processor is None:
            raise ValueError("this processor is of no dual encoder: build it with TVRNProcessor.from_dual_encoder")
        own = getattr(transformers, self.dual_encoder_processor)
        own(image_processor=self.image_processor, tokenizer=self.tokenizer).save_pretrained(folder)

    @classmethod
    def from_captions(
        cls,
        captions: Iterable[str],
        image_processor: Any = None,
        min_frequency: int = 1,
        max_text_length: int = 64,
    ) -> TVRNProcessor:
        """The processor of the BiGRU text side: a word tokenizer with the vocabulary of the training captions.

        `len(processor.tokenizer)` is the model's `vocab_size`; `processor.tokenizer.pad_token_id` is 0.

        Args:
            captions: the training captions, and no others.
            min_frequency: words seen less often become `<unk>`.

        Raises:
            ValueError: no captions, an empty one, or no word that is frequent enough.
        """
        tokenizer = build_word_tokenizer(captions, min_frequency)
        return cls(image_processor, tokenizer, max_text_length=max_text_length)

    def to_dict(self) -> dict[str, Any]:
        """What `processor_config.json` holds; a part that is null there is not looked for when loading."""
        settings = super().to_dict()
        settings["tokenizer"] = None if self.tokenizer is None else type(self.tokenizer).__name__
        if self.detector_image_processor is None:  # the file of a model without one is as it was
            settings.pop("detector_image_processor", None)
        return settings

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Write the processor, and the code that loads it anywhere, into a checkpoint's folder.

        ProcessorMixin's own version cannot leave a part out.
        """
        os.makedirs(save_directory, exist_ok=True)
        if self._auto_class is not None:
            custom_object_save(self, save_directory, config=self)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)
        path = os.path.join(save_directory, PROCESSOR_NAME)
        self.to_json_file(path)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.fspath(save_directory))), **kwargs)
        return [path]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> TVRNProcessor:
        """Load from a folder or a Hub repository; `max_text_length=` overrides the saved one.

        Code that a tokenizer or image processor brings runs with `trust_remote_code=True` alone.

        Raises:
            ValueError: there is no `processor_config.json`, or a part does not load.
        """
        name = pretrained_model_name_or_path
        # Not get_processor_dict, which loads the audio tokenizer that a file may name, code and all.
        settings = read_json(name, PROCESSOR_NAME, **kwargs)
        if not settings:
            raise ValueError(
                f"{name} has no {PROCESSOR_NAME}: write it with processor.save_pretrained, or build a processor with "
                "TVRNProcessor.from_backbones or from_captions"
            )
        hub = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}
        hub["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))  # None would ask on the terminal
        image_processor = tokenizer = None
        if settings.get("image_processor") is not None:
            image_processor = _load_image_processor(name, **hub)
        if settings.get("tokenizer") is not None:
            tokenizer = _load_tokenizer(name, **hub)
        return cls(
            image_processor,
            tokenizer,
            kwargs.get("max_text_length", settings.get("max_text_length", 64)),
            settings.get("text_padding", "longest"),
            settings.get("dual_encoder_processor"),
            _image_processor_of(settings.get("detector_image_processor")),
        )


def _text_side(name: str | os.PathLike[str], hub: dict[str, Any]) -> tuple[Any, str]:
    """A dual encoder's text configuration, and the class of its processor."""
    config = _load(AutoConfig, name, "configuration", MODEL_CODE, **hub)
    if getattr(config, "text_config", None) is None:
        raise ValueError(
            f"{os.fspath(name)!r} holds a {config.model_type!r} model, no dual encoder: use from_backbones"
        )
    classes = PROCESSOR_MAPPING_NAMES.get(config.model_type)
    kind = classes[0] if isinstance(classes, tuple) else classes
    return config.text_config, kind or "VisionTextDualEncoderProcessor"


def _load_image_processor(name: str | os.PathLike[str], **hub: Any) -> Any:
    """PIL-backed also where torchvision is installed: the two resize differently, and a checkpoint's pixels should not
    depend on what else a machine has."""
    image_processor = _load(AutoImageProcessor, name, "image processor", PICTURE_CODE, backend="pil", **hub)
    if not hub["trust_remote_code"]:  # what was not run is not handed on either
        vars(image_processor).pop("auto_map", None)
    return image_processor


def _load_detector_image_processor(name: str | os.PathLike[str]) -> Any:
    hub = {"trust_remote_code": False}
    try:
        check_detector(_load(AutoConfig, name, "configuration", MODEL_CODE, **hub))
    except ValueError as error:
        raise ValueError(f"{os.fspath(name)!r}: {error}") from error
    image_processor = _load_image_processor(name, **hub)
    if getattr(image_processor, "do_center_crop", None):
        raise ValueError(
            f"the {type(image_processor).__name__} of {os.fspath(name)!r} crops (do_center_crop=True), so boxes would "
            "not be fractions of the picture: set it to false in its preprocessor_config.json"
        )
    return image_processor


def _image_processor_of(settings: Any) -> Any:
    """The image processor that a part of `processor_config.json` describes, or None."""
    if settings is None:
        return None
    kind = settings.get("image_processor_type") if isinstance(settings, dict) else settings
    found = get_image_processor_class_from_name(f"{str(kind).removesuffix('Pil')}Pil")
    if found is None:
        raise ValueError(
            f"detector_image_processor in {PROCESSOR_NAME} is a {kind!r}, which transformers "
            f"{transformers.__version__} does not know: expected a detector's image processor; upgrade transformers"
        )
    return found.from_dict(settings)


def _load_tokenizer(name: str | os.PathLike[str], **hub: Any) -> Any:
    tokenizer = _load(AutoTokenizer, name, "tokenizer", TOKENIZER_CODE, **hub)
    if not hub["trust_remote_code"]:
        tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def _load(
    auto_class: Any, name: str | os.PathLike[str], what: str, code: Mapping[str, tuple[str, ...]], **hub: Any
) -> Any:
    try:
        return auto_class.from_pretrained(name, **hub)
    except (OSError, ValueError, AttributeError) as error:
        reason = explained(error, name, code, **hub)
        if reason.rstrip(".") != str(error).strip().rstrip("."):
            raise ValueError(f"no {what} loaded: {reason}") from error
        if isinstance(error, AttributeError):
            raise
        reason = reason.partition("\n")[0][:160]
        if os.path.isabs(name) and not os.path.exists(name):
            reason = "no such folder"
        raise ValueError(
            f"no {what} in {os.fspath(name)!r} ({reason}): expected a Hub id or a folder that holds one; check the "
            "name and the connection, or pass a loaded one to TVRNProcessor"
        ) from error


# -- regions ---------------------------------------------------------------------------------------------------------


def pad_regions(
    region_features: Any, region_boxes: Any = None, region_mask: Any = None, image_sizes: Any = None
) -> dict[str, np.ndarray]:
    """Check the regions of B images and pad them to the longest, R.

    Args:
        region_features: `(B, R, F)`, one image's `(R, F)`, or a list of B arrays `(R_i, F)`.
        region_boxes: xyxy, `(B, R, 4)`, `(R, 4)` or a list of `(R_i, 4)`: fractions of the image in [0, 1], or pixels
            where `image_sizes` is given. Optional.
        region_mask: `(B, R)`, `(R,)` or a list of `(R_i,)`, 1 for the regions to use. Optional: all of them.
        image_sizes: B pairs (height, width) in pixels; the boxes are then divided by them.

    Returns:
        `region_features (B, R, F)` float32, `region_mask (B, R)` bool and, with boxes, `region_boxes (B, R, 4)`
        float32 in [0, 1]. Whatever the mask leaves out is zero.

    Raises:
        ValueError: wrong shapes, no images, an image without regions, NaN or infinite features, pixel boxes without
            sizes, boxes outside the image or with x2 < x1 or y2 < y1.
    """
    features = _split_images(region_features, "region_features", "(regions, features)", ndim=2)
    widths = sorted({array.shape[1] for array in features})
    if len(widths) > 1:
        raise ValueError(f"region_features have {widths} columns in one batch: every region needs the same number")
    counts = [len(array) for array in features]
    mask = _pad(_keep_rows(region_mask, counts))  # (B, R), False where it pads
    padded = {"region_features": _masked(_pad(features), mask), "region_mask": mask}
    _check_finite(padded["region_features"])
    if region_boxes is not None:
        boxes = _split_images(region_boxes, "region_boxes", "(regions, 4)", ndim=2)
        _check_counts("region_boxes", boxes, counts)
        padded["region_boxes"] = _relative_boxes(_masked(_pad(boxes), mask), mask, image_sizes)
    elif image_sizes is not None:
        raise ValueError("image_sizes turn pixel boxes into fractions, but region_boxes is missing: pass both")
    return padded


def _split_images(value: Any, name: str, shape: str, ndim: int) -> list[np.ndarray]:
    """One float32 array of `ndim` dimensions for each image."""
    images = list(value) if isinstance(value, (list, tuple)) else _split_array(value, name, shape, ndim)
    if not images:
        raise ValueError(f"{name} holds zero images: pass at least one")
    arrays = [_to_numpy(image, f"{name}[{i}]") for i, image in enumerate(images)]
    for i, array in enumerate(arrays):
        if array.ndim != ndim:
            raise ValueError(f"{name}[{i}] has shape {array.shape}, expected {shape}: pass one such array an image")
    return arrays


def _split_array(value: Any, name: str, shape: str, ndim: int) -> list[Any]:
    array = _to_numpy(value, name)
    if array.ndim == ndim:
        return [array]
    if array.ndim != ndim + 1:
        raise ValueError(
            f"{name} has shape {array.shape}, expected {shape} for one image, (images, {shape[1:]} for a batch, "
            "or a list with one array an image"
        )
    return list(array)


def _to_numpy(value: Any, name: str) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()  # float first: NumPy has no bfloat16
    try:
        return np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is no numeric array ({type(value).__name__}: {error})") from error


def _keep_rows(region_mask: Any, counts: Sequence[int]) -> list[np.ndarray]:
    """The regions to use of each image, all where no mask is given; every image must keep one."""
    if region_mask is None:
        rows = [np.ones(count, dtype=bool) for count in counts]
    else:
        values = _split_images(region_mask, "region_mask", "(regions,)", ndim=1)
        _check_counts("region_mask", values, counts)
        rows = [value > 0 for value in values]
    empty = [i for i, row in enumerate(rows) if not row.any()]
    if empty:
        raise ValueError(
            f"region_mask keeps no region of image {empty[0]} ({len(empty)} such images, {counts[empty[0]]} regions "
            "given): every image needs at least one; leave the others out of the batch"
        )
    return rows


def _check_counts(name: str, values: Sequence[np.ndarray], counts: Sequence[int]) -> None:
    if len(values) != len(counts):
        raise ValueError(f"{name} holds {len(values)} images, region_features {len(counts)}: pass the same images")
    for i, (value, count) in enumerate(zip(values, counts, strict=True)):
        if len(value) != count:
            raise ValueError(f"{name}[{i}] has {len(value)} regions, region_features[{i}] has {count}: one each")
        if name == "region_boxes" and value.shape[1] != 4:
            raise ValueError(f"region_boxes[{i}] has shape {value.shape}, expected ({count}, 4): x1, y1, x2, y2")


def _pad(rows: Sequence[np.ndarray]) -> np.ndarray:
    padded = np.zeros((len(rows), max(len(row) for row in rows), *rows[0].shape[1:]), dtype=rows[0].dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def _masked(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    values[~mask] = 0  # assigned, not multiplied: NaN times 0 is NaN
    return values


def _check_finite(features: np.ndarray) -> None:
    if not np.isfinite(features).all():
        image, region, column = np.argwhere(~np.isfinite(features))[0]
        raise ValueError(
            f"region_features[{image}][{region}] holds {features[image, region, column]} in column {column}: expected "
            "finite numbers; extract this image again, or mask the region out with region_mask"
        )


def _relative_boxes(boxes: np.ndarray, mask: np.ndarray, image_sizes: Any) -> np.ndarray:
    """Boxes as fractions of the image, clipped to [0, 1]."""
    if image_sizes is None:
        _check_boxes(boxes, mask, np.ones((len(boxes), 2), dtype=np.float32), BOX_SLACK)
        return np.clip(boxes, 0, 1)
    sizes = np.atleast_2d(_to_numpy(image_sizes, "image_sizes"))
    if sizes.shape != (len(boxes), 2):
        raise ValueError(
            f"image_sizes has shape {sizes.shape}, expected ({len(boxes)}, 2): (height, width) of each image"
        )
    if not (sizes > 0).all():
        raise ValueError(f"image_sizes {sizes.tolist()} must be positive pixels (height, width)")
    # Fractions divided by the image's size would shrink every box to a point without a word.
    largest = boxes.max(axis=(1, 2))
    for i in np.flatnonzero((largest <= 1) & (sizes.min(axis=1) > 2)):
        raise ValueError(
            f"image_sizes makes region_boxes pixels, but the largest coordinate of image {i} is {largest[i]:g} "
            f"(its size is {sizes[i].tolist()}): leave image_sizes out where boxes are fractions already"
        )
    _check_boxes(boxes, mask, sizes, PIXEL_SLACK)
    # (height, width) to x1, y1, x2, y2: (B, 1, 4) against (B, R, 4).
    return np.clip(boxes / sizes[:, None, [1, 0, 1, 0]], 0, 1)


def _check_boxes(boxes: np.ndarray, mask: np.ndarray, sizes: np.ndarray, slack: float) -> None:
    limits = sizes[:, None, [1, 0, 1, 0]]  # (B, 1, 4): width, height, width, height
    # A NaN is inside nothing: comparisons asked this way round find it.
    with np.errstate(invalid="ignore"):
        outside = ~((boxes >= -slack) & (boxes <= limits + slack)).all(axis=-1) & mask
        flipped = (boxes[..., 2:] < boxes[..., :2]).any(axis=-1) & mask
    if outside.any():
        image, region = np.argwhere(outside)[0]
        where = f"region_boxes[{image}][{region}] is {boxes[image, region].tolist()}"
        if slack == PIXEL_SLACK:
            width, height = limits[image, 0, :2]
            raise ValueError(
                f"{where}: outside its image of height {height:g} and width {width:g}; check image_sizes (height, "
                "width)"
            )
        raise ValueError(
            f"{where}: expected x1, y1, x2, y2 in [0, 1], fractions of the image; for boxes in pixels pass "
            "image_sizes=[(height, width), ...]"
        )
    if flipped.any():
        image, region = np.argwhere(flipped)[0]
        raise ValueError(
            f"region_boxes[{image}][{region}] is {boxes[image, region].tolist()}: x2 < x1 or y2 < y1; expected "
            "corners (x1, y1, x2, y2), not (x, y, width, height)"
        )


# -- captions --------------------------------------------------------------------------------------------------------


def check_captions(text: str | Iterable[str]) -> list[str]:
    """The captions as a list.

    Raises:
        ValueError: no captions, an empty one, or something that is no string (the message names its index).
    """
    captions = [text] if isinstance(text, str) else list(text)
    if not captions:
        raise ValueError("text holds zero captions: pass at least one")
    faults = {i: fault for i, caption in enumerate(captions) if (fault := _fault(caption)) is not None}
    if faults:
        i = next(iter(faults))
        raise ValueError(
            f"text[{i}] {faults[i]} ({len(faults)} of {len(captions)} captions cannot be used): drop it, and with it "
            "its pairing with an image"
        )
    return captions


def _fault(caption: Any) -> str | None:
    """What is wrong with a caption before it is tokenized."""
    if not isinstance(caption, str):
        return f"is {type(caption).__name__} {caption!r:.80}, expected a string a caption"
    if not caption.strip():
        return f"is an empty caption {caption!r:.80}"
    try:
        caption.encode()
    except UnicodeEncodeError:
        return f"is no Unicode text, it holds lone surrogates: {caption!r:.80}"
    return None


def caption_problems(tokenizer: Any, captions: Sequence[Any], max_length: int) -> dict[int, str]:
    """Why captions cannot be used, by their place; good ones are not in it. Most are known without being tokenized."""
    found: dict[int, str] = {}
    unsure = []
    special = [str(token) for token in tokenizer.all_special_tokens]
    for i, caption in enumerate(captions):
        fault = _fault(caption)
        if fault is not None:
            found[i] = fault
        # a letter or digit becomes a word, or at least the unknown one, unless a special token is spelt with it
        elif tokenizer.unk_token is None or not _LETTER.search(caption) or any(token in caption for token in special):
            unsure.append(i)
    if unsure:
        inputs, _ = encode(tokenizer, [captions[i] for i in unsure], max_length)
        for i, count in zip(unsure, inputs["word_mask"].sum(axis=1).tolist(), strict=True):
            if not count:
                found[i] = f"{captions[i]!r:.80} has no word left after {type(tokenizer).__name__}"
    return dict(sorted(found.items()))


def tokenize(
    tokenizer: Any, captions: Sequence[str], max_length: int, text_padding: str = "longest"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Token ids of T captions and the lengths they would have uncut.

    Args:
        max_length: longest caption in tokens, special tokens included.
        text_padding: "longest", or "max_length": every caption to that length and without an attention mask, as a
            dual encoder wants it that pools the last position (SigLIP).

    Returns:
        `input_ids`, `attention_mask` and `word_mask (T, W)` int64, padded on the right; uncut lengths `(T,)`.

    Raises:
        ValueError: the tokenizer cannot pad, or leaves a caption without a single word.
    """
    inputs, lengths = encode(tokenizer, captions, max_length, text_padding)
    wordless = np.flatnonzero(inputs["word_mask"].sum(axis=1) == 0)
    if wordless.size:
        i = wordless[0]
        raise ValueError(f"text[{i}] {captions[i]!r:.80} has no word left after {type(tokenizer).__name__}: drop it")
    if text_padding == "max_length":
        del inputs["attention_mask"]
    return inputs, lengths


def encode(
    tokenizer: Any, captions: Sequence[str], max_length: int, text_padding: str = "longest"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """As `tokenize`, also where a caption has no word."""
    if tokenizer.pad_token is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no padding token, which a batch of captions needs: set "
            "tokenizer.pad_token (tokenizer.eos_token will do)"
        )
    options = {"padding": True, "padding_side": "right", "return_tensors": "np", "return_attention_mask": True}
    # uncut at first: only so are the captions that get cut known, and few batches need the second call
    encoded = tokenizer(captions, truncation=False, verbose=False, **options)
    lengths = encoded["attention_mask"].sum(axis=1)
    if (lengths > max_length).any():
        encoded = tokenizer(captions, truncation=True, max_length=max_length, **options)
    if text_padding == "max_length":
        options["padding"] = "max_length"
        encoded = tokenizer(captions, truncation=True, max_length=max_length, **options)
    inputs = {name: encoded[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    # (T, W): attended, and no special token.
    inputs["word_mask"] = inputs["attention_mask"] * ~np.isin(inputs["input_ids"], special_ids(tokenizer))
    return inputs, lengths


def _padded_as_asked(inputs: dict[str, np.ndarray], padding: Any, limit: int, pad_id: int) -> dict[str, np.ndarray]:
    """Tokens that are padded to the longest caption, with the padding that a call of the processor asks for."""
    wanted = PADDINGS.get(getattr(padding, "value", padding))
    if wanted is None:
        raise ValueError(f"padding={padding!r}: expected one of {', '.join(map(repr, PADDINGS))}")
    lengths = inputs["attention_mask"].sum(axis=1)
    if wanted == "none" and lengths.min() < lengths.max():
        raise ValueError(
            f"padding={padding!r}, but the captions have {lengths.min()} to {lengths.max()} tokens: a batch needs "
            "padding=True, or captions one by one"
        )
    if wanted != "max_length":
        return inputs
    wider = ((0, 0), (0, limit - inputs["input_ids"].shape[1]))
    return {
        name: np.pad(values, wider, constant_values=pad_id if name == "input_ids" else 0)
        for name, values in inputs.items()
    }


def special_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens that are no words: all special ones but the unknown token, which stands for a word."""
    tokens = [token for role, token in tokenizer.special_tokens_map.items() if role != "unk_token"]
    flat = [one for token in tokens for one in (token if isinstance(token, (list, tuple)) else [token])]
    return sorted({tokenizer.convert_tokens_to_ids(str(token)) for token in flat})


def check_length(max_length: int, tokenizer: Any) -> int:
    """The longest caption in tokens that both the setting and the tokenizer allow.

    Raises:
        ValueError: it leaves no room for a word beside the special tokens.
    """
    special = 0 if tokenizer is None else tokenizer.num_special_tokens_to_add()
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length <= special:
        raise ValueError(
            f"max_text_length={max_length!r}: expected an integer above {special}, the tokenizer's special tokens"
        )
    return max_length if tokenizer is None else min(max_length, tokenizer.model_max_length)


def build_word_tokenizer(captions: Iterable[str], min_frequency: int = 1) -> PreTrainedTokenizerFast:
    """A lower-case word tokenizer, punctuation split off: `<pad>` 0, `<unk>` 1, then words by falling frequency.

    Raises:
        ValueError: no captions, an empty one, or no word seen `min_frequency` times.
    """
    if min_frequency < 1:
        raise ValueError(f"min_frequency={min_frequency}: expected at least 1")
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Whitespace()
    counts: Counter[str] = Counter()
    for caption in check_captions(captions):
        counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)))
    # Of equally frequent words the first in the alphabet: the same captions in any order give the same ids.
    words = sorted((word for word in counts if counts[word] >= min_frequency), key=lambda word: (-counts[word], word))
    if not words:
        raise ValueError(
            f"no word is seen min_frequency={min_frequency} times, at most {max(counts.values())}: lower it"
        )
    vocabulary = {word: i for i, word in enumerate([PAD, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN)


TVRNProcessor.register_for_auto_class("AutoProcessor")

"""TVRNProcessor: photographs, region features and captions in, checked and padded model inputs out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.dynamic_module_utils import custom_object_save
from transformers.feature_extraction_utils import BatchFeature

# From its module: the name that transformers 5.17 exports asks for torchvision, though the PIL backend needs none.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin
from transformers.utils import PROCESSOR_NAME

from .pixels_tvrn import PixelTable, hub_pixels, pixel_table, rgb_images, with_image_size
from .regions_tvrn import pad_regions
from .trust_tvrn import HUB_ARGUMENTS, MODEL_CODE, PICTURE_CODE, TOKENIZER_CODE, explained, read_json
from .words_tvrn import build_word_tokenizer, caption_problems, check_captions, check_length, tokenize

logger = logging.getLogger(__name__)


class TVRNProcessor(ProcessorMixin):
    """Prepare any subset of a model's inputs; both sides are padded and masked.

    Args:
        image_processor: a Hub image processor; None for models that read region features.
        tokenizer: a Hub tokenizer, or the word tokenizer of `from_captions`; None for image-only use.
        max_text_length: longest caption in tokens, special tokens included; longer ones are cut, reported once, and
            counted in `truncated_captions` (of this object: a data loader's workers each count their own).
        text_padding: "longest" of a batch, or "max_length", see `tokenize`.
        dual_encoder_processor: class of transformers that a dual encoder's own processor has.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        max_text_length: int = 64,
        text_padding: str = "longest",
        dual_encoder_processor: str | None = None,
    ):
        if text_padding not in ("longest", "max_length"):
            raise ValueError(f"text_padding={text_padding!r}: expected 'longest' or 'max_length'")
        for name, part in (("image_processor", image_processor), ("tokenizer", tokenizer)):
            if part is not None:
                self.check_argument_for_proper_class(name, part)
        check_length(max_text_length, tokenizer)
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.max_text_length = max_text_length
        self.text_padding = text_padding
        self.dual_encoder_processor = dual_encoder_processor
        self.chat_template = None
        self.truncated_captions = 0
        self._pixel_table: tuple[str, PixelTable | None] | None = None

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
    ) -> BatchFeature:
        """Model inputs of B images and/or T captions.

        Args:
            images: a PIL image, a uint8 array `(H, W)`, `(H, W, C)` or `(C, H, W)`, a list of these, or a batch array.
            text: a caption or a list of captions.
            region_features, region_boxes, region_mask, image_sizes: see `pad_regions`; lists of different lengths are
                padded. Whether boxes are needed is the model's decision.
            image_embeds: `(B, P)` beside region features of a dual encoder, as its cache holds them.
            return_tensors: "pt", "np", or None for NumPy arrays.

        Returns:
            `pixel_values (B, 3, H, W)`, or `region_features (B, R, F)`, `region_mask (B, R)` bool and, where given,
            `region_boxes (B, R, 4)`; `input_ids`, `attention_mask` and `word_mask (T, W)`, 1 for words to match.

        Raises:
            ValueError: nothing given, a part that this processor lacks, or bad input (the message names the item).
        """
        if images is None and text is None and region_features is None:
            raise ValueError("nothing to process: pass images, region_features or text")
        if images is not None and region_features is not None:
            raise ValueError("images and region_features are two forms of the same input: pass one of them")
        if region_features is None and any(value is not None for value in (region_boxes, region_mask, image_sizes)):
            raise ValueError("region_boxes, region_mask and image_sizes describe region_features: pass these too")
        inputs: dict[str, np.ndarray] = {}
        if images is not None:
            inputs["pixel_values"] = self._pixels(images)
        if region_features is not None:
            inputs.update(pad_regions(region_features, region_boxes, region_mask, image_sizes))
            if image_embeds is not None:
                inputs["image_embeds"] = np.stack([np.asarray(each, dtype=np.float32) for each in image_embeds])
        if text is not None:
            inputs.update(self._tokens(text))
        return BatchFeature(inputs, tensor_type=return_tensors)

    def _pixels(self, images: Any) -> np.ndarray:
        image_processor = self._need("image_processor", "images")
        batch = rgb_images(images)
        settings = repr(vars(image_processor))  # a setting changed since then makes a new table
        if self._pixel_table is None or self._pixel_table[0] != settings:
            self._pixel_table = (settings, pixel_table(image_processor))
        table = self._pixel_table[1]
        pixels = table.pixels(batch) if table is not None else None
        return hub_pixels(image_processor, batch) if pixels is None else pixels

    def _tokens(self, text: str | Sequence[str]) -> dict[str, np.ndarray]:
        tokenizer = self._need("tokenizer", "text")
        captions = check_captions(text)
        limit = check_length(self.max_text_length, tokenizer)
        inputs, lengths = tokenize(tokenizer, captions, limit, self.text_padding)
        cut = np.flatnonzero(lengths > limit)
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
            raise ValueError(
                f"{given} given, but this processor has no {name}: build it with TVRNProcessor({name}=...), "
                "from_backbones(...) or from_captions(...)"
            )
        return part

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything a call can return."""
        images = ["region_features", "region_boxes", "region_mask"]
        text = ["input_ids", "attention_mask", "word_mask"]
        return ["pixel_values"] * (self.image_processor is not None) + images + text * (self.tokenizer is not None)

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
    ) -> TVRNProcessor:
        """The processor of pretrained towers: their image processor and tokenizer.

        Args:
            vision, text: Hub id or folder of each tower; None leaves that part out.
            image_size: side in pixels of the square that images are brought to, instead of the tower's own.
            trust_remote_code: run code of the towers' folders or repositories, where their files ask for it.

        Raises:
            ValueError: a tower that cannot be found, or that has no image processor or tokenizer.
        """
        image_processor = tokenizer = None
        if vision is not None:
            image_processor = _load_image_processor(vision, trust_remote_code=trust_remote_code)
            if image_size is not None:
                image_processor = with_image_size(image_processor, image_size)
        if text is not None:
            tokenizer = _load_tokenizer(text, trust_remote_code=trust_remote_code)
        return cls(image_processor, tokenizer, max_text_length=max_text_length)

    @classmethod
    def from_dual_encoder(
        cls, dual_encoder: str | os.PathLike[str], max_text_length: int | None = None, **hub: Any
    ) -> TVRNProcessor:
        """The processor of a dual encoder (CLIP, SigLIP, …): images and captions as its own makes them.

        Args:
            dual_encoder: Hub id or folder, which holds the image processor and the tokenizer.
            max_text_length: shorter than what the text side was trained with; None: just that.

        Raises:
            ValueError: it cannot be found, or has no image processor or tokenizer.
        """
        hub = {"trust_remote_code": False, **hub}
        text, kind = _text_side(dual_encoder, hub)
        image_processor = _load_image_processor(dual_encoder, **hub)
        tokenizer = _load_tokenizer(dual_encoder, **hub)
        longest = min(getattr(text, "max_position_embeddings", None) or 512, tokenizer.model_max_length)
        # SigLIP pools the last position, which has to be where it was in training.
        padding = "max_length" if str(text.model_type).startswith("siglip") else "longest"
        length = longest if max_text_length is None else max_text_length
        if padding == "max_length" and length != longest:
            raise ValueError(f"max_text_length={length}: this text side reads captions of exactly {longest} tokens")
        return cls(image_processor, tokenizer, min(length, longest), padding, kind)

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
        if reason != str(error).strip():
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


TVRNProcessor.register_for_auto_class("AutoProcessor")

"""Frozen teachers: any Hub model of images or of texts that gives one vector an item."""

import contextlib
import inspect
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # see processing_tvrn
from transformers.utils import cached_file

from ..pixels_tvrn import rgb_images
from ..storage.fingerprints import module_fingerprint, preprocessor_fingerprint, tokenizer_digest
from ..trust_tvrn import MODEL_CODE, PICTURE_CODE, TOKENIZER_CODE, explained, without_code
from .extraction import COMPUTE_DTYPES
from .vector_pooling import POOLINGS, ReadFile, choose_pooling, pool, prefix_tokens

logger = logging.getLogger(__name__)

MODALITIES = ("image", "text")
# Trained on captions padded to the full length, without a mask: padded shorter they give other vectors.
PADDED_TO_THE_FULL = ("siglip", "siglip2", "siglip_text_model", "siglip2_text_model")
_LARGEST_LENGTH = 100_000  # a tokenizer without a limit says 1e30


@dataclass(frozen=True)
class TextPreparation:
    """Turns texts into a text model's input.

    Attributes:
        max_length: tokens at which a text is cut.
        full_length: pad every text to `max_length`.
        lower_case: lower the text first.
    """

    tokenizer: Any
    max_length: int
    full_length: bool = False
    lower_case: bool = False

    def __call__(self, items: Sequence[str]) -> dict[str, Tensor]:
        """The model's input of some texts.

        Raises:
            ValueError: an item is no text, or an empty one.
        """
        for row, item in enumerate(items):
            if not isinstance(item, str) or not item.strip():
                raise ValueError(f"text {row} of the batch is {item!r}; expected a text with at least one word")
        texts = [text.lower() for text in items] if self.lower_case else list(items)
        padding = "max_length" if self.full_length else True
        settings = {"truncation": True, "max_length": self.max_length, "return_attention_mask": True}
        return dict(self.tokenizer(texts, padding=padding, return_tensors="pt", **settings))

    def fingerprint(self) -> dict[str, Any]:
        """Tokenizer and lengths."""
        return {
            "tokenizer_sha256": tokenizer_digest(self.tokenizer),
            "max_length": self.max_length,
            "padding": "max_length" if self.full_length else "longest",
            "lower_case": self.lower_case,
        }


@dataclass(frozen=True)
class ImagePreparation:
    """Turns photographs into a vision model's input."""

    image_processor: Any

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """The model's input of some pictures."""
        return dict(self.image_processor(images=rgb_images(items), return_tensors="pt"))

    def fingerprint(self) -> dict[str, Any]:
        """Every setting of the image processor."""
        return preprocessor_fingerprint(self.image_processor)


class Teacher:
    """A frozen network that says how alike two images, or two texts, are.

    A plain object and no module: as an attribute of a model in training it is found by no optimizer, no wrapper for
    several processes and no checkpoint.

    Attributes:
        model: the network, without gradient, in evaluation mode.
        prepare: turns photographs or texts into its input; holds no network, so worker processes can have it.
        modality: "image" or "text".
        pooling: how its output becomes one vector.
        name: where it came from, and `revision`, the commit on the Hub where there is one.
    """

    def __init__(
        self,
        model: Any,
        prepare: TextPreparation | ImagePreparation,
        modality: str,
        pooling: str,
        name: str = "",
        revision: str | None = None,
    ) -> None:
        if modality not in MODALITIES:
            raise ValueError(f"modality is {modality!r}, expected 'image' or 'text'")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}, expected one of {', '.join(POOLINGS)}")
        method = f"get_{modality}_features"
        if pooling == "features" and not hasattr(model, method):
            raise ValueError(f"pooling is 'features', but {type(model).__name__} has no {method}; use 'mean' or 'cls'")
        self.model = model.eval().requires_grad_(False)
        self.prepare = prepare
        self.modality = modality
        self.pooling = pooling
        self.name = name or type(model).__name__
        self.revision = revision
        self._run = getattr(model, method) if pooling == "features" else model
        self._accepted = set(inspect.signature(self._run if pooling == "features" else model.forward).parameters)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        modality: str,
        *,
        pooling: str | None = None,
        dtype: str = "float32",
        device: str | torch.device | None = None,
        max_length: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> "Teacher":
        """A teacher from the Hub or a folder.

        Args:
            name: Hub id or path of any model that `AutoModel` loads: DINOv2, DINOv3, CLIP, SigLIP, a CNN, …; for texts
                sentence-transformers models, BERT, the text side of CLIP or SigLIP, ….
            modality: "image" or "text".
            pooling: "features" (the model's own `get_image_features` or `get_text_features`), "pooler", "cls", "mean",
                "max" or "last"; None: what the model was trained for, from its files, methods and type.
            dtype: of weights and computation.
            device: where to compute (default: a GPU if there is one).
            max_length: tokens at which a text is cut; None: the model's own limit.
            revision: branch, tag or commit on the Hub.
            trust_remote_code: run code from the model's repository.

        Raises:
            ValueError: nothing loads there, weights are missing, or modality, pooling or dtype is unknown.
        """
        if modality not in MODALITIES:
            raise ValueError(f"modality is {modality!r}, expected 'image' or 'text'")
        if dtype not in COMPUTE_DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(COMPUTE_DTYPES)}")
        where = {"revision": revision, "trust_remote_code": bool(trust_remote_code)}
        name = os.fspath(name)
        model, missing = _load_model(name, dtype, where)
        read_file = partial(_small_file, name, revision)
        pooling = pooling or choose_pooling(model, modality, read_file)
        _check_complete(name, model, missing, pooling)
        prepare = _preparation(name, modality, model.config, read_file, max_length, where)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        commit = getattr(model.config, "_commit_hash", None)
        return cls(model, prepare, modality, pooling, name, commit)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @torch.no_grad()  # not inference_mode: a live teacher's vectors take part in the student's loss
    def embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Vectors (n, D) in float32 of what `prepare` made, on the network's device."""
        moved = {
            key: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
            if key in self._accepted
        }
        # The ambient autocast belongs to the student.
        with torch.autocast(self.device.type, enabled=False):
            output = self._run(**moved)
        if self.pooling == "features":  # an output since transformers 5, a tensor before
            return (output if isinstance(output, Tensor) else output.pooler_output).float()
        mask, prefix = moved.get("attention_mask"), 0
        if self.modality == "image":
            states = getattr(output, "last_hidden_state", None)
            mask = None
            if states is not None and states.ndim == 3:
                prefix = prefix_tokens(states.shape[1], inputs["pixel_values"], self.model.config)
        return pool(output, self.pooling, mask, prefix).float()

    def __call__(self, items: Sequence[Any], batch_size: int = 64) -> Tensor:
        """Vectors (n, D) float32 of photographs (PIL) or texts; texts of nearly equal length share a batch."""
        order = list(range(len(items)))
        if self.modality == "text":
            order.sort(key=lambda row: len(items[row]))
        parts = [
            self.embed(self.prepare([items[row] for row in order[start : start + batch_size]]))
            for start in range(0, len(items), batch_size)
        ]
        if not parts:
            raise ValueError(f"no {self.modality} to embed: got an empty list")
        vectors = torch.cat(parts)
        return torch.empty_like(vectors).index_copy_(0, torch.tensor(order, device=vectors.device), vectors)

    def fingerprint(self) -> dict[str, Any]:
        """What its vectors depend on, apart from the items: weights, preprocessing, pooling, precision."""
        return {
            "teacher": {"modality": self.modality, **module_fingerprint(self.model)},
            "preprocessing": self.prepare.fingerprint(),
            "pooling": self.pooling,
            "compute_dtype": str(self.dtype).removeprefix("torch."),
        }

    def __repr__(self) -> str:
        return f"Teacher({self.name!r}, modality={self.modality!r}, pooling={self.pooling!r})"


def _small_file(name: str, revision: str | None, file: str) -> str | None:
    """A file of a model's folder or Hub repository; None where there is none."""
    if os.path.isdir(name):
        path = Path(name) / file
        return path.read_text(encoding="utf-8") if path.is_file() else None
    found = cached_file(
        name, file, revision=revision, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return None if found is None else Path(found).read_text(encoding="utf-8")


def _load_model(name: str, dtype: str, where: dict[str, Any]) -> tuple[Any, list[str]]:
    """The network and the names of weights that its checkpoint lacks."""
    try:
        config = AutoConfig.from_pretrained(name, **where)
        config = config if where["trust_remote_code"] else without_code(config)
        model, info = AutoModel.from_pretrained(
            name, config=config, dtype=getattr(torch, dtype), output_loading_info=True, **where
        )
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"no teacher at {name!r}: {explained(error, name, MODEL_CODE, **where)} Expected a Hub model id or a "
            "folder with config.json and weights."
        ) from error
    return model, sorted(map(str, info["missing_keys"]))


@torch.no_grad()
def _check_complete(name: str, model: Any, missing: list[str], pooling: str) -> None:
    """Refuse random weights; a pooler that nobody asks for is set to zero, so that the fingerprint is always one."""
    needed = [key for key in missing if pooling == "pooler" or "pooler" not in key]
    if needed:
        raise ValueError(
            f"the checkpoint of {name!r} lacks {len(needed)} weights, the first is {needed[0]!r}: a teacher with "
            "random weights teaches noise. Take another checkpoint"
            + (", or pooling='mean' or 'cls', which need no pooler." if pooling == "pooler" else ".")
        )
    for key in missing:
        with contextlib.suppress(AttributeError):  # a buffer
            model.get_parameter(key).zero_()


def _part(auto_class: Any, name: str, code: Mapping[str, tuple[str, ...]], where: dict[str, Any]) -> Any:
    """The teacher's image processor or tokenizer."""
    try:
        return auto_class.from_pretrained(name, **where)
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"no teacher at {name!r}: {explained(error, name, code, **where)}") from error


def _preparation(
    name: str, modality: str, config: Any, read_file: ReadFile, max_length: int | None, where: dict[str, Any]
) -> TextPreparation | ImagePreparation:
    if modality == "image":
        return ImagePreparation(_part(AutoImageProcessor, name, PICTURE_CODE, where))
    tokenizer = _part(AutoTokenizer, name, TOKENIZER_CODE, where)
    tokenizer.padding_side = "right"
    settings = json.loads(read_file("sentence_bert_config.json") or "{}")
    text_config = getattr(config, "text_config", None) or config
    limits = [
        settings.get("max_seq_length"),
        tokenizer.model_max_length,
        getattr(text_config, "max_position_embeddings", None),
    ]
    own = min((limit for limit in limits if limit and limit < _LARGEST_LENGTH), default=512)
    if max_length is not None and not 1 <= max_length <= own:
        raise ValueError(f"max_length is {max_length}, expected 1 to {own}, the limit of {name!r}")
    return TextPreparation(
        tokenizer,
        max_length or own,
        full_length=config.model_type in PADDED_TO_THE_FULL,
        lower_case=bool(settings.get("do_lower_case", False)),
    )

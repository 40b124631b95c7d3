"""Which model an index was built with: weights, the settings that scores depend on, pixels and words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..scoring.finished import ranking_digest
from ..storage.fingerprints import (
    StaleStoreError,
    check_fingerprint,
    digest,
    preprocessor_fingerprint,
    settings_fingerprint,
)

# Settings of training, of speed, or of where a tower came from: scores do not depend on them.
_UNRELATED = (
    "loss",
    "dropout",
    "init",
    "margin",
    "freeze",
    "chunk",
    "smoothing",
    "matching_temperature",
    "distillation_temperature",
)


class OtherModelError(ValueError):
    """An index was built with another model than the one that is to search it."""


def index_fingerprint(model: Any, processor: Any) -> dict[str, Any]:
    """What an index depends on, as nested JSON values that can be compared field by field."""
    settings = settings_fingerprint(model.config.to_dict())
    plain = {k: v for k, v in settings.items() if not isinstance(v, dict | list)}
    found: dict[str, Any] = {
        "weights_sha256": ranking_digest(model),
        "config": {k: v for k, v in plain.items() if not any(part in k for part in _UNRELATED)},
    }
    if getattr(processor, "image_processor", None) is not None:
        found["pixels"] = preprocessor_fingerprint(processor)
    if getattr(processor, "tokenizer", None) is not None:
        found["words"] = {
            "vocabulary_sha256": digest(processor.tokenizer.get_vocab()),
            "max_text_length": processor.max_text_length,
        }
    return found


def check_model(stored: Mapping[str, Any], model: Any, processor: Any, where: str) -> None:
    """Refuse another model than the index's.

    Raises:
        OtherModelError: Naming every field that differs, with both values.
    """
    expected = index_fingerprint(model, processor)
    # A setting that another release added or dropped says nothing: the weights tell whether the model is the same.
    common = stored["config"].keys() & expected["config"].keys()
    stored, expected = (
        {**each, "config": {name: each["config"][name] for name in common}} for each in (stored, expected)
    )
    try:
        check_fingerprint(stored, expected, where)
    except StaleStoreError as error:
        differing = "\n".join(str(error).splitlines()[1:-1])
        raise OtherModelError(
            f"the index in {where} was built with another model:\n{differing}\n"
            "Open it with the model it was built with, or build it again with this one"
        ) from error

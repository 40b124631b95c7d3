"""Which model an index was built with: weights, the settings that scores depend on, pixels and words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..storage.fingerprints import (
    StaleStoreError,
    check_fingerprint,
    module_fingerprint,
    preprocessor_fingerprint,
    tokenizer_digest,
)


class OtherModelError(ValueError):
    """An index was built with another model than the one that is to search it."""


def index_fingerprint(model: Any, processor: Any) -> dict[str, Any]:
    """What an index depends on, as nested JSON values that can be compared field by field."""
    found = module_fingerprint(model, defaults=True)
    if getattr(processor, "image_processor", None) is not None:
        found["pixels"] = preprocessor_fingerprint(processor)
    if getattr(processor, "tokenizer", None) is not None:
        found["words"] = {
            "tokenizer_sha256": tokenizer_digest(processor.tokenizer),
            "max_text_length": processor.max_text_length,
        }
    return found


def check_model(stored: Mapping[str, Any], model: Any, processor: Any, where: str) -> None:
    """Refuse another model than the index's.

    Raises:
        OtherModelError: Naming every field that differs, with both values.
    """
    try:
        # A setting that another release added or dropped says nothing: the weights tell whether the model is the same.
        check_fingerprint(stored, index_fingerprint(model, processor), where, shared="config.")
    except StaleStoreError as error:
        differing = "\n".join(str(error).splitlines()[1:-1])
        raise OtherModelError(
            f"the index in {where} was built with another model:\n{differing}\n"
            "Open it with the model it was built with, or build it again with this one"
        ) from error

"""What a stored array was made from, in a form that can be compared field by field."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

ItemId = int | str

# Settings of training, or of speed: what a network computes from its weights does not depend on them.
# Words of such names, and such names.
_OF_TRAINING = {
    *("dropout", "pdrop", "layerdrop", "drop", "loss", "init", "initializer", "freeze", "smoothing", "checkpoint"),
}
_OF_TRAINING_WHOLE = {
    *("margin", "matching_temperature", "distillation_temperature", "pair_chunk_size", "chunk_size_feed_forward"),
    *("output_attentions", "output_hidden_states", "return_dict", "use_cache", "gradient_checkpointing"),
}
# Fields that say where an object came from or how it is displayed, not what it computes.
_VOLATILE = {
    *("_name_or_path", "_processor_class", "architectures", "auto_map", "device", "dtype", "feature_extractor_type"),
    *(
        "id2label",
        "label2id",
        "name_or_path",
        "problem_type",
        "processor_class",
        "torch_dtype",
        "transformers_version",
    ),
}


CALIBRATION = "calibration_"  # what the names of weights begin with that make probabilities of logits


class StaleStoreError(ValueError):
    """A store was made from something else than what is asked for."""


def plain_id(item_id: Any) -> ItemId:
    """An id as a plain `int` or `str`.

    Raises:
        ValueError: If it is neither (a `bool` or a float is no id).
    """
    if isinstance(item_id, (torch.Tensor, np.ndarray)) and item_id.ndim == 0:
        item_id = item_id.item()
    if isinstance(item_id, np.integer):
        return int(item_id)
    if isinstance(item_id, (int, str)) and not isinstance(item_id, bool):
        return str(item_id) if isinstance(item_id, str) else item_id
    raise ValueError(f"the id {item_id!r} is a {type(item_id).__name__}, expected an int or a str")


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def ids_digest(ids: Iterable[ItemId]) -> str:
    """SHA-256 of ids in order; `5` and `"5"` are different ids."""
    total = hashlib.sha256()
    for item_id in ids:
        total.update(json.dumps(plain_id(item_id)).encode() + b"\n")
    return total.hexdigest()


def items_fingerprint(ids: Iterable[ItemId]) -> dict[str, Any]:
    """Number of items and the hash of their ids in order."""
    ids = list(ids)
    return {"items": len(ids), "ids_sha256": ids_digest(ids)}


def weights_digest(module: nn.Module, without: tuple[str, ...] = ()) -> str:
    """SHA-256 of a module's names, shapes and values.

    Floating values are read as float32, so that the same checkpoint loaded in half or in full precision is the same.

    Args:
        without: What the names of weights that do not count begin with.

    Raises:
        ValueError: If a weight is on the meta device and so has no value.
    """
    total = hashlib.sha256()
    for name, value in _plain_tensors(sorted(module.state_dict().items())):
        if name.startswith(without):
            continue
        if value.is_meta:
            raise ValueError(f"the weight {name!r} has no value (it is on the meta device): load the weights first")
        value = value.detach().to("cpu")
        if value.is_floating_point():
            value = value.to(torch.float32)
        total.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        total.update(value.contiguous().numpy().tobytes())
    return total.hexdigest()


def _plain_tensors(values: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by name; those that are made of others, as torchao's of codes and scales, taken apart."""
    for name, value in values:
        if hasattr(value, "__tensor_flatten__"):
            parts, _ = value.__tensor_flatten__()
            yield from _plain_tensors((f"{name}.{part}", getattr(value, part)) for part in sorted(parts))
        else:
            yield name, value


def module_fingerprint(module: nn.Module, without: tuple[str, ...] = (), defaults: bool = False) -> dict[str, Any]:
    """What decides the outputs of a network that is not in training: class, weights and, of transformers, settings.

    Settings of training, such as dropout and the weights of losses, are left out, and so is a model's calibration,
    which changes no logit: models that score alike have one fingerprint.

    Args:
        module: The network.
        without: What the names of other weights that do not count begin with.
        defaults: Name settings at their defaults too. Without them a newer transformers that adds a field leaves old
            stores valid.
    """
    weights = weights_digest(module, (CALIBRATION, *without))
    found: dict[str, Any] = {"class": type(module).__name__, "weights_sha256": weights}
    config = getattr(module, "config", None)
    if config is not None:
        to_dict = config.to_dict if defaults else getattr(config, "to_diff_dict", None) or config.to_dict
        found["config"] = _without_training(settings_fingerprint(to_dict()))
    return found


def _without_training(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that count, of the configurations inside (those of towers) as well."""
    return {
        name: _without_training(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name not in _OF_TRAINING_WHOLE | _VOLATILE and not _OF_TRAINING & set(name.split("_"))
    }


def preprocessor_fingerprint(processor: Any) -> dict[str, Any]:
    """Settings of an image processor, alone or inside a processor.

    Raises:
        ValueError: If it has no `to_dict` to read its settings from.
    """
    part = getattr(processor, "image_processor", None) or processor
    if not hasattr(part, "to_dict"):
        raise ValueError(
            f"the settings of a {type(part).__name__} cannot be read: expected a processor or image processor of "
            "transformers (with to_dict), or pass fingerprint= yourself"
        )
    settings = settings_fingerprint(part.to_dict())
    # The same processor under its three backends' names: Pil, Fast, and the plain one.
    name = str(settings.pop("image_processor_type", type(part).__name__))
    return {"class": name.removesuffix("Pil").removesuffix("Fast")} | settings


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of what decides how a tokenizer of transformers cuts a text into tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: Any = sorted(tokenizer.get_vocab().items())
    else:
        # How it pads and cuts is set anew at every call.
        state = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def settings_fingerprint(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as plain JSON values, without the fields that change nothing and those that are unset."""
    kept = {str(name): value for name, value in settings.items() if name not in _VOLATILE and value is not None}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=_as_json, sort_keys=True))
    return plain


def _as_json(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return settings_fingerprint(value.to_dict())
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "__dict__") and not callable(value):
        return vars(value)
    return str(value)


def check_fingerprint(
    stored: Mapping[str, Any], expected: Mapping[str, Any], directory: str | os.PathLike, shared: str | None = None
) -> None:
    """Refuse a store made from something else; only the sections that `expected` names are compared.

    Fields whose names begin with `shared` are compared where both have them.

    Raises:
        StaleStoreError: Naming every field that differs, with both values.
    """
    stored_fields = dict(_flat({name: stored[name] for name in expected if name in stored}))
    expected_fields = dict(_flat(json.loads(json.dumps(dict(expected)))))
    lines = [
        f"  {name}: stored {stored_fields.get(name, 'nothing')!r}, expected {expected_fields.get(name, 'nothing')!r}"
        for name in sorted(stored_fields.keys() | expected_fields.keys())
        if stored_fields.get(name) != expected_fields.get(name)
        and not (shared and name.startswith(shared) and (name not in stored_fields or name not in expected_fields))
    ]
    if lines:
        raise StaleStoreError(
            f"the store in {os.fspath(directory)!r} was made from something else:\n" + "\n".join(lines) + "\n"
            "Build it again with overwrite=True (--overwrite) or by deleting that folder, or build another in a "
            "folder of its own"
        )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value

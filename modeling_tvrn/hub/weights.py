"""A checkpoint's tensors against its config: every weight there, of one precision, finite, and none too many."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..configuration_tvrn import TVRNConfig
from ..modeling_tvrn import TVRNModel
from .files import INDEX, read_json, weight_files
from .report import Check

__all__ = ["check_same_weights", "check_weights"]

SHOWN_NAMES = 5
RETRAIN = "save the model again; a config changed after training does not fit its weights any more"


def check_weights(folder: Path) -> list[Check]:
    """Keys and shapes, precision, and values of the stored tensors; one shard's tensor in memory at a time."""
    names = ("keys", "dtype", "values")
    try:
        config = TVRNConfig.from_pretrained(folder)
        expected = _expected(config)
        found, dtypes, broken = {}, {}, []
        for name, tensor in stored_tensors(folder):
            found[name] = tuple(tensor.shape)
            dtypes[name] = tensor.dtype
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                broken.append(name)
    except (OSError, ValueError, SafetensorError) as error:
        return [Check(names[0], "failed", f"cannot be read: {error}", RETRAIN)] + [
            Check(name, "not run", "needs readable weights") for name in names[1:]
        ]
    values = (
        Check("values", "failed", f"NaN or infinite values in {_some(broken)}", "find the last good checkpoint")
        if broken
        else Check("values", "ok", "all finite")
    )
    return [_check_keys(expected, found, folder), _check_dtype(dtypes, config), values]


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all shards, one after the other."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                yield name, file.get_tensor(name)


def _expected(config: Any) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes of all weights and buffers that the config asks for, and which of them may be left out as tied."""
    with torch.device("meta"):
        model = TVRNModel(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, tied


def _check_keys(expected: tuple[dict[str, tuple[int, ...]], set[str]], found: dict[str, Any], folder: Path) -> Check:
    shapes, tied = expected
    problems = []
    missing = sorted(set(shapes) - set(found) - tied)
    extra = sorted(set(found) - set(shapes))
    misshapen = sorted(name for name in set(shapes) & set(found) if shapes[name] != found[name])
    unindexed = sorted(set(found) ^ set(read_json(folder / INDEX).get("weight_map", found)))
    for what, names in (("missing", missing), ("unexpected", extra), ("of another shape", misshapen)):
        if names:
            problems.append(f"{what}: {_some(names)}")
    if unindexed:
        problems.append(f"index and shards disagree on {_some(unindexed)}")
    if problems:
        return Check("keys", "failed", "; ".join(problems), RETRAIN)
    tied_text = f", {len(tied)} of them tied" if tied else ", none tied"
    return Check("keys", "ok", f"{len(found)} tensors, as the config asks for{tied_text}")


def _check_dtype(dtypes: dict[str, torch.dtype], config: Any) -> Check:
    seen = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values() if dtype.is_floating_point})
    declared = str(config.dtype).removeprefix("torch.")
    if seen == [declared]:
        return Check("dtype", "ok", f"{declared} in weights and config")
    advice = "cast the whole model (model.to(torch.bfloat16) or model.float()) before saving it"
    if len(seen) > 1:
        return Check("dtype", "failed", f"weights mix {' and '.join(seen)}; it loads as {declared}", advice)
    return Check("dtype", "failed", f"weights are {seen[0]}, config.json says {declared}", advice)


def check_same_weights(folder: Path, model: Any) -> Check:
    """The file holds the model's values, bit for bit, buffers included."""
    own = model.state_dict()
    saved = dict(stored_tensors(folder))
    differ = [name for name, tensor in saved.items() if not _identical(tensor, own.get(name))]
    if differ:
        return Check("saved weights", "failed", f"differ from the model in memory: {_some(differ)}", RETRAIN)
    return Check("saved weights", "ok", "those of the model in memory, bit for bit")


def _identical(saved: Tensor, own: Tensor | None) -> bool:
    return own is not None and saved.dtype == own.dtype and torch.equal(saved, own.detach().cpu())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more

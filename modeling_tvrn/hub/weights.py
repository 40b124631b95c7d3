"""A checkpoint's tensors: readable, of one precision, finite, and those of the model that was saved."""

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
RESAVE = "save the model again (model.save_pretrained), or fetch the folder again: it may have been cut short"


def check_weights(folder: Path) -> list[Check]:
    """The files can be read and go together, their precision, and their values; one tensor in memory at a time.

    Whether the tensors are those that the config asks for shows when the model is loaded: transformers stores some
    towers under older names.
    """
    try:
        declared = str(TVRNConfig.from_pretrained(folder).dtype).removeprefix("torch.")
        names, dtypes, broken = [], set(), []
        for name, tensor in stored_tensors(folder):
            names.append(name)
            if tensor.is_floating_point():
                dtypes.add(str(tensor.dtype).removeprefix("torch."))
                if not torch.isfinite(tensor).all():
                    broken.append(name)
    except (OSError, ValueError, SafetensorError) as error:
        failed = Check("weights", "failed", f"cannot be read: {error}", RESAVE)
        return [failed] + [Check(name, "not run", "needs readable weights") for name in ("dtype", "values")]
    values = (
        Check("values", "failed", f"NaN or infinite values in {_some(broken)}", "find the last good checkpoint")
        if broken
        else Check("values", "ok", "all finite")
    )
    return [_check_index(names, folder), _check_dtype(sorted(dtypes), declared), values]


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all shards, one after the other."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                yield name, file.get_tensor(name)


def _check_index(names: list[str], folder: Path) -> Check:
    """Shards and their index name the same tensors."""
    files = weight_files(folder)
    differ = sorted(set(names) ^ set(read_json(folder / INDEX).get("weight_map", names)))
    if differ:
        return Check("weights", "failed", f"index and shards disagree on {_some(differ)}", RESAVE)
    return Check("weights", "ok", f"{len(names)} tensors in {len(files)} file{'s' * (len(files) > 1)}")


def _check_dtype(seen: list[str], declared: str) -> Check:
    if seen == [declared]:
        return Check("dtype", "ok", f"{declared} in weights and config")
    advice = "cast the whole model (model.to(torch.bfloat16) or model.float()) before saving it"
    if len(seen) > 1:
        return Check("dtype", "failed", f"weights mix {' and '.join(seen)}; it loads as {declared}", advice)
    return Check("dtype", "failed", f"weights are {' '.join(seen)}, config.json says {declared}", advice)


def check_same_weights(folder: Path, model: Any) -> Check:
    """What is loaded from the folder has the model's values, bit for bit, saved buffers included."""
    try:
        saved = TVRNModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True).state_dict()
    except (OSError, ValueError) as error:
        return Check("saved weights", "failed", f"do not load: {error}", RESAVE)
    own = model.state_dict()
    differ = sorted(name for name in {*saved, *own} if not _identical(saved.get(name), own.get(name)))
    if differ:
        return Check("saved weights", "failed", f"differ from the model in memory: {_some(differ)}", RESAVE)
    return Check("saved weights", "ok", "those of the model in memory, bit for bit")


def _identical(saved: Tensor | None, own: Tensor | None) -> bool:
    if saved is None or own is None or saved.dtype != own.dtype or saved.shape != own.shape:
        return False
    one, other = saved.detach().cpu().contiguous(), own.detach().cpu().contiguous()
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))  # NaN is NaN


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more

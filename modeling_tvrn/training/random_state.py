"""The state of every random generator that training draws from, as bytes that a checkpoint can hold."""

from __future__ import annotations

import json
import random

import numpy as np
import torch
from torch import Tensor

__all__ = ["get_random_state", "set_random_state"]


def get_random_state(device: torch.device) -> Tensor:
    """Python's, NumPy's, torch's and the device's generators of this process: uint8 (n,)."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "device": torch.cuda.get_rng_state(device).tolist() if device.type == "cuda" else None,
    }
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def set_random_state(stored: Tensor, device: torch.device) -> None:
    """Take up what `get_random_state` gave; a state of another kind of device sets the rest."""
    state = json.loads(bytes(stored.tolist()).decode())
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["device"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(state["device"], dtype=torch.uint8), device)

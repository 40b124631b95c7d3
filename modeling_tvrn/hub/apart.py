"""Clean processes that load a checkpoint, with this package and without it, on inputs that are always the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import HF_MODULES_CACHE

from . import probe

__all__ = ["Outcome", "load_apart", "write_inputs"]

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
IMAGE_SIZES = ((61, 45), (45, 61), (53, 53))  # (width, height): none a multiple of a patch
REGION_COUNTS = (4, 2, 5)
CAPTIONS = ["A dog runs through the snow.", "Two children, one red ball!"]
VOCABULARY_CAPTIONS = 3  # of the tokenizer's own words: to a small vocabulary those above are all unknown
WORDS_OF_A_CAPTION = 4
LAST_LINES = 3


@dataclass
class Outcome:
    """What one process reported.

    Attributes:
        facts: of `probe.py`, by step; a step that failed has an "error".
        logits: (images, captions), None where it got no further.
        error: why there are no facts at all.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    logits: np.ndarray | None = None
    error: str = ""


def write_inputs(folder: Path, feature_size: int, tokenizer: Any = None) -> None:
    """Three pictures, three sets of regions and five captions, the same for every checkpoint of that vocabulary.

    Args:
        folder: gets inputs.npz and captions.json.
        feature_size: of a region feature.
        tokenizer: whose words make further captions.
    """
    random = np.random.default_rng(20)
    arrays: dict[str, Any] = {}
    for i, (width, height) in enumerate(IMAGE_SIZES):
        coarse = random.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
        arrays[f"picture{i}"] = np.kron(coarse, np.ones((6, 6, 1), dtype=np.uint8))
    for i, count in enumerate(REGION_COUNTS):
        corners = np.sort(random.uniform(size=(count, 2, 2)), axis=1)
        arrays[f"features{i}"] = random.normal(size=(count, feature_size)).astype(np.float32)
        arrays[f"boxes{i}"] = corners.reshape(count, 4).astype(np.float32)
    np.savez(folder / "inputs.npz", **arrays)
    captions = CAPTIONS + _vocabulary_captions(tokenizer)
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")


def _vocabulary_captions(tokenizer: Any) -> list[str]:
    if tokenizer is None:
        return []
    special = set(tokenizer.all_special_tokens)
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and word not in special)
    if not words:
        return []
    random = np.random.default_rng(21)
    return [
        " ".join(words[i] for i in random.integers(0, len(words), WORDS_OF_A_CAPTION + extra))
        for extra in range(VOCABULARY_CAPTIONS)
    ]


def load_apart(checkpoint: Path, workplace: Path, trust_remote_code: bool, timeout: float) -> Mapping[str, Outcome]:
    """Load the checkpoint with the package and, where its code may run, without it; both processes at once.

    Args:
        checkpoint: the folder.
        workplace: an empty folder with the files of `write_inputs`.
        trust_remote_code: whether the checkpoint's own code may run; without it there is no "without".
        timeout: seconds for each process.

    Returns:
        "with" and perhaps "without" → what was found.
    """
    packages = {"with": str(PACKAGE_ROOT)} | ({"without": None} if trust_remote_code else {})
    started = {name: _start(checkpoint, workplace, name, package) for name, package in packages.items()}
    try:
        return {name: _finish(process, workplace / name, timeout) for name, process in started.items()}
    finally:
        for process in started.values():
            if process.poll() is None:
                process.kill()
                process.wait()


def _start(checkpoint: Path, workplace: Path, name: str, package: str | None) -> subprocess.Popen[str]:
    job = workplace / name
    (job / "cwd").mkdir(parents=True)
    for file in ("inputs.npz", "captions.json"):
        os.link(workplace / file, job / file)
    # Where this process finds its libraries. Not where transformers copied checkpoints' code for it: that folder is a
    # package as well, and would hide the new process's own.
    search = [path for path in sys.path if path and path != HF_MODULES_CACHE]
    settings = {"checkpoint": str(checkpoint.resolve()), "package": package, "sys_path": search}
    (job / "job.json").write_text(json.dumps(settings), encoding="utf-8")
    # Isolated (-I): no PYTHONPATH, no folder of the script. No token, no network, no caches of the user.
    dropped = ("PYTHON", "HF_", "HUGGING", "TRANSFORMERS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)} | {
        "HF_HOME": str(job / "hf"),
        "HF_MODULES_CACHE": str(job / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # sums in the same order
    }
    with (job / "messages.txt").open("w", encoding="utf-8") as messages:
        return subprocess.Popen(
            [sys.executable, "-I", probe.__file__, str(job)],
            cwd=job / "cwd",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=messages,
            text=True,
        )


def _finish(process: subprocess.Popen[str], job: Path, timeout: float) -> Outcome:
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return Outcome(error=f"not finished within {timeout:g} seconds")
    if code or not (job / "result.json").is_file():
        lines = (job / "messages.txt").read_text("utf-8", errors="replace").strip().splitlines()
        return Outcome(error=f"the process ended with code {code}: {' / '.join(lines[-LAST_LINES:])}")
    facts = json.loads((job / "result.json").read_text("utf-8"))
    logits = job / "logits.npy"
    return Outcome(facts, np.load(logits, allow_pickle=False) if logits.is_file() else None)

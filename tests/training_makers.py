"""Tiny data, configurations and processes for tests of training."""

import json
import multiprocessing
import os
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from data_makers import captions, write_row_groups

from modeling_tvrn.training import TrainingConfig

WORDS = ("red", "green", "blue", "circle", "square", "star", "left", "right")
SCAN_SPLITS = {"train": 14, "dev": 6}
SIZES = {"hidden_size": 10, "projection_size": 7, "similarity_size": 6, "word_embedding_size": 9}
TINY_BERT = {
    "model_type": "bert", "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 19,
    "max_position_embeddings": 24,
}  # fmt: skip
TINY_VIT = {
    "model_type": "vit", "image_size": 16, "patch_size": 8, "hidden_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 19,
}  # fmt: skip


def write_scan(
    folder: Path, splits: Mapping[str, int] = SCAN_SPLITS, captions_per_image: int = 2, size: int = 5
) -> Path:
    """SCAN's files with random regions, captions that differ, boxes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        low = rng.uniform(0, 0.5, size=(count, 3, 2))
        np.save(folder / f"{split}_ims.npy", rng.normal(size=(count, 3, size)).astype(np.float32))
        np.save(folder / f"{split}_boxes.npy", np.concatenate([low, low + 0.4], axis=2).astype(np.float32))
        captions = [
            " ".join([*rng.choice(WORDS, size=rng.integers(1, 5)), f"n{number % 5}"])
            for number in range(count * captions_per_image)
        ]
        (folder / f"{split}_caps.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    return folder


def write_images(folder: Path) -> Path:
    """Parquet files in row groups: 17 pictures to train on in two of them, 5 to validate on."""
    write_row_groups(folder / "train-0.parquet", range(8), group=3)
    write_row_groups(folder / "train-1.parquet", range(8, 17), group=3)
    write_row_groups(folder / "validation-0.parquet", range(17, 22), group=3)
    return folder


def save_text_tower(folder: Path) -> Path:
    """A tiny BERT that knows the words of those pictures' captions."""
    from transformers import BertConfig, BertModel

    from modeling_tvrn import TVRNProcessor

    tokenizer = TVRNProcessor.from_captions(text for number in range(22) for text in captions(number)).tokenizer
    tokenizer.save_pretrained(folder)
    fields = {name: value for name, value in TINY_BERT.items() if name != "model_type"}
    BertModel(BertConfig(**fields, vocab_size=len(tokenizer))).save_pretrained(folder)
    return folder


def tiny_config(data: Path, output: Path, **keys: Any) -> TrainingConfig:
    """A run of some seconds' fractions; keywords replace keys, those of the model too."""
    model = {**SIZES, **keys.pop("model", {})}
    base: dict[str, Any] = {
        "data": str(data), "data_options": {"captions_per_image": 2}, "output_dir": str(output), "cpu": True,
        "epochs": None if "phases" in keys else 2, "batch_size": 8, "learning_rate": 3e-3, "logging_steps": 2,
    }  # fmt: skip
    return TrainingConfig.from_mapping({**base, **keys, "model": model})


class Processes:
    """Functions in forked processes, which need not import everything again; they may form a gloo group.

    A process that raises leaves its traceback in a file beside the result.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = multiprocessing.get_context("fork")

    def start(self, function: Callable[..., Any], *arguments: Any, count: int = 1) -> list[Any]:
        """`function(*arguments)` in `count` processes that torch.distributed's variables join."""
        port = _free_port()
        started = []
        for rank in range(count):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            target = self.context.Process(
                target=_enter, args=(self.folder, rank, environment if count > 1 else {}, function, arguments)
            )
            target.start()
            started.append(target)
        return started

    def finish(self, started: list[Any], timeout: float = 300.0) -> list[int | None]:
        """The exit codes; once one has failed the others, which would wait for it, are killed."""
        codes: list[int | None] = [None] * len(started)
        end = time.monotonic() + timeout
        while None in codes:
            for rank, process in enumerate(started):
                process.join(0.02)
                codes[rank] = process.exitcode
            if any(codes) or time.monotonic() > end:
                break
        for rank, process in enumerate(started):
            process.kill()
            process.join()
            codes[rank] = process.exitcode if codes[rank] is None else codes[rank]
        return codes

    def run(self, function: Callable[..., Any], *arguments: Any, count: int = 1) -> list[Any]:
        """What the function returned (JSON values) in each process; fails with the traceback of one that did not."""
        for path in self.folder.glob("process-*"):
            path.unlink()
        codes = self.finish(self.start(function, *arguments, count=count))
        errors = [path.read_text() for path in sorted(self.folder.glob("process-*.error"))]
        assert codes == [0] * count, (codes, *errors)
        return [json.loads((self.folder / f"process-{rank}.json").read_text()) for rank in range(count)]


def _enter(folder: Path, rank: int, environment: dict[str, Any], function: Callable[..., Any], arguments: Any) -> None:
    import torch
    from accelerate.state import AcceleratorState, GradientState

    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    # accelerate knows only the old name of an argument that torch has renamed (broadcast_buffers); no error here.
    warnings.filterwarnings("default", module=r"(accelerate|torch)\.")
    AcceleratorState._reset_state(True)  # of the parent
    GradientState._reset_state()
    code = 1
    try:
        result = function(*arguments)
        (folder / f"process-{rank}.json").write_text(json.dumps(result))
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        (folder / f"process-{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)  # without pytest's own leaving


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def killed_at_call(number: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wraps functions so that this process is killed, by -9, instead of the number-th call of any of them."""
    left = [number]

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    return watched

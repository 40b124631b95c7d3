"""Does a run that streams pictures grow? Resident memory over many steps of the whole training loop.

    python examples/benchmarks/stream_memory.py --steps 20000
    python examples/benchmarks/stream_memory.py --steps 20000 --workers 2

Pictures of its own (JPEG of noise, 200 to a shard) are streamed, decoded, collated and trained on by a model so small
that an hour's worth of steps takes minutes; checkpoints and logs are written as in any run. There is nothing to learn:
all steps but the last ten train the embeddings alone, whose scores nobody watches. Memory is that of the main process
and of its workers (Linux), sampled every so many steps; the slope is that of a straight line through the second half
of the samples, in MB an hour if an hour has 10,000 steps. SIGTERM ends the run early, with its result.
"""

import argparse
import contextlib
import io
import logging
import os
import resource
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import torch
from origin import say_origin
from transformers import BertConfig, BertModel

from modeling_tvrn import TVRNProcessor
from modeling_tvrn.training import TrainingConfig
from modeling_tvrn.training.loop import Training

SIDE = 48
WORDS = ("red", "green", "blue", "dog", "cat", "bird", "left", "right", "runs", "sleeps")
STEPS_AN_HOUR = 10_000


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8, help="captions a batch")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=40)
    return parser.parse_args()


def write_data(folder: Path, images: int) -> None:
    """Shards of pictures with five captions each, a tokenizer and a text tower."""
    rng = np.random.default_rng(0)
    for split, count in (("train", images), ("validation", 8)):
        for shard, start in enumerate(range(0, count, 200)):
            numbers = range(start, min(start + 200, count))
            columns = {
                "image": [{"bytes": picture(rng), "path": None} for _ in numbers],
                "caption": [[" ".join(rng.choice(WORDS, 6)) for _ in range(5)] for _ in numbers],
                "img_id": list(numbers),
            }
            pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{split}-{shard:05d}.parquet")
    tokenizer = TVRNProcessor.from_captions([" ".join(WORDS)]).tokenizer
    tokenizer.save_pretrained(folder / "text")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "text")


def picture(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def configuration(folder: Path, arguments: argparse.Namespace) -> TrainingConfig:
    vision = {
        "model_type": "vit", "image_size": 32, "patch_size": 16, "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 8,
    }  # fmt: skip
    sizes = {"hidden_size": 8, "projection_size": 8, "similarity_size": 8}
    model = {**sizes, "vision_config": vision, "use_late_interaction": False}
    return TrainingConfig.from_mapping(
        {
            "data": str(folder), "streaming": True, "phases": [
                {"train": "embeddings", "steps": arguments.steps - 10}, {"train": "all", "steps": 10},
            ], "batch_size": arguments.batch_size,
            "text": str(folder / "text"), "image_size": 32, "num_workers": arguments.workers, "model": model,
            "output_dir": str(folder / "run"), "cpu": True, "save_steps": max(arguments.steps // 5, 1),
            "evaluation_steps": arguments.steps, "logging_steps": 100, "learning_rate": 1e-9,
            "stream_rows_at_once": 200,
        }
    )  # fmt: skip


def resident() -> float:
    """Resident memory of this process and its children in MB (Linux); elsewhere its own peak."""
    own = Path("/proc/self/statm")
    if not own.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    files = [own, *(Path(f"/proc/{child}/statm") for child in children)]
    return sum(int(file.read_text().split()[1]) for file in files) * resource.getpagesize() / 2**20


def main() -> None:
    arguments = parse_arguments()
    say_origin(arguments)
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    found: list[tuple[int, float]] = []
    every = max(arguments.steps // arguments.samples, 1)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), arguments.images)
        run = Training(configuration(Path(folder), arguments))
        finish = run._finish_step

        def then_look(phase: Any) -> None:
            finish(phase)
            if run.step % every == 0:
                found.append((run.step, resident()))
                print(f"step {run.step}: {found[-1][1]:.1f} MB", flush=True)

        run._finish_step = then_look  # type: ignore[method-assign]
        with contextlib.suppress(SystemExit):
            run.fit()
    steps, used = np.array(found[len(found) // 2 :]).T
    slope = np.polyfit(steps, used, 1)[0]
    print(
        f"{found[-1][0]} steps of {arguments.batch_size} captions, {arguments.workers} workers: {used[-1]:.1f} MB "
        f"at the end, {slope * STEPS_AN_HOUR:+.2f} MB an hour of {STEPS_AN_HOUR} steps over the second half; "
        f"highest less lowest of it {used.max() - used.min():.1f} MB"
    )


if __name__ == "__main__":
    main()

"""What a training step of TVRN needs: peak memory and pairs a second, against chunk size and batch size.

    python examples/benchmarks/training_memory.py --threads 2
    python examples/benchmarks/training_memory.py --device cuda --hidden-size 1024 --dtype bfloat16 --chunks 1024 8192

One forward and backward of the whole objective on random regions and words, each line in a process of its own:

- `features`: the encoded items that the pair stage reads;
- `encoding`: the peak of encoding them and going backwards through that alone;
- `step`: the peak of the whole step;
- `pair stage`: the difference of the two. Its activations are computed again in the backward pass, chunk by chunk, so
  that beside the gradients of the features it grows with the chunk and not with the batch;
- `cached`: the peak with the one-sided layers running over 16 items at a time (`tower_batch_size=16`).

Memory is that of tensors: on a GPU as its allocator counts it, on a CPU summed from torch's profiler (what the process
itself takes there is more, since freed memory of other sizes is not handed back at once).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from origin import say_origin
from torch import Tensor

from modeling_tvrn import TVRNConfig, TVRNModel
from modeling_tvrn.layers_tvrn import grid_boxes
from modeling_tvrn.training.objective import Objective

CACHED_ITEMS = 16


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="precision of autocast")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--similarity-size", type=int, default=64)
    parser.add_argument("--refinement", default="gate", choices=("gate", "gru"))
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 256, 1024], help="pairs scored at once")
    parser.add_argument("--one", nargs=3, metavar=("BATCH", "CHUNK", "WHAT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def build(arguments: argparse.Namespace, chunk: int) -> Objective:
    torch.manual_seed(0)
    config = TVRNConfig(
        hidden_size=arguments.hidden_size,
        projection_size=arguments.hidden_size,
        similarity_size=arguments.similarity_size,
        refinement=arguments.refinement,
        vocab_size=1000,
        pair_chunk_size=chunk,
        checkpoint_pair_chunks=True,
    )
    return Objective(TVRNModel(config).to(arguments.device)).train()


def random_batch(size: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = 21
    lengths = torch.randint(7, words + 1, (size,), generator=generator)
    mask = (torch.arange(words) < lengths[:, None]).long()
    batch = {
        "region_features": torch.rand(size, 36, 2048, generator=generator),
        "region_boxes": grid_boxes(6, 6).expand(size, -1, -1).contiguous(),
        "region_mask": torch.ones(size, 36, dtype=torch.bool),
        "input_ids": torch.randint(1, 1000, (size, words), generator=generator),
        "attention_mask": mask,
        "word_mask": mask,
        "image_ids": torch.arange(size),
        "text_image_ids": torch.arange(size),
    }
    return {name: value.to(device) for name, value in batch.items()}


def run_step(objective: Objective, batch: dict[str, Tensor], what: str) -> int:
    """One forward and backward; the bytes of the features."""
    if what == "cached":
        objective.cached_backward(batch, CACHED_ITEMS, lambda loss: loss.backward())
        return 0
    if what == "step":
        objective(batch)["loss"].backward()
        return 0
    images = objective.encode_images({name: value for name, value in batch.items() if name.startswith("region")})
    texts = objective.encode_texts({name: batch[name] for name in ("input_ids", "attention_mask", "word_mask")})
    tensors = [value for items in (images, texts) for value in items.tensors().values()]
    torch.stack([value.float().square().mean() for value in tensors if value.requires_grad]).sum().backward()
    return sum(value.numel() * value.element_size() for value in tensors)


def peak_of(step: Callable[[], None], device: str) -> int:
    """The most bytes of tensors that a step holds at once, above what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def measure(arguments: argparse.Namespace, size: int, chunk: int, what: str) -> dict[str, float]:
    """Peak memory of a step above its start, seconds of another, bytes of the features."""
    torch.set_num_threads(arguments.threads)
    objective, batch = build(arguments, chunk), random_batch(size, arguments.device)
    features = 0

    def step() -> None:
        nonlocal features
        objective.zero_grad(set_to_none=True)
        with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
            features = run_step(objective, batch, what)

    most = peak_of(step, arguments.device)
    started = time.perf_counter()
    step()
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    return {"bytes": most, "seconds": time.perf_counter() - started, "features": features}


def in_own_process(size: int, chunk: int, what: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--one", str(size), str(chunk), what]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(said.splitlines()[-1]))


def main() -> None:
    arguments = parse_arguments()
    if arguments.one:
        size, chunk, what = arguments.one
        print(json.dumps(measure(arguments, int(size), int(chunk), what)))
        return
    say_origin(arguments)
    columns = ["chunk", "batch", "features MB", "encoding MB", "step MB", "pair stage MB", "cached MB", "pairs/s"]
    columns.append("cached pairs/s")
    print("|", " | ".join(columns), "|\n|" + "---|" * len(columns))
    for size in arguments.batches:
        encoding = in_own_process(size, 64, "encoding")
        for chunk in arguments.chunks:
            step, cached = (in_own_process(size, chunk, what) for what in ("step", "cached"))
            used = [encoding["features"], encoding["bytes"], step["bytes"], step["bytes"] - encoding["bytes"]]
            shown = [f"{value / 2**20:.0f}" for value in [*used, cached["bytes"]]]
            rates = [f"{size * size / result['seconds']:,.0f}" for result in (step, cached)]
            print("|", " | ".join([str(chunk), str(size), *shown, *rates]), "|", flush=True)


if __name__ == "__main__":
    main()

"""Optimisations that are small or local, each by itself: what does it save?

    python examples/benchmarks/small_gains.py --threads 1
    python examples/benchmarks/small_gains.py --threads 1 --data DATA     # captions' lengths from there

- AdamW over TVRN's weights at the paper's sizes: one fused kernel, the `foreach` form, a loop; milliseconds a step.
  Beside it the running mean of the weights (`ema_decay`).
- A frozen CNN tower (MobileNetV2, random weights): images a second in both precisions and memory formats.
- Captions of a batch sorted by length before the pair stage cuts them into chunks: word positions computed for each
  word there is, sorted and as they come.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from origin import say_origin
from transformers import MobileNetV2Config, MobileNetV2Model

from modeling_tvrn import TVRNConfig, TVRNModel
from modeling_tvrn.pair_tvrn import CAPTIONS_PER_CHUNK
from modeling_tvrn.training.optim import WeightAverage


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=16, help="a batch of the tower")
    parser.add_argument("--data", help="what load_pairs reads (default: lengths of 7 to 21 words)")
    parser.add_argument("--batch-size", type=int, default=128, help="captions a batch")
    return parser.parse_args()


def seconds_of(function: Callable[[], Any], arguments: argparse.Namespace) -> float:
    """Median seconds, after two calls that are not counted."""
    found = []
    for _ in range(arguments.repeats + 2):
        started = time.perf_counter()
        function()
        if arguments.device != "cpu":
            torch.get_device_module(arguments.device).synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[2:])


def optimizers(arguments: argparse.Namespace) -> None:
    model = TVRNModel(TVRNConfig()).to(arguments.device)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    print(f"AdamW over {sum(weight.numel() for weight in weights) / 1e6:.1f} million weights, ms a step:")
    for name, form in (("fused", {"fused": True}), ("foreach", {"foreach": True}), ("loop", {"foreach": False})):
        optimizer = torch.optim.AdamW(weights, lr=1e-4, **form)
        print(f"  {name}: {1e3 * seconds_of(optimizer.step, arguments):.1f}")
    print(f"  running mean of the weights: {1e3 * seconds_of(WeightAverage(model, 0.999).update, arguments):.1f}")


@torch.inference_mode()
def tower(arguments: argparse.Namespace) -> None:
    model = MobileNetV2Model(MobileNetV2Config()).to(arguments.device).eval()
    print(f"MobileNetV2 at 224 pixels, batches of {arguments.images}, images/s:")
    for dtype in (torch.float32, torch.bfloat16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            pixels = torch.rand(arguments.images, 3, 224, 224, device=arguments.device)
            pixels = pixels.contiguous(memory_format=memory_format)

            def run(pixels: Any = pixels, dtype: Any = dtype) -> None:
                with torch.autocast(arguments.device, dtype, enabled=dtype != torch.float32):
                    model(pixels)

            rate = arguments.images / seconds_of(run, arguments)
            print(f"  {str(dtype)[6:]}, {str(memory_format)[6:]}: {rate:.0f}")


def lengths(arguments: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    found = rng.integers(7, 22, 100 * arguments.batch_size)
    if arguments.data:
        from modeling_tvrn.data import load_pairs

        records = load_pairs(arguments.data, split="validation")
        found = rng.permutation([len(caption.split()) for captions in records.captions for caption in captions])
    batches = found[: len(found) // arguments.batch_size * arguments.batch_size].reshape(-1, arguments.batch_size)
    computed = {}
    for name, order in (("as they come", batches), ("sorted by length", np.sort(batches, axis=1))):
        chunks = [
            order[:, start : start + CAPTIONS_PER_CHUNK] for start in range(0, order.shape[1], CAPTIONS_PER_CHUNK)
        ]
        computed[name] = sum(int(chunk.max(axis=1).sum()) * chunk.shape[1] for chunk in chunks)
    print(f"word positions of the pair stage for each word, chunks of {CAPTIONS_PER_CHUNK} captions:")
    for name, positions in computed.items():
        print(f"  {name}: {positions / batches.sum():.2f}")


def main() -> None:
    arguments = parse_arguments()
    say_origin(arguments)
    torch.set_num_threads(arguments.threads)
    optimizers(arguments)
    tower(arguments)
    lengths(arguments)


if __name__ == "__main__":
    main()

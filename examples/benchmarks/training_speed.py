"""How fast does TVRN train, beside what the machine's matrix products allow, and where does the time go?

    python examples/benchmarks/training_speed.py --threads 2                       # the paper's sizes, batch 128
    python examples/benchmarks/training_speed.py --threads 2 --batch-size 32 --variants gate-float32 gru-bfloat16
    python examples/benchmarks/training_speed.py --device cuda --compiled --steps 10

Whole training steps on random region features and words (36 regions, 7 to 21 words, BiGRU): forward, backward,
clipping and AdamW. A line a variant:

- `pairs/s`: images times captions of the batch a second of the whole step (the median of the steps);
- `TFLOP/s`: operations that the step really did, as `torch.utils.flop_counter` counts them in an uncompiled step, the
  chunks computed again in the backward pass included; `of GEMM`: their share of the rate of large matrix products in
  the same precision, measured in the same run;
- `pair stage`, `one-sided`: forward and backward of the two alone, as shares of the step; `rest`: what is left,
  losses, clipping, optimizer and everything between (below 0 where the two alone were slower than within the step);
- `compiled`: with `torch.compile` of the pair stage, after steps that are not timed.

With `--threads 1` on a CPU all times, those of the matrix products as well, are the process's CPU time, which other
jobs on the machine change little.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from origin import matrix_rate, say_origin
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modeling_tvrn import TVRNConfig, TVRNModel
from modeling_tvrn.layers_tvrn import grid_boxes
from modeling_tvrn.training import TrainingConfig
from modeling_tvrn.training.objective import Objective
from modeling_tvrn.training.optim import make_optimizer

VARIANTS = [f"{refinement}-{dtype}" for refinement in ("gate", "gru") for dtype in ("float32", "bfloat16")]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=128, help="images, each with one caption")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--compiled", action="store_true", help="measure each variant compiled as well")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--similarity-size", type=int, default=256)
    parser.add_argument("--chunk-size", type=int, help="pairs scored at once (default: what suits the device)")
    return parser.parse_args()


class Clock:
    """Median seconds of something, on a device whose work is waited for."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device = device
        self.repeats = repeats
        self.now = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def __call__(self, function: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(self.repeats):
            self.wait()
            started = self.now()
            function()
            self.wait()
            seconds.append(self.now() - started)
        return statistics.median(seconds)

    def wait(self) -> None:
        if self.device != "cpu":
            torch.get_device_module(self.device).synchronize()


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


class Step:
    """A training step of one variant, and its two large parts by themselves."""

    def __init__(self, arguments: argparse.Namespace, refinement: str, dtype: str) -> None:
        self.device, self.dtype = arguments.device, getattr(torch, dtype)
        torch.manual_seed(0)
        config = TVRNConfig(
            hidden_size=arguments.hidden_size,
            projection_size=arguments.hidden_size,
            similarity_size=arguments.similarity_size,
            refinement=refinement,
            vocab_size=1000,
            pair_chunk_size=arguments.chunk_size,
            checkpoint_pair_chunks=True,
        )
        self.objective = Objective(TVRNModel(config).to(self.device)).train()
        self.optimizer = make_optimizer(self.objective.model, TrainingConfig())
        self.batch = random_batch(arguments.batch_size, arguments.device)
        self.sides = [
            {name: self.batch[name] for name in ("region_features", "region_boxes", "region_mask")},
            {name: self.batch[name] for name in ("input_ids", "attention_mask", "word_mask")},
        ]

    def whole(self) -> None:
        """Forward, backward, clipping, optimizer."""
        with self.autocast():
            loss = self.objective(self.batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), 2.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def one_sided(self) -> None:
        """Images and texts encoded, each without the other, forward and backward."""
        images, texts = self.encoded()
        self.backward([*images.tensors().values(), *texts.tensors().values()])

    def pair_stage(self, images: Any, texts: Any) -> None:
        """Every pair scored, forward and backward, down to the encoded items."""
        with self.autocast():
            components = self.objective.model.score_components(images, texts)
        self.backward(list(components.values()))

    def encoded(self) -> tuple[Any, Any]:
        with self.autocast():
            return self.objective.encode_images(self.sides[0]), self.objective.encode_texts(self.sides[1])

    def leaves(self) -> list[Any]:
        """Encoded items whose gradients end there."""
        with torch.no_grad():
            return [
                items._map(lambda value: value.detach().requires_grad_() if value.is_floating_point() else value)
                for items in self.encoded()
            ]

    def backward(self, tensors: list[Tensor]) -> None:
        torch.stack([value.float().square().mean() for value in tensors if value.requires_grad]).sum().backward()
        self.objective.zero_grad()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)


def measure(
    arguments: argparse.Namespace, variant: str, rates: dict[str, float], operations: float | None = None
) -> float:
    """Print the line of a variant, compiled where its operations are known; returns the operations of its step."""
    is_compiled = operations is not None
    refinement, dtype = variant.split("-")
    step, clock = Step(arguments, refinement, dtype), Clock(arguments.device, arguments.steps)
    if operations is None:
        with FlopCounterMode(display=False) as counter:  # warms up too
            step.whole()
        operations = float(counter.get_total_flops())
    if is_compiled:
        step.objective.model.pair.compile(dynamic=True)
        step.whole()
        step.whole()
    seconds = clock(step.whole)
    items = step.leaves()
    parts = [clock(lambda: step.pair_stage(*items)), clock(step.one_sided)]
    shares = [part / seconds for part in [*parts, seconds - sum(parts)]]
    values = [
        *(refinement, dtype, "yes" if is_compiled else "no"),
        *(f"{seconds:.3f}", f"{arguments.batch_size**2 / seconds:,.0f}"),
        *(f"{operations / seconds / 1e12:.3f}", f"{operations / seconds / rates[dtype]:.0%}"),
        *(f"{share:.1%}" for share in shares),
    ]
    print("|", " | ".join(values), "|", flush=True)
    return operations


def main() -> None:
    arguments = parse_arguments()
    say_origin(arguments)
    torch.set_num_threads(arguments.threads)
    names = sorted({variant.split("-")[1] for variant in arguments.variants})
    clock, shape = Clock(arguments.device, 5), (1024 if arguments.device == "cpu" else 8192,) * 3
    rates = {name: matrix_rate(clock, getattr(torch, name), arguments.device, shape) for name in names}
    print("matrix products:", ", ".join(f"{name} {rate / 1e12:.3f} TFLOP/s" for name, rate in rates.items()))
    columns = ["refinement", "precision", "compiled", "s a step", "pairs/s", "TFLOP/s", "of GEMM", "pair stage"]
    columns += ["one-sided", "rest"]
    print(f"batch {arguments.batch_size}, {arguments.device}, {arguments.threads} threads")
    print("|", " | ".join(columns), "|\n|" + "---|" * len(columns), flush=True)
    for variant in arguments.variants:
        operations = measure(arguments, variant, rates)
        if arguments.compiled:
            measure(arguments, variant, rates, operations)


if __name__ == "__main__":
    main()

"""How much memory does `rank` need beyond the encoded gallery? 5,000 × 25,000 at the paper's sizes.

    python examples/benchmarks/rank_memory.py --seconds 300

Random images and captions of the paper's sizes (36 regions, 7 to 21 words, D 1024) fill a whole gallery; captions lie
in a `RaggedTexts`, without padding. `rank` then scores blocks until the time is over, and the largest resident size
since its start stands beside the one before it (Linux). What later blocks can add is the scores kept for the second
pass, which the plan knows exactly: they are added, and the whole is printed as an extrapolation.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import resident_bytes, say_origin
from pair_costs import PAPER, VARIANTS, build, encode

from modeling_tvrn import TVRNModel
from modeling_tvrn.metrics import positive_pairs
from modeling_tvrn.scoring import RaggedTexts, rank
from modeling_tvrn.scoring.plan import plan_blocks

DIFFERENT = 32  # items encoded; the gallery repeats them, each in memory of its own


class TimeIsOver(Exception):
    """Ends the run from within."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=25000)
    parser.add_argument("--seconds", type=float, default=300, help="of scoring")
    parser.add_argument("--memory-budget", type=float, default=1.0, help="gigabytes, of `rank`")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of gallery and scores")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, metavar="JSON")
    return parser.parse_args()


def gallery(model: TVRNModel, arguments: argparse.Namespace) -> tuple[Any, RaggedTexts]:
    """Images, and captions of 7 to 21 words."""
    dtype = getattr(torch, arguments.dtype)
    images, texts = encode(model, PAPER | {"images": DIFFERENT, "captions": DIFFERENT, "words": 21})
    images = images.to(dtype).select(torch.arange(arguments.images) % DIFFERENT)
    lengths = np.random.default_rng(0).integers(7, 22, arguments.captions)

    def parts() -> Any:
        for length in np.unique(lengths):
            places = np.flatnonzero(lengths == length)
            part = texts.to(dtype).select(torch.arange(len(places)) % DIFFERENT)
            part.word_mask = torch.arange(21) < torch.full((len(places), 1), int(length))
            yield part, places

    return images, RaggedTexts.collect(parts())


def limited(model: TVRNModel, seconds: float) -> list[int]:
    """Ends `model.match` once the time is over; gives the pairs scored by then."""
    scored: list[int] = []
    plain, started = model.match, time.monotonic()

    def match(images: Any, texts: Any, chunk_size: int | None = None) -> torch.Tensor:
        if time.monotonic() - started > seconds:
            raise TimeIsOver
        found: torch.Tensor = plain(images, texts, chunk_size)
        scored.append(found.numel())
        return found

    model.match = match  # type: ignore[method-assign]
    return scored


@torch.no_grad()
def main() -> int:
    arguments = parse_arguments()
    say_origin(arguments)
    torch.set_num_threads(arguments.threads)
    model = build(VARIANTS[0], PAPER)
    images, texts = gallery(model, arguments)
    rows = np.arange(len(texts)) * len(images) // len(texts)
    warm = texts.select(slice(0, 40)), getattr(torch, arguments.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=warm[1] == torch.bfloat16):
        model.match(images.select(slice(0, 4)), warm[0])  # the matrix library's own buffers
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was the encoding's
    before = resident_bytes("VmRSS") / 1e9
    scored = limited(model, arguments.seconds)
    try:
        rank(model, images, texts, rows, dtype=warm[1], memory_budget=arguments.memory_budget)
        ended = "all blocks"
    except TimeIsOver:
        ended = f"{len(scored)} blocks, {sum(scored)} pairs"
    measured = resident_bytes("VmHWM") / 1e9 - before
    plan = plan_blocks(images, texts, np.arange(len(texts)), arguments.memory_budget, torch.device("cpu"))
    positives = plan.blocks_of(positive_pairs(len(images), len(texts), rows))
    room = arguments.memory_budget * 1e9 / 2
    kept = min(sum(plan.pairs_in(block) for block in positives) * 4, room) / 1e9
    already = sum(scored[: len(positives)]) * 4 / 1e9
    whole = measured + max(kept - already, 0.0)
    size = sum(value.numel() * value.element_size() for value in images.tensors().values()) + texts.nbytes
    report = {
        "images": len(images), "captions": len(texts), "dtype": arguments.dtype, "gallery_gb": size / 1e9,
        "resident_before_gb": before, "memory_budget_gb": arguments.memory_budget, "scored": ended,
        "block": [plan.block_images, plan.block_captions], "blocks": plan.shape[0] * plan.shape[1],
        "blocks_with_positives": len(positives), "measured_gb": measured, "extrapolated_gb": whole,
    }  # fmt: skip
    block = f"{plan.block_images} × {plan.block_captions}"
    print(
        f"{len(images)} × {len(texts)}, {arguments.dtype}: gallery {size / 1e9:.2f} GB; blocks of {block},"
        f" {report['blocks']} in all, {len(positives)} hold positives\n"
        f"{ended}: {measured:.2f} GB beyond the gallery at most; with the scores still to be kept, at most"
        f" {kept:.2f} GB of them: {whole:.2f} GB (extrapolated)"
    )
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

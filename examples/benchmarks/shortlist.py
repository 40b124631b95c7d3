"""How long a shortlist is long enough? Recall and seconds of search and rerank, beside scoring every pair.

    python examples/benchmarks/shortlist.py runs/flickr8k --data flickr8k --split validation \
        --regions regions/validation --output shortlist.json --plot shortlist.png

Everything is measured in one run on one gallery: first every pair (`rank`), then `search_then_rerank` for each size.
Seconds are wall time; CPU seconds stand beside them, as on a busy machine they are what can be compared: "× less" is
of these. "× of a pair" is what a reranked pair costs beside one of exhaustive scoring: 1 means that gathering is free.
`--encoded FOLDER` keeps the encoded gallery for the next run.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import say_origin

from modeling_tvrn import TVRNModel, TVRNProcessor
from modeling_tvrn.data import load_pairs
from modeling_tvrn.encoded_tvrn import EncodedImages, EncodedTexts
from modeling_tvrn.evaluation import encode_dataset
from modeling_tvrn.metrics import RetrievalMetrics
from modeling_tvrn.plots import plot_shortlist
from modeling_tvrn.scoring import EmbeddingScore, RaggedTexts, rank, search_then_rerank
from modeling_tvrn.teachers import with_checked_regions

SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
TOLERANCE = 0.3  # of rSum, percent points: what counts as no loss


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id")
    parser.add_argument("--data", required=True, help="what load_pairs reads")
    parser.add_argument("--split")
    parser.add_argument("--regions", metavar="CACHE", help="region cache in place of pictures")
    parser.add_argument("--encoded", type=Path, metavar="FOLDER", help="keep the encoded gallery here, or read it")
    parser.add_argument("--images", type=int, help="only the first so many photographs (default: all)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, metavar="JSON")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    return parser.parse_args()


def encoded(arguments: argparse.Namespace, model: TVRNModel) -> tuple[EncodedImages, EncodedTexts, np.ndarray]:
    """The gallery, read from a folder where it was kept there."""
    folder = arguments.encoded
    if folder is not None and (folder / "rows.npy").exists():
        images = EncodedImages.load(folder / "images.safetensors")
        return images, EncodedTexts.load(folder / "texts.safetensors"), np.load(folder / "rows.npy")
    processor = TVRNProcessor.from_pretrained(arguments.model)
    records = load_pairs(arguments.data, arguments.split)
    if arguments.regions is not None:
        records = with_checked_regions(records, arguments.regions, model, processor)
    images, texts, rows = encode_dataset(model, processor, records)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        images.save(folder / "images.safetensors")
        texts.save(folder / "texts.safetensors")
        np.save(folder / "rows.npy", rows)
    return images, texts, rows


def timed(function: Callable[[], RetrievalMetrics]) -> tuple[RetrievalMetrics, float, float]:
    """Its result, wall seconds and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = function()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    model = TVRNModel.from_pretrained(arguments.model, dtype=torch.float32).eval()
    images, padded, rows = encoded(arguments, model)
    if arguments.images is not None:
        images, padded = images.select(slice(arguments.images)), padded.select(np.flatnonzero(rows < arguments.images))
        rows = rows[rows < arguments.images]
    texts = RaggedTexts.of(padded)
    dtype = getattr(torch, arguments.dtype)
    warm = images.select(slice(8)), texts.select(slice(40)), rows[:40]
    search_then_rerank(model, *warm[:2], np.minimum(warm[2], 7), shortlist_size=4, dtype=dtype)
    exact, seconds, cpu = timed(lambda: rank(model, images, texts, rows, dtype=dtype))
    pairs = len(images) * len(texts)
    points = []
    print(f"{'shortlist':>10}{'rSum':>8}{'pairs':>10}{'seconds':>9}{'CPU s':>8}{'× less':>8}{'× of a pair':>13}")
    print(f"{'every pair':>10}{exact.rsum:8.1f}{pairs:10d}{seconds:9.1f}{cpu:8.1f}{1:8.1f}{1:13.2f}")
    for size in arguments.sizes:
        found, wall, used = timed(
            lambda size=size: search_then_rerank(model, images, texts, rows, size, dtype=dtype, progress=False)
        )
        ratio = (used / found.costs.pairs_scored) / (cpu / pairs)
        points.append(found.as_dict() | {"seconds": wall, "cpu_seconds": used, "pair_cost_ratio": ratio})
        counts = f"{size:10d}{found.rsum:8.1f}{found.costs.pairs_scored:10d}"
        print(f"{counts}{wall:9.2f}{used:8.2f}{cpu / used:8.1f}{ratio:13.2f}", flush=True)
    own = rank(EmbeddingScore(), images, texts, rows, progress=False)
    print(f"embeddings alone: rSum {own.rsum:.1f}; {arguments.threads} threads, {arguments.dtype}")
    return {
        "model": arguments.model,
        "images": len(images),
        "captions": len(texts),
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "exhaustive": exact.as_dict() | {"seconds": seconds, "cpu_seconds": cpu, "pairs_scored": pairs},
        "embeddings": own.as_dict(),
        "shortlists": points,
    }


def verdict(report: dict[str, Any]) -> str:
    """The smallest shortlist without loss, and what it saves."""
    exact = report["exhaustive"]
    for point in sorted(report["shortlists"], key=lambda each: each["shortlist_size"]):
        if abs(point["rsum"] - exact["rsum"]) <= TOLERANCE:
            return (
                f"shortlist of {point['shortlist_size']}: rSum {point['rsum']:.1f} beside {exact['rsum']:.1f},"
                f" {exact['seconds'] / point['seconds']:.0f} × fewer seconds"
                f" ({exact['cpu_seconds'] / point['cpu_seconds']:.0f} × fewer CPU seconds)"
            )
    sizes = [point["shortlist_size"] for point in report["shortlists"]]
    return f"none of the shortlists {sizes} is within {TOLERANCE} of exhaustive"


def main() -> int:
    arguments = parse_arguments()
    say_origin(arguments)
    torch.set_num_threads(arguments.threads)
    report = measure(arguments)
    print(verdict(report))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        plot_shortlist(report["shortlists"], arguments.plot, exhaustive=report["exhaustive"])
    return 0


if __name__ == "__main__":
    sys.exit(main())

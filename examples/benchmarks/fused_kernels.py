"""What do the fused programs gain on a GPU? Their scores against float32, and ns a pair beside the plain path.

    python examples/benchmarks/fused_kernels.py --output fused.json

At the paper's sizes on random features: `match` plain and fused, in float32, float16 and bfloat16, for several chunk
sizes; then a block of 32 captions alone, cut in several ways (`modeling_tvrn.kernels.FAST`). Errors are the largest
difference from the plain path in float32; the programs should have no more than the plain path in the same dtype.

The first call of each program compiles it, which takes ten seconds and is not counted: `--warm` lets a process for
each setting do so at once beforehand, and Triton's cache on disk hands the programs over.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu
import torch
from origin import say_origin

from modeling_tvrn import TVRNModel, kernels

CUTS = [
    {"rows": 128, "columns": 32, "num_warps": 8, "num_stages": 3},
    {"rows": 128, "columns": 32, "num_warps": 8, "num_stages": 2},
    {"rows": 128, "columns": 64, "num_warps": 8, "num_stages": 2},
    {"rows": 64, "columns": 32, "num_warps": 4, "num_stages": 2},
    {"rows": 64, "columns": 32, "num_warps": 4, "num_stages": 3},
    {"rows": 64, "columns": 64, "num_warps": 8, "num_stages": 2},
]
BENCH = gpu.Bench("cuda", gpu.Sizes())
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--captions", type=int, default=512)
    parser.add_argument("--words", type=int, default=14, help="mean length, between half and 1.5 times as many")
    parser.add_argument("--heads", nargs="*", default=["saf", "sgr"])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--chunk-sizes", nargs="+", type=int, default=[0, 65536], help="0: the model's own choice")
    parser.add_argument("--cuts", nargs="*", type=int, default=list(range(len(CUTS))), help="numbers of CUTS")
    parser.add_argument("--warm", action="store_true", help="compile in parallel first")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="JSON")
    return parser.parse_args()


@torch.no_grad()
def build(head: str, arguments: argparse.Namespace) -> tuple[TVRNModel, Any, Any]:
    """A model on the GPU in float32 and its encoded galleries."""
    model = gpu.build(1024, 256, 256, similarity_head=head, use_first_stage=False, use_late_interaction=True).cuda()
    images = model.encode_images(**gpu.random_images(arguments.images, 6, 256, "cuda"))
    return model, images, model.encode_texts(**gpu.random_texts(arguments.captions, arguments.words, "cuda"))


@torch.inference_mode()
def measure_match(head: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    model, images, texts = build(head, arguments)
    pairs = len(images) * len(texts)
    few = images.select(slice(0, 128)), texts.select(slice(0, 128))
    exact = model.unweighted_components(*few)
    rows = []
    for name in arguments.dtypes:
        model.to(DTYPES[name])
        galleries = images.to(DTYPES[name]), texts.to(DTYPES[name])
        for fused in (False, True):
            model.pair.fused = None
            if fused:
                assert kernels.enable(model)
            found = model.unweighted_components(*few)
            errors = {key: (found[key] - exact[key]).abs().max().item() for key in exact}
            row = {"head": head, "dtype": name, "fused": fused, "errors": errors}
            for size in arguments.chunk_sizes:
                chunk = size or None
                for level in ("late_interaction", "full"):
                    torch.cuda.reset_peak_memory_stats()
                    held = torch.cuda.memory_allocated()
                    taken = BENCH.seconds(
                        lambda chunk=chunk, level=level, own=galleries: model.match(*own, chunk, level),
                        arguments.repeats,
                    )
                    memory = (torch.cuda.max_memory_allocated() - held) / 1e9
                    row[f"{level}, chunk {chunk}"] = {"ns": 1e9 * taken / pairs, "GB": memory}
            row["failed"] = sorted(model.pair.fused.failed) if fused else []
            rows.append(row)
            show(row)
    return rows


@torch.inference_mode()
def measure_cuts(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    model, images, texts = build("saf", arguments)
    # Sixteen words in every caption, which pad nothing.
    block = texts.select(slice(0, 32))
    kept = {name: value[:, :16] for name, value in block.tensors().items() if name != "embeds"}
    block = dataclasses.replace(block, **kept | {"word_mask": torch.ones_like(kept["word_mask"])})
    exact = model.pair(images, block, model.attention, model.textual_refinement)
    model.to(torch.bfloat16)
    images, block = images.to(torch.bfloat16), block.to(torch.bfloat16)
    plain = BENCH.seconds(
        lambda: model.pair(images, block, model.attention, model.textual_refinement), arguments.repeats
    )
    rows: list[dict[str, Any]] = [{"cut": None, "ns": 1e9 * plain / (len(images) * 32)}]
    show(rows[0])
    default = dict(kernels.FAST)
    for cut in (CUTS[number] for number in arguments.cuts):
        row: dict[str, Any] = {"cut": cut}
        kernels.FAST.clear()
        kernels.FAST.update(cut)
        try:
            taken = BENCH.seconds(lambda: kernels.fused_reasoning(model, images, block), 3 * arguments.repeats)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        else:
            row["ns"] = 1e9 * taken / (len(images) * 32)
            row["error"] = (kernels.fused_reasoning(model, images, block) - exact).abs().max().item()
        rows.append(row)
        show(row)
    kernels.FAST.clear()
    kernels.FAST.update(default)
    return rows


def warm(arguments: argparse.Namespace) -> None:
    """A process for every setting, on few images: what they compile is then in Triton's cache."""
    settings = [["--cuts", str(number), "--heads"] for number in arguments.cuts]
    settings += [
        ["--cuts", "--heads", head, "--dtypes", dtype] for head in arguments.heads for dtype in arguments.dtypes
    ]
    few = ["--images", "40", "--captions", str(arguments.captions), "--chunk-sizes", "0", "--repeats", "1"]
    start = time.perf_counter()
    command = [sys.executable, __file__, *few]
    running = [subprocess.Popen(command + each, stdout=subprocess.DEVNULL) for each in settings]
    for process in running:
        process.wait()
    print(f"warm after {time.perf_counter() - start:.0f} s", flush=True)


def show(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def main() -> None:
    arguments = parse_arguments()
    say_origin(arguments)
    if arguments.warm:
        warm(arguments)
    cuts = measure_cuts(arguments) if arguments.cuts else []
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuts": cuts}
    found["match"] = [row for head in arguments.heads for row in measure_match(head, arguments)]
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()

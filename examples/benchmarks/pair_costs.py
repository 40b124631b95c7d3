"""What does one image–caption pair cost? Operations and bytes of every variant, and a fitted model of seconds.

    python examples/benchmarks/pair_costs.py
    python examples/benchmarks/pair_costs.py --fit --threads 2 --output costs.json

The first counts. Operations by formula (matrix products alone, a multiplication and an addition each) stand beside
what `torch.utils.flop_counter` sees while the pair stage runs, at small odd sizes where both must be equal, and then
at the paper's sizes. Bytes are those of all operators together, each reading its inputs and writing its outputs once,
which a cache saves some of and fused kernels most; and the least there can be: a block's items once and its scores.

`--fit` times `rank` on random features of the paper's sizes, for several images × captions, fits
seconds = a + b · pairs, and predicts COCO 5K, and search and rerank in a million images with five captions each. It
prints the largest relative error of the fit: a fit through disturbed measurements says so.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import say_origin
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from modeling_tvrn import TVRNConfig, TVRNModel
from modeling_tvrn.encoded_tvrn import EncodedImages, EncodedTexts
from modeling_tvrn.layers_tvrn import grid_boxes
from modeling_tvrn.scoring import rank

VARIANTS = [
    {"refinement": refinement, "similarity_head": head} for refinement in ("gate", "gru") for head in ("saf", "sgr")
]
VARIANTS += [VARIANTS[0] | {"use_text_refinement": False}, VARIANTS[0] | {"use_late_interaction": True}]
SMALL = {"images": 3, "captions": 5, "words": 7, "regions": 11, "hidden": 24, "similarity": 10, "projection": 6}
PAPER = {"images": 4, "captions": 8, "words": 14, "regions": 36, "hidden": 1024, "similarity": 256, "projection": 1024}
MILLION, CAPTIONS_OF_ONE, SHORTLIST = 1_000_000, 5, 128


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="also time, fit and predict")
    parser.add_argument("--sizes", nargs="+", default=["16x80", "32x160", "64x320"], metavar="IxT", help="timed")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, metavar="JSON")
    return parser.parse_args()


def operations(variant: dict[str, Any], sizes: dict[str, int]) -> dict[str, float]:
    """Operations of one pair by part, matrix products alone."""
    words, regions, size, similarity = (sizes[name] for name in ("words", "regions", "hidden", "similarity"))
    gru, refined = variant["refinement"] == "gru", variant.get("use_text_refinement", True)
    tokens = 2 * regions if gru else regions
    own = 2 * words if gru and refined else words  # refined words, and expansions beside them
    carried = (3 if gru else 2) * size
    parts: dict[str, float] = {}
    if refined:
        parts["expansion"] = 2 * words * regions * (size + regions + carried)
        parts["GRU"] = 6 * words * size * size if gru else 0
    parts["global text"] = 2 * own * size
    parts["alignment"] = 2 * own * ((tokens + 1) * size + tokens * tokens + tokens * size)
    parts["similarity"] = 2 * (own + 1) * size * similarity
    nodes = own + 1
    if variant["similarity_head"] == "saf":
        parts["head"] = 2 * nodes * similarity * 2
    else:
        parts["head"] = 3 * (6 * nodes * similarity**2 + 4 * nodes**2 * similarity) + 2 * similarity
    if variant.get("use_late_interaction", False):
        parts["late interaction"] = 2 * words * regions * size
    parts["embeddings"] = 2 * sizes["projection"]
    return parts


def build(variant: dict[str, Any], sizes: dict[str, int]) -> TVRNModel:
    """A model of random weights."""
    torch.manual_seed(0)
    config = {"use_late_interaction": False, "region_feature_size": 32, "vocab_size": 100, "word_embedding_size": 16}
    config |= {"hidden_size": sizes["hidden"], "similarity_size": sizes["similarity"]}
    return TVRNModel(TVRNConfig(projection_size=sizes["projection"], **config | variant)).eval()


def encode(model: TVRNModel, sizes: dict[str, int]) -> tuple[EncodedImages, EncodedTexts]:
    """Random images and captions, all of one length."""
    generator = torch.Generator().manual_seed(1)
    regions = sizes["regions"]
    features = torch.rand(sizes["images"], regions, 32, generator=generator)
    boxes = grid_boxes(1, regions).expand(sizes["images"], -1, -1)
    ids = torch.randint(1, 100, (sizes["captions"], sizes["words"]), generator=generator)
    return model.encode_images(region_features=features, region_boxes=boxes), model.encode_texts(input_ids=ids)


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        read = [each for each in tree_leaves((arguments, keywords)) if isinstance(each, Tensor)]
        written = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        places = {each.untyped_storage().data_ptr() for each in read}
        if any(each.untyped_storage().data_ptr() not in places for each in written):  # else a view, or in place
            self.bytes += sum(each.numel() * each.element_size() for each in [*read, *written])
        return result


def count(variant: dict[str, Any], sizes: dict[str, int]) -> dict[str, float]:
    """Of one pair: operations by formula and as counted, bytes of all operators, and the fewest bytes."""
    model = build(variant, sizes)
    images, texts = encode(model, sizes)
    pairs = sizes["images"] * sizes["captions"]
    with FlopCounterMode(display=False) as counter:
        model.match(images, texts, chunk_size=pairs)
    with Traffic() as traffic:
        model.match(images, texts, chunk_size=pairs)
    items = sum(value.numel() * value.element_size() for side in (images, texts) for value in side.tensors().values())
    return {
        "formula": sum(operations(variant, sizes).values()),
        "counted": counter.get_total_flops() / pairs,
        "operator_bytes": traffic.bytes / pairs,
        "fewest_bytes": items / pairs + 4,
    }


def count_all() -> list[dict[str, Any]]:
    """The table of all variants."""
    heads = f"{'small: formula':>16}{'counted':>10}   {'paper: MFLOP':>12}{'counted':>9}{'KB':>9}{'fewest':>8}"
    print(f"{'variant':38}{heads}")
    rows = []
    for variant in VARIANTS:
        small, paper = count(variant, SMALL), count(variant, PAPER)
        name = " + ".join([variant["refinement"], variant["similarity_head"]])
        name += "".join(f", {key.removeprefix('use_')} {value}" for key, value in list(variant.items())[2:])
        print(
            f"{name:38}{small['formula']:16.0f}{small['counted']:10.0f}   {paper['formula'] / 1e6:12.2f}"
            f"{paper['counted'] / 1e6:9.2f}{paper['operator_bytes'] / 1e3:9.0f}{paper['fewest_bytes'] / 1e3:8.0f}"
        )
        rows.append({"variant": name, "small": small, "paper": paper, "parts": operations(variant, PAPER)})
        if round(small["formula"]) != round(small["counted"]):
            print(f"  not equal: {operations(variant, SMALL)}", file=sys.stderr)
    block = f"{PAPER['images']} × {PAPER['captions']}"
    print(f"KB: of all operators, float32; fewest: each item of a block of {block} pairs once, and the scores")
    return rows


def fit(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of `rank` against pairs, and what they predict."""
    model = build(VARIANTS[0], PAPER).to(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    shapes = [tuple(map(int, each.split("x"))) for each in arguments.sizes]
    images, texts = encode(model.cpu(), PAPER | {"images": shapes[-1][0], "captions": shapes[-1][1]})
    model, images, texts = model.to(arguments.device), images.to(arguments.device), texts.to(arguments.device)
    points = []
    rank(model, images.select(slice(8)), texts.select(slice(16)), np.arange(16) // 2, dtype=dtype, progress=False)
    for rows, columns in shapes:
        sides, own = (images.select(slice(rows)), texts.select(slice(columns))), np.arange(columns) * rows // columns
        wall, cpu = time.perf_counter(), time.process_time()
        rank(model, *sides, own, dtype=dtype, progress=False)
        points.append([rows * columns, time.perf_counter() - wall, time.process_time() - cpu])
        print(f"{rows} × {columns}: {points[-1][1]:.2f} s, CPU {points[-1][2]:.2f} s", flush=True)
    table = np.array(points)
    found = {"points": points, "dtype": arguments.dtype, "threads": arguments.threads, "device": arguments.device}
    left = torch.randn(1024, PAPER["projection"], device=arguments.device)
    started = time.perf_counter()
    _ = [left @ left.T for _ in range(4)]
    search = (time.perf_counter() - started) / (4 * 1024 * 1024)
    for kind, column in (("seconds", 1), ("CPU seconds", 2)):
        found[kind] = _predict(kind, table[:, 0], table[:, column], search)
    return found


def _predict(kind: str, pairs: np.ndarray, seconds: np.ndarray, search: float) -> dict[str, float]:
    weights = 1 / seconds  # errors are relative
    matrix = np.stack([np.ones_like(pairs), pairs], axis=1) * weights[:, None]
    (start, each), *_ = np.linalg.lstsq(matrix, seconds * weights, rcond=None)
    error = float(np.abs((start + each * pairs) / seconds - 1).max())
    coco = start + each * 5000 * 25000
    reranked = SHORTLIST * MILLION * (1 + CAPTIONS_OF_ONE)
    cosines = search * 2 * MILLION * MILLION * CAPTIONS_OF_ONE  # both directions
    print(
        f"{kind} = {start:.3g} + {each:.3g} · pairs, within {error:.0%} of the measurements\n"
        f"  COCO 5K, every pair: {coco / 60:.0f} minutes\n"
        f"  a million images, five million captions, shortlists of {SHORTLIST} both ways: search"
        f" {cosines / 3600:.1f} hours + rerank at most {each * reranked / 3600:.1f} hours;"
        f" every pair: {each * MILLION**2 * CAPTIONS_OF_ONE / 3600 / 24 / 365:.1f} years\n"
        f"  one query in a million: search {search * MILLION:.2g} s + rerank {each * SHORTLIST:.2g} s"
    )
    return {
        "start": float(start), "of_a_pair": float(each), "largest_relative_error": error, "coco_5k": float(coco),
        "million_search": cosines, "million_rerank": float(each * reranked),
    }  # fmt: skip


@torch.inference_mode()
def main() -> int:
    arguments = parse_arguments()
    say_origin(arguments)
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {"variants": count_all()}
    if arguments.fit:
        report["fit"] = fit(arguments)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

r"""Export a model as three ONNX files (image side, text side, pair stage) that run without torch, and measure them.

    pip install "modeling-tvrn[export]"
    python examples/export.py runs/flickr8k --output onnx/flickr8k

Differences from the model are printed for several sizes other than the traced ones, and more than 1e-4 is an error.
The folder holds all that running needs: `tvrn_onnx.py` in it starts with ten lines that search photographs with
onnxruntime and NumPy. With 8-bit weights as well, and what they cost in recall, from cached regions:

    python examples/export.py runs/flickr8k --output onnx/flickr8k-regions --image-input regions --int8 \
        --data flickr8k --split validation --regions regions/flickr8k-validation
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_tvrn import TVRNModel, TVRNProcessor, load_model
from modeling_tvrn.cli.common import prepare_terminal
from modeling_tvrn.data import load_pairs
from modeling_tvrn.export import OnnxModel, export_onnx, quantize_onnx
from modeling_tvrn.export.quantizing import PARTS
from modeling_tvrn.export.tvrn_onnx import cat, select
from modeling_tvrn.metrics import RetrievalMetrics, retrieval_metrics
from modeling_tvrn.teachers import with_checked_regions


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about, _, commands = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=commands, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new, or an earlier export")
    parser.add_argument("--image-input", choices=["pixels", "regions"], help="default: pixels where it reads such")
    parser.add_argument("--int8", nargs="*", choices=PARTS, metavar="PART", help="quantise these parts (default: all)")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that its tokenizer or image processor brings",
    )
    group = parser.add_argument_group("recall")
    group.add_argument("--data", help="what load_pairs reads")
    group.add_argument("--split")
    group.add_argument("--regions", metavar="CACHE", help="region cache in place of pictures")
    group.add_argument("--images", type=int, help="only the first so many photographs")
    group.add_argument("--shortlist-size", type=int, help="score each query's nearest alone (default: every pair)")
    group.add_argument("--threads", type=int, help="of onnxruntime")
    group.add_argument("--report", type=Path, metavar="JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Export, compare, quantise, measure."""
    prepare_terminal()
    options = parse_arguments(arguments)
    model, processor = load_model(
        options.model, dtype=torch.float32, device="cpu", trust_remote_code=options.trust_remote_code
    )
    report = export_onnx(
        model, processor, options.output, image_input=options.image_input, tolerance=options.tolerance
    )
    print(report)
    found: dict[str, Any] = {"export": report.as_dict()}
    precisions = ["float32"]
    if options.int8 is not None:
        found["int8_megabytes"] = quantize_onnx(options.output, options.int8 or PARTS)
        print("int8: " + ", ".join(f"{name} {size:.1f} MB" for name, size in found["int8_megabytes"].items()))
        precisions.append("int8")
    if options.data is not None:
        records = load_records(options, model, processor)
        found["recall"] = {precision: measure(options, precision, processor, records) for precision in precisions}
    if options.report is not None:
        options.report.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def load_records(options: argparse.Namespace, model: TVRNModel, processor: TVRNProcessor) -> Any:
    """Photographs, or their regions, with captions; regions of another tower or preprocessing are refused."""
    records = load_pairs(options.data, options.split, verify=False)
    if options.regions is not None:
        records = with_checked_regions(records, options.regions, model, processor)
    return records.select(range(options.images)) if options.images is not None else records


def measure(options: argparse.Namespace, precision: str, processor: TVRNProcessor, records: Any) -> dict[str, Any]:
    """Recall both ways by the pair score and by the embeddings alone, under onnxruntime."""
    model = OnnxModel(options.output, precision, threads=options.threads)
    started = time.perf_counter()
    images, texts, rows = encode(model, processor, records)
    encoded = time.perf_counter()
    cosines = images["images.embeds"] @ texts["texts.embeds"].T
    if options.shortlist_size is None:
        logits = model.match(images, texts)
    else:
        logits = match_nearest(model, images, texts, cosines, options.shortlist_size)
    seconds = {"encoding": encoded - started, "pairs": time.perf_counter() - encoded}
    pair, embeddings = retrieval_metrics(logits, rows), retrieval_metrics(cosines, rows)
    print(f"{precision}: {len(rows)} captions, {seconds['encoding']:.0f} s encoding, {seconds['pairs']:.0f} s pairs")
    print(f"  pair score  {recalls(pair)}\n  embeddings  {recalls(embeddings)}", flush=True)
    return {"pair": pair.as_dict(), "embeddings": embeddings.as_dict(), "seconds": seconds}


def encode(model: OnnxModel, processor: TVRNProcessor, records: Any, batch_size: int = 64) -> tuple[Any, Any, Any]:
    """Both sides of all records, and the row of each caption's image."""
    parts = []
    for start in range(0, len(records), batch_size):
        batch = [records[row] for row in range(start, min(start + batch_size, len(records)))]
        if "image" in batch[0]:
            parts.append(model.encode_images([record["image"] for record in batch]))
        else:
            given = {name: [record[name] for record in batch] for name in ("region_features", "region_boxes")}
            arrays = processor(**given, return_tensors="np")
            wanted = {each["name"] for each in model.manifest["graphs"]["image"]["inputs"]}
            parts.append(model.encode_images(**{name: arrays[name] for name in wanted}))
    captions = [caption for of_image in records.captions for caption in of_image]
    rows = np.repeat(np.arange(len(records)), [len(of_image) for of_image in records.captions])
    return cat(parts), model.encode_texts(captions), rows


def match_nearest(model: OnnxModel, images: Any, texts: Any, cosines: np.ndarray, size: int) -> np.ndarray:
    """Logits of each caption's and each image's nearest; −inf elsewhere, which counts as unscored."""
    logits = np.full(cosines.shape, -np.inf, np.float32)
    for column, nearest in enumerate(np.argsort(-cosines, axis=0)[:size].T):
        logits[nearest, column] = model.match(select(images, nearest), select(texts, [column]))[:, 0]
    for row, nearest in enumerate(np.argsort(-cosines, axis=1)[:, :size]):
        logits[row, nearest] = model.match(select(images, [row]), select(texts, nearest))[0]
    return logits


def recalls(metrics: RetrievalMetrics) -> str:
    """R@1, 5, 10 both ways and their sum."""
    both = (metrics.image_to_text, metrics.text_to_image)
    return "  ".join(" ".join(f"{way[k]:5.1f}" for k in (1, 5, 10)) for way in both) + f"  rSum {metrics.rsum:.1f}"


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        main()
    except (ValueError, ImportError, FileNotFoundError) as error:  # the user's to mend, and the message says how
        sys.exit(f"{type(error).__name__}: {error}")

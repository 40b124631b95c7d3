r"""Run a frozen vision backbone once over a data set and keep its regions, so that training does not run it again.

The regions of Flickr8k's photographs, 6 x 6 of MobileNetV2's map, in half precision (92 kB an image):

    python examples/extract_regions.py google/mobilenet_v2_1.0_224 --data flickr8k --split train \
        --grid-size 6 --output regions/flickr8k-train
    python examples/extract_regions.py google/mobilenet_v2_1.0_224 --data flickr8k --split validation \
        --grid-size 6 --output regions/flickr8k-validation

Patches of a ViT, computed in bfloat16 on a GPU, read by 8 processes:

    python examples/extract_regions.py facebook/dinov2-base --data flickr30k --split train --grid-size 7 \
        --compute-dtype bfloat16 --device cuda --num-workers 8 --batch-size 256 --output regions/flickr30k-train

A detector's boxes, given as a column of the data (lists of x1, y1, x2, y2, pixels or fractions):

    python examples/extract_regions.py microsoft/resnet-50 --data data/boxes.parquet --split train \
        --boxes-column boxes --max-regions 36 --output regions/boxes-train

Killed and started again, it goes on where it stopped. In Python:

    cache = RegionCache.load("regions/flickr8k-train", region_fingerprint(model, processor, records))
    records = with_regions(records, cache)      # now trained and evaluated on as before
"""

import argparse
import logging
import sys

import torch

from modeling_tvrn import TVRNModel, TVRNProcessor
from modeling_tvrn.data import load_pairs
from modeling_tvrn.evaluation.provenance import command
from modeling_tvrn.teachers import RegionCache, resize_only
from modeling_tvrn.towers_tvrn import region_map


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about, _, commands = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=commands, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="Hub id or folder of any vision model with a map or patch tokens")
    parser.add_argument("--dual-encoder", action="store_true", help="the model is one: keep its embeddings as well")
    parser.add_argument("--data", required=True, help="what load_pairs reads: flickr8k, coco, a folder, a Hub id, ...")
    parser.add_argument("--split", help="train, validation, test, ... (may be left out where there is only one)")
    parser.add_argument("--output", required=True, help="folder of the cache")
    parser.add_argument("--grid-size", type=int, help="pool the map to G x G regions (default: the map as it is)")
    parser.add_argument("--boxes-column", help="column with boxes to pool the map in, instead of a grid")
    parser.add_argument("--max-regions", type=int, default=36, help="boxes kept of an image, the first (default 36)")
    parser.add_argument("--image-size", type=int, help="side in pixels that photographs are brought to")
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"], help="stored (default float16)")
    parser.add_argument(
        "--compute-dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of the backbone (default float32; bfloat16 is faster and not the regions that a float32 tower gives)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images at once (default 32)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode photographs (default 0)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--streaming", action="store_true", help="read the data as a stream, without a local copy")
    parser.add_argument("--verify", default="header", choices=["header", "full"], help="how corrupt images are found")
    parser.add_argument("--overwrite", action="store_true", help="drop what is in the output folder")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code from the model's repository")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> RegionCache:
    """Build the cache that the command line asks for."""
    options = parse_arguments(arguments)
    trust = options.trust_remote_code
    model, processor = load(options, trust)
    model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cache = RegionCache.build(
        model,
        processor,
        read_records(options),
        options.output,
        batch_size=options.batch_size,
        dtype=options.dtype,
        compute_dtype=options.compute_dtype,
        num_workers=options.num_workers,
        overwrite=options.overwrite,
        info={
            "backbone": options.model,
            "command": command(),
            "data": options.data,
            "split": options.split,
        },
        **box_settings(options, model, processor),
    )
    print(f"{cache}\n{cache.info['seconds']} s in this run, {cache.store.bytes / 1e6:.1f} MB")
    return cache


def load(options: argparse.Namespace, trust: bool) -> tuple[TVRNModel, TVRNProcessor]:
    """The tower as a model whose other parts nobody uses; a dual encoder whole, for its embeddings."""
    if options.dual_encoder:
        unused = {"use_late_interaction": False, "use_reasoning": False}
        model = TVRNModel.from_dual_encoder(options.model, vision_grid_size=options.grid_size, **unused)
        return model.eval(), TVRNProcessor.from_dual_encoder(options.model)
    sizes = {"hidden_size": 8, "projection_size": 8, "similarity_size": 8}
    grid = {"freeze_vision": True, "vision_grid_size": options.grid_size}
    model = TVRNModel.from_backbones(vision=options.model, trust_remote_code=trust, **grid, **sizes).eval()
    return model, TVRNProcessor.from_backbones(options.model, image_size=options.image_size, trust_remote_code=trust)


def box_settings(options: argparse.Namespace, model: TVRNModel, processor: TVRNProcessor) -> dict:
    """How boxes become regions; nothing where the regions are a grid."""
    if options.boxes_column is None:
        return {}
    if options.grid_size is not None:
        raise SystemExit("--grid-size and --boxes-column are two ways to choose regions: give one of them")
    resize_only(processor.image_processor)
    tower = model.vision_model

    def feature_map(pixels: torch.Tensor) -> torch.Tensor:
        return region_map(tower(pixel_values=pixels), pixels, tower.config)

    return {"boxes_column": options.boxes_column, "max_regions": options.max_regions, "feature_map": feature_map}


def read_records(options: argparse.Namespace):
    """The data set; its table's boxes come along where they are wanted."""
    extra = {} if options.boxes_column is None else {"extra_columns": [options.boxes_column]}
    if options.streaming:
        return load_pairs(options.data, options.split, streaming=True, **extra)
    return load_pairs(options.data, options.split, verify=options.verify, **extra)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        main()
    except (ValueError, FileNotFoundError) as error:  # the user's to mend, and the message says how
        sys.exit(f"{type(error).__name__}: {error}")

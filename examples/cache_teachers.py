r"""Run frozen teachers once over a data set and keep their vectors, for training with CUSA.

An image teacher and a text teacher of Flickr8k's training split:

    python examples/cache_teachers.py facebook/dinov2-base --modality image --data flickr8k --split train \
        --output teachers/dinov2-train
    python examples/cache_teachers.py sentence-transformers/all-mpnet-base-v2 --modality text --data flickr8k \
        --split train --output teachers/mpnet-train

Several processes, each with its part of the data, joined when all are done:

    torchrun --nproc_per_node 4 examples/cache_teachers.py facebook/dinov2-large --modality image --data coco \
        --split train --output teachers/dinov2-coco

The mean of cached regions (examples/extract_regions.py), without another pass over the photographs:

    python examples/cache_teachers.py --regions regions/flickr8k-train --modality image --data flickr8k --split train \
        --output teachers/regions-train

Killed and started again, it goes on where it stopped. Then train with

    python examples/train.py --config examples/configs/flickr8k.yaml cusa=true \
        cusa_image_teacher=teachers/dinov2-train cusa_text_teacher=teachers/mpnet-train
"""

import argparse
import logging
import sys

import torch
from accelerate import PartialState

from modeling_tvrn.data import load_pairs
from modeling_tvrn.evaluation.provenance import command
from modeling_tvrn.teachers import RegionCache, Teacher, TeacherCache


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about, _, commands = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=commands, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", nargs="?", help="Hub id or folder of any model that AutoModel loads")
    parser.add_argument("--regions", metavar="CACHE", help="region cache whose means are the vectors, no teacher")
    parser.add_argument("--modality", required=True, choices=["image", "text"])
    parser.add_argument("--data", required=True, help="what load_pairs reads: flickr8k, coco, a folder, a Hub id, ...")
    parser.add_argument("--split", help="train, validation, ... (may be left out where there is only one)")
    parser.add_argument("--output", required=True, help="folder of the cache")
    parser.add_argument(
        "--pooling",
        choices=["features", "pooler", "cls", "mean", "max", "last"],
        help="how the output becomes one vector (default: what the model was trained for)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the teacher on the Hub")
    parser.add_argument("--max-length", type=int, help="tokens at which captions are cut (default: the teacher's)")
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"], help="stored (default float16)")
    parser.add_argument("--compute-dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch-size", type=int, default=64, help="items at once (default 64)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode photographs (default 0)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--streaming", action="store_true", help="read the data as a stream, without a local copy")
    parser.add_argument("--overwrite", action="store_true", help="drop what is in the output folder")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code from the teacher's repository")
    options = parser.parse_args(arguments)
    if (options.teacher is None) == (options.regions is None):
        parser.error("give either a teacher, by Hub id or folder, or --regions")
    return options


def main(arguments: list[str] | None = None) -> TeacherCache:
    """Build the cache that the command line asks for."""
    options = parse_arguments(arguments)
    if options.regions is not None:
        return from_regions(options)
    state = PartialState(cpu=options.device == "cpu" or not torch.cuda.is_available())
    teacher = Teacher.from_pretrained(
        options.teacher,
        options.modality,
        pooling=options.pooling,
        dtype=options.compute_dtype,
        device=options.device or state.device,
        max_length=options.max_length,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    cache = TeacherCache.build(
        teacher,
        load_pairs(options.data, options.split, streaming=options.streaming),
        options.output,
        batch_size=options.batch_size,
        dtype=options.dtype,
        num_workers=options.num_workers,
        process=state.process_index,
        processes=state.num_processes,
        overwrite=options.overwrite,
        info={"command": command(), "data": options.data, "split": options.split},
        progress=state.is_local_main_process,
    )
    state.wait_for_everyone()
    if state.num_processes > 1:
        if state.is_main_process:
            TeacherCache.join(options.output)
        state.wait_for_everyone()
        cache = TeacherCache.load(options.output)
    if state.is_main_process:
        print(f"{cache}, pooling {teacher.pooling!r}, {cache.store.bytes / 1e6:.1f} MB")
    return cache


def from_regions(options: argparse.Namespace) -> TeacherCache:
    """Vectors from a region cache, in one process: there is next to nothing to compute."""
    records, regions = load_pairs(options.data, options.split), RegionCache.load(options.regions)
    cache = TeacherCache.from_regions(
        regions, records, options.output, dtype=options.dtype, overwrite=options.overwrite
    )
    print(f"{cache}, means of {regions}, {cache.store.bytes / 1e6:.1f} MB")
    return cache


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        main()
    except (ValueError, FileNotFoundError) as error:  # the user's to mend, and the message says how
        sys.exit(f"{type(error).__name__}: {error}")

"""Evaluate checkpoints on image-text retrieval by a named protocol, and print where every number comes from.

    python examples/evaluate_retrieval.py runs/flickr8k --data flickr8k --split validation

The protocol of the test split, on cached regions, two checkpoints averaged, kept as JSON:

    python examples/evaluate_retrieval.py runs/saf runs/sgr --data flickr30k --split test --protocol flickr30k-1k \
        --regions regions/flickr30k-test --output report.json

Search by embeddings and rerank 128 candidates a query, beside exhaustive scoring:

    python examples/evaluate_retrieval.py runs/coco --data coco --split test --protocol coco-5k \
        --shortlist-size 128 --exhaustive --dtype bfloat16

Is a model better than another? Paired bootstrap over the queries:

    python examples/evaluate_retrieval.py runs/new --data flickr8k --split validation --compare runs/old

Within one modality: captions of the same photograph, images of the same label, sentence pairs with human grades:

    python examples/evaluate_retrieval.py runs/cusa --protocol unimodal --data flickr8k --split validation \
        --sentence-pairs stsb/validation.parquet --image-labels labels.csv

More positives for COCO's test split (pip install "modeling-tvrn[eval]"), and human grades of pairs:

    python examples/evaluate_retrieval.py runs/coco --data coco --split test --protocol eccv-caption
    python examples/evaluate_retrieval.py runs/coco --data coco --split test --protocol cxc --cxc CxC/data
    python examples/evaluate_retrieval.py runs/flickr8k --data FOLDER --protocol graded --grades ExpertAnnotations.txt

Long runs: finished blocks are kept, so the same command goes on after a crash; several processes share the blocks:

    torchrun --nproc-per-node 2 examples/evaluate_retrieval.py runs/coco --data coco --split test --protocol coco-5k \
        --blocks blocks/coco --memory-budget 2
"""

import argparse
import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from modeling_tvrn import TVRNModel, TVRNProcessor, load_model
from modeling_tvrn.cli.common import prepare_terminal
from modeling_tvrn.data import load_pairs
from modeling_tvrn.evaluation import (
    PROTOCOLS,
    EvaluationReport,
    GradedPairs,
    SentencePairs,
    evaluate,
    evaluate_graded,
    evaluate_unimodal,
    read_image_labels,
)
from modeling_tvrn.metrics import paired_bootstrap
from modeling_tvrn.storage.fingerprints import digest
from modeling_tvrn.teachers import with_checked_regions


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about, _, commands = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=commands, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder or Hub id; several are averaged")
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        help="what load_pairs reads: flickr8k, coco, scenes, a folder, a Hub id (not needed for sentence pairs alone)",
    )
    group.add_argument("--split", help="train, validation, test, ... (may be left out where there is only one)")
    group.add_argument(
        "--data-option", action="append", default=[], metavar="KEY=VALUE", help="option of load_pairs; may be repeated"
    )
    group.add_argument(
        "--regions",
        nargs="+",
        default=[],
        metavar="CACHE",
        help="region cache in place of pictures: one for all models, or one for each, those to compare with last",
    )
    group.add_argument("--num-workers", type=int, default=0, help="processes that decode pictures (default 0)")
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--protocol",
        default="validation",
        choices=[*PROTOCOLS, "unimodal", "graded"],
        help="default: validation, any size; unimodal: within texts and within images; graded: human grades of pairs",
    )
    group.add_argument(
        "--grades", type=Path, metavar="FILE", help="graded: image, caption id and grades, as Flickr8k-Expert's file"
    )
    group.add_argument("--cxc", type=Path, metavar="FOLDER", help="cxc: with sis_test.csv and sts_test.csv")
    group.add_argument(
        "--sentence-pairs",
        type=Path,
        metavar="FILE",
        help="unimodal: parquet or CSV with sentence1, sentence2, score (STS benchmark): rank correlation",
    )
    group.add_argument(
        "--image-labels",
        type=Path,
        metavar="FILE",
        help="unimodal: CSV with image_id, label, or a JSON object: recall of images of the same label",
    )
    group.add_argument("--shortlist-size", type=int, metavar="K", help="search K candidates a query and rerank them")
    group.add_argument("--exhaustive", action="store_true", help="beside a shortlist, also score every pair")
    group.add_argument("--no-embeddings", action="store_true", help="leave out the recalls of the embeddings alone")
    group.add_argument(
        "--compare", nargs="+", default=[], metavar="OTHER", help="a baseline (several are averaged): paired bootstrap"
    )
    group.add_argument("--output", type=Path, metavar="FILE", help="write the report as JSON")
    group = parser.add_argument_group("how")
    group.add_argument(
        "--batch-size", type=int, default=64, help="images, and captions, encoded at a time (default 64)"
    )
    group.add_argument("--chunk-size", type=int, help="pairs scored at a time (default: the model's own choice)")
    group.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of model and scores (default float32)"
    )
    group.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code that a model's tokenizer or image processor brings"
    )
    group.add_argument(
        "--memory-budget", type=float, default=1.0, metavar="GB", help="of blocks beside the gallery (default 1)"
    )
    group.add_argument("--blocks", type=Path, metavar="FOLDER", help="keep finished blocks, to go on after a crash")
    options = parser.parse_args(arguments)
    if options.exhaustive and options.shortlist_size is None:
        parser.error("--exhaustive goes with --shortlist-size; without one every pair is scored anyway")
    if options.data is None and (options.protocol != "unimodal" or options.sentence_pairs is None):
        parser.error("--data is needed, except by --protocol unimodal with --sentence-pairs")
    if options.protocol != "unimodal" and (options.sentence_pairs or options.image_labels):
        parser.error("--sentence-pairs and --image-labels go with --protocol unimodal")
    if (options.protocol == "graded") != (options.grades is not None):
        parser.error("--protocol graded and --grades FILE go together")
    if options.cxc is not None and options.protocol != "cxc":
        parser.error("--cxc goes with --protocol cxc")
    count = len(options.models) + len(options.compare)
    if len(options.regions) not in (0, 1, count):
        parser.error(f"--regions names {len(options.regions)} caches for {count} models; give one, or one for each")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Evaluate, print, and write the report that the command line asks for."""
    prepare_terminal()
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        with processes():
            {"unimodal": run_unimodal, "graded": run_graded}.get(options.protocol, run)(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"evaluate_retrieval.py: {error}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Joins the processes that torchrun started, of which the first one speaks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        with contextlib.nullcontext() if speaks() else contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        dist.destroy_process_group()


def speaks() -> bool:
    """Whether this process prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def write(options: argparse.Namespace, found: Any) -> None:
    """Keep a report as JSON where that was asked for."""
    if options.output is not None and speaks():
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def run_graded(options: argparse.Namespace) -> None:
    """The protocol of human grades, of each model by itself."""
    records, pairs = read_records(options), GradedPairs.read(options.grades)
    each_by_itself(options, records, lambda *system: evaluate_graded(*system, pairs, options.batch_size))


def read_records(options: argparse.Namespace) -> Any:
    """The data set that the command line names."""
    data_options = dict(
        yaml.safe_load(f"{{{option.replace('=', ': ', 1)}}}").popitem() for option in options.data_option
    )
    return load_pairs(options.data, options.split, **data_options)


def run_unimodal(options: argparse.Namespace) -> None:
    """The protocol within one modality, of each model by itself."""
    records = read_records(options) if options.data is not None else None
    pairs = SentencePairs.read(options.sentence_pairs) if options.sentence_pairs is not None else None
    labels = read_image_labels(options.image_labels) if options.image_labels is not None else None
    each_by_itself(options, records, lambda *system: evaluate_unimodal(*system, labels, pairs, options.batch_size))


def each_by_itself(options: argparse.Namespace, records: Any, evaluated: Callable[..., Any]) -> None:
    """Print and write the report that `evaluated(model, processor, inputs)` makes of each checkpoint."""
    reports = []
    for name, *system in systems(options, records):
        report = evaluated(*system)
        reports.append(report.as_dict() | {"model": name})
        print(f"\n{name}\n{report.table()}")
    write(options, reports)


def systems(
    options: argparse.Namespace, records: Any, which: slice = slice(None)
) -> Iterator[tuple[str, TVRNModel, TVRNProcessor, Any]]:
    """Checkpoints, those to compare with last: name, model, processor, records with its cached regions if there are.

    A cache of another tower or preprocessing is refused.
    """
    names = [*options.models, *options.compare]
    folders = options.regions if len(options.regions) > 1 else (options.regions or [None]) * len(names)
    for name, folder in list(zip(names, folders, strict=True))[which]:
        trusted = options.trust_remote_code
        model, processor = load_model(
            name, dtype=getattr(torch, options.dtype), device=options.device, trust_remote_code=trusted
        )
        inputs = records
        if folder is not None:
            # whose weights the cache names
            exact = model
            if options.dtype != "float32":
                exact = load_model(name, dtype=torch.float32, device="cpu", trust_remote_code=trusted)[0]
            inputs = with_checked_regions(records, folder, exact, processor)
        yield name, model, processor, inputs


def run(options: argparse.Namespace) -> None:
    """Everything but the command line."""
    records = read_records(options)
    report = measure(options, records, slice(len(options.models)))
    print(report.table())
    written = report.as_dict()
    if options.compare:
        baseline = measure(options, records, slice(len(options.models), None))
        comparison = paired_bootstrap(report.metrics, baseline.metrics)
        print(f"\nBaseline\n\n{baseline.table()}\n\nPaired bootstrap over queries, percent points\n")
        print(comparison.table())
        written |= {"baseline": baseline.as_dict(), "comparison": vars(comparison)}
    write(options, written)


def measure(options: argparse.Namespace, records: Any, which: slice) -> EvaluationReport:
    """Load some of the checkpoints and evaluate them, averaged where there are several."""
    names, models, processors, inputs = zip(*systems(options, records, which), strict=True)
    return evaluate(
        list(models),
        list(processors),
        inputs,
        options.protocol,
        batch_size=options.batch_size,
        chunk_size=options.chunk_size,
        shortlist_size=options.shortlist_size,
        exhaustive=options.exhaustive or options.shortlist_size is None,
        embeddings=not options.no_embeddings,
        data=options.data,
        seeds=[seed for seed in map(trained_seed, names) if seed is not None],
        num_workers=options.num_workers,
        memory_budget=options.memory_budget,
        # Models to compare with have blocks of their own.
        folder=options.blocks / digest(sorted(names))[:12] if options.blocks is not None else None,
        cxc_folder=options.cxc,
    )


def trained_seed(name: str) -> int | None:
    """The seed that training left beside a checkpoint, where it is a folder."""
    results = Path(name) / "results.json"
    return json.loads(results.read_text(encoding="utf-8")).get("seed") if results.is_file() else None


if __name__ == "__main__":
    sys.exit(main())

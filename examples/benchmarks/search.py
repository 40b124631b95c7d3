r"""What a search costs and what it misses: photographs with a trained model, and many synthetic items.

Flickr8k's validation photographs, one caption of each as a query; recall is against scoring every pair exhaustively:

    python examples/benchmarks/search.py photographs runs/flickr8k-s0 --data DATA --regions REGIONS/validation

100,000 items of a small model with random weights, encoded features and all, through the index; or vectors alone in
every precision and engine:

    python examples/benchmarks/search.py items --items 100000
    python examples/benchmarks/search.py vectors --items 100000 --size 512 --engines exact hnsw
"""

import argparse
import itertools
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from origin import say_origin

from modeling_tvrn import EncodedImages, TVRNConfig, TVRNModel, TVRNProcessor
from modeling_tvrn.data import load_pairs
from modeling_tvrn.index import ImageTextIndex
from modeling_tvrn.index.vectors import PRECISIONS, VectorSearch
from modeling_tvrn.teachers import RegionCache, with_regions

WORDS = [f"word{number}" for number in range(400)]
REGIONS, FEATURES = 9, 64  # of a synthetic item


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    about, _, commands = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=commands, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    photographs = verbs.add_parser("photographs")
    photographs.add_argument("model")
    photographs.add_argument("--data", required=True)
    photographs.add_argument("--split", default="validation")
    photographs.add_argument("--regions", required=True, help="folder of the region cache of that split")
    photographs.add_argument("--shortlist-sizes", type=int, nargs="+", default=[16, 64, 256])
    items, vectors = verbs.add_parser("items"), verbs.add_parser("vectors")
    vectors.add_argument("--size", type=int, default=512)
    for verb in (items, vectors):
        verb.add_argument("--engines", nargs="+", default=["exact", "hnsw"], choices=["exact", "hnsw"])
        verb.add_argument("--items", type=int, default=100_000)
    for verb in (photographs, items, vectors):
        verb.add_argument("--queries", type=int, default=200)
        verb.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
        verb.add_argument("--output", help="JSON lines, one a setting")
        verb.add_argument(
            "--cpu-time", action="store_true", help="CPU time in place of wall time, for a busy machine and one thread"
        )
    return parser.parse_args()


def say(options: argparse.Namespace, row: dict) -> None:
    """One setting's figures, at once: a long run that is stopped has told what it knows."""
    line = json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    print(line, flush=True)
    if options.output:
        with Path(options.output).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def percentiles(seconds: list[float], name: str) -> dict[str, float]:
    """p50 and p99 in milliseconds."""
    low, high = np.percentile(np.array(seconds) * 1000, [50, 99])
    return {f"{name}_ms_p50": float(low), f"{name}_ms_p99": float(high)}


def timed_searches(index: ImageTextIndex, queries: list[str], **options) -> tuple[list[list[str]], dict]:
    """Ids of each query's hits, and the costs."""
    found = [index.search(text=query, **options) for query in queries]
    costs = {}
    for part in ("encode", "shortlist", "rerank"):
        costs |= percentiles([hits.seconds[part] for hits in found], part)
    return [[hit.id for hit in hits] for hits in found], costs


def overlap(found: list[list[str]], truth: list[list[str]]) -> dict[str, float]:
    """How much of the exhaustive ranking's top comes back, percent."""
    same = [len(set(a[:10]) & set(b[:10])) / len(b[:10]) for a, b in zip(found, truth, strict=True)]
    first = [a[0] == b[0] for a, b in zip(found, truth, strict=True)]
    return {"top1_as_exhaustive": 100 * float(np.mean(first)), "top10_as_exhaustive": 100 * float(np.mean(same))}


def photographs(options: argparse.Namespace) -> None:
    """A trained model and real photographs."""
    model = TVRNModel.from_pretrained(options.model).eval()
    processor = TVRNProcessor.from_pretrained(options.model)
    records = with_regions(load_pairs(options.data, options.split, verify=False), RegionCache.load(options.regions))
    rows = np.random.default_rng(0).permutation(len(records))[: options.queries].tolist()
    queries = [records.captions[row][0] for row in rows]
    wanted = [str(records.image_ids[row]) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        truth: list[list[str]] = []
        for precision in options.precisions:
            index = ImageTextIndex.build(model, processor, records, folder, precision=precision, progress=False)
            report = index.report
            say(options, {"precision": precision, **{k: v for k, v in report.as_dict().items() if k != "skipped"}})
            if not truth:
                truth, costs = timed_searches(index, queries, shortlist_size=len(index))
                say(options, {"search": "exhaustive", **costs, **right(truth, wanted)})
            for size in options.shortlist_sizes:
                found, costs = timed_searches(index, queries, shortlist_size=size)
                row = {"precision": precision, "shortlist_size": size, **costs}
                say(options, row | overlap(found, truth) | right(found, wanted))


def right(found: list[list[str]], wanted: list[str]) -> dict[str, float]:
    """Recall of the caption's own photograph, percent."""
    places = [ids.index(want) if want in ids else 99 for ids, want in zip(found, wanted, strict=True)]
    return {f"R@{k}": 100 * float(np.mean(np.array(places) < k)) for k in (1, 5, 10)}


def items(options: argparse.Namespace) -> None:
    """Synthetic items with features for reranking."""
    torch.manual_seed(0)
    processor = TVRNProcessor.from_captions([" ".join(WORDS)])
    sizes = {"hidden_size": 64, "projection_size": 512, "similarity_size": 32, "word_embedding_size": 32}
    vocabulary = {"vocab_size": len(processor.tokenizer), "region_feature_size": FEATURES}
    model = TVRNModel(TVRNConfig(**sizes, **vocabulary, pooled_hidden_size=0)).eval()
    started = time.perf_counter()
    gallery = EncodedImages.cat([synthetic(model, count) for count in chunks(options.items, 2000)])
    say(options, {"items": len(gallery), "encoding_seconds": time.perf_counter() - started})
    random = np.random.default_rng(1)
    queries = [" ".join(random.choice(WORDS, 8)) for _ in range(options.queries)]
    with tempfile.TemporaryDirectory() as folder:
        truth: list[list[str]] = []
        for engine, precision in itertools.product(options.engines, options.precisions):
            index = ImageTextIndex.build(
                model,
                processor,
                gallery,
                folder,
                precision=precision,
                engine=engine,
                segment_size=4096,
                progress=False,
            )
            say(options, {k: v for k, v in index.report.as_dict().items() if k != "skipped"})
            if not truth:
                exact = np.argsort(-embeds(model, processor, queries) @ gallery.embeds.numpy().T, axis=1)[:, :64]
                truth = [[str(row) for row in rows] for rows in exact]
            found, costs = timed_searches(index, queries, limit=64, shortlist_size=64)
            same = [len(set(a) & set(b)) / 64 for a, b in zip(found, truth, strict=True)]
            row = {"engine": engine, "precision": precision, **costs}
            say(options, row | {"shortlist_as_exact": 100 * float(np.mean(same)), "peak_gigabytes": peak_gigabytes()})


@torch.no_grad()
def synthetic(model: TVRNModel, count: int) -> EncodedImages:
    """Encoded images in clusters, as photographs are; half precision where the index keeps no more."""
    centres = torch.randn(50, 1, FEATURES)[torch.randint(0, 50, (count,))]
    corners = torch.rand(count, REGIONS, 2) * 0.6
    boxes = torch.cat([corners, corners + 0.3], dim=-1)
    return model.encode_images(
        region_features=centres + 0.7 * torch.randn(count, REGIONS, FEATURES), region_boxes=boxes
    ).to(torch.float16)


@torch.no_grad()
def embeds(model: TVRNModel, processor: TVRNProcessor, queries: list[str]) -> np.ndarray:
    """(n, P) embeddings of texts."""
    return model.encode_texts(**processor(text=queries)).embeds.numpy()


def peak_gigabytes() -> float:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def chunks(total: int, step: int) -> list[int]:
    """Sizes that sum to `total`."""
    return [min(step, total - start) for start in range(0, total, step)]


def vectors(options: argparse.Namespace) -> None:
    """Vectors alone, in clusters; queries between them."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((500, options.size), np.float32)
    kinds = random.integers(0, 500, options.items)
    stored = centres[kinds] + random.standard_normal((options.items, options.size), np.float32)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    queries = stored[random.integers(0, options.items, (options.queries, 2))].sum(axis=1)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    truth = np.argsort(-queries @ stored.T, axis=1)[:, :10]
    for engine in options.engines:
        for precision in options.precisions:
            started = time.perf_counter()
            search = VectorSearch(stored, precision, engine)
            search.train()
            built = time.perf_counter() - started
            found, seconds = [], []
            for query in queries:
                started = time.perf_counter()
                found.append(search.search(query, 10)[0])
                seconds.append(time.perf_counter() - started)
            recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=True)])
            row = {"items": options.items, "size": options.size, "engine": engine, "precision": precision}
            row |= {"build_seconds": built, **percentiles(seconds, "query"), "recall_at_10": 100 * float(recall)}
            say(options, row | {"bytes_an_item": search.bytes / options.items})


if __name__ == "__main__":
    arguments = parse_arguments()
    say_origin(arguments)
    if arguments.cpu_time:
        time.perf_counter = time.process_time  # of the index as well, which tells the parts of a search
    {"photographs": photographs, "items": items, "vectors": vectors}[arguments.verb](arguments)

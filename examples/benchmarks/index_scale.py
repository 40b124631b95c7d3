r"""A million vectors on one machine, and what the regions of an image take on disk.

    python examples/benchmarks/index_scale.py make FOLDER --items 1000000 --size 512
    nice python examples/benchmarks/index_scale.py measure FOLDER --precision int8 --engine hnsw --output scale.jsonl
    python examples/benchmarks/index_scale.py regions runs/flickr8k --data flickr8k --split validation --regions CACHE

`make` writes vectors that are spread as embeddings are: 20,000 clusters whose centres and members have the spectrum of
a trained model's image embeddings (the j-th component's variance falls as (j + 80)^-4: 64 of 512 hold 83 % of it; a
random basis; a common mean of length 0.33); members are 40 % of the variance, so that two of a cluster have a cosine
of about 0.65. A query is an item and as much noise of that spectrum as brings their cosine to about 0.6. Exact
neighbours are written too.

`measure` builds one search over the float32 vectors, mapped from disk, and then opens it in a process of its own,
whose memory is that of a search. Seconds of CPU stand beside those of the clock: they are what a busy machine leaves
comparable. `regions` reranks a shortlist from what each region storage of an index keeps: kB an image against rSum.
"""

import argparse
import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from origin import say_origin
from shortlist import encoded

from modeling_tvrn import EncodedImages, TVRNModel
from modeling_tvrn.index.coded import BITS, REGION_STORAGE, restored, stored
from modeling_tvrn.index.segments import widened
from modeling_tvrn.index.vectors import ENGINES, PRECISIONS, VectorSearch
from modeling_tvrn.scoring import RaggedTexts, search_then_rerank
from modeling_tvrn.storage.tensors import TensorFile, write_tensors

CLUSTERS, MEMBERS, MEAN = 20_000, 0.4, 0.33
QUERY_COSINE, QUERIES, NEAREST = 0.6, 500, 10
BLOCK = 20_000


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    about, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    make, measure = verbs.add_parser("make"), verbs.add_parser("measure")
    for verb in (make, measure):
        verb.add_argument("folder", type=Path)
    make.add_argument("--items", type=int, default=1_000_000)
    make.add_argument("--size", type=int, default=512)
    measure.add_argument("--precision", choices=PRECISIONS, default="int8")
    measure.add_argument("--engine", choices=ENGINES, default="hnsw")
    measure.add_argument("--queries", type=int, default=QUERIES)
    regions = verbs.add_parser("regions")
    regions.add_argument("model", metavar="MODEL")
    regions.add_argument("--data", required=True)
    regions.add_argument("--split")
    regions.add_argument("--regions", metavar="CACHE")
    regions.add_argument("--encoded", type=Path, metavar="FOLDER", help="keep the encoded gallery here, or read it")
    regions.add_argument("--shortlist-size", type=int, default=48)
    for verb in (measure, regions):
        verb.add_argument("--output", type=Path, metavar="JSONL")
    return parser.parse_args()


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of norm 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make(options: argparse.Namespace) -> None:
    """Vectors, queries and each query's exact neighbours."""
    random = np.random.default_rng(0)
    size = options.size
    deviations = (np.arange(1, size + 1) + 80.0) ** -2
    basis = np.linalg.qr(random.standard_normal((size, size)))[0] * (deviations / np.linalg.norm(deviations))
    basis = np.ascontiguousarray(basis.T, np.float32)

    def spread(count: int, variance: float) -> np.ndarray:
        return np.sqrt(variance, dtype=np.float32) * (random.standard_normal((count, size), np.float32) @ basis)

    mean = MEAN * unit(random.standard_normal((1, size), np.float32))
    variance = 1 - MEAN**2
    centres = mean + spread(CLUSTERS, (1 - MEMBERS) * variance)
    vectors = np.empty((options.items, size), np.float32)
    for start in range(0, options.items, BLOCK):
        block = vectors[start : start + BLOCK]
        kinds = random.integers(0, CLUSTERS, len(block))
        block[:] = unit(centres[kinds] + spread(len(block), MEMBERS * variance))
    chosen = vectors[random.integers(0, options.items, QUERIES)]
    queries = unit(chosen + spread(QUERIES, QUERY_COSINE**-2 - 1))
    truth = np.empty((QUERIES, NEAREST), np.int64)
    cosines = np.full((QUERIES, NEAREST), -np.inf, np.float32)
    for start in range(0, options.items, BLOCK):
        found = np.concatenate([cosines, queries @ vectors[start : start + BLOCK].T], axis=1)
        numbers = np.concatenate([truth, np.tile(np.arange(start, start + found.shape[1] - NEAREST), (QUERIES, 1))], 1)
        best = np.argpartition(-found, NEAREST, axis=1)[:, :NEAREST]
        truth, cosines = np.take_along_axis(numbers, best, 1), np.take_along_axis(found, best, 1)
    options.folder.mkdir(parents=True, exist_ok=True)
    write_tensors(options.folder / "vectors.safetensors", {"embeds": vectors})
    write_tensors(options.folder / "queries.safetensors", {"queries": queries, "truth": truth})
    own = (queries * chosen).sum(axis=1)
    nearest, tenth = cosines.max(axis=1).mean(), cosines.min(axis=1).mean()
    print(f"cosine of a query: its item {own.mean():.2f} ± {own.std():.2f}, nearest {nearest:.2f}, tenth {tenth:.2f}")


def resident() -> tuple[float, float]:
    """Bytes an item of this process's memory: its own, and of mapped files that are read into it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(1024.0 * int(status[name].split()[0]) for name in ("RssAnon", "RssFile"))


def searched(folder: Path, precision: str, engine: str, count: int, pipe: Connection) -> None:
    """Open a saved search, and search: in a process that has built nothing."""
    mapped = TensorFile.open(folder / "vectors.safetensors").mapped()
    vectors = mapped.arrays["embeds"]
    own, files = resident()
    started = time.perf_counter(), time.process_time()
    search = VectorSearch(vectors, precision, engine)
    search.load(folder)
    mapped.release()
    row = {"open_seconds": time.perf_counter() - started[0], "open_cpu_seconds": time.process_time() - started[1]}
    arrays = TensorFile.open(folder / "queries.safetensors").mapped().arrays
    wall, cpu, right = [], [], []
    for query, truth in zip(arrays["queries"][:count], arrays["truth"][:count], strict=True):
        started = time.perf_counter(), time.process_time()
        rows = search.search(query, NEAREST)[0]
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
        right.append(len(np.intersect1d(rows, truth)) / NEAREST)
    for name, seconds in (("ms", wall), ("cpu_ms", cpu)):
        row |= {f"query_{name}_p{p}": float(np.percentile(np.array(seconds) * 1000, p)) for p in (50, 99)}
    after = resident()
    row |= {"recall_at_10": 100 * float(np.mean(right)), "bytes_an_item": search.bytes / len(vectors)}
    pipe.send(row | {"own_megabytes": (after[0] - own) / 1e6, "mapped_megabytes": (after[1] - files) / 1e6})


def measure(options: argparse.Namespace) -> None:
    """One search: built here, opened and searched by another process."""
    vectors = TensorFile.open(options.folder / "vectors.safetensors").mapped().arrays["embeds"]
    started = time.perf_counter(), time.process_time()
    search = VectorSearch(vectors, options.precision, options.engine)
    search.train()
    search.save(options.folder)
    row = {"precision": options.precision, "engine": search.engine, "items": len(vectors), "size": vectors.shape[1]}
    row |= {"build_seconds": time.perf_counter() - started[0], "build_cpu_seconds": time.process_time() - started[1]}
    row |= {"build_own_megabytes": resident()[0] / 1e6}
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    asked = (options.folder, options.precision, search.engine, options.queries, there)
    del search
    child = context.Process(target=searched, args=asked)
    child.start()
    there.close()  # so that a child that dies is not waited for
    row |= here.recv()
    child.join()
    say(options, row)


@torch.no_grad()
def regions(options: argparse.Namespace) -> None:
    """rSum of search and rerank, with images as each storage gives them back."""
    model = TVRNModel.from_pretrained(options.model).eval()
    images, texts, rows = encoded(options, model)
    texts = RaggedTexts.of(texts)
    for storage in ("float32", *REGION_STORAGE):
        kept = images.to(torch.float16) if storage == "float16" else images
        if storage in BITS:
            kept = stored(images.at_level("late_interaction"), storage)
        size = sum(value[0].numel() * value.element_size() for value in kept.tensors().values())
        started = time.process_time()
        back = EncodedImages(**restored(widened(kept.tensors())), model_fingerprint=images.model_fingerprint)
        back = model.complete_images(back) if storage in BITS else back
        restoring = 1000 * (time.process_time() - started) / len(images)
        found = search_then_rerank(model, back, texts, rows, options.shortlist_size, progress=False)
        row = {"storage": storage, "kilobytes_an_image": size / 1000, "rsum": found.rsum}
        say(options, row | {"restoring_cpu_ms_an_image": restoring, "image_to_text_R@1": found.image_to_text[1]})


def say(options: argparse.Namespace, row: dict) -> None:
    """One setting's figures, at once."""
    line = json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    print(line, flush=True)
    if options.output:
        with options.output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    arguments = parse_arguments()
    say_origin(arguments)
    {"make": make, "measure": measure, "regions": regions}[arguments.verb](arguments)

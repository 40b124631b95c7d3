"""How fast are pictures read from a stream, beside a bare PIL loop over the same files, and does memory grow?

    python examples/benchmarks/stream_loader.py --data FOLDER --split train --workers 0
    python examples/benchmarks/stream_loader.py --data FOLDER --split train --workers 2 --epochs 20

- `bare` decodes the encoded pictures, which lie in memory, to RGB with PIL alone, in as many processes as the loader.
- `stream` is what training reads: shards, shuffling, dealing, decoding (in the loader's workers), items of captions;
  every caption once, so that a picture is decoded for each of its captions, but for those in the same batch.
  Both decode the same pictures in the same order.
- Without workers both are timed in the process's CPU time, which a busy machine does not change.
- `growth`: resident memory of the main process after the last epoch less that after the second, in MB.
"""

import argparse
import io
import itertools
import multiprocessing
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from origin import say_origin
from torch.utils.data import DataLoader, Sampler

from modeling_tvrn.data import PairStream, RawItem, ShuffledStream, StreamItems, keep_image_memory, load_pairs

BATCH = 64


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="what load_pairs streams")
    parser.add_argument("--split", default="train")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0)
    return parser.parse_args()


class Epoch(Sampler[list[RawItem]]):
    """Batches of all captions of an epoch."""

    def __init__(self, stream: PairStream) -> None:
        self.stream = ShuffledStream(stream)

    def __iter__(self) -> Iterator[list[RawItem]]:
        items = (item for item, _ in itertools.takewhile(lambda pair: pair[1][0] == 0, self.stream.items()))
        while batch := list(itertools.islice(items, BATCH)):
            yield batch

    def pictures(self) -> list[bytes]:
        """The encoded pictures that are decoded, in their order."""
        found = []
        for batch in self:
            different = {item.pair.image_id: item.content["image"] for item in batch}
            found += [content["bytes"] if isinstance(content, dict) else content for content in different.values()]
        return found


def decode(contents: Sequence[bytes]) -> int:
    """Pixels of some encoded pictures, decoded."""
    return sum(PIL.Image.open(io.BytesIO(content)).convert("RGB").size[0] for content in contents)


def bare_rate(contents: list[bytes], workers: int) -> float:
    """Pictures a second of a loop over PIL."""
    parts = [contents[start : start + BATCH] for start in range(0, len(contents), BATCH)]
    if not workers:
        started = time.process_time()
        for part in parts:
            decode(part)
        return len(contents) / (time.process_time() - started)
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        pool.map(decode, parts[:workers])  # the processes are up
        started = time.perf_counter()
        pool.map(decode, parts, chunksize=1)
        return len(contents) / (time.perf_counter() - started)


def count(items: list[dict[str, Any]]) -> int:
    """In the place of collating: the pictures stay where they were decoded."""
    return len({id(item["record"]) for item in items})


def resident() -> float:
    """Resident memory in MB, now (Linux), else its peak."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    arguments = parse_arguments()
    say_origin(arguments)
    torch.set_num_threads(1)
    stream = load_pairs(arguments.data, split=arguments.split, streaming=True)
    keep_image_memory()
    sampler = Epoch(stream)
    contents = sampler.pictures()
    loader: DataLoader[Any] = DataLoader(
        StreamItems(stream),
        batch_sampler=sampler,
        collate_fn=count,
        num_workers=arguments.workers,
        worker_init_fn=keep_image_memory,
        persistent_workers=arguments.workers > 0,
    )
    used, bare, streamed = [], [], []
    for _ in range(arguments.epochs):  # in turn, so that a busy machine slows both
        bare.append(bare_rate(contents, arguments.workers))
        clock = time.perf_counter if arguments.workers else time.process_time
        started = clock()
        found = sum(loader)
        streamed.append(found / (clock() - started))
        used.append(resident())
    print(f"{len(contents)} pictures, {arguments.workers} workers, best of {arguments.epochs}")
    print(f"bare {max(bare):.0f} images/s, stream {max(streamed):.0f} images/s, ratio {max(streamed) / max(bare):.2f}")
    print(f"resident {used[-1]:.0f} MB, growth {used[-1] - used[min(1, len(used) - 1)]:.1f} MB")


if __name__ == "__main__":
    main()

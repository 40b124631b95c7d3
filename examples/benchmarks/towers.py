r"""Images a second of vision towers on a CPU by each engine, beside bare onnxruntime, in one run; and the recalls.

    python examples/benchmarks/towers.py --vision google/mobilenet_v2_1.0_224 --data flickr8k --split validation \
        --model runs/flickr8k --cpu-time

The backbone with its weights, ViT-B/32 (CLIP) and SigLIP-B/16 at 224 pixels with random ones. "decoding" is the graph
fed by one process that decodes and prepares the photographs, as `tvrn regions --num-workers 1` does. The rounds of all
ways alternate; the best of each counts. Graphs are made anew, in a temporary folder.
"""

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from origin import say_origin
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from modeling_tvrn import engines
from modeling_tvrn.data import load_pairs
from modeling_tvrn.evaluation.encoding import encode_captions, encode_images
from modeling_tvrn.front_door import load_model, load_region_model
from modeling_tvrn.metrics import retrieval_metrics
from modeling_tvrn.teachers.extraction import ImagePreparation
from modeling_tvrn.teachers.regions import PreparedBatches

BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VITS: dict[str, Callable[[], Any]] = {
    "vit-b-32": lambda: CLIPVisionModel(CLIPVisionConfig(**BASE, image_size=224, patch_size=32)),
    "siglip-b-16": lambda: SiglipVisionModel(SiglipVisionConfig(**BASE, image_size=224, patch_size=16)),
}
Way = Callable[[], Any]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", required=True, help="Hub id or folder of a backbone of convolutions")
    parser.add_argument("--data", default="flickr8k")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--model", help="whose recalls are measured, from pixels, by torch and by onnxruntime")
    parser.add_argument("--towers", nargs="*", default=list(VITS), choices=list(VITS))
    parser.add_argument("--images", type=int, default=64, help="photographs that are decoded")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--vit-batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--inductor", action="store_true", help="torch.compile with frozen weights as well (minutes)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cpu-time", action="store_true", help="this process's CPU time in place of wall time, for a busy machine"
    )
    return parser.parse_args()


def measure(ways: dict[str, Way], images: int, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Images a second of each way, the best of rounds that alternate, after one that is not counted."""
    best = dict.fromkeys(ways, float("inf"))
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = clock()
            way()
            if number:
                best[name] = min(best[name], clock() - started)
    return {name: images / seconds for name, seconds in best.items()}


def bare(cache: Path, threads: int) -> Callable[[Tensor], Any]:
    """The graph made last, by onnxruntime as anybody would run it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    newest = max(cache.rglob("*.onnx"), key=lambda path: path.stat().st_mtime)
    session = onnxruntime.InferenceSession(newest, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixels": pixels.numpy()})


def ways_of(tower: nn.Module, pixels: Tensor, cache: Path, arguments: argparse.Namespace) -> dict[str, Way]:
    plain, graph, folded = tower, copy.deepcopy(tower), copy.deepcopy(tower)
    engines.enable(graph, "onnxruntime")
    graph(pixel_values=pixels)  # makes the graph
    run, last = bare(cache, arguments.threads), pixels.contiguous(memory_format=torch.channels_last)
    ways: dict[str, Way] = {
        "torch": lambda: plain(pixel_values=pixels),
        "torch, channels-last pixels": lambda: plain(pixel_values=last),
        "onnxruntime": lambda: graph(pixel_values=pixels),
        "bare onnxruntime": lambda: run(pixels),
    }
    if any(isinstance(module, nn.BatchNorm2d) for module in tower.modules()):
        engines.enable(folded, "folded")
        ways["folded"] = lambda: folded(pixel_values=pixels)
    if arguments.inductor:
        import torch._inductor.config as inductor  # seconds, which the other ways need not wait

        inductor.freezing = True  # weights are constants, folded into what reads them
        compiled = torch.compile(copy.deepcopy(tower))
        ways["inductor, frozen"] = lambda: compiled(pixel_values=pixels)
        ways["inductor, frozen, channels-last pixels"] = lambda: compiled(pixel_values=last)
    return ways


def report(name: str, found: dict[str, float]) -> None:
    for way, rate in found.items():
        ratios = {"of_torch": rate / found["torch"], "of_bare": rate / found["bare onnxruntime"]}
        row = {"tower": name, "way": way, "images_a_second": round(rate, 2)}
        print(json.dumps(row | {key: round(value, 2) for key, value in ratios.items()}), flush=True)


def recalls(arguments: argparse.Namespace) -> None:
    """R@K of the embeddings from pixels, by torch and by onnxruntime, and how far the embeddings are apart."""
    model, processor = load_model(arguments.model, dtype=torch.float32, device="cpu")
    records = load_pairs(arguments.data, arguments.split)
    embeds, texts = {}, None
    for engine in ("torch", "onnxruntime"):
        engines.enable(model, engine)
        images, table = encode_images(model, processor, records, batch_size=32, num_workers=1)
        if texts is None:
            texts = encode_captions(model, processor, table.flat_captions).embeds
        embeds[engine] = images.embeds
        metrics = retrieval_metrics(images.embeds @ texts.T, table.caption_image_rows)
        print(json.dumps({"model": arguments.model, "engine": engine, "images": len(images), **metrics.as_dict()}))
    apart = float((embeds["torch"] - embeds["onnxruntime"]).abs().max())
    print(json.dumps({"model": arguments.model, "embeddings_apart": apart}), flush=True)


@torch.no_grad()
def main() -> None:
    """One line of JSON for each tower and way."""
    arguments = parse_arguments()
    say_origin(arguments)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        model, processor = load_region_model(arguments.vision, device="cpu")
        tower: Any = model.tower("vision")
        records = load_pairs(arguments.data, arguments.split)
        prepared = PreparedBatches(
            ImagePreparation(processor), _Rows(records, arguments.images), 0, arguments.batch_size
        )
        pixels = prepared[0]["pixel_values"]
        ways = ways_of(tower, pixels, Path(folder), arguments)
        found = measure(ways, len(pixels), arguments.rounds, clock)
        engines.enable(model, "onnxruntime")

        def decoding() -> None:
            for batch in DataLoader(prepared, batch_size=None, num_workers=1):
                tower(pixel_values=batch["pixel_values"])

        found |= {
            f"decoding, {way}": rate
            for way, rate in measure({"onnxruntime": decoding}, arguments.images, 2, clock).items()
        }
        report(Path(arguments.vision).name, found)
        for name in arguments.towers:
            vit = VITS[name]().eval()
            pixels = torch.randn(arguments.vit_batch_size, 3, 224, 224)
            ways = ways_of(vit, pixels, Path(folder), arguments)
            report(name, measure(ways, len(pixels), arguments.rounds, clock))
        if arguments.model:
            recalls(arguments)


class _Rows:
    """The first records, decoded by whoever asks for one."""

    def __init__(self, records: Any, count: int) -> None:
        self.records, self.count = records, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Any:
        return self.records[row]


if __name__ == "__main__":
    main()

"""What each component of the pair score brings: first stage, late interaction, reasoning, alone and together.

    python examples/benchmarks/terms.py runs/flickr8k --data flickr8k --split validation --regions regions/validation

Scores every image against every caption once (bfloat16 unless --float32) and prints R@K and rSum, percent, of every
sum of components, weighted as the model has learned to, and by paired bootstrap what the whole has beyond the first
stage alone, and beyond the whole without each component.
"""

import argparse
import itertools
import time
from contextlib import nullcontext

import torch
from origin import say_origin
from torch import Tensor
from tqdm.auto import tqdm

from modeling_tvrn import TVRNModel, TVRNProcessor
from modeling_tvrn.data import load_pairs
from modeling_tvrn.evaluation import encode_dataset
from modeling_tvrn.metrics import RetrievalMetrics, paired_bootstrap, retrieval_metrics
from modeling_tvrn.teachers import with_checked_regions

BLOCK = 250  # captions scored between two movements of the bar


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", default="flickr8k")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--regions", help="a region cache of the split, instead of its pictures")
    parser.add_argument("--images", type=int, help="the first N images only (default: all)")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser.parse_args()


@torch.no_grad()
def score_components(arguments: argparse.Namespace) -> tuple[dict[str, Tensor], list[int]]:
    """Each component's matrix (I, T), and each caption's image row."""
    model = TVRNModel.from_pretrained(arguments.checkpoint).eval().to(arguments.device)
    processor = TVRNProcessor.from_pretrained(arguments.checkpoint)
    records = load_pairs(arguments.data, split=arguments.split)
    if arguments.images is not None:
        records = records.select(range(arguments.images))
    if arguments.regions:
        records = with_checked_regions(records, arguments.regions, model, processor)
    weights = {name: float(model.pair.weight(name)) for name in model.config.components}
    print("weights: " + ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items()))
    half = nullcontext() if arguments.float32 else torch.autocast(arguments.device, torch.bfloat16)
    with half:
        images, texts, rows = encode_dataset(model, processor, records)
        return match_blocks(model, images.to(arguments.device), texts.to(arguments.device)), rows.tolist()


def match_blocks(model: TVRNModel, images, texts, level: str = "full") -> dict[str, Tensor]:
    """Each component's whole matrix (I, T), some captions at a time."""
    starts = tqdm(range(0, len(texts), BLOCK), unit=f" blocks of {BLOCK} captions")
    blocks = [
        model.score_components(images, texts.select(slice(start, start + BLOCK)), level=level) for start in starts
    ]
    return {name: torch.cat([block[name] for block in blocks], dim=1) for name in blocks[0]}


def main() -> None:
    arguments = parse_arguments()
    say_origin(arguments)
    started = time.process_time()
    components, rows = score_components(arguments)
    metrics: dict[tuple[str, ...], RetrievalMetrics] = {}
    for count in range(1, len(components) + 1):
        for names in itertools.combinations(components, count):
            metrics[names] = retrieval_metrics(sum(components[name] for name in names), rows)
    for names, found in metrics.items():
        recalls = [*found.image_to_text.values(), *found.text_to_image.values()]
        print(f"{' + '.join(names):44}" + "".join(f"{value:7.1f}" for value in recalls) + f"{found.rsum:8.1f}")
    whole = tuple(components)
    beside = {"the first stage alone": ("first_stage",)} if "first_stage" in whole[:-1] else {}
    if len(whole) > 2:
        beside |= {f"all without {name}": tuple(other for other in whole if other != name) for name in whole}
    for name, names in beside.items():
        print(f"the whole beside {name}:")
        print(paired_bootstrap(metrics[whole], metrics[names], seed=arguments.seed).table())
    print(f"{time.process_time() - started:.0f} CPU s")


if __name__ == "__main__":
    main()

r"""Do explanations name what the score rests on? Mask the regions they name, and as many at random.

For matching pairs: the regions whose removal costs most, one by one (`Explanation.region_without`), or those that the
caption looks at most (`region_weight`), are masked, then equally many random ones, and the pair is scored again.
Reported for 1, 4 and 9 regions: the mean drop of the logit, the mean absolute change, and how often the named regions
cost more than random ones, with a bootstrap interval over pairs. (Of 1 region the first is true by construction.)

    python examples/benchmarks/explanations.py runs/flickr8k-s0 --data DATA --regions REGIONS/validation --pairs 300
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from origin import say_origin

from modeling_tvrn import TVRNModel, TVRNProcessor
from modeling_tvrn.data import load_pairs
from modeling_tvrn.explain import explain
from modeling_tvrn.teachers import RegionCache, with_regions

COUNTS = (1, 4, 9)
NAMED_BY = ("region_without", "region_weight")
DRAWS = 8  # random choices a pair, averaged


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    about, _, commands = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=commands, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or Hub id of a TVRN checkpoint")
    parser.add_argument("--data", required=True, help="what load_pairs reads")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--regions", required=True, help="folder of the region cache of that split")
    parser.add_argument("--pairs", type=int, default=300, help="image-caption pairs (default 300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file for the figures")
    return parser.parse_args()


def changes(model: TVRNModel, processor: TVRNProcessor, record: dict, caption: str, random) -> tuple:
    """Drops of the logit by named (ways, counts) and by random regions (counts, draws); and the sum's error."""
    found = explain(model, processor, record, caption)
    inputs = dict(processor(**{k: [record[k]] for k in ("region_features", "region_boxes")}, return_tensors="pt"))
    chosen = [np.argsort(-getattr(found, way), kind="stable")[:count] for way in NAMED_BY for count in COUNTS]
    regions = len(found.region_weight)
    chosen += [random.choice(regions, count, replace=False) for count in COUNTS for _ in range(DRAWS)]
    masks = np.ones((len(chosen), regions), bool)
    for row, left_out in enumerate(chosen):
        masks[row, left_out] = False
    inputs = {name: value.expand(len(masks), *value.shape[1:]) for name, value in inputs.items()}
    with torch.no_grad():
        images = model.encode_images(**inputs | {"region_mask": torch.from_numpy(masks)})
        texts = model.encode_texts(**processor(text=[caption], return_tensors="pt"))
        drops = found.logit - model.match(images, texts)[:, 0].double().numpy()
    named, other = np.split(drops, [len(NAMED_BY) * len(COUNTS)])
    error = abs(sum(found.parts.values()) - found.logit)
    return named.reshape(len(NAMED_BY), -1), other.reshape(len(COUNTS), DRAWS), error


def summary(named: np.ndarray, other: np.ndarray, seed: int) -> dict:
    """Of drops (pairs,) by named regions and (pairs, draws) by random ones."""
    difference = named - other.mean(axis=1)
    draws = np.random.default_rng(seed).integers(0, len(named), (2000, len(named)))
    low, high = np.percentile(difference[draws].mean(axis=1), [2.5, 97.5])
    return {
        "named_drop": float(named.mean()),
        "random_drop": float(other.mean()),
        "difference": float(difference.mean()),
        "interval_95": [float(low), float(high)],
        "named_change": float(np.abs(named).mean()),
        "random_change": float(np.abs(other).mean()),
        "named_costs_more_percent": float(100 * (named[:, None] > other).mean()),
    }


def main() -> None:
    """Measure, print, write."""
    options = parse_arguments()
    say_origin(options)
    torch.manual_seed(options.seed)
    model = TVRNModel.from_pretrained(options.model).eval()
    processor = TVRNProcessor.from_pretrained(options.model)
    records = load_pairs(options.data, options.split, verify=False)
    records = with_regions(records, RegionCache.load(options.regions))
    random = np.random.default_rng(options.seed)
    rows = random.permutation(len(records))[: options.pairs]
    started, results = time.perf_counter(), []
    for row in rows.tolist():
        record = records[row]
        results.append(changes(model, processor, record, random.choice(record["captions"]), random))
    named, other = np.stack([each[0] for each in results]), np.stack([each[1] for each in results])
    report = {"pairs": len(rows), "seconds": time.perf_counter() - started}
    report["largest_error_of_the_sum"] = float(max(each[2] for each in results))
    for way, name in enumerate(NAMED_BY):
        for place, count in enumerate(COUNTS):
            figures = summary(named[:, way, place], other[:, place], options.seed)
            report[f"{name}, {count} regions"] = figures
            print(f"{name} {count} regions: {json.dumps({k: np.round(v, 4).tolist() for k, v in figures.items()})}")
    print({name: value for name, value in report.items() if not isinstance(value, dict)})
    if options.output:
        Path(options.output).write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()

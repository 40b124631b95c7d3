r"""Do explanations name what the score rests on? Mask the regions they name, and as many at random.

For matching pairs: the regions that the caption looks at most (`Explanation.region_weight`) are masked, then equally
many random ones, and the pair is scored again. Reported for 1, 4 and 9 regions, of the whole logit and of its evidence
term alone (the embeddings average over all regions alike): the mean drop, the mean absolute change, and how often the
named regions matter more than random ones, with a bootstrap interval over pairs.

    python examples/benchmarks/explanations.py runs/flickr8k-s0 --data DATA --regions REGIONS/validation --pairs 300
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from modeling_tvrn import TVRNModel, TVRNProcessor
from modeling_tvrn.data import load_pairs
from modeling_tvrn.explain import explain
from modeling_tvrn.teachers import RegionCache, with_regions

COUNTS = (1, 4, 9)
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


def masked_terms(model: TVRNModel, inputs: dict, texts, masks: np.ndarray) -> np.ndarray:
    """(n, 2): logit and evidence of one pair under n region masks."""
    repeated = {name: value.expand(len(masks), *value.shape[1:]) for name, value in inputs.items()}
    images = model.encode_images(**repeated | {"region_mask": torch.from_numpy(masks)})
    terms = model.match_terms(images, texts)
    return torch.stack([torch.stack(list(terms.values())).sum(dim=0)[:, 0], terms["evidence"][:, 0]], dim=1).numpy()


def changes(model: TVRNModel, processor: TVRNProcessor, record: dict, caption: str, random) -> tuple:
    """Drops of (logit, evidence) by named and by random regions: two arrays (counts, 2); and the sum's error."""
    found = explain(model, processor, record, caption, leave_out=False)
    inputs = dict(processor(**{k: [record[k]] for k in ("region_features", "region_boxes")}, return_tensors="pt"))
    inputs.pop("region_mask")
    regions = len(found.region_weight)
    order = np.argsort(-found.region_weight, kind="stable")
    chosen = [order[:count] for count in COUNTS]
    for count in COUNTS:
        chosen += [random.choice(order[count:], count, replace=False) for _ in range(DRAWS)]
    masks = np.ones((1 + len(chosen), regions), bool)
    for row, left_out in enumerate(chosen, start=1):
        masks[row, left_out] = False
    with torch.no_grad():
        texts = model.encode_texts(**processor(text=[caption], return_tensors="pt"))
        terms = masked_terms(model, inputs, texts, masks)
    drops = terms[0] - terms[1:]
    named, other = drops[: len(COUNTS)], drops[len(COUNTS) :].reshape(len(COUNTS), DRAWS, 2)
    return named, other, abs(sum(found.parts.values()) - found.logit)


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
        "named_matters_more_percent": float(100 * (np.abs(named)[:, None] > np.abs(other)).mean()),
    }


def main() -> None:
    """Measure, print, write."""
    options = parse_arguments()
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
    for place, count in enumerate(COUNTS):
        for term, name in enumerate(("logit", "evidence")):
            figures = summary(named[:, place, term], other[:, place, :, term], options.seed)
            report[f"{name}, {count} regions"] = figures
            print(f"{name:8} {count} regions: {json.dumps({k: np.round(v, 4).tolist() for k, v in figures.items()})}")
    print({name: value for name, value in report.items() if not isinstance(value, dict)})
    if options.output:
        Path(options.output).write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()

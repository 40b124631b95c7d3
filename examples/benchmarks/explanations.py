r"""Do explanations name what the score rests on, and does a word that names an object point at it?

`masking`: for matching pairs the regions whose removal costs most, one by one (`Explanation.by_region`), or those
that the reasoning's attention looks at most, are masked, then equally many random ones, and the pair is scored again.
For 1, 4 and 9 regions: the mean drop of the logit, the mean absolute change, and how often the named regions cost more
than random ones, with a bootstrap interval over pairs. (Of 1 region the first is true by construction.)

`pointing`: the pointing game. A hit is a word that names an object and whose first region (by `by_region`, or by
attention) has its centre in a box of that object; beside it a random region, the regions in the middle, and how often
any region could. On scenes, which know their boxes; on images of COCO with `--instances instances_val2017.json`; on
Flickr30k with `--entities FOLDER` (Flickr30k Entities: Annotations and Sentences), by the last word of every phrase.

`foils`: in captions of scenes one colour is made wrong; how often the wrong word has the lowest number of all.

    python examples/benchmarks/explanations.py pointing runs/scenes --data scenes
    python examples/benchmarks/explanations.py pointing MODEL --data flickr30k --split test --entities ENTITIES
    python examples/benchmarks/explanations.py masking runs/flickr8k-s0 --data DATA --regions REGIONS/validation
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from named_boxes import Boxes, coco_boxes, entities_boxes, scene_boxes
from origin import say_origin

from modeling_tvrn import TVRNModel, TVRNProcessor, load_model
from modeling_tvrn.data import load_pairs
from modeling_tvrn.data.scenes.description import COLOURS
from modeling_tvrn.data.skipped import SkipReport, Unusable
from modeling_tvrn.explain import Explanation, explain
from modeling_tvrn.explain.scene import read_scene
from modeling_tvrn.teachers import RegionCache, with_regions

COUNTS = (1, 4, 9)
NAMED_BY = ("by_region", "attention")
DRAWS = 8  # random choices a pair, averaged


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    about, _, commands = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=commands, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measure", choices=["masking", "pointing", "foils"])
    parser.add_argument("model", help="folder or Hub id of a TVRN checkpoint")
    parser.add_argument("--data", required=True, help="what load_pairs reads")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--regions", help="folder of the region cache of that split (default: from pixels)")
    boxes = parser.add_mutually_exclusive_group()
    boxes.add_argument("--instances", metavar="FILE", help="pointing: COCO's instances, for images of COCO")
    boxes.add_argument("--entities", metavar="FOLDER", help="pointing: Flickr30k Entities, for images of Flickr30k")
    parser.add_argument("--pairs", type=int, default=300, help="image-caption pairs (default 300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file for the figures")
    return parser.parse_args()


def changes(model: TVRNModel, processor: TVRNProcessor, record: dict, caption: str, random) -> tuple:
    """Drops of the logit by named (ways, counts) and by random regions (counts, draws); and the sum's error."""
    found = explain(model, processor, record, caption)
    inputs = read_scene(model, processor, record).inputs
    named = [found.by_region, np.average(found.attention, axis=0, weights=[word.saliency for word in found.words])]
    chosen = [np.argsort(-numbers, kind="stable")[:count] for numbers in named for count in COUNTS]
    regions = len(found.by_region)
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
    error = abs(sum(found.components.values()) - found.logit)
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


def points(cells: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(R,) whether the centre of each region lies in one of the boxes (n, 4)."""
    centres = (cells[:, None, :2] + cells[:, None, 2:]) / 2
    return ((boxes[:, :2] <= centres) & (centres <= boxes[:, 2:])).all(axis=2).any(axis=1)


def pointing_game(found: Explanation, named: Boxes) -> list[dict[str, float]]:
    """For each word that names an object: 1 where a way of choosing a region hits a box of it, else 0."""
    if found.cells is None or found.by_region is None:
        raise ValueError("the pointing game needs a score of several regions, and their boxes")
    middle = np.abs((found.cells[:, :2] + found.cells[:, 2:]) / 2 - 0.5).max(axis=1)
    rows = []
    for (start, end), boxes in named.items():
        words = [word for word in found.words if word.span and word.span[0] < end and start < word.span[1]]
        if not words:  # cut off
            continue
        word, hits = words[-1], points(found.cells, boxes)
        row = {"by_region": hits[word.by_region.argmax()], "random": hits.mean(), "any": hits.any()}
        row["centre"] = hits[middle <= middle.min() + 1e-6].mean()
        if word.attention is not None:
            row["attention"] = hits[word.attention.argmax()]
        rows.append({name: float(value) for name, value in row.items()})
    return rows


def measure_pointing(model: Any, processor: Any, records: Any, options: Any) -> dict:
    """Hits in percent, of the first caption of each image."""
    find = scene_boxes
    if options.instances or options.entities:
        find = coco_boxes(options.instances) if options.instances else entities_boxes(options.entities)
    rows: list[dict[str, float]] = []
    skipped = SkipReport()
    for row in range(min(options.pairs, len(records))):
        record = records[row]
        try:
            caption, named = find(record)
        except Unusable as error:
            skipped.add(error.reason, error.detail)
            continue
        if named:
            rows += pointing_game(explain(model, processor, record, caption), named)
    skipped.warn(options.data)
    if not rows:
        raise ValueError(
            f"no word of the captions names an object with a box (skipped: {skipped}); expected annotations of these "
            "images by --instances or --entities"
        )
    means = {name: 100 * float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return {"words": len(rows), "skipped": dict(skipped)} | means


def measure_foils(model: Any, processor: Any, records: Any, options: Any) -> dict:
    """How often the one wrong word has the lowest number, and one below 0, in percent."""
    random = np.random.default_rng(options.seed)
    lowest, negative = [], []
    for row in range(min(options.pairs, len(records))):
        record = records[row]
        words = record["captions"][0].split()
        places = [place for place, word in enumerate(words) if word.strip(",") in COLOURS]
        absent = [colour for colour in COLOURS if not any(colour in label for label in record["labels"])]
        if not places:
            continue
        wrong, place = random.choice(absent), random.choice(places)
        words[place] = words[place].replace(words[place].strip(","), wrong)
        found = explain(model, processor, record, " ".join(words), leave_out_regions=False)
        numbers = {word.text: word.contribution for word in found.words if word.text == wrong}
        lowest.append(numbers[wrong] == min(word.contribution for word in found.words))
        negative.append(numbers[wrong] < 0)
    return {"captions": len(lowest), "lowest": 100 * np.mean(lowest), "negative": 100 * np.mean(negative)}


def measure_masking(model: Any, processor: Any, records: Any, options: Any) -> dict:
    """Drops of the logit by named and by random regions."""
    random = np.random.default_rng(options.seed)
    rows, results = random.permutation(len(records))[: options.pairs], []
    for row in rows.tolist():
        record = records[row]
        results.append(changes(model, processor, record, random.choice(record["captions"]), random))
    named, other = np.stack([each[0] for each in results]), np.stack([each[1] for each in results])
    report: dict[str, Any] = {"pairs": len(rows), "largest_error_of_the_sum": max(each[2] for each in results)}
    for way, name in enumerate(NAMED_BY):
        for place, count in enumerate(COUNTS):
            report[f"{name}, {count} regions"] = summary(named[:, way, place], other[:, place], options.seed)
    return report


def main() -> None:
    """Measure, print, write."""
    options = parse_arguments()
    say_origin(options)
    model, processor = load_model(options.model, device="cpu")
    records = load_pairs(options.data, options.split, verify=False)
    if options.regions:
        records = with_regions(records, RegionCache.load(options.regions))
    measures = {"masking": measure_masking, "pointing": measure_pointing, "foils": measure_foils}
    started = time.perf_counter()
    try:
        report = measures[options.measure](model, processor, records, options)
    except (OSError, ValueError) as error:
        raise SystemExit(f"explanations.py: {error}") from error
    report["seconds"] = time.perf_counter() - started
    for name, value in report.items():
        print(name, json.dumps(value))
    if options.output:
        Path(options.output).write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()

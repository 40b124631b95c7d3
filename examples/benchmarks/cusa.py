r"""CUSA on the plain dual encoder: baseline, + CSA, + USA, + CUSA, over seeds.

    tvrn regions DATA --features VISION --grid-size 6 --split train --output regions/train
    tvrn regions DATA --features VISION --grid-size 6 --split validation --output regions/validation
    tvrn teachers DATA VISION --modality image --split train --output teachers/image
    tvrn teachers DATA TEXT --modality text --split train --output teachers/text
    python examples/benchmarks/cusa.py --data DATA --regions 'regions/{split}' --text TEXT --seeds 0 1 2 \
        --image-teacher teachers/image --text-teacher teachers/text --sentence-pairs stsb/validation.parquet

Without --text: words and a BiGRU from scratch, which know less than the teacher; with --word-state-size 0 words alone.
What helped these, where the paper's settings (the defaults) did not:

        --word-state-size 0 --alpha 0.3 --beta 2 --teacher-temperature 0.1 --student-temperature 0.15 \
        --exclude-self --center-teachers --on-logits

The encoder, its data and its recipe are those of dual_encoder.py. Measured on validation: rSum across modalities; R@1
of captions of the same photograph and Spearman's correlation with graded sentence pairs, of the embeddings and, with
USA, of the uni-modal heads on them. Each row is compared with the baseline of the same seed: paired bootstrap over
queries.
"""

import argparse
import math
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass

import dual_encoder
import torch
from origin import say_origin
from torch import Tensor

from modeling_tvrn import TVRNProcessor
from modeling_tvrn.data import load_pairs
from modeling_tvrn.evaluation import SentencePairs
from modeling_tvrn.layers_tvrn import UnimodalHead
from modeling_tvrn.losses import CUSA, contrastive_loss
from modeling_tvrn.metrics import RetrievalMetrics, paired_bootstrap, retrieval_metrics, spearman, unimodal_metrics
from modeling_tvrn.teachers import TeacherCache

ROWS = {"baseline": (0, 0), "+ CSA": (1, 0), "+ USA": (0, 1), "+ CUSA": (1, 1)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="flickr8k", help="what load_pairs reads")
    parser.add_argument("--regions", required=True, help="region caches, {split} in their path")
    parser.add_argument("--text", help="frozen text tower (default: words and a BiGRU from scratch)")
    parser.add_argument(
        "--word-state-size", type=int, default=256, help="a direction of the BiGRU; 0: words' mean alone"
    )
    parser.add_argument("--image-teacher", required=True, help="teacher cache of the training photographs")
    parser.add_argument("--text-teacher", required=True, help="teacher cache of the training captions")
    parser.add_argument("--sentence-pairs", help="parquet or CSV with sentence1, sentence2, score")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--alpha", type=float, default=1.0, help="weight of CSA in its rows")
    parser.add_argument("--beta", type=float, default=0.75, help="weight of USA in its rows")
    parser.add_argument("--teacher-temperature", type=float, default=1.0)
    parser.add_argument("--student-temperature", type=float, default=0.45, help="where the learned ones start")
    parser.add_argument("--lowest-temperature", type=float, default=0.1)
    parser.add_argument("--teachers", default="own", choices=["own", "mean", "geometric_mean"])
    parser.add_argument("--exclude-self", action="store_true", help="labels of the other items alone")
    parser.add_argument("--on-logits", action="store_true", help="CSA in InfoNCE's scale, no temperature of its own")
    parser.add_argument("--center-teachers", action="store_true", help="the teachers' cosines about their mean")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="matrix products of the encoder in bfloat16")
    arguments = parser.parse_args()
    recipe = {"weight_decay": 0.01, "projection_size": 512, "hidden_size": 1024, "label_smoothing": 0.1}
    for name, value in (recipe | {"image_dropout": 0.5, "text_dropout": 0.2, "plain": False}).items():
        setattr(arguments, name, value)
    return arguments


@dataclass
class Material:
    """Features of both splits, the teachers' vectors, and the sentence pairs as the text side reads them."""

    splits: dict
    vocabulary: int | None
    image_teacher: Tensor
    text_teacher: Tensor
    pairs: tuple[Tensor, Tensor, list[float]] | None


def read(arguments: argparse.Namespace) -> Material:
    splits, vocabulary = dual_encoder.read(arguments)
    records = load_pairs(arguments.data, split="train")
    images = TeacherCache.load(arguments.image_teacher, dataset=records, modality="image")
    texts = TeacherCache.load(arguments.text_teacher, dataset=records, modality="text")
    caption_ids = [caption_id for ids in records.caption_ids for caption_id in ids]
    pairs = None
    if arguments.sentence_pairs:
        given = SentencePairs.read(arguments.sentence_pairs)
        sides = as_texts([*given.first, *given.second], records, arguments).split(len(given.first))
        pairs = sides[0], sides[1], given.scores.tolist()
    return Material(splits, vocabulary, images[records.image_ids].float(), texts[caption_ids].float(), pairs)


def as_texts(sentences: list[str], records, arguments: argparse.Namespace) -> Tensor:
    """Sentences as the text side reads captions: features of the frozen tower, or ids of the training words."""
    if arguments.text:
        return dual_encoder.text_features(sentences, arguments.text)
    captions = [caption for of_image in records.captions for caption in of_image]
    return TVRNProcessor.from_captions(captions, min_frequency=2)(text=sentences)["input_ids"]


@dataclass
class Result:
    metrics: RetrievalMetrics
    text_recall: float
    heads_text_recall: float
    sts: float
    heads_sts: float
    milliseconds: float
    temperatures: list[float]


def train(material: Material, row: str, seed: int, arguments: argparse.Namespace) -> Result:
    torch.manual_seed(seed)
    images, texts, rows = material.splits["train"]
    model = dual_encoder.DualEncoder(images.shape[1], texts.shape[1], material.vocabulary, arguments)
    alpha, beta = arguments.alpha * ROWS[row][0], arguments.beta * ROWS[row][1]
    low, cusa = arguments.lowest_temperature, None
    heads = torch.nn.ModuleList(UnimodalHead(arguments.projection_size) for _ in range(2 if beta else 0))
    if row != "baseline":
        cusa = CUSA(
            *(alpha, beta, arguments.student_temperature, (low, 0.99), (low, 1.0)),
            *(arguments.teacher_temperature, arguments.teachers),
            *(arguments.exclude_self, arguments.center_teachers, arguments.on_logits),
        )
    learned = [*model.parameters(), *heads.parameters(), *(cusa.parameters() if cusa is not None else ())]
    decayed, flat = [p for p in learned if p.ndim > 1], [p for p in learned if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": arguments.weight_decay}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.98), fused=True)
    per_epoch = len(rows) // arguments.batch_size
    steps = arguments.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (0.1 * steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    cpu = time.process_time()
    for _ in range(arguments.epochs):
        order = torch.randperm(len(rows))
        for step in range(per_epoch):
            batch = order[step * arguments.batch_size : (step + 1) * arguments.batch_size]
            ids = rows[batch]
            with torch.autocast("cpu", dtype=torch.bfloat16) if arguments.bf16 else nullcontext():
                embeds = [model.image(images[ids]), model.embed_texts(texts[batch])]
            embeds = [torch.nn.functional.normalize(side.float(), dim=-1) for side in embeds]
            smoothing = arguments.label_smoothing
            loss = contrastive_loss(*embeds, model.logit_scale, ids, ids, label_smoothing=smoothing)
            if cusa is not None:
                unimodal = [head(side) for head, side in zip(heads, embeds, strict=True)] if beta else [None, None]
                teachers = material.image_teacher[ids], material.text_teacher[batch]
                similarity = embeds[0] @ embeds[1].T * (model.logit_scale.exp() if arguments.on_logits else 1.0)
                loss = loss + cusa(*teachers, similarity, *unimodal).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if cusa is not None:
                cusa.clamp_temperatures()
    milliseconds = 1000 * (time.process_time() - cpu) / steps
    temperatures = [] if cusa is None else [round(value.item(), 3) for value in cusa.parameters()]
    return measure(model.eval(), heads, material, milliseconds, temperatures)


@torch.no_grad()
def measure(model, heads, material: Material, milliseconds: float, temperatures: list[float]) -> Result:
    images, texts, rows = material.splits["validation"]
    embeds = model.embed_texts(texts)
    head = heads[1] if len(heads) else lambda side: side
    correlations = [math.nan, math.nan]
    if material.pairs is not None:
        first, second = (model.embed_texts(side) for side in material.pairs[:2])
        correlations = [
            spearman(torch.cosine_similarity(map_(first), map_(second)).numpy(), material.pairs[2])
            for map_ in (lambda side: side, head)
        ]
    recalls = [unimodal_metrics(side, rows.tolist()).recall[1] for side in (embeds, head(embeds))]
    return Result(
        retrieval_metrics(model.image(images) @ embeds.T, rows), *recalls, *correlations, milliseconds, temperatures
    )


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"


def main() -> None:
    arguments = parse_arguments()
    say_origin(arguments)
    torch.set_num_threads(arguments.threads)
    material = read(arguments)
    results: dict[str, list[Result]] = {row: [] for row in arguments.rows}
    for seed in arguments.seeds:
        for row in arguments.rows:
            result = train(material, row, seed, arguments)
            results[row].append(result)
            print(
                f"seed {seed} {row:8}: rSum {result.metrics.rsum:.1f}, text→text R@1 {result.text_recall:.1f} (heads "
                f"{result.heads_text_recall:.1f}), STS {result.sts:.1f} (heads {result.heads_sts:.1f}), "
                f"{result.milliseconds:.1f} CPU ms a step, temperatures {result.temperatures}",
                flush=True,
            )
            if row != "baseline" and results.get("baseline"):
                gain = paired_bootstrap(result.metrics, results["baseline"][-1].metrics)
                print(
                    f"    over the baseline: rSum {gain.difference['rsum']:+.1f} ({gain.low['rsum']:+.1f} … "
                    f"{gain.high['rsum']:+.1f}, p {gain.p_value['rsum']:.4f})",
                    flush=True,
                )
    names = ("rSum", "text→text R@1", "of the heads", "STS", "of the heads", "CPU ms a step")
    print(f"\n| | {' | '.join(names)} |\n|---|{'--:|' * len(names)}")
    for row, found in results.items():
        columns = ("text_recall", "heads_text_recall", "sts", "heads_sts", "milliseconds")
        cells = [
            spread([each.metrics.rsum for each in found]),
            *(spread([getattr(each, name) for each in found]) for name in columns),
        ]
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

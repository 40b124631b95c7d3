"""The peer: the best plain dual encoder we know how to train on the same frozen towers as TVRN.

    tvrn regions DATA --features VISION --grid-size 6 --split train --output regions/train
    tvrn regions DATA --features VISION --grid-size 6 --split validation --output regions/validation
    python examples/benchmarks/dual_encoder.py --data DATA --regions 'regions/{split}' --text TEXT --seeds 0 1 2
    python examples/benchmarks/dual_encoder.py --data DATA --regions 'regions/{split}' --seeds 0 1 2    # BiGRU words

Mean-pooled region features against the mean of a frozen text tower's outputs (or of a BiGRU trained from scratch, with
the mean word embedding beside it), each through a linear layer and a perceptron, trained with InfoNCE over images as
positives. `--plain` leaves out what tuning added: perceptrons, dropout and label smoothing.
Nothing of TVRN's model is used; metrics, data and caches are the package's.
"""

import argparse
import math
import statistics
import time

import torch
from origin import say_origin
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel

from modeling_tvrn import TVRNProcessor
from modeling_tvrn.data import load_pairs
from modeling_tvrn.losses import contrastive_loss
from modeling_tvrn.metrics import retrieval_metrics
from modeling_tvrn.teachers import RegionCache

WORD_SIZE = 300


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="flickr8k", help="what load_pairs reads")
    parser.add_argument("--regions", required=True, help="region caches, {split} in their path")
    parser.add_argument("--text", help="frozen text tower (default: words and a BiGRU from scratch)")
    parser.add_argument(
        "--word-state-size", type=int, default=256, help="a direction of the BiGRU; 0: words' mean alone"
    )
    parser.add_argument("--plain", action="store_true", help="linear maps, no dropout, no label smoothing")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--projection-size", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=1024, help="of the perceptrons")
    parser.add_argument("--image-dropout", type=float, default=0.5)
    parser.add_argument("--text-dropout", type=float, default=0.2)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.plain:
        arguments.hidden_size, arguments.image_dropout, arguments.text_dropout, arguments.label_smoothing = (
            0,
            0.0,
            0.0,
            0.0,
        )
    return arguments


class Projection(nn.Module):
    """W x + b + MLP(x) to the unit sphere."""

    def __init__(self, size: int, dropout: float, arguments: argparse.Namespace):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(size, arguments.projection_size)
        hidden = arguments.hidden_size
        layers = (nn.Linear(size, hidden), nn.GELU(), nn.Dropout(0.5), nn.Linear(hidden, arguments.projection_size))
        self.perceptron = nn.Sequential(*layers) if hidden else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        return F.normalize(self.linear(x) + (self.perceptron(x) if self.perceptron is not None else 0), dim=-1)


class Words(nn.Module):
    """Mean word embedding and mean state of a BiGRU over (T, W) ids, 0 = padding -> (T, 300 + 2 · size).

    With size 0 the mean word embedding alone, (T, 300): what TVRN's own embeddings read of words from scratch.
    """

    def __init__(self, vocabulary: int, dropout: float, size: int):
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, WORD_SIZE, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(WORD_SIZE, size, batch_first=True, bidirectional=True) if size else None

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).unsqueeze(-1)
        embedded = self.embeddings(ids)
        if self.gru is None:
            return embedded.sum(dim=1) / mask.sum(dim=1)
        packed = nn.utils.rnn.pack_padded_sequence(
            self.dropout(embedded), mask.sum(dim=(1, 2)), batch_first=True, enforce_sorted=False
        )
        states, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=ids.shape[1])
        return torch.cat([embedded, states], dim=-1).sum(dim=1) / mask.sum(dim=1)


class DualEncoder(nn.Module):
    def __init__(self, image_size: int, text_size: int, vocabulary: int | None, arguments: argparse.Namespace):
        super().__init__()
        state = arguments.word_state_size
        self.words = Words(vocabulary, arguments.text_dropout, state) if vocabulary else None
        self.image = Projection(image_size, arguments.image_dropout, arguments)
        size = WORD_SIZE + 2 * state if vocabulary else text_size
        self.text = Projection(size, arguments.text_dropout, arguments)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(20.0)]))

    def embed_texts(self, texts: Tensor) -> Tensor:
        return self.text(self.words(texts) if self.words is not None else texts)


def image_features(records, regions: str, split: str) -> Tensor:
    cache = RegionCache.load(regions.replace("{split}", split))
    ids = records.image_ids
    blocks = [
        cache[ids[start : start + 100]]["region_features"].float().mean(dim=1) for start in range(0, len(ids), 100)
    ]
    return torch.cat(blocks)


@torch.no_grad()
def text_features(captions: list[str], tower: str) -> Tensor:
    """The mean of a frozen tower's last hidden states (T, F)."""
    processor = TVRNProcessor.from_backbones(text=tower)
    model = AutoModel.from_pretrained(tower, dtype=torch.float32, trust_remote_code=False)
    order = sorted(range(len(captions)), key=lambda row: len(captions[row]))
    features = torch.empty(len(captions), model.config.hidden_size)
    for start in range(0, len(order), 128):
        rows = order[start : start + 128]
        inputs = processor(text=[captions[row] for row in rows])
        hidden = model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        features[rows] = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return features


def read(arguments: argparse.Namespace) -> tuple[dict, int | None]:
    """Image features, texts and each caption's image row, of both splits."""
    splits, processor = {}, None
    for split in ("train", "validation"):
        records = load_pairs(arguments.data, split=split)
        captions = [caption for of_image in records.captions for caption in of_image]
        rows = torch.tensor([row for row, of_image in enumerate(records.captions) for _ in of_image])
        if arguments.text:
            texts = text_features(captions, arguments.text)
        else:
            processor = processor or TVRNProcessor.from_captions(captions, min_frequency=2)
            texts = processor(text=captions)["input_ids"]
        splits[split] = image_features(records, arguments.regions, split), texts, rows
    return splits, None if processor is None else len(processor.tokenizer)


def train(splits: dict, vocabulary: int | None, seed: int, arguments: argparse.Namespace) -> DualEncoder:
    torch.manual_seed(seed)
    images, texts, rows = splits["train"]
    model = DualEncoder(images.shape[1], texts.shape[1], vocabulary, arguments)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.learning_rate, weight_decay=arguments.weight_decay, betas=(0.9, 0.98)
    )
    per_epoch = len(rows) // arguments.batch_size
    steps = arguments.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (0.1 * steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    for _ in range(arguments.epochs):
        order = torch.randperm(len(rows))
        for step in range(per_epoch):
            batch = order[step * arguments.batch_size : (step + 1) * arguments.batch_size]
            ids = rows[batch]
            smoothing = arguments.label_smoothing
            embeds = model.image(images[ids]), model.embed_texts(texts[batch])
            loss = contrastive_loss(*embeds, model.logit_scale, ids, ids, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def evaluate(model: DualEncoder, splits: dict):
    images, texts, rows = splits["validation"]
    return retrieval_metrics(model.image(images) @ model.embed_texts(texts).T, rows)


def main() -> None:
    arguments = parse_arguments()
    say_origin(arguments)
    torch.set_num_threads(arguments.threads)
    splits, vocabulary = read(arguments)
    sums = []
    for seed in arguments.seeds:
        wall, cpu = time.perf_counter(), time.process_time()
        model = train(splits, vocabulary, seed, arguments)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        metrics = evaluate(model, splits)
        sums.append(metrics.rsum)
        recalls = [f"{value:.1f}" for way in (metrics.image_to_text, metrics.text_to_image) for value in way.values()]
        print(
            f"seed {seed}: rSum {metrics.rsum:.1f} ({' / '.join(recalls)}), {wall:.0f} s, {cpu:.0f} CPU s", flush=True
        )
    spread = statistics.stdev(sums) if len(sums) > 1 else 0.0
    print(f"validation rSum {statistics.mean(sums):.1f} ± {spread:.1f} over seeds {arguments.seeds}")


if __name__ == "__main__":
    main()

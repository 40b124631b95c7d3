"""A real, small dual encoder where CLIP's weights are out of reach: MobileNetV2 and MiniLM with linear maps between.

    python examples/benchmarks/stand_in.py --vision VISION --text TEXT --data flickr8k --output runs/stand-in \
        --learning-rate 4e-3 --epochs 15 --dropout 0.5 --projection-size 1024

The towers stay as they are, their pooled outputs are computed once (kept in --pooled, read from there where they lie);
what learns is a map of each side, the text side's pooler and the scale, by InfoNCE. What is saved is a plain
VisionTextDualEncoderModel that AutoModel loads. Prints rSum on the validation split, percent.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from origin import say_origin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from modeling_tvrn.data import load_pairs
from modeling_tvrn.losses import contrastive_loss
from modeling_tvrn.metrics import retrieval_metrics


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--data", default="flickr8k")
    parser.add_argument("--output", required=True)
    parser.add_argument("--pooled", type=Path, help="folder for the towers' pooled outputs (default: not kept)")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.5)
    parser.add_argument("--projection-size", type=int, default=1024)
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The dual encoder with pretrained towers and maps drawn at random, and its processor."""
    vision = AutoConfig.from_pretrained(arguments.vision)
    if not hasattr(vision, "hidden_size"):  # of MobileNetV2: the channels of its last map
        vision.hidden_size = 1280
    text = AutoConfig.from_pretrained(arguments.text)
    size = arguments.projection_size
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=size)
    model = VisionTextDualEncoderModel(
        config,
        AutoModel.from_pretrained(arguments.vision, config=vision, dtype=torch.float32),
        AutoModel.from_pretrained(arguments.text, dtype=torch.float32),
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.text)
    processor = VisionTextDualEncoderProcessor(AutoImageProcessor.from_pretrained(arguments.vision), tokenizer)
    return model.eval(), processor


@torch.no_grad()
def pool(model: Any, processor: Any, records: Any, split: str) -> dict[str, Tensor]:
    """`images` (I, F): the vision tower's pooled output; `texts` (T, F): the first token's state; `rows` (T,)."""
    captions = [caption for of_image in records.captions for caption in of_image]
    images = []
    for start in tqdm(range(0, len(records), 64), desc=f"{split} images", disable=None):
        batch = [records[row]["image"] for row in range(start, min(start + 64, len(records)))]
        pixels = processor.image_processor(batch, return_tensors="pt")["pixel_values"]
        images.append(model.vision_model(pixel_values=pixels).pooler_output)
    order = sorted(range(len(captions)), key=lambda row: len(captions[row]))
    texts = torch.empty(len(captions), model.config.text_config.hidden_size)
    for start in tqdm(range(0, len(order), 128), desc=f"{split} captions", disable=None):
        rows = order[start : start + 128]
        inputs = processor.tokenizer([captions[row] for row in rows], padding=True, return_tensors="pt")
        texts[rows] = model.text_model(**inputs).last_hidden_state[:, 0]
    rows_of = [row for row, of_image in enumerate(records.captions) for _ in of_image]
    return {"images": torch.cat(images), "texts": texts, "rows": torch.tensor(rows_of)}


def read(arguments: argparse.Namespace, model: Any, processor: Any) -> dict[str, dict[str, Tensor]]:
    """The pooled outputs of both splits."""
    splits = {}
    for split in ("train", "validation"):
        path = None if arguments.pooled is None else arguments.pooled / f"{split}.safetensors"
        if path is not None and path.is_file():
            splits[split] = load_file(path)
            continue
        splits[split] = pool(model, processor, load_pairs(arguments.data, split=split), split)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(splits[split], path)
    return splits


class Maps(nn.Module):
    """What of the dual encoder learns, shared with it, under dropout of what it reads."""

    def __init__(self, model: Any, dropout: float) -> None:
        super().__init__()
        self.visual, self.pooler = model.visual_projection, model.text_model.pooler
        self.textual, self.logit_scale = model.text_projection, model.logit_scale
        self.dropout = nn.Dropout(dropout)
        self.logit_scale.data.fill_(math.log(20.0))

    def embed(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """(I, F) and (T, F) pooled outputs -> embeddings (I, P) and (T, P) of unit norm."""
        pooled = self.pooler.activation(self.pooler.dense(texts))
        embeds = self.visual(self.dropout(images)), self.textual(self.dropout(pooled))
        return tuple(nn.functional.normalize(each, dim=-1) for each in embeds)


def train(maps: Maps, data: dict[str, Tensor], arguments: argparse.Namespace) -> None:
    """AdamW under a warm-up and half a cosine."""
    optimizer = torch.optim.AdamW(
        maps.parameters(), lr=arguments.learning_rate, weight_decay=arguments.weight_decay, betas=(0.9, 0.98)
    )
    per_epoch = len(data["rows"]) // arguments.batch_size
    steps = arguments.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (0.1 * steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    maps.train()
    for _ in tqdm(range(arguments.epochs), desc="epochs", disable=None):
        order = torch.randperm(len(data["rows"]))
        for step in range(per_epoch):
            batch = order[step * arguments.batch_size : (step + 1) * arguments.batch_size]
            ids = data["rows"][batch]
            embeds = maps.embed(data["images"][ids], data["texts"][batch])
            smoothing = arguments.label_smoothing
            loss = contrastive_loss(*embeds, maps.logit_scale, ids, ids, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    maps.eval()


def main() -> None:
    arguments = parse_arguments()
    say_origin(arguments)
    torch.manual_seed(arguments.seed)
    model, processor = build(arguments)
    splits = read(arguments, model, processor)
    maps = Maps(model, arguments.dropout)
    train(maps, splits["train"], arguments)
    with torch.no_grad():
        images, texts = maps.embed(splits["validation"]["images"], splits["validation"]["texts"])
    metrics = retrieval_metrics(images @ texts.T, splits["validation"]["rows"])
    model.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    scale = float(model.logit_scale.exp())
    print(f"validation rSum {metrics.rsum:.1f}, scale {scale:.1f}, in {arguments.output}")


if __name__ == "__main__":
    main()

"""Tiny models with their processors and results, as somebody would save or push them: tests of sharing and the CLI."""

from pathlib import Path
from typing import Any

import torch
from model_makers import shake
from transformers import BertConfig, ViTConfig, ViTImageProcessorPil

from modeling_tvrn import TVRNConfig, TVRNModel, TVRNProcessor
from modeling_tvrn.processing_tvrn import build_word_tokenizer

CAPTIONS = ["A dog runs in the snow.", "two dogs, one cat!", "the cat sleeps", "snow"]
SIZES: dict[str, Any] = {"hidden_size": 12, "projection_size": 10, "similarity_size": 7, "pooled_hidden_size": 11}
VIT = ViTConfig(
    hidden_size=14, num_attention_heads=2, num_hidden_layers=1, intermediate_size=19, image_size=35, patch_size=7
)
FEATURES = 13


def region_model(**settings: Any) -> tuple[TVRNModel, TVRNProcessor]:
    """Region features and a BiGRU."""
    processor = TVRNProcessor.from_captions(CAPTIONS)
    sizes = SIZES | {"vocab_size": len(processor.tokenizer), "region_feature_size": FEATURES, "word_embedding_size": 9}
    return _made(TVRNConfig(**sizes | settings)), processor


def pixel_model(**settings: Any) -> tuple[TVRNModel, TVRNProcessor]:
    """A ViT and a BERT, with a WordPiece-less vocabulary."""
    tokenizer = build_word_tokenizer(CAPTIONS)
    image_processor = ViTImageProcessorPil(size={"height": 35, "width": 35})
    text = BertConfig(
        vocab_size=len(tokenizer), hidden_size=10, num_attention_heads=2, num_hidden_layers=1, intermediate_size=17
    )
    towers = {"vision_config": VIT, "text_config": text, "region_feature_size": VIT.hidden_size}
    return _made(TVRNConfig(**SIZES | towers | settings)), TVRNProcessor(image_processor, tokenizer)


def _made(config: TVRNConfig) -> TVRNModel:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = TVRNModel(config)
        shake(model)
        return model.eval()


def save(folder: Path, model: TVRNModel, processor: TVRNProcessor) -> Path:
    """Both parts in one folder."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def results(**changes: Any) -> dict[str, Any]:
    """results.json of a run that read its data from folders of some machine."""
    recalls = {f"{way}_R@{k}": 10.0 * k for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    split = {"images": 6, "captions": 30, "skipped": {}, "truncated_captions": 0}
    config = {
        "data": "flickr8k", "vision": None, "text": "/home/somebody/towers/minilm", "validation_split": "validation",
        "train_split": "train", "regions": "/home/somebody/regions/{split}", "query": None, "batch_size": 32,
        "max_text_length": 40, "model": {"hidden_size": 12}, "output_dir": "/home/somebody/runs/one",
    }  # fmt: skip
    return {
        "metrics": recalls | {"rsum": 320.0, "image_to_text_median_rank": 4.0},
        "embedding_metrics": recalls | {"rsum": 320.0}, "chance": recalls | {"rsum": 320.0},
        "best_step": 7, "steps": 9, "commit": "abc123", "device": "cpu", "seed": 3,
        "command": "examples/train.py --config c.yaml 'regions=/home/somebody/regions/{split}'",
        "versions": {"torch": "2.13.0"}, "seconds": {"training": 66.0}, "parameters": {"total": 99, "trained": 88},
        "data": {"train": split, "validation": split}, "config": config, "recipe": ["data", "text", "regions"],
        "evaluation": {"protocol": "validation", "gallery_fingerprint": "f00d", "models": [{"sha256": "beef"}]},
        "model_config": {"hidden_size": 12, "region_feature_size": FEATURES, "freeze_text": True},
    } | changes  # fmt: skip

"""Tiny random dual encoders of transformers' own classes, saved with their processors as the Hub has them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [
    "a",
    "the",
    "dog",
    "cat",
    "runs",
    "sits",
    "in",
    "on",
    "snow",
    "grass",
    "red",
    "blue",
    "circle",
    "square",
    "above",
    "below",
    "small",
    "large",
    "two",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
TEXT = {
    "hidden_size": 28,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": len(SPECIAL) + len(WORDS),
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 36,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
PROJECTED = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 20}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words of a fixed vocabulary between `<s>` and `</s>`."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        **{"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        model_max_length=16,
    )


def _vision_text() -> Any:
    vision = transformers.MobileNetV2Config(hidden_size=1280, image_size=64, depth_multiplier=0.35)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    text = transformers.BertConfig(**{name: TEXT[name] for name in names}, max_position_embeddings=16, pad_token_id=1)
    return transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=20)


CONFIGS = {
    "clip": lambda: transformers.CLIPConfig(**PROJECTED),
    "metaclip_2": lambda: transformers.MetaClip2Config(**PROJECTED),
    "chinese_clip": lambda: transformers.ChineseCLIPConfig(
        **PROJECTED | {"text_config": {**TEXT, "type_vocab_size": 2}}
    ),
    "altclip": lambda: transformers.AltCLIPConfig(
        **PROJECTED | {"text_config": {**TEXT, "project_dim": 20, "max_position_embeddings": 30}}
    ),
    "siglip": lambda: transformers.SiglipConfig(
        text_config={**TEXT, "hidden_size": 36, "projection_size": 36}, vision_config=VISION
    ),
    "vision-text-dual-encoder": _vision_text,
}


def dual_encoder(kind: str = "clip", seed: int = 3) -> Any:
    """A random model of that kind in evaluation mode, every weight moved off its start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(CONFIGS[kind]()).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
    return model


def save_dual_encoder(folder: Path, kind: str = "clip", **changes: Any) -> Path:
    """Such a model with its processor in a folder."""
    model = dual_encoder(kind, **changes)
    model.save_pretrained(folder)
    side = model.config.vision_config.image_size
    image_processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    names = {"siglip": "SiglipProcessor", "vision-text-dual-encoder": "VisionTextDualEncoderProcessor"}
    own = getattr(transformers, names.get(kind, "CLIPProcessor"))
    own(image_processor=image_processor, tokenizer=tokenizer()).save_pretrained(folder)
    return folder


def inputs(model: Any, kind: str, images: int = 3, texts: int = 4) -> dict[str, torch.Tensor]:
    """Pixels and captions as the checkpoint's own processor would give them."""
    generator = torch.Generator().manual_seed(7)
    side = model.config.vision_config.image_size
    captions = [" ".join(WORDS[k : k + 3 + 2 * k]) for k in range(texts)]
    padding = {"padding": "max_length", "max_length": 16} if kind == "siglip" else {"padding": True}
    encoded = dict(tokenizer()(captions, return_tensors="pt", return_token_type_ids=False, **padding))
    if kind == "siglip":
        del encoded["attention_mask"]
    return {"pixel_values": torch.randn(images, 3, side, side, generator=generator), **encoded}

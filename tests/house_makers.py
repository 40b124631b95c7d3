"""A folder where everything that README and guides name lies under that very name, tiny: models, data, photographs."""

import csv
import json
import os
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import transformers
from data_makers import write_parquet
from detector_makers import make_detector
from dual_encoder_makers import WORDS, save_dual_encoder
from hub_makers import pixel_model, save
from training_makers import TINY_BERT, write_scan

from modeling_tvrn import TVRNProcessor

ROOT = Path(__file__).resolve().parents[1]
SPLITS = {"train": 16, "validation": 12, "test": 10}
PRESETS = ("jxie/flickr8k", "umaru97/flickr30k_train_val_test")
MINILM, MPNET = "sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-mpnet-base-v2"
BERT = "google-bert/bert-base-uncased"
DUAL_ENCODERS = {
    "openai/clip-vit-base-patch32": "clip",
    "google/siglip2-base-patch16-224": "siglip",
    "STAND-IN": "vision-text-dual-encoder",
}
MOBILENET = "google/mobilenet_v2_1.0_224"
SIDE = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}


def build(house: Path) -> Path:
    """All of it, but for what the pages' own commands write."""
    os.symlink(ROOT / "examples", house / "examples")
    _write_towers(house)
    for name, kind in DUAL_ENCODERS.items():
        save_dual_encoder(house / name, kind)
    for trained_on in ("coco", "obj365"):  # of a class that is built sooner
        make_detector(house / "ustc-community" / f"dfine-small-{trained_on}", "yolos", num_detection_tokens=40)
    save(house / "me" / "my-tvrn", *pixel_model())
    for number, name in enumerate(PRESETS):
        for split, count in SPLITS.items():
            _write_split(house / name / "data" / f"{split}-00000.parquet", count, seed=3 * number + len(split))
    for split, count in SPLITS.items():  # of COCO a repository each
        folder = house / "Multimodal-Fatima" / f"COCO_captions_{split}"
        _write_split(folder / "data" / f"{split}-00000.parquet", count, seed=6 + len(split))
    for name, test in {"f30k": "test", "coco": "testall"}.items():
        write_scan(house / "data" / f"{name}_precomp", {"train": 16, "dev": 12, test: SPLITS["test"]}, 5, size=2048)
    _write_photographs(house)
    for name, target in {"DATA": PRESETS[0], "VISION": MOBILENET, "TEXT": MINILM, "REGIONS": "regions"}.items():
        os.symlink(house / target, house / name)
    return house


def sentence(number: int) -> str:
    """One of many, in the words that all stand-ins know."""
    draw = random.Random(number)
    return " ".join(draw.choices(WORDS, k=draw.randint(4, 8)))


def picture(number: int) -> PIL.Image.Image:
    """Coloured noise, coarse enough to survive JPEG."""
    pixels = np.random.default_rng(number).integers(0, 255, (5, 6, 3), np.uint8)
    return PIL.Image.fromarray(pixels).resize((60, 50))


def _write_split(path: Path, count: int, seed: int, **columns: Any) -> None:
    numbers = [1000 * seed + number for number in range(count)]
    captions = [[sentence(5 * number + k) for k in range(5)] for number in numbers]
    for own in captions[::3]:
        own[0] += " on the left"  # what the protocol `contrast` looks for
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [_png(path.parent, number) for number in numbers]
    write_parquet(path, {"image": files, "caption": captions, **columns})


def _png(folder: Path, number: int) -> bytes:
    picture(number).save(folder / "one.png")
    content = (folder / "one.png").read_bytes()
    (folder / "one.png").unlink()
    return content


def _write_towers(house: Path) -> None:
    dinov2 = transformers.Dinov2Config(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16
    )
    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    towers: dict[str, Any] = dict.fromkeys((MOBILENET, "microsoft/resnet-50"), resnet)
    towers |= dict.fromkeys(("facebook/dinov2-base", "facebook/dinov2-small"), dinov2)
    for name, config in towers.items():
        transformers.AutoModel.from_config(config).save_pretrained(house / name)
        transformers.CLIPImageProcessorPil(**SIDE).save_pretrained(house / name)
    tokenizer = TVRNProcessor.from_captions([" ".join(WORDS)]).tokenizer
    fields = {name: value for name, value in TINY_BERT.items() if name != "model_type"}
    for name in (MINILM, MPNET, BERT):
        tokenizer.save_pretrained(house / name)
        transformers.BertModel(transformers.BertConfig(**fields, vocab_size=len(tokenizer))).save_pretrained(
            house / name
        )


def _write_photographs(house: Path) -> None:
    folders = {"home/photos": 6, "photos/winter": 12, "labelled-photos/dog": 2, "labelled-photos/cat": 2}
    for start, (folder, count) in enumerate(folders.items()):
        (house / folder).mkdir(parents=True)
        for number in range(count):
            picture(100 * start + number).save(house / folder / f"{number}.jpg")
    for number, name in enumerate(("dog.jpg", "cat.jpg", "first.png", "second.png")):
        picture(900 + number).save(house / name)
    (house / "val2017").mkdir()
    contrast = [{"image": f"{k}.jpg", "caption": sentence(k), "other_caption": sentence(k + 50)} for k in range(3)]
    for number in range(3):
        picture(950 + number).save(house / "val2017" / f"{number}.jpg")
    (house / "rows.json").write_text(json.dumps(contrast))
    rows = [(f"winter/{number}.jpg", sentence(number)) for number in range(12)]
    for table, folder in (("photos/captions.csv", ""), ("pairs.csv", "photos/")):
        with (house / table).open("w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *((folder + image, text) for image, text in rows)])
    boxes = [[[2.0, 3.0, 30.0, 40.0], [10.0, 5.0, 50.0, 45.0]]] * 6
    _write_split(house / "data" / "boxes.parquet", 6, seed=40, boxes=boxes)
    (house / "stsb").mkdir()
    pairs = {"sentence1": [sentence(k) for k in range(9)], "sentence2": [sentence(k + 4) for k in range(9)]}
    datasets.Dataset.from_dict({**pairs, "score": [k / 2 for k in range(9)]}).to_parquet(
        house / "stsb" / "validation.parquet"
    )

"""Images turned over with their captions, and training with them as hard negatives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from safetensors.torch import load_file
from training_makers import tiny_config, write_scan

from modeling_tvrn.data import CaptionDataset, PairCollator
from modeling_tvrn.data.flips import FLIPS, FlippingCollator, flip_of, flipped
from modeling_tvrn.training import TrainingConfig, train

BOTH = list(FLIPS)


@pytest.mark.parametrize(
    ("caption", "kind", "turned"),
    [
        ("a dog left of two cats", "left/right", "a dog right of two cats"),
        ("Left: a dog, on the RIGHT a cat", "left/right", "Right: a dog, on the Left a cat"),
        ("a dog above a cat", "above/below", "a dog below a cat"),
        ("at the top a dog, at the bottom a cat", "above/below", "at the bottom a dog, at the top a cat"),
        ("a dog over a cat on the left", "left/right", "a dog over a cat on the right"),
        ("a bright leftover overtakes", None, None),
    ],
)
def test_captions(caption: str, kind: str | None, turned: str | None) -> None:
    assert flip_of(caption, BOTH) == kind
    if kind is not None:
        assert FLIPS[kind].caption(caption) == turned
        assert FLIPS[kind].caption(turned).lower() == caption.lower()


@pytest.mark.parametrize(("kind", "by_pillow"), [("left/right", ImageOps.mirror), ("above/below", ImageOps.flip)])
def test_pixels_and_boxes_are_turned_alike(kind: str, by_pillow: Any) -> None:
    """What a box shows it shows afterwards as well."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 40, 3), dtype=np.uint8)
    record = {"image": Image.fromarray(pixels), "captions": ["x"]}
    turned = flipped(record, kind)
    assert np.array_equal(np.asarray(turned["image"]), np.asarray(by_pillow(record["image"])))
    box = np.array([[0.25, 0.1, 0.5, 0.6]])
    (found,) = flipped({"region_boxes": box}, kind)["region_boxes"]
    for own, boxes in ((record["image"], box[0]), (turned["image"], found)):
        x1, y1, x2, y2 = np.round(boxes * [40, 20, 40, 20]).astype(int)
        crop = own.crop((x1, y1, x2, y2))
        crop = by_pillow(crop) if own is turned["image"] else crop
        assert np.array_equal(np.asarray(crop), pixels[2:12, 10:20])
    assert box.tolist() == [[0.25, 0.1, 0.5, 0.6]]  # what came stays as it was
    with pytest.raises(ValueError, match="without boxes"):
        flipped({"region_features": box}, kind)


class Records:
    captions = (["a dog left of a cat", "a dog"], ["a dog above a cat"], ["nothing"])
    image_ids = ("a", "b", "c")

    def __len__(self) -> int:
        return 3

    def __getitem__(self, row: int) -> dict[str, Any]:
        pixels = np.random.default_rng(row).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        return {
            "image": Image.fromarray(pixels),
            "captions": list(self.captions[row]),
            "image_id": self.image_ids[row],
        }


def test_a_batch_gets_the_twins_of_what_can_be_turned() -> None:
    """Twins have images of their own, are encoded once, and their captions are theirs."""

    def processor(text: list[str], images: list[Image.Image], **_: Any) -> dict[str, Any]:
        return {"text": text, "images": images}

    items = CaptionDataset(Records())
    batch = FlippingCollator(PairCollator(processor), BOTH, 3)([items[k] for k in range(4)])
    assert batch["text"][4:] == ["a dog right of a cat", "a dog below a cat"]
    assert batch["image_ids"].tolist() == [0, 1, 2, 3, 7] and len(batch["images"]) == 5
    assert batch["text_image_ids"].tolist() == [0, 0, 1, 2, 3, 7]
    assert np.array_equal(np.asarray(batch["images"][3]), np.asarray(ImageOps.mirror(Records()[0]["image"])))
    only = FlippingCollator(PairCollator(processor), ["left/right"], 3)([items[2]])
    assert only["text"] == ["a dog above a cat"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["text_features=captions", "text=x"], "flip_negatives = .* beside text_features = 'captions'"),
        (["cusa=true", "cusa_image_teacher=a", "cusa_text_teacher=b"], "beside cusa = True"),
        (["streaming=true", "max_steps=5", "text=x"], "streaming = True and flip_negatives"),
        (["flip_negatives=[inside]"], "flip_negatives"),
    ],
)
def test_what_does_not_go_together(keys: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig.from_yaml(None, ["flip_negatives=left/right", *keys])


@pytest.mark.slow
def test_a_run_to_its_last_file(tmp_path: Path) -> None:
    """On the field's files: the twins' words are those of the captions, their boxes are turned."""
    data = write_scan(tmp_path)
    captions = data / "train_caps.txt"
    lines = captions.read_text().splitlines()
    captions.write_text("".join(f"{line} on the {('left', 'right')[n % 2]}\n" for n, line in enumerate(lines)))
    model = {"use_box_positions": True, "use_relative_geometry": True}
    results = train(tiny_config(data, tmp_path / "run", flip_negatives=["left/right"], model=model))
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written["metrics"] == results["metrics"] and written["config"]["flip_negatives"] == ["left/right"]
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert weights["box_embedding.2.weight"].abs().max() > 0  # they started at 0, and learned


@pytest.mark.slow
def test_features_without_boxes_are_refused_before_the_first_step(tmp_path: Path) -> None:
    data = write_scan(tmp_path)
    for boxes in data.glob("*_boxes.npy"):
        boxes.unlink()
    with pytest.raises(
        ValueError, match=r"use_geometric_context, use_box_positions\)\. Give them .*model\.use_box_pos"
    ):
        train(tiny_config(data, tmp_path / "run", model={"use_box_positions": True}))
    off = {"use_geometric_context": False}
    assert train(tiny_config(data, tmp_path / "run", model=off, epochs=1))["steps"] > 0

"""Values that mean nothing, or several things: missing captions, printed lists, NaN, boxes that are none."""

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from data_makers import write_images
from dual_encoder_makers import save_dual_encoder
from hub_makers import CAPTIONS, VIT, pixel_model, region_model, save
from safetensors.torch import load_file, save_file
from training_makers import TINY_VIT, tiny_config
from training_makers import write_images as write_pictures
from transformers import ViTModel

from modeling_tvrn import TVRNConfig, TVRNModel
from modeling_tvrn.data import ImageError, load_pairs
from modeling_tvrn.data.schema import read_captions
from modeling_tvrn.data.sources import check_regions
from modeling_tvrn.encoded_tvrn import EncodedImages
from modeling_tvrn.front_door import load_model
from modeling_tvrn.index import ImageTextIndex
from modeling_tvrn.training.loop import Training


class NAType:
    """pandas' NA, which can't be compared: pandas is no requirement."""

    def __ne__(self, other: object) -> bool:
        raise TypeError("boolean value of NA is ambiguous")

    __hash__ = None  # type: ignore[assignment]


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "captions"),
    [
        ([["a dog", NAN, None, "a cat"]], ["a dog", "", "", "a cat"]),
        ([["a dog", np.float32("nan"), NAType(), Decimal("nan")]], ["a dog", "", "", ""]),
        ([np.array(["a dog", NAN], dtype=object)], ["a dog", ""]),
        (["a dog", NAN, None, "a cat"], ["a dog", "", "", "a cat"]),
        ([[{"raw": "a dog"}, {"raw": NAN}]], ["a dog", ""]),
        ([NAN], []),
        ([np.float64("nan")], []),
        ([None], []),
        ([np.int64(7)], ["7"]),
        (["[null, NaN, \"a dog\"]"], ["", "", "a dog"]),
        (['["a dog", "a cat"]'], ["a dog", "a cat"]),
        (["['a dog', 'a cat']"], ["a dog", "a cat"]),
        (["['a dog','a cat']"], ["a dog", "a cat"]),
        ([" ['a dog', \"the dog's bone\"]\n"], ["a dog", "the dog's bone"]),
        (["['a dog' 'a cat']"], ["a dog", "a cat"]),
        (["['a dog'\n 'a cat'\n \"it's one\"]"], ["a dog", "a cat", "it's one"]),
        (["['a dog', None, nan]"], ["a dog", "", ""]),
        (["['caf\\xe9 \\'au lait\\'', 'a\\nb']"], ["café 'au lait'", "a\nb"]),
        (["['a, b', '[c]']"], ["a, b", "[c]"]),
        (["[]"], []),
        (["['one']"], ["one"]),
        (["[a dog] runs"], ["[a dog] runs"]),
        (["['a dog] runs"], ["['a dog] runs"]),
        (["'a dog', 'a cat'"], ["'a dog', 'a cat'"]),
        (["['a'b']"], ["['a'b']"]),
        (["[__import__('os').abort()]"], ["[__import__('os').abort()]"]),
        (["nan"], ["nan"]),  # a word, where text is text
        (["a dog\na cat"], ["a dog\na cat"]),  # one caption, but in a file of a caption a line
    ],
)  # fmt: skip
def test_captions_of_a_cell(values: list[Any], captions: list[str]) -> None:
    assert read_captions(values) == captions


@pytest.mark.parametrize("text", ["[" * 50_000, "['a'" + " 'a'" * 20_000 + "!]", "['" + "a\\\\" * 30_000])
def test_long_text_that_begins_as_a_list_does_not_hang(text: str) -> None:
    assert read_captions([text]) == [text]


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_captions_are_counted_not_read(tmp_path: Path, streaming: bool) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    rows = [
        {"filename": "a.png", "captions": ["a dog", None, "a cat"]},
        {"filename": "b.png", "captions": "['two dogs', nan]"},
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)).replace("null", "NaN"))
    records = load_pairs(tmp_path, streaming=streaming)
    found = {record["filename"]: record["captions"] for record in records}
    assert found == {"a.png": ["a dog", "a cat"], "b.png": ["two dogs"]}
    assert dict(records.skipped) == {"empty caption": 2}


def test_numbers_of_a_parquet_column_are_no_nan(tmp_path: Path) -> None:
    """A column of text and gaps becomes one of objects with NaN in pandas."""
    write_images(tmp_path, ["a.png"])
    columns = {"filename": ["a.png"], "caption_0": ["a dog"], "caption_1": [NAN], "caption_2": [None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    records = load_pairs(tmp_path / "a.parquet", image_root=tmp_path)
    assert records.captions == [["a dog"]]


# -- weights and vectors ----------------------------------------------------------------------------------------------


def spoil(folder: Path, value: float, dtype: torch.dtype = torch.float32) -> str:
    """Put one number into the largest weight of a checkpoint."""
    path = folder / "model.safetensors"
    weights = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()
    }
    name = max(weights, key=lambda each: weights[each].numel())
    weights[name].view(-1)[3] = value
    save_file(weights, path, metadata={"format": "pt"})
    return name


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_nan_are_refused_at_loading(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    folder = save(tmp_path, *region_model())
    name = spoil(folder, value, dtype)
    for load in (TVRNModel.from_pretrained, load_model):
        with pytest.raises(ValueError, match=rf"{name}' holds NaN or infinity"):
            load(folder)


def test_so_are_those_of_towers_and_dual_encoders(tmp_path: Path) -> None:
    ViTModel(VIT).save_pretrained(tmp_path / "vit")
    save_dual_encoder(tmp_path / "clip")
    for name, load in (
        ("vit", lambda path: TVRNModel.from_backbones(vision=path, hidden_size=8)),
        ("clip", TVRNModel.from_dual_encoder),
        ("clip", load_model),
    ):
        spoil(tmp_path / name, math.nan)
        with pytest.raises(ValueError, match=rf"{name}'.*holds NaN or infinity"):
            load(tmp_path / name)


@pytest.fixture(scope="module")
def index() -> ImageTextIndex:
    return ImageTextIndex.build(*pixel_model(), CAPTIONS, progress=False)


@pytest.mark.parametrize(
    ("vector", "said"),
    [
        ([NAN] * 10, "NaN"),
        ([0.1] * 9 + [math.inf], "infinity"),
        (torch.full((10,), torch.nan), "NaN"),
        ([0.0] * 10, "zeros"),
        ([0.1] * 9, r"\(9,\).*\(10,\)"),
        ([[0.1] * 10] * 2, r"\(2, 10\).*\(10,\)"),
        (0.5, r"\(\).*\(10,\)"),
        ("a dog", "vector.*numbers"),
        (None, "NaN"),
        (["a"] * 10, "vector.*numbers"),
    ],
)
def test_query_vectors_that_say_nothing_are_refused(index: ImageTextIndex, vector: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        index.search_vector(vector)


@pytest.mark.parametrize("form", ["list", "float64", "tensor", "bfloat16", "with grad", "row", "not normalised"])
def test_a_query_vector_has_any_form(index: ImageTextIndex, form: str) -> None:
    vector = np.random.default_rng(0).normal(size=10).astype(np.float32).astype(np.float64)
    vector = torch.from_numpy(vector).bfloat16().double().numpy()  # the same in every form
    tensor = torch.from_numpy(vector)
    forms = {
        "list": vector.tolist(), "float64": vector, "tensor": tensor, "bfloat16": tensor.bfloat16(),
        "with grad": tensor.clone().requires_grad_(), "row": vector[None], "not normalised": 50 * vector,
    }  # fmt: skip
    wanted = [(hit.id, pytest.approx(hit.cosine, abs=1e-6)) for hit in index.search_vector(vector.astype(np.float32))]
    assert [(hit.id, hit.cosine) for hit in index.search_vector(forms[form])] == wanted


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_encoded_features_of_nan_are_not_indexed(value: float) -> None:
    embeds = torch.nn.functional.normalize(torch.randn(3, 10), dim=1)
    embeds[1, 4] = value
    with pytest.raises(ValueError, match="NaN"):
        ImageTextIndex.build(*pixel_model(), EncodedImages(embeds), features=False, progress=False)


# -- SCAN's boxes -----------------------------------------------------------------------------------------------------


def scan(folder: Path, boxes: np.ndarray, sizes: np.ndarray | None = None) -> Path:
    np.save(folder / "test_ims.npy", np.ones((2, 3, 5), np.float32))
    (folder / "test_caps.txt").write_text("\n".join(f"caption {k}" for k in range(10)))
    np.save(folder / "test_boxes.npy", boxes)
    if sizes is not None:
        np.save(folder / "test_img_sizes.npy", sizes)
    return folder


@pytest.mark.parametrize(
    ("boxes", "sizes", "said"),
    [
        (np.zeros((2, 3, 4), "U1"), None, "numbers"),
        (np.full((2, 3, 4), 50.0), np.full((2, 2), NAN), "size above 0; .*nan.* 2 of 2 images"),
        (np.full((2, 3, 4), 50.0), np.full((2, 2), -100), "size above 0; .*-100"),
    ],
)
def test_scan_boxes_and_sizes_that_none_has_are_refused(tmp_path: Path, boxes: Any, sizes: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_pairs(scan(tmp_path, boxes, sizes), split="test")


@pytest.mark.parametrize("box", [[0.1, NAN, 0.5, 0.5], [0.5, 0.1, 0.4, 0.5], [0.1, 0.5, 0.4, 0.3]])
@pytest.mark.parametrize("is_masked", [False, True])
def test_boxes_of_a_record_that_are_none_leave_it_out(box: list[float], is_masked: bool) -> None:
    content = {"region_features": np.ones((2, 5)), "region_boxes": [[0.1, 0.1, 0.5, 0.5], box]}
    if is_masked:  # padding may hold anything
        check_regions({**content, "region_mask": [1, 0]})
        content["region_mask"] = [1, 1]
    with pytest.raises(ImageError, match="region_boxes hold NaN, or boxes with x2 < x1"):
        check_regions(content)


def test_scan_boxes_a_pixel_outside_are_clipped(tmp_path: Path) -> None:
    boxes = np.tile(np.array([-0.8, 0, 100.6, 50], np.float32), (2, 3, 1))
    record = load_pairs(scan(tmp_path, boxes, np.full((2, 2), 100)), split="test")[0]
    np.testing.assert_allclose(record["region_boxes"][0], [0, 0, 1, 0.5])


# -- sizes and towers that are none -----------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["vision_config", "text_config", "dual_encoder_config"])
@pytest.mark.parametrize("value", [{}, {"model_type": None}, {"hidden_size": 8}, 3, "vit", []])
def test_a_tower_of_nothing_is_a_sentence(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        TVRNConfig(**{field: value})


@pytest.mark.parametrize("side", [1, 5, 34, 70])
def test_pixels_that_a_tower_cannot_read_are_a_sentence(side: int) -> None:
    model, _ = pixel_model()
    with pytest.raises(ValueError, match=rf"'vit' refuses pixel_values of {side}×{side}.*expected 35×35.*image_size"):
        model.encode_images(pixel_values=torch.zeros(1, 3, side, side))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": {"vision_config": {}}}, "vision_config has model_type None"),
        ({"model": {"vision_config": 3}}, "vision_config is 3"),
        ({"model": {"text_config": {}, "vision_config": TINY_VIT}}, "text_config has model_type None"),
        ({"model": {"vision_config": TINY_VIT}, "image_size": 1}, "refuses pixel_values of 1×1"),
    ],
)
def test_a_run_with_such_a_tower_says_so(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    config = tiny_config(write_pictures(tmp_path / "data"), tmp_path / "run", data_options={}, **settings)
    with pytest.raises(ValueError, match=said):
        Training(config).fit()

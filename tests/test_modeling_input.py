"""Bad input to the model is an error that says what came, what was expected and what to do."""

import re
from itertools import pairwise

import pytest
import torch
from model_makers import FEATURES, SIZES, regions, tiny_model, words
from transformers import BertConfig, BertModel, ViTConfig

from modeling_tvrn import TVRNConfig, TVRNModel

BERT = BertConfig(hidden_size=22, num_attention_heads=2, num_hidden_layers=1, intermediate_size=41, vocab_size=31)
VIT = ViTConfig(
    hidden_size=14, num_attention_heads=2, num_hidden_layers=1, intermediate_size=19, image_size=32, patch_size=16
)


def says(*parts: str) -> str:
    """A pattern: these parts, in this order."""
    return "(?s)" + ".*".join(re.escape(part) for part in parts)


def at(value: torch.Tensor, place: tuple, new) -> torch.Tensor:
    value = value.clone()
    value[place] = torch.as_tensor(new).to(value.dtype)
    return value


REGIONS = {
    "no boxes": (
        lambda x: x.pop("region_boxes"),
        ("without region_boxes", "xyxy", "use_geometric_context=False"),
    ),
    "no images": (
        lambda x: x.update({key: value[:0] for key, value in x.items()}),
        ("(0, 7, 29)", "(images, regions, 29)"),
    ),
    "two dimensions": (
        lambda x: x.update(region_features=torch.ones(3, FEATURES)),
        ("(3, 29)", "(images, regions, 29)"),
    ),
    "another size": (
        lambda x: x.update(region_features=torch.ones(3, 7, 28)),
        ("(3, 7, 28)", "(images, regions, 29)", "region_feature_size"),
    ),
    "boxes of another count": (
        lambda x: x.update(region_boxes=x["region_boxes"][:, 1:]),
        ("region_boxes", "(3, 6, 4)", "(3, 7, 4)"),
    ),
    "boxes of three numbers": (
        lambda x: x.update(region_boxes=x["region_boxes"][..., 1:]),
        ("region_boxes", "(3, 7, 3)", "(3, 7, 4)"),
    ),
    "pixel boxes": (
        lambda x: x.update(region_boxes=at(x["region_boxes"], (0, 2), [0, 0, 300, 200])),
        ("region 2 of image 0", "[0.0, 0.0, 300.0, 200.0]", "[0, 1]", "image's width and height"),
    ),
    "negative boxes": (
        lambda x: x.update(region_boxes=at(x["region_boxes"], (0, 2), [-0.1, 0, 1, 1])),
        ("region 2 of image 0", "-0.1", "in [0, 1]"),
    ),
    "boxes inside out": (
        lambda x: x.update(region_boxes=at(x["region_boxes"], (0, 4), [0.5, 0, 0.25, 1])),
        ("region 4 of image 0", "[0.5, 0.0, 0.25, 1.0]", "x1 ≤ x2"),
    ),
    "NaN boxes": (
        lambda x: x.update(region_boxes=at(x["region_boxes"], (0, 1), torch.nan)),
        ("region 1 of image 0", "nan"),
    ),
    "all regions masked": (
        lambda x: x.update(region_mask=at(x["region_mask"], (1,), False)),
        ("region_mask masks every region", "rows [1]"),
    ),
    "mask of another shape": (
        lambda x: x.update(region_mask=torch.ones(3, 6)),
        ("region_mask", "(3, 6)", "(3, 7)"),
    ),
    "NaN features": (
        lambda x: x.update(region_features=at(x["region_features"], (2, 0, 5), torch.nan)),
        ("NaN or infinity", "rows [2]", "drop"),
    ),
    "infinite features": (
        lambda x: x.update(region_features=at(x["region_features"], (1, 0, 5), torch.inf)),
        ("NaN or infinity", "rows [1]"),
    ),
    "nothing": (lambda x: x.clear(), ("pixel_values or region_features",)),
    "both": (lambda x: x.update(pixel_values=torch.ones(3, 3, 32, 32)), ("pixel_values or region_features", "one")),
}
TEXTS = {
    "no texts": (
        lambda x: x.update({key: value[:0] for key, value in x.items()}),
        ("(0, 6)", "(texts, words)"),
    ),
    "no words": (
        lambda x: x.update({key: value[:, :0] for key, value in x.items()}),
        ("(4, 0)", "(texts, words)"),
    ),
    "one dimension": (lambda x: x.update(input_ids=torch.ones(6, dtype=torch.long)), ("(6,)", "(texts, words)")),
    "an empty caption": (
        lambda x: x.update(attention_mask=at(x["attention_mask"], (2,), 0)),
        ("attention_mask masks every word", "rows [2]"),
    ),
    "no word to match": (
        lambda x: x.update(word_mask=at(x["word_mask"], (1,), 0)),
        ("word_mask", "rows [1]"),
    ),
    "words beyond the attended": (
        lambda x: x.update(word_mask=1 - x["attention_mask"]),
        ("word_mask", "attention_mask"),
    ),
    "mask of another shape": (
        lambda x: x.update(word_mask=torch.ones(4, 7)),
        ("word_mask", "(4, 7)", "(4, 6)"),
    ),
    "nothing": (lambda x: x.clear(), ("input_ids or text_features", "exactly one")),
    "an id beyond the vocabulary": (
        lambda x: x.update(input_ids=at(x["input_ids"], (3, 1), 31)),
        ("input_ids", "31", "vocab_size", "tokenizer"),
    ),
    "a negative id": (
        lambda x: x.update(input_ids=at(x["input_ids"], (3, 1), -1)),
        ("input_ids", "-1", "vocab_size", "tokenizer"),
    ),
    "features without a tower": (
        lambda x: (x.pop("input_ids"), x.update(text_features=torch.ones(4, 6, 22))),
        ("text_features", "no text tower", "input_ids"),
    ),
}


class TestSides:
    @pytest.mark.parametrize("case", REGIONS)
    def test_regions(self, case):
        change, parts = REGIONS[case]
        inputs = regions()
        change(inputs)
        with pytest.raises(ValueError, match=says(*parts)):
            tiny_model().encode_images(**inputs)

    @pytest.mark.parametrize("case", TEXTS)
    def test_words(self, case):
        change, parts = TEXTS[case]
        inputs = words()
        change(inputs)
        with pytest.raises(ValueError, match=says(*parts)):
            tiny_model().encode_texts(**inputs)

    def test_boxes_are_optional_without_geometry(self):
        inputs = regions()
        model = tiny_model(use_geometric_context=False)
        with_boxes = model.encode_images(**inputs)
        del inputs["region_boxes"]
        assert torch.equal(model.encode_images(**inputs).embeds, with_boxes.embeds)

    def test_pixels_without_a_tower(self):
        with pytest.raises(ValueError, match=says("no vision tower", "region_features")):
            tiny_model().encode_images(pixel_values=torch.ones(2, 3, 32, 32))

    @pytest.mark.parametrize(
        ("change", "parts"),
        [
            ({"pixel_values": torch.ones(3, 32, 32)}, ("pixel_values", "(3, 32, 32)", "(images, 3, height, width)")),
            (
                {"pixel_values": torch.ones(2, 1, 32, 32)},
                ("pixel_values", "(2, 1, 32, 32)", "(images, 3, height, width)"),
            ),
            (
                {"pixel_values": torch.ones(0, 3, 32, 32)},
                ("pixel_values", "(0, 3, 32, 32)", "(images, 3, height, width)"),
            ),
            ({"pixel_values": torch.full((2, 3, 32, 32), torch.nan)}, ("NaN or infinity", "rows [0, 1]")),
            ({"region_boxes": torch.zeros(2, 4, 4)}, ("region_boxes", "pixel_values")),
            ({"region_mask": torch.ones(2, 4)}, ("region_mask", "pixel_values")),
        ],
    )
    def test_pixels(self, change, parts):
        model = tiny_model(vision_config=VIT, region_feature_size=14)
        with pytest.raises(ValueError, match=says(*parts)):
            model.encode_images(**({"pixel_values": torch.ones(2, 3, 32, 32)} | change))

    @pytest.mark.parametrize(
        ("features", "parts"),
        [
            (torch.ones(4, 6, 21), ("(4, 6, 21)", "(texts, words, 22)")),
            (torch.ones(4, 6), ("(4, 6)", "(texts, words, 22)")),
            (torch.full((4, 6, 22), torch.nan), ("NaN or infinity", "rows [0, 1, 2, 3]")),
        ],
    )
    def test_text_features(self, features, parts):
        model, inputs = tiny_model(text_config=BERT), words()
        del inputs["input_ids"]
        with pytest.raises(ValueError, match=says(*parts)):
            model.encode_texts(text_features=features, **inputs)

    def test_ids_and_features_at_once(self):
        with pytest.raises(ValueError, match=says("input_ids or text_features", "exactly one")):
            tiny_model(text_config=BERT).encode_texts(text_features=torch.ones(4, 6, 22), **words())


class TestPairs:
    def encoded(self, **settings):
        model = tiny_model(**settings)
        return model, model.encode_images(**regions()), model.encode_texts(**words())

    def test_an_empty_side(self):
        model, images, texts = self.encoded()
        with pytest.raises(ValueError, match=says("0 images, 4 texts")):
            model.match(images.select([]), texts)
        with pytest.raises(ValueError, match=says("3 images, 0 texts")):
            model.match(images, texts.select([]))

    @pytest.mark.parametrize("chunk_size", [0, -3])
    def test_chunk_size(self, chunk_size):
        model, images, texts = self.encoded()
        with pytest.raises(ValueError, match=says(f"chunk_size {chunk_size}", "at least 1")):
            model.match(images, texts, chunk_size=chunk_size)

    def test_galleries_of_other_models(self):
        """A saved gallery scores with the model that encoded it, and with no other variant."""
        settings = [
            {},
            {"refinement": "gru"},
            {"use_text_refinement": False},
            {"hidden_size": 36},
            {"projection_size": 8},
        ]
        sides = [self.encoded(**setting) for setting in settings]
        for (model, images, texts), (_, other_images, other_texts) in pairwise([*sides, sides[0]]):
            for mixed in ((images, other_texts), (other_images, texts), (other_images, other_texts)):
                with pytest.raises(ValueError, match=says("model", "encode")):
                    model.match(*mixed)

    @pytest.mark.parametrize(
        ("ids", "parts"),
        [
            ({}, ("3 images and 4 texts", "image_ids", "text_image_ids")),
            ({"image_ids": torch.arange(3)}, ("text_image_ids=None",)),
            ({"text_image_ids": torch.tensor([0, 1, 2, 0])}, ("image_ids=None",)),
            (
                {"image_ids": torch.arange(2), "text_image_ids": torch.tensor([0, 1, 1, 0])},
                ("image_ids", "(2,)", "(3,)"),
            ),
            (
                {"image_ids": torch.arange(3), "text_image_ids": torch.tensor([0, 1, 2])},
                ("text_image_ids", "(3,)", "(4,)"),
            ),
            (
                {"image_ids": torch.arange(3), "text_image_ids": torch.tensor([0, 1, 2, 7])},
                ("text_image_ids", "7", "drop"),
            ),
            (
                {"image_ids": torch.arange(3.0), "text_image_ids": torch.tensor([0, 1, 2, 0])},
                ("image_ids", "float32", "integer"),
            ),
        ],
    )
    def test_ids(self, ids, parts):
        with pytest.raises(ValueError, match=says(*parts)):
            tiny_model()(**regions(3), **words(4), **ids, return_loss=True)

    def test_ids_without_a_loss_and_ids_that_are_no_tensor(self):
        with pytest.raises(ValueError, match=says("image_ids", "(3,)", "(2,)")):
            tiny_model()(**regions(2), **words(2), image_ids=torch.arange(3), text_image_ids=torch.arange(2))
        with pytest.raises(ValueError, match=says("image_ids", "list", "int64 tensor")):
            tiny_model()(**regions(2), **words(2), image_ids=[0, 1], text_image_ids=[0, 1], return_loss=True)

    def test_no_loss_at_all(self):
        model = tiny_model(matching_loss_weight=0.0, contrastive_loss_weight=0.0, late_interaction_loss_weight=0.0)
        with pytest.raises(ValueError, match=says("loss_weight", "above 0")):
            model(**regions(3), **words(3), return_loss=True)


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "parts"),
        [
            ({"hidden_sise": 8}, ("hidden_sise", "hidden_size")),
            ({"refinement": "lstm"}, ("refinement", "'lstm'", "'gate', 'gru'")),
            ({"similarity_head": "mean"}, ("similarity_head", "'mean'", "'saf', 'sgr'")),
            ({"hidden_size": 0}, ("hidden_size", "0", "above 0")),
            ({"to_dict": 3}, ("unknown keyword", "'to_dict'")),
            ({"use_geometric_context": "no"}, ("use_geometric_context", "'no'", "True or False")),
            ({"logit_scale_init_value": "a"}, ("logit_scale_init_value", "'a'", "a number")),
            ({"vision_config": "facebook/x"}, ("vision_config", "'facebook/x'", "from_backbones")),
            ({"vocab_size": 20, "pad_token_id": 50}, ("pad_token_id", "50", "20", "0 to 19")),
            ({"attention_scale": "9"}, ("attention_scale", "'9'", "number above 0")),
            ({"iou_threshold": 1.5}, ("iou_threshold", "1.5", "[0, 1)")),
            ({"dropout": -0.1}, ("dropout", "-0.1", "[0, 1)")),
            ({"freeze_word_embeddings": True, "text_config": BERT}, ("freeze_word_embeddings", "use freeze_text")),
            ({"pooled_dropout": 1}, ("pooled_dropout", "1", "[0, 1)")),
            ({"matching_loss_weight": -1}, ("matching_loss_weight", "-1", "0 (off) or more")),
            ({"vision_grid_size": 0}, ("vision_grid_size", "0", "at least 1")),
            ({"pair_chunk_size": 0}, ("pair_chunk_size", "0")),
            ({"vision_config": {"model_type": "vti"}}, ("vision_config", "'vti'", "transformers")),
        ],
    )
    def test_values(self, settings, parts):
        with pytest.raises(ValueError, match=says(*parts)):
            TVRNConfig(**settings)

    def test_an_attribute_set_later_is_checked_by_the_model(self):
        config = TVRNConfig(**SIZES)
        config.refinement = "lstm"
        with pytest.raises(ValueError, match=says("refinement", "'lstm'")):
            TVRNModel(config)


class TestTowers:
    @pytest.mark.parametrize("half", ["vision", "text"])
    @pytest.mark.parametrize("place", ["nowhere/at-all", "./no-such-folder"])
    def test_not_found(self, half, place):
        with pytest.raises(ValueError, match=says(half, place, "Hub model id or a folder")):
            TVRNModel.from_backbones(**{half: place}, **SIZES)

    def test_a_folder_without_weights(self, tmp_path):
        BERT.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=says("text", str(tmp_path), "weights")):
            TVRNModel.from_backbones(text=tmp_path, **SIZES)

    def test_the_wrong_kind(self, tmp_path):
        BertModel(BERT).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=says("BertModel", "input_ids", "vision", "pixel_values")):
            TVRNModel.from_backbones(vision=tmp_path, **SIZES)

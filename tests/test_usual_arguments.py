"""What people who know transformers' models pass: to the processor, to the model, and when they load it."""

import copy
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from detector_makers import QUERIES, make_detector
from dual_encoder_makers import save_dual_encoder
from hub_makers import CAPTIONS, pixel_model, region_model, save
from model_makers import SIZES, regions, tiny_model, words
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.generic import PaddingStrategy
from transformers.utils.quantization_config import QuantizationConfigMixin

from modeling_tvrn import TVRNModel, TVRNProcessor
from modeling_tvrn.checks_tvrn import check_weights
from modeling_tvrn.data import CaptionDataset, PairCollator, load_pairs
from modeling_tvrn.storage.fingerprints import weights_digest

PICTURE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
LONG = "two dogs , one cat ! the cat sleeps"  # 9 words


@pytest.fixture(scope="module")
def pixels() -> tuple[TVRNModel, TVRNProcessor]:
    return pixel_model()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dual_encoder(tmp_path_factory.mktemp("clip"))


# -- the processor ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "width"),
    [
        ({"padding": True}, 9),
        ({"padding": "longest", "truncation": True}, 9),
        ({"padding": True, "truncation": True, "max_length": 5}, 5),
        ({"padding": "max_length", "max_length": 12}, 12),
        ({"padding": PaddingStrategy.MAX_LENGTH, "max_length": 12}, 12),
        ({"padding": "max_length"}, 64),
        ({"max_length": 80}, 9),
        ({"truncation": "longest_first", "max_length": 5}, 5),
        ({"text_kwargs": {"padding": "max_length", "max_length": 12}}, 12),
        ({"text_kwargs": {"max_length": 5, "return_tensors": "pt"}}, 5),
        ({"common_kwargs": {"return_tensors": "pt"}}, 9),
        ({"add_special_tokens": True, "return_attention_mask": True, "padding_side": "right"}, 9),
        ({"audio": None, "videos": None}, 9),
        ({"truncation": False}, 9),
        ({"images_kwargs": {}, "text_kwargs": {}}, 9),
    ],
)
def test_text_arguments(pixels: Any, arguments: dict[str, Any], width: int) -> None:
    """The score of a caption does not depend on how it is padded."""
    model, processor = pixels
    inputs = processor(images=[PICTURE], text=[LONG, "snow"], **arguments)
    assert {name: tuple(inputs[name].shape) for name in ("input_ids", "attention_mask", "word_mask")} == dict.fromkeys(
        ("input_ids", "attention_mask", "word_mask"), (2, width)
    )
    assert inputs["attention_mask"].sum(dim=1).tolist() == [min(width, 9), 1]
    plain = processor(images=[PICTURE], text=[LONG if width > 5 else " ".join(LONG.split()[:5]), "snow"])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits_per_image, model(**plain).logits_per_image)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"padding": False}, "padding=False.*1 to 9 tokens"),
        ({"padding": "left"}, "padding='left'.*'longest'"),
        ({"truncation": False, "max_length": 5}, r"text\[0\] has 9 tokens, over 5, and truncation=False"),
        ({"max_length": 0}, "max_text_length=0"),
        ({"stride": 3}, "stride=3.*padding, truncation, max_length"),
        ({"add_special_tokens": False}, "add_special_tokens=False"),
        ({"padding_side": "left"}, "padding_side='left'"),
        ({"padd": True}, "padd=True"),
        ({"images_kwargs": {"input_data_format": "channels_first"}}, "input_data_format"),
    ],
)
def test_arguments_that_it_cannot_keep_to_are_sentences(pixels: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pixels[1](images=[PICTURE], text=[LONG, "snow"], **arguments)


@pytest.mark.parametrize("arguments", [{"padding": False}, {"padding": "do_not_pad", "truncation": False}])
def test_captions_of_one_length_need_no_padding(pixels: Any, arguments: dict[str, Any]) -> None:
    assert pixels[1](text=["a dog", "a cat"], **arguments)["input_ids"].shape == (2, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"images_kwargs": {"size": {"height": 28, "width": 28}}},
        {"size": {"height": 28, "width": 28}},
        {"images_kwargs": {"do_normalize": False}},
        {"do_resize": False},
    ],
)
def test_image_arguments_are_the_image_processors(pixels: Any, arguments: dict[str, Any]) -> None:
    processor = pixels[1]
    wanted = processor.image_processor(
        images=[PICTURE], return_tensors="pt", **arguments.get("images_kwargs", arguments)
    )
    assert torch.equal(processor(images=[PICTURE], **arguments)["pixel_values"], wanted["pixel_values"])


def test_pictures_that_are_scaled_already_are_not_scaled_twice(pixels: Any) -> None:
    """transformers' way with floats in [0, 1]: do_rescale=False."""
    scaled = torch.from_numpy(np.asarray(PICTURE) / np.float32(255)).permute(2, 0, 1)
    found = pixels[1](images=scaled, images_kwargs={"do_rescale": False})["pixel_values"]
    assert torch.equal(found, pixels[1](images=PICTURE)["pixel_values"])


def test_a_dual_encoder_reads_no_more_than_it_learned_with(clip: Path) -> None:
    processor, model = TVRNProcessor.from_dual_encoder(clip), TVRNModel.from_dual_encoder(clip, **SMALL)
    inputs = processor(text=["a photo of a dog " * 99], padding="max_length", truncation=True, max_length=10_000)
    assert inputs["input_ids"].shape[1] == processor.max_text_length
    assert model.encode_texts(**inputs).embeds.isfinite().all()


def test_a_siglip_is_padded_as_it_learned(tmp_path: Path) -> None:
    processor = TVRNProcessor.from_dual_encoder(save_dual_encoder(tmp_path, "siglip"))
    plain = processor(text=["a dog"])
    for arguments in ({"padding": True}, {"padding": "max_length", "truncation": True}, {"padding": False}):
        inputs = processor(text=["a dog"], **arguments)
        assert set(inputs) == set(plain) and torch.equal(inputs["input_ids"], plain["input_ids"])
    with pytest.raises(ValueError, match=r"max_length=3\b"):
        processor(text=["a dog"], max_length=3)


# -- the model --------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"hidden_size": 12, "similarity_size": 7}


def test_a_tuple_on_request() -> None:
    model, inputs = tiny_model(), {**regions(2), **words(2)}
    output = model(**inputs)
    assert torch.equal(model(**inputs, return_dict=True).logits_per_image, output.logits_per_image)
    assert torch.equal(model(**inputs, return_dict=False)[0], output.logits_per_image)
    loss = model(**inputs, return_dict=False, return_loss=True)
    assert loss[0].ndim == 0 and torch.equal(loss[1], output.logits_per_image)
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)


def test_segments_of_one_sentence_are_taken_and_others_refused(pixels: Any) -> None:
    """BERT's tokenizer gives token_type_ids."""
    model, processor = pixels
    inputs = processor(images=[PICTURE], text=["a dog"])
    segments = torch.zeros_like(inputs["input_ids"])
    plain = model(**inputs)
    assert torch.equal(model(**inputs, token_type_ids=segments).logits_per_image, plain.logits_per_image)
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask", "word_mask")}
    assert torch.equal(model.encode_texts(**texts, token_type_ids=segments).embeds, plain.text_embeds)
    assert torch.equal(model.get_text_features(**texts, token_type_ids=segments).pooler_output, plain.text_embeds)
    with pytest.raises(ValueError, match="token_type_ids.*one sentence"):
        model(**inputs, token_type_ids=segments + 1)


class TestEmbeddings:
    def test_of_words_are_seen_and_resized(self, tmp_path: Path) -> None:
        model, inputs = tiny_model(), words()
        before = model.encode_texts(**inputs).embeds
        assert model.get_input_embeddings() is model.word_encoder.embeddings
        model.resize_token_embeddings(SIZES["vocab_size"] + 4)
        assert model.config.vocab_size == len(model.get_input_embeddings().weight) == SIZES["vocab_size"] + 4
        assert torch.equal(model.encode_texts(**inputs).embeds, before)
        model.encode_texts(input_ids=torch.full((1, 2), SIZES["vocab_size"] + 3))
        model.save_pretrained(tmp_path)
        again = TVRNModel.from_pretrained(tmp_path)
        assert torch.equal(again.encode_texts(**inputs).embeds, before)

    def test_padding_stays_padding(self) -> None:
        model = tiny_model()
        model.resize_token_embeddings(SIZES["vocab_size"] + 4)
        assert model.get_input_embeddings().padding_idx == model.config.pad_token_id

    def test_of_towers_are_seen_and_stay(self, pixels: Any, clip: Path) -> None:
        first_stage = TVRNModel.from_dual_encoder(clip, **SMALL)
        for model in (pixels[0], first_stage):
            assert model.get_input_embeddings() is model.tower("text").get_input_embeddings()
            with pytest.raises(ValueError, match="text tower.*tokenizer"):
                model.resize_token_embeddings(99)
            assert model.resize_token_embeddings() is model.get_input_embeddings()

    def test_are_set(self) -> None:
        model = tiny_model()
        other = nn.Embedding(SIZES["vocab_size"], SIZES["word_embedding_size"])
        model.set_input_embeddings(other)
        assert model.get_input_embeddings() is other


# -- quantisation -----------------------------------------------------------------------------------------------------


class Int8(nn.Module):
    """A linear map in 8 bits, as bitsandbytes and torchao have: its weight is no float."""

    def __init__(self, size: int, out: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out, size, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.ones(out, 1))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8":
        found = cls(linear.in_features, linear.out_features, linear.bias is not None)
        scale = linear.weight.data.abs().amax(dim=1, keepdim=True) / 127
        found.scale.copy_(scale)
        found.weight.data = (linear.weight.data / scale).round().to(torch.int8)
        found.bias = linear.bias
        return found


@register_quantization_config("int8_of_tests")
class Int8Config(QuantizationConfigMixin):
    def __init__(self, modules_to_not_convert: list[str] | None = None, **_: Any):
        self.quant_method = "int8_of_tests"
        self.modules_to_not_convert = modules_to_not_convert


@register_quantizer("int8_of_tests")
class Int8Quantizer(HfQuantizer):
    """Quantises, once the weights are there, every linear map that it may."""

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        kept = self.get_modules_to_not_convert(model, self.quantization_config.modules_to_not_convert)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and should_convert_module(name, kept):
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, Int8.of(module))
        return model

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False


def quantised_parts(model: nn.Module) -> set[str]:
    return {name.split(".")[0] for name, module in model.named_modules() if isinstance(module, Int8)}


def scores(model: Any, processor: Any) -> torch.Tensor:
    with torch.no_grad():
        inputs = processor(images=[PICTURE], text=CAPTIONS)
        return model.match(
            model.encode_images(inputs["pixel_values"]),
            model.encode_texts(**{name: value for name, value in inputs.items() if name != "pixel_values"}),
        )


@pytest.mark.parametrize("given", [None, ["text_model"], {"quant_method": "int8_of_tests"}])
def test_a_quantization_config_is_for_the_towers(pixels: Any, tmp_path: Path, given: Any) -> None:
    """The weights of TVRN itself are read, joined and moved in front of products: in 8 bits that would be garbage."""
    folder = save(tmp_path, *pixels)
    config = given if isinstance(given, dict) else Int8Config(given)
    model = TVRNModel.from_pretrained(folder, quantization_config=config)
    assert quantised_parts(model) == ({"vision_model"} if given == ["text_model"] else {"vision_model", "text_model"})
    torch.testing.assert_close(scores(model, pixels[1]), scores(*pixels), rtol=0, atol=0.2)


def test_a_detector_is_a_tower_too(tmp_path: Path) -> None:
    detector = make_detector(tmp_path / "yolos", "yolos")
    processor = TVRNProcessor.from_captions(CAPTIONS)
    processor.image_processor = TVRNProcessor.from_backbones(detector=detector).image_processor
    sizes = {**SIZES, "vocab_size": len(processor.tokenizer), "max_regions": QUERIES}
    exact = TVRNModel.from_backbones(detector=detector, **sizes).eval()
    quantised = TVRNModel.from_pretrained(save(tmp_path / "model", exact, processor), quantization_config=Int8Config())
    assert quantised_parts(quantised) == {"detector"}
    by_user = copy.deepcopy(exact)
    by_user.detector = dynamic(by_user.detector)
    for model in (quantised, by_user):
        torch.testing.assert_close(scores(model, processor), scores(exact, processor), rtol=0, atol=0.2)


def test_a_quantization_config_without_a_tower_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, *region_model())
    with pytest.raises(ValueError, match="quantization_config.*tower"):
        TVRNModel.from_pretrained(folder, quantization_config=Int8Config())


def dynamic(module: nn.Module) -> nn.Module:
    with pytest.warns(DeprecationWarning, match=r"torch\.ao|deprecated"):
        found: nn.Module = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    return found


def test_towers_in_dynamic_int8_score(pixels: Any) -> None:
    model = copy.deepcopy(pixels[0])
    for side in ("vision_model", "text_model"):
        setattr(model, side, dynamic(getattr(model, side)))
    torch.testing.assert_close(scores(model, pixels[1]), scores(*pixels), rtol=0, atol=0.2)


@pytest.mark.parametrize("quantised", ["dynamic", "int8"])
@pytest.mark.parametrize("call", ["encode_images", "encode_texts"])
def test_all_of_a_model_in_int8_is_refused_with_what_to_do(pixels: Any, quantised: str, call: str) -> None:
    model = copy.deepcopy(pixels[0])
    if quantised == "dynamic":
        model = dynamic(model)
    else:
        model.pair.head.gate = Int8.of(model.pair.head.gate)
    given = pixels[1](images=[PICTURE]) if call == "encode_images" else pixels[1](text=["a dog"])
    with pytest.raises(ValueError, match=r"quantised.*towers"):
        getattr(model, call)(**given)


# -- the collator -----------------------------------------------------------------------------------------------------


def table(**columns: Any) -> datasets.Dataset:
    pictures = [PICTURE, PIL.Image.new("RGB", (20, 10), "red"), PICTURE]
    features = {"image": datasets.Image()} | {name: datasets.Value("string") for name in columns}
    features |= {
        name: datasets.List(datasets.Value("string")) for name in columns if isinstance(columns[name][0], list)
    }
    return datasets.Dataset.from_dict({"image": pictures} | columns, features=datasets.Features(features))


TABLES = {
    "caption": ({"caption": ["a dog", "snow", "the cat"]}, 3),
    "text": ({"text": ["a dog", "snow", "the cat"]}, 3),
    "captions": ({"captions": [["a dog", "snow"], ["two dogs"], ["the cat"]]}, 4),
    "with ids": ({"captions": [["a dog"], ["two dogs"], ["the cat"]], "image_id": ["a", "b", "a"]}, 3),
}


@pytest.mark.parametrize("kind", TABLES)
def test_rows_of_a_data_set_are_collated(pixels: Any, kind: str) -> None:
    columns, captions = TABLES[kind]
    rows = table(**columns)
    collator = PairCollator(pixels[1])
    wanted = collator([rows[number] for number in range(3)])
    assert len(wanted["pixel_values"]) == 2 and len(wanted["input_ids"]) == captions, "one picture is there twice"
    assert wanted["text_image_ids"][0] == wanted["text_image_ids"][-1] != wanted["text_image_ids"][-2]
    loader = torch.utils.data.DataLoader(rows, batch_size=3, collate_fn=collator)
    for found in (collator(rows), collator(rows[:3]), next(iter(loader))):
        assert all(torch.equal(found[name], wanted[name]) for name in wanted if name != "return_loss")
    assert pixels[0](**wanted).loss.isfinite()


def test_a_data_set_in_place_of_records_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="Dataset.*load_pairs"):
        CaptionDataset(table(caption=["a dog", "snow", "the cat"]))  # type: ignore[arg-type]
    assert len(CaptionDataset(load_pairs(table(caption=["a dog", "snow", "the cat"])))) == 3


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([{"image": PICTURE}], "captions"),
        ([{"image": "https://example.org/a.png", "caption": "a dog"}], "load_pairs"),
        (["image"], "str"),
        ([], "0 items"),
    ],
)
def test_rows_of_something_else_are_a_sentence(pixels: Any, items: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PairCollator(pixels[1])(items)


def test_weights_made_of_other_tensors_have_a_digest() -> None:
    """torchao's: a subclass that says it is a float, of codes and scales."""

    def layer(*values: float) -> nn.Module:
        found = nn.Linear(2, 2, bias=False)
        found.weight = nn.Parameter(TwoTensor(*(torch.full((2, 2), value) for value in values)))
        return found

    check_weights(layer(1.0, 2.0), "a model")
    digests = [weights_digest(layer(*values)) for values in ((1.0, 2.0), (1.0, 3.0), (1.0, 2.0))]
    assert digests[0] != digests[1] and digests[0] == digests[2]

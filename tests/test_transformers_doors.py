"""transformers' pipelines on a saved model: by name, by the Hub page's snippets, and as the processor scores."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from dual_encoder_makers import WORDS, save_dual_encoder, tokenizer
from hub_makers import SIZES, VIT, region_model, save
from model_makers import shake
from transformers import BertConfig, ViTImageProcessorPil, pipeline

from modeling_tvrn import TVRNConfig, TVRNModel, TVRNProcessor
from modeling_tvrn.hub.card import pipeline_tag
from modeling_tvrn.processing_tvrn import special_ids

LABELS = ["animals", "humans", "landscape", *WORDS[2:5]]
# As the page of a model with the tags `custom_code` and `zero-shot-image-classification` shows them.
SNIPPETS = """
# Use a pipeline as a high-level helper
from transformers import pipeline

pipe = pipeline("zero-shot-image-classification", model="me/tvrn", trust_remote_code=True)
pipe(
    "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/hub/parrots.png",
    candidate_labels=["animals", "humans", "landscape"],
)

# Load model directly
from transformers import AutoProcessor, AutoModelForZeroShotImageClassification

processor = AutoProcessor.from_pretrained("me/tvrn", trust_remote_code=True)
model = AutoModelForZeroShotImageClassification.from_pretrained("me/tvrn", trust_remote_code=True)
"""
WITHOUT_PACKAGE = """
import json, sys
sys.modules["modeling_tvrn"] = None  # as where nobody has installed it
{snippets}
print(json.dumps([pipe({picture!r}, candidate_labels={labels!r}), type(model).__module__]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT and a BERT whose tokenizer puts every caption between two special tokens."""
    words = tokenizer()
    text = BertConfig(vocab_size=len(words), hidden_size=10, num_attention_heads=2, num_hidden_layers=1)
    towers = {"vision_config": VIT, "text_config": text, "region_feature_size": VIT.hidden_size}
    torch.manual_seed(5)
    model = shake(TVRNModel(TVRNConfig(**SIZES, **towers, special_token_ids=special_ids(words))))
    image_processor = ViTImageProcessorPil(size={"height": 35, "width": 35})
    made = save(tmp_path_factory.mktemp("saved"), model, TVRNProcessor(image_processor, words))
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(made / "dog.png")
    return made


def expected(folder: Path) -> dict[str, float]:
    """Probabilities of the labels from what the processor makes."""
    model, processor = TVRNModel.from_pretrained(folder).eval(), TVRNProcessor.from_pretrained(folder)
    text = [f"This is a photo of {label}." for label in LABELS]
    with torch.no_grad():
        logits = model(**processor(images=[folder / "dog.png"], text=text)).logits_per_image[0]
    return dict(zip(LABELS, logits.softmax(dim=0).tolist(), strict=True))


def test_a_pipeline_by_name_scores_as_the_processor_does(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline("zero-shot-image-classification", model=str(folder))
    found = pipe(str(folder / "dog.png"), candidate_labels=LABELS)
    assert {each["label"]: each["score"] for each in found} == pytest.approx(expected(folder), abs=1e-6)
    assert len({round(each["score"], 5) for each in found}) > 3 and "not supported" not in caplog.text


@pytest.mark.slow
def test_the_hubs_snippets_run_word_for_word_without_the_package(
    folder: Path, run_python: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = str(folder / "dog.png")
    snippets = SNIPPETS.replace("me/tvrn", str(folder))
    snippets = "\n".join(f'    "{picture}",' if "https://" in line else line for line in snippets.splitlines())
    said = run_python(WITHOUT_PACKAGE.format(snippets=snippets, picture=picture, labels=LABELS))
    found, module = json.loads(said.splitlines()[-1])
    assert {each["label"]: each["score"] for each in found} == pytest.approx(expected(folder), abs=1e-6)
    assert module.startswith("transformers_modules.")


def test_no_snippet_is_promised_where_none_runs(folder: Path) -> None:
    assert pipeline_tag(json.loads((folder / "config.json").read_text())) == "zero-shot-image-classification"
    assert pipeline_tag(region_model()[0].config.to_dict()) is None
    assert pipeline_tag({"detector_config": {"model_type": "d_fine"}, "vision_config": {}}) is None
    assert pipeline_tag({"dual_encoder_config": {"model_type": "siglip"}}) is None


def test_captions_that_siglip_would_misread_are_refused(tmp_path: Path) -> None:
    """It pools the last position; a pipeline's tokenizer pads to the longest caption."""
    model = TVRNModel.from_dual_encoder(save_dual_encoder(tmp_path, "siglip"))
    with pytest.raises(ValueError, match=r"captions of 4 tokens; this text side \(SigLIP\) reads exactly 16"):
        model.encode_texts(**tokenizer()(["two dog"], return_tensors="pt"))

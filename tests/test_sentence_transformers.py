"""Sentence Transformers on a saved model, in a process without this package: encode, compare, search, train, rank."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hub_makers import CAPTIONS, pixel_model, save

from modeling_tvrn import load_model

pytest.importorskip(
    "sentence_transformers", reason='Sentence Transformers come with pip install ".[sentence-transformers]"'
)

pytestmark = pytest.mark.slow  # a process that imports both libraries

PROGRAM = """
import json, sys
sys.modules["modeling_tvrn"] = None  # as where nobody has installed it
import datasets, PIL.Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import semantic_search

folder, trained, captions, *paths = sys.argv[1:]
captions = json.loads(captions)
model = SentenceTransformer(folder, trust_remote_code=True)
pictures = [PIL.Image.open(path) for path in paths]
images, texts = model.encode(paths), model.encode(captions)
found = {
    "images": images.tolist(), "pictures": model.encode(pictures).tolist(), "texts": texts.tolist(),
    "alone": model.encode(captions[0]).tolist(), "size": model.get_embedding_dimension(),
    "similarity": model.similarity(texts, images).tolist(), "hits": semantic_search(texts, images, top_k=2),
}
tvrn, calls = model.transformers_model, []
encode = tvrn.encode_images
tvrn.encode_images = lambda *args, **inputs: calls.append(len(inputs["pixel_values"])) or encode(*args, **inputs)
found["rank"] = tvrn.rank(captions[0], pictures, model.processor, batch_size=2)
gallery = encode(**model.processor(images=pictures))
found["again"] = tvrn.rank(captions[0], gallery, model.processor, top_k=1)
found["one"] = tvrn.rank(captions[0], paths[:1], model.processor)
found["encoded"] = calls
del tvrn.encode_images
found["refused"] = []
for query, gallery in ((" ", gallery), (captions[0], [])):
    try:
        tvrn.rank(query, gallery, model.processor)
    except ValueError as error:
        found["refused"].append(str(error))
columns = {"anchor": captions * 3, "positive": paths[: len(captions)] * 3}
rows = datasets.Dataset.from_dict(columns).cast_column("positive", datasets.Image())
before = [weight.clone() for weight in model.parameters()]
SentenceTransformerTrainer(
    model=model, train_dataset=rows, loss=MultipleNegativesRankingLoss(model),
    args=SentenceTransformerTrainingArguments(
        trained, max_steps=2, per_device_train_batch_size=4, learning_rate=0.01, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    ),
).train()
found["moved"] = sum(not after.equal(value) for value, after in zip(before, model.parameters()))
model.save_pretrained(trained)
found["trained"] = model.encode(captions).tolist()
found["reloaded"] = SentenceTransformer(trained, trust_remote_code=True).encode(captions).tolist()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("saved"), *pixel_model())
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.as_tensor(expected), atol=2e-6, rtol=1e-5)


def test_sentence_transformers_without_this_package(
    saved: Path, tmp_path: Path, run_python: Callable[..., str]
) -> None:
    paths = [str(saved / f"{number}.png") for number in range(5)]
    said = run_python(PROGRAM, str(saved), str(tmp_path / "trained"), json.dumps(CAPTIONS), *paths)
    found = json.loads(said.splitlines()[-1])
    model, processor = load_model(saved)
    with torch.no_grad():
        images, texts = model.encode_images(**processor(images=paths)), model.encode_texts(**processor(text=CAPTIONS))
        logits = model.match(images, texts)[:, 0]
    close(found["images"], images.embeds)
    close(found["pictures"], images.embeds)
    close(found["texts"], texts.embeds)  # of different lengths, in one batch
    close(found["alone"], texts.embeds[0])
    close(found["similarity"], texts.embeds @ images.embeds.T)
    assert found["size"] == model.config.projection_size
    nearest = (texts.embeds @ images.embeds.T).argsort(dim=1, descending=True)[:, :2].tolist()
    assert [[hit["corpus_id"] for hit in hits] for hits in found["hits"]] == nearest

    assert [each["corpus_id"] for each in found["rank"]] == logits.argsort(descending=True).tolist()
    close([each["score"] for each in found["rank"]], model.readable_scores(logits.sort(descending=True).values))
    assert found["again"] == found["rank"][:1] and len(found["one"]) == 1
    assert found["encoded"] == [2, 2, 1, 1], "each image once"
    assert "is an empty caption" in found["refused"][0] and found["refused"][1].startswith("rank got no images")

    assert found["moved"] > 10
    close(found["reloaded"], found["trained"])
    assert not np.allclose(found["trained"], found["texts"], atol=1e-3)
    again, processor = load_model(tmp_path / "trained")
    close(found["trained"], again.get_text_features(**processor(text=CAPTIONS)).pooler_output.detach())

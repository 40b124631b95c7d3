"""Retrieval tasks of mteb over a few images and captions in memory; only where mteb is installed."""

from collections.abc import Sequence
from typing import Any

import PIL.Image
from datasets import Dataset, Features, Image, Value
from mteb import TaskMetadata
from mteb.abstasks import AbsTaskRetrieval

SIDES = {"t": "text", "i": "image"}


def tiny_task(
    category: str,
    images: Sequence[PIL.Image.Image],
    captions: Sequence[Sequence[str]],
    name: str = "Tiny",
    extra: Sequence[str] = (),
) -> Any:
    """A task of a category such as "t2i"; `captions` holds those of each image, `extra` queries or documents more."""
    texts = [(row, f"t{row}-{k}", text) for row, own in enumerate(captions) for k, text in enumerate(own)]
    named = {
        "image": Dataset.from_dict(
            {"id": [f"i{row}" for row in range(len(images))], "image": list(images)},
            features=Features({"id": Value("string"), "image": Image()}),
        ),
        "text": Dataset.from_dict(
            {
                "id": [number for _, number, _ in texts] + [f"x{k}" for k in range(len(extra))],
                "text": [text for *_, text in texts] + list(extra),
            }
        ),
    }
    query, document = (SIDES.get(letter, "text") for letter in category.split("2"))
    relevant: dict[str, dict[str, int]] = {f"x{k}": {"i0": 1} for k in range(len(extra)) if category == "t2i"}
    for row, number, _ in texts:
        pair = (number, f"i{row}") if query == "text" else (f"i{row}", number)
        relevant.setdefault(pair[0], {})[pair[1]] = 1

    class Tiny(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name,
            description="A few images and captions.",
            reference=None,
            dataset={"path": "none/none", "revision": "1"},
            type="Any2AnyRetrieval",
            category=category,
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )

        def load_data(self, *_: Any, **__: Any) -> None:
            data = {"corpus": named[document], "queries": named[query], "relevant_docs": relevant, "top_ranked": None}
            self.dataset = {"default": {"test": data}}
            self.data_loaded = True

    return Tiny()

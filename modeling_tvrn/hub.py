"""What a checkpoint tells the Hub about itself: the model card."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

__all__ = ["CardMetadata", "write_model_card"]

PIPELINE_TAG = "feature-extraction"
TAGS = ("tvrn", "image-text-matching", "image-text-retrieval", "custom_code")
PACKAGE = Path(__file__).resolve().parent
# In a checkout beside the package, in an installed copy inside it.
TEMPLATES = (PACKAGE.parent / "model_cards" / "template.md", PACKAGE / "model_cards" / "template.md")


@dataclass(frozen=True)
class CardMetadata:
    """What the card's YAML header says.

    Attributes:
        name: of the model.
        base_models: Hub ids of the pretrained towers; paths of one machine mean nothing to others and are left out.
        datasets: Hub ids of the training data.
        dataset_name: what the evaluation data are called.
        split: which split was evaluated.
        metrics: metric name -> value, such as `image_to_text_R@1` in percent.
        language: of the captions.
    """

    name: str
    base_models: Sequence[str] = ()
    datasets: Sequence[str] = ()
    dataset_name: str = ""
    split: str = ""
    metrics: Mapping[str, float] | None = None
    language: str = "en"

    def header(self) -> ModelCardData:
        """As huggingface_hub writes it, with a model-index of the metrics."""
        more: dict[str, Any] = {
            name: list(value)
            for name, value in (("base_model", self.base_models), ("datasets", self.datasets))
            if value
        }
        if self.metrics:
            more |= {"model_name": self.name, "eval_results": self._results(self.metrics)}
        return ModelCardData(
            language=self.language,
            library_name="transformers",
            pipeline_tag=PIPELINE_TAG,
            tags=list(TAGS),
            **more,
        )

    def _results(self, metrics: Mapping[str, float]) -> list[EvalResult]:
        dataset_type = self.datasets[0] if self.datasets else self.dataset_name.lower().replace(" ", "-")
        return [
            EvalResult(
                task_type="image-text-retrieval",
                task_name="Image-text retrieval",
                dataset_type=dataset_type,
                dataset_name=self.dataset_name,
                dataset_split=self.split,
                metric_type=name,
                metric_name=name.replace("_", " "),
                metric_value=round(float(value), 2),
            )
            for name, value in metrics.items()
        ]


def template_path() -> Path:
    """Where the card's template lies.

    Raises:
        FileNotFoundError: neither in the checkout nor in the installed package.
    """
    for path in TEMPLATES:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"no template of the model card at {' or '.join(map(str, TEMPLATES))}; install the package again"
    )


def write_model_card(folder: str | os.PathLike[str], metadata: CardMetadata, **sections: Any) -> Path:
    """Render `model_cards/template.md` into a checkpoint's README.md.

    Args:
        folder: the checkpoint's folder.
        metadata: the YAML header.
        sections: the template's other variables.

    Returns:
        The path written to.
    """
    card = ModelCard.from_template(metadata.header(), template_path=str(template_path()), **sections)
    path = Path(folder) / "README.md"
    path.write_text(str(card), encoding="utf-8")
    return path

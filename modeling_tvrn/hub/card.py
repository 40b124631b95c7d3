"""The model card: a header that the Hub reads, and a text from `model_cards/template.md`."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

__all__ = ["CardMetadata", "pipeline_tag", "results_of_index", "text", "trained_on", "write_model_card"]

TAGS = ("tvrn", "image-text-matching", "image-text-retrieval", "custom_code")
PACKAGE = Path(__file__).resolve().parents[1]
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
        protocol: how: the protocol's name, and how many images and captions its gallery has.
        metrics: metric name -> value, such as `image_to_text_R@1` in percent.
        language: of the captions.
        license: of the weights, as the Hub names it; "other" goes with a `license_name`.
        license_name: what an "other" license is called.
        pipeline_tag: see `pipeline_tag`.
    """

    name: str
    base_models: Sequence[str] = ()
    datasets: Sequence[str] = ()
    dataset_name: str = ""
    split: str = ""
    protocol: Mapping[str, Any] | None = None
    metrics: Mapping[str, float] | None = None
    language: str = "en"
    license: str | None = None
    license_name: str | None = None
    pipeline_tag: str | None = None

    def header(self) -> ModelCardData:
        """As huggingface_hub writes it, with a model-index of the metrics."""
        more: dict[str, Any] = {
            name: list(value)
            for name, value in (("base_model", self.base_models), ("datasets", self.datasets))
            if value
        }
        if self.metrics:
            more |= {"model_name": self.name, "eval_results": self._results(self.metrics)}
        if self.license_name is not None:
            more["license_name"] = self.license_name
        return ModelCardData(
            language=self.language,
            license=self.license,
            library_name="transformers",
            pipeline_tag=self.pipeline_tag,
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
                metric_args=dict(self.protocol) if self.protocol else None,
            )
            for name, value in metrics.items()
        ]


def pipeline_tag(model_config: Mapping[str, Any]) -> str | None:
    """The task whose pipeline runs a model, for which the Hub's page shows a snippet; None where none does.

    A pipeline makes pixels and tokens by itself: none that a detector needs, and not padded as SigLIP reads them.

    Args:
        model_config: of config.json, or what of it differs from the defaults.
    """
    dual_encoder = model_config.get("dual_encoder_config")
    if model_config.get("detector_config") is not None or not (dual_encoder or model_config.get("vision_config")):
        return None
    siglip = dual_encoder is not None and str(dual_encoder.get("model_type")).startswith("siglip")
    return None if siglip else "zero-shot-image-classification"


def results_of_index(header: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a card's model-index by metric type.

    Raises:
        ValueError: the model-index has not the Hub's form.
    """
    try:
        return {
            metric["type"]: float(metric["value"])
            for model in header.get("model-index") or []
            for result in model["results"]
            for metric in result["metrics"]
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the card's model-index has not the Hub's form ({type(error).__name__}: {error})") from error


def trained_on(results: Mapping[str, Any]) -> str | None:
    """Why a run's figures do not tell how it does on images that it has not seen; None where they do.

    Args:
        results: results.json's content.
    """
    config, data = results.get("config") or {}, results.get("data") or {}
    split = config.get("validation_split")
    if overlap := data.get("overlap"):
        return f"{overlap['images']} images of the split {split} were trained on"
    # Of a stream nobody counts the images that both splits hold.
    if split is not None and split == config.get("train_split") and not data.get("set_aside"):
        return f"the split {split} was trained on"
    return None


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


def text(value: Any) -> str:
    """A value as Markdown that shows it and does nothing else: no HTML, link, heading or cell of a table."""
    shown = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"""[\\`*\[\]|~]|(?<!\w)_|_(?!\w)|^[#+=-]""", r"\\\g<0>", shown)


def code(value: Any) -> str:
    """A value as a span of code, whatever backticks it holds."""
    shown = " ".join(str(value).split())
    marks = _longer_than(shown)
    return f"{marks} {shown} {marks}" if shown.startswith("`") or shown.endswith("`") else f"{marks}{shown}{marks}"


def fenced(language: str, value: str) -> str:
    """Lines of code as a block, whatever fences they hold."""
    marks = _longer_than("``" + value)
    return f"{marks}{language}\n{value}\n{marks}"


def _longer_than(value: str) -> str:
    """Backticks, more than stand side by side in a text."""
    return "`" * (1 + max(map(len, re.findall("`+", value)), default=0))


def write_model_card(folder: str | os.PathLike[str], metadata: CardMetadata, **sections: Any) -> Path:
    """Render `model_cards/template.md` into a checkpoint's README.md.

    Args:
        folder: the checkpoint's folder, or a path that ends in .md.
        metadata: the YAML header.
        sections: the template's other variables, raw: the template says what is text and what is code.

    Returns:
        The path written to.
    """
    ways: dict[str, Any] = {"text": text, "code": code, "fenced": fenced}
    card = ModelCard.from_template(metadata.header(), template_path=str(template_path()), **ways, **sections)
    path = Path(folder) if Path(folder).suffix == ".md" else Path(folder) / "README.md"
    path.write_text(str(card).rstrip() + "\n", encoding="utf-8")
    return path

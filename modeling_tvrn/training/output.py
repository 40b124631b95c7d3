"""What a finished run leaves beside its weights: results.json, model card, curve, and a query's top results."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from ..data import PRESETS
from ..evaluation import EvaluationReport
from ..evaluation.encoding import encode_images
from ..hub import CardMetadata, write_model_card
from ..metrics import recall_table
from ..plots import plot_search_results, plot_training_curve
from ..words_tvrn import tokenize
from .settings import model_fields

if TYPE_CHECKING:
    from .config import TrainingConfig
    from .loop import Training

logger = logging.getLogger(__name__)

__all__ = ["write_results"]

TOP_RESULTS = 10
TOKENIZED_AT_ONCE = 4096
USAGE = """\
import torch
from transformers import AutoModel, AutoProcessor

name = "{name}"  # a folder or a Hub id
model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)

{images}
captions = ["two dogs run through the snow", "a child on a swing"]
with torch.inference_mode():
    images = model.encode_images(**processor({keywords}))  # once for a collection
    texts = model.encode_texts(**processor(text=captions))
    scores = model.match(images, texts).sigmoid()  # (images, captions)
print(scores)
"""
PIXELS = (
    'from PIL import Image\n\nimages = [Image.open(path) for path in ("first.jpg", "second.jpg")]',
    "images=images",
)
REGIONS = (
    "features = torch.rand(2, 36, {size})  # of your detector: (images, regions, features)\n"
    "boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, 36, 4)  # xyxy in [0, 1]",
    "region_features=features, region_boxes=boxes",
)


def write_results(run: Training) -> dict[str, Any]:
    """Measure the model that was kept and write everything that goes beside it.

    Returns:
        The content of results.json, and `table`, the recalls as Markdown.
    """
    config, folder = run.config, Path(run.config.output_dir)
    model = run.best.load().to(run.accelerator.device)
    report = final_report(run, model)
    results = collect_results(run, model, report)
    table = recall_table(report.systems(), f"{config.validation_split}, percent")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot_training_curve(run.progress.history, folder / "curve.png", chance=report.chance.rsum, title=folder.name)
    pictured = config.query is not None and draw_query(run, model, config.query)
    write_card(config, folder, results, table, pictured)
    run.progress.track(run.step, {f"best/{name}": value for name, value in results["metrics"].items()})
    run.accelerator.end_training()
    return {**results, "table": table}


def final_report(run: Training, model: Any) -> EvaluationReport:
    """The kept model's evaluation on the whole validation split: made while training, or made now."""
    if run.best.report is not None and run.validation.is_whole:
        return run.best.report
    with run.accelerator.autocast():
        return run.validation.final(model)


def collect_results(run: Training, model: Any, report: EvaluationReport) -> dict[str, Any]:
    """The content of results.json: plain JSON values."""
    evaluation = report.as_dict()
    return {
        **{name: evaluation.pop(name) for name in ("metrics", "embedding_metrics", "chance")},
        "best_step": run.best.step,
        "steps": run.step,
        **{name: evaluation.pop(name) for name in ("commit", "command", "device", "versions")},
        "seed": run.config.seed,
        "seconds": run.seconds() | {"total": time.perf_counter() - run.started},
        "parameters": {
            "total": sum(weight.numel() for weight in model.parameters()),
            "trained": run.trained_parameters,
        },
        "data": {
            "train": describe_records(run.train_records, run.processor),
            "validation": describe_records(run.validation_records, run.processor),
        },
        "evaluation": {name: value for name, value in evaluation.items() if value is not None},
        "config": run.config.as_dict(),
        "model_config": model.config.to_diff_dict(),
        "history": run.progress.history,
    }


def describe_records(records: Any, processor: Any) -> dict[str, Any]:
    """Sizes of one split, what was left out of it, and how many captions are longer than the limit."""
    captions = [caption for captions in records.captions for caption in captions]
    limit, cut = processor.max_text_length, 0
    for start in range(0, len(captions), TOKENIZED_AT_ONCE):
        _, lengths = tokenize(processor.tokenizer, captions[start : start + TOKENIZED_AT_ONCE], limit)
        cut += int((lengths > limit).sum())
    return {
        "images": len(records),
        "captions": len(captions),
        "skipped": dict(records.skipped),
        "truncated_captions": cut,
    }


def draw_query(run: Training, model: Any, query: str) -> bool:
    """Search the validation pictures for a text and draw the first ones found; False where there are no pictures."""
    pictures = run.pictures
    if "image" not in pictures[0]:
        logger.info("no query.png: the validation data hold region features and no pictures")
        return False
    with run.accelerator.autocast(), torch.inference_mode():
        images, _ = encode_images(model, run.processor, run.validation_records, progress=False)
        texts = model.encode_texts(**run.processor(text=[query]).to(model.device))
        scores = model.match(images, texts, run.config.evaluation_chunk_size)[:, 0].sigmoid()
    found = scores.topk(min(TOP_RESULTS, len(scores)))
    rows = found.indices.tolist()
    right = [query in pictures.captions[row] for row in rows]
    plot_search_results(
        query,
        [pictures[row]["image"] for row in rows],
        found.values.tolist(),
        Path(run.config.output_dir) / "query.png",
        positives=right if any(query in captions for captions in pictures.captions) else None,
    )
    return True


def write_card(config: TrainingConfig, folder: Path, results: dict[str, Any], table: str, pictured: bool) -> None:
    """Render the model card from the run's results."""
    model_config, data = results["model_config"], results["data"]
    recalls = {name: value for name, value in results["metrics"].items() if "R@" in name or name == "rsum"}
    has_tower = model_config.get("vision_config") is not None
    images, keywords = PIXELS if has_tower else REGIONS
    size = model_config.get("region_feature_size", 2048)
    metadata = CardMetadata(
        name=folder.resolve().name,
        base_models=[name for name in (config.vision, config.text) if name is not None and _is_hub_id(name)],
        datasets=_hub_datasets(config),
        dataset_name=config.data if not Path(config.data).exists() else Path(config.data).name,
        split=config.validation_split,
        metrics=recalls,
    )
    write_model_card(
        folder,
        metadata,
        title=metadata.name,
        summary=_summary(config, data),
        facts=_facts(config, results),
        results_title=f"{metadata.dataset_name}, split {metadata.split}, {data['validation']['images']} images and "
        f"{data['validation']['captions']} captions",
        results_table=table,
        curve="curve.png",
        query=config.query if pictured else None,
        query_picture="query.png",
        usage=USAGE.format(name=metadata.name, images=images.format(size=size), keywords=keywords).strip(),
        training_data=f"{metadata.dataset_name}, split {config.train_split}, {data['train']['images']} images and "
        f"{data['train']['captions']} captions",
        training_summary=f"{results['steps']} steps of {config.batch_size} captions in "
        f"{results['seconds']['training'] / 60:.1f} minutes on {results['device']}; the weights are those of step "
        f"{results['best_step']}, the best by validation rSum.",
        configuration=_changed_keys(config),
        limits=_limits(config),
        max_text_length=config.max_text_length,
        truncated_captions=data["train"]["truncated_captions"],
    )


def _summary(config: TrainingConfig, data: dict[str, Any]) -> str:
    pictures = "photographs" if config.data != "scenes" else "generated scenes"
    return (
        f"An image–text matching model trained on {data['train']['images']} {pictures} with "
        f"{data['train']['captions']} captions. It ranks images for a sentence and sentences for an image."
    )


def _limits(config: TrainingConfig) -> str:
    if config.data == "scenes":
        return "Trained on generated scenes of coloured shapes: it knows nothing of photographs."
    return "Trained on one set of captioned photographs: it carries their subjects, wording and biases."


def _facts(config: TrainingConfig, results: dict[str, Any]) -> dict[str, Any]:
    model = {**model_fields(), **results["model_config"]}
    scratch = (model.get("vision_config") or {}).get("model_type")
    image_side = f"{scratch} from scratch" if scratch else "region features"
    sizes = ("hidden_size", "projection_size", "similarity_size")
    parameters = results["parameters"]
    return {
        "Image side": _tower(config.vision, model["freeze_vision"]) or image_side,
        "Text side": _tower(config.text, model["freeze_text"]) or "word embeddings and BiGRU from scratch",
        "Refinement, head": f"{model['refinement']}, {model['similarity_head']}",
        "Sizes": ", ".join(f"{name.removesuffix('_size')} {model[name]}" for name in sizes),
        "Parameters": f"{parameters['total']:,}, of which {parameters['trained']:,} were trained",
        "Seed, commit": f"{results['seed']}, {results['commit'] or 'unknown'}",
    }


def _tower(name: str | None, frozen: bool) -> str | None:
    if name is None:
        return None
    shown = name if _is_hub_id(name) else Path(name).name
    return f"{shown}, {'frozen' if frozen else 'fine-tuned'}"


def _is_hub_id(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "~", "/")) and not Path(name).exists()


def _hub_datasets(config: TrainingConfig) -> list[str]:
    if config.data in PRESETS:
        return sorted(set(PRESETS[config.data].repositories.values()))
    return [config.data] if "/" in config.data and _is_hub_id(config.data) else []


def _changed_keys(config: TrainingConfig) -> str:
    """The keys that differ from the defaults, as YAML; of one machine's paths the last part alone."""
    default = type(config)().as_dict()
    changed = {name: value for name, value in config.as_dict().items() if value != default[name]}
    for name, value in changed.items():
        if isinstance(value, str) and Path(value).is_absolute():
            changed[name] = Path(value).name
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True).strip()

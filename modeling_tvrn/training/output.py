"""What a finished run leaves beside its weights: results.json, model card, curve, and a query's top results."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data import PairStream
from ..evaluation import EvaluationReport, evaluate_contrast
from ..evaluation.encoding import encode_images
from ..evaluation.fits import SMALLEST
from ..hub import split_label, write_run_card
from ..metrics import accuracy_table, recall_table
from ..plots import plot_calibration, plot_search_results, plot_training_curve
from ..processing_tvrn import tokenize
from ..redaction import redacted, redacted_text
from .best_model import TRAINED, save_model
from .calibration import calibrate_and_measure
from .interpolation import interpolate, starting_weights
from .unimodal_heads import UnimodalHeads

if TYPE_CHECKING:
    from .config import TrainingConfig
    from .run import Run

logger = logging.getLogger(__name__)

__all__ = ["write_results"]

TOP_RESULTS = 10
TOKENIZED_AT_ONCE = 4096


def write_results(run: Run) -> dict[str, Any]:
    """Measure the model that was kept and write everything that goes beside it.

    Every process calls it: they share the scoring, and the main one writes.

    Returns:
        The content of results.json, and `table`, the recalls as Markdown; empty in the other processes.
    """
    config, folder = run.config, Path(run.config.output_dir)
    run.accelerator.wait_for_everyone()
    model = run.best.load().to(run.accelerator.device)
    trained = report = final_report(run, model)
    if config.weight_interpolation is not None:
        report = take_mean(run, model)
    if not run.accelerator.is_main_process:
        return {}
    fits = None
    if len(run.validation_records) >= SMALLEST:
        fits = calibrate_and_measure(model, run.processor, run.validation_records)
    save_model(folder, model, run.processor)
    if any(name.startswith("dual_encoder.") for name in run.free):
        # What went in as a CLIP comes out as one, with what this run taught it.
        model.save_dual_encoder(folder / "dual_encoder", run.processor)
        if model.config.use_unimodal_heads:
            UnimodalHeads.of(model).save(folder / "dual_encoder")
    results = collect_results(run, model, report)
    if fits is not None:
        results["fits"] = fits.as_dict()
        plot_calibration(fits.bins, folder / "calibration.png", title=f"{folder.name}: does the best hit fit?")
    if config.weight_interpolation is not None:
        kept = {"share": config.weight_interpolation, "trained_metrics": trained.as_dict()["metrics"]}
        results["weight_interpolation"] = kept
    if run.zero_shot is not None:
        results["zero_shot"] = run.zero_shot.after(model, run.processor)
    table = recall_table(report.systems(), f"{split_label(results)}, percent")
    if report.gain is not None:
        table += f"\n\nPair score over its embeddings, rSum: {report.gain.in_words()}"
    if config.data == "scenes" and "image" in run.pictures[0] and model.config.looks:
        # What single recalls hardly show: whether it tells apart what differs in one thing.
        contrast = evaluate_contrast(model, run.processor, run.validation_records, progress=sys.stderr.isatty())
        results["contrast"] = contrast.as_dict()["kinds"]
        table += "\n\n" + accuracy_table(contrast.kinds, "the right one scores higher, percent")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot_training_curve(run.progress.history, folder / "curve.png", chance=report.chance.rsum, title=folder.name)
    (folder / "query.png").unlink(missing_ok=True)  # of an earlier run with another query
    if config.query is not None:
        draw_query(run, model, config.query)
    write_run_card(folder, results=results)
    run.progress.track(run.step, {f"best/{name}": value for name, value in results["metrics"].items()})
    return {**results, "table": table}


def final_report(run: Run, model: Any) -> EvaluationReport:
    """The kept model's evaluation on the whole validation split: made while training, or made now."""
    if run.best.report is not None and run.validation.is_whole:
        return run.best.report
    with run.accelerator.autocast():
        return run.validation.final(model)


def take_mean(run: Run, model: Any) -> EvaluationReport:
    """Put the mean of the model's weights and those of its start in their place; the evaluation of that.

    The main process keeps the model as it was in a folder of its own: a run that is taken up here begins there again.
    """
    config = run.config
    run.accelerator.wait_for_everyone()  # all have read the folder
    if run.accelerator.is_main_process:
        save_model(Path(config.output_dir) / TRAINED, model, run.processor)
    interpolate(model, starting_weights(config, type(model)), config.weight_interpolation or 0.0)
    with run.accelerator.autocast():
        return run.validation.final(model)


def collect_results(run: Run, model: Any, report: EvaluationReport) -> dict[str, Any]:
    """The content of results.json: plain JSON values, without secrets."""
    evaluation = report.as_dict()
    collected = {
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
            **run.about_data,
        },
        "teachers": {cache.modality: cache.source for cache in run.teachers},
        "evaluation": {name: value for name, value in evaluation.items() if value is not None},
        "config": run.config.as_dict(),
        "recipe": changed_keys(run.config),
        "model_config": model.config.to_diff_dict(),
        "history": run.progress.history,
    }
    return dict(redacted(collected))


def describe_records(records: Any, processor: Any) -> dict[str, Any]:
    """Sizes of one split, what was left out of it, and how many captions are longer than the limit."""
    if isinstance(records, PairStream):  # whose sizes nobody knows; what was skipped, the workers have said
        return {"streamed": True, "skipped": dict(records.skipped)}
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


def draw_query(run: Run, model: Any, query: str) -> None:
    """Search the validation pictures for a text and draw the first ones found, where there are pictures."""
    pictures = run.pictures
    if "image" not in pictures[0]:
        logger.info("no query.png: the validation data hold region features and no pictures")
        return
    with run.accelerator.autocast(), torch.inference_mode():
        images, _ = encode_images(model, run.processor, run.validation_records, progress=False)
        texts = model.encode_texts(**run.processor(text=[query]).to(model.device))
        logits = model.match(images, texts)[:, 0].double()
    found = logits.topk(min(TOP_RESULTS, len(logits)))  # in float32 the sigmoids of the best would tie
    rows = found.indices.tolist()
    right = [query in pictures.captions[row] for row in rows]
    plot_search_results(
        redacted_text(query),
        [pictures[row]["image"] for row in rows],
        model.scores(found.values).tolist(),
        Path(run.config.output_dir) / "query.png",
        positives=right if any(query in captions for captions in pictures.captions) else None,
    )


def changed_keys(config: TrainingConfig) -> list[str]:
    """The keys that differ from the defaults: the recipe, as the card shows it."""
    default = type(config)().as_dict()
    return [name for name, value in config.as_dict().items() if value != default[name]]

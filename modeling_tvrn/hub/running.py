"""The checks that load a checkpoint: here for its processor, and in clean processes for everything."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configuration_tvrn import TVRNConfig
from ..processing_tvrn import TVRNProcessor
from . import probe
from .apart import Outcome, load_apart, write_inputs
from .files import foreign_code, read_json
from .report import Check

__all__ = ["check_keys", "check_processor", "check_running"]

TOLERANCE = 1e-5  # of a logit, relative to the largest; the same code on the same inputs differs by far less
RESAVE = "save again with the installed modeling_tvrn and run the doctor on the new folder"


def check_running(
    folder: Path, trust_remote_code: bool, timeout: float, memory: tuple[Any, Any] | None
) -> list[Check]:
    """Processor, loading, keys, state and logits.

    Args:
        folder: the checkpoint.
        trust_remote_code: whether its own code may run.
        timeout: seconds for each process.
        memory: the model and processor that were saved there.
    """
    processor, processor_check = check_processor(folder)
    with tempfile.TemporaryDirectory(prefix="tvrn-doctor-") as temporary:
        workplace = Path(temporary)
        size = read_json(folder / "config.json").get("region_feature_size", TVRNConfig.region_feature_size)
        write_inputs(workplace, size, getattr(processor, "tokenizer", None))
        outcomes = load_apart(folder, workplace, trust_remote_code, timeout)
        expected = _logits_in_memory(*memory, workplace) if memory is not None else None
    loading = [_check_loading(name, outcomes.get(name), folder) for name in ("with", "without")]
    return [
        processor_check,
        *loading,
        check_keys(outcomes["with"]),
        _check_state(outcomes),
        _check_logits(outcomes, expected),
    ]


def check_processor(folder: Path) -> tuple[Any, Check]:
    """The processor loads and fits the model: the parts it needs, and no token beyond the vocabulary."""
    name = "processor"
    try:
        processor = TVRNProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        config = TVRNConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        return None, Check(name, "failed", str(error), "write it with processor.save_pretrained into the same folder")
    problems = []
    if processor.tokenizer is None:
        problems.append("no tokenizer, so no caption can be read")
    else:
        tower = config.text_tower_config
        words = config.vocab_size if tower is None else tower.vocab_size
        if len(processor.tokenizer) > words:
            problems.append(f"{len(processor.tokenizer)} tokens for a model of {words}")
    if config.looks and processor.image_processor is None:
        problems.append("no image processor, but the model has a vision tower or a detector")
    if (config.region_source == "pooled_map") != (processor.detector_image_processor is not None):
        problems.append("an image processor of the detector too many or missing")
    if not config.looks and processor.image_processor is not None:
        problems.append("an image processor, but the model reads region features")
    if problems:
        return processor, Check(
            name, "failed", "; ".join(problems), "save the processor that the model was trained with"
        )
    reads = "pictures" if processor.image_processor is not None else "region features"
    detail = f"reads {reads} and captions of up to {processor.max_text_length} tokens"
    return processor, Check(name, "ok", detail)


def _check_loading(which: str, outcome: Outcome | None, folder: Path) -> Check:
    """One process loaded model and processor, and ran the code it was meant to."""
    name = f"loads {which} the package"
    if outcome is None:
        foreign = foreign_code(folder)
        code = f"of which {', '.join(foreign)} differ from the installed package's" if foreign else "the package's own"
        detail = f"would run the checkpoint's {len(list(folder.glob('*.py')))} Python files, {code}"
        return Check(
            name, "not run", detail, "look at them, then say so: trust_remote_code=True (--trust-remote-code)"
        )
    errors = [outcome.error] if outcome.error else []
    errors += [
        f"{step}: {facts['error']}"
        for step in ("processor", "model")
        if "error" in (facts := outcome.facts.get(step, {}))
    ]
    if errors:
        return Check(name, "failed", _one_line("; ".join(errors)), RESAVE)
    expected = "modeling_tvrn." if which == "with" else "transformers_modules."
    modules = [outcome.facts[step]["module"] for step in ("model", "processor")]
    if not all(module.startswith(expected) for module in modules):
        return Check(name, "failed", f"code of {' and '.join(modules)} ran; expected {expected}*", RESAVE)
    whose = "the installed code" if which == "with" else "the checkpoint's own code"
    return Check(name, "ok", f"in a clean process, {whose}, {outcome.facts['model']['dtype']}")


def check_keys(outcome: Outcome) -> Check:
    """Every weight that the config asks for, and no other: what the package's `from_pretrained` insists on."""
    error = outcome.facts.get("model", {}).get("error", outcome.error)
    if any(kind in error for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        advice = "a config changed after training does not fit its weights any more; use the one they were saved with"
        return Check("keys", "failed", _one_line(error), advice)
    if error or "model" not in outcome.facts:
        return Check("keys", "not run", "needs a model that loads")
    return Check("keys", "ok", "every weight that the config asks for, and no other")


def _check_state(outcomes: Mapping[str, Outcome]) -> Check:
    """Tied weights are one tensor and buffers have their values in every process."""
    name, problems = "tied keys, buffers", []
    seen: dict[str, Any] = {}
    for which, outcome in outcomes.items():
        state = outcome.facts.get("state", {})
        if "error" in state:
            problems.append(f"{which} the package: {state['error']}")
        for key, what in (
            ("meta", "without a value"),
            ("wrong_buffers", "unlike a new model's"),
            ("untied", "not tied"),
        ):
            if state.get(key):
                problems.append(f"{which} the package, {what}: {', '.join(state[key][:3])}")
        seen |= state
    if problems:
        return Check(name, "failed", _one_line("; ".join(problems)), RESAVE)
    if "buffers" not in seen:
        return Check(name, "not run", "needs a model that loads")
    return Check(name, "ok", f"{seen['tied']} tied keys, {seen['buffers']} buffers, all with their values")


def _logits_in_memory(model: Any, processor: Any, workplace: Path) -> np.ndarray | None:
    """What the model computes before it is saved; None on an accelerator, whose rounding is another."""
    if model.device.type != "cpu":
        return None
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model(**probe.model_inputs(processor, workplace))
        return output.logits_per_image.float().numpy()
    finally:
        model.train(training)


def _check_logits(outcomes: Mapping[str, Outcome], expected: np.ndarray | None) -> Check:
    """Finite, not all the same, and the same wherever they were computed."""
    name = "logits"
    errors = [
        f"{which} the package: {error}"
        for which, outcome in outcomes.items()
        if (error := outcome.facts.get("logits", {}).get("error"))
    ]
    if errors:
        return Check(name, "failed", _one_line("; ".join(errors)), RESAVE)
    found = {
        f"{which} the package": outcome.logits for which, outcome in outcomes.items() if outcome.logits is not None
    }
    if len(found) < len(outcomes) or not found:  # a process failed or ran out of time
        return Check(name, "not run", "needs a model and a processor that load")
    if expected is not None:
        found["in memory"] = expected
    reference = found["with the package"]
    if not all(np.isfinite(logits).all() for logits in found.values()):
        return Check(name, "failed", "NaN or infinite on harmless inputs", "look for overflow, or a broken checkpoint")
    if min(reference.std(axis=0).max(), reference.std(axis=1).max()) == 0:
        return Check(name, "failed", "all the same, whatever the inputs", "the model has collapsed; train it again")
    return _compare(name, found, reference)


def _compare(name: str, found: dict[str, np.ndarray], reference: np.ndarray) -> Check:
    shape = f"{reference.shape[0]} images and {reference.shape[1]} captions"
    if len(found) == 1:
        return Check(name, "not run", f"finite for {shape}, but there is nothing to compare them with")
    scale = max(1.0, float(np.abs(reference).max()))
    differences = {where: float(np.abs(logits - reference).max()) / scale for where, logits in found.items()}
    worst = max(differences, key=lambda where: differences[where])
    if differences[worst] > TOLERANCE:
        detail = f"{worst} differ from those with the package by {differences[worst]:.1e} (allowed {TOLERANCE:.0e})"
        advice = "the shipped code computes something else than the installed one: were both of one version?"
        return Check(name, "failed", detail, advice)
    return Check(name, "ok", f"the same {', '.join(found)}: {shape}, largest difference {differences[worst]:.1e}")


def _one_line(text: str, limit: int = 400) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"

"""The model card's metadata, which decides whether others find a checkpoint and can judge it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..plain_yaml import load_yaml, yaml_problem
from .card import pipeline_tag, results_of_index, trained_on
from .files import read_json
from .report import Check

__all__ = ["check_card"]

NAME = "card"
REWRITE = "push with modeling_tvrn.hub.push_to_hub or `tvrn push`, which write it, or fill in the template by hand"
ROUNDING = 0.0051  # percent points: cards show two decimals


def check_card(folder: Path, published: bool) -> Check:
    """README.md has a header that the Hub understands, and its figures are those of results.json, of unseen images.

    Args:
        folder: the checkpoint.
        published: a repository of the Hub; a folder gets its card, at the latest, when it is pushed.
    """
    path = folder / "README.md"
    if not path.is_file():
        return Check(NAME, "failed" if published else "warning", "no README.md", REWRITE)
    try:
        header = read_header(path)
        problems = list(_wrong(header, read_json(folder / "config.json")))
        problems += list(_other_figures(header, read_json(folder / "results.json")))
    except ValueError as error:
        return Check(NAME, "failed", str(error), REWRITE)
    if problems:
        return Check(NAME, "failed", "; ".join(problems), REWRITE)
    missing = [key for key in ("license", "datasets", "model-index") if not header.get(key)]
    if missing:
        return Check(NAME, "warning", f"the header says nothing of: {', '.join(missing)}", REWRITE)
    return Check(NAME, "ok", f"{len(results_of_index(header))} figures, license {header['license']}")


def read_header(path: Path) -> dict[str, Any]:
    """The YAML at the beginning of a card.

    Raises:
        ValueError: there is none.
    """
    before, _, rest = path.read_text("utf-8").partition("---\n")
    block, end, _ = rest.partition("\n---")
    if before.strip() or not end:
        raise ValueError("README.md does not begin with a YAML header between two lines of ---")
    try:
        header = load_yaml(block)
    except yaml.YAMLError as error:
        raise ValueError(f"README.md's header is not YAML ({yaml_problem(error)})") from error
    if not isinstance(header, dict):
        raise ValueError("README.md's header holds no keys")
    return header


def _wrong(header: dict[str, Any], model_config: dict[str, Any]) -> Iterator[str]:
    expected: dict[str, str | None] = {"library_name": "transformers"}
    if model_config:  # a card alone says nothing of what its model reads
        expected["pipeline_tag"] = pipeline_tag(model_config)
    for key, value in expected.items():
        if header.get(key) != value:
            yield f"{key} is {header.get(key)!r}; expected {value!r}"
    for tag in ("custom_code", "tvrn"):
        if tag not in (header.get("tags") or []):
            yield f"the tag {tag!r} is missing"


def _other_figures(header: dict[str, Any], results: dict[str, Any]) -> Iterator[str]:
    """Figures of the card that results.json does not have, or that are of images the run was trained on."""
    measured, shown = results.get("metrics") or {}, results_of_index(header)
    if shown and (reason := trained_on(results)):
        yield f"the model-index has figures, but {reason}"
    for name, value in shown.items():
        if name in measured and abs(measured[name] - value) > ROUNDING:
            yield f"{name} is {value:g} in the card and {measured[name]:g} in results.json"

"""A model to three ONNX files with everything beside them that running them needs."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..engines import need_onnx, write_onnx
from ..modeling_tvrn import TVRNModel
from ..pixels_tvrn import pads, pixel_table
from ..processing_tvrn import check_length, special_ids, tokenize
from ..storage.files import publish_folder, replacing
from .graphs import Graph, exportable, image_graph, pair_graph, text_graph
from .parity import compare
from .report import ExportReport, Parity
from .samples import sample_images, sample_texts, vocabulary_size
from .tvrn_onnx import MANIFEST, OnnxModel

logger = logging.getLogger(__name__)

# Sizes traced: all different and above 1, so that none is taken for another or for a constant.
IMAGES, REGIONS, TEXTS, WORDS = 3, 5, 4, 7
TOLERANCE = 1e-4
PROBES = ["A dog runs through the snow.", "Two children — one red ball!", "café  NOIR " * 60]
# For `pip install FOLDER`: the command tvrn-search, and the four libraries that it needs.
SEARCH_PROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "tvrn-search"
version = "{version}"
description = "Search photographs with an exported TVRN; no torch."
license = "Apache-2.0"
requires-python = ">=3.11"
dependencies = ["onnxruntime>=1.23", "numpy>=2.0", "pillow>=11.3", "tokenizers>=0.23.1"]
scripts = {{ tvrn-search = "tvrn_search:main" }}

[tool.setuptools]
py-modules = ["tvrn_search", "tvrn_onnx", "pixels_tvrn", "image_folder"]
"""


def export_onnx(
    model: TVRNModel,
    processor: Any,
    directory: str | os.PathLike[str],
    *,
    image_input: str | None = None,
    tolerance: float = TOLERANCE,
    search: bool = False,
) -> ExportReport:
    """Write image side, text side and pair stage as ONNX files; the numbers of items, regions and words stay open.

    The folder also gets the processor's files, `tvrn_onnx.json` (names, types and shapes of inputs and outputs, how
    pictures and captions become inputs) and `tvrn_onnx.py`, which runs all that without torch and transformers. It is
    there whole or not at all; an earlier export in it is replaced.

    Args:
        model: In float32.
        processor: Its processor.
        directory: New or empty, or an earlier export.
        image_input: "pixels" (default for a model with a vision tower or a detector, the only one over a dual encoder)
            or "regions". Through a detector the graph takes one picture at a time.
        tolerance: Largest difference from the model under onnxruntime, absolute up to values of 1 and relative beyond.
        search: Also write `tvrn_search.py`, which searches a folder of photographs with the export, and what
            `pip install FOLDER` needs to make the command `tvrn-search` of it.

    Raises:
        ImportError: If the extra is missing.
        ValueError: If the model is not in float32, a part can't be exported, its processor gives no fixed size of
            pictures, the directory holds something else, the graphs differ from the model by more than `tolerance`, or
            `search` is asked of an export that does not read pictures and captions.
    """
    need_onnx("the export")
    _check_precision(model)
    target = _check_directory(Path(directory))
    pixel_shape, text_length = _pixel_shape(model, processor, image_input), _text_length(processor)
    copied = exportable(model).cpu()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        whole = Path(folder) / target.name
        whole.mkdir()
        manifest = _write_graphs(copied, pixel_shape, text_length, whole)
        manifest["score_kind"] = model.score_kind
        manifest["calibration"] = [float(model.calibration_scale), float(model.calibration_shift)]
        # What `fits` reads of a text's embedding; none without fitted probabilities.
        manifest["calibration_query"] = model.calibration_query.tolist() if model.has_probabilities else None
        manifest |= {"pixels": _pixel_recipe(processor, pixel_shape), "tokens": _token_recipe(processor)}
        _write_beside(whole, processor, manifest)
        exported = OnnxModel(whole)
        if not _same_tokens(exported, processor):
            manifest["tokens"] = None
        parity = compare(model, pixel_shape, text_length, exported)
        _check_parity(parity, tolerance)
        manifest["largest_difference"] = max(each.worst for each in parity)
        if search:
            _write_search(whole, manifest)
        write_manifest(whole, manifest)
        publish_folder(whole, target)
    sizes = {name: megabytes(target, name) for name in manifest["files"]["float32"].values()}
    return ExportReport(target, sizes, parity, manifest["pixels"] is not None, manifest["tokens"] is not None)


def _check_precision(model: TVRNModel) -> None:
    found = sorted({str(weight.dtype) for weight in model.parameters()} - {"torch.float32"})
    if found:
        raise ValueError(
            f"The model has weights in {', '.join(found)}; an export is made in float32: load it with "
            "from_pretrained(..., dtype=torch.float32), and quantise the graphs with quantize_onnx."
        )


def _text_length(processor: Any) -> int | None:
    """Tokens that the processor pads every caption to; None where it pads to the longest of a batch."""
    if processor.text_padding != "max_length":
        return None
    return check_length(processor.max_text_length, processor.tokenizer)


def _check_directory(directory: Path) -> Path:
    directory = directory.absolute()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; expected the name of a folder.")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / MANIFEST).is_file():
        raise ValueError(f"{directory} holds something else than an export; expected a new or an empty folder.")
    return directory


def _pixel_shape(model: TVRNModel, processor: Any, image_input: str | None) -> tuple[int | str, ...] | None:
    """(3, H, W) of what the processor makes of any picture, by name where a detector's keeps the aspect ratio; None
    for region features."""
    has_tower = model.config.looks
    if image_input is None:
        image_input = "pixels" if has_tower else "regions"
    if image_input not in ("pixels", "regions"):
        raise ValueError(f'image_input is {image_input!r}; expected "pixels" or "regions".')
    if image_input == "regions":
        if model.config.dual_encoder_config is not None:
            raise ValueError(
                'image_input is "regions", but the embeddings of a dual encoder are made of pixels; leave it out.'
            )
        return None
    if not has_tower:
        raise ValueError(
            'image_input="pixels", but this model has neither a vision tower nor a detector; leave it out, or give '
            '"regions".'
        )
    if processor.image_processor is None:
        raise ValueError(
            'The processor reads no pictures; give one with an image processor, or image_input="regions".'
        )
    if model.config.region_source == "pooled_map":
        raise ValueError(
            "This model reads two sets of pixels, its vision tower's and its detector's, and a graph here takes one; "
            'export it with image_input="regions".'
        )
    probes = [PIL.Image.new("RGB", size) for size in ((640, 480), (333, 500))]
    shapes = {tuple(processor(images=[probe])["pixel_values"].shape[1:]) for probe in probes}
    if len(shapes) > 1 and pads(processor.image_processor):
        return (3, "height", "width")
    if len(shapes) > 1:
        raise ValueError(
            f"{type(processor.image_processor).__name__} makes pictures of different shapes {sorted(shapes)}; a graph "
            "needs one: set its size to a height and a width or do_center_crop=True, or build the processor with "
            "TVRNProcessor.from_backbones(..., image_size=...)."
        )
    return shapes.pop()


def _write_graphs(
    model: TVRNModel, pixel_shape: tuple[int | str, ...] | None, text_length: int | None, folder: Path
) -> dict[str, Any]:
    """The three files, and what the manifest says of them."""
    generator = torch.Generator().manual_seed(0)
    images = sample_images(model, pixel_shape, 1 if model.detector is not None else IMAGES, REGIONS, generator)
    texts = sample_texts(model, TEXTS, WORDS, generator, text_length)
    about: dict[str, Any] = {}
    about["image"], encoded = _write_graph("image", image_graph(model, pixel_shape), images, folder)
    if model.detector is not None:  # which took one picture
        encoded = {name: torch.cat([value] * IMAGES) for name, value in encoded.items()}
    about["text"], more = _write_graph("text", text_graph(model, text_length), texts, folder)
    encoded |= more
    about["pair"], _ = _write_graph("pair", pair_graph(model, encoded), encoded, folder)
    ids = next(each for each in about["text"]["inputs"] if each["name"] == "input_ids")
    ids["below"] = vocabulary_size(model)
    from .. import __version__

    return {
        "made_with": {"modeling_tvrn": __version__, "torch": torch.__version__},
        "model_fingerprint": model.fingerprint(),
        "graphs": about,
        "files": {"float32": {part: f"{part}.onnx" for part in about}},
    }


def _write_graph(
    part: str, graph: Graph, samples: dict[str, Tensor], folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One file; what the manifest says of it, and what the part gives for the samples."""
    inputs = {name: samples[name] for name in graph.axes}
    named = {
        name: {place: axis for place, axis in enumerate(axes) if isinstance(axis, str)}
        for name, axes in graph.axes.items()
    }
    logger.info("exporting the %s graph", part)
    try:
        outputs = write_onnx(graph.module, inputs, named, folder / f"{part}.onnx")
    except Exception as error:  # whatever the exporters raise, a user can do one thing about it
        raise ValueError(_cannot_export(part, graph, error)) from error
    about = {"inputs": _described(graph.axes, inputs), "outputs": _described(graph.outputs(outputs), outputs)}
    return about, outputs


def _cannot_export(part: str, graph: Graph, error: Exception) -> str:
    config = cast(TVRNModel, graph.module.model).config
    sees: Any = config.vision_config or config.detector_config
    tower: Any = {"image": config.vision_tower_config or sees, "text": config.text_tower_config}.get(part)
    what = f"The {part} side" if part != "pair" else "The pair stage"
    of = f" with its tower {tower.model_type!r}" if tower is not None else ""
    reason = " ".join(str(error).split())[:300]
    return (
        f"{what} of this model{of} cannot be exported: {type(error).__name__}: {reason} "
        + ('Export it without the tower: image_input="regions".' if part == "image" and sees is not None else "")
    ).strip()


def _described(axes: dict[str, tuple[str | int, ...]], tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    types = {name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()}
    return [{"name": name, "dtype": types[name], "shape": list(shape)} for name, shape in axes.items()]


def _pixel_recipe(processor: Any, pixel_shape: tuple[int | str, ...] | None) -> dict[str, Any] | None:
    """How pictures become pixels, as data; None where the image processor has a way of its own."""
    table = pixel_table(processor.image_processor) if pixel_shape is not None else None
    if table is None:
        return None
    return {
        "size": table.size,
        "crop": table.crop,
        "resample": None if table.resample is None else int(table.resample),
        "values": np.asarray(table.values, np.float64).tolist(),
    }


def _token_recipe(processor: Any) -> dict[str, Any] | None:
    """How captions become token ids with tokenizer.json; None where there is no such file."""
    tokenizer = processor.tokenizer
    if tokenizer is None or not tokenizer.is_fast:
        return None
    return {
        "max_length": check_length(processor.max_text_length, tokenizer),
        "special_ids": special_ids(tokenizer),
        "pad_id": tokenizer.pad_token_id,
        "pad_token": tokenizer.pad_token,
        "pad_to": _text_length(processor),
    }


def _same_tokens(exported: OnnxModel, processor: Any) -> bool:
    """Whether tokenizer.json alone gives the processor's tokens; a tokenizer may change captions in its own code."""
    recipe = exported.manifest["tokens"]
    if recipe is None:
        return False
    wanted, _ = tokenize(processor.tokenizer, PROBES, recipe["max_length"], processor.text_padding)
    found = exported.tokens(PROBES)
    same = all(np.array_equal(found[name], wanted[name]) for name in wanted)
    if not same:
        logger.warning(
            "%s reads captions otherwise than its tokenizer.json: give OnnxModel the token ids of this processor",
            type(processor.tokenizer).__name__,
        )
    return same


def _write_beside(folder: Path, processor: Any, manifest: dict[str, Any]) -> None:
    """The processor, and the code that runs the graphs without torch."""
    processor.save_pretrained(folder)
    for name in ("export/tvrn_onnx.py", "pixels_tvrn.py"):
        _copy_code(name, folder)
    write_manifest(folder, manifest)


def _copy_code(name: str, folder: Path) -> None:
    """A module of the package; beside the graphs there is none, and what it imports from ours lies next to it."""
    code = resources.files("modeling_tvrn").joinpath(name).read_text("utf-8")
    code = re.sub(r"^from \.+(?:\w+\.)*(?=\w+ import)", "from ", code, flags=re.MULTILINE)
    (folder / Path(name).name).write_text(code, "utf-8")


def _write_search(folder: Path, manifest: dict[str, Any]) -> None:
    if manifest["pixels"] is None or manifest["tokens"] is None:
        missing = "pictures" if manifest["pixels"] is None else "captions"
        raise ValueError(
            f"This export reads no {missing} by itself, and a search needs both pictures and captions; export it "
            "without search, and give OnnxModel its inputs."
        )
    for name in ("export/tvrn_search.py", "data/image_folder.py"):
        _copy_code(name, folder)
    (folder / "pyproject.toml").write_text(
        SEARCH_PROJECT.format(version=manifest["made_with"]["modeling_tvrn"]), "utf-8"
    )


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Put the manifest in its place, whole."""
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


def _check_parity(parity: tuple[Parity, ...], tolerance: float) -> None:
    worst = max(parity, key=lambda each: each.worst)
    if not worst.worst <= tolerance:
        raise ValueError(
            f"The exported graphs differ from the model by {worst.worst:.1e}, more than tolerance={tolerance:g} "
            f"({worst}); nothing was written. Report it with the versions of torch and onnxruntime."
        )


def megabytes(folder: Path, name: str) -> float:
    """Of a graph's file and, where its weights lie beside it, of theirs."""
    return sum(path.stat().st_size for path in folder.glob(f"{name}*")) / 1e6

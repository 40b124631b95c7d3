"""Dynamic int8 quantisation of an export: weights in 8 bits, activations quantised as they come."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engines import LARGEST_FILE
from .tvrn_onnx import MANIFEST
from .writing import megabytes, write_manifest

PARTS = ("image", "text", "pair")
# Matrix products by weights, among them every linear layer; convolutions would lose more than they win this way.
OPERATORS = ("MatMul", "Gemm")


def quantize_onnx(directory: str | os.PathLike[str], parts: Sequence[str] = PARTS) -> dict[str, float]:
    """Add int8 graphs to an export: `OnnxModel(directory, precision="int8")` runs them.

    Every matrix of weights gets a scale a column, and 7 of the 8 bits: processors without VNNI add pairs of products
    up in 16 bits, which 8 bits overflow. What is multiplied by it is quantised when it comes. Attention, norms,
    softmaxes, convolutions and embedding tables stay in float32. What it costs in recall depends on the model: measure
    it (examples/export.py does).

    Args:
        directory: Of `export_onnx`.
        parts: Graphs to quantise; "int8" uses the float32 graph of the others.

    Returns:
        Megabytes of each new file.

    Raises:
        ImportError: If the extra is missing.
        ValueError: If there is no export, or a part is unknown.
    """
    folder = Path(directory)
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} has no {MANIFEST}; expected a folder that export_onnx wrote.")
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"parts is {list(parts)}; expected some of {', '.join(PARTS)}.")
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    files = dict(manifest["files"]["float32"])
    for part in parts:
        files[part] = f"{part}.int8.onnx"
        _quantize(folder / manifest["files"]["float32"][part], folder / files[part])
    manifest["files"]["int8"] = files
    write_manifest(folder, manifest)
    return {files[part]: megabytes(folder, files[part]) for part in parts}


def _quantize(source: Path, target: Path) -> None:
    onnx, quantization = _import_quantization()
    graphs = onnx.load(source)
    # Recorded shapes of weights that the quantiser transposes would contradict what it infers; it infers all again.
    del graphs.graph.value_info[:]
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends a preprocessing that the exporter has done, to the root logger
    try:
        quantization.quantize_dynamic(
            graphs,
            target,
            op_types_to_quantize=list(OPERATORS),
            per_channel=True,
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=source.stat().st_size > LARGEST_FILE,
        )
    finally:
        root.setLevel(level)


def _import_quantization() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime.quantization
    except ImportError as error:
        raise ImportError('quantisation needs onnx and onnxruntime: pip install "modeling-tvrn[export]"') from error
    return onnx, onnxruntime.quantization

"""ONNX of a model's three parts, image side, text side and pair stage, and their int8 form (extra `export`)."""

from .quantizing import quantize_onnx
from .report import ExportReport
from .tvrn_onnx import OnnxModel
from .writing import export_onnx

__all__ = ["ExportReport", "OnnxModel", "export_onnx", "quantize_onnx"]

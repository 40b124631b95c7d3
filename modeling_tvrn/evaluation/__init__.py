"""Named protocols: encode a gallery, score it, rank it, report it."""

from .compare import ComparedScore, ComparisonReport, check_names, compare
from .contrast import ContrastReport, evaluate_contrast
from .encoding import encode_dataset
from .fits import FitsReport, evaluate_fits
from .graded import GradedPairs, GradedReport, evaluate_graded
from .protocols import CONTRAST, PROTOCOLS, Protocol
from .provenance import commit, versions
from .report import EvaluationReport
from .run import evaluate
from .unimodal import SentencePairs, UnimodalReport, evaluate_unimodal, read_image_labels
from .zero_shot import LabelledImages, zero_shot_accuracy

__all__ = [
    "CONTRAST",
    "PROTOCOLS",
    "ComparedScore",
    "ComparisonReport",
    "ContrastReport",
    "EvaluationReport",
    "FitsReport",
    "GradedPairs",
    "GradedReport",
    "LabelledImages",
    "Protocol",
    "SentencePairs",
    "UnimodalReport",
    "check_names",
    "commit",
    "compare",
    "encode_dataset",
    "evaluate",
    "evaluate_contrast",
    "evaluate_fits",
    "evaluate_graded",
    "evaluate_unimodal",
    "read_image_labels",
    "versions",
    "zero_shot_accuracy",
]

"""Named protocols: encode a gallery, score it, rank it, report it."""

from .encoding import encode_dataset
from .protocols import PROTOCOLS, Protocol
from .provenance import commit, versions
from .report import EvaluationReport
from .run import evaluate

__all__ = ["PROTOCOLS", "EvaluationReport", "Protocol", "commit", "encode_dataset", "evaluate", "versions"]

"""Search over a collection of photographs or captions: shortlist by embeddings, rerank by the pair score."""

from .build import BuildReport
from .fingerprint import OtherModelError
from .index import Hit, Hits, ImageTextIndex
from .versions import IndexBusyError

__all__ = ["BuildReport", "Hit", "Hits", "ImageTextIndex", "IndexBusyError", "OtherModelError"]

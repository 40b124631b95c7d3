"""Search over a collection of photographs or captions: shortlist by embeddings, rerank by the pair score."""

from ..storage.files import BusyError as IndexBusyError
from .build import BuildReport
from .fingerprint import OtherModelError
from .index import Hit, Hits, ImageTextIndex

__all__ = ["BuildReport", "Hit", "Hits", "ImageTextIndex", "IndexBusyError", "OtherModelError"]

"""Outputs of frozen networks, computed once and kept on disk: region caches, and the store underneath."""

from .extraction import RegionExtraction, resize_only
from .fingerprint import StaleStoreError
from .pooling import pool_boxes
from .region_records import with_regions
from .regions import RegionCache, region_fingerprint
from .shards import BrokenShardError
from .store import ArrayStore, StoreWriter

__all__ = [
    "ArrayStore",
    "BrokenShardError",
    "RegionCache",
    "RegionExtraction",
    "StaleStoreError",
    "StoreWriter",
    "pool_boxes",
    "region_fingerprint",
    "resize_only",
    "with_regions",
]

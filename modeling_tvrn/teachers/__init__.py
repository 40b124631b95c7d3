"""Frozen networks, and their outputs computed once and kept on disk: teachers, region caches, the store underneath."""

from ..layers_tvrn import pool_boxes
from ..pixels_tvrn import resize_only
from ..storage.arrays import ArrayStore, StoreWriter
from ..storage.files import StorageError
from ..storage.fingerprints import StaleStoreError
from .caption_cache import CaptionCache, caption_fingerprint
from .duplicates_page import write_duplicates
from .extraction import RegionExtraction
from .false_negatives import false_negatives, near_duplicates
from .region_records import with_checked_regions, with_regions
from .regions import RegionCache, region_fingerprint
from .teacher import Teacher
from .teacher_cache import TeacherCache

__all__ = [
    "ArrayStore",
    "CaptionCache",
    "RegionCache",
    "RegionExtraction",
    "StaleStoreError",
    "StorageError",
    "StoreWriter",
    "Teacher",
    "TeacherCache",
    "caption_fingerprint",
    "false_negatives",
    "near_duplicates",
    "pool_boxes",
    "region_fingerprint",
    "resize_only",
    "with_checked_regions",
    "with_regions",
    "write_duplicates",
]

"""Image-caption pairs: one record shape out of every source, and what training makes batches of them with."""

from .contrast import ContrastRow, contrast_rows, read_contrast_rows
from .fingerprint import data_fingerprint
from .images import MAX_IMAGE_PIXELS, ImageError, keep_image_memory
from .loading import PRESETS, load_pairs
from .records import PairDataset, PairStream
from .sampler import EpochShuffledSampler
from .shuffled import RawItem, ShuffledStream, StreamItems
from .skipped import SkipReport
from .training_pairs import CaptionDataset, CaptionStream, PairCollator
from .worded import unusable_captions, with_words

__all__ = [
    "MAX_IMAGE_PIXELS",
    "PRESETS",
    "CaptionDataset",
    "CaptionStream",
    "ContrastRow",
    "EpochShuffledSampler",
    "ImageError",
    "PairCollator",
    "PairDataset",
    "PairStream",
    "RawItem",
    "ShuffledStream",
    "SkipReport",
    "StreamItems",
    "contrast_rows",
    "data_fingerprint",
    "keep_image_memory",
    "load_pairs",
    "read_contrast_rows",
    "unusable_captions",
    "with_words",
]

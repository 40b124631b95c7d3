"""Why an image and a caption match: what every word says, as numbers that add up, a picture, and a page."""

from .evidence import Explanation, WordEvidence, explain

__all__ = ["Explanation", "WordEvidence", "explain"]

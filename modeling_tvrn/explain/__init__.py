"""Why an image and a caption match: the evidence of every word, as numbers that add up, a picture, and a page."""

from .evidence import Explanation, WordEvidence, explain

__all__ = ["Explanation", "WordEvidence", "explain"]

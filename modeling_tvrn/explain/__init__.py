"""Why an image and a caption match: what every word says, as numbers that add up, a picture, and a page."""

from .explanation import WordExplanation
from .parts import Explanation, explain

__all__ = ["Explanation", "WordExplanation", "explain"]

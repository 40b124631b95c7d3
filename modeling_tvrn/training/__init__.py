"""Training: the configuration of a run and the loop that turns pairs into a model folder."""

from .config import TrainingConfig

__all__ = ["TrainingConfig"]

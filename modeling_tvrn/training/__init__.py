"""Training: the configuration of a run and the loop that turns pairs into a model folder."""

from typing import TYPE_CHECKING

from .config import TrainingConfig
from .settings import describe

if TYPE_CHECKING:
    from .divergence import TrainingStopped
    from .loop import train
    from .unimodal_heads import UnimodalHeads

__all__ = ["TrainingConfig", "TrainingStopped", "UnimodalHeads", "describe", "train"]


def __getattr__(name: str) -> object:
    """The loop and what it needs are loaded on first use: a configuration is read without torch."""
    if name == "train":
        from .loop import train

        return train
    if name == "TrainingStopped":
        from .divergence import TrainingStopped

        return TrainingStopped
    if name == "UnimodalHeads":
        from .unimodal_heads import UnimodalHeads

        return UnimodalHeads
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

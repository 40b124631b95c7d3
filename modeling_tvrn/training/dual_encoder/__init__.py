"""Training of any dual encoder of transformers (CLIP, SigLIP, ALIGN, ...) by its own loss, with CUSA beside it.

The model is used as it is: its forward pass with `return_loss=True` gives the loss and both embeddings. A batch has N
different images with one caption each, which is what such losses expect. What CUSA learns beside the model, its
uni-modal heads, is saved in a file of its own next to the checkpoint.
"""

from .config import DualEncoderConfig
from .loop import DualEncoderTraining, train_dual_encoder
from .model import UnimodalHeads

__all__ = ["DualEncoderConfig", "DualEncoderTraining", "UnimodalHeads", "train_dual_encoder"]

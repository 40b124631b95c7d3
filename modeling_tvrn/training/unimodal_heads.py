"""A plain dual encoder's uni-modal heads: what CUSA learned beside it, in a file next to its checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..encoded_tvrn import share
from ..layers_tvrn import UnimodalHead

__all__ = ["UnimodalHeads"]

HEADS_FILE = "unimodal_heads.safetensors"


class UnimodalHeads(nn.Module):
    """Heads on a dual encoder's embeddings, for comparing items of one modality.

    Args:
        size: P, of the embeddings.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.image = UnimodalHead(size)
        self.text = UnimodalHead(size)

    def forward(self, image_embeds: Tensor, text_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """(I, P) and (T, P) cross-modal embeddings -> the same of each modality alone, unit norm."""
        return self.image(image_embeds), self.text(text_embeds)

    @classmethod
    def of(cls, model: Any) -> UnimodalHeads:
        """Those of a TVRNModel with `use_unimodal_heads`; the modules are shared, not copied."""
        heads = cls(model.config.projection_size)
        heads.image, heads.text = model.unimodal_image_head, model.unimodal_text_head
        return heads

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the heads beside a checkpoint."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, Path(folder) / HEADS_FILE)
        share(Path(folder) / HEADS_FILE)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> UnimodalHeads:
        """Read the heads that lie beside a checkpoint.

        Raises:
            FileNotFoundError: there are none.
        """
        path = Path(folder) / HEADS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"no {HEADS_FILE} in {os.fspath(folder)!r}: the model was trained without heads")
        tensors = load_file(path)
        heads = cls(len(tensors["image.norm.weight"]))
        heads.load_state_dict(tensors)
        return heads.eval()

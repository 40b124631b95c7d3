"""The dual encoder itself, the heads beside it, and the loss of both."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoProcessor

from ...layers_tvrn import UnimodalHead
from ...trust_tvrn import MODEL_CODE, PROCESSOR_CODE, explained, without_code
from ..cusa import CUSATerms, take_teachers
from ..exchange import gather_rows

__all__ = ["DualObjective", "UnimodalHeads", "features", "load_dual_encoder", "save_dual_encoder"]

HEADS_FILE = "unimodal_heads.safetensors"


class UnimodalHeads(nn.Module):
    """Heads on a dual encoder's embeddings, for comparing items of one modality; kept beside its checkpoint."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.image = UnimodalHead(size)
        self.text = UnimodalHead(size)

    def forward(self, image_embeds: Tensor, text_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """(I, P) and (T, P) cross-modal embeddings -> the same of each modality alone, unit norm."""
        return self.image(image_embeds), self.text(text_embeds)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the heads beside a checkpoint."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, Path(folder) / HEADS_FILE)

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


class DualObjective(nn.Module):
    """The model's own loss on a process's pairs, and CUSA's on those of all processes."""

    def __init__(self, model: Any, heads: UnimodalHeads | None, cusa: CUSATerms | None) -> None:
        super().__init__()
        self.model, self.heads, self.cusa = model, heads, cusa

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its parts, detached, of what the collators make."""
        inputs = dict(batch)
        teachers, ids = take_teachers(inputs), inputs.pop("text_image_ids")
        output = self.model(**inputs, return_loss=True)
        parts = {"own": output.loss.detach()}
        if self.cusa is None:
            return output.loss, parts
        images, texts = (
            gather_rows(nn.functional.normalize(value.float(), dim=-1))
            for value in (output.image_embeds, output.text_embeds)
        )
        teachers, ids = {name: gather_rows(value) for name, value in teachers.items()}, gather_rows(ids)
        unimodal = self.heads(images, texts) if self.heads is not None else None
        scale = getattr(self.model, "logit_scale", None)
        extra, extra_parts = self.cusa(teachers, images, texts, ids, ids, unimodal, logit_scale=scale)
        return output.loss + extra, parts | extra_parts


def load_dual_encoder(checkpoint: str, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Model in float32 and processor.

    Args:
        checkpoint: Hub id or folder.
        trust_remote_code: run code of its repository, where its files ask for it.

    Raises:
        ValueError: nothing loads there, or it is no dual encoder.
    """
    trust = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(checkpoint, **trust)
        config = config if trust_remote_code else without_code(config)
        model = AutoModel.from_pretrained(checkpoint, config=config, dtype=torch.float32, **trust)
        processor = AutoProcessor.from_pretrained(checkpoint, **trust)
    except (OSError, KeyError, ValueError, AttributeError) as error:
        reason = explained(error, checkpoint, MODEL_CODE | PROCESSOR_CODE, **trust)
        raise ValueError(f"no dual encoder at {checkpoint!r}: {reason}") from error
    methods = [name for name in ("get_image_features", "get_text_features") if not hasattr(model, name)]
    if methods:
        raise ValueError(
            f"{checkpoint!r} is a {type(model).__name__} without {' and '.join(methods)}; expected a dual encoder "
            "such as CLIP or SigLIP"
        )
    return model, processor


def save_dual_encoder(folder: str | os.PathLike[str], model: Any, processor: Any, heads: UnimodalHeads | None) -> None:
    """Write the model as it came, its processor, and the heads beside it."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if heads is not None:
        heads.save(folder)


def features(model: Any, side: str, inputs: dict[str, Any]) -> Tensor:
    """Unit-norm embeddings of one side, on the CPU."""
    device = next(model.parameters()).device
    with contextlib.nullcontext() if device.type == "cpu" else torch.autocast(device.type, enabled=False):
        found = getattr(model, f"get_{side}_features")(**{name: value.to(device) for name, value in inputs.items()})
    found = found if isinstance(found, Tensor) else found.pooler_output  # an output since transformers 5
    return nn.functional.normalize(found.float(), dim=-1).cpu()

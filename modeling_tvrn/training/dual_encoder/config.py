"""What a dual encoder's training is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import check_cusa
from ..config import like
from ..settings import build, read_overrides, read_yaml, setting, shown, validate

__all__ = ["DualEncoderConfig"]


@dataclass
class DualEncoderConfig:
    """Every key of a run; `examples/train_dual_encoder.py --help` prints them all.

    Raises:
        ValueError: for a value of the wrong type or out of range, or keys that contradict one another.
    """

    checkpoint: str = setting("openai/clip-vit-base-patch32", "model", "Hub id or path of the dual encoder")
    trust_remote_code: bool = setting(False, "model", "run Python code that the dual encoder's repository brings")
    data: str = like("data")
    data_options: dict[str, Any] = like("data_options")
    train_split: str = like("train_split")
    validation_split: str = like("validation_split")
    num_workers: int = like("num_workers")

    epochs: int = setting(10, "schedule", "times that every caption is seen", minimum=1)
    max_steps: int | None = like("max_steps")
    batch_size: int = setting(128, "schedule", "pairs a batch, each of another image, over all processes", minimum=2)

    learning_rate: float = setting(1e-5, "optimizer", "highest rate of the model's own weights", above=0.0)
    new_learning_rate: float = setting(1e-3, "optimizer", "highest rate of heads and temperatures of CUSA", above=0.0)
    final_rate: float = setting(
        0.1, "optimizer", "share of the highest rates at which the cosine ends", minimum=0.0, maximum=1.0
    )
    warmup_ratio: float = like("warmup_ratio")
    weight_decay: float = setting(1e-4, "optimizer", "AdamW's, on matrices only", minimum=0.0)
    max_grad_norm: float | None = like("max_grad_norm")

    cusa: bool = like("cusa")
    cusa_image_teacher: str | None = like("cusa_image_teacher")
    cusa_text_teacher: str | None = like("cusa_text_teacher")
    cusa_alpha: float = setting(0.1, "cusa", "weight of the cross-modal soft labels (0: off)", minimum=0.0)
    cusa_beta: float = setting(0.5, "cusa", "weight of the uni-modal soft labels (0: off)", minimum=0.0)
    cusa_heads: bool = setting(True, "cusa", "uni-modal heads for the uni-modal part (false: on the embeddings)")
    cusa_teacher_temperature: float = like("cusa_teacher_temperature")
    cusa_student_temperature: float = like("cusa_student_temperature")
    cusa_lowest_temperature: float = like("cusa_lowest_temperature")
    cusa_teachers: str = like("cusa_teachers")
    cusa_exclude_self: bool = like("cusa_exclude_self")
    cusa_on_logits: bool = like("cusa_on_logits")
    cusa_center_teachers: bool = like("cusa_center_teachers")

    evaluation_batch_size: int = like("evaluation_batch_size")
    output_dir: str = setting("runs/dual-encoder", "run", "folder of the model: checkpoint, processor, heads, results")
    seed: int = like("seed")
    mixed_precision: str = like("mixed_precision")
    cpu: bool = like("cpu")
    logging_steps: int = like("logging_steps")

    def __post_init__(self) -> None:
        validate(self)
        check_cusa(self)

    def __repr__(self) -> str:
        return shown(self)

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> DualEncoderConfig:
        """A configuration from keys and values; an unknown key is refused with the nearest known ones."""
        return build(cls, values)

    @classmethod
    def from_yaml(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> DualEncoderConfig:
        """A configuration from a YAML file and `key=value` overrides, which win."""
        return build(cls, read_overrides(overrides, read_yaml(path) if path is not None else {}))

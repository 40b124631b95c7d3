"""What a training run is told: one flat set of keys, the same in YAML, on the command line and in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checks import check_together
from .keys import TrainingKeys
from .phases import read_phases, written
from .recipes import recipe_values
from .settings import build, read_overrides, shown, validate

__all__ = ["TrainingConfig"]


@dataclass(repr=False)
class TrainingConfig(TrainingKeys):
    """Every key of a training run (`TrainingKeys`), checked; `tvrn train --keys` prints them all.

    Keys of the model's own configuration go under `model` (`model: {hidden_size: 256}` in YAML,
    `model.hidden_size=256` on the command line): among them freezing of towers (`freeze_vision`, `freeze_text`),
    sizes, losses and the ablation switches.

    Raises:
        ValueError: for a value of the wrong type or out of range, and for an unknown key under `model`.
    """

    def __post_init__(self) -> None:
        given = self.phases
        if given is not None:
            read_phases(given, {})  # its messages say more than those of any list of mappings
        validate(self)
        if given is not None:
            self.phases = written(self.schedule(), given)
        check_together(self)

    def __repr__(self) -> str:
        return shown(self)

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> TrainingConfig:
        """A configuration from keys and values; an unknown key is refused with the nearest known ones."""
        return build(cls, values)

    @classmethod
    def from_yaml(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainingConfig:
        """A configuration from a YAML file and `key=value` overrides, which win.

        Args:
            path: the file, or the name of a recipe that comes with the package; None starts from the defaults.
            overrides: such as `"batch_size=128"` or `"model.hidden_size=256"`; values are read as YAML.

        Raises:
            ValueError: for an unknown key (near matches are listed), a value of the wrong type or out of range, a file
                that is not a mapping, or an override without `=`.
        """
        return build(cls, read_overrides(overrides, recipe_values(path, overrides) if path is not None else {}))

"""What was exported, and how far it is from the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Parity:
    """One comparison of the exported graphs with the model, on random inputs of one size.

    Attributes:
        images, regions, texts, words: The size; pixels have no regions to choose.
        image_error, text_error, logit_error: Largest absolute difference of anything the image side gives, the text
            side gives, and of the logits of all three graphs in a row.
        largest: The largest absolute value beside each of the three.
    """

    images: int
    regions: int | None
    texts: int
    words: int
    image_error: float
    text_error: float
    logit_error: float
    largest: tuple[float, float, float]

    @property
    def worst(self) -> float:
        """The largest of the three errors, each as a share of the largest value where that is above 1."""
        errors = (self.image_error, self.text_error, self.logit_error)
        return max(error / max(1.0, value) for error, value in zip(errors, self.largest, strict=True))


@dataclass(frozen=True)
class ExportReport:
    """What `export_onnx` wrote.

    Attributes:
        directory: Of the files.
        megabytes: Size of each graph's file.
        parity: Comparisons with the model, at sizes other than the traced ones.
        reads_images: Whether `OnnxModel` makes pixels of pictures itself.
        reads_captions: Whether `OnnxModel` makes token ids of captions itself.
    """

    directory: Path
    megabytes: dict[str, float]
    parity: tuple[Parity, ...]
    reads_images: bool
    reads_captions: bool

    @property
    def worst(self) -> float:
        """The largest difference from the model, as `Parity.worst`."""
        return max(each.worst for each in self.parity)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "directory": str(self.directory), "worst": self.worst}

    def __str__(self) -> str:
        lines = [f"{self.directory}: " + ", ".join(f"{name} {size:.1f} MB" for name, size in self.megabytes.items())]
        lines.append("difference from the model  images  regions  texts  words     images      texts     logits")
        for each in self.parity:
            regions = "grid" if each.regions is None else each.regions
            lines.append(
                f"{'':25}  {each.images:6}  {regions:>7}  {each.texts:5}  {each.words:5}  {each.image_error:9.1e}  "
                f"{each.text_error:9.1e}  {each.logit_error:9.1e}"
            )
        return "\n".join(lines)
